"""The record and the report: what is kept, what is printed, what survives a failure."""

from __future__ import annotations

import gc
import json
import logging
import weakref

import pytest
import torch

import fxopt
from fxopt import LayerSkip, Report
from fxopt.passes.provenance import orphans
from fxopt.passes.reasons import REASONS
from fxopt.passes.record import Remark, node_rows
from fxopt.testing import TINY

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])


@pytest.fixture
def report(eager_lowering) -> Report:
    model = fxopt.compile(TINY["handwritten"](), LayerSkip(skip=(1,)))
    model(IDS)
    return fxopt.report(model)


def test_nothing_compiled_says_so():
    assert "nothing has been compiled" in fxopt.report().summary()
    assert fxopt.reports() == []


def test_the_summary_fits_and_names_what_happened(report):
    lines = report.summary().splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert "Handwritten" in lines[0]
    assert any(line.startswith("  ~ layer_skip") and "1/1 applied" in line for line in lines)


def test_stages_hold_the_graph_before_and_after(report):
    graph = report.graphs[0]
    before, after = graph.rows(0), graph.rows(1)
    assert len(before) == graph.stages[0].nodes_after
    assert len(after) == graph.stages[1].nodes_after < len(before)
    assert any(row.module == "layers.1.norm1" for row in before)
    assert not any(row.module == "layers.1.norm1" for row in after if row.op != "placeholder")
    assert {row.id for row in after} <= {row.id for row in before}


def test_slices_are_written_as_in_python():
    graph = torch.fx.symbolic_trace(lambda x: x[..., 4:] + x[:4, ::2] + x[:, 1:3] + x[1:8:2]).graph
    written = [row.args for row in node_rows(graph) if row.target == "getitem"]
    assert written == ["x, (Ellipsis, 4:)", "x, (:4, ::2)", "x, (:, 1:3)", "x, 1:8:2"]


def test_every_row_has_a_place(report):
    for row in report.graphs[0].rows(1):
        if row.op in ("call_function", "call_method"):
            assert row.source, row
            assert row.origins


def test_settings_carry_their_origin(report):
    rows = {s.key: s for s in report.graphs[0].settings}
    assert rows["layer_skip"].origin == "options"
    assert "skip=(1,)" in rows["layer_skip"].value


def test_json_round_trip(report, tmp_path):
    path = report.to_json(tmp_path / "report.json")
    again = Report.from_json(path)
    assert again.summary() == report.summary()
    assert json.loads(path.read_text()) == json.loads(json.dumps(again.to_dict(), default=str))


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"graphs": []}', "no schema_version"), ('{"schema_version": 99, "graphs": []}', "schema 99"),
     ('{"schema_version": 1, "graphs": [{}]}', "damaged"), ('{"schema', "no JSON")],
)  # fmt: skip
def test_a_foreign_report_is_refused(tmp_path, text, words):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        Report.from_json(path)


def test_a_failed_compile_keeps_its_report(monkeypatch):
    from fxopt.codegen import compat

    def fail(*_):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(compat, "compile_with_inductor", fail)
    with pytest.raises(Exception, match="no compiler today"):
        fxopt.compile(TINY["handwritten"](), LayerSkip(skip=(1,)))(IDS)
    report = fxopt.report()
    assert "no compiler today" in report.summary()
    assert report.count("layer_skip") == 1


def test_nothing_of_the_model_is_kept_alive(eager_lowering):
    model = fxopt.compile(TINY["handwritten"](), LayerSkip(skip=(1,)))
    model(IDS)
    weight = weakref.ref(model.layers[0].proj.weight)
    report = fxopt.report()
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None
    assert report.count("layer_skip") == 1


def test_record_levels(eager_lowering, monkeypatch):
    model = TINY["handwritten"]()
    for level, rows, code in (("0", 0, False), ("1", 1, False), ("full", 1, True)):
        torch._dynamo.reset()
        torch.compile(model, backend="fxopt", options={"record": level, "layer_skip": {"skip": (1,)}})(IDS)
        stage = fxopt.report().graphs[-1].stages[0]
        assert bool(stage.added) == bool(rows)
        assert bool(stage.code) == code
    monkeypatch.setenv("FXOPT_RECORD", "0")
    torch._dynamo.reset()
    torch.compile(model, backend="fxopt")(IDS)
    assert not fxopt.report().graphs[-1].stages[0].added


def test_no_orphans_on_tiny_models(eager_lowering, monkeypatch):
    from fxopt import backend

    seen = []
    original = backend.verify

    def check(graph):
        original(graph)
        seen.append(len(orphans(graph)))

    monkeypatch.setattr(backend, "verify", check)
    model = fxopt.compile(TINY["llama"](), LayerSkip(skip=(1,)))
    with torch.no_grad():
        model.generate(IDS, max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True)
    assert seen
    assert not any(seen)


def test_remarks_have_codes_of_the_closed_list():
    with pytest.raises(ValueError, match="reason code"):
        Remark("x", "missed", "", "why", code="FX000")
    with pytest.raises(ValueError, match="status"):
        Remark("x", "done", "", "why")
    for code, reason in REASONS.items():
        assert code == reason.code
        assert reason.meaning.endswith((".", "?"))
        assert reason.advice


def test_the_report_of_a_plainly_compiled_model_is_found(eager_lowering):
    first, second = TINY["handwritten"](), TINY["handwritten"]()
    torch.compile(first, backend="fxopt", options={"layer_skip": {"skip": (1,)}})(IDS)
    torch.compile(second, backend="fxopt", options={"layer_skip": {"skip": (0, 1)}})(IDS)
    assert fxopt.report(first).count("layer_skip") == 1
    assert fxopt.report(second).count("layer_skip") == 2
    assert len(fxopt.reports()) == 2
    assert fxopt.report().count("layer_skip") == 2


def test_logging_prints_the_summary(eager_lowering, caplog):
    with caplog.at_level(logging.INFO, logger="fxopt"):
        fxopt.compile(TINY["handwritten"](), LayerSkip(skip=(1,)))(IDS)
    assert any("layer_skip" in record.getMessage() for record in caplog.records)


def test_summary_tells_how_deep_the_steps_went(eager_lowering):
    from fxopt.testing import TINY

    model = TINY["llama"]()
    fxopt.compile(model, fxopt.EarlyExit(layers=(1,), confidence="max", threshold=0.0))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        model(ids, use_cache=False)
        assert "rows by layers run  1: 1, 3: 0; mean 1.00 of 3" in fxopt.report(model).summary()
        model(ids, use_cache=False)
    assert "1: 2, 3: 0" in fxopt.report(model).summary()
    read = fxopt.Report.from_dict(fxopt.report(model).to_dict())
    assert "rows by layers run" not in read.summary()


def test_memory_is_bounded_by_rows_of_node_tables(eager_lowering, monkeypatch):
    models = [fxopt.compile(TINY["handwritten"](), LayerSkip(skip=(1,))) for _ in range(3)]
    models[0](IDS)
    one = sum(len(s.added) + len(s.changed) for s in fxopt.report(models[0]).passes)
    monkeypatch.setattr(fxopt.reporting, "ROWS", int(2.5 * one))
    for model in models[1:]:
        model(IDS)
    kept = [bool(fxopt.report(model).graphs[0].rows(0)) for model in models]
    assert kept == [False, True, True]
    # What the oldest compilation did is known still, and where; only its nodes are gone.
    assert "was applied at layers.1" in fxopt.report(models[0]).why("layer_skip", "layers.1")
    assert fxopt.report(models[0]).graphs[0].nodes_before > 50
