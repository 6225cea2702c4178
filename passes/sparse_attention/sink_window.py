"""``method="sink_window"``: the first tokens and the newest ones, the same for every head and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import fxopt.codegen.ops.sparse_attention  # noqa: F401  (registers the operators)
from fxopt.passes.attention import AttentionSite
from fxopt.passes.attention_rewrite import mask_node, replace_output
from fxopt.passes.context import PassContext
from fxopt.passes.masks import read_extent_node
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

MIN_LENGTH = 0
"""Choosing costs one pass over the mask for all layers; a cache that the window covers is read in full anyway."""


def check(setting: SparseAttention) -> None:
    """Exactly one of window and budget, and something besides the sinks."""
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


def counts(setting: SparseAttention) -> dict[str, Any]:
    """The setting as ``fxopt.window_positions`` takes it."""
    if setting.window is not None:
        return {"sinks": setting.sinks, "tokens": setting.sinks + setting.window}
    amount = {"tokens": setting.budget} if isinstance(setting.budget, int) else {"share": setting.budget}
    return {"sinks": setting.sinks, **amount}


def rewrite(site: AttentionSite, setting: SparseAttention, context: PassContext, shared: dict[Any, Any]) -> None:
    """Put the gathered form in the place of one attention."""
    if site.device.type != "cpu" and setting.dense_below:
        context.missed("FX303", site.output, "min_length: no kernel here switches to dense on the device; set it to 0")
        return
    call, like = context.rewriter.call, site.output
    mask = mask_node(site, context.rewriter)
    # Sizes rather than the mask alone: without a mask the list depends on the cache's length.
    key = ("positions", mask, str(site.length))
    if key not in shared:
        given = {} if mask is None else {"mask": mask}
        index = call(torch.ops.fxopt.window_positions.default, (site.key,), {**given, **counts(setting)}, like=like)
        extent = None if mask is None else read_extent_node(mask, context.rewriter, like=like)
        shared[key] = index, extent
    index, extent = shared[key]
    options = {
        "mask": mask, "extent": extent, "sinks": site.sinks, "scale": site.scale, "soft_cap": site.soft_cap,
        "min_length": setting.dense_below,
    }  # fmt: skip
    new = call(
        torch.ops.fxopt.gathered_attention.default, (site.query, site.key, site.value, index),
        {name: value for name, value in options.items() if value is not None}, like=like,
    )  # fmt: skip
    described = site.describe()
    replace_output(site, new, context.rewriter)
    amount = index.meta["example_value"].shape[-1]
    context.applied(new, f"{described}: reads {amount} of them, {setting.sinks} sinks and the newest")

