"""The measuring harness itself: interleaving, medians, correctness first."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch

from fxopt.bench import context, kept, load_suite
from fxopt.bench.harness import Peer, Result, Row, check_equal, environment, measure, quartiles
from fxopt.bench.models import llama

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


def contexts():
    """A result as the context suite makes it."""
    rows = [
        Row(f"{length} positions", peer, seconds, seconds * 0.9, seconds * 1.2, bound=0.001, note=note)
        for length, factor in ((1024, 1), (2048, 2))
        for peer, seconds, note in (
            ("HF eager", 0.01 * factor, ""), ("fxopt, exact", 0.004 * factor, "48 identical tokens"),
            ("fxopt, sink and window", 0.002, f"KL 0.0{factor}0"),
        )
    ]  # fmt: skip
    return Result("context", "fxopt bench context", environment("cpu"), rows)


def test_tokens_per_second_against_context(tmp_path):
    result = contexts()
    text = context.lines(result.to_dict())
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["HF eager"].split()[2:] == ["100", "50"]
    assert "250      125  48 identical tokens" in lines["fxopt, exact"]
    assert lines["fxopt, sink and window"].endswith("500      500  KL 0.010, KL 0.020")
    assert lines["(read bandwidth)"].split()[2:] == ["1,000", "1,000"]
    inductor = dataclasses.replace(result.rows[0], peer="inductor", median=0.008)
    assert context.remark(1024, [*result.rows[:2], inductor]) == "1024 positions: exact 2.00x inductor"
    pytest.importorskip("matplotlib")
    context.picture(result.to_dict(), tmp_path / "contexts.png")
    assert (tmp_path / "contexts.png").stat().st_size > 5000


@pytest.mark.parametrize("start", [20, 24])
def test_a_continued_cache_gives_the_logits_of_one_forward(start):
    model = llama(layers=2, width=32, heads=4, kv_heads=2, vocab_size=64)
    ids = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = context.Continued(model, context.prefilled(model, ids[:, :20], 32), 32)
        text.forced(ids[:, 20:])
        expected = model(ids).logits[0]
        torch.testing.assert_close(text.forced(ids[:, start:]), expected[start:], atol=1e-5, rtol=1e-5)
        assert context.divergence(expected, expected) == 0
        written = text.greedy(ids[:, 25:26], 6)[0]  # as if the text went on with it after 26 positions
        row = torch.cat((ids[0, :26], ids[0, 25:26], written))
        assert written.tolist() == model(row[None]).logits[0, 26:-1].argmax(-1).tolist()


@pytest.mark.slow
def test_context_suite_quick(eager_lowering):
    result = load_suite("context")(quick=True)
    assert len(result.rows) == 10
    assert result.rows[2].note == "48 identical tokens"
    assert 0 < float(result.rows[4].note.split()[1]) < 0.5


@pytest.mark.slow
def test_linears_quick():
    result = load_suite("linear")(quick=True)
    assert {(line["dtype"], line["rows"]) for line in result.figures} == {
        ("float32", 1), ("float32", 3), ("bfloat16", 1), ("bfloat16", 3),
    }  # fmt: skip
    for line in result.figures:
        assert line["library over it"] == line["library, ms"] / line["cpu_linear, ms"]
    with pytest.raises(ValueError, match="bench gemm"):
        load_suite("linear")(device="cuda")


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


def test_parts_that_there_are_not():
    with pytest.raises(ValueError, match="parts: model, vocabulary, tuned"):
        load_suite("depth")(technique="early_exit", part="forward")
    with pytest.raises(ValueError, match="those of early_exit and mixture_of_depths have"):
        load_suite("depth")(technique="router", part="forward")


@pytest.mark.parametrize("name", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_documents_show_the_kept_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert kept.filled(text) == text, f"run: python -m fxopt.bench.kept {name}"
