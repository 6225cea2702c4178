"""Roofline expressions against counts done by hand; interpreted_gemm.py compares them with what kernels touch."""

from dataclasses import replace

import pytest
import sympy
import torch
from torch.utils.flop_counter import FlopCounterMode

from fxopt.codegen import roofline
from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Output, Step
from fxopt.codegen.kernels.gemm import FusedLinear, Norm
from fxopt.codegen.measuring import residual_group
from fxopt.codegen.roofline import DEVICES

H200 = DEVICES["H200"]


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_linear_counts_what_torch_counts():
    x, w = torch.empty(3, 50, device="meta"), torch.empty(37, 50, device="meta")
    flops, moved = roofline.linear(2).at(M=3, N=37, K=50)
    assert flops == counted(lambda: x @ w.t())
    assert moved == 2 * (x.numel() + w.numel() + 3 * 37)
    biased = roofline.linear(2, biased=True).at(M=3, N=37, K=50)
    assert biased == (flops + 3 * 37, moved + 2 * 37)


def test_attention_counts_what_torch_counts():
    def attend(tokens, length):
        q = torch.empty(2, 8, tokens, 16, device="meta")
        k = torch.empty(2, 8, length, 16, device="meta")
        return counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))

    sizes = {"B": 2, "H": 8, "G": 4, "D": 16}
    decode, moved = roofline.attention_decode(2).at(**sizes, L=100)
    assert decode == attend(1, 100)
    # Grouped queries share what is read: four heads of keys and values, whatever the number of query heads.
    assert moved == 2 * (2 * 2 * 4 * 100 * 16 + 2 * 2 * 8 * 16)
    whole, dense_bytes = roofline.attention_prefill(2, causal=False).at(**sizes, S=20)
    assert whole == attend(20, 20)
    half, causal_bytes = roofline.attention_prefill(2).at(**sizes, S=20)
    assert half == whole * 21 / 40
    assert dense_bytes == causal_bytes == 2 * (2 * 2 * 8 * 20 * 16 + 2 * 2 * 4 * 20 * 16)


def test_a_group_is_the_sum_of_its_parts():
    fused = residual_group(37, 50, "float16")
    linear_flops, linear_bytes = roofline.linear(2).at(M=5, N=37, K=50)
    assert roofline.fused_linear(fused).at(M=5) == (linear_flops + 5 * 37, linear_bytes + 2 * 5 * 37)
    residual = roofline.Cost(roofline.M * roofline.N, 2 * roofline.M * roofline.N)
    summed = roofline.linear(2) + residual
    assert summed.at(M=5, N=37, K=50) == roofline.fused_linear(fused).at(M=5)
    merged = FusedLinear("float16", 50, (37, 19), Epilogue.plain(2, torch.float16), Norm("rms", 1e-6))
    flops, moved = roofline.fused_linear(merged).at(M=5)
    # x is read once for both weights, and the norm adds gamma but neither a read nor a write of x.
    assert moved == 2 * (5 * 50 + 50 + 56 * 50 + 5 * 56)
    assert flops == 2 * 5 * 56 * 50 + 4 * 5 * 50


def test_norm_and_missing_letters():
    assert roofline.norm(2).at(M=3, K=64) == (4 * 3 * 64, 2 * (2 * 3 * 64 + 64))
    assert roofline.norm(4, "layer").at(M=3, K=64)[1] == 4 * (2 * 3 * 64 + 2 * 64)
    with pytest.raises(KeyError, match="K"):
        roofline.linear(2).at(M=1, N=2)


def test_equation_five():
    # The paper's form against blocks counted one by one: each of N / BLOCK_N blocks reads its weights and all of x.
    m, n, k, block = 8, 4096, 4096, 128
    value = float(roofline.intensity().subs({roofline.M: m, roofline.K: k, roofline.BLOCK_N: block}))
    elements = (n // block) * (block * k + m * k + m * block)
    assert value == pytest.approx(2 * m * n * k / elements)
    # Wider blocks move less: the derivative in BLOCK_N is positive, and the limit is one read of x.
    slope = sympy.diff(roofline.intensity(), roofline.BLOCK_N)
    assert slope.subs({roofline.M: m, roofline.K: k, roofline.BLOCK_N: 64}) > 0
    assert sympy.limit(roofline.intensity(), roofline.BLOCK_N, sympy.oo) == 2 * roofline.M * roofline.K / (
        roofline.K + roofline.M
    )


def test_estimates_match_the_memory_floors_of_known_shapes():
    # Microseconds of streaming the weights: Llama-2-7B QKV on H200, H100 and A100, one row.
    flops, moved = roofline.linear(2).at(M=1, N=12288, K=4096)
    for name, microseconds in (("H200", 21.0), ("H100", 30.1), ("A100", 49.4)):
        assert roofline.estimate(flops, moved, DEVICES[name]) * 1e6 == pytest.approx(microseconds, rel=0.01)
    # Above the ridge the matrix units decide.
    flops, moved = roofline.linear(2).at(M=4096, N=4096, K=4096)
    assert roofline.estimate(flops, moved, H200) == flops / 989.4e12


def test_device_table():
    assert set(DEVICES) == {"A100", "H100", "H200", "B200", "MI300X", "L4", "RTX 4090"}
    assert 200 < H200.peak("bfloat16") / H200.bandwidth < 210
    for name, found in (
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("AMD Instinct MI300X", "MI300X"),
    ):
        device = roofline.find_device(name)
        assert device is not None
        assert device.name == found
    assert roofline.find_device("NVIDIA L40S") is None
    assert len({hash(d) for d in DEVICES.values()}) == len(DEVICES)


def test_splits_fill_the_device_and_depend_on_the_shape_only():
    assert roofline.split_count(128256, 4096, H200) == 1
    # Blocks of 32 columns keep a device busy; where N has too few of them, K is split.
    assert (roofline.block_n(4096, H200), roofline.split_count(4096, 14336, H200)) == (32, 1)
    assert (roofline.block_n(1024, H200), roofline.split_count(1024, 4096, H200)) == (32, 4)
    assert roofline.split_count(4096, 4096, DEVICES["MI300X"]) == 2
    for device in DEVICES.values():
        for n, k in ((4096, 4096), (4096, 14336), (1024, 4096), (28672, 4096), (64, 128)):
            splits = roofline.split_count(n, k, device)
            assert splits in (1, 2, 4, 8)
            assert splits == 1 or k // splits >= 512
            assert roofline.block_n(n, device) in (32, 64, 128)
            assert {splits} <= set(roofline.split_counts(n, k, device)) <= {splits, 4}


def test_few_blocks_ask_for_more_at_once():
    assert roofline.stages_in_flight(32 * 128 * 2, 128, H200) == 6  # one block a unit: 40 KB under way of 36 asked
    assert roofline.stages_in_flight(32 * 128 * 2, 1000, H200) == 4
    assert roofline.stages_in_flight(16 * 32 * 2, 8, H200) == 6


def test_this_cpu_is_measured():
    cpu = roofline.measure_cpu()
    assert cpu is roofline.measure_cpu()
    assert 1e8 < cpu.bandwidth < 5e12
    assert 1e8 < cpu.peak("float32") < 1e14
    assert roofline.current_device(torch.device("cpu")) is cpu


def test_a_row_statistic_is_counted_once_a_row_and_reads_nothing_more():
    plain = FusedLinear("float16", 50, (37,), Epilogue.plain(1, torch.float16))
    length = (("square", "p0"), ("row_sum", "t0"), ("sqrt", "t1"), ("mul", "t2", "q0"), ("div", "p0", "t3"))
    steps = tuple(Step(f"t{i}", op, tuple(args), op) for i, (op, *args) in enumerate(length))
    before = Epilogue(1, (Output("t4", "float16"),), steps, (Extra("q0", "row", "float16"),))
    flops, moved = roofline.fused_linear(replace(plain, prologue=before)).at(M=5)
    without = roofline.fused_linear(plain).at(M=5)
    # Square, sum and division for every element; the root and the factor once a row.
    assert (flops, moved) == (without[0] + 5 * (3 * 50 + 2), without[1] + 5 * 2)
