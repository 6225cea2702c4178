"""Every example runs as it stands."""

from __future__ import annotations

import pathlib
import runpy

import torch

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def test_skip_decode_is_short_and_skips(eager_lowering, capsys):
    source = (EXAMPLES / "skip_decode.py").read_text()
    assert source.count("\n") <= 60
    runpy.run_path(str(EXAMPLES / "skip_decode.py"))["main"](layers=4, width=64, steps=4)
    assert "SkipDecode" in capsys.readouterr().out
    import fxopt

    applied = [g.count("skip_decode") for r in fxopt.reports() for g in r.graphs]
    assert max(applied) == 3


def test_layer_skip(eager_lowering, capsys):
    runpy.run_path(str(EXAMPLES / "layer_skip.py"))["main"]()
    printed = capsys.readouterr().out
    assert "layers that run: (0, 2, 3, 5)" in printed
    assert "layer_skip" in printed


def test_attention(eager_lowering, capsys):
    source = (EXAMPLES / "attention.py").read_text()
    assert source.count("\n") <= 60
    with torch.no_grad():
        runpy.run_path(str(EXAMPLES / "attention.py"))["main"](length=64)
    printed = capsys.readouterr().out
    assert "filled    64 of 64" in printed
    assert "cache_extent" in printed
