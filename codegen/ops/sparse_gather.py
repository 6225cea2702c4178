"""The CPU form of attention on chosen positions: gather rows into a buffer that stays in the cache, attend, go on.

A gathered copy of all that was chosen is written to memory and read again, which costs as much as what it saves. So a
few (row, KV head) pairs are worked on at a time, a stretch of positions at a time, through one buffer of
:data:`BUFFER` bytes. Whole blocks are copied as one row each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.codegen.kernels import cpu_gather
from fxopt.codegen.ops.attention import attention, pack_mask

BUFFER = 1 << 19
"""Bytes of gathered keys or values at a time: with scores and weights, half of a second-level cache of 1 MiB."""


def filled_length(length: int, extent: Tensor | None) -> int:
    """How many leading positions are in use, where the host can know without waiting; else the cache's size."""
    if extent is None or extent.device.type != "cpu":
        return length
    return max(1, min(int(extent.item()), length))


def attend_to(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor | None, mask: Tensor | None, filled: int,
    sinks: Tensor | None, scale: float, soft_cap: float, block: int = 1,
) -> Tensor:  # fmt: skip
    """Attention on the blocks ``index: [B or 1, Hkv or 1, K]`` (-1: none) of the first `filled` cache positions."""
    batch, kv_heads, group = query.shape[0], key.shape[1], query.shape[1] // key.shape[1]
    on_host = index.device.type == "cpu"
    if on_host:
        out = cpu_gather.attend(query, key, value, index, valid, mask, filled, sinks, scale, soft_cap, block)
        if out is not None:
            return out
    if valid is not None and on_host:
        index = index[..., : max(1, int(valid.max()))]
    listed, index = index >= 0, index.clamp(min=0)
    positions = index
    if block > 1:
        positions = (index[..., None] * block + torch.arange(block, device=index.device)).flatten(2)
        listed = listed.repeat_interleave(block, -1)
    listed = listed & (positions < filled)
    positions = positions.clamp(max=key.shape[2] - 1)
    chosen = visible_at(positions, listed, mask, kv_heads, group)  # [B or 1, Hkv or 1, G or 1, K]
    if chosen.dtype == torch.bool and on_host and bool(chosen.all()):
        chosen = None  # type: ignore[assignment]
    if not on_host:
        return _at_once(query, key, value, positions, chosen, sinks, scale, soft_cap)
    packed = query.reshape(batch * kv_heads, group, query.shape[3])
    if sinks is not None:
        sinks = sinks.view(kv_heads, group).expand(batch, -1, -1).reshape(batch * kv_heads, group)
    if chosen is not None:
        chosen = chosen.expand(batch, kv_heads, -1, -1).flatten(0, 1)
    keys, values = _Rows(key, index, positions, block, filled), _Rows(value, index, positions, block, filled)
    out = query.new_empty(batch * kv_heads, group, value.shape[3])
    row = max(key.shape[3], value.shape[3]) * key.element_size()
    stretch = max(block, BUFFER // row // block * block)
    counts = _counts(valid, positions.shape[-1], block, batch, kv_heads)
    pairs = max(1, BUFFER // (row * max(counts))) if keys.flat and values.flat else 1
    explicit = query.dtype in (torch.float32, torch.float64) or bool(soft_cap) or sinks is not None
    for low in range(0, batch * kv_heads, pairs):
        some = slice(low, min(low + pairs, batch * kv_heads))
        count = max(counts[some])
        hidden = None if chosen is None else chosen[some, :, :count]
        if explicit:
            own = None if sinks is None else sinks[some]
            _in_stretches(packed[some], keys, values, some, (count, stretch), hidden, own, scale, soft_cap, out[some])
        else:
            # The library's kernel sums products of halves in float32; a matmul would round each score.
            out[some] = F.scaled_dot_product_attention(
                packed[some][:, None], keys.take(some, 0, count)[:, None], values.take(some, 0, count)[:, None],
                attn_mask=None if hidden is None else hidden[:, None], scale=scale,
            )[:, 0]  # fmt: skip
    return out.view(batch, 1, kv_heads * group, value.shape[3]).transpose(1, 2)


def _counts(valid: Tensor | None, most: int, block: int, batch: int, kv_heads: int) -> list[int]:
    """Positions that each (row, KV head) pair reads at most."""
    if valid is None:
        return [most] * (batch * kv_heads)
    rows = valid.view(-1, 1) if valid.ndim == 1 else valid
    return [max(1, n) * block for n in rows.expand(batch, kv_heads).flatten().tolist()]


def visible_at(positions: Tensor, listed: Tensor, mask: Tensor | None, kv_heads: int, group: int) -> Tensor:
    """The mask of `positions` [B or 1, Hkv or 1, K]: bool, or additive, [B or 1, Hkv or 1, G or 1, K]."""
    chosen = listed[:, :, None]
    if mask is None:
        return chosen
    mask = pack_mask(mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)), kv_heads, group, 1)
    assert mask is not None
    lead = torch.broadcast_shapes(mask.shape[:3], positions[:, :, None].shape[:3])
    at = positions[:, :, None].expand(*lead, -1)
    taken = mask.expand(*lead, -1).gather(-1, at)
    return taken & chosen if taken.dtype == torch.bool else taken.masked_fill(~chosen, float("-inf"))


class _Rows:
    """Reads chosen rows of a cache tensor [B, H, S, W], whole blocks at once where they lie together."""

    def __init__(self, tensor: Tensor, index: Tensor, positions: Tensor, block: int, filled: int) -> None:
        batch, heads, length, self.width = tensor.shape
        self.flat = tensor.is_contiguous()
        # A last block that the tensor ends in would reach beyond it.
        whole = block > 1 and self.flat and length % block == 0
        self.size = block if whole else 1
        wanted = (index if whole else positions).expand(batch, heads, -1)
        if self.flat:
            rows = length // self.size
            starts = torch.arange(0, batch * heads * rows, rows).view(batch, heads, 1)
            self.table = tensor.view(-1, self.size * self.width)
            self.wanted = (starts + wanted).flatten(0, 1)
        else:
            self.tables = [tensor[b, h] for b in range(batch) for h in range(heads)]
            self.wanted = wanted.flatten(0, 1)
        self.buffer: Tensor | None = None

    def take(self, pairs: slice, first: int, last: int) -> Tensor:
        """[n, last - first, W]: what these pairs list from entry `first` to `last`, counted in positions."""
        table = self.table if self.flat else self.tables[pairs.start]
        wanted = self.wanted[pairs, first // self.size : last // self.size].reshape(-1)
        if self.buffer is None or self.buffer.shape[0] < wanted.numel():
            self.buffer = table.new_empty(wanted.numel(), table.shape[1])
        rows = torch.index_select(table, 0, wanted, out=self.buffer[: wanted.numel()])
        return rows.view(pairs.stop - pairs.start, last - first, self.width)


def _in_stretches(
    query: Tensor, keys: _Rows, values: _Rows, pairs: slice, sizes: tuple[int, int], chosen: Tensor | None,
    sinks: Tensor | None, scale: float, soft_cap: float, out: Tensor,
) -> None:  # fmt: skip
    """``out: [n, G, DV]`` of ``query: [n, G, D]``; ``chosen: [n, G or 1, K]``, ``sinks: [n, G]``.

    ``sizes``: positions in all, and at a time.
    """
    count, stretch = sizes
    scores = query.new_empty(query.shape[0], query.shape[1], count)
    for first in range(0, count, stretch):
        last = min(first + stretch, count)
        torch.bmm(query, keys.take(pairs, first, last).mT, out=scores[:, :, first:last])
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores.mul_(scale)
    if soft_cap:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    if chosen is not None and chosen.dtype == torch.bool:
        scores.masked_fill_(~chosen, float("-inf"))
    elif chosen is not None:
        scores.add_(chosen)
    weights = _softmax(scores, sinks).to(out.dtype)
    for first in range(0, count, stretch):
        last = min(first + stretch, count)
        rows = values.take(pairs, first, last)
        if first == 0:
            torch.bmm(weights[:, :, first:last], rows, out=out)
        else:
            out.baddbmm_(weights[:, :, first:last], rows)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dimension, in place; `sinks` take part in the sum; a row with nothing to see is zero."""
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks[..., None].to(scores.dtype))
    top.masked_fill_(top == float("-inf"), 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total += (sinks[..., None].to(scores.dtype) - top).exp()
    return weights.div_(total.masked_fill_(total == 0, 1.0))


def _at_once(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, chosen: Tensor, sinks: Tensor | None, scale: float,
    soft_cap: float,
) -> Tensor:  # fmt: skip
    """One gather of everything, with no value read by the host."""
    batch, kv_heads, group = query.shape[0], key.shape[1], query.shape[1] // key.shape[1]
    if chosen.shape[1] > 1 or chosen.shape[2] > 1:
        # From [B, Hkv, G, K] back to one row for each query head.
        chosen = chosen.expand(-1, kv_heads, group, -1).flatten(1, 2)[:, :, None]
    at = positions[..., None].expand(batch, kv_heads, -1, 1)
    keys, values = (t.gather(2, at.expand(-1, -1, -1, t.shape[3])) for t in (key, value))
    return attention(query, keys, values, chosen, None, sinks, scale=scale, soft_cap=soft_cap)
