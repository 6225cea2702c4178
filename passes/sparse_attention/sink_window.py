"""``method="sink_window"``: the first tokens and the newest ones, the same for every head and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import fxopt.codegen.ops.sparse_attention  # noqa: F401  (registers the operators)
from fxopt.passes.attention import AttentionSite
from fxopt.passes.attention_rewrite import mask_node, replace_output
from fxopt.passes.context import PassContext
from fxopt.passes.masks import read_extent_node
from fxopt.passes.sparse_attention import rolling
from fxopt.passes.sparse_attention.selection import missing_kernels
from fxopt.passes.sparse_attention.settings import budgets
from fxopt.passes.sparse_attention.sizes import Sizes
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

MIN_LENGTH = 0
"""Choosing costs one pass over the mask for all layers; a cache that the window covers is read in full anyway."""


def check(setting: SparseAttention) -> None:
    """Exactly one of window and budget, and something besides the sinks."""
    if setting.rolling:
        rolling.check(setting)
    if (setting.window is None) == (setting.budget is None):
        given = "both" if setting.window is not None else "neither"
        raise SettingError(
            f"SparseAttention(method='sink_window') takes window=tokens or budget=tokens or a share, and was given "
            f"{given}. Write window=256."
        )
    if isinstance(setting.budget, int) and setting.budget <= setting.sinks:
        raise SettingError(
            f"SparseAttention(budget={setting.budget}, sinks={setting.sinks}): the budget includes the sinks; allowed "
            f"is {setting.sinks + 1} or more."
        )


def state_elements(setting: SparseAttention, width: int) -> float:
    """Elements of the cache's dtype that a step reads a position and KV head to choose."""
    return 0.0


def rewrite(site: AttentionSite, setting: SparseAttention, context: PassContext, shared: dict[Any, Any]) -> None:
    """Put the gathered form, or a rolling cache, in the place of one attention."""
    if setting.rolling:
        rolling.rewrite(site, setting, context, shared)
        return
    missing = missing_kernels(site, setting, block=1)
    if missing is not None:
        context.missed("FX303", site.output, missing)
        return
    call, like = context.rewriter.call, site.output
    sizes = Sizes(context.rewriter, like)
    amounts = budgets(setting, site.kv_heads)
    if all(amount is None for amount in amounts):
        context.note(site.output, f"the budget covers all {site.length} positions of the cache: dense")
        return
    mask = mask_node(site, context.rewriter)
    # Sizes rather than the mask alone: without a mask the list depends on the cache's length.
    key = ("positions", mask, str(site.length), site.kv_heads)
    if key not in shared:
        length = sizes.length(site) if any(isinstance(a, float) for a in amounts) else 0
        least = setting.sinks + 1
        tokens = [least if a is None else sizes.tokens(a, length, least) for a in amounts]
        given: dict[str, Any] = {"sinks": setting.sinks} | ({} if mask is None else {"mask": mask})
        if len(set(amounts) - {None}) > 1:
            # A dense head's list is not read.
            given["counts"] = tokens
        else:
            given["tokens"] = next(t for t, a in zip(tokens, amounts, strict=True) if a is not None)
        index = call(torch.ops.fxopt.window_positions.default, (site.key,), given, like=like)
        extent = None if mask is None else read_extent_node(mask, context.rewriter, like=like)
        shared[key] = index, extent
    index, extent = shared[key]
    dense = [head for head, amount in enumerate(amounts) if amount is None]
    options = {
        "mask": mask, "extent": extent, "sinks": site.sinks, "scale": site.scale, "soft_cap": site.soft_cap,
        "min_length": setting.dense_below, "dense_heads": dense or None,
    }  # fmt: skip
    new = call(
        torch.ops.fxopt.gathered_attention.default, (site.query, site.key, site.value, index),
        {name: value for name, value in options.items() if value is not None}, like=like,
    )  # fmt: skip
    described = site.describe()
    replace_output(site, new, context.rewriter)
    amount = index.meta["example_value"].shape[-1]
    heads = f" by {site.kv_heads - len(dense)} KV heads" if dense else ""
    context.applied(new, f"{described}: reads {amount} of them{heads}, {setting.sinks} sinks and the newest")
