"""Kernels of sparse attention compiled for GPUs that are not here: registers, spills, shared memory, atomics.

This proves that the shipped configurations compile as intended. It proves nothing about speed or races.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fxopt.codegen.kernels import attention_variants as attention
from fxopt.codegen.kernels import select_scores, select_state, select_top
from fxopt.codegen.kernels.attention_variants import DecodeAttention
from fxopt.codegen.kernels.select_scores import Scores
from fxopt.codegen.kernels.select_state import Kept
from fxopt.codegen.kernels.select_top import TopBlocks
from fxopt.codegen.targets import TARGETS, CompiledInfo, cross_compile

pytest.importorskip("triton")

GLOBAL_ATOMICS = r"\b(?:atom|red)\.(?![\w.]*shared)\w|(?:global|flat|buffer)_atomic"
SHARED_ATOMICS = r"\b(?:atom|red)\.[\w.]*shared|\bds_(?:add|max|min|or|and)_"
LLAMA = DecodeAttention(
    torch.bfloat16, 128, 4, mask="bool", mask_shared=True, has_extent=True, softmax="online", gather=16, counted=True
)
SHIPPED = {
    "pages": LLAMA,
    "tokens": replace(LLAMA, gather=1),
    "tokens, async": replace(LLAMA, gather=1, softmax="async"),
    "multi-head": replace(LLAMA, group=1),
    "multi-query": replace(LLAMA, group=71, head_dim=64),
    "gemma": replace(LLAMA, head_dim=256, group=2, soft_cap=50.0),
    "phi-3": replace(LLAMA, head_dim=96, mask="additive"),
    "window": replace(LLAMA, counted=False, gather=1),
    "whole heads, sinks": replace(LLAMA, some_whole=True, has_sinks=True),
    "fp32": replace(LLAMA, dtype=torch.float32),
    "fp32, wide": replace(LLAMA, dtype=torch.float32, head_dim=256),
}
SCORES = {
    "pages": Scores(torch.bfloat16, 128, 4, 16, True),
    "pages, one head": Scores(torch.bfloat16, 128, 1, 16, True),
    "pages, fp32": Scores(torch.float32, 128, 8, 16, True),
    "pages, wide": Scores(torch.float16, 256, 2, 16, True),
    "features": Scores(torch.bfloat16, 8, 4, 0, True, True),
    "features, int8": Scores(torch.bfloat16, 16, 4, 0, True, True, 8),
    "features, 4 bits": Scores(torch.bfloat16, 16, 4, 0, True, True, 4),
    "features, one head, 4 bits": Scores(torch.bfloat16, 16, 1, 0, True, True, 4),
    "every channel": Scores(torch.float32, 128, 4, 0, True),
}
STATE = {
    "pages": Kept(128, 16, True),
    "pages, wide": Kept(256, 16, True),
    "features": Kept(8, 0, True, True),
    "every channel": Kept(128, 0, True),
    "int8": Kept(16, 0, True, True, 8),
    "4 bits": Kept(16, 0, True, True, 4),
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXOPT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
    for cached in (attention.kernels, select_top.kernels, select_scores.kernel, select_state.kernels):
        cached.cache_clear()


def check(info: CompiledInfo, shared: bool = False) -> CompiledInfo:
    assert info.spills == 0, info.summary()
    assert info.registers <= 255
    assert info.count(GLOBAL_ATOMICS) == 0
    assert shared or info.count(SHARED_ATOMICS) == 0
    assert info.shared_bytes <= (64 << 10 if info.target == "gfx942" else 160 << 10), info.summary()
    return info


def attention_info(desc: DecodeAttention, symbol: str, target: str) -> CompiledInfo:
    backend = TARGETS[target][0]
    types, constants, aligned = attention.signature(desc, symbol)
    tiles = attention.config(desc, backend)
    kernel = attention.kernels(desc, backend)[symbol]
    return cross_compile(kernel, types, constants, target, tiles.num_warps, tiles.num_stages, aligned)


def pointers(kinds: dict[str, str], names: list[str], element: str) -> dict[str, str]:
    known = dict.fromkeys(("query", "key", "bounds", "features"), f"*{element}")
    known |= dict.fromkeys(("extent", "filled", "channels", "index", "valid"), "*i64")
    known |= dict.fromkeys(("out", "scores", "bias", "scales"), "*fp32")
    known |= dict.fromkeys(("counts", "state"), "*i32") | kinds
    return {name: known.get(name, "i32") for name in names}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["pages", "tokens"])
def test_listed_keys_and_values_arrive_ahead_of_their_use(name: str, target: str) -> None:
    info = check(attention_info(SHIPPED[name], "online_split", target))
    tiles = [shape for shape in info.shared_buffers() if len(shape) == 3]
    assert len(tiles) >= 2, info.summary()
    assert target == "gfx942" or info.count(r"cp\.async\.c[ag]") > 0
    assert info.count(r"mma\.sync|wgmma\.mma|v_mfma") > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SHIPPED)
def test_attention_on_lists(name: str, target: str) -> None:
    for symbol in attention.kernel_names(SHIPPED[name]):
        check(attention_info(SHIPPED[name], symbol, target))


@pytest.mark.parametrize(
    "target", ["sm_80", "gfx942", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_90", "sm_100"))]
)
@pytest.mark.parametrize("symbol", ["choose_row", "count_digits", "place_chunks"])
def test_choose(symbol: str, target: str) -> None:
    """Counting adds whole numbers in shared memory; nothing is added to global memory."""
    kernel = select_top.kernels(TopBlocks(16, True, (0, 1)))[symbol]
    types = pointers({}, [name for name in kernel.arg_names if name != "TILE"], "bf16")
    info = check(cross_compile(kernel, types, {"TILE": select_top.TILE}, target, select_top.WARPS), shared=True)
    assert (info.count(SHARED_ATOMICS) == 0) == (symbol == "place_chunks")


def scores_info(desc: Scores, target: str) -> CompiledInfo:
    kernel = select_scores.kernel(desc, 4096 if desc.bits != 4 else 2048, 32)
    coded = {8: {"features": "*i8"}, 4: {"features": "*u8"}}.get(desc.bits, {})
    types = pointers(coded, kernel.arg_names, select_scores.DTYPES[desc.dtype])
    constants = {"query_dim": 1}
    types = {name: kind for name, kind in types.items() if name not in constants}
    return check(cross_compile(kernel, types, constants, target, select_scores.WARPS))


def state_info(kept: Kept, symbol: str, target: str) -> CompiledInfo:
    kernel = select_state.kernels(kept, 4096 if kept.bits else 0)[symbol]
    coded = {8: {"features": "*i8"}, 4: {"features": "*u8"}}.get(kept.bits, {})
    constants = {"key_dim": 1} if symbol == "update" else {}
    types = pointers(coded, [name for name in kernel.arg_names if name not in constants], "bf16")
    return check(cross_compile(kernel, types, constants, target, 4 if symbol == "update" else 1))


@pytest.mark.parametrize("name", ["pages", "features"])
def test_scores_and_state(name: str) -> None:
    info = scores_info(SCORES[name], "sm_90")
    assert info.count(r"mma\.sync|wgmma\.mma") > 0
    # What is read once for each step comes in loads of 16 bytes.
    assert info.count(r"ld\.global\S*\.v4|ld\.global\S*\.v2\.b64") > 0 or name == "features"
    state_info(STATE[name], "update", "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_scores_and_all_state(target: str) -> None:
    for desc in SCORES.values():
        scores_info(desc, target)
    for kept in STATE.values():
        for symbol in ("update", "commit"):
            state_info(kept, symbol, target)
