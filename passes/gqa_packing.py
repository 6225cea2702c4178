"""Grouped-query packing: the query heads of one KV head attend together, and the cache is read where it lies.

Hugging Face repeats every KV head for its group before attending. Under ``torch.compile`` that copies the cache in
every layer of every step:

    keys [B, Hkv, S, D] -> getitem(:, :, None) -> expand -> reshape [B, Hq, S, D] \\
    values ...                                                                     > scaled_dot_product_attention
    query [B, Hq, T, D] ---------------------------------------------------------/
becomes
    fxopt.attention(query, keys, values, mask=...)         # its body views query as [B, Hkv, G * T, D]

Exact: each query row meets the same keys. Prompts that the library's flash attention takes without a mask stay there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxopt.passes.attention import AttentionSite, find_attentions
from fxopt.passes.attention_rewrite import (
    attend,
    earliest,
    in_turn,
    library_attention,
    library_groups,
    mask_node,
    records_gradients,
)
from fxopt.passes.context import PassContext
from fxopt.passes.kv import written_between
from fxopt.passes.technique import Technique

DECODE_TOKENS = 16
"""Most new tokens of a step that is limited by reading the cache, not by arithmetic."""


@dataclass(frozen=True)
class GqaPacking(Technique):
    """Reads an unrepeated KV cache (exact, on by default; switch off with ``disable=("gqa_packing",)``)."""

    name: ClassVar[str] = "gqa_packing"
    exact: ClassVar[bool] = True
    on_by_default: ClassVar[bool] = True
    enters_branches: ClassVar[bool] = True

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Replace every attention that repeats, or would repeat, its KV heads."""
        sites, near = find_attentions(graph)
        for difference in near:
            if context.covers(difference.node):
                context.missed(difference.code, difference.node, difference.message)
        for site in in_turn(sites, context.rewriter):
            if site.form != "fxopt" and context.covers(site.output):
                self._pack(site, context)

    def _pack(self, site: AttentionSite, context: PassContext) -> None:
        if site.group == 1:
            context.note(site.output, f"{site.describe()}: nothing to pack")
            return
        if records_gradients(site):
            context.blocked("FX205", site.output, "gradients are recorded; the packed form has none")
            return
        write = written_between((site.query, site.key, site.value), earliest(site), site.output)
        if write is not None:
            context.blocked("FX206", site.output, f"{write.name} writes the cache while it is being attended to")
            return
        one_token = site.tokens == 1 if isinstance(site.tokens, int) else False
        if site.form == "sdpa" and not site.biases and (site.is_causal or not one_token):
            self._leave_to_library(site, context)
            return
        if site.device.type != "cpu" and not (isinstance(site.tokens, int) and site.tokens <= DECODE_TOKENS):
            context.missed("FX301", site.output, f"{site.describe()}: bound by arithmetic, the library keeps it")
            return
        attend(site, context, mask_node(site, context.rewriter))
        how = "not repeated" if site.repeated else "in one pass per KV head"
        context.applied(site.output, f"{site.describe()}: keys and values read in place, {how}")

    def _leave_to_library(self, site: AttentionSite, context: PassContext) -> None:
        if not site.repeated:
            context.note(site.output, f"{site.describe()}: the library attends without repeating heads")
        elif library_groups(site):
            library_attention(site, context, is_causal=site.is_causal)
            context.applied(site.output, f"{site.describe()}: repetition left to the library's enable_gqa")
        else:
            context.missed("FX201", site.output, f"the library groups heads in half precision only, not {site.dtype}")
