"""Recognises what stands before a linear in an FX graph: a norm, or pointwise nodes with one row statistic.

Norms: `F.layer_norm`, `F.rms_norm`, and RMSNorm written out in full.

Written out, Hugging Face models agree on x * rsqrt(mean(x ** 2) + eps) in float32 and differ in where they cast and in
gamma being a factor (Llama) or an offset from one (Gemma); all of that is read from the nodes, not from names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.epilogue import Epilogue, Output, from_nodes
from fxopt.codegen.kernels.gemm import Norm, check_statistic
from fxopt.codegen.kernels.pointwise import spelling

_CASTS = {"to", "float", "half", "bfloat16", "type_as", "contiguous"}


@dataclass(frozen=True)
class NormMatch:
    """A norm in the graph: what it is, the row it reads, its parameters, and every node it consists of."""

    norm: Norm
    x: fx.Node
    gamma: fx.Node | None
    beta: fx.Node | None
    nodes: tuple[fx.Node, ...]


def _value(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


class _Matcher:
    def __init__(self, root: fx.Node) -> None:
        self.root = root
        self.nodes: list[fx.Node] = []

    def fail(self, why: str) -> Unsupported:
        return Unsupported(f"{self.root.name} is no norm this generator knows: {why}")

    def bare(self, node: Any) -> Any:
        """What is under casts and copies, which are noted as part of the norm."""
        while isinstance(node, fx.Node) and spelling(node.target) in _CASTS and node.op != "placeholder":
            self.nodes.append(node)
            node = node.args[0]
        return node

    def name(self, node: Any) -> str | None:
        if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
            return None
        return spelling(node.target)

    def note(self, node: fx.Node) -> fx.Node:
        self.nodes.append(node)
        return node

    def reciprocal(self, node: Any) -> tuple[fx.Node, float] | None:
        """(x, eps) of rsqrt(mean(x * x, -1, keepdim) + eps), None for anything else."""
        kept = len(self.nodes)
        node = self.bare(node)
        if self.name(node) == "rsqrt":
            inside = self.bare(self.note(node).args[0])
            if self.name(inside) == "add":
                parts = self.note(inside).args
                eps = next((float(p) for p in parts if isinstance(p, (int, float))), None)
                mean = self.bare(next((p for p in parts if isinstance(p, fx.Node)), None))
                if eps is not None and self.name(mean) == "mean" and self._over_rows(mean):
                    square = self.bare(self.note(mean).args[0])
                    x = self._squared(square)
                    if x is not None:
                        return x, eps
        del self.nodes[kept:]
        return None

    def _over_rows(self, mean: fx.Node) -> bool:
        axis = mean.kwargs.get("dim", mean.args[1] if len(mean.args) > 1 else None)
        keep = mean.kwargs.get("keepdim", mean.args[2] if len(mean.args) > 2 else False)
        axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis
        value = _value(mean.args[0]) if isinstance(mean.args[0], fx.Node) else None
        return bool(keep) and value is not None and axis in (-1, value.dim() - 1)

    def _squared(self, node: Any) -> fx.Node | None:
        kind = self.name(node)
        is_power = kind == "pow" and float(node.args[1]) == 2.0
        is_product = kind == "mul" and node.args[0] is node.args[1]
        if kind == "square" or is_power or is_product:
            inner = self.bare(self.note(node).args[0])
            return inner if isinstance(inner, fx.Node) else None
        return None

    def normalised(self, node: Any) -> tuple[fx.Node, float] | None:
        """(x, eps) of x * rsqrt(...), in either order."""
        kept = len(self.nodes)
        node = self.bare(node)
        if self.name(node) == "mul":
            self.note(node)
            for this, other in (node.args, node.args[::-1]):
                found = self.reciprocal(other)
                if found is not None and self.bare(this) is found[0]:
                    return found
        del self.nodes[kept:]
        return None


def _built_in(match: _Matcher, node: fx.Node, kind: str) -> NormMatch:
    layer = kind == "layer_norm"
    names = (
        ("input", "normalized_shape", "weight", "bias", "eps")
        if layer
        else ("input", "normalized_shape", "weight", "eps")
    )
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x = given["input"]
    shape = given.get("normalized_shape")
    if not isinstance(x, fx.Node) or not isinstance(shape, (list, tuple, torch.Size)) or len(shape) != 1:
        raise match.fail("it normalises more than the last dimension")
    eps = given.get("eps")
    if eps is None:
        value = _value(x)
        if layer or value is None:
            eps = 1e-5
        else:
            eps = torch.finfo(value.dtype).eps
    gamma, beta = given.get("weight"), given.get("bias")
    norm = Norm("layer" if layer else "rms", float(eps), gamma is not None, beta is not None)
    return NormMatch(norm, x, gamma, beta, (node,))


def match_norm(node: fx.Node) -> NormMatch:
    """Reads the norm whose result is `node`, the input of a linear.

    Raises:
        Unsupported: when `node` is no RMSNorm or LayerNorm over the last dimension, with the first difference.
    """
    match = _Matcher(node)
    top = match.bare(node)
    kind = match.name(top)
    if kind in ("layer_norm", "rms_norm"):
        found = _built_in(match, top, kind)
        return NormMatch(found.norm, found.x, found.gamma, found.beta, (*match.nodes, *found.nodes))
    if kind != "mul":
        raise match.fail(f"it ends in {kind or node.op}")
    plain = match.normalised(top)
    if plain is not None:
        return NormMatch(Norm("rms", plain[1], gamma=False), plain[0], None, None, tuple(match.nodes))
    match.note(top)
    for rows, factor in (top.args, top.args[::-1]):
        found_rows = match.normalised(rows)
        if found_rows is None:
            continue
        gamma, offset = match.bare(factor), False
        if match.name(gamma) == "add":
            parts = gamma.args
            if 1.0 not in [p for p in parts if isinstance(p, (int, float))]:
                raise match.fail("gamma has an offset other than one")
            match.note(gamma)
            gamma, offset = match.bare(next(p for p in parts if isinstance(p, fx.Node))), True
        value = _value(gamma) if isinstance(gamma, fx.Node) else None
        if value is None or value.dim() != 1:
            raise match.fail("gamma is not a vector")
        x, eps = found_rows
        return NormMatch(Norm("rms", eps, unit_offset=offset), x, gamma, None, tuple(match.nodes))
    raise match.fail("no factor is x * rsqrt(mean(x ** 2) + eps)")


@dataclass(frozen=True)
class PointwiseMatch:
    """Pointwise nodes before a linear: the DAG from `x` (its p0) on, the nodes of its extras, and those it replaces."""

    prologue: Epilogue
    x: fx.Node
    extras: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    refused: str = ""
    """Why more of them could not be taken; empty where nothing was refused."""


def match_pointwise(root: fx.Node, takes: Callable[[fx.Node], bool]) -> PointwiseMatch:
    """Reads the pointwise nodes that `root` [..., K] comes from, as far as nobody outside reads between.

    Of the tensors they start from, x is the one that most of them depend on; what does not come from it is an extra.
    One reduction of x over K may be among them, with what is made of its result [..., 1].

    Args:
        takes: whether a node may become part of a kernel; its readers are looked at here.

    Raises:
        Unsupported: when `root` is no pointwise node that an epilogue could hold, or comes from no tensor of its shape.
    """
    region = {root} if takes(root) else set()
    waiting = list(region)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in region and takes(source) and all(user in region for user in source.users):
                region.add(source)
                waiting.append(source)
    like = _value(root)
    best: tuple[int, PointwiseMatch] | None = None
    reason = ""
    for leaf in dict.fromkeys(n for node in sorted(region) for n in node.all_input_nodes if n not in region):
        value = _value(leaf)
        if like is None or value is None or value.dtype != like.dtype or tuple(value.shape) != tuple(like.shape):
            continue
        own = _depending(region, leaf)
        if root not in own or (best is not None and len(own) <= best[0]):
            continue
        try:
            read, extras = from_nodes([leaf], [root], within=region)
            check_statistic(read)
        except Unsupported as problem:
            reason = problem.reason
            continue
        best = len(own), PointwiseMatch(_renamed(read), leaf, tuple(extras), tuple(sorted(own)))
    if best is None:
        raise Unsupported(reason or f"{root.name} is not made by pointwise nodes")
    return replace(best[1], refused=reason)


def _depending(region: set[fx.Node], leaf: fx.Node) -> set[fx.Node]:
    own: set[fx.Node] = set()
    for node in sorted(region):  # nodes compare by their place in the graph
        if any(source is leaf or source in own for source in node.all_input_nodes):
            own.add(node)
    return own


def _renamed(read: Epilogue) -> Epilogue:
    """Extras q0, q1, ... and steps t0, t1, ...: an epilogue in the same kernel has e0 and s0."""
    names = {extra.name: f"q{i}" for i, extra in enumerate(read.extras)}
    names |= {step.name: f"t{i}" for i, step in enumerate(read.steps)}
    steps = tuple(
        replace(s, name=names[s.name], args=tuple(names.get(a, a) if isinstance(a, str) else a for a in s.args))
        for s in read.steps
    )
    extras = tuple(replace(extra, name=names[extra.name]) for extra in read.extras)
    (output,) = read.outputs
    return Epilogue(1, (Output(names.get(output.value, output.value), output.dtype),), steps, extras)
