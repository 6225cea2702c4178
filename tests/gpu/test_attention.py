"""Decode attention on a real device: results, independence, poisoned memory, no host synchronisation, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.codegen.kernels.attention import DecodeAttention, decode_attention, empty_partials
from fxopt.codegen.kernels.attention_reference import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Absolute, for values drawn from a normal distribution: a few roundings of the dtype.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fills every torch.empty with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def tensors(desc: DecodeAttention, batch: int, kv_heads: int, length: int) -> tuple[torch.Tensor, ...]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.float32).to(desc.dtype)

    return (
        normal(batch, kv_heads * desc.group, desc.q_len, desc.head_dim),
        normal(batch, kv_heads, length, desc.head_dim),
        normal(batch, kv_heads, length, desc.channels),
    )


def attend(desc: DecodeAttention, q: Any, k: Any, v: Any, phi: float = 0.0, **extras: Any) -> tuple[Any, list[int]]:
    scale = desc.head_dim**-0.5
    if desc.softmax == "async":
        extras["phi"] = torch.full((k.shape[1],), phi, device="cuda")
    out, counter = decode_attention(desc, q, k, v, scale=scale, **extras)
    for name in ("phi", "partials", "counter"):
        extras.pop(name, None)
    expected = reference(desc, q, k, v, scale=scale, **extras)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[desc.dtype], rtol=2e-2, equal_nan=True)
    return out, counter.tolist()


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("group", "head_dim"),
    [(4, 64), (4, 80), (4, 96), (4, 128), (4, 256), (1, 128), (7, 128), (8, 128), (71, 64), (1, 80)],
)
def test_against_float64(group: int, head_dim: int, dtype: torch.dtype, softmax: str) -> None:
    desc = DecodeAttention(dtype, head_dim, group, softmax=softmax)
    for length in (1, 63, 100, 1027, 4096):
        _, counter = attend(desc, *tensors(desc, 2, 2, length))
        assert counter[0] == 0 or dtype == torch.float16


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("q_len", [1, 3, 16])
@pytest.mark.parametrize(
    "fields",
    [
        {"soft_cap": 5.0},
        {"has_sinks": True},
        {"causal": True, "window": 300},
        {"mask": "bool"},
        {"mask": "additive"},
        {"alibi": True, "causal": True},
        {"value_dim": 64, "has_extent": True},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_variants(fields: dict[str, Any], q_len: int, softmax: str) -> None:
    desc = DecodeAttention(torch.bfloat16, 128, 4, q_len=q_len, softmax=softmax, **fields)
    q, k, v = tensors(desc, 3, 2, 1027)
    extras: dict[str, Any] = {}
    if desc.has_sinks:
        extras["sinks"] = torch.randn(8, device="cuda")
    if desc.alibi:
        extras["slopes"] = torch.logspace(-1, -3, 8, device="cuda")
    if desc.has_extent:
        extras["extent"] = torch.tensor([1027, 500, q_len], device="cuda")
    if desc.mask != "none":
        visible = torch.rand(3, 8, q_len, 1027, device="cuda") > 0.3
        visible[..., 0] = True
        visible[0, 0] = False
        extras["mask"] = (
            visible
            if desc.mask == "bool"
            else torch.zeros_like(visible, dtype=desc.dtype).masked_fill(~visible, -torch.inf)
        )
    attend(desc, q, k, v, **extras)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_overflowing_rows_are_recomputed(dtype: torch.dtype) -> None:
    desc = DecodeAttention(dtype, 128, 4)
    q, k, v = tensors(desc, 2, 2, 1027)
    q[1, 2] *= 200.0
    _, (recomputed, rows) = attend(desc, q, k, v)
    assert recomputed >= 1
    assert rows == 16


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("group", [1, 4])
def test_rows_are_independent_bit_for_bit(group: int, softmax: str) -> None:
    desc = DecodeAttention(torch.bfloat16, 128, group, has_extent=True, softmax=softmax)
    q, k, v = tensors(desc, 8, 2, 5000)
    q[1] *= 100.0
    extent = torch.tensor([5000, 1, 63, 256, 257, 1027, 4096, 4999], device="cuda")
    for row, end in enumerate(extent.tolist()):
        k[row, :, end:] = torch.nan
        v[row, :, end:] = torch.nan
    together, _ = attend(desc, q, k, v, extent=extent)
    for row, end in enumerate(extent.tolist()):
        one = slice(row, row + 1)
        alone, _ = attend(desc, q[one], k[one, :, :end], v[one, :, :end], extent=extent[one])
        assert torch.equal(together[one], alone)


def test_repeated_runs_agree_bit_for_bit() -> None:
    """Races would show here: every program writes what no other reads in the same kernel."""
    desc = DecodeAttention(torch.bfloat16, 128, 8, q_len=2, causal=True)
    q, k, v = tensors(desc, 4, 8, 8192)
    first, _ = attend(desc, q, k, v)
    phi = torch.zeros(8, device="cuda")
    for _ in range(50):
        again, _ = decode_attention(desc, q, k, v, scale=128**-0.5, phi=phi)
        assert torch.equal(first, again)


def test_cache_of_more_than_two_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip("needs 24 GB of free memory")
    desc = DecodeAttention(torch.bfloat16, 128, 1)
    k = torch.zeros(1, 9, 1 << 21, 128, device="cuda", dtype=torch.bfloat16)  # 2.4e9 elements
    q = torch.randn(1, 9, 1, 128, device="cuda").to(torch.bfloat16)
    k[0, 8, -1] = q[0, 8, 0] * 100.0
    out, _ = decode_attention(desc, q, k, k, scale=1.0, phi=torch.zeros(9, device="cuda"))
    torch.testing.assert_close(out[0, 8, 0], k[0, 8, -1])


def test_no_host_synchronisation_and_cuda_graph() -> None:
    desc = DecodeAttention(torch.bfloat16, 128, 4, mask="bool", has_extent=True)
    q, k, v = tensors(desc, 2, 2, 2048)
    extent = torch.tensor([100, 2048], device="cuda")
    mask = torch.ones(2, 1, 1, 2048, dtype=torch.bool, device="cuda")
    phi = torch.zeros(2, device="cuda")
    counter = torch.zeros(2, dtype=torch.int64, device="cuda")
    partials = empty_partials(desc, 2, 2, 2048, q.device)
    given = {"scale": 128**-0.5, "phi": phi, "counter": counter, "partials": partials, "mask": mask, "extent": extent}
    decode_attention(desc, q, k, v, **given)  # compiles
    torch.utils.deterministic.fill_uninitialized_memory = False  # its fills are no part of the step
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(desc, q, k, v, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decode_attention(desc, q, k, v, **given)
    # The graph follows what the device holds: lengths, scores and whether a row takes the fallback.
    extent.copy_(torch.tensor([2048, 7], device="cuda"))
    q[0, 0] *= 200.0
    counter.zero_()
    graph.replay()
    plain = replace(desc, mask="bool")
    expected = reference(plain, q, k, v, scale=128**-0.5, mask=mask, extent=extent)
    torch.testing.assert_close(out.double(), expected, atol=8e-3, rtol=2e-2)
    recomputed, rows = counter.tolist()
    assert recomputed >= 1
    assert rows == 16
