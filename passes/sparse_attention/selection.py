"""What all methods that choose by a score share: the cache they can keep state beside, and the nodes after the scores.

scores = ...                                                     # of a method, [B, Hkv, N]
bias   = fxopt.block_bias(keys, mask, ...)                       # once for all layers that share the mask
index, valid = fxopt.choose(scores, bias, extent, ...)           # fixed length, on the device
out    = fxopt.gathered_attention(query, keys, values, index, valid, mask, extent, ...)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.codegen import lowering, lowering_sparse
from fxopt.codegen.kernels import Unsupported
from fxopt.passes.attention import AttentionSite
from fxopt.passes.attention_rewrite import mask_node, replace_output
from fxopt.passes.context import PassContext
from fxopt.passes.kv import cache_of, grown_from
from fxopt.passes.masks import read_extent_node
from fxopt.passes.nodes import value_of
from fxopt.passes.sparse_attention.settings import budgets, least_blocks
from fxopt.passes.sparse_attention.sizes import Size, Sizes
from fxopt.passes.state import Shape, add_state
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention


@dataclass(frozen=True)
class Plan:
    """One attention with what its selection works on. Blocks of `block` positions, at most `count` of them are read."""

    site: AttentionSite
    setting: SparseAttention
    context: PassContext
    mask: fx.Node | None
    extent: fx.Node | None
    bias: fx.Node
    block: int
    count: Size
    counts: tuple[Size, ...]
    """For each KV head, where they differ; empty where all read `count`."""
    dense_heads: tuple[int, ...]
    least: Size
    """With at most so many filled positions attention is dense and nothing is chosen."""

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call before the attention; options that are None are left out."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        return self.context.rewriter.call(target, args, given, like=self.site.output)

    def state(self, kind: Any, tensors: dict[str, tuple[Shape, torch.dtype]]) -> dict[str, fx.Node]:
        """The state `kind` beside the cache of this attention."""
        return add_state(self.context.rewriter, self.site.key, kind, tensors, like=self.site.output)

    def attend(self, scores: fx.Node, how: str) -> None:
        """Choose by `scores` and put the gathered form in the place of the attention."""
        site, setting, ops = self.site, self.setting, torch.ops.fxopt
        chosen = self.call(
            ops.choose.default, scores, self.bias,
            extent=self.extent, count=self.count, block=self.block, least=self.least,
            counts=list(self.counts) or None, tau=setting.tau, scale=site.scale if setting.tau else None,
        )  # fmt: skip
        index, valid = (self.call(operator.getitem, chosen, i) for i in range(2))
        new = self.call(
            ops.gathered_attention.default, site.query, site.key, site.value, index, valid,
            mask=self.mask, extent=self.extent, sinks=site.sinks, scale=site.scale, soft_cap=site.soft_cap,
            min_length=setting.dense_below, block=self.block, dense_heads=list(self.dense_heads) or None,
        )  # fmt: skip
        described = site.describe()
        replace_output(site, new, self.context.rewriter)
        amount = self.count * self.block if isinstance(self.count, int) else setting.budget
        heads = f" by {site.kv_heads - len(self.dense_heads)} KV heads" if self.dense_heads else ""
        cut = f", up to {setting.tau:g} of the softmax" if setting.tau else ""
        self.context.applied(new, f"{described}: reads {amount} of them{heads}, {how}{cut}")


def plan(
    site: AttentionSite, setting: SparseAttention, context: PassContext, shared: dict[Any, Any], *, block: int,
    newest: int,
) -> Plan | None:  # fmt: skip
    """Make what comes before the scores; None, with a remark, where this attention stays as it is."""
    cache = cache_of(site)
    missing = missing_kernels(site, setting, block)
    if missing is not None:
        context.missed("FX303", site.output, missing)
        return None
    if cache.kind == "sliding":
        message = (
            f"a sliding cache: every step moves all keys, so that what {setting.method} keeps would be derived anew "
            "from all of them, and its window already bounds what is read"
        )
        context.missed("FX208", site.output, message)
        return None
    static = cache.kind == "static" and cache.key.op == "placeholder" and cache.key is site.key
    if not static and grown_from(site.key) is None:
        what = "whose rows this step does not all hand on (a sliding window)" if cache.kind == "dynamic" else ""
        message = f"a {cache.kind} cache {what}".rstrip()
        message += f"; {setting.method} keeps state beside one that lives from step to step"
        context.missed("FX208", site.output, message)
        return None
    sizes = Sizes(context.rewriter, site.output)
    length = sizes.length(site)
    least = least_blocks(setting.sinks, block, newest)
    amounts = budgets(setting, site.kv_heads)
    counts = [
        None if a is None else sizes.blocks(sizes.tokens(a, length, least * block), block, least) for a in amounts
    ]
    # A head whose list covers the cache is a dense one.
    counts = [None if c is not None and _covers(sizes.times(c, block), length) else c for c in counts]
    sparse = [c for c in counts if c is not None]
    if not sparse:
        context.note(site.output, f"the budget covers all {site.length} positions of the cache: dense")
        return None
    count = sizes.most(sparse)
    differ = any(c is not sparse[0] and c != sparse[0] for c in sparse)
    mask = mask_node(site, context.rewriter)
    # Sizes rather than the mask alone: without a mask the list depends on the cache's length.
    key = ("bias", mask, str(site.length), setting.sinks, newest, block)
    if key not in shared:
        options = {"mask": mask, "sinks": setting.sinks, "newest": newest, "block": block}
        given = {name: value for name, value in options.items() if value is not None}
        bias = context.rewriter.call(torch.ops.fxopt.block_bias.default, (site.key,), given, like=site.output)
        extent = None if mask is None else read_extent_node(mask, context.rewriter, like=site.output)
        shared[key] = bias, extent
    bias, extent = shared[key]
    return Plan(
        site, setting, context, mask, extent, bias, block, count,
        counts=tuple(0 if c is None else c for c in counts) if differ else (),
        dense_heads=tuple(h for h, c in enumerate(counts) if c is None),
        least=sizes.most((sizes.times(count, block), setting.dense_below - 1)),
    )  # fmt: skip


def missing_kernels(site: AttentionSite, setting: SparseAttention, block: int) -> str | None:
    """Why nothing can choose and gather `block` positions at a time where these tensors are; None where it can.

    On the CPU the operators are PyTorch; elsewhere they are kernels, because PyTorch would wait for the device.
    """
    if site.device.type == "cpu":
        return None
    if site.device.type not in lowering.KERNEL_DEVICES:
        return f"there are no kernels for {site.device.type}; they need CUDA or ROCm"
    tensors = [value_of(node) for node in (site.query, site.key, site.value)]
    try:
        own = (0,) if setting.heads is not None else ()
        lowering_sparse.check(*tensors, soft_cap=site.soft_cap, block=block, dense_heads=own)
    except Unsupported as reason:
        return str(reason)
    return None


def _covers(tokens: Size, length: Size) -> bool:
    return isinstance(tokens, int) and isinstance(length, int) and tokens >= length


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
    named = [("budget", setting.budget)]
    named += [(f"heads[{h[0]}]", h[1]) for h in setting.heads or () if isinstance(h, tuple)]
    for name, budget in named:
        if isinstance(budget, int) and budget < least:
            raise SettingError(
                f"SparseAttention(method={setting.method!r}, {name}={budget}, sinks={setting.sinks}): sinks and newest "
                f"tokens are read in any case; allowed is {least} or more."
            )
