"""Decode attention compiled for GPUs that are not here: registers, spills, pipelining, shuffles, atomics.

This proves that the shipped configurations compile as intended. It proves nothing about speed or races.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fxopt.codegen.kernels import attention_variants as attention
from fxopt.codegen.kernels.attention_variants import DecodeAttention
from fxopt.codegen.targets import TARGETS, CompiledInfo, cross_compile

pytest.importorskip("triton")

SHUFFLES = r"shfl\.sync|ds_bpermute|ds_swizzle|v_permlane|_dpp\b"
ATOMICS = r"\batom\.|\bred\.|atomic"
LLAMA = DecodeAttention(torch.bfloat16, 128, 4, mask="bool", mask_shared=True, has_extent=True)
EVERYTHING = DecodeAttention(
    torch.bfloat16, 128, 8, q_len=4, soft_cap=50.0, has_sinks=True, causal=True, window=1024, mask="additive",
    alibi=True, has_extent=True,
)  # fmt: skip
SHIPPED = {
    "llama": LLAMA,
    "llama, fp16": replace(LLAMA, dtype=torch.float16),
    "multi-head": replace(LLAMA, group=1),
    "multi-query": replace(LLAMA, group=71, head_dim=64),
    "gemma": replace(LLAMA, head_dim=256, group=2, soft_cap=50.0),
    "phi-2": replace(LLAMA, head_dim=80, group=1),
    "phi-3": replace(LLAMA, head_dim=96, group=4, q_len=4, window=2048),
    "verification": replace(LLAMA, q_len=16, causal=True, mask="none", mask_shared=False),
    "everything": EVERYTHING,
    "fp32": replace(LLAMA, dtype=torch.float32),
    "fp32, wide": replace(LLAMA, dtype=torch.float32, head_dim=256),
}


@functools.cache
def compiled(desc: DecodeAttention, symbol: str, target: str) -> CompiledInfo:
    backend = TARGETS[target][0]
    types, constants, aligned = attention.signature(desc, symbol)
    tiles = attention.config(desc, backend)
    return cross_compile(
        attention.kernels(desc, backend)[symbol],
        types,
        constants,
        target,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        aligned=aligned,
    )


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXOPT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
    attention.kernels.cache_clear()


def loops(asm: str) -> str:
    """The lines between a label and a later jump back to it: what runs once for each tile of the cache."""
    lines = asm.splitlines()
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*([.$]L\w+):", line))}
    inside: set[int] = set()
    for at, line in enumerate(lines):
        jump = re.search(r"\b(?:bra|s_c?branch\w*)\S*\s+([.$]L\w+)", line)
        if jump and labels.get(jump[1], at) < at:
            inside.update(range(labels[jump[1]], at))
    assert inside, "no loop found in the assembly"
    return "\n".join(lines[at] for at in sorted(inside))


def check(desc: DecodeAttention, symbol: str, target: str) -> CompiledInfo:
    info = compiled(desc, symbol, target)
    assert info.spills == 0, info.summary()
    assert info.count(ATOMICS) == 0
    assert info.shared_bytes <= (64 << 10 if target == "gfx942" else 160 << 10), info.summary()
    return info


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("symbol", attention.kernel_names(LLAMA))
def test_all_four_kernels(target: str, symbol: str) -> None:
    info = check(LLAMA, symbol, target)
    if symbol.endswith("split"):
        # Keys and values arrive through shared memory, several tiles ahead of their use.
        assert len(info.shared_buffers()) >= 2, info.summary()
        assert target == "gfx942" or info.count(r"cp\.async\.c[ag]") > 0
        assert info.count(r"mma\.sync|wgmma\.mma|v_mfma") > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "multi-head"])
def test_fewer_shuffles_than_the_online_kernel(target: str, name: str) -> None:
    desc = SHIPPED[name]
    unified = compiled(desc, "async_split", target)
    online = check(replace(desc, softmax="online"), "online_split", target)
    inside = {info: len(re.findall(SHUFFLES, loops(info.asm))) for info in (unified, online)}
    assert inside[unified] < inside[online]
    assert unified.count(SHUFFLES) <= online.count(SHUFFLES)
    if name == "llama":
        assert inside[unified] == 0, "the loop over the cache has no reduction across threads"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "llama"])
def test_shipped_configurations_do_not_spill(target: str, name: str) -> None:
    for symbol in ("async_split", "recompute_split"):
        check(SHIPPED[name], symbol, target)
