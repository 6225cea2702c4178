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


def test_cpu_linear(capsys):
    with torch.no_grad():
        runpy.run_path(str(EXAMPLES / "cpu_linear.py"))["main"](width=512, layers=1, rounds=1)
    printed = capsys.readouterr().out
    assert "4 rows: library" in printed
    assert "1 row by [1344, 512]: the weight is read once" in printed


def test_train_mod_in_a_minute(tmp_path, capsys):
    import json
    import sys

    script = runpy.run_path(str(EXAMPLES / "train_mod.py"), run_name="train_mod")
    sys.modules.pop("train_mod", None)
    result = script["main"](script["QUICK"], tmp_path, compiled=False, limit=40)
    assert "of the FLOPs of a dense one" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["mean_held_out"] == result["mean_held_out"]
    assert all(loss < 5.5 for loss in result["mean_held_out"].values())  # below log 256: it has learned something
    flops, steps = result["flops_a_step"], {run["kind"]: run["steps"] for run in result["runs"]}
    spent = {kind: steps[kind] * flops[kind] for kind in steps}
    assert abs(spent["mixture of depths"] / spent["dense"] - 1) < 0.03


def test_the_figures_of_train_mod_were_made_by_its_recipe_at_equal_flops():
    import dataclasses
    import json
    import sys

    script = runpy.run_path(str(EXAMPLES / "train_mod.py"), run_name="train_mod")
    sys.modules.pop("train_mod", None)
    figures = json.loads((EXAMPLES / "train_mod" / "figures.json").read_text())
    assert figures["recipe"] == dataclasses.asdict(script["Recipe"]())
    flops, runs = figures["flops_a_step"], figures["runs"]
    assert sorted({run["seed"] for run in runs}) == [0, 1, 2]
    for run in runs:
        assert abs(run["steps"] * flops[run["kind"]] / (figures["recipe"]["steps"] * flops["dense"]) - 1) < 0.01
    assert figures["routed_over_dense"] < 1.02


def test_sparq(capsys):
    source = (EXAMPLES / "sparq.py").read_text()
    assert source.count("\n") <= 60
    variables = runpy.run_path(str(EXAMPLES / "sparq.py"))
    assert "SparQ" in capsys.readouterr().out
    q, keys = torch.randn(1, 2, 4, 32), torch.randn(1, 2, 40, 32)
    scores = variables["sparq"](q, keys, keys.transpose(2, 3))
    largest = q.abs().sum(2).topk(16, -1)[1]
    kept = torch.zeros(1, 2, 32).scatter(2, largest, 1.0)[:, :, None]
    torch.testing.assert_close(scores, torch.matmul(q * kept, keys.mT).amax(2))
