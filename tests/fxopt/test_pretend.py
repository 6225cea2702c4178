"""The whole road to a GPU that is not here, up to the code that Inductor would load there."""

from __future__ import annotations

import shutil

import pytest
import torch

from fxopt.bench import pretend
from fxopt.codegen import compat

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that a GPU is there"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


def gemms(names):
    return [name.rpartition("_")[0] for name in names if name.startswith(("gemv", "flat_gemm", "reduce_splits"))]


def test_a_decode_step_is_lowered_to_kernels_that_inductor_launches():
    names = pretend.launched("fxopt", layers=1)
    # q, k, v; o; gate, up; down; head. No linear is left to the library, and no operator waits for Python.
    assert gemms(names) == ["gemv"] * 5
    # Inductor of torch 2.11 gives the library the product that makes rotary frequencies.
    assert names.count("mm") <= (compat.torch_version() < (2, 12))
    assert not [name for name in names if "fused_linear" in name]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["H200", "A100"])
def test_kernels_of_a_decoder_layer(target):
    own, stock = (pretend.per_layer(backend, target=target) for backend in ("fxopt", "inductor"))
    assert gemms(own) == ["gemv"] * 4
    assert stock.count("mm") == 7
    attention = [name for name in own if name.startswith("fxopt.")]
    assert len(attention) == 1, "its kernels are another test's subject"
    # The operator is two kernels where a kernel is generated for it: splits of the cache, and their sum.
    assert len(own) + 1 <= min(10, 0.6 * len(stock)), (own, stock)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 32, 64])
def test_several_rows_take_matrix_units_in_as_many_kernels(batch):
    own, stock = (pretend.per_layer(backend, batch=batch) for backend in ("fxopt", "inductor"))
    assert gemms(own) == ["flat_gemm"] * 4
    assert len(own) + 1 <= min(10, 0.6 * len(stock)), (own, stock)


def test_launches_are_read_from_generated_code():
    code = """
def helper(): other.run(1)
class Runner:
    def call(self, args):
        buf0 = empty_strided_cuda((1,), (1,), torch.float32)
        triton_poi_fused_0.run(arg0_1, buf0, 1, stream=raw_stream0)
        extern_kernels.mm(buf0, arg1, out=buf1)
        buf2 = torch.ops.aten.sdpa.default(buf0)
        assert_alignment(buf2, 16, 'torch.ops.aten.sdpa.default')
"""
    assert pretend.launches_in(code) == ["triton_poi_fused_0", "mm", "aten.sdpa.default"]


def test_a_compilation_that_fails_says_why():
    with pytest.raises(RuntimeError, match="invalid choice: 'H900'"):
        pretend.launched("fxopt", target="H900")
