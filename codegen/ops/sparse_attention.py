"""Decode attention on chosen positions: what is not chosen is not read.

    window_positions(key, mask, *, sinks, tokens, counts) -> index       [B or 1, (Hkv,) K]: sinks and newest positions
    gathered_attention(query, key, value, index, valid, mask, extent, sinks, *, scale, soft_cap, min_length, block,
                       dense_heads) -> out

query [B, Hq, 1, D], key [B, Hkv, S, D], value [B, Hkv, S, DV], out [B, Hq, 1, DV]. ``index`` lists positions, or blocks
of `block` positions, for all heads [B or 1, K] or for each KV head [B or 1, Hkv, K]. K is fixed by the shapes; a row
that sees fewer has its list padded with -1. ``valid`` [B or 1, Hkv]: so many entries of each list, its first ones, are
no padding. ``mask`` and ``extent`` are those of the dense form, applied to what is listed; ``sinks`` are the logits
some models add to the sum, as in ``fxopt.attention``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import fxopt.codegen.ops.attention  # noqa: F401  (registers the dense operator)
from fxopt.codegen.ops import LIBRARY
from fxopt.codegen.ops.sparse_gather import attend_to, filled_length

DENSE = torch.ops.fxopt.attention.default
"""The operator, not its body: it has a kernel of its own on a CPU."""
POSITIONS_SCHEMA = (
    "window_positions(Tensor key, Tensor? mask=None, *, int sinks, SymInt tokens=0, SymInt[] counts=[]) -> Tensor"
)
ATTENTION_SCHEMA = (
    "gathered_attention(Tensor query, Tensor key, Tensor value, Tensor index, Tensor? valid=None, Tensor? mask=None, "
    "Tensor? extent=None, Tensor? sinks=None, *, float scale, float soft_cap=0.0, int min_length=0, int block=1, "
    "int[] dense_heads=[]) -> Tensor"
)


def visible_positions(mask: Tensor) -> Tensor:
    """[B or 1, S] bool: positions that any head of a row may look at; ``mask``: bool or additive, [..., 1, S]."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return visible.flatten(1, 2).any(1)


def window_positions(
    key: Tensor,
    mask: Tensor | None = None,
    *,
    sinks: int,
    tokens: int = 0,
    counts: Sequence[int] = (),
) -> Tensor:
    """The first `sinks` and the last ``tokens - sinks`` visible positions of every row, ascending, padded with -1.

    ``key: [B, Hkv, S, D]`` gives S alone; K is `tokens`. Positions are counted among those a row can see, so that
    padding does not use up its budget. ``counts``: instead of one, the tokens of each KV head; the result is then
    [B or 1, Hkv, K] with the largest of them. StreamingLLM (arXiv 2309.17453), positions as they are in the cache.
    """
    length = key.shape[2]
    rank = None if mask is None else visible_positions(mask).cumsum(-1).contiguous()
    if not counts:
        return _window(rank, length, tokens, sinks, key.device)
    most = max(counts)
    lists = {count: _window(rank, length, count, sinks, key.device) for count in set(counts)}
    padded = [torch.nn.functional.pad(lists[c], (0, most - c), value=-1) for c in counts]
    return torch.stack(padded, 1)


def _window(rank: Tensor | None, length: int, count: int, sinks: int, device: torch.device) -> Tensor:
    """[B or 1, count]; ``rank: [B or 1, S]`` counts the visible positions up to each, 1 at the first; None: all are."""
    step = torch.arange(count, device=device)
    if rank is None:
        place = torch.where(step < sinks, step, max(length - count, 0) + step)
        return torch.where(place < length, place, -1)[None]
    total = rank[:, -1:]
    wanted = torch.where(step < sinks, step, (total - count).clamp(min=0) + step) + 1  # [B, K]
    return torch.where(wanted <= total, torch.searchsorted(rank, wanted.contiguous()), -1)


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    min_length: int = 0,
    block: int = 1,
    dense_heads: Sequence[int] = (),
) -> Tensor:
    """The operator's body. ``index: [B or 1, K]`` or ``[B or 1, Hkv, K]``, padded with -1.

    Dense where the cache has at most K positions in use, all of which are then listed, and on the CPU below
    `min_length`; the KV heads `dense_heads` read everything in any case. The result lies in memory as [B, 1, Hq, DV].
    """
    filled = filled_length(key.shape[2], extent)
    if filled <= index.shape[-1] * block or filled < min_length:
        return DENSE(query, key, value, mask, extent, sinks, scale=scale, soft_cap=soft_cap)
    index = index[:, None] if index.ndim == 2 else index
    if not dense_heads:
        return attend_to(query, key, value, index, valid, mask, filled, sinks, scale, soft_cap, block)
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    out = query.new_empty(query.shape[0], 1, query.shape[1], value.shape[3]).transpose(1, 2)
    for first, last, dense in _runs(kv_heads, dense_heads):
        # Views of neighbouring heads: a list of heads would copy the cache.
        part, own = slice(first, last), slice(first * group, last * group)
        some_mask = mask[:, own] if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 else mask
        some_sinks = None if sinks is None else sinks[own]
        q, k, v = query[:, own], key[:, part], value[:, part]
        if dense:
            found = DENSE(q, k, v, some_mask, extent, some_sinks, scale=scale, soft_cap=soft_cap)
        else:
            some_index = index if index.shape[1] == 1 else index[:, part]
            some_valid = valid if valid is None or valid.ndim == 1 else valid[:, part]
            found = attend_to(q, k, v, some_index, some_valid, some_mask, filled, some_sinks, scale, soft_cap, block)
        out[:, own] = found
    return out


def _runs(count: int, chosen: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Neighbouring heads that are all in `chosen` or all not: (first, end, in chosen)."""
    runs: list[tuple[int, int, bool]] = []
    for head in range(count):
        inside = head in chosen
        if runs and runs[-1][2] == inside:
            runs[-1] = (runs[-1][0], head + 1, inside)
        else:
            runs.append((head, head + 1, inside))
    return runs


def _fake_positions(
    key: Tensor,
    mask: Tensor | None = None,
    *,
    sinks: int,
    tokens: int = 0,
    counts: Sequence[int] = (),
) -> Tensor:
    rows = 1 if mask is None or mask.ndim < 4 else mask.shape[0]
    if not counts:
        return key.new_empty(rows, tokens, dtype=torch.int64)
    most = counts[0]
    for count in counts[1:]:
        most = torch.sym_max(most, count)
    return key.new_empty(rows, len(counts), most, dtype=torch.int64)


def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    min_length: int = 0,
    block: int = 1,
    dense_heads: Sequence[int] = (),
) -> Tensor:
    return fake_decode(query, key, value)


def fake_decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The result of one decode step of attention, without values."""
    batch, heads, tokens, width = query.shape
    torch._check(tokens == 1, lambda: f"sparse attention decodes one token, not {tokens}")
    torch._check(heads % key.shape[1] == 0, lambda: f"{heads} query heads do not divide into {key.shape[1]} KV heads")
    torch._check(width == key.shape[3], lambda: f"query has {width} channels and key {key.shape[3]}")
    return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)


for _name, _schema, _body, _fake in (
    ("window_positions", POSITIONS_SCHEMA, window_positions, _fake_positions),
    ("gathered_attention", ATTENTION_SCHEMA, gathered_attention, _fake_attention),
):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{_name}", _fake, lib=LIBRARY)
