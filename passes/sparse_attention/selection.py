"""What all methods that choose by a score share: the cache they can keep state beside, and the nodes after the scores.

    scores = ...                                                     # of a method, [B, Hkv, N]
    bias   = fxopt.block_bias(keys, mask, ...)                       # once for all layers that share the mask
    index  = fxopt.choose(scores, bias, extent, ...)                 # fixed length, on the device
    out    = fxopt.gathered_attention(query, keys, values, index, mask, extent, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

import fxopt.codegen.ops.sparse_select  # noqa: F401  (registers the operators)
from fxopt.codegen.ops.sparse_attention import budget_tokens
from fxopt.passes.attention import AttentionSite
from fxopt.passes.attention_rewrite import mask_node, replace_output
from fxopt.passes.context import PassContext
from fxopt.passes.kv import cache_of
from fxopt.passes.masks import read_extent_node
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention


@dataclass(frozen=True)
class Plan:
    """One attention with what its selection works on. Blocks of `block` positions, `count` of them are read."""

    site: AttentionSite
    setting: SparseAttention
    context: PassContext
    cache: fx.Node
    """The key tensor of the cache, an input of the graph."""
    mask: fx.Node | None
    extent: fx.Node | None
    bias: fx.Node
    block: int
    count: int

    @property
    def least(self) -> int:
        """With at most so many filled positions attention is dense and nothing is chosen."""
        return max(self.count * self.block, self.setting.dense_below - 1)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call before the attention; options that are None are left out."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        return self.context.rewriter.call(target, args, given, like=self.site.output)

    def attend(self, scores: fx.Node, how: str) -> None:
        """Choose by `scores` and put the gathered form in the place of the attention."""
        site, ops = self.site, torch.ops.fxopt
        index = self.call(
            ops.choose.default, scores, self.bias,
            extent=self.extent, count=self.count, block=self.block, least=self.least,
        )  # fmt: skip
        new = self.call(
            ops.gathered_attention.default, site.query, site.key, site.value, index,
            mask=self.mask, extent=self.extent, sinks=site.sinks, scale=site.scale, soft_cap=site.soft_cap,
            min_length=self.setting.dense_below, block=self.block,
        )  # fmt: skip
        described = site.describe()
        replace_output(site, new, self.context.rewriter)
        self.context.applied(new, f"{described}: reads {self.count * self.block} of them, {how}")


def plan(
    site: AttentionSite, setting: SparseAttention, context: PassContext, shared: dict[Any, Any], *, block: int,
    newest: int,
) -> Plan | None:  # fmt: skip
    """Make what comes before the scores; None, with a remark, where this attention stays as it is."""
    cache = cache_of(site)
    if site.device.type != "cpu":
        context.missed("FX303", site.output, "selection has no generated kernels for this device yet")
        return None
    if cache.kind != "static" or cache.key.op != "placeholder" or cache.key is not site.key:
        # A sliding cache moves every key in every step; what grows by cat is another tensor each time.
        context.missed("FX208", site.output, f"a {cache.kind} cache; {setting.method} keeps state beside a static one")
        return None
    length = site.length
    if not isinstance(length, int) or not isinstance(value_of_batch(site), int):
        context.missed("FX204", site.output, "the state beside the cache needs fixed sizes; these are symbolic")
        return None
    count = blocks_to_read(setting, length, block, newest)
    if count * block >= length:
        context.note(site.output, f"the budget covers all {length} positions of the cache: dense")
        return None
    mask = mask_node(site, context.rewriter)
    # Sizes rather than the mask alone: without a mask the list depends on the cache's length.
    key = ("bias", mask, str(length))
    if key not in shared:
        options = {"mask": mask, "sinks": setting.sinks, "newest": newest, "block": block}
        given = {name: value for name, value in options.items() if value is not None}
        bias = context.rewriter.call(torch.ops.fxopt.block_bias.default, (site.key,), given, like=site.output)
        extent = None if mask is None else read_extent_node(mask, context.rewriter, like=site.output)
        shared[key] = bias, extent
    bias, extent = shared[key]
    return Plan(site, setting, context, cache.key, mask, extent, bias, block, count)


def value_of_batch(site: AttentionSite) -> Any:
    """B of an attention; may be symbolic."""
    return site.query.meta["example_value"].shape[0]


def blocks_to_read(setting: SparseAttention, length: int, block: int, newest: int) -> int:
    """How many blocks the budget pays for on a cache of that length; at least those that are always read, and one."""
    given = setting.budget
    assert given is not None
    tokens = budget_tokens(length, 0, given, 0.0) if isinstance(given, int) else budget_tokens(length, 0, 0, given)
    return max(int(tokens) // block, least_blocks(setting.sinks, block, newest))


def least_blocks(sinks: int, block: int, newest: int) -> int:
    """Blocks that sinks and newest positions can touch, wherever padding ends, and one that is chosen."""
    return sum((n + block - 2) // block + 1 for n in (sinks, newest) if n) + 1


def check(setting: SparseAttention, block: int, newest: int) -> None:
    """A budget that pays for more than what is always read, and nothing that belongs to another method."""
    if setting.budget is None:
        raise SettingError(f"SparseAttention(method={setting.method!r}) needs a budget: tokens, or a share as 1/16.")
    if setting.window is not None:
        raise SettingError(
            f"SparseAttention(method={setting.method!r}, window={setting.window}): window belongs to sink_window; this "
            "method takes budget=tokens or a share."
        )
    least = least_blocks(setting.sinks, block, newest) * block
    if isinstance(setting.budget, int) and setting.budget < least:
        raise SettingError(
            f"SparseAttention(method={setting.method!r}, budget={setting.budget}, sinks={setting.sinks}): sinks and "
            f"newest tokens are read in any case; allowed is {least} or more."
        )
