"""Decode attention on chosen positions: what is not chosen is not read.

    window_positions(key, mask, *, sinks, tokens, share) -> index          [B or 1, K]: sinks and the newest positions
    gathered_attention(query, key, value, index, mask, extent, sinks, *, scale, soft_cap, min_length, block) -> out

query [B, Hq, 1, D], key [B, Hkv, S, D], value [B, Hkv, S, DV], out [B, Hq, 1, DV]. ``index`` lists positions, or blocks
of `block` positions, for all heads [B or 1, K] or for each KV head [B or 1, Hkv, K]. K is fixed by the shapes; a row
that sees fewer has its list padded with -1. ``mask`` and ``extent`` are those of the dense form, applied to what is
listed; ``sinks`` are the logits some models add to the sum, as in ``fxopt.attention``.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from fxopt.codegen.ops import LIBRARY
from fxopt.codegen.ops.attention import attention, pack_mask

POSITIONS_SCHEMA = (
    "window_positions(Tensor key, Tensor? mask=None, *, int sinks, int tokens=0, float share=0.0) -> Tensor"
)
ATTENTION_SCHEMA = (
    "gathered_attention(Tensor query, Tensor key, Tensor value, Tensor index, Tensor? mask=None, Tensor? extent=None, "
    "Tensor? sinks=None, *, float scale, float soft_cap=0.0, int min_length=0, int block=1) -> Tensor"
)


def budget_tokens(length: int, sinks: int, tokens: int, share: float) -> int:
    """K: `tokens`, or that share of `length` rounded up, and at least the sinks and one more.

    ``length`` is the size of the cache's tensor and may be symbolic, so that K is fixed wherever the cache is.
    """
    if tokens:
        return tokens
    exact = Fraction(share).limit_denominator(1 << 16)
    wanted = -((-length * exact.numerator) // exact.denominator)
    return torch.sym_max(wanted, sinks + 1)


def visible_positions(mask: Tensor) -> Tensor:
    """[B or 1, S] bool: positions that any head of a row may look at; ``mask``: bool or additive, [..., 1, S]."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return visible.flatten(1, 2).any(1)


def window_positions(
    key: Tensor, mask: Tensor | None = None, *, sinks: int, tokens: int = 0, share: float = 0.0
) -> Tensor:
    """The first `sinks` and the last ``K - sinks`` visible positions of every row, ascending, padded with -1.

    ``key: [B, Hkv, S, D]`` gives S alone. Positions are counted among those a row can see, so that padding does not
    use up its budget. StreamingLLM (arXiv 2309.17453), with positions left as they are in the cache.
    """
    length = key.shape[2]
    count = budget_tokens(length, sinks, tokens, share)
    step = torch.arange(count, device=key.device)
    if mask is None:
        rank = torch.where(step < sinks, step, max(length - count, 0) + step)
        return torch.where(rank < length, rank, -1)[None]
    rank = visible_positions(mask).cumsum(-1)  # [B, S], 1 at the first visible position
    total = rank[:, -1:]
    wanted = torch.where(step < sinks, step, (total - count).clamp(min=0) + step) + 1  # [B, K]
    index = torch.searchsorted(rank.contiguous(), wanted.contiguous())
    return torch.where(wanted <= total, index, -1)


def take_positions(tensor: Tensor, index: Tensor, block: int = 1) -> Tensor:
    """[B, H, K * block, D] of [B, H, S, D] at ``index: [B or 1, H or 1, K]``, which lists blocks and no -1.

    What a last block lists beyond S is not to be used.
    """
    batch, heads, length, width = tensor.shape
    if block > 1 and (length % block or not tensor.is_contiguous()):
        positions = index[..., None] * block + torch.arange(block, device=index.device)
        index, block = positions.flatten(2).clamp(max=length - 1), 1
    if not tensor.is_contiguous():
        return tensor.gather(2, index[..., None].expand(batch, heads, -1, width))
    # Whole rows are copied this way; a gather over [.., D] would move them element by element.
    rows = length // block
    first = torch.arange(0, batch * heads * rows, rows, device=index.device).view(batch, heads, 1)
    chosen = tensor.view(-1, block * width).index_select(0, (first + index).view(-1))
    return chosen.view(batch, heads, -1, width)


def attend_to(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, mask: Tensor | None, sinks: Tensor | None,
    scale: float, soft_cap: float, block: int = 1,
) -> Tensor:  # fmt: skip
    """Attention on the blocks ``index: [B or 1, Hkv or 1, K]`` (-1: none) of the cache."""
    kv_heads, group, length = key.shape[1], query.shape[1] // key.shape[1], key.shape[2]
    listed, index = index >= 0, index.clamp(min=0)
    positions = index
    if block > 1:
        positions = (index[..., None] * block + torch.arange(block, device=index.device)).flatten(2)
        listed = listed.repeat_interleave(block, -1) & (positions < length)
        positions = positions.clamp(max=length - 1)
    chosen: Tensor | None = listed[:, :, None]  # [B, Hkv, 1, K]
    if mask is not None:
        mask = pack_mask(mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)), kv_heads, group, 1)
        assert mask is not None
        lead = torch.broadcast_shapes(mask.shape[:3], positions[:, :, None].shape[:3])
        at = positions[:, :, None].expand(*lead, -1)
        mask = mask.expand(*lead, -1).gather(-1, at)
        chosen = mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, float("-inf"))  # type: ignore[operator]
    if chosen is not None and chosen.dtype == torch.bool and chosen.device.type == "cpu" and bool(chosen.all()):
        chosen = None
    if chosen is not None and (chosen.shape[1] > 1 or chosen.shape[2] > 1):
        # From [B, Hkv, G, K] back to one row for each query head.
        chosen = chosen.expand(-1, kv_heads, group, -1).flatten(1, 2)[:, :, None]
    return attention(
        query, take_positions(key, index, block), take_positions(value, index, block), chosen, None, sinks,
        scale=scale, soft_cap=soft_cap,
    )  # fmt: skip


def filled_length(length: int, extent: Tensor | None) -> int:
    """How many leading positions are in use, where the host can know without waiting; else the cache's size."""
    if extent is None or extent.device.type != "cpu":
        return length
    return max(1, min(int(extent.item()), length))


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    min_length: int = 0,
    block: int = 1,
) -> Tensor:
    """The operator's body. ``index: [B or 1, K]`` or ``[B or 1, Hkv, K]``, padded with -1.

    Dense where the cache has at most K positions in use, all of which are then listed, and on the CPU below
    `min_length`. The result lies in memory as [B, 1, Hq, DV].
    """
    filled = filled_length(key.shape[2], extent)
    if filled <= index.shape[-1] * block or filled < min_length:
        return attention(query, key, value, mask, extent, sinks, scale=scale, soft_cap=soft_cap)
    index = index[:, None] if index.ndim == 2 else index
    return attend_to(query, key, value, index, mask, sinks, scale, soft_cap, block)


def _fake_positions(
    key: Tensor, mask: Tensor | None = None, *, sinks: int, tokens: int = 0, share: float = 0.0
) -> Tensor:
    rows = 1 if mask is None or mask.ndim < 4 else mask.shape[0]
    return key.new_empty(rows, budget_tokens(key.shape[2], sinks, tokens, share), dtype=torch.int64)


def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    min_length: int = 0,
    block: int = 1,
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
