"""What the pass of mixture of depths does to a captured graph; the tokens were already gathered by the reference.

Where a device decides whether a part of a routed layer is needed, each linear of it is given the decision::

    needed = member.sum(1).max() > room                  needed = ...
    q = linear(h, Wq)                            ->      q = fxopt.linear_if(needed, h, Wq)

and on a device with generated kernels what moves the tokens is one kernel with its neighbour::

    rows = gather(x, index);  n = norm(rows)     ->      rows, n = fxopt.gather_norm(x, index, gamma)
    y = rows + r * (after - rows)
    out = scatter(x, index, y)                   ->      out = fxopt.scatter_residual(x, index, rows, after, r)

Elsewhere Inductor fuses gather with norm and scatter with the addition better than an operator it cannot look into.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxopt.codegen import lowering
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.prologue import NormMatch, match_norm
from fxopt.codegen.ops import routing as _routing  # noqa: F401  registers the operators
from fxopt.passes import depth
from fxopt.passes.context import PassContext
from fxopt.passes.mod_reference import DECIDES, ONLY_IF, ROUTED
from fxopt.passes.nodes import argument, is_tensor, name_of, value_of
from fxopt.passes.streams import op_name


def mark_of(node: fx.Node, key: str) -> str | None:
    """What the reference wrote on a node under `key`."""
    found = (node.meta.get("custom") or {}).get(key)
    return found if isinstance(found, str) else None


def marked_nodes(graph: fx.Graph, context: PassContext, key: str) -> dict[str, list[fx.Node]]:
    """Nodes that carry a mark, by what it says, in order."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        mark = mark_of(node, key)
        if mark and node.op in ("call_function", "call_method") and context.covers(node):
            found.setdefault(mark, []).append(node)
    return found


# -- only where needed ----------------------------------------------------------------------------------------------


def skip_where_not_needed(graph: fx.Graph, context: PassContext) -> dict[str, tuple[int, int]]:
    """Give linears the decision of their part; by part, how many of how many products with weights were given it."""
    if context.training:
        return {}  # the operator has no gradient
    decisions = {
        part: next((n for n in reversed(nodes) if is_tensor(n, 0) and value_of(n).dtype == torch.bool), None)
        for part, nodes in marked_nodes(graph, context, DECIDES).items()
    }
    done: dict[str, tuple[int, int]] = {}
    for part, nodes in marked_nodes(graph, context, ONLY_IF).items():
        needed = decisions.get(part)
        products = [
            n for n in nodes if name_of(n) in ("linear", "addmm", "matmul", "mm", "bmm", "einsum")
            and any(isinstance(value_of(depth.base(given)), torch.nn.Parameter) for given in n.all_input_nodes)
        ]  # fmt: skip
        given = 0 if needed is None else sum(_give(node, needed, context) for node in products)
        done[part] = (given, len(products))
    return done


def _give(node: fx.Node, needed: fx.Node, context: PassContext) -> bool:
    """Put ``linear_if`` in the place of one linear, ``addmm`` of a parameter included; whether it was one."""
    bias: Any = None
    if name_of(node) == "linear":
        x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    elif name_of(node) == "addmm" and not node.kwargs and len(node.args) == 3 and is_tensor(node.args[0], 1):
        bias, x, weight = node.args
    else:
        return False
    if not (is_tensor(weight, 2) and isinstance(weight, fx.Node)):
        return False
    if name_of(node) == "addmm":
        weight = context.rewriter.method("t", (weight,), like=node, before=node, name=f"{node.name}_weight")
    given = context.rewriter.call(
        torch.ops.fxopt.linear_if.default, (needed, x, weight, bias), like=node, before=node, name=f"{node.name}_if"
    )
    context.rewriter.replace(node, given)
    context.rewriter.erase([node])
    return True


# -- gather with norm, scatter with residual ------------------------------------------------------------------------


def fuse_movement(graph: fx.Graph, context: PassContext) -> dict[str, list[str]]:
    """Insert ``gather_norm`` and ``scatter_residual``; by routed layer, what was fused."""
    done: dict[str, list[str]] = {}
    for path, nodes in marked_nodes(graph, context, ROUTED).items():
        for node in nodes:
            value = value_of(node)
            if not isinstance(value, torch.Tensor) or value.device.type not in lowering.KERNEL_DEVICES:
                continue
            if op_name(node) == "scatter" and value.ndim == 3 and _fuse_scatter(node, context):
                done.setdefault(path, []).append("scatter with residual")
        for node in nodes:
            value = value_of(node)
            if not isinstance(value, torch.Tensor) or value.device.type not in lowering.KERNEL_DEVICES:
                continue
            if op_name(node) == "gather" and value.ndim == 3 and _fuse_gather(node, context):
                done.setdefault(path, []).append("gather with norm")
    return done


def _places(wide: Any) -> fx.Node | None:
    """``index: [B, C]`` of what ``index[..., None].expand(B, C, W)`` or the same by ``reshape`` made."""
    while isinstance(wide, fx.Node) and name_of(wide) in ("expand", "expand_as", "reshape", "getitem", "unsqueeze"):
        wide = wide.args[0]
        if is_tensor(wide, 2):
            return wide  # type: ignore[return-value]
    return None


def _fuse_gather(node: fx.Node, context: PassContext) -> bool:
    stream, index = node.args[0], _places(node.args[2])
    while isinstance(stream, fx.Node) and name_of(stream) == "expand" and stream.args:
        stream = stream.args[0]
    if index is None or not isinstance(stream, fx.Node) or not is_tensor(stream, 3):
        return False
    found = _norm_of(node, context)
    if found is None:
        return False
    match, result = found
    if value_of(result).dtype != value_of(node).dtype or value_of(stream).shape[0] != value_of(node).shape[0]:
        return False
    # Parameters of the norm may be cast after the gather: what it is made of goes before its result.
    place = result
    made = context.rewriter.call(
        torch.ops.fxopt.gather_norm.default, (stream, index, match.gamma, match.beta), {"norm": match.norm.encode()},
        like=[node, *match.nodes], before=node.next, name="gather_norm",
    )  # fmt: skip
    rows = context.rewriter.call(operator.getitem, (made, 0), like=node, after=made, name=f"{node.name}_rows")
    normed = context.rewriter.call(operator.getitem, (made, 1), like=result, after=rows, name=f"{result.name}_normed")
    own = set(match.nodes)
    context.rewriter.replace(place, normed, only=lambda user: user not in own)
    context.rewriter.replace(node, rows, only=lambda user: user not in own)
    context.rewriter.erase([*match.nodes, node])
    return True


_READERS = ("linear", "addmm", "linear_if", "view", "size")
"""What reads the result of a norm; a product may be given its rows in two dimensions."""


def _norm_of(rows: fx.Node, context: PassContext) -> tuple[NormMatch, fx.Node] | None:
    """The norm that reads `rows`, and its result: what a linear reads."""
    position = {n: i for i, n in enumerate(context.graph.nodes)}
    begin, seen, waiting = position[rows], set(), [rows]
    while waiting:
        node = waiting.pop(0)
        if node in seen or position[node] - begin > 40:
            continue
        seen.add(node)
        if node is not rows and any(name_of(user) in _READERS for user in node.users):
            try:
                match = match_norm(node)
            except Unsupported:
                match = None
            if match is not None and match.x is rows and _before(match, rows, position):
                return match, node
        waiting += list(node.users)
    return None


def _before(match: NormMatch, rows: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether the norm's parameters stand before the rows, so that one operator can be put there."""
    return all(position[n] < position[rows] for n in (match.gamma, match.beta) if n is not None)


def _fuse_scatter(node: fx.Node, context: PassContext) -> bool:
    """``scatter(x, 1, index, [where(valid,] rows + weight * (after - rows) [, rows)])``: the reference writes it so."""
    stream, index, new = node.args[0], _places(node.args[2]), node.args[3]
    chain = [node]

    def step(current: Any, *names: str) -> fx.Node | None:
        if isinstance(current, fx.Node) and name_of(current) in names:
            chain.append(current)
            return current
        return None

    while (cast := step(new, "to")) is not None:
        new = cast.args[0]
    valid = None
    if (chosen := step(new, "where")) is not None:
        valid, new = _narrow(chosen.args[0]), chosen.args[1]
        if valid is None:
            return False
    added = step(new, "add")
    scaled = step(added.args[1], "mul") if added is not None else None
    if added is None or scaled is None:
        return False
    change = step(scaled.args[1], "sub")
    weight = _narrow(scaled.args[0])
    if change is None or weight is None or change.args[1] is not added.args[0] or index is None:
        return False
    after, rows = change.args
    if chosen is not None and chosen.args[2] is not rows:
        return False
    made = context.rewriter.call(
        torch.ops.fxopt.scatter_residual.default, (stream, index, rows, after, weight, valid),
        like=chain, before=node, name="scatter_residual",
    )  # fmt: skip
    context.rewriter.replace(node, made)
    context.rewriter.erase(chain)
    return True


def _narrow(wide: Any) -> fx.Node | None:
    """``[B, C]`` of ``[B, C, 1]``, casts gone through by making them before; None for anything else."""
    if not isinstance(wide, fx.Node):
        return None
    if name_of(wide) in ("getitem", "unsqueeze") and is_tensor(wide, 3) and is_tensor(wide.args[0], 2):
        return wide.args[0]  # type: ignore[return-value]
    return None
