"""Masks that the graph builds and that turn out to be causal, or to hide nothing, become structure.

Without a cache Hugging Face materialises a [B, 1, T, T] mask in the graph (``arange``, ``le``, ``and_``, ``expand``),
which costs memory and rules the library's flash attention out:

    arange -> ... -> and_ -> expand -> scaled_dot_product_attention(q, k, v, attn_mask=mask)
becomes
    scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

A causal mask with a window, and a causal one of an attention with a soft-cap or sinks, have no name in the library:
there ``fxopt.attention(q, k, v, is_causal=True, window=w)`` takes its place, which meets the keys block by block.

Only a mask whose value follows from constants alone is touched; what an input decides stays a mask.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxopt.passes.attention import AttentionSite, find_attentions
from fxopt.passes.attention_rewrite import attend, earliest, in_turn, library_attention, records_gradients
from fxopt.passes.context import PassContext
from fxopt.passes.kv import written_between
from fxopt.passes.masks import MaskFacts, ancestors, facts_of
from fxopt.passes.technique import Technique


@dataclass(frozen=True)
class MaskStructure(Technique):
    """Replaces proven masks (exact, on by default; switch off with ``disable=("mask_structure",)``)."""

    name: ClassVar[str] = "mask_structure"
    exact: ClassVar[bool] = True
    on_by_default: ClassVar[bool] = True
    enters_branches: ClassVar[bool] = True

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Say of every mask what it hides, and drop those that the library knows by name."""
        known: dict[tuple[fx.Node, bool], MaskFacts] = {}
        made: dict[fx.Node, None] = {}
        for site in in_turn(find_attentions(graph)[0], context.rewriter):
            if site.form == "fxopt" or not site.biases or not context.covers(site.output):
                continue
            if len(site.biases) != 1 or site.biases[0].multiplier != 1.0:
                context.missed("FX203", site.output, f"{len(site.biases)} additive terms; their sum is kept as it is")
                continue
            bias = site.biases[0]
            # Scores that are filled with the lowest number where the mask is True, or where it is False.
            hides = bias.fill is not None and bias.where
            if (bias.node, hides) not in known:
                known[bias.node, hides] = facts_of(bias.node, hides=hides)
                made.update(dict.fromkeys(ancestors(bias.node)))
            self._replace(site, bias.node, known[bias.node, hides], context)
        context.rewriter.erase(node for node in graph.nodes if node in made)

    def _replace(self, site: AttentionSite, mask: fx.Node, facts: MaskFacts, context: PassContext) -> None:
        square = facts.kind in ("causal", "window") and facts.offset == 0 and site.tokens == site.length
        if facts.kind != "full" and not square:
            context.missed("FX203", site.output, f"mask {mask.name}: {facts}; kept as a mask")
            return
        own = site.soft_cap or site.sinks is not None or facts.kind == "window"
        if own and facts.kind == "full":
            what = "a soft-cap" if site.soft_cap else "sinks"
            context.missed("FX101", site.output, f"mask {mask.name}: {facts}; the library has no form with {what}")
            return
        if (own or site.form == "eager") and records_gradients(site):
            context.blocked("FX205", site.output, f"mask {mask.name}: {facts}; gradients are recorded, kept as a mask")
            return
        if written_between((site.query, *site.attended), earliest(site), site.output) is not None:
            context.blocked("FX206", site.output, "the cache is written while it is being attended to")
            return
        if own:
            attend(dataclasses.replace(site, biases=(), is_causal=True, window=facts.window), context, None)
            context.applied(site.output, f"mask {mask.name}: {facts}; only the keys it shows are read, block by block")
            return
        library_attention(site, context, is_causal=square)
        context.applied(site.output, f"mask {mask.name}: {facts}; handed to the library by name")
