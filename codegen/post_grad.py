"""The pass in Inductor's post-grad slot: semantic operators become kernels that Inductor launches itself.

Up to here a group of linears is one node, ``fxopt.fused_linear``. Where its rows are a number, the dataflow has chosen
a kernel and the device compiles it, the node gives way to the kernel: Inductor then plans its memory and launches it
without going through Python's dispatcher. Before, at post-grad::

    fused = fxopt.fused_linear(x, [w], [r], group="add")
    y = fused[0]

After, without splits of K::

    out0 = aten.empty([1, 1, N])
    launched = triton_kernel_wrapper_functional(flat_gemm, kwargs={x, w0, e0, out0, ...}, tensors_to_clone=[out0])
    y = launched["out0"]

Operators with a symbolic number of rows stay: they choose at each call. Elsewhere their PyTorch bodies run.

The pass says what it is to Inductor's caches (:meth:`Lowering.uuid`): compiled code calls fxopt's operators by their
schemas, or holds kernels of this generator, so it must not outlive them.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxopt.codegen import compat, lowering
from fxopt.codegen.dataflow import tables_digest
from fxopt.codegen.kernels import Unsupported, row_stride
from fxopt.codegen.kernels.gemm import MAX_ROWS, FusedLinear
from fxopt.codegen.kernels.gemm_launch import Kernel, build, compile_here, launches, workspace
from fxopt.codegen.ops import fused_linear

SLOTS = ("post_grad_custom_post_pass", "post_grad_custom_pre_pass")


class Lowering(CustomGraphPass):
    """Lowers fxopt's operators in a post-grad graph; then calls `others`, the passes it found in its slot."""

    def __init__(self, tables: frozenset[str] = frozenset(), others: Sequence[Callable[[fx.Graph], Any]] = ()) -> None:
        """`tables`: paths that the operators of the graph name, see :class:`fxopt.codegen.dataflow.Dataflow`."""
        self.tables = tables
        self.others = tuple(others)
        self.refused: list[str] = []
        """Why operators were left to themselves."""

    def __call__(self, graph: fx.Graph) -> None:
        lower(graph, self.refused)
        for other in self.others:
            other(graph)

    def uuid(self) -> Any | None:
        """What compiled code depends on beside its graph: codegen and the tables measured."""
        own = [digest(), *(tables_digest(path) for path in sorted(self.tables))]
        for other in self.others:
            found = other.uuid() if isinstance(other, CustomGraphPass) else None
            if found is None:  # a pass that cannot be named switches the caches off, as it does without fxopt
                return None
            own.append(str(found))
        return ":".join(own)


@functools.cache
def digest() -> str:
    """Hash of codegen's sources: the schemas, fakes and bodies of fxopt's operators, and the generators of kernels."""
    sources = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        found.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def nodes_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph and of the graphs that it holds, such as branches of a conditional."""
    return [node for module in gm.modules() if isinstance(module, fx.GraphModule) for node in module.graph.nodes]


def patches(gm: fx.GraphModule) -> dict[str, Lowering]:
    """Inductor settings for a graph that holds operators of fxopt: this pass in a free slot. Empty for other graphs."""
    nodes = [node for node in nodes_of(gm) if _is_ours(node)]
    if not nodes:
        return {}
    tables = frozenset(str(node.kwargs["tables"]) for node in nodes if "tables" in node.kwargs)
    for slot in SLOTS:
        if getattr(inductor_config, slot) is None:
            return {slot: Lowering(tables)}
    taken = getattr(inductor_config, SLOTS[0])
    return {SLOTS[0]: Lowering(tables, taken if isinstance(taken, (list, tuple)) else [taken])}


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxopt"


def lower(graph: fx.Graph, refused: list[str]) -> None:
    """Put kernels in the place of the operators of a post-grad graph (nodes carry ``val``) for which one is chosen."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.fxopt.fused_linear.default):
        try:
            _lower_linear(graph, node)
        except Unsupported as reason:
            refused.append(reason.reason)
    graph.lint()


def _lower_linear(graph: fx.Graph, node: fx.Node) -> None:
    x, weights, extras = node.args[:3]
    assert isinstance(x, fx.Node) and isinstance(weights, (list, tuple)) and isinstance(extras, (list, tuple))
    value = x.meta["val"]
    if value.device.type not in lowering.KERNEL_DEVICES:
        return
    fused = FusedLinear.decode(str(node.kwargs["group"]))
    rows = functools.reduce(operator.mul, value.shape[:-1], 1)
    if not isinstance(rows, int) or rows == 0:
        return
    max_m = node.kwargs.get("max_m", MAX_ROWS)
    assert isinstance(max_m, int)
    flow = fused_linear.dataflow(fused.dtype, value.device, str(node.kwargs.get("tables", "")), max_m)
    config = flow.config(fused, rows)
    if config is None:
        return
    kernel = build(fused, config, str(node.kwargs.get("origin", "")))
    compile_here(kernel, rows, value.device)
    arguments = _arguments(fused, rows, x, weights, extras)
    with graph.inserting_before(node):
        _launch(graph, kernel, rows, arguments, node)


def _arguments(
    fused: FusedLinear, rows: int, x: fx.Node, weights: Sequence[Any], extras: Sequence[Any]
) -> dict[str, Any]:
    """Operands by parameter name, with their row strides."""
    found: dict[str, Any] = {"x": x, "x_stride": _row_stride(x), "M": rows}
    for index, weight in enumerate(weights):
        found |= {f"w{index}": weight, f"w{index}_stride": weight.meta["val"].stride(0)}
        if fused.depth > 1 and weight.meta["val"].stride(1) != 1:
            raise Unsupported("a weight whose rows do not lie together")
    for kind, extra in zip(fused.extras, extras, strict=True):
        found[kind.name] = extra
        if kind.layout == "full":
            found[f"{kind.name}_stride"] = _row_stride(extra)
        elif not extra.meta["val"].is_contiguous():
            raise Unsupported(f"{kind.name} has strides {extra.meta['val'].stride()}")
    return found


def _row_stride(node: fx.Node) -> int:
    """Stride between rows of ``[..., K]`` seen as ``[M, K]``; raises Unsupported where that needs a copy."""
    value = node.meta["val"]
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise Unsupported(f"{node.name} has strides {value.stride()}: its rows do not lie together")
    stride = row_stride(value.shape, value.stride())
    if stride is None:
        raise Unsupported(f"{node.name} has strides {value.stride()}: its rows lie at no one distance")
    return int(stride)


def _launch(graph: fx.Graph, kernel: Kernel, rows: int, arguments: dict[str, Any], node: fx.Node) -> None:
    outputs: Sequence[torch.Tensor] = node.meta["val"]
    made = {f"out{i}": _empty(graph, output) for i, output in enumerate(outputs)}
    for name, shape in workspace(kernel, rows).items():
        made[name] = _empty(graph, outputs[0].new_empty(shape, dtype=torch.float32))
    for launch in launches(kernel, rows):
        values = {**arguments, **made}
        # Without splits the one kernel writes the outputs; with them the first writes partial sums for the second.
        written = [name for name in launch.parameters if name.startswith("out")]
        written = written or [name for name in launch.parameters if name in made]
        jit = compat.configured(launch.jit, launch.constants, launch.warps, launch.stages)
        given = {name: values[name] for name in launch.parameters}
        called = compat.kernel_node(graph, jit, launch.grid, given, written)
        called.meta["val"] = {name: made[name].meta["val"] for name in written}
        for name in written:
            value = graph.call_function(operator.getitem, (called, name))
            value.meta["val"] = made[name].meta["val"]
            made[name] = value
    for user in list(node.users):
        user.replace_all_uses_with(made[f"out{user.args[1]}"])
        graph.erase_node(user)
    graph.erase_node(node)


def _empty(graph: fx.Graph, like: torch.Tensor) -> fx.Node:
    settings: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    made = graph.call_function(torch.ops.aten.empty.memory_format, (list(like.shape),), settings)
    made.meta["val"] = like
    return made
