"""The command line and the doctor."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fxopt
from fxopt import cli, doctor
from fxopt.testing import TINY

typer_testing = pytest.importorskip("typer.testing")


@pytest.fixture
def run():
    from fxopt.commands import app

    return lambda *arguments: typer_testing.CliRunner().invoke(app, list(arguments))


def test_help_names_every_command(run):
    text = run("--help").output
    for name in ("demo", "doctor", "plan", "inspect", "tune", "evaluate", "bench"):
        assert name in text


def test_help_names_every_command_without_typer(capsys):
    assert cli._without_typer(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in text
    assert "fxopt[inspect]" in text


def test_the_console_script_starts():
    found = subprocess.run([sys.executable, "-c", "from fxopt.cli import main; main()", "doctor"],
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert "torch" in found.stdout


def test_doctor_json(run, tmp_path):
    path = tmp_path / "doctor.json"
    run("doctor", "--json", str(path))
    findings = json.loads(path.read_text())
    assert {f["level"] for f in findings} <= {"ok", "note", "problem"}


def test_plan_of_a_config_needs_no_weights(run, tmp_path):
    TINY["llama"]().config.save_pretrained(tmp_path)
    arguments = ("plan", "--model-config", str(tmp_path / "config.json"), "--set", 'layer_skip={"skip": [1]}')
    found = run(*arguments, "--cache", "64", "--expect", "layer_skip==2, graphs==2")
    assert found.exit_code == 0, found.output
    assert "plan 1x32" in found.output and "plan decode 1x1" in found.output
    assert found.output.count("layer_skip      1/1 applied") == 2
    unmet = run(*arguments, "--phase", "prompt", "--expect", "layer_skip>=2")
    assert unmet.exit_code == 1 and "found 1 applied" in unmet.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "overhed"), "suites:"),
        (("plan",), "one of the two"),
        (("plan", "--model-config", "nowhere.json"), "no such file"),
        (("inspect", "--view", "explain", "--code", "FX999"), "no reason code"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, words):
    found = run(*arguments)
    assert found.exit_code == 2
    assert words in found.output


def test_doctor_says_whether_generate_reaches_fxopt():
    model = TINY["llama"]()
    assert any(f.level == "problem" and "not compiled" in f.what for f in doctor.examine_model(model))
    wrapped = torch.compile(model, backend="fxopt")
    assert any("not reached" in f.what or "is not" in f.what for f in doctor.examine_model(wrapped))
    fxopt.compile(model)
    assert any(f.level == "ok" and "reach fxopt" in f.what for f in doctor.examine_model(model))


def test_doctor_names_the_cache():
    model = fxopt.compile(TINY["llama"]())
    assert any("DynamicCache" in f.what and "static" in f.advice for f in doctor.examine_model(model))
    model.generation_config.cache_implementation = "static"
    assert any("cache_implementation='static'" in f.what for f in doctor.examine_model(model))


@pytest.mark.slow
def test_bench_depth_quick(run, tmp_path):
    path = tmp_path / "depth.json"
    found = run("bench", "depth", "--quick", "--json", str(path))
    assert found.exit_code == 0, found.output
    rows = json.loads(path.read_text())["rows"]
    assert {row["peer"] for row in rows} == {"deleted, inductor", "fxopt layer_skip", "full, inductor"}
    assert all(row["median"] > 0 for row in rows)


def finding(model, words):
    found = [f for f in doctor.examine_model(model) if words in f.what]
    assert len(found) == 1, [f.what for f in doctor.examine_model(model)]
    return found[0]


def test_doctor_flags_each_trap():
    model = TINY["llama"]()
    assert finding(torch.compile(model, backend="fxopt"), "backend is not reached").level == "problem"
    assert "'static'" in finding(model, "growing DynamicCache").advice
    assert "three with a DynamicCache" in finding(model, "expected compilations").what
    model.generation_config.cache_implementation = "static"
    assert "max_cache_len" in finding(model, "expected compilations").advice
    model.generation_config.max_cache_len = 64
    assert finding(model, "expected compilations").level == "ok"
    transformers = pytest.importorskip("transformers")
    model.generation_config.compile_config = transformers.CompileConfig(backend="fxopt", options={"strict": True})
    assert "mode=None" in finding(model, "both mode and options").advice
    model.config._attn_implementation = "mine"
    assert "AttentionMaskInterface.register('mine'" in finding(model, "masks are dropped").advice
    model.train()
    assert finding(model, "training mode").advice == "model.eval()"


def test_doctor_sees_kernels_of_the_hub():
    model = TINY["handwritten"]()
    assert not [f for f in doctor.examine_model(model) if "hub" in f.what]

    def forward(x):
        return x

    forward.__module__ = "kernels.layer"
    model.layers[0].norm1.forward = forward
    assert "layers.0.norm1" in finding(model, "kernels of the hub").what


def test_doctor_counts_recompiles(eager_lowering):
    model = fxopt.compile(TINY["handwritten"]())
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))
        model(torch.zeros(1, 9, dtype=torch.long))
    assert "2 graphs were compiled, 1 of them again" in finding(model, "graphs were compiled").what


def test_doctor_lets_a_model_generate_and_says_what_was_compiled():
    model = TINY["llama"]()
    found = {f.what: f for f in doctor.examine(model, run=True)}
    reached = next(f for what, f in found.items() if "reaches the backend" in what)
    assert reached.level == "ok" and "3 graphs" in reached.what and "dynamic cache" in reached.what
    copied = next(f for what, f in found.items() if "cache tensors as new tensors" in what)
    assert "6 cache tensors" in copied.what and "'static'" in copied.advice  # keys and values of three layers
    assert not any("is not compiled" in what for what in found)
    model.generation_config.cache_implementation = "static"
    static = [f.what for f in doctor.generate_once(model)]
    assert static[-1] == "each step writes its cache in place" and "2 graphs" in static[0]
    model.forward = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken"))
    (failed,) = doctor.generate_once(model)
    assert failed.level == "problem" and "broken" in failed.what
