"""``select=function``: tokens by a score of one's own, ``(q, keys, state) -> scores or indices``, traced into a graph.

``q: [B, Hkv, G, D]`` (the query heads of each KV head), ``keys: [B, Hkv, S, D]``, ``state: [B, Hkv, D, S]``: the keys
once more, channel by channel, so that a function that needs few channels reads few bytes. The state is kept beside the
cache, for functions that use it. The result is scores ``[B, Hkv, S]``, or indices ``[B, Hkv, n]`` (int64) in no order.
Sinks, newest tokens, padding and the budget are seen to here, as for the other methods; a token that is not among the
indices, or has the score -inf, is read only for being one of those.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.passes.attention import AttentionSite
from fxopt.passes.confidence import inline, traced
from fxopt.passes.context import PassContext
from fxopt.passes.nodes import same, value_of
from fxopt.passes.sparse_attention import selection
from fxopt.passes.sparse_attention.sizes import Sizes
from fxopt.passes.technique import PassError, SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

NEWEST = 8
MIN_LENGTH = 2048


def check(setting: SparseAttention) -> None:
    """A function of three arguments, and a budget."""
    try:
        inspect.signature(setting.select).bind(None, None, None)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"SparseAttention(select={setting.select!r}): a function (q, keys, state) -> scores [B, Hkv, S] or indices."
        ) from error
    selection.check(setting, 1, NEWEST)


def rewrite(site: AttentionSite, setting: SparseAttention, context: PassContext, shared: dict[Any, Any]) -> None:
    """Put selection by the function in the place of one attention."""
    made = selection.plan(site, setting, context, shared, block=1, newest=NEWEST)
    if made is None:
        return
    batch, heads, length, _ = value_of(site.key).shape
    query = context.rewriter.method("unflatten", (site.query, 1, (heads, site.group)), like=site.output)
    query = context.rewriter.method("squeeze", (query, 3), like=site.output)
    keys_used = list(traced(setting.select, (query, site.key, site.key)).find_nodes(op="placeholder")[2].users)
    rows: fx.Node = site.key
    if keys_used:
        dtype = value_of(site.key).dtype
        state = made.state("keys by channel", {"features": (lambda b, h, s, d: (b, h, d, s), dtype)})
        rows = state["features"]
        made.call(
            torch.ops.fxopt.update_features.default, rows, state["filled"], site.key,
            extent=made.extent, least=made.least,
        )  # fmt: skip
        if not isinstance(length, int):  # the state of a growing cache has room for more
            rows = context.rewriter.method("narrow", (rows, 3, 0, Sizes(context.rewriter, site.output).length(site)),
                                           like=site.output)  # fmt: skip
    scores = inline(setting.select, (query, site.key, rows), context.rewriter, before=site.output, like=site.output)
    value = value_of(scores)
    if not isinstance(value, torch.Tensor) or value.ndim != 3 or value.shape[1] != heads:
        raise PassError(f"select= gives {value!r}; allowed are scores [{batch}, {heads}, {length}] or indices")
    if not value.dtype.is_floating_point:
        first = context.rewriter.method("select", (site.key, 3, 0), like=site.output)  # [B, Hkv, S]
        low = context.rewriter.call(torch.full_like, (first, -math.inf), like=site.output)
        scores = context.rewriter.method("scatter", (low, 2, scores, 1.0), like=site.output)
    elif not same(value.shape[2], length):
        raise PassError(f"select= gives {value.shape[2]} scores for {length} positions")
    scores = context.rewriter.method("float", (scores,), like=site.output)
    name = getattr(setting.select, "__name__", "select")
    made.attend(scores, f"by {name}, {setting.sinks} sinks and the {NEWEST} newest")
