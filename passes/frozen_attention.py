"""Attention of rows that have exited, while other rows of the batch go on: length 0, nothing of their caches is read.

Before and after, in a layer behind an exit that each row takes by itself::

    fxopt.attention(query, keys, values, mask=mask, extent=extent)           # 0-d: as far as anybody looks
    fxopt.attention(query, keys, values, mask=mask, extent=where(exited, 0, extent))    # [B]

What such a row gets is not its state: :func:`fxopt.passes.exit_insert` lets it keep the one that it left with.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

import fxopt.codegen.lowering
import fxopt.codegen.ops.attention  # noqa: F401  (both register operators)
from fxopt.passes.attention import AttentionSite, find_attentions
from fxopt.passes.attention_rewrite import attend, earliest, in_turn, mask_node, records_gradients
from fxopt.passes.context import PassContext
from fxopt.passes.kv import written_between
from fxopt.passes.layers import Layer
from fxopt.passes.nodes import value_of

BOUNDED = (torch.ops.fxopt.attention.default, torch.ops.fxopt.decode_attention.default)
"""Operators with an extent."""


def attend_for_rows_left(layers: Collection[Layer], exited: fx.Node, context: PassContext) -> None:
    """Let the attentions of `layers`, self and cross, read nothing for the rows of ``exited: [B]`` (bool)."""
    graph, rewriter = context.graph, context.rewriter
    order = {node: i for i, node in enumerate(graph.nodes)}
    inside = {node for layer in layers for node in layer.nodes if node in order}
    sites = [s for s in find_attentions(graph)[0] if s.output in inside and s.form != "fxopt"]
    for site in in_turn(sites, rewriter):
        reason = _reason_to_leave(site)
        if reason is not None:
            context.note(site.output, f"computed for rows that have exited too: {reason}")
            continue
        inside.add(attend(site, context, mask_node(site, rewriter)))
    lengths: dict[Any, fx.Node] = {}
    for node in [n for n in graph.nodes if n in inside and n.target in BOUNDED]:
        extent = node.kwargs.get("extent")
        length = extent if extent is not None else value_of(node.args[1]).shape[2]
        key = length if isinstance(length, (int, fx.Node)) else str(length)
        if key not in lengths:
            if not isinstance(length, (int, fx.Node)):
                length = rewriter.call(torch.ops.aten.sym_size.int, (node.args[1], 2), like=node)
            if extent is None:
                options = {"dtype": torch.int64, "device": value_of(exited).device}
                length = rewriter.call(torch.full, ((), length), options, like=node)
            lengths[key] = rewriter.call(torch.where, (exited, 0, length), like=node)
        rewriter.set_keyword(node, "extent", lengths[key])


def _reason_to_leave(site: AttentionSite) -> str | None:
    """Why the library's attention stays, which has one length for all rows; None where our operator can replace it."""
    if site.device.type != "cpu":
        return "only a generated kernel can stop at a length that the device holds"
    if records_gradients(site):
        return "gradients are recorded"
    write = written_between((site.query, site.key, site.value), earliest(site), site.output)
    return None if write is None else f"{write.name} writes the cache while it is being attended to"
