"""Puts another form in the place of a recognised attention: our operator, or the library's call without a mask."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

import fxopt.codegen.ops.attention  # noqa: F401  (registers the operator)
from fxopt.codegen import lowering
from fxopt.codegen.kernels import cpu_attention
from fxopt.passes.attention import AttentionSite
from fxopt.passes.context import PassContext
from fxopt.passes.nodes import name_of, value_of
from fxopt.passes.provenance import module_path, origin_ids
from fxopt.passes.record import KernelRecord
from fxopt.passes.rewriter import Rewriter


def in_turn(sites: Iterable[AttentionSite], rewriter: Rewriter) -> Iterator[AttentionSite]:
    """Sites one after another, each reading what took the place of the results of those before it."""
    now = rewriter.current
    for site in sites:
        yield dataclasses.replace(
            site,
            query=now(site.query),
            key=now(site.key),
            value=now(site.value),
            attended=tuple(now(node) for node in site.attended),
            biases=tuple(dataclasses.replace(bias, node=now(bias.node)) for bias in site.biases),
            sinks=None if site.sinks is None else now(site.sinks),
        )


def mask_node(site: AttentionSite, rewriter: Rewriter) -> fx.Node | None:
    """All additive terms of a site as one mask, made of new nodes before its output where it takes more than one."""
    total: fx.Node | None = None
    for bias in reversed(site.biases):
        node = bias.node
        if bias.fill is not None:
            low, zero = (bias.fill, 0.0) if bias.where else (0.0, bias.fill)
            # Scores kept in float32 are filled with a number that a half cannot hold.
            dtype = site.dtype if bias.fill >= torch.finfo(site.dtype).min else torch.float32
            fill = rewriter.call(torch.full, ((), low), {"dtype": dtype, "device": site.device}, like=site.output)
            rest = rewriter.call(torch.full, ((), zero), {"dtype": dtype, "device": site.device}, like=site.output)
            node = rewriter.call(torch.where, (node, fill, rest), like=site.output)
        elif bias.multiplier != 1.0:
            node = rewriter.call(operator.mul, (node, bias.multiplier), like=site.output)
        total = node if total is None else rewriter.call(operator.add, (node, total), like=site.output)
    return total


def replace_output(site: AttentionSite, new: fx.Node, rewriter: Rewriter) -> None:
    """Let readers of a site's output read `new`, in the memory layout they were promised, and erase what is left."""
    old, made = value_of(site.output), value_of(new)
    if _strides(old) != _strides(made) and old.is_contiguous():
        new = rewriter.method("contiguous", (new,), like=site.output, before=site.output.next)
    rewriter.replace(site.output, new)
    rewriter.erase(_only_for(site))


def _strides(value: torch.Tensor) -> list[Any]:
    pairs = zip(value.stride(), value.shape, strict=True)
    return [stride for stride, size in pairs if not (isinstance(size, int) and size == 1)]


_LEADING_VIEWS = frozenset(
    "expand reshape view unsqueeze getitem contiguous transpose repeat_interleave permute".split()
)


def _only_for(site: AttentionSite) -> set[fx.Node]:
    """The interior of a site and the views that led to it; :meth:`Rewriter.erase` keeps those that others read."""
    found = set(site.interior)
    pending = [a for node in site.interior for a in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in found and name_of(node) in _LEADING_VIEWS:
            found.add(node)
            pending += node.all_input_nodes
    return found


def earliest(site: AttentionSite) -> fx.Node:
    """The first node of a site in the graph's order that reads keys or values, copies for repeated heads included."""
    own = set(site.interior)
    for read, bare in zip(site.attended, (site.key, site.value), strict=True):
        while read is not bare:
            own.add(read)
            read = read.all_input_nodes[0]
    return next(node for node in site.output.graph.nodes if node in own)


def records_gradients(site: AttentionSite) -> bool:
    """Whether the graph will be differentiated through this attention."""
    return bool(value_of(site.output).requires_grad)


def library_groups(site: AttentionSite) -> bool:
    """Whether ``scaled_dot_product_attention`` has a kernel for ``enable_gqa`` without a mask here."""
    width = value_of(site.query).shape[3]
    return site.device.type == "cpu" or (
        site.dtype in (torch.float16, torch.bfloat16) and isinstance(width, int) and width <= 256
    )


def attend(site: AttentionSite, context: PassContext, mask: fx.Node | None, extent: fx.Node | None = None) -> fx.Node:
    """Put ``fxopt.attention`` with that mask (see :func:`mask_node`) in the place of a site; returns the new node."""
    options = {
        "mask": mask,
        "extent": extent,
        "sinks": site.sinks,
        "scale": site.scale,
        "is_causal": site.is_causal,
        "soft_cap": site.soft_cap,
        "window": site.window or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    inputs = (site.query, site.key, site.value)
    new = context.rewriter.call(torch.ops.fxopt.attention.default, inputs, given, like=site.output, before=site.output)
    _record_kernel(site, new, context)
    replace_output(site, new, context.rewriter)
    return new


def _record_kernel(site: AttentionSite, new: fx.Node, context: PassContext) -> None:
    """Say which generated kernel the operator calls on a CPU; one entry for all places that share it."""
    query, key, value = (value_of(node) for node in (site.query, site.key, site.value))
    if site.device.type != "cpu" or "cpu" in lowering.KERNEL_DEVICES or not isinstance(site.tokens, int):
        return
    variant = cpu_attention.chosen(query, key, value, is_causal=site.is_causal, soft_cap=site.soft_cap)
    if variant is None:
        return
    kernel = next((k for k in context.record.kernels if k.name == variant.name), None)
    if kernel is None:
        configuration = {"tile": variant.tile, "block": variant.block, "split": cpu_attention.SPLIT}
        kernel = KernelRecord(variant.name, "cpu_attention", (), (), cpu_attention.source(variant), configuration)
        context.kernel(kernel)
    kernel.nodes = tuple(sorted({*kernel.nodes, *origin_ids(new)}))
    kernel.modules = tuple(dict.fromkeys((*kernel.modules, module_path(new))))


def library_attention(site: AttentionSite, context: PassContext, *, is_causal: bool) -> fx.Node:
    """Put a ``scaled_dot_product_attention`` without a mask in the place of a site; returns the new node."""
    grouped = site.group > 1 and library_groups(site)
    key, value = (site.key, site.value) if grouped else site.attended
    options: dict[str, object] = {"is_causal": is_causal, "scale": site.scale}
    if grouped:
        options["enable_gqa"] = True
    new = context.rewriter.call(
        F.scaled_dot_product_attention, (site.query, key, value), options, like=site.output, before=site.output
    )
    replace_output(site, new, context.rewriter)
    return new
