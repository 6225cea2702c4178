"""Why, views, differences, expectations, scripts, damaged files, repro: what `fxopt inspect` is made of."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch

import fxopt
from fxopt import LayerSkip, Report, SettingError, Technique
from fxopt.inspection import places, views
from fxopt.passes.reasons import REASONS
from fxopt.passes.record import SCHEMA_VERSION, Remark
from fxopt.testing import TINY

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])
ROOT = pathlib.Path(__file__).parents[2]


# -- why ------------------------------------------------------------------------------------------------------------


def test_why_applied(made_up):
    text = made_up().why("layer_skip", "model.layers.7")
    assert text.startswith("layer_skip was applied at model.layers.7 in graph 0/0 (LlamaForCausalLM prefill 1x16)")
    assert (
        "layer 7 of 32 skipped" in text and "modeling_llama.py:65" in text and "LayerSkip(skip=(7,)) (options)" in text
    )
    assert "\n" not in text


def test_why_missed_names_difference_rule_line_and_advice(made_up):
    text = made_up().why("async_softmax", "model.layers.3")
    for part in (
        "did not match at model.layers.3.self_attn",
        "expected scale=0.125, found scale=0.2",
        "FX102, argument differs",
        "modeling_llama.py:193, in forward",
        f"What to change: {REASONS['FX102'].advice}",
    ):
        assert part in text


def test_why_blocked_and_everywhere(made_up):
    assert "flat_gemm was not allowed at lm_head" in made_up().why("flat_gemm", "lm_head")
    text = made_up().why("async_softmax")
    assert text.startswith("async_softmax: 30 applied, 1 missed.") and "FX102" in text


def test_why_of_a_place_the_setting_does_not_name(made_up):
    text = made_up().why("layer_skip", "model.layers.8")
    assert "left model.layers.8 as it is" in text and "It acted at model.layers.7" in text


def test_why_of_places_that_are_refused_alike_is_one_sentence(made_up):
    report = made_up(layers=2)
    for name in ("gate_proj", "up_proj", "down_proj"):
        report.graphs[0].remarks.append(Remark("flat_gemm", "blocked", f"model.layers.1.mlp.{name}", "a CPU", "FX207"))
    text = report.why("flat_gemm", "layers.1.mlp")
    places = "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj and 1 more"
    assert f"was not allowed at {places} in graph" in text
    assert text.count("a CPU") == text.count("The rule is FX207") == 1


def test_what_is_switched_off_answers_for_every_place(eager_lowering):
    model = fxopt.compile(TINY["handwritten"](), disable=("flat_gemm",))
    with torch.no_grad():
        model(torch.tensor([[5, 17, 3, 99]]))
    for path in ("layers.1.up", "head"):
        assert "disable='flat_gemm'" in fxopt.report(model).why("flat_gemm", path)


def test_why_of_a_place_with_nothing_to_rewrite(eager_lowering):
    model = fxopt.compile(TINY["handwritten"](), fxopt.LayerSkip(skip=(1,)))
    with torch.no_grad():
        model(torch.tensor([[5, 17, 3, 99]]))
    report = fxopt.report(model)
    assert "as it is: there is nothing there that it rewrites" in report.why("gqa_packing", "head")
    assert "as it is: its setting does not name this place" in report.why("layer_skip", "layers.2")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("model.layrs.9", "model.layers.9"),
        ("model.layers.99", "model.layers.31"),
        ("modle.layers.4.mlp", "model.layers.4.mlp"),
    ],
)
def test_why_of_an_unknown_path_names_the_nearest(made_up, given, meant):
    assert f"knows no module {given!r}. Did you mean {meant}" in made_up().why("layer_skip", given)


def test_why_takes_the_end_of_a_path_and_what_lies_inside(made_up):
    report = made_up()
    assert report.why("layer_skip", "layers.7") == report.why("layer_skip", "model.layers.7")
    assert "was applied at model.layers.7" in report.why("layer_skip", "model.layers.7.mlp.down_proj")


def test_why_joins_equal_graphs_and_keeps_unequal_ones_apart(made_up):
    report = made_up(graphs=2)
    assert "in graph 0/0 (LlamaForCausalLM prefill 1x16), 0/1 (Llama" in report.why("layer_skip", "model.layers.7")
    report.graphs[1].remarks[0] = Remark("layer_skip", "blocked", "model.layers.7", "a prompt", "FX503")
    text = report.why("layer_skip", "model.layers.7")
    assert text.startswith("layer_skip was applied") and "It was not allowed at model.layers.7 in graph 0/1" in text


def test_why_without_a_compilation_and_for_unknown_techniques(made_up):
    assert "nothing has been compiled yet" in Report([]).why("layer_skip")
    with pytest.raises(SettingError, match="Did you mean 'layer_skip'"):
        made_up().why("layer_skp")


def test_every_refusal_on_a_real_model_has_a_path_and_a_line(eager_lowering):
    @dataclasses.dataclass(frozen=True)
    class Refusing(Technique):
        name = "refusing"
        exact = True

        def rewrite(self, graph, context):
            node = next(n for n in graph.nodes if "scaled_dot" in str(n.target))
            context.missed("FX102", node, "expected dropout_p=0.1, found dropout_p=0.0")

    try:
        model = fxopt.compile(TINY["handwritten"](), Refusing())
        with torch.no_grad():
            model(IDS)
        text = fxopt.report(model).why("refusing", "layers.0")
        assert "did not match at layers.0" in text and "fxopt/testing.py:" in text
    finally:
        del Technique.registry["refusing"]


def test_an_argument_that_differs_is_named_with_its_value():
    """``F.silu(x, inplace=True)`` where ``F.silu(x)`` is expected: FX102 and the argument, no silence."""

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(16, 32, bias=False)

        def forward(self, x):
            return torch.nn.functional.silu(self.gate(x), inplace=True) * self.up(x)

    report = fxopt.plan(torch.nn.Sequential(Gated()), inputs=(torch.zeros(1, 16),), target="h200")
    text = report.why("flat_gemm", "0.gate")
    assert "FX102, argument differs" in text and "expected silu without inplace, found inplace=True" in text
    assert "test_inspection.py:" in text


# -- places ---------------------------------------------------------------------------------------------------------


def test_layers_and_folding(made_up):
    graph = made_up(layers=12).graphs[0]
    layers = places.layers_of(graph)
    assert [layer.index for layer in layers] == list(range(12)) and len({layer.kind for layer in layers}) == 1
    assert [run.label for run in places.folded(layers, graph.remarks)] == ["0-2", "3", "4-6", "7", "8-11"]
    assert [run.label for run in places.folded(layers, [])] == ["0-11"]


# -- views ----------------------------------------------------------------------------------------------------------


def all_views(report):
    other = copy.deepcopy(report)
    other.graphs[0].remarks[0] = Remark("layer_skip", "missed", "model.layers.7", "no residual path", "FX114")
    other.graphs[0].kernels[0].resources["spills"] = 0
    other.environment["torch"] = "2.14.0"
    return [
        views.summary(report), views.why(report, "async_softmax"), views.diff(report, other), views.kernels(report),
        views.diff_stages(report.graphs[0], 0, -1), views.explain("FX104"),
    ]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100])
def test_views_fit(made_up, width):
    for view in all_views(made_up()):
        assert max(map(len, view.text(width).split("\n"))) <= width


def test_views_as_data(made_up):
    for view in all_views(made_up()):
        data = json.loads(json.dumps(view.to_dict()))
        assert data["schema_version"] == SCHEMA_VERSION and data["view"] == view.kind


def test_a_pipe_gets_100_columns_and_no_control_characters(made_up):
    report = made_up()
    report.graphs[0].model = "a\x1b[2Jb"
    text = views.summary(report).text()
    assert "a?[2Jb" in text and "\x1b" not in text


def test_diff_tells_what_was_lost(made_up):
    text = all_views(made_up())[2].text(100)
    for line in (
        "torch: 2.13.0 -> 2.14.0",
        "layer_skip applied: 1 -> 0",
        "layer_skip missed: 0 -> 1",
        "+ layer_skip missed FX114 model.layers.7: no residual path",
        "attention_decode_ab12: spills 2 -> 0",
    ):
        assert line in text
    report = made_up()
    assert views.diff(report, made_up()).text() == "no difference"


def test_diff_stages(made_up):
    graph = made_up().graphs[0]
    assert "+0 -8 ~2" in views.diff_stages(graph, 0, 1).text()
    assert "+30 -30 ~0" in views.diff_stages(graph, 1, 2).text()
    with pytest.raises(SettingError, match="stage 9 does not exist"):
        views.diff_stages(graph, 0, 9)


def test_kernels_name_spills_and_say_when_there_are_none(made_up):
    assert "Registers spilled: attention_decode_ab12." in views.kernels(made_up()).text()
    assert "No kernel was generated" in views.kernels(Report([])).text()


# -- expectations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["layer_skip>=1", "async_softmax == 30", "async_softmax.missed<2", "graphs=1, kernels>0, errors==0",
             "flat_gemm.applied==0"]
)  # fmt: skip
def test_met(made_up, text):
    assert views.expect(made_up(), text) is True and views.unmet(made_up(), text) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer_skip>=2", "expected layer_skip>=2, found 1 applied. layer_skip: 1 applied"),
        ("async_softmax.missed==0", "found 1 missed. .*FX102"),
        ("kernels>1", "expected kernels>1, found 1."),
    ],
)
def test_unmet(made_up, text, message):
    with pytest.raises(views.Unmet, match=message):
        views.expect(made_up(), text)


@pytest.mark.parametrize("text", ["layer_skip", "layer_skip>=x", "layer_skip.sometimes>1", "layer_skp==0", ""])
def test_no_expectation(made_up, text):
    with pytest.raises(SettingError):
        views.expect(made_up(), text)


# -- reason codes ---------------------------------------------------------------------------------------------------


def test_page_of_reason_codes_is_the_table():
    page = (ROOT / "docs" / "reason_codes.md").read_text()
    assert page == views.reason_page()
    assert all(f"### {code} " in page for code in REASONS)


def test_explain():
    assert views.explain("fx104").text().startswith("FX104 used elsewhere")
    with pytest.raises(SettingError, match="no reason code 'FX999'"):
        views.explain("FX999")


# -- files ----------------------------------------------------------------------------------------------------------


def damaged(made_up, **changes):
    data = made_up(layers=3).to_dict()
    data["graphs"][0].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda m: "", "no JSON"),
        (lambda m: json.dumps(m(layers=2).to_dict())[:-40], "no JSON"),
        (lambda m: "[" * 100_000, "no JSON"),
        (lambda m: "[]", "no schema_version"),
        (lambda m: json.dumps({**m(layers=1).to_dict(), "schema_version": 99}), "schema 99"),
        (lambda m: damaged(m, stages="x"), "damaged"),
        (lambda m: damaged(m, stages=[]).replace('"0/0"', "[]"), "compile_id is '\\[\\]'|damaged"),
        (lambda m: damaged(m, seconds="soon"), "seconds is 'soon', not float"),
        (
            lambda m: damaged(m, remarks=[{"technique": "x", "status": "missed", "path": "", "message": ""}]),
            "reason code",
        ),
        (lambda m: damaged(m, nonsense=1), "nonsense"),
        (lambda m: json.dumps({**m(layers=1).to_dict(), "graphs": 3}), "damaged"),
    ],
)
def test_a_damaged_file_is_one_clear_error(made_up, tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_text(content(made_up))
    with pytest.raises(ValueError, match=message):
        views.load(path)


def test_saved_and_read_again(made_up, tmp_path):
    report = made_up(layers=5)
    again = views.load(report.to_json(tmp_path / "r.json"))
    assert json.dumps(again.to_dict(), sort_keys=True) == json.dumps(report.to_dict(), sort_keys=True)
    assert again.why("async_softmax") == report.why("async_softmax")


READ_ONLY = """
import os, sys
from fxopt.inspection import views
report, folder = views.load(sys.argv[1]), sys.argv[2]
report.to_html(sys.argv[1] + ".html")  # whatever has to be imported is imported now
if os.geteuid() == 0:  # root may write everywhere: go on as nobody
    os.setgid(65534)
    os.setuid(65534)
for write in (report.to_html, report.to_json):
    try:
        write(os.path.join(folder, "r"))
    except PermissionError as error:
        assert "cannot write" in str(error) and "Give a path in a folder that you can write to" in str(error), error
    else:
        raise SystemExit("it was written")
print(os.listdir(folder))
"""


def test_read_only_folder(made_up, tmp_path):
    saved = made_up(layers=1).to_json(tmp_path / "saved.json")
    with tempfile.TemporaryDirectory() as place:  # nobody else may enter pytest's own folders
        pathlib.Path(place).chmod(0o755)
        folder = pathlib.Path(place) / "closed"
        folder.mkdir(mode=0o555)
        command = [sys.executable, "-c", READ_ONLY, str(saved), str(folder)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and ended.stdout.strip() == "[]", ended.stderr


def test_a_missing_folder_is_named(made_up, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        made_up(layers=1).to_html(tmp_path / "nowhere" / "r.html")


# -- scripts --------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, fxopt
from fxopt.testing import TINY
assert __name__ == "__main__" and sys.argv[1] == "7"
model = fxopt.compile(TINY["handwritten"](), fxopt.LayerSkip(skip=(1,)))
with torch.no_grad():
    model(torch.tensor([[5, 17, 3, 99]]))
raise ValueError("half-way")
"""


def test_a_script_that_fails_half_way_keeps_its_reports(eager_lowering, tmp_path, capsys):
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments, path = list(sys.argv), list(sys.path)
    report = views.run_script(tmp_path / "script.py", ["7"])
    assert report.count("layer_skip") == 1 and report.failure == "ValueError: half-way"
    assert "the script failed: ValueError: half-way" in views.summary(report).text()
    assert "half-way" in capsys.readouterr().err
    assert (sys.argv, sys.path) == (arguments, path)


def test_scripts_that_exit_or_are_missing(tmp_path):
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    assert views.run_script(tmp_path / "exits.py").failure == "SystemExit: 3"
    (tmp_path / "fine.py").write_text("raise SystemExit(0)\n")
    assert views.run_script(tmp_path / "fine.py").failure == ""
    with pytest.raises(FileNotFoundError, match=r"none\.py"):
        views.run_script(tmp_path / "none.py")


# -- repro ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_repro_runs_alone(eager_lowering, tmp_path):
    model = TINY["handwritten"]()
    with torch.no_grad():
        torch.compile(model, backend="fxopt", options={"layer_skip": LayerSkip(skip=(1,)), "record": "full"})(IDS)
    view = views.repro(fxopt.report())
    assert "layer_skip: LayerSkip(skip=(1,))" in view.to_dict()["source"]
    path = tmp_path / "stage.py"
    path.write_text(view.text().replace('BACKEND = "inductor"', 'BACKEND = "eager"'))
    found = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "eager and eager differ by at most 0" in found.stdout


def test_repro_needs_the_code_and_takes_nothing_else(made_up):
    report = made_up(layers=2)
    with pytest.raises(SettingError, match="FXOPT_RECORD=full"):
        views.repro(report)
    for code, message in (
        ("import os\nos.system('x')\n", "not one forward function"),
        ("def forward(self, x):\n    return open('x')\n", "only exists in the process"),
        ("def forward(self, x):\n    return self.branch(x)\n", "self.branch"),
        ("def branch(self, x):\n    import os\ndef forward(self, x):\n    return self.branch(x)\n", "assignments"),
        ("def forward(self, x):\n    return x\ndef later(self, x):\n    return x\n", "not one forward function"),
        ("def forward(", "does not parse"),
    ):
        report.graphs[0].stages[-1].code = code
        with pytest.raises(SettingError, match=message):
            views.repro(report)
