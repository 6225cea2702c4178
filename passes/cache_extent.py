"""Length-aware reading: attention on a preallocated cache reads the positions that its mask leaves open, and no more.

A static cache of 4096 positions is attended to as a whole from the first token on; the mask hides what is not filled.
The mask itself says how far anybody may look, so one reduction a step bounds what every layer reads:

    extent = last unmasked position + 1                       # 0-d, on the device, once for all layers with this mask
    fxopt.attention(query, keys, values, mask=mask, extent=extent)

Exact: a key behind the extent has weight 0 in every row (a row with nothing unmasked keeps the full extent). The mask
is still applied, so rows with different padding stay right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxopt.passes.attention import AttentionSite, find_attentions
from fxopt.passes.attention_rewrite import attend, earliest, in_turn, mask_node, records_gradients
from fxopt.passes.context import PassContext
from fxopt.passes.kv import base_of, cache_of, writes_to, written_between
from fxopt.passes.masks import read_extent_node
from fxopt.passes.nodes import same, value_of
from fxopt.passes.technique import Technique


@dataclass(frozen=True)
class CacheExtent(Technique):
    """Reads the filled part of a cache (exact, on by default; switch off with ``disable=("cache_extent",)``)."""

    name: ClassVar[str] = "cache_extent"
    exact: ClassVar[bool] = True
    on_by_default: ClassVar[bool] = True
    enters_branches: ClassVar[bool] = True

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Give every attention on a preallocated cache its read extent."""
        extents: dict[fx.Node, fx.Node] = {}
        for site in in_turn(find_attentions(graph)[0], context.rewriter):
            if context.covers(site.output):
                self._bound(site, extents, context)

    def _bound(self, site: AttentionSite, extents: dict[fx.Node, fx.Node], context: PassContext) -> None:
        cache = cache_of(site)
        if not cache.preallocated:
            context.note(site.output, f"{cache.kind} cache: every position is filled")
            return
        if not site.biases:
            context.note(site.output, f"{site.describe()}: no mask, every position is read")
            return
        if records_gradients(site):
            context.blocked("FX205", site.output, "gradients are recorded; the bounded form has none")
            return
        if site.repeated:
            context.missed("FX101", site.output, "KV heads are repeated in memory first; gqa_packing did not act here")
            return
        if site.device.type != "cpu" and "async_softmax" not in context.in_use:
            context.missed("FX303", site.output, "only a generated kernel can stop at a length that the device holds")
            return
        write = written_between((site.query, site.key, site.value), earliest(site), site.output)
        if write is not None:
            context.blocked("FX206", site.output, f"{write.name} writes the cache while it is being attended to")
            return
        if not all(same(value_of(bias.node).shape[-1], site.length) for bias in site.biases):
            context.missed("FX203", site.output, "the mask has another length than the keys")
            return
        if writes_to(*(base_of(bias.node) for bias in site.biases)):
            context.blocked("FX206", site.output, "the mask is written in place")
            return
        mask = mask_node(site, context.rewriter)
        assert mask is not None
        shared = mask in extents
        if not shared:
            extents[mask] = read_extent_node(mask, context.rewriter, like=site.output)
        attend(site, context, mask, extents[mask])
        whose = "extent of an earlier layer" if shared else f"extent of mask {mask.name}"
        context.applied(site.output, f"{site.describe()}: reads the filled part of the {cache.kind} cache, {whose}")
