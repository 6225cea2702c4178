"""How sparse attention chooses: which blocks are read in any case, scores of the others, top-k; all on the device.

    block_bias(key, mask, *, sinks, newest, block) -> bias                   [B or 1, N]: +inf kept, -inf hidden, 0 free
    page_scores(query, bounds, extent, *, page, least) -> scores             [B, Hkv, P]: upper bound of q . k in a page
    feature_scores(query, features, extent, channels, scales, *, least, bits) -> scores                    [B, Hkv, S']
    choose(scores, bias, extent, *, count, block, least, counts, tau, scale) -> index, valid
                                                              [B, Hkv, count], padded with -1, and [B, Hkv]

query [B, Hq, 1, D], key [B, Hkv, S, D]; N blocks of `block` positions. ``bounds`` and ``features`` are kept by the
operators of :mod:`.sparse_state`, for P pages and S' positions, which may be more than the cache has. ``extent``:
filled positions, 0-d int64. Up to `least` filled positions attention is dense, and nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.codegen.kernels import cpu_select
from fxopt.codegen.ops import LIBRARY
from fxopt.codegen.ops.sparse_attention import visible_positions
from fxopt.codegen.ops.sparse_gather import filled_length
from fxopt.codegen.ops.sparse_state import restored


def block_bias(key: Tensor, mask: Tensor | None = None, *, sinks: int, newest: int, block: int) -> Tensor:
    """Which blocks of positions are kept whatever their score, and which hold nothing that a row can see.

    Kept are the blocks of the first `sinks` and the last `newest` positions that a row sees. One list a row and step,
    for all layers and heads that share the mask.
    """
    length = key.shape[2]
    if mask is None:
        visible = torch.ones(1, length, dtype=torch.bool, device=key.device)
    else:
        visible = visible_positions(mask)
    rank = visible.cumsum(-1)
    kept = visible & ((rank <= sinks) | (rank > rank[:, -1:] - newest))
    if block > 1:
        blocks = -(-length // block)
        pad = (0, blocks * block - length)
        visible = torch.nn.functional.pad(visible, pad).view(-1, blocks, block).any(-1)
        kept = torch.nn.functional.pad(kept, pad).view(-1, blocks, block).any(-1)
    bias = torch.zeros(visible.shape, device=key.device)
    return bias.masked_fill_(~visible, float("-inf")).masked_fill_(kept, float("inf"))


def page_scores(query: Tensor, bounds: Tensor, extent: Tensor | None = None, *, page: int, least: int = 0) -> Tensor:
    """The largest that q . k can be for a key of the page: sum over channels of max(q max, q min), Quest (eq. 1).

    One score a KV head: the maximum over the query heads that read it.
    """
    batch, kv_heads, pages, _ = bounds.shape
    end = filled_length(pages * page, extent)
    used = -(-end // page) if end > least else 0
    found = cpu_select.page_bounds(query, bounds, used) if query.device.type == "cpu" else None
    if found is not None:
        return found
    scores = torch.full((batch, kv_heads, pages), float("-inf"), dtype=torch.float32, device=query.device)
    grouped = query.reshape(batch, kv_heads, -1, query.shape[3])
    signed = torch.cat((grouped.clamp(min=0), grouped.clamp(max=0)), -1)  # [B, Hkv, G, 2D]
    # The few rows on the left: the library then reads the bounds once, in order.
    if used:
        scores[:, :, :used] = torch.matmul(signed, bounds[:, :, :used].to(signed.dtype).mT).amax(2)
    return scores


def feature_scores(
    query: Tensor,
    features: Tensor,
    extent: Tensor | None = None,
    channels: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    least: int = 0,
    bits: int = 0,
) -> Tensor:
    """q . k on the stored channels alone, the maximum over the query heads of a KV head (Double Sparsity)."""
    batch, kv_heads, _, length = features.shape
    length = length * 2 if bits == 4 else length
    end = filled_length(length, extent)
    if query.device.type == "cpu":
        found = cpu_select.feature_scores(query, features, channels, scales, end if end > least else 0, bits)
        if found is not None:
            return found
    scores = torch.full((batch, kv_heads, length), float("-inf"), dtype=torch.float32, device=query.device)
    if end <= least:
        return scores
    grouped = query.reshape(batch, kv_heads, -1, query.shape[3])
    if channels is not None:
        grouped = grouped.gather(3, channels[None, :, None].expand(*grouped.shape[:3], -1))
    for row in range(batch):
        for head in range(kv_heads):  # what one head gives stays in the cache until it is reduced
            listed = restored(features[row, head], None if scales is None else scales[row, head], end, bits)
            reached = torch.mm(grouped[row, head], listed.to(query.dtype))  # [G, end]
            scores[row, head, :end] = reached.amax(0)
    return scores


def choose(
    scores: Tensor,
    bias: Tensor,
    extent: Tensor | None = None,
    *,
    count: int,
    block: int = 1,
    least: int = 0,
    counts: Sequence[int] = (),
    tau: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The `count` blocks with the highest scores of each head, and how many each list holds.

    In no order, or ascending where generated code chooses, which a cache is read faster in.

    ``bias`` as :func:`block_bias` makes it. ``counts``: fewer than `count` for each KV head. ``tau``: of these the
    fewest whose share of the softmax of ``scale * scores`` reaches tau (top-p, Twilight, arXiv 2502.02770); what is
    read in any case counts first.
    """
    batch, kv_heads, _ = scores.shape
    blocks = bias.shape[1]
    end = filled_length(blocks * block, extent)
    if end <= least:
        nothing = scores.new_full((batch, kv_heads, count), -1, dtype=torch.int64)
        return nothing, nothing.new_zeros(batch, kv_heads)
    used = min(max(-(-end // block), count), blocks)
    if scores.device.type == "cpu" and not tau:
        found = cpu_select.best(scores, bias, used, count, counts)
        if found is not None:
            return found
    inf = float("inf")  # what is kept in any case may have the score -inf, and a score may be NaN: both come first
    ranked = (scores[..., :used] + bias[:, None, :used]).nan_to_num_(nan=inf, posinf=inf, neginf=-inf)
    ordered = bool(counts) or tau > 0
    top = torch.topk(ranked, min(count, used), dim=-1, sorted=ordered)
    keep = top.values > -inf
    if counts:
        step = torch.arange(keep.shape[-1], device=scores.device)
        keep &= step < torch.tensor(counts, device=scores.device)[None, :, None]
    if tau > 0:
        # Blocks that are read in any case come first, in whatever order: each of them stays.
        share = _shares(scores[..., :used], bias[:, None, :used], scale).gather(-1, top.indices)
        keep &= (share.cumsum(-1) - share < tau) | (top.values == inf)
    valid = keep.sum(-1)
    index = torch.where(keep, top.indices, -1)
    if not ordered and int(valid.min()) < keep.shape[-1]:
        index = index.gather(-1, keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True))
    if index.shape[-1] < count:
        index = torch.nn.functional.pad(index, (0, count - index.shape[-1]), value=-1)
    return index, valid


def _shares(scores: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax of ``scale * scores`` over what is visible."""
    return torch.softmax((scores * scale).masked_fill(bias == float("-inf"), float("-inf")), -1).nan_to_num(0.0)


def _fake_bias(key: Tensor, mask: Tensor | None = None, *, sinks: int, newest: int, block: int) -> Tensor:
    rows = 1 if mask is None or mask.ndim < 4 else mask.shape[0]
    return key.new_empty(rows, -(-key.shape[2] // block), dtype=torch.float32)


def _fake_page_scores(
    query: Tensor, bounds: Tensor, extent: Tensor | None = None, *, page: int, least: int = 0
) -> Tensor:
    torch._check(bounds.shape[3] == 2 * query.shape[3], lambda: "bounds hold a maximum and a minimum for each channel")
    return query.new_empty(bounds.shape[:3], dtype=torch.float32)


def _fake_feature_scores(
    query: Tensor,
    features: Tensor,
    extent: Tensor | None = None,
    channels: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    least: int = 0,
    bits: int = 0,
) -> Tensor:
    length = features.shape[3] * (2 if bits == 4 else 1)
    return query.new_empty((*features.shape[:2], length), dtype=torch.float32)


def _fake_choose(
    scores: Tensor,
    bias: Tensor,
    extent: Tensor | None = None,
    *,
    count: int,
    block: int = 1,
    least: int = 0,
    counts: Sequence[int] = (),
    tau: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    index = scores.new_empty((*scores.shape[:2], count), dtype=torch.int64)
    return index, scores.new_empty(scores.shape[:2], dtype=torch.int64)


for _name, _schema, _body, _fake in (
    ("block_bias", "(Tensor key, Tensor? mask=None, *, int sinks, int newest, int block) -> Tensor",
     block_bias, _fake_bias),
    ("page_scores", "(Tensor query, Tensor bounds, Tensor? extent=None, *, int page, SymInt least=0) -> Tensor",
     page_scores, _fake_page_scores),
    ("feature_scores",
     "(Tensor query, Tensor features, Tensor? extent=None, Tensor? channels=None, Tensor? scales=None, *, "
     "SymInt least=0, int bits=0) -> Tensor",
     feature_scores, _fake_feature_scores),
    ("choose",
     "(Tensor scores, Tensor bias, Tensor? extent=None, *, SymInt count, int block=1, SymInt least=0, "
     "SymInt[] counts=[], float tau=0.0, float scale=1.0) -> (Tensor, Tensor)",
     choose, _fake_choose),
):  # fmt: skip
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{_name}", _fake, lib=LIBRARY)
