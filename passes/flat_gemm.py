"""Flat GEMM: the linears of a decode step in generated kernels, with the norm before and what follows inside.

One step multiplies a few rows with every weight of the model, so that only reading the weights counts. The library pads
those rows to its own tile, reads and writes the activation between every two operations and launches each of them.
After FlashDecoding++ (arXiv 2311.01282): one kernel for linears that share an input, rows padded to the matrix unit's
side and no further, GEMV, flat GEMM or the library by the number of rows. Before, for one layer's MLP::

    n = weight * to(x * rsqrt(mean(pow(to(x), 2), -1) + eps))
    g = linear(n, Wg); u = linear(n, Wu); a = silu(g) * u; y = linear(a, Wd); h = x + y

After::

    a, = fxopt.fused_linear(x, [Wg, Wu], [weight], group="rms norm, silu, mul")
    h, = fxopt.fused_linear(a, [Wd], [x], group="add")

No weight is copied or joined: each stays where it lies, and what is written into it later is seen.
"""

from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxopt.codegen import compat, lowering, roofline
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.gemm import MAX_ROWS
from fxopt.codegen.kernels.gemm_launch import build, compile_here
from fxopt.codegen.ops import fused_linear
from fxopt.passes.context import PassContext
from fxopt.passes.linear_groups import Group, linears_of, plan_groups
from fxopt.passes.nodes import value_of
from fxopt.passes.provenance import module_path
from fxopt.passes.technique import SettingError, Technique

__all__ = ["FlatGemm", "Group", "apply_group", "apply_groups", "plan_groups"]


@dataclass(frozen=True)
class FlatGemm(Technique):
    """Generated kernels for linears with few rows (exact, on by default; its meaning is the model itself).

    Args:
        max_m: most rows, batch times new tokens, that kernels are taken for; 1 to 64.
        tables: a measured dataflow table (`fxopt tune MODEL --only flat_gemm`) or a folder of them. Without one, those
            in the cache and those that ship are looked for, and where there is none a roofline model decides.
    """

    name: ClassVar[str] = "flat_gemm"
    exact: ClassVar[bool] = True
    on_by_default: ClassVar[bool] = True

    max_m: int = MAX_ROWS
    tables: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_m, bool) or not isinstance(self.max_m, int) or not 1 <= self.max_m <= MAX_ROWS:
            raise SettingError(
                f"FlatGemm(max_m={self.max_m!r}): a number of rows from 1 to {MAX_ROWS}; kernels for more rows do not "
                "exist. To leave the technique out, write disable=('flat_gemm',)."
            )
        if self.tables is None:
            return
        if not isinstance(self.tables, (str, os.PathLike)):
            raise SettingError(f"FlatGemm(tables={self.tables!r}): the path of a table, or of a folder of tables.")
        if not os.path.exists(self.tables):
            raise SettingError(
                f"FlatGemm(tables={os.fspath(self.tables)!r}): there is no such file or folder; leave it out, or "
                "measure a table with `fxopt tune MODEL --only flat_gemm`."
            )
        object.__setattr__(self, "tables", os.fspath(self.tables))

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Put one operator in the place of every group for which a kernel is chosen."""
        linears = [node for node in linears_of(graph) if context.covers(node)]
        if not linears:
            return
        # Before anything that costs compile time: on a CPU this is where it ends.
        if not any(_on_kernel_device(node) for node in linears):
            for node in linears:
                context.blocked("FX207", node, "its kernels need CUDA or ROCm; on a CPU there is cpu_linear")
            return
        if context.training:
            for node in linears:
                context.blocked("FX205", node, "gradients are recorded; the kernels have none")
            return
        chosen = []
        for group in plan_groups(graph, context, self.max_m):
            refusal = self._refusal(group, context)
            if refusal is not None:
                context.missed(refusal[0], group.linears[0], refusal[1], count=len(group.linears))
            else:
                chosen.append(group)
        for group, node in zip(chosen, apply_groups(chosen, context, self.tables or "", self.max_m), strict=True):
            context.applied(node, group.describe(), count=len(group.linears))

    def _refusal(self, group: Group, context: PassContext) -> tuple[str, str] | None:
        """Why the library keeps a group; where a kernel is taken it is written, and compiled for the device here."""
        if not _on_kernel_device(group.linears[0]):
            return "FX207", f"generated kernels need CUDA or ROCm, this is {value_of(group.linears[0]).device}"
        fused = group.fused
        flow = fused_linear.dataflow(fused.dtype, value_of(group.x).device, self.tables or "", self.max_m)
        if not isinstance(group.rows, int):
            return None  # the operator chooses at each call
        config = flow.config(fused, group.rows)
        if config is None:
            source = "was measured" if flow.measured(sum(fused.widths), fused.depth) else "is predicted"
            return "FX301", f"{group.describe()}: the library {source} to be faster"
        if compat.triton_version() == "none":
            # A plan is for a machine that has it; here nothing can be written or compiled.
            planned = roofline.planned_device() is not None
            return None if planned else ("FX303", f"{group.describe()}: Triton is not installed (pip install triton)")
        try:
            kernel = build(fused, config, origin(group))
            compile_here(kernel, group.rows, value_of(group.x).device)
        except Unsupported as reason:
            return "FX303", f"{group.describe()}: {reason.reason}"
        return None


def origin(group: Group) -> str:
    """Where a group stands, for the header of its kernel: the same text for every layer, which share one kernel."""
    paths = dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module_path(node)) for node in group.linears)
    return ", ".join(path for path in paths if path)


def apply_groups(groups: list[Group], context: PassContext, tables: str = "", max_m: int = MAX_ROWS) -> list[fx.Node]:
    """:func:`apply_group` for groups of one plan, in an order that keeps their operands; returns the nodes in theirs.

    A group may read the output of one that stands before it, so the last is written first and its operand replaced
    afterwards.
    """
    order = {node: i for i, node in enumerate(context.graph.nodes)}
    places = [min(order[output] for output in group.outputs) for group in groups]
    made: dict[int, fx.Node] = {}
    for index in sorted(range(len(groups)), key=places.__getitem__, reverse=True):
        made[index] = apply_group(groups[index], context, tables, max_m)
    return [made[index] for index in range(len(groups))]


def apply_group(group: Group, context: PassContext, tables: str = "", max_m: int = MAX_ROWS) -> fx.Node:
    """Put ``fxopt.fused_linear`` in the place of a group and erase what nobody reads any more; returns the operator.

    On a device without kernels the operator's PyTorch body computes the same.
    """
    rewriter, own = context.rewriter, set(group.nodes)
    place = min(group.outputs)  # nodes compare by their place in the graph
    options = {"group": group.fused.encode(), "tables": tables, "max_m": max_m, "origin": origin(group)}
    like = [*group.linears, *(node for node in group.nodes if node not in group.linears)]
    new = rewriter.call(
        torch.ops.fxopt.fused_linear.default, (group.x, list(group.weights), list(group.extras)), options,
        like=like, before=place, name="fused_linear",
    )  # fmt: skip
    for index, old in enumerate(group.outputs):
        value = rewriter.call(operator.getitem, (new, index), like=old, before=place, name=f"{old.name}_fused")
        rewriter.replace(old, value, only=lambda user: user not in own)
    rewriter.erase(group.nodes)
    return new


def _on_kernel_device(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.device.type in lowering.KERNEL_DEVICES
