"""Follow a residual stream through a region of a graph, and find what is added to it.

A residual layer keeps a path from its input to its output on which nothing is mixed: additions, norms, dropout,
casts, reshapes. What joins that path at an addition after a matrix product, a convolution or an attention is a
*part*. This holds for every arrangement in use::

    pre-norm     x = x + attention(norm(x));            x = x + mlp(norm(x))
    post-norm    x = norm(x + attention(x));            x = norm(x + mlp(x))
    sandwich     x = x + norm(attention(norm(x)));      x = x + norm(mlp(norm(x)))
    parallel     x = x + (attention(norm(x)) + mlp(norm(x)))

so the search needs no names of models or modules. Values are read from ``example_value``; symbolic sizes are compared
as expressions, which adds no guard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

Kind = Literal["attention", "mlp", "routed"]

# Operations that mix values across positions or features, or forget their input: they end a stream.
_MIXING = {
    *("linear", "bilinear", "embedding", "embedding_bag", "matmul", "mm", "bmm", "mv", "dot", "outer", "tensordot"),
    *("addmm", "addbmm", "baddbmm", "addmv", "einsum", "cumsum", "cumprod", "logcumsumexp", "lstm", "gru"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "one_hot", "bernoulli"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
}
_MIXING_FRAGMENTS = ("attention", "attn", "conv", "pool", "fft", "grouped_mm", "scaled_mm", "_gemm")
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_ADDITIONS = {"add", "iadd", "add_", "__add__", "__iadd__", "__radd__"}
_PLAIN_PACKAGES = ("torch", "_operator", "operator", "builtins", "math")


@dataclass(frozen=True)
class Part:
    """What a layer adds to its residual stream at one place.

    Skipping the part means replacing `add` by `stream` and erasing `add`, which may be in place (``x += branch``).
    Where attention and MLP run in parallel and are summed before they join the stream, each one's `stream` is the
    other: skip either, and for both skip the layer. A ``"routed"`` part is a whole layer of mixture of depths: `add` is
    the scatter of the tokens that were computed into the stream of all tokens.
    """

    kind: Kind
    add: fx.Node
    """The addition."""
    branch: fx.Node
    """The operand of `add` that the part contributes."""
    stream: fx.Node
    """The other operand."""


def op_name(node: fx.Node) -> str:
    """The bare name of what a node calls, without overload: ``"add"``, ``"index_copy_"``."""
    if isinstance(node.target, str):
        return node.target.rsplit(".", 1)[-1]
    name = getattr(node.target, "__name__", None) or str(node.target)
    return name.split(".", 1)[0]


def value(node: fx.Node) -> torch.Tensor | None:
    """The floating-point tensor a node stands for, or None: integers, sizes and tuples carry no stream."""
    example = node.meta.get("example_value", node.meta.get("val"))
    return example if isinstance(example, torch.Tensor) and example.is_floating_point() else None


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def signature(node: fx.Node) -> tuple[Any, ...] | None:
    """Data type and sizes, equal for tensors of equal dtype and shape; None for what is no float tensor."""
    tensor = value(node)
    return None if tensor is None else (tensor.dtype, *map(_expression, tensor.shape))


def shape_text(node: fx.Node) -> str:
    """The shape for a message: ``[2, s0, 64]``."""
    found = signature(node)
    return "no tensor" if found is None else f"[{', '.join(map(str, found[1:]))}]"


def _numel(node: fx.Node) -> Any:
    tensor = value(node)
    return None if tensor is None else _expression(tensor.numel())


def _carries(node: fx.Node) -> bool:
    """Whether a node's value can hold stream data: a float tensor, or a tuple on its way to one."""
    example = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(example, (tuple, list)):
        return not isinstance(example, torch.Size)
    return value(node) is not None


def mixes(node: fx.Node) -> bool:
    """Whether a node ends a stream: a matrix product, convolution, attention, or an operation that is not known."""
    if node.op not in ("call_function", "call_method"):
        return True
    name = op_name(node)
    if name in _MIXING or any(fragment in name for fragment in _MIXING_FRAGMENTS):
        return True
    if node.op == "call_method" or "norm" in name:
        return False
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace = getattr(target, "namespace", None) or str(target).split(".", 1)[0]
        return namespace not in ("aten", "prims")
    return not (getattr(target, "__module__", None) or "torch").startswith(_PLAIN_PACKAGES)


def addends(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of an addition of float tensors of the result's own shape; None for anything else."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in _ADDITIONS or len(node.args) != 2:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or node.kwargs.get("alpha", 1) != 1:
        return None
    shape = (signature(node) or ())[1:]
    if not shape or any((signature(operand) or ())[1:] != shape for operand in (left, right)):
        return None
    return left, right


def _joined(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Stream and branch, in any order, of what joins them: an addition, or a scatter of some tokens into a stream."""
    if op_name(node) == "scatter" and len(node.args) == 4 and node.args[1] == 1:
        whole, _, _, some = node.args
        if isinstance(whole, fx.Node) and isinstance(some, fx.Node) and signature(node) == signature(whole):
            return whole, some
    return addends(node)


def _data_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Inputs whose values (not only shape or type) reach the result."""
    inputs: Iterable[fx.Node] = node.all_input_nodes
    if op_name(node) in ("to", "type") or op_name(node).endswith("_as"):
        inputs = [a for a in node.args[:1] if isinstance(a, fx.Node)]
    return (a for a in inputs if _carries(a))


def activations(graph: fx.Graph) -> frozenset[fx.Node]:
    """Float values that are not made from parameters alone. A product of two of them mixes positions: attention."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not _carries(node):
            continue
        if node.op == "placeholder":
            fresh = not isinstance(node.meta.get("example_value"), torch.nn.Parameter)
        else:
            # A cache made in the graph starts as zeros and is filled in place, which the data flow does not show.
            inputs = [a for a in node.all_input_nodes if _carries(a)]
            made_here = not inputs or op_name(node).startswith("embedding")
            fresh = any(a in found for a in inputs) or (node.op != "get_attr" and made_here)
        if fresh:
            found.add(node)
    return frozenset(found)


@dataclass(frozen=True)
class Stream:
    """One residual path through a region: from `input` to `output`, and the parts that join it."""

    input: fx.Node
    output: fx.Node
    parts: tuple[Part, ...]


def _reach(nodes: Sequence[fx.Node], source: fx.Node) -> dict[fx.Node, int]:
    """What is computed from `source` without mixing, with the number of operations it took."""
    depth = {source: 0}
    for node in nodes:
        if _carries(node) and not mixes(node):
            reached = [depth[a] for a in _data_inputs(node) if a in depth]
            if reached:
                depth[node] = 1 + min(reached)
    return depth


def _stream(
    nodes: Sequence[fx.Node],
    depth: dict[fx.Node, int],
    source: fx.Node,
    result: fx.Node,
    active: Collection[fx.Node],
) -> Stream | None:
    """The residual path from `source` to `result`, or None when nothing is added on the way."""
    spine = {result}
    for node in reversed(nodes):
        if node in spine:
            spine.update(a for a in _data_inputs(node) if a in depth)
    order = {node: position for position, node in enumerate(nodes)}
    parts: list[Part] = []
    within: set[fx.Node] = set()
    for node in reversed(nodes):
        operands = _joined(node) if node in spine and node not in within else None
        if operands is None or _numel(node) != _numel(source):
            continue
        stream, branch = sorted(operands, key=lambda operand: depth.get(operand, len(nodes) + 1))
        if stream not in depth or branch not in order or branch is stream:
            continue
        until = {s for s in spine if order.get(s, -1) <= order.get(stream, -1)}
        inside = _slice(branch, until, order)
        if any(mixes(n) for n in inside):
            # What is added inside of a branch (an expert with a residual of its own) belongs to that branch.
            within.update(inside)
            parts.extend(_split(node, branch, stream, until, order, active))
    parts.sort(key=lambda part: order[part.branch])
    return Stream(source, result, tuple(parts)) if parts else None


def _slice(branch: fx.Node, until: Collection[fx.Node], region: Collection[fx.Node]) -> list[fx.Node]:
    """Nodes of `region` that `branch` is computed from, down to the stream."""
    found: dict[fx.Node, None] = {}
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        if node in region and node not in until and node not in found:
            found[node] = None
            waiting.extend(node.all_input_nodes)
    return list(found)


def _is_attention(node: fx.Node, active: Collection[fx.Node]) -> bool:
    name = op_name(node)
    if "attention" in name or "attn" in name:
        return True
    if name not in _PRODUCTS:
        return False
    operands = [a for a in node.all_input_nodes if a in active and len(signature(a) or ()) >= 4]
    return len(operands) >= 2


def _split(
    add: fx.Node,
    branch: fx.Node,
    stream: fx.Node,
    until: set[fx.Node],
    region: Collection[fx.Node],
    active: Collection[fx.Node],
) -> list[Part]:
    """The part behind `branch`; several when it is a sum of an attention and an MLP that ran in parallel."""
    inside = _slice(branch, until, region)
    if not any(mixes(node) for node in inside):
        return []
    if op_name(add) == "scatter":
        return [Part("routed", add, branch, stream)]
    kind: Kind = "attention" if any(_is_attention(node, active) for node in inside) else "mlp"
    whole = [Part(kind, add, branch, stream)]
    if kind == "mlp":
        return whole
    node = branch
    while (operands := _sum_in(node, region)) is None:
        inputs = [a for a in _data_inputs(node) if a in region and a not in until]
        if mixes(node) or len(inputs) != 1 or _numel(inputs[0]) != _numel(node):
            return whole
        node = inputs[0]
    left, right = operands
    parts = _split(node, left, right, until, region, active) + _split(node, right, left, until, region, active)
    return parts if {part.kind for part in parts} == {"attention", "mlp"} else whole


def _sum_in(node: fx.Node, region: Collection[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    operands = addends(node)
    return operands if operands is not None and all(a in region for a in operands) else None


def live_in(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Float tensors made outside that `nodes` read, in order of first use."""
    return list(
        dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in nodes and value(a) is not None)
    )


def live_out(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Float tensors of `nodes` that are read outside, last made first."""
    found = [n for n in nodes if value(n) is not None and any(user not in nodes for user in n.users)]
    return found[::-1]


def streams_through(region: Collection[fx.Node], active: Collection[fx.Node]) -> list[Stream]:
    """Every residual path that crosses a region between tensors of equal shape and type, latest results first.

    `region` holds its nodes in graph order and answers ``in`` fast; `active` are the graph's :func:`activations`.
    """
    nodes = list(region)
    sources = [(source, signature(source)) for source in live_in(region)]
    depths: dict[fx.Node, dict[fx.Node, int]] = {}
    found = []
    for result in live_out(region):
        wanted = signature(result)
        for source, given in sources:
            if given != wanted:
                continue
            if source not in depths:
                depths[source] = _reach(nodes, source)
            stream = _stream(nodes, depths[source], source, result, active) if result in depths[source] else None
            if stream is not None:
                found.append(stream)
    return found
