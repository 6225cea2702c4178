"""Finds linears with few rows, groups those that share an input, and attaches the norm before and what follows.

Nothing is changed here: :func:`plan_groups` reads a graph and says what one kernel could compute together.

    n = norm(h); q = linear(n, Wq); k = linear(n, Wk); v = linear(n, Wv)      one group, three outputs
    n = norm(h); g = linear(n, Wg); u = linear(n, Wu); a = silu(g) * u        one group, one output
    y = linear(a, Wd, b); h2 = h + y                                          one group: bias and residual inside

What may stand before the products is in :mod:`linear_before`, what follows them in :mod:`linear_parts`.
The end of a group is the last node that everything between it and the products leads to and nothing else reads from
in between: an intermediate that somebody else reads stays outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.epilogue import FLOATS, dtype_name, from_nodes
from fxopt.codegen.kernels.gemm import MAX_ROWS, FusedLinear
from fxopt.passes.adapters import find_adapters
from fxopt.passes.context import PassContext
from fxopt.passes.kv import written_between
from fxopt.passes.linear_before import Before
from fxopt.passes.linear_parts import Part, PartFinder
from fxopt.passes.nodes import name_of, value_of
from fxopt.passes.provenance import module_path

MAX_WEIGHTS = 8
"""Weights of one group; more are split, so that a kernel's list of pointers stays short."""


@dataclass(frozen=True)
class Group:
    """Linears that one kernel computes, and what goes with them.

    ``extras`` are the nodes of ``fused.extras`` in order; ``outputs`` those of ``fused.epilogue.outputs``; ``nodes``
    all that the group replaces, in the graph's order; ``rows`` is M.
    """

    fused: FusedLinear
    linears: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    x: fx.Node
    extras: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    rows: Any

    @property
    def steps(self) -> tuple[str, ...]:
        """The operations after the products, bias included."""
        return tuple(step.op for step in self.fused.epilogue.steps)

    def describe(self) -> str:
        """``3 linears [64, 32, 32] of K 64, M 2: rms norm before; add after``."""
        count, norm = len(self.linears), self.fused.norm
        before = [step.op for step in self.fused.prologue.steps] if self.fused.prologue is not None else []
        before += [f"{norm.kind} norm"] if norm is not None else []
        parts = [f"{', '.join(before)} before"] if before else []
        parts += [f"{', '.join(self.steps)} after"] if self.steps else []
        plural = "linears" if count > 1 else "linear"
        tail = f": {'; '.join(parts)}" if parts else ""
        return f"{count} {plural} {list(self.fused.widths)} of K {self.fused.depth}, M {self.rows}{tail}"


def linears_of(graph: fx.Graph) -> list[fx.Node]:
    """Every ``torch.nn.functional.linear(x, weight, ...)`` of the graph."""
    called = [n for n in graph.nodes if n.op == "call_function" and n.target is torch.nn.functional.linear]
    return [n for n in called if len(n.args) >= 2 and n.users]


def plan_groups(graph: fx.Graph, context: PassContext, max_m: int = MAX_ROWS) -> list[Group]:
    """The groups of `graph`, in the order in which their first linear stands; refusals go to `context` as remarks."""
    return _Planner(graph, context, max_m).plan()


def rows_of(value: torch.Tensor) -> Any:
    """M of ``[..., K]``: an int, or symbolic."""
    rows: Any = 1
    for size in value.shape[:-1]:
        rows = rows * size
    return rows


@dataclass
class _Family:
    """Linears that read one tensor, and what made it."""

    x: fx.Node
    linears: list[fx.Node]
    before: Before
    parts: list[Part] = field(default_factory=list)


class _Planner:
    def __init__(self, graph: fx.Graph, context: PassContext, max_m: int) -> None:
        self.graph = graph
        self.context = context
        self.max_m = max_m
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    def plan(self) -> list[Group]:
        families = self._families()
        for family in families:
            family.before.find_norm()
        claimed = {node for family in families for node in (*family.linears, *family.before.norm_nodes)}
        finder = PartFinder(self.context, self.position, claimed)
        groups: list[Group] = []
        for family in families:
            family.parts = finder.parts(family.linears)
        for family in families:  # what follows a product belongs to it; only what is left stands before another
            family.before.find_pointwise(finder.claimed)
            groups += self._groups(family)
        return groups

    # -- which linears ------------------------------------------------------------------------------------------

    def _families(self) -> list[_Family]:
        found: dict[tuple[fx.Node, str], list[fx.Node]] = {}
        linears = [n for n in linears_of(self.graph) if self.context.covers(n)]
        adapters = find_adapters(self.graph, linears)
        for node in linears:
            refusal = ("FX101", adapters[node]) if node in adapters else self._refusal(node)
            rows = rows_of(value_of(node.args[0])) if refusal is None else None
            if refusal is None and isinstance(rows, int) and rows > self.max_m:
                message = f"{rows} rows, above max_m={self.max_m}: arithmetic bounds them, not weights"
                self.context.missed("FX301", node, message)
            elif refusal is not None:
                self.context.missed(refusal[0], node, refusal[1])
            else:
                found.setdefault((node.args[0], _neighbourhood(node)), []).append(node)  # type: ignore[index, arg-type]
        if stored := [n for n in self.graph.nodes if is_conv1d(n) and self.context.covers(n)]:
            message = "its weight is stored [K, N] (addmm); kernels read rows of [N, K] that lie together"
            self.context.missed("FX202", stored[0], message, count=len(stored))
        if packed := [n for n in self.graph.nodes if _is_packed(n) and self.context.covers(n)]:
            message = f"its weight is packed for {name_of(packed[0])}; kernels read float16, bfloat16 or float32"
            self.context.missed("FX201", packed[0], message, count=len(packed))
        runs = [
            (x, linears[start : start + MAX_WEIGHTS])
            for (x, _), linears in found.items()
            for start in range(0, len(linears), MAX_WEIGHTS)
        ]
        return [_Family(x, run, Before(self.context, x, run, rows_of(value_of(x)))) for x, run in runs]

    def _refusal(self, node: fx.Node) -> tuple[str, str] | None:
        """The code and the words for the first thing that keeps a linear out; None when nothing does."""
        x, weight, made = value_of(node.args[0]), value_of(node.args[1]), value_of(node)
        weight_node = node.args[1]
        if not isinstance(weight_node, fx.Node) or weight_node.op not in ("placeholder", "get_attr"):
            made_by = name_of(weight_node) or "the graph"
            return "FX101", f"its weight is computed ({made_by}), as quantised and merged weights are"
        if not all(isinstance(t, torch.Tensor) for t in (x, weight, made)):
            return "FX101", "an operand carries no example tensor"
        if any(is_traceable_wrapper_subclass(t) for t in (x, weight)):
            return "FX201", f"its weight is a {type(weight).__name__}, which packs other tensors"
        if weight.dtype not in FLOATS or not (x.dtype == weight.dtype == made.dtype):
            dtypes = ", ".join(dtype_name(t.dtype) for t in (x, weight, made))
            return "FX201", f"input, weight and output are {dtypes}; kernels take one of {_names(FLOATS)} for all"
        if len(weight_node.users) > 1:
            others = sorted({name_of(u) or u.op for u in weight_node.users if u is not node})
            return "FX104", f"its weight is tied: {', '.join(others)} reads it too"
        if weight.ndim != 2 or not (isinstance(weight.shape[0], int) and isinstance(weight.shape[1], int)):
            return "FX204", f"its weight is {list(weight.shape)}, not two fixed sizes"
        if weight.shape[1] > 1 and weight.stride(1) != 1:
            return "FX202", f"its weight has strides {weight.stride()}; kernels read rows that lie together"
        if x.device != weight.device:
            return "FX207", f"input on {x.device}, weight on {weight.device}"
        rows = rows_of(x)
        if isinstance(rows, int):
            return ("FX302", "it has no rows") if rows == 0 else None
        if not statically_known_true(rows <= self.max_m):
            return "FX204", f"its number of rows is {rows}, which is not known to be at most max_m={self.max_m}"
        return None

    # -- one kernel ---------------------------------------------------------------------------------------------

    def _groups(self, family: _Family) -> list[Group]:
        # A program holds as many products as one output needs, the same number for all outputs of a kernel.
        by_count: dict[int, list[Part]] = {}
        for part in family.parts:
            by_count.setdefault(len(part.products), []).append(part)
        found = [self._group(family, parts) for parts in by_count.values()]
        return [group for group in found if group is not None]

    def _group(self, family: _Family, parts: Sequence[Part]) -> Group | None:
        linears = sorted((p for part in parts for p in part.products), key=self.position.__getitem__)
        weights = [node.args[1] for node in linears]
        norm, before = family.before.norm, family.before.pointwise
        inner = {*family.before.nodes, *(n for part in parts for n in part.region)}
        nodes = sorted(inner, key=self.position.__getitem__)
        parameters, source = family.before.operands, family.before.source
        try:
            epilogue, extras = from_nodes(linears, [part.exit for part in parts])
            value = value_of(family.x)
            fused = FusedLinear(
                dtype_name(value.dtype), int(value.shape[-1]), tuple(int(value_of(w).shape[0]) for w in weights),
                epilogue, norm.norm if norm is not None else None, before.prologue if before is not None else None,
            )  # fmt: skip
        except Unsupported as reason:
            self.context.missed("FX101", linears[0], reason.reason)
            return None
        inputs = [source, *weights, *parameters, *extras]
        write = written_between([n for n in inputs if isinstance(n, fx.Node)], nodes[0], nodes[-1])
        if write is not None:
            self.context.blocked("FX106", linears[0], f"{write.name} writes what the group reads")
            return None
        return Group(
            fused, tuple(linears), tuple(weights), source, (*parameters, *extras),  # type: ignore[arg-type]
            tuple(part.exit for part in parts), tuple(nodes), rows_of(value),
        )  # fmt: skip


def is_conv1d(node: fx.Node) -> bool:
    """A linear in the form of GPT-2's Conv1D: ``addmm(bias, x, weight)`` with a parameter for a weight."""
    weight = node.args[2] if name_of(node) == "addmm" and len(node.args) > 2 else None
    return isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr")


def _is_packed(node: fx.Node) -> bool:
    """A product with a quantised weight in an operator of its own (``_weight_int8pack_mm``, bitsandbytes, ...)."""
    if node.op != "call_function" or not isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    name = str(node.target)
    product = any(word in name for word in ("mm", "linear", "matmul"))
    marks = ("int4", "int8", "4bit", "8bit", "_scaled_mm", "quantized", "bitsandbytes", "fbgemm", "torchao")
    return product and any(mark in name for mark in marks)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(map(dtype_name, dtypes)))


def _neighbourhood(node: fx.Node) -> str:
    """The path of the layer a linear stands in: up to its last number, so that no group spans layers."""
    names = module_path(node).split(".")
    numbers = [i for i, name in enumerate(names) if name.isdigit()]
    return ".".join(names[: numbers[-1] + 1]) if numbers else ""
