"""What sparse attention keeps beside a cache, and how it chooses: page bounds, features of keys, device top-k.

    update_page_bounds(bounds!, filled!, key, extent, *, page, least)        bounds [B, Hkv, P, 2 D]: maximum, minimum
    update_features(features!, filled!, key, extent, channels, *, least)     features [B, Hkv, C, S]: of the keys
    block_bias(key, mask, *, sinks, newest, block) -> bias                   [B or 1, N]: +inf kept, -inf hidden, 0 free
    page_scores(query, bounds, extent, *, least) -> scores                   [B, Hkv, P]: upper bound of q . k in a page
    feature_scores(query, features, extent, channels, *, least) -> scores    [B, Hkv, S]
    choose(scores, bias, *, count) -> index                                  [B, Hkv, count], padded with -1

query [B, Hq, 1, D], key [B, Hkv, S, D]; N blocks of `block` positions; P pages. ``extent``: filled positions, 0-d
int64. ``filled``: 0-d int64, how many positions the state covers; the updates add the newest key where that is one
short of `extent`, and derive everything from the keys wherever it is not. Up to `least` filled positions attention is
dense, and nothing is read or written here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.codegen.ops import LIBRARY
from fxopt.codegen.ops.sparse_attention import filled_length, visible_positions


def update_page_bounds(
    bounds: Tensor, filled: Tensor, key: Tensor, extent: Tensor | None = None, *, page: int, least: int = 0
) -> None:
    """Keep per page the maximum and the minimum of every channel (Quest, arXiv 2406.10774)."""
    known, end = int(filled.item()), filled_length(key.shape[2], extent)
    if end <= least:
        return
    width = key.shape[3]
    top, bottom = bounds[..., :width], bounds[..., width:]
    at = (end - 1) // page
    if known == end - 1:
        new = key[:, :, end - 1]
        if (end - 1) % page == 0:
            top[:, :, at], bottom[:, :, at] = new, new
        else:
            torch.maximum(top[:, :, at], new, out=top[:, :, at])
            torch.minimum(bottom[:, :, at], new, out=bottom[:, :, at])
    else:
        whole = end // page
        paged = key[:, :, : whole * page].unflatten(2, (whole, page))
        top[:, :, :whole], bottom[:, :, :whole] = paged.amax(3), paged.amin(3)
        if whole * page < end:
            rest = key[:, :, whole * page : end]
            top[:, :, whole], bottom[:, :, whole] = rest.amax(2), rest.amin(2)
    filled.fill_(end)


def update_features(
    features: Tensor, filled: Tensor, key: Tensor, extent: Tensor | None = None, channels: Tensor | None = None, *,
    least: int = 0,
) -> None:  # fmt: skip
    """Keep some channels of every key, or all of them, channel by channel; ``channels: [Hkv, C]``, None for all."""
    known, end = int(filled.item()), filled_length(key.shape[2], extent)
    if end <= least:
        return
    first = end - 1 if known == end - 1 else 0
    new = key[:, :, first:end]  # [B, Hkv, n, D]
    if channels is not None:
        new = new.gather(3, channels[None, :, None].expand(*new.shape[:3], -1))
    features[..., first:end] = new.transpose(2, 3)
    filled.fill_(end)


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
    scores = torch.full((batch, kv_heads, pages), float("-inf"), dtype=torch.float32, device=query.device)
    end = filled_length(pages * page, extent)
    if end <= least:
        return scores
    used = -(-end // page)
    grouped = query.reshape(batch, kv_heads, -1, query.shape[3])
    signed = torch.cat((grouped.clamp(min=0), grouped.clamp(max=0)), -1)  # [B, Hkv, G, 2D]
    reached = torch.matmul(bounds[:, :, :used], signed.transpose(2, 3))  # [B, Hkv, P, G]
    scores[:, :, :used] = reached.amax(3)
    return scores


def feature_scores(
    query: Tensor, features: Tensor, extent: Tensor | None = None, channels: Tensor | None = None, *, least: int = 0
) -> Tensor:
    """q . k on the stored channels alone, the maximum over the query heads of a KV head (Double Sparsity)."""
    batch, kv_heads, _, length = features.shape
    scores = torch.full((batch, kv_heads, length), float("-inf"), dtype=torch.float32, device=query.device)
    end = filled_length(length, extent)
    if end <= least:
        return scores
    grouped = query.reshape(batch, kv_heads, -1, query.shape[3])
    if channels is not None:
        grouped = grouped.gather(3, channels[None, :, None].expand(*grouped.shape[:3], -1))
    reached = torch.matmul(grouped, features[..., :end])  # [B, Hkv, G, S]
    scores[..., :end] = reached.amax(2)
    return scores


def choose(
    scores: Tensor, bias: Tensor, extent: Tensor | None = None, *, count: int, block: int = 1, least: int = 0
) -> Tensor:
    """The `count` blocks with the highest scores of each head, in no order; ``bias`` as :func:`block_bias` makes it."""
    blocks = scores.shape[2]
    end = filled_length(blocks * block, extent)
    if end <= least:
        return scores.new_full((*scores.shape[:2], count), -1, dtype=torch.int64)
    used = max(-(-end // block), count)
    top = torch.topk(scores[..., :used] + bias[:, None, :used], count, dim=-1, sorted=False)
    return torch.where(top.values == float("-inf"), -1, top.indices)


def _fake_update(*args: object, **kwargs: object) -> None:
    return None


def _fake_bias(key: Tensor, mask: Tensor | None = None, *, sinks: int, newest: int, block: int) -> Tensor:
    rows = 1 if mask is None or mask.ndim < 4 else mask.shape[0]
    return key.new_empty(rows, -(-key.shape[2] // block), dtype=torch.float32)


def _fake_page_scores(
    query: Tensor, bounds: Tensor, extent: Tensor | None = None, *, page: int, least: int = 0
) -> Tensor:
    torch._check(bounds.shape[3] == 2 * query.shape[3], lambda: "bounds hold a maximum and a minimum for each channel")
    return query.new_empty(bounds.shape[:3], dtype=torch.float32)


def _fake_feature_scores(
    query: Tensor, features: Tensor, extent: Tensor | None = None, channels: Tensor | None = None, *, least: int = 0
) -> Tensor:
    return query.new_empty((*features.shape[:2], features.shape[3]), dtype=torch.float32)


def _fake_choose(
    scores: Tensor, bias: Tensor, extent: Tensor | None = None, *, count: int, block: int = 1, least: int = 0
) -> Tensor:
    torch._check(scores.shape[2] == bias.shape[1], lambda: f"{scores.shape[2]} scores and {bias.shape[1]} blocks")
    return scores.new_empty((*scores.shape[:2], count), dtype=torch.int64)


for _name, _schema, _body, _fake in (
    ("update_page_bounds",
     "(Tensor(a!) bounds, Tensor(b!) filled, Tensor key, Tensor? extent=None, *, int page, int least=0) -> ()",
     update_page_bounds, _fake_update),
    ("update_features",
     "(Tensor(a!) features, Tensor(b!) filled, Tensor key, Tensor? extent=None, Tensor? channels=None, *, "
     "int least=0) -> ()",
     update_features, _fake_update),
    ("block_bias", "(Tensor key, Tensor? mask=None, *, int sinks, int newest, int block) -> Tensor",
     block_bias, _fake_bias),
    ("page_scores", "(Tensor query, Tensor bounds, Tensor? extent=None, *, int page, int least=0) -> Tensor",
     page_scores, _fake_page_scores),
    ("feature_scores",
     "(Tensor query, Tensor features, Tensor? extent=None, Tensor? channels=None, *, int least=0) -> Tensor",
     feature_scores, _fake_feature_scores),
    ("choose", "(Tensor scores, Tensor bias, Tensor? extent=None, *, SymInt count, int block=1, int least=0) -> Tensor",
     choose, _fake_choose),
):  # fmt: skip
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{_name}", _fake, lib=LIBRARY)
