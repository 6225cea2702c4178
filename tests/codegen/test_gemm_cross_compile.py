"""Fused linears compiled for GPUs that are not here: which instructions, how many buffers, no spills, no atomics."""

import pytest
import torch

from fxopt.codegen import roofline
from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Output, Step
from fxopt.codegen.kernels.gemm import Config, FusedLinear, Norm, configure
from fxopt.codegen.kernels.gemm_launch import build, compile_for, interpreted
from fxopt.codegen.targets import TARGETS, cross_compile

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="interpreted kernels cannot be compiled")

MMA = r"mma\.sync\S*\.m16n8k16\."
WGMMA = r"wgmma\.mma_async"
WIDE_COPY = r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10"
ATOMIC = r"\b(?:atom|red)\.(?:global|shared|\w*\.?add)|(?:global|flat|buffer)_atomic"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))


def residual(dtype):
    steps = (Step("s0", "add", ("p0", "e0"), "residual"),)
    return Epilogue(1, (Output("s0", dtype),), steps, (Extra("e0", "full", dtype),))


def gate(dtype):
    steps = (Step("s0", "silu", ("p0",), "act"), Step("s1", "mul", ("s0", "p1"), "gate"))
    return Epilogue(2, (Output("s1", dtype),), steps)


def down(dtype="bfloat16"):
    return FusedLinear(dtype, 4096, (4096,), residual(dtype))


def gate_up(dtype="bfloat16"):
    return FusedLinear(dtype, 4096, (14336, 14336), gate(dtype), Norm("rms", 1e-5))


def qkv(dtype="bfloat16"):
    epilogue = Epilogue.plain(3, getattr(torch, dtype), biased=True)
    return FusedLinear(dtype, 4096, (4096, 1024, 1024), epilogue, Norm("layer", 1e-5, beta=True))


def compiled(fused, config, target, record_property):
    """The kernels by name; every one is free of spills and atomics, and its resources go into the test report."""
    found = compile_for(fused, config, target)
    for name, info in found.items():
        record_property(f"{name} {target}", info.summary())
        print(f"{name} {info.summary()} for {config}")
        assert info.spills == 0, info.summary()
        assert info.count(ATOMIC) == 0
        assert info.registers > 0
    return found


@pytest.mark.parametrize("target", list(TARGETS))
def test_gemv_has_vector_loads_and_no_matrix_instruction(target, record_property):
    info = compiled(down(), Config("gemv", 1, 8, 512, stages=3), target, record_property)["gemv"]
    assert info.count(r"\bw?g?mma|mfma|tcgen05") == 0
    # Two of three stages wait in shared memory, for the weights and for x.
    if target.startswith("sm"):
        assert (2, 8, 512) in info.shared_buffers()
        assert info.count(WIDE_COPY) > 0
    else:
        assert info.count(r"global_load_dwordx4|buffer_load_dwordx4") > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_up_to_sixteen_rows_use_mma_sync(target, record_property):
    config = Config("flat", 16, 64, 128, stages=3)
    info = compiled(down(), config, target, record_property)["flat_gemm"]
    assert info.count(MMA) > 0
    assert info.count(WGMMA) == info.count("tcgen05.mma") == 0
    assert info.shared_buffers() == [(2, 16, 128), (2, 64, 128)]
    assert info.count(WIDE_COPY) > 0


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_asked_number_of_stages_is_there(stages, record_property):
    flat = compiled(down(), Config("flat", 16, 64, 64, stages=stages), "sm_90", record_property)["flat_gemm"]
    assert flat.shared_buffers() == [(stages - 1, 16, 64), (stages - 1, 64, 64)]
    assert flat.shared_bytes >= (stages - 1) * (16 + 64) * 64 * 2
    wide = compiled(down(), Config("flat", 64, 64, 64, stages=stages), "sm_90", record_property)["flat_gemm"]
    assert wide.shared_buffers() == [(stages, 64, 64), (stages, 64, 64)]


def test_one_stage_means_no_pipeline(record_property):
    flat = compiled(down(), Config("flat", 16, 64, 64, stages=1), "sm_90", record_property)["flat_gemm"]
    assert flat.count("cp.async") == 0
    gemv = compiled(down(), Config("gemv", 1, 8, 512, stages=1), "sm_90", record_property)["gemv"]
    assert gemv.count("cp.async") == 0
    assert gemv.count(r"ld\.global\S*\.v4") > 0


def test_sixty_four_rows_use_wgmma_on_hopper(record_property):
    info = compiled(down(), Config("flat", 64, 64, 64, stages=3), "sm_90", record_property)["flat_gemm"]
    assert info.count(WGMMA) > 0
    assert info.count(MMA) == 0


def test_swapped_operands_reach_wgmma_with_thirty_two_rows(record_property):
    straight = compiled(down(), Config("flat", 32, 64, 64), "sm_90", record_property)["flat_gemm"]
    swapped = compiled(down(), Config("flat", 32, 64, 64, swap=True), "sm_90", record_property)["flat_gemm"]
    assert (straight.count(WGMMA), straight.count(MMA) > 0) == (0, True)
    assert (swapped.count(WGMMA) > 0, swapped.count(MMA)) == (True, 0)


def test_split_k_is_two_kernels_without_atomics(record_property):
    found = compiled(down(), Config("flat", 16, 64, 128, splits=4), "sm_90", record_property)
    assert set(found) == {"flat_gemm", "reduce_splits"}
    assert found["flat_gemm"].count(r"st\.global") > 0


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("group", [gate_up, qkv])
def test_merged_weights_with_a_norm(group, rows, record_property):
    device = roofline.DEVICES["H200"]
    fused = group()
    config = configure(fused, rows, "gemv" if rows == 1 else "flat", device)
    found = compiled(fused, config, "sm_90", record_property)
    main = found["gemv" if rows == 1 else "flat_gemm"]
    # Weights are chosen by program number; their rows must still be known to be aligned.
    assert main.count(WIDE_COPY) > 0
    assert main.shared_bytes <= device.shared_bytes
    if rows == 16:
        assert main.count(MMA) > 0


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_default_configurations_on_other_targets(target, rows, record_property):
    device = roofline.DEVICES[{"sm_100": "B200", "gfx942": "MI300X"}[target]]
    info = compiled(gate_up(), configure(gate_up(), rows, "flat", device), target, record_property)["flat_gemm"]
    assert info.shared_bytes <= device.shared_bytes
    assert info.count("mma" if target == "sm_100" else "mfma") > 0


STATISTICS = {
    "row_sum": (Step("t0", "square", ("p0",), "norm"), Step("t1", "row_sum", ("t0",), "norm"),
                Step("t2", "sqrt", ("t1",), "norm"), Step("t3", "div", ("p0", "t2"), "div")),
    "row_amax": (Step("t0", "abs", ("p0",), "abs"), Step("t1", "row_amax", ("t0",), "amax"),
                 Step("t2", "clamp_min", ("t1", 1e-5), "clamp"), Step("t3", "div", ("p0", "t2"), "div")),
    "row_amin": (Step("t1", "row_amin", ("p0",), "amin"), Step("t3", "sub", ("p0", "t1"), "sub")),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("name", list(STATISTICS))
def test_a_row_statistic_before_the_products(name, target, dtype, rows, record_property):
    """Whole rows are read ahead of the loop; what is made of the statistic alone is made there too."""
    before = Epilogue(1, (Output("t3", dtype),), STATISTICS[name])
    fused = FusedLinear(dtype, 4096, (4096,), residual(dtype), None, before)
    device = roofline.DEVICES[{"sm_80": "A100", "sm_90": "H200", "sm_100": "B200", "gfx942": "MI300X"}[target]]
    config = configure(fused, rows, "gemv" if rows == 1 else "flat", device)
    found = compiled(fused, config, target, record_property)
    main = found["gemv" if rows == 1 else "flat_gemm"]
    assert main.shared_bytes <= device.shared_bytes
    if name != "row_sum":  # the larger of a number and NaN is NaN
        extreme = name.removeprefix("row_a")
        assert main.count(rf"{extreme}\.NaN\.f32" if target.startswith("sm") else r"v_cmp_[ou]_f32") > 0
    elif target.startswith("sm"):
        assert main.asm.rindex("sqrt.approx") < main.asm.rindex("Inner Loop Header")
    if target.startswith("sm"):
        assert main.count(WIDE_COPY) > 0
        assert main.count(MMA) > 0 or rows == 1 or dtype == "float32"


def test_float32_is_float32(record_property):
    info = compiled(down("float32"), Config("flat", 16, 32, 32), "sm_90", record_property)["flat_gemm"]
    assert info.count("tf32") == 0
    assert info.count(r"fma\.rn\.f32") > 0


def test_odd_sizes_compile(record_property):
    fused = FusedLinear("float16", 50, (37,), residual("float16"), Norm("rms", 1e-6))
    compiled(fused, Config("flat", 16, 32, 32), "sm_80", record_property)
    compiled(fused, Config("gemv", 2, 4, 64), "sm_80", record_property)


def test_addresses_beyond_two_to_the_thirty_one_are_64_bits(record_property):
    # A vocabulary times a depth of 2**31 elements: the row offset is a 64-bit product.
    fused = FusedLinear("bfloat16", 16384, (262144,), Epilogue.plain(1, torch.bfloat16))
    info = compiled(fused, Config("flat", 16, 64, 64), "sm_90", record_property)["flat_gemm"]
    assert info.count(r"mul\.wide\.s32|mad\.wide\.s32|mul\.lo\.s64|mad\.lo\.s64") > 0


def test_bad_requests_say_what_is_allowed():
    kernel = build(down(), Config("gemv", 1, 8, 64)).main
    with pytest.raises(ValueError, match="choose one of sm_80"):
        cross_compile(kernel, {}, {}, "sm_42")
    with pytest.raises(ValueError, match="no type for arguments"):
        cross_compile(kernel, {"x": "*bf16"}, {}, "sm_80")
    with pytest.raises(ValueError, match="not a compiled-mode jit function"):
        cross_compile(len, {}, {}, "sm_80")
