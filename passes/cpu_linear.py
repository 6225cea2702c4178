"""Linears of few rows on a CPU: weights are read once, in the order they lie, by generated C++.

A decode step multiplies a few rows by every weight of the model. The library arranges each weight for its inner loop
before it multiplies, in every call; with few rows that takes longer than reading the weight.

    y = torch.nn.functional.linear(x, weight, bias)         x [..., K], up to 24 rows
becomes
    y = fxopt.cpu_linear(x, weight, bias)

and GPT-2's ``torch.addmm(bias, x, weight)`` with its weight [K, N] the same of ``weight.t()``, a view.

Exact: the same products, summed in another order, the same whatever the number of rows. On GPUs ``flat_gemm`` is for
such linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import fxopt.codegen.ops.cpu_linear  # noqa: F401  (registers the operator)
from fxopt.codegen.kernels import cpu_linear
from fxopt.passes.context import PassContext
from fxopt.passes.linear_groups import is_conv1d, rows_of
from fxopt.passes.nodes import argument, value_of
from fxopt.passes.technique import Technique

CODES = {"dtype": "FX201", "layout": "FX202", "rows": "FX301", "size": "FX302"}
"""Of what the kernel refuses, by kind."""


class _Operands(NamedTuple):
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    turned: bool
    """The weight is stored [K, N]."""


def _operands(node: fx.Node) -> _Operands | None:
    if is_conv1d(node) and len(node.args) == 3 and not node.kwargs:  # beta and alpha are one
        bias, x, weight = node.args
        return _Operands(x, weight, bias, turned=True)  # type: ignore[arg-type]
    if node.op != "call_function" or node.target is not torch.nn.functional.linear or not node.users:
        return None
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    return _Operands(x, weight, bias, turned=False)  # type: ignore[arg-type]


@dataclass(frozen=True)
class CpuLinear(Technique):
    """Reads weights once where rows are few (exact, on by default; switch off with ``disable=("cpu_linear",)``)."""

    name: ClassVar[str] = "cpu_linear"
    exact: ClassVar[bool] = True
    on_by_default: ClassVar[bool] = True
    enters_branches: ClassVar[bool] = True

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Put the operator in the place of every linear on a CPU whose rows are few and whose weight is large."""
        for node in graph.nodes:
            given = _operands(node)
            if given is not None and context.covers(node):
                self._replace(node, given, context)

    def _replace(self, node: fx.Node, given: _Operands, context: PassContext) -> None:
        values = [value_of(given.x), value_of(given.weight), value_of(given.bias)]
        if not all(v is None or isinstance(v, torch.Tensor) for v in values):
            return
        x, weight, bias = values
        weight = weight.t() if given.turned else weight
        if x.device.type != "cpu":
            return
        if context.training:
            context.blocked("FX205", node, "gradients are recorded; the operator has none")
            return
        if any(is_traceable_wrapper_subclass(v) for v in values if v is not None):
            context.missed("FX202", node, "a tensor subclass multiplies by its own rules")
            return
        if value_of(node).dtype != x.dtype:
            context.missed("FX201", node, f"{value_of(node).dtype} of {x.dtype}: autocast converts")
            return
        refused = cpu_linear.refused(x, weight, bias)
        if refused is not None:
            context.missed(CODES[refused.kind], node, refused.reason)
            return
        rewriter, stored = context.rewriter, given.weight
        if given.turned:
            stored = rewriter.method("t", (stored,), like=node, before=node, name="weight_t")
        new = rewriter.call(
            torch.ops.fxopt.cpu_linear.default, (given.x, stored, given.bias), {}, like=node, before=node,
            name="cpu_linear",
        )  # fmt: skip
        rewriter.replace(node, new)
        rewriter.erase([node])
        rows = rows_of(x)
        said = f"{rows} {'row' if rows == 1 else 'rows'} by {list(weight.shape)}{', stored [K, N]' * given.turned}"
        context.applied(new, f"{said}: the weight is read once, in order")
