"""``fxopt inspect``: every view, its exit codes, and what is left when a script or a file is bad."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

import fxopt
from fxopt import SettingError
from fxopt.inspection import minimal, views
from fxopt.passes.record import NodeRow
from fxopt.testing import TINY

typer_testing = pytest.importorskip("typer.testing")

SCRIPT = """
import torch, fxopt
from fxopt.testing import TINY
plain = TINY["handwritten"]()
model = fxopt.compile(plain, fxopt.LayerSkip(skip=(1,)))
inputs = (torch.tensor([[5, 17, 3, 99]]),)
techniques = (fxopt.LayerSkip(skip=(1,)),)
with torch.no_grad():
    model(*inputs)
"""


@pytest.fixture
def run():
    from fxopt.commands import app

    return lambda *arguments: typer_testing.CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("view", ["summary", "kernels", "stages", "why", "diff"])
def test_each_view_is_text_and_data(run, made_up, tmp_path, view):
    path = made_up(layers=4).to_json(tmp_path / "r.json")
    more = {"why": ["--technique", "async_softmax"], "diff": ["--other", path], "stages": ["--stage", "2"]}.get(
        view, []
    )
    text = run(path, "--view", view, *more)
    assert text.exit_code == 0 and text.output.strip() and max(map(len, text.output.splitlines())) <= 100
    data = json.loads(run(path, "--view", view, "--json", *more).output)
    assert data["schema_version"] == 1 and data["view"].startswith("diff" if view == "stages" else view)


def test_exit_codes(run, made_up, tmp_path):
    path = made_up(layers=4).to_json(tmp_path / "r.json")
    assert run(path, "--expect", "async_softmax>=1").exit_code == 0
    missed = run(path, "--expect", "async_softmax>=32")
    assert missed.exit_code == 1 and "found 3 applied" in missed.output
    for arguments in ((path, "--view", "y"), (path, "--view", "why"), (tmp_path / "no.json",), (),
                      (path, "--view", "stages", "--graph", "7"), (path, "--profile"), (path, path),
                      ("--view", "diff", path), ("--view", "explain"),
                      (path, "--view", "numerics")):  # fmt: skip
        assert run(*arguments).exit_code == 2, arguments


def test_a_code_and_a_second_report_may_stand_alone(run, made_up, tmp_path):
    path = made_up(layers=4).to_json(tmp_path / "r.json")
    assert run("--view", "explain", "fx104").output.startswith("FX104 used elsewhere")
    assert run("--view", "diff", path, made_up(layers=5).to_json(tmp_path / "s.json")).output.startswith("graph 0/0")
    assert "there is no report" in run(tmp_path / "no.json").output


def test_a_failing_script_is_shown_saved_and_code_3(run, eager_lowering, script, tmp_path):
    script.write_text(SCRIPT + "raise ValueError('half-way')\n")
    found = run("--save", tmp_path / "kept.json", "--html", tmp_path / "kept.html", "--", script)
    assert found.exit_code == 3 and "the script failed: ValueError: half-way" in found.output
    assert views.load(tmp_path / "kept.json").count("layer_skip") == 1
    assert "layer_skip" in (tmp_path / "kept.html").read_text()


def test_what_a_script_prints_does_not_mix_with_the_view(run, eager_lowering, script):
    script.write_text(SCRIPT + "print('chatter')\n")
    found = run("--json", "--", script)
    assert json.loads(found.stdout)["view"] == "summary" and "chatter" in found.stderr


def test_numerics_of_a_script(run, eager_lowering, script):
    found = run("--view", "numerics", "--json", "--", script)
    assert found.exit_code == 0, found.output
    stages = {s["name"]: s for s in json.loads(found.output)["stages"]}
    assert stages["layer_skip"]["verdict"] in ("as eager", "closer", "rounding") and stages["layer_skip"]["kl"] > 0
    assert list(stages)[-1] == "compiled" and stages["compiled"]["error"] == stages["layer_skip"]["error"]
    script.write_text("model = 3\n")
    assert "defines no 'inputs'" in run("--view", "numerics", "--", script).output


def test_repro_of_a_script(run, eager_lowering, script, tmp_path):
    found = run("--view", "repro", "--", script)
    assert found.exit_code == 0, found.output
    path = tmp_path / "stage.py"
    path.write_text(found.output.replace('BACKEND = "inductor"', 'BACKEND = "eager"'))
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and "differ by at most 0" in ended.stdout, ended.stderr


CODE = """
def forward(self, x, y):
    a = x + y
    b = torch.nn.functional.gelu(a);  a = None
    c = torch.matmul(b, y)
    d = c * 2.0
    e = torch.matmul(d, x);  d = None
    return (e,)
"""


@pytest.fixture
def small(made_up):
    """A report of one graph with that code."""
    report = made_up(layers=1)
    (stage,) = report.graphs[0].stages[:] = report.graphs[0].stages[:1]
    names = [("x", "placeholder"), ("y", "placeholder"), *((n, "call_function") for n in "abcde")]
    stage.added = [NodeRow(i, n, op, n, "", "4x4", "float32", "m", "f.py:1", (i,)) for i, (n, op) in enumerate(names)]
    stage.order, stage.code = list(range(len(names))), CODE
    report.graphs[0].kernels[0].nodes = (4,)
    return report


def test_minify_keeps_only_what_fails(small, monkeypatch):
    tried = []

    def failure(source):
        tried.append(source)
        return "KernelFault" if "torch.matmul(b, y)" in source else ""

    monkeypatch.setattr(minimal, "failure", failure)
    view = views.repro(small, minify=True)
    source = view.to_dict()["source"]
    body = source.split("class Stage")[1].split("def tensor")[0]
    assert "def forward(self, y, b):" in body and "return (c,)" in body and body.count("=") == 1
    assert view.to_dict()["failure"] == "KernelFault" and 1 < len(tried) <= minimal.TRIALS
    monkeypatch.setattr(minimal, "failure", lambda source: "")
    with pytest.raises(SettingError, match="nothing to minify"):
        views.repro(small, minify=True)


def test_failures_are_told_apart(small):
    source = views.repro(small).text().replace('BACKEND = "inductor"', 'BACKEND = "eager"')
    assert minimal.failure(source) == ""
    assert minimal.failure(source.replace("gelu(", "nothing_of_this_name(")) == "AttributeError"
    assert minimal.failure(source.replace("return gap(eager,", "return 1 + gap(eager,")) == "eager and compiled differ"


def test_repro_of_a_stage_with_branches(eager_lowering, monkeypatch):
    monkeypatch.setenv("FXOPT_RECORD", "full")
    model = fxopt.compile(TINY["handwritten"](), fxopt.EarlyExit(layers=(1, 2)))
    with torch.no_grad():
        model(torch.tensor([[5, 17, 3, 99]]))
    report = fxopt.report(model)
    source = views.repro(report).text().replace('BACKEND = "inductor"', 'BACKEND = "eager"')
    assert "    def fxopt_exit_0_run(self, " in source and "torch.ops.higher_order.cond(" in source
    assert minimal.failure(source) == ""
    broken = source.replace("    def fxopt_exit_1_run(self", "    def other(self")  # the branches are what is run
    assert minimal.failure(broken) == "AttributeError"
    # What moved into a branch is in the table still, with its place and its descent; nothing of it counts as removed.
    graph = report.graphs[0]
    stage = next(s for s in graph.stages if s.name == "early_exit")
    captured, table = {r.id for r in graph.rows(0)}, graph.rows(len(graph.stages) - 1)
    assert stage.removed == [] and stage.nodes_after == len(table) == len({r.id for r in table})
    assert {f"layers.{i}" for i in range(3)} <= {".".join(r.module.split(".")[:2]) for r in table if r.id in captured}
    assert all(set(r.origins) <= captured for r in table if r.op != "output")


def test_repro_of_a_kernel(small):
    source = views.repro(small, kernel="attention_decode_ab12").to_dict()["source"]
    assert "def forward(self, y, b):" in source and "c = torch.matmul(b, y)" in source and "gelu" not in source
    with pytest.raises(SettingError, match="Did you mean 'attention_decode_ab12'"):
        views.repro(small, kernel="attention_decode_ab13")


def test_repro_of_a_kernel_of_a_later_graph(small):
    wanted = views.repro(small, kernel="attention_decode_ab12").to_dict()
    later = copy.deepcopy(small)
    later.graphs = (copy.deepcopy(small.graphs[0]), *later.graphs)
    later.graphs[0].kernels.clear()
    assert views.repro(later, kernel="attention_decode_ab12").to_dict() == wanted
    with pytest.raises(SettingError, match="it has none"):
        views.repro(later, 0, kernel="attention_decode_ab12")
