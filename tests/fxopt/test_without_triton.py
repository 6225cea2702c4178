"""An installation without Triton: everything but generated GPU kernels works, and the message says what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

BLOCKED = """
import importlib.abc, importlib.util, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else found(name, *rest)
sys.meta_path.insert(0, Absent())
"""

PROGRAM = """
import torch, fxopt
from fxopt.codegen import compat
from fxopt.codegen.roofline import DEVICES
from fxopt.inspection import views
from fxopt.planning import decode_inputs
from fxopt.testing import TINY, inputs_for

assert compat.triton_version() == "none"
model = TINY["llama"]()
wanted = model(**inputs_for("llama", model)).logits
fxopt.compile(model, fxopt.SparseAttention(sinks=2, window=16), fxopt.AsyncSoftmax(phi=0.0))
with torch.no_grad():
    torch.testing.assert_close(model(**inputs_for("llama", model)).logits, wanted)
report = fxopt.report(model)
assert not report.graphs[0].error and report.count("mask_structure") == 3, report.summary()
assert "No kernel was generated" in views.kernels(report).text()

import warnings
half = TINY["llama"]().bfloat16()
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    plan = fxopt.plan(half, fxopt.AsyncSoftmax(), inputs=decode_inputs(half, cache=256), target="h200")
assert plan.count("flat_gemm") == 22 and plan.count("async_softmax") == 3, plan.summary()
assert "Triton is not installed (pip install triton" in plan.remarks[-1].message, plan.remarks[-1]
assert not plan.kernels and plan.to_html(sys.argv[1] + "/plan.html").stat().st_size > 10_000

from typer.testing import CliRunner
from fxopt.commands import app
doctor = CliRunner().invoke(app, ["doctor"])
assert "no Triton: kernels can be neither generated nor cross-compiled" in doctor.output, doctor.output
assert "pip install triton" in doctor.output
saved = str(report.to_json(sys.argv[1] + "/report.json"))
shown = CliRunner().invoke(app, ["inspect", saved, "--view", "why", "--technique", "async_softmax"])
assert shown.exit_code == 0 and "FX207" in shown.output, shown.output
print("all of it")
"""


def test_import_compile_plan_inspect_and_doctor(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED + PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0 and "all of it" in ended.stdout, ended.stderr[-3000:]
