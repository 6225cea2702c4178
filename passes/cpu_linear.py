"""Linears of few rows on a CPU: weights are read once, in the order they lie, by generated C++.

A decode step multiplies a few rows by every weight of the model. The library arranges each weight for its inner loop
before it multiplies, in every call; with few rows that takes longer than reading the weight.

    y = torch.nn.functional.linear(x, weight, bias)         x [..., K], up to 24 rows
becomes
    y = fxopt.cpu_linear(x, weight, bias)

Exact: the same products, summed in another order, the same whatever the number of rows. On GPUs ``flat_gemm`` is for
such linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import fxopt.codegen.ops.cpu_linear  # noqa: F401  (registers the operator)
from fxopt.codegen.kernels import cpu_linear
from fxopt.passes.context import PassContext
from fxopt.passes.linear_groups import linears_of, rows_of
from fxopt.passes.nodes import argument, value_of
from fxopt.passes.technique import Technique

CODES = {"dtype": "FX201", "layout": "FX202", "rows": "FX301", "size": "FX302"}
"""Of what the kernel refuses, by kind."""


@dataclass(frozen=True)
class CpuLinear(Technique):
    """Reads weights once where rows are few (exact, on by default; switch off with ``disable=("cpu_linear",)``)."""

    name: ClassVar[str] = "cpu_linear"
    exact: ClassVar[bool] = True
    on_by_default: ClassVar[bool] = True
    enters_branches: ClassVar[bool] = True

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Put the operator in the place of every linear on a CPU whose rows are few and whose weight is large."""
        for node in linears_of(graph):
            x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
            values = [value_of(given) for given in (x, weight, bias)]
            if context.covers(node) and all(v is None or isinstance(v, torch.Tensor) for v in values):
                self._replace(node, (x, weight, bias), values, context)

    def _replace(
        self, node: fx.Node, given: tuple[object, ...], values: list[torch.Tensor], context: PassContext
    ) -> None:
        x, weight, bias = values
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
        new = context.rewriter.call(
            torch.ops.fxopt.cpu_linear.default, given, {}, like=node, before=node, name="cpu_linear"
        )
        context.rewriter.replace(node, new)
        context.rewriter.erase([node])
        rows = rows_of(x)
        said = f"{rows} {'row' if rows == 1 else 'rows'} by {list(weight.shape)}"
        context.applied(new, f"{said}: the weight is read once, in order")
