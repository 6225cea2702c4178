"""The lowered operator: its PyTorch body, and how it calls the kernels, in Triton's interpreter (a child process)."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from fxopt.codegen import lowering
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.ops.attention import attention, sample_inputs

OP = torch.ops.fxopt.decode_attention.default

CASES = """
import torch
from fxopt.codegen import lowering
from fxopt.codegen.ops.attention import attention, sample_inputs

sinks = torch.randn(8, generator=torch.Generator().manual_seed(1))
for given, extra in (
    ({"kind": "bool", "filled": 70}, {}),
    ({"kind": "min", "filled": 70, "tokens": 3}, {"soft_cap": 20.0}),
    ({"kind": "-inf", "filled": 300}, {"sinks": sinks}),
    ({"kind": "none"}, {}),
):
    inputs = sample_inputs(batch=2, length=300, width=32, **given) | extra
    expected = attention(**inputs)
    options = {"sinks": None, "soft_cap": 0.0} | inputs
    for phi in (None, torch.full((2,), 1.5), torch.full((2,), -400.0)):
        got, counts = lowering.launch(phi=phi, split_size=64, **options)
        rows = expected.shape[:3].numel()
        assert counts.tolist() == [0 if phi is None or phi[0] > 0 else rows, 0 if phi is None else rows]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        assert got.is_contiguous()

# What lies in memory beside an extent that is shared by all rows is not the next row's extent.
inputs = sample_inputs(batch=2, length=300, width=32, kind="bool", filled=70)
inputs["extent"] = torch.tensor([70, 3])[:1]
expected = attention(**inputs)
got, _ = lowering.launch(sinks=None, phi=None, soft_cap=0.0, split_size=64, **inputs)
torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
print("agreed")
"""


def test_kernels_in_the_interpreter(tmp_path):
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "FXOPT_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CASES], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("agreed"), done.stderr[-3000:]


@pytest.mark.parametrize("tokens", [1, 4])
def test_body_off_the_gpu(tokens):
    inputs = sample_inputs(tokens=tokens, filled=20)
    tensors = [inputs.pop(name) for name in ("query", "key", "value")]
    phi = torch.zeros(2)
    out, counts = OP(*tensors, phi=phi, **inputs)
    assert counts.tolist() == [0, out.shape[:3].numel()]
    assert torch.equal(out, attention(*tensors, **inputs))
    assert out.is_contiguous()
    torch.library.opcheck(OP, tuple(tensors), inputs | {"phi": phi})


def test_what_no_kernel_takes():
    for changes, word in (({"width": 8}, "head_dim"), ({"tokens": 17}, "q_len"), ({"dtype": torch.float64}, "dtype")):
        inputs = sample_inputs(**changes)
        with pytest.raises(Unsupported, match=word):
            lowering.describe(*(inputs[name] for name in ("query", "key", "value")), unified=True)


def test_splits_grow_with_the_work_and_stay_powers_of_two():
    sizes = [lowering.fitted_split(length, 8, torch.device("cpu")) for length in (16, 64, 128, 4096)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 64
    assert sizes[-1] == 4096
