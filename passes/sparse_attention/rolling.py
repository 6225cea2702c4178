"""``method="sink_window", rolling=True``: the cache holds the sinks and the window, and no more (StreamingLLM).

A static cache of C = sinks + window rows becomes a ring behind its sinks, so that a conversation of any length runs in
fixed memory. Positions count inside the cache (Xiao et al., arXiv 2309.17453, section 3.2): once it is full a new token
is always its last, and no distance is longer than the cache. For two tokens of the window that changes nothing, their
distance is what it was. What changes is how far the sinks are away, so only their scores do.

    index = positions + cumulative_length;  keys.index_copy_(2, index, k)
    attention(query, keys, values, mask)
becomes
    index = where(index < C, index, sinks + (index - sinks) % window);  keys.index_copy_(2, index, k)
    near  = the query, rotated for position min(position, C - 1)
    bias  = scale * (near - query) @ keys[:sinks]^T, and 0 for the window
    attention(query, keys, values, mask + bias)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxopt.passes.attention import AttentionSite
from fxopt.passes.attention_rewrite import attend
from fxopt.passes.confidence import inline
from fxopt.passes.context import PassContext
from fxopt.passes.kv import CacheFacts, cache_of
from fxopt.passes.masks import read_extent_node
from fxopt.passes.nodes import argument, name_of, value_of
from fxopt.passes.rewriter import Rewriter
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

MOVES_ROWS = ("layer_skip", "early_exit", "mixture_of_depths")
"""Techniques that write a cache at positions of their own."""
PADDED = "SparseAttention(rolling=True): rows with padding have sinks of their own, which a ring cannot keep"

_OPAQUE = frozenset("linear addmm embedding scaled_dot_product_attention attention softmax".split())
"""What makes a new tensor of the layer's input: a position does not reach through it to a rotation."""


def check(setting: SparseAttention) -> None:
    """``rolling=True`` goes with sinks and window, for all layers and heads; raises SettingError."""
    if setting.window is None:
        raise SettingError(
            "SparseAttention(rolling=True) takes window=tokens: a cache of sinks + window rows is what rolls."
        )
    for name in ("layers", "heads", "min_length"):
        if getattr(setting, name) is not None:
            raise SettingError(
                f"SparseAttention(rolling=True, {name}={getattr(setting, name)!r}): tokens that left the cache are "
                f"gone for every layer and head; leave {name} out."
            )


def rewrite(site: AttentionSite, setting: SparseAttention, context: PassContext, shared: dict[Any, Any]) -> None:
    """Let one attention and the cache it reads roll."""
    other = next((name for name in MOVES_ROWS if name in context.in_use), None)
    if other is not None:
        raise SettingError(
            f"{setting} together with {other!r}, which writes caches in its own way. Remove one of the two."
        )
    cache, capacity = cache_of(site), setting.sinks + setting.window  # type: ignore[operator]
    refusal = _refusal(site, cache, capacity)
    writes = [(node, argument(node, 2, "index")) for node in cache.writes]
    if refusal is None and not (writes and all(name_of(n) == "index_copy_" and _is_position(i) for n, i in writes)):
        refusal = "the cache is not written by index_copy_ at a position"
    turned = None if refusal else _near(site.query, capacity, context.rewriter, shared)
    if refusal is None and turned is None:
        refusal = "the query is not rotated by its position: there is nothing to count inside the cache"
    if refusal is not None or turned is None:
        context.blocked("FX208", site.output, f"{site.describe()}: rolling: {refusal}")
        return
    rewriter, like, mask = context.rewriter, site.output, site.mask
    assert mask is not None
    for write, index in writes:
        if ("ring", index) not in shared:
            (shared["ring", index],) = inline(
                lambda i: (ring(i, setting.sinks, capacity),), (index,), rewriter, before=write, like=write
            )
        write.replace_input_with(index, shared["ring", index])
    if ("rows", mask) not in shared:
        checked = inline(lambda m, i: unpadded(m, i, capacity), (mask, writes[0][1]), rewriter, before=like, like=like)
        shared["rows", mask] = checked, read_extent_node(mask, rewriter, like=like)
    checked, extent = shared["rows", mask]
    bias = inline(
        lambda q, near, k, m: sink_bias(q, near, k, m, setting.sinks, site.scale, site.kv_heads, capacity),
        (site.query, turned, site.key, checked), rewriter, before=like, like=like,
    )  # fmt: skip
    described = site.describe()
    new = attend(site, context, bias, extent)
    context.applied(new, f"{described}: the cache rolls behind {setting.sinks} sinks, positions counted inside it")


def ring(index: Tensor, sinks: int, capacity: int) -> Tensor:
    """The row that a token is written to: its own position, and behind the sinks in turn once the cache is full."""
    return torch.where(index < capacity, index, (index - sinks) % (capacity - sinks) + sinks)


def unpadded(mask: Tensor, index: Tensor, capacity: int) -> Tensor:
    """`mask`, bool [B, 1, 1, C], after a check on the device that it shows every row that is in use; no wait."""
    torch._assert_async((mask.sum(-1) == (index + 1).clamp(max=capacity)).all(), PADDED)
    return mask


def sink_bias(
    query: Tensor, near: Tensor, keys: Tensor, mask: Tensor, sinks: int, scale: float, kv_heads: int, capacity: int
) -> Tensor:
    """What the nearer place of the sinks adds to their scores, and -inf where a bool mask hides: [B, Hq, 1, C] float32.

    ``query``, ``near``: [B, Hq, 1, D]; ``keys``: [B, Hkv, C, D]; ``mask``: [B, 1, 1, C].
    """
    moved = (near.float() - query.float()).unflatten(1, (kv_heads, -1)).squeeze(3)  # [B, Hkv, G, D]
    scores = moved @ keys.narrow(2, 0, sinks).float().transpose(2, 3) * scale  # [B, Hkv, G, sinks]
    bias = F.pad(scores.flatten(1, 2).unsqueeze(2), (0, capacity - sinks))
    return bias.masked_fill(~mask, -torch.inf)


def _near(query: fx.Node, capacity: int, rewriter: Rewriter, shared: dict[Any, Any]) -> fx.Node | None:
    """The query as it would be at most at position ``C - 1``: a copy of its rotation; None where there is none.

    What is copied leads from positions, which are whole numbers, to the query; layers share what they have in common.
    """
    rotated: dict[fx.Node, bool] = shared.setdefault("rotated", {})
    copies: dict[fx.Node, fx.Node] = shared.setdefault("copies", {})

    def reached(node: fx.Node) -> bool:
        """Whether a position reaches `node` by a way that is not through the layers before."""
        if node not in rotated:
            value = value_of(node)
            whole = isinstance(value, Tensor) and not value.dtype.is_floating_point and value.dtype != torch.bool
            rotated[node] = whole or (name_of(node) not in _OPAQUE and any(map(reached, node.all_input_nodes)))
        return rotated[node]

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            value = value_of(node)
            if isinstance(value, Tensor) and not value.dtype.is_floating_point:
                copies[node] = rewriter.method("clamp", (node,), {"max": capacity - 1}, like=node, after=_ready(node))
            else:
                mapping = {n: copied(n) for n in node.all_input_nodes if reached(n)}
                copies[node] = rewriter.copy(node, mapping, before=node.next)
        return copies[node]

    return copied(query) if reached(query) and not value_of(query).dtype.is_complex else None


def _ready(node: fx.Node) -> fx.Node:
    """The node after which a reader of `node` may stand: behind all placeholders."""
    if node.op != "placeholder":
        return node
    return [n for n in node.graph.nodes if n.op == "placeholder"][-1]


def _refusal(site: AttentionSite, cache: CacheFacts, capacity: int) -> str | None:
    if site.soft_cap:
        return "scores are capped before anything could be added to those of the sinks"
    if cache.kind == "sliding":
        return "a sliding layer's cache moves by itself and has no sinks"
    if cache.kind != "static" or cache.key.op != "placeholder" or cache.key is not site.key:
        return f"a {cache.kind} cache; StaticCache(max_cache_len={capacity}) is of fixed size"
    if site.length != capacity:
        return f"sinks and window are {capacity} rows and the cache has {site.length}; make it of that size"
    mask = None if site.mask is None else value_of(site.mask)
    if mask is None or mask.dtype != torch.bool or tuple(mask.shape[1:]) != (1, 1, capacity):
        return "the mask is not one bool row of the cache's length"
    return None


def _is_position(index: Any) -> bool:
    value = value_of(index)
    return isinstance(index, fx.Node) and not value.dtype.is_floating_point and tuple(value.shape) == (1,)
