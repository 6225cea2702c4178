"""Device top-k for sparse attention: which blocks of a cache each KV head reads, by radix selection.

A score becomes a number of 32 bits in the same order; the k-th largest is found digit by digit (8 bits each, from
counts of the keys that share the digits so far), and what lies above it, with as many of its equals as are missing,
lower indices first, is written in ascending order by prefix sums. The result is exact and does not depend on how the
work is cut: one program a row, or chunks of a row with one launch a digit where rows are long and few.

Counting uses `tl.histogram`, which adds whole numbers in shared memory; nothing is added to global memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen import roofline
from fxopt.codegen.kernels.launch import launch
from fxopt.codegen.source import fill, load_kernel, write_source

TILE = 1024
WARPS = 8
MAX_CHUNKS = 16
"""Chunks of a row; every program of a row reads the counts of all of them."""
ROW_BLOCKS = 8192
"""Blocks that one program chooses from before a row is cut."""

TEMPLATE = '''
         | """Top-k of scores plus bias for each row, ascending, padded with -1; ties go to the lower index."""
         |
         | import triton
         | import triton.language as tl
         |
         |
         | @triton.jit
         | def ordered(scores, bias, at, live):
         |     """Keys in the order of the scores, 0 for what is never chosen; NaN is the largest, as in torch.topk."""
         |     score = tl.load(scores + at, mask=live, other=float("-inf"))
         |     added = tl.load(bias + at, mask=live, other=float("-inf"))
         |     score += added
         |     bits = score.to(tl.int32, bitcast=True)
         |     key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
         |     key = tl.where(score == score, key, 4294967295)
         |     return tl.where((score == float("-inf")) | (added == float("-inf")), 0, key).to(tl.uint32)
         |
         |
         | @triton.jit
         | def next_digit(counts, remaining):
         |     """The digit [] of the `remaining`-th largest key, and what remains among its equals. counts: [256]."""
         |     reach = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # keys with this digit or a larger one
         |     digit = tl.maximum(tl.sum((reach >= remaining).to(tl.int32), 0) - 1, 0)
         |     larger = tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0), 0)
         |     return digit.to(tl.uint32), remaining - larger
         |
         |
         | @triton.jit
         | def blocks_in_use(extent, blocks, least):
extent   |     end = tl.load(extent).to(tl.int32)
extent   |     used = tl.minimum((tl.maximum(end, 0) + $BLOCK - 1) // $BLOCK, blocks)
!extent  |     end = blocks * $BLOCK
!extent  |     used = blocks
         |     # A cache that is read whole needs no list.
         |     return tl.where(end <= least, 0, used)
         |
         |
         | @triton.jit
         | def wanted(count, head$LIMITS):
         |     limit = count
limits   | $CHOICE
limits   |     limit = tl.minimum(limit, count)
         |     return limit
         |
         |
         | @triton.jit
         | def place(index, scores, bias, first, last, threshold, remaining, taken, ties, TILE: tl.constexpr):
         |     """Write the chosen blocks of [first, last), after `taken` chosen and `ties` equal ones before them."""
         |     n = tl.arange(0, TILE)
         |     for start in tl.range(first, last, TILE):
         |         key = ordered(scores, bias, start + n, start + n < last)
         |         equal = (key == threshold).to(tl.int32)
         |         rank = ties + tl.cumsum(equal, 0) - equal
         |         chosen = ((key > threshold) | ((equal != 0) & (rank < remaining))).to(tl.int32)
         |         at = taken + tl.cumsum(chosen, 0) - 1
         |         tl.store(index + at, (start + n).to(tl.int64), mask=chosen != 0)
         |         taken += tl.sum(chosen, 0)
         |         ties += tl.sum(equal, 0)
         |     return taken
         |
         |
         | @triton.jit
         | def pad(index, taken, count, TILE: tl.constexpr):
         |     n = tl.arange(0, TILE)
         |     for start in tl.range(taken, count, TILE):
         |         tl.store(index + start + n, tl.full([TILE], -1, tl.int64), mask=start + n < count)
         |
         |
         | @triton.jit(do_not_specialize=["blocks", "least", "count"$NAMES])
         | def choose_row(
         |     scores,  # [B, Hkv, >= N]
         |     bias,  # [B or 1, N]
         |     index,  # [B, Hkv, K]
         |     valid,  # [B, Hkv]
extent   |     extent,  # [], filled positions
         |     blocks,  # N
         |     least,  # up to so many filled positions nothing is chosen
         |     count,  # K
         |     kv_heads,
limits   | $ARGUMENTS
         |     scores_row,
         |     bias_row,
         |     TILE: tl.constexpr = $TILE,
         | ):
         |     pair = tl.program_id(0).to(tl.int64)
         |     scores += pair * scores_row
         |     bias += pair // kv_heads * bias_row
         |     index += pair * count
         |     used = blocks_in_use($EXTENT, blocks, least)
         |     n = tl.arange(0, TILE)
         |     threshold = tl.cast(0, tl.uint32)
         |     remaining = wanted(count, pair % kv_heads$LIMITS)
         |     for level in tl.static_range(4):
         |         counts = tl.zeros([256], tl.int32)
         |         for start in tl.range(0, used, TILE):
         |             key = ordered(scores, bias, start + n, start + n < used)
         |             match = key != 0
         |             if level > 0:
         |                 match = match & (key >> (32 - 8 * level) == threshold >> (32 - 8 * level))
         |             counts += tl.histogram(((key >> (24 - 8 * level)) & 255).to(tl.int32), 256, mask=match)
         |         if level == 0:
         |             remaining = tl.minimum(remaining, tl.sum(counts, 0))
         |         digit, remaining = next_digit(counts, remaining)
         |         threshold = threshold | (digit << (24 - 8 * level))
         |     none = tl.cast(0, tl.int32)
         |     taken = place(index, scores, bias, none, used, threshold, remaining, none, none, TILE)
         |     pad(index, taken, count, TILE)
         |     tl.store(valid + pair, taken.to(tl.int64))
         |
         |
         | @triton.jit
         | def digits_so_far(counts, state, pair, level, chunks, limit):
         |     """Threshold and what remains after `level` digits, from the counts of the last of them."""
         |     threshold = tl.cast(0, tl.uint32)
         |     remaining = limit
         |     if level > 0:
         |         c = tl.arange(0, $CHUNKS)
         |         at = counts + ((pair * 4 + level - 1) * chunks + c)[:, None] * 256 + tl.arange(0, 256)[None, :]
         |         total = tl.sum(tl.load(at, mask=(c < chunks)[:, None], other=0), 0)
         |         threshold = tl.load(state + (pair * 4 + level - 1) * 2).to(tl.uint32, bitcast=True)
         |         remaining = tl.load(state + (pair * 4 + level - 1) * 2 + 1)
         |         if level == 1:
         |             remaining = tl.minimum(remaining, tl.sum(total, 0))
         |         digit, remaining = next_digit(total, remaining)
         |         threshold = threshold | (digit << (32 - 8 * level))
         |     return threshold, remaining
         |
         |
         | @triton.jit(do_not_specialize=["blocks", "least", "count", "level", "chunks"$NAMES])
         | def count_digits(
         |     scores,  # [B, Hkv, >= N]
         |     bias,  # [B or 1, N]
         |     counts,  # [B, Hkv, 4, chunks, 256]
         |     state,  # [B, Hkv, 4, 2]: threshold and what remains before each digit
extent   |     extent,
         |     blocks,
         |     least,
         |     count,
         |     kv_heads,
limits   | $ARGUMENTS
         |     scores_row,
         |     bias_row,
         |     chunks,
         |     chunk_size,
         |     level,
         |     TILE: tl.constexpr = $TILE,
         | ):
         |     pair = tl.program_id(0).to(tl.int64)
         |     chunk = tl.program_id(1)
         |     scores += pair * scores_row
         |     bias += pair // kv_heads * bias_row
         |     used = blocks_in_use($EXTENT, blocks, least)
         |     threshold, remaining = digits_so_far(
         |         counts, state, pair, level, chunks, wanted(count, pair % kv_heads$LIMITS)
         |     )
         |     if chunk == 0:
         |         tl.store(state + (pair * 4 + level) * 2, threshold.to(tl.int32, bitcast=True))
         |         tl.store(state + (pair * 4 + level) * 2 + 1, remaining)
         |     n = tl.arange(0, TILE)
         |     last = tl.minimum((chunk + 1) * chunk_size, used)
         |     # The digits that are known, in ones; a shift by 32 has no meaning.
         |     known = tl.where(level == 0, 0, -1 << ((32 - 8 * level) & 31)).to(tl.uint32, bitcast=True)
         |     own = tl.zeros([256], tl.int32)
         |     for start in tl.range(chunk * chunk_size, last, TILE):
         |         key = ordered(scores, bias, start + n, start + n < last)
         |         match = (key != 0) & ((key & known) == threshold)
         |         own += tl.histogram(((key >> (24 - 8 * level)) & 255).to(tl.int32), 256, mask=match)
         |     tl.store(counts + ((pair * 4 + level) * chunks + chunk) * 256 + tl.arange(0, 256), own)
         |
         |
         | @triton.jit(do_not_specialize=["blocks", "least", "count", "chunks"$NAMES])
         | def place_chunks(
         |     scores,
         |     bias,
         |     index,  # [B, Hkv, K]
         |     valid,  # [B, Hkv]
         |     counts,
         |     state,
extent   |     extent,
         |     blocks,
         |     least,
         |     count,
         |     kv_heads,
limits   | $ARGUMENTS
         |     scores_row,
         |     bias_row,
         |     chunks,
         |     chunk_size,
         |     TILE: tl.constexpr = $TILE,
         | ):
         |     pair = tl.program_id(0).to(tl.int64)
         |     chunk = tl.program_id(1)
         |     scores += pair * scores_row
         |     bias += pair // kv_heads * bias_row
         |     index += pair * count
         |     used = blocks_in_use($EXTENT, blocks, least)
         |     threshold, remaining = digits_so_far(counts, state, pair, 4, chunks, 0)
         |     # What chunks before this one hold: keys above the threshold (their first digit that differs is larger),
         |     # and keys equal to it.
         |     c = tl.arange(0, $CHUNKS)[:, None]
         |     digits = tl.arange(0, 256)[None, :]
         |     above = 0
         |     ties = 0
         |     for level in tl.static_range(4):
         |         at = counts + ((pair * 4 + level) * chunks + c) * 256 + digits
         |         seen = tl.load(at, mask=c < chunk, other=0)
         |         digit = ((threshold >> (24 - 8 * level)) & 255).to(tl.int32)
         |         above += tl.sum(tl.where(digits > digit, seen, 0))
         |         if level == 3:
         |             ties = tl.sum(tl.where(digits == digit, seen, 0))
         |     last = tl.minimum((chunk + 1) * chunk_size, used)
         |     taken = above + tl.minimum(ties, remaining)
         |     taken = place(index, scores, bias, chunk * chunk_size, last, threshold, remaining, taken, ties, TILE)
         |     if chunk == chunks - 1:
         |         pad(index, taken, count, TILE)
         |         tl.store(valid + pair, taken.to(tl.int64))
'''


@dataclass(frozen=True)
class TopBlocks:
    """One variant of the selection: everything that changes the generated source."""

    block: int = 1
    """Positions of a block."""
    has_extent: bool = False
    """A device tensor says how many positions are filled; blocks beyond are not looked at."""
    kinds: tuple[int, ...] = ()
    """For each KV head, which of several limits its list has; empty: every list is as long as there is room."""


@functools.cache
def source(desc: TopBlocks) -> str:
    """The Triton module of a variant."""
    limits = [f"limit{i}" for i in range(max(desc.kinds, default=-1) + 1)]
    choice = [f"    limit = tl.where(head == {head}, limit{kind}, limit)" for head, kind in enumerate(desc.kinds)]
    values = {
        "BLOCK": desc.block, "TILE": TILE, "CHUNKS": MAX_CHUNKS, "EXTENT": "extent" if desc.has_extent else "0",
        "LIMITS": "".join(f", {name}" for name in limits), "CHOICE": "\n".join(choice),
        "ARGUMENTS": "\n".join(f"    {name},  # entries of some heads' lists" for name in limits),
        "NAMES": "".join(f', "{name}"' for name in limits),
    }  # fmt: skip
    return fill(TEMPLATE, {"extent": desc.has_extent, "limits": bool(desc.kinds)}, values)


@functools.cache
def kernels(desc: TopBlocks) -> Mapping[str, Any]:
    """The kernels of a variant by name; the source file is written on the first call."""
    header = {field: str(getattr(desc, field)) for field in desc.__annotations__}
    path = write_source("choose_blocks", source(desc), header)
    return {name: load_kernel(path, name) for name in ("choose_row", "count_digits", "place_chunks")}


def chunks_for(rows: int, blocks: int, device: torch.device) -> int:
    """Programs for each row: one where rows are short or fill the device, else enough to fill it."""
    planned = roofline.planned_device()
    on_gpu = torch.cuda.get_device_properties(device) if planned is None and device.type == "cuda" else None
    processors = planned.units if planned else on_gpu.multi_processor_count if on_gpu else 1
    return max(1, min(MAX_CHUNKS, -(-processors // max(rows, 1)), -(-blocks // ROW_BLOCKS)))


def choose(
    scores: Tensor,
    bias: Tensor,
    extent: Tensor | None = None,
    *,
    count: int,
    block: int = 1,
    least: int = 0,
    limits: tuple[int, ...] = (),
    chunks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The blocks with the largest ``scores + bias``; no host synchronisation, capturable in a CUDA graph.

    Args:
        scores: [B, Hkv, at least N], float32, contiguous. bias: [B or 1, N], float32; -inf: never chosen.
        extent: 0-d integers, filled positions; None: N * block. With at most `least` of them nothing is chosen.
        count: K, entries of a list; `limits`: fewer for some KV heads. block: positions of a block.
        chunks: programs for each row; None: as `chunks_for` says. It changes no result.

    Returns:
        index [B, Hkv, K], int64, ascending, -1 behind the valid ones, and valid [B, Hkv], int64, how many they are.
    """
    batch, heads, columns = scores.shape
    blocks = bias.shape[1]
    if columns < blocks or bias.shape[0] not in (1, batch) or {scores.dtype, bias.dtype} != {torch.float32}:
        raise ValueError(
            f"choose: scores are {scores.dtype} {tuple(scores.shape)}, bias {bias.dtype} {tuple(bias.shape)}; allowed "
            "are float32 [B, Hkv, N or more] and [B or 1, N]"
        )
    if limits and len(limits) != heads:
        raise ValueError(f"choose: {len(limits)} limits for {heads} KV heads; give one for each, or none")
    scores, bias = scores.contiguous(), bias.contiguous()
    index = torch.empty(batch, heads, count, dtype=torch.int64, device=scores.device)
    valid = torch.empty(batch, heads, dtype=torch.int64, device=scores.device)
    rows = batch * heads
    chunks = chunks_for(rows, blocks, scores.device) if chunks is None else chunks
    if not 1 <= chunks <= MAX_CHUNKS:
        raise ValueError(f"choose: {chunks} chunks; allowed are 1 to {MAX_CHUNKS}")
    # Their values change from step to step where a cache grows; which heads share one does not.
    distinct = list(dict.fromkeys(limits))
    functions = kernels(TopBlocks(block, extent is not None, tuple(distinct.index(limit) for limit in limits)))
    given: dict[str, Any] = {
        "scores": scores, "bias": bias, "index": index, "valid": valid, "extent": extent, "blocks": blocks,
        "least": least, "count": count, "kv_heads": heads, "scores_row": columns,
        "bias_row": blocks if bias.shape[0] > 1 else 0, "chunks": chunks, "TILE": TILE,
    }  # fmt: skip
    given |= {f"limit{i}": limit for i, limit in enumerate(distinct)}
    if chunks == 1:
        launch(functions["choose_row"], (rows,), given, scores, num_warps=WARPS)
        return index, valid
    given |= {
        "chunk_size": -(-blocks // (chunks * TILE)) * TILE,
        "counts": torch.empty(rows, 4, chunks, 256, dtype=torch.int32, device=scores.device),
        "state": torch.empty(rows, 4, 2, dtype=torch.int32, device=scores.device),
    }
    for level in range(4):
        launch(functions["count_digits"], (rows, chunks), given | {"level": level}, scores, num_warps=WARPS)
    launch(functions["place_chunks"], (rows, chunks), given, scores, num_warps=WARPS)
    return index, valid
