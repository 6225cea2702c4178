"""The measuring harness itself: interleaving, medians, correctness first."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from fxopt.bench import kept, load_suite
from fxopt.bench.harness import Peer, Result, check_equal, environment, measure, quartiles

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("names", "order"), [("ab", "ab" + "ab" * 3), ("abc", "abc" + "abc" + "bca" + "cab")])
def test_peers_are_interleaved_and_none_is_called_twice_in_a_row(names, order):
    calls = []
    peers = [Peer(name, lambda name=name: calls.append(name)) for name in names]
    measure("case", peers, rounds=3)
    assert "".join(calls) == order


def test_rows_hold_medians_and_ratios_to_the_first():
    import time

    peers = [Peer("fast", lambda: time.sleep(0.001)), Peer("slow", lambda: time.sleep(0.004))]
    fast, slow = measure("case", peers, rounds=5)
    assert fast.ratio == 1.0
    assert slow.ratio > 1.5
    assert fast.low <= fast.median <= fast.high


def test_peers_that_disagree_are_not_timed():
    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    peers = [Peer("a", lambda: None, lambda: one), Peer("b", lambda: None, lambda: other)]
    with pytest.raises(AssertionError, match="b differs from a"):
        check_equal(peers, tolerance=1e-3)
    nan = [Peer("a", lambda: None, lambda: one), Peer("b", lambda: None, lambda: one * float("nan"))]
    with pytest.raises(AssertionError):
        check_equal(nan, tolerance=1e-3)


def test_quartiles_of_one_value():
    assert quartiles([2.0]) == (2.0, 2.0)


def test_result_files(tmp_path):
    result = Result("suite", "command", environment("cpu"), measure("case", [Peer("a", lambda: None)], rounds=2))
    data = json.loads(result.to_json(tmp_path / "r.json").read_text())
    assert data["schema_version"] == 1
    assert data["environment"]["torch"] == torch.__version__
    assert "case" in result.table()
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.slow
def test_recorder_quick():
    result = load_suite("recorder")(quick=True)
    recorder = next(row for row in result.rows if row.peer == "recorder")
    assert recorder.ratio is not None and 0 < recorder.ratio < 0.1  # the goal of 0.02 is for an idle machine
    assert "byte-identical" in result.remarks[0]
    with pytest.raises(ValueError, match="--device cpu"):
        load_suite("recorder")(device="cuda")


def test_kept_results_fill_a_document(tmp_path):
    rows = measure("prefill 8", [Peer("a", lambda: None), Peer("b", lambda: None)], rounds=2)
    result = Result("depth", "fxopt bench depth", environment("cpu") | {"date": "2026-01-02"}, rows, ["a remark"])
    result.to_json(tmp_path / "new.json")
    Result("depth", "old", environment("cpu") | {"date": "2026-01-01"}, rows).to_json(tmp_path / "old.json")
    text = kept.filled("before\n<!-- bench depth -->\nstale\n<!-- end bench -->\nafter", tmp_path)
    assert "stale" not in text
    assert "| prefill 8 | b |" in text
    assert "`fxopt bench depth`, 2026-01-02" in text
    assert kept.filled(text, tmp_path) == text
    with pytest.raises(FileNotFoundError, match="fxopt bench overhead --keep"):
        kept.newest("overhead", tmp_path)


def test_figures_are_told_and_kept(tmp_path):
    figures = [{"confidence": "margin", "depth": 7.123456}, {"confidence": "state", "depth": 12.0}]
    result = Result("other", "fxopt bench other", environment("cpu"), figures=figures)
    assert "7.1235" in result.table() and "median" not in result.table()
    result.to_json(tmp_path / "r.json")
    text = kept.filled("<!-- bench other -->\n<!-- end bench -->", tmp_path)
    assert "| confidence | depth |\n|---|---|\n| margin | 7.1235 |" in text and "median" not in text


@pytest.mark.slow
def test_suites_of_exits_quick():
    """Whether they run, and agree with themselves; what they find is measured elsewhere."""
    quality = load_suite("exit_quality")(quick=True)
    assert quality.figures[0]["mean depth, batch 1"] == 12 and quality.figures[1]["mean depth, batch 1"] < 12
    timed = load_suite("depth")(quick=True, technique="early_exit")
    assert {row.peer for row in timed.rows} >= {"plain", "never, state", "always, none", "one check"}
    routed = load_suite("depth")(quick=True, technique="router")
    assert len(routed.rows) == 6 and "weights are read" in routed.remarks[-1]


@pytest.mark.parametrize("name", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_documents_show_the_kept_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert kept.filled(text) == text, f"run: python -m fxopt.bench.kept {name}"
