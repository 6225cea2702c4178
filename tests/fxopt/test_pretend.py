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
@pytest.mark.parametrize(("target", "batch"), [("H200", 1), ("A100", 1), ("H200", 8), ("H200", 32), ("H200", 64)])
def test_kernels_of_a_decoder_layer(target, batch):
    own, stock = (pretend.per_layer(backend, target=target, batch=batch) for backend in ("fxopt", "inductor"))
    assert gemms(own) == (["gemv"] if batch == 1 else ["flat_gemm"]) * 4
    assert stock.count("mm") == 7
    assert len([name for name in own if name.startswith("fxopt.")]) == 1, "the attention, whose kernels the library has"
    # Keys, values and queries are rotated and written by one kernel; Hugging Face's cache counts in one of its own,
    # which torch 2.15 combines too. Stock launches 17 on torch 2.13 and 20 on 2.11.
    assert len(own) <= 7
    assert len(own) <= 0.6 * len(stock)


@pytest.mark.slow
def test_kernels_of_a_layer_with_generated_attention():
    own = pretend.per_layer("fxopt", technique="async_softmax")
    # Its operator is four: splits and their sum, and the same two for rows that are flagged.
    assert len(own) - 1 + 4 == 11


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"technique": "async_softmax"}, {"batch": 8}], ids=["plain", "async", "rows"])
def test_a_decode_step_is_one_cuda_graph(settings):
    found = pretend.captured("fxopt", **settings)
    assert found.outside == []
    assert found.moving == []
    assert len(found.graphs) == 1
    assert len([name for name in found.graphs[0] if name.startswith("fxopt.")]) == 2, "an attention a layer"


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


def test_what_lies_outside_of_a_graph_is_told_apart():
    code = """
def partition_0(args):
    triton_poi_fused_0.run(arg0_1, buf0, 1, stream=raw_stream0)
class Runner:
    def call(self, args):
        (buf0,) = self.partitions[0](partition0_args)
        buf1 = torch.ops.fxopt.waits.default(buf0)
runner = Runner(partitions=[partition_0])
"""
    assert pretend.launches_in(code, "partition_0") == ["triton_poi_fused_0"]
    assert pretend.launches_in(code) == ["fxopt.waits.default"]


def test_a_compilation_that_fails_says_why():
    with pytest.raises(RuntimeError, match="invalid choice: 'H900'"):
        pretend.launched("fxopt", target="H900")
