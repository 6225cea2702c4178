"""Outline what follows an exit into the two branches of a ``torch.cond``.

Before, with an exit after layer 1 of 3::

    h1 -> check -> pred                                  (inserted by the exit)
    h1 -> layer 2 -> layer 3 -> norm -> head -> logits   writes the caches of layers 2 and 3

After::

    h1 -> check -> pred, exit_logits
    logits = cond(pred, exit_branch, run_branch, (h1, exit_logits, weights, caches, ...))

``run_branch`` holds the nodes as they were. ``exit_branch`` holds what remains of them when every layer returns its
input: the cache updates, which then read h1 through each layer's own norm and projections (KV policy ``propagate``),
and the outputs. Only the branch that is taken runs.

A branch may write its operands in place from torch 2.12 on. Before, the writes are made after the branches join: each
branch returns the rows, and attention reads a copy of the cache that holds them. :mod:`fxopt.passes.exit_insert` says
what becomes of several exits.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.passes import depth, provenance
from fxopt.passes.layers import Layer
from fxopt.passes.rewriter import Rewriter, is_view, writes_in_place
from fxopt.passes.streams import op_name


class RegionError(Exception):
    """A region cannot be outlined; carries the reason code and the node."""

    def __init__(self, code: str, node: fx.Node | str, message: str) -> None:
        super().__init__(message)
        self.code, self.node, self.message = code, node, message


@dataclass
class Region:
    """What follows an exit and depends on it.

    ``nodes`` in graph order; ``results`` are read by what stays outside; ``effects`` write memory from outside.
    """

    state: fx.Node
    nodes: list[fx.Node]
    results: list[fx.Node]
    effects: list[fx.Node]
    members: set[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.members = set(self.nodes)


def written_memory(node: fx.Node) -> fx.Node | None:
    """The node whose memory `node` writes in place; None when it writes none."""
    if node.op not in ("call_function", "call_method") or not writes_in_place(node):
        return None
    target = node.args[0] if node.args else None
    return depth.base(target) if isinstance(target, fx.Node) else None


def find_region(
    graph: fx.Graph, state: fx.Node, apart: Collection[fx.Node], within: Collection[fx.Node] = ()
) -> Region:
    """The nodes after `state` that depend on it, through data or through memory; those in `apart` stay outside, and
    those in `within` inside, whatever they depend on. Raises :class:`RegionError` where order would be lost."""
    order = list(graph.nodes)
    start = order.index(state)
    inside: dict[fx.Node, None] = {}
    tainted: set[fx.Node] = set()
    left: list[fx.Node] = []
    for node in order[start + 1 :]:
        if node.op in ("placeholder", "output") or node in apart:
            continue
        if op_name(node) in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled"):
            raise RegionError("FX101", node, f"{op_name(node)} stands between the layers after the exit")
        inputs = node.all_input_nodes
        depends = any(a is state or a in inside or (a not in inside and depth.base(a) in tainted) for a in inputs)
        if depends or node in within:
            inside[node] = None
            target = written_memory(node)
            if target is not None:
                tainted.add(target)
        else:
            left.append(node)
    _check_order(order, inside, left)
    members = set(inside)
    results = [n for n in inside if any(user not in members for user in n.users)]
    effects = [n for n in inside if (target := written_memory(n)) is not None and target not in members]
    return Region(state, list(inside), results, effects)


def _check_order(order: list[fx.Node], inside: Mapping[fx.Node, None], left: list[fx.Node]) -> None:
    """What stays outside now runs before the whole region; it must not write what the region touched before it."""
    position = {node: i for i, node in enumerate(order)}
    for write in left:
        target = written_memory(write)
        if target is None:
            continue
        for node in inside:
            if position[node] < position[write] and any(depth.base(a) is target for a in node.all_input_nodes):
                raise RegionError(
                    "FX106",
                    write,
                    f"{op_name(write)} writes a tensor that {node.name}, which may not run, reads before",
                )


# -- writes after the branches --------------------------------------------------------------------------------------


def defer_writes(writes: Sequence[fx.Node], rewriter: Rewriter) -> list[fx.Node]:
    """Move cache writes to the end of the graph and let attention read a copy with the new rows."""
    graph = rewriter.graph
    for node in writes:
        if op_name(node) != "index_copy_" or not _is_cache(node.args[0]):
            raise RegionError(
                "FX208", node, f"{op_name(node)} updates the cache in place, which torch.cond refuses in its branches "
                f"before torch 2.12 (this is {torch.__version__})"
            )  # fmt: skip
    output = next(iter(graph.find_nodes(op="output")))
    deferred: list[fx.Node] = []
    for node in writes:
        target = node.args[0]
        assert isinstance(target, fx.Node)
        copied = rewriter.method("index_copy", node.args, node.kwargs, like=node, before=node)
        position = {n: i for i, n in enumerate(graph.nodes)}
        here = position[node]
        readers = [
            (user, read)
            for read in (target, node)
            for user in list(read.users)
            if user is not copied and user is not node and position[user] > here
        ]
        late = rewriter.method("index_copy_", node.args, node.kwargs, like=node, before=output)
        for user, read in readers:
            if user is not late and user.op != "output":
                user.replace_input_with(read, copied)
        if any(user.op == "output" for user in node.users):
            output.replace_input_with(node, late)
        rewriter.erase([node])
        deferred.append(late)
    return deferred


def _is_cache(node: Any) -> bool:
    """Whether a node is a cache itself, not a view of one: ``[B, H, S, D]`` in floating point."""
    if not isinstance(node, fx.Node) or depth.base(node) is not node:
        return False
    tensor = depth.value(node)
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.ndim == 4


# -- branches -------------------------------------------------------------------------------------------------------


def exit_nodes(region: Region, alias: Mapping[fx.Node, fx.Node], layers: Sequence[Layer]) -> list[fx.Node]:
    """The nodes of a region that remain when what `alias` names is replaced: each layer's output by its input, the
    logits by those of the check. Raises where a cache entry needs more of a layer than its norm and projections."""
    needed: set[fx.Node] = set()
    waiting = [resolve(node, alias) for node in region.results] + list(region.effects)
    private = [n for n in region.nodes if written_memory(n) in region.members]
    while waiting:
        while waiting:
            node = waiting.pop()
            if node in region.members and node not in needed:
                needed.add(node)
                waiting.extend(resolve(a, alias) for a in node.all_input_nodes)
        waiting = [n for n in private if n not in needed and written_memory(n) in needed]
    for layer in layers:
        for node in layer.nodes:
            if node in needed and ("attention" in op_name(node) or op_name(node) == "softmax"):
                raise RegionError(
                    "FX208", node, "the cache of a layer is computed from an attention, not from its input"
                )
    return [n for n in region.nodes if n in needed]


def resolve(node: fx.Node, alias: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """What stands for `node` in the end."""
    while node in alias:
        node = alias[node]
    return node


@dataclass
class Branch:
    """One branch in the making: its graph, and the nodes outside that its placeholders stand for."""

    graph: fx.Graph
    inputs: dict[fx.Node, fx.Node]
    attributes: list[fx.Node]
    """``get_attr`` nodes outside that were copied in: the branches of conditionals within."""


def outline(nodes: Sequence[fx.Node], results: Sequence[fx.Node], alias: Mapping[fx.Node, fx.Node]) -> Branch:
    """Copy `nodes` (in graph order) into a graph of their own that returns `results`; the originals stay."""
    members = dict.fromkeys(nodes)
    inputs: dict[fx.Node, fx.Node] = {}
    made_inside: dict[fx.Node, None] = {}
    attributes: list[fx.Node] = []
    waiting = [resolve(a, alias) for node in nodes for a in node.all_input_nodes] + [resolve(r, alias) for r in results]
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    while waiting:
        node = waiting.pop(0)
        if node in members or node in made_inside or node in known:
            continue
        # Views are taken again inside: two operands must not share memory.
        shared = is_view(node) and node.op in ("call_function", "call_method")
        if isinstance(depth.value(node), (torch.Tensor, torch.SymInt)) and not shared:
            known[node] = inputs[node] = graph.placeholder(f"operand_{len(inputs)}")
            known[node].meta = {k: v for k, v in node.meta.items() if k in ("example_value", "custom")}
        elif node.op == "placeholder":
            raise RegionError("FX102", node, f"{node.name} is neither a tensor nor a size")
        else:  # shapes, types, views, branches of conditionals within: made again inside
            made_inside[node] = None
            waiting.extend(resolve(a, alias) for a in node.all_input_nodes)
    source = nodes[0].graph if nodes else None
    order = {node: i for i, node in enumerate(source.nodes)} if source is not None else {}
    for node in sorted((*made_inside, *members), key=order.__getitem__):
        known[node] = graph.node_copy(node, lambda a: known[resolve(a, alias)])
        known[node].meta = copy.copy(node.meta)
        if node.op == "get_attr":
            attributes.append(node)
    returned: list[fx.Node] = []
    for result in results:
        made = known[resolve(result, alias)]
        if made.op == "placeholder" or depth.base(made) is not made or made in returned:
            cloned = graph.call_method("clone", (made,))  # a branch must not return what it was given, nor one twice
            cloned.meta = {k: v for k, v in made.meta.items() if k in ("example_value", "custom", "nn_module_stack")}
            made = cloned
        returned.append(made)
    graph.output(tuple(returned))
    return Branch(graph, inputs, attributes)


def _module(part: Branch, operands: Sequence[fx.Node], owner: torch.nn.Module) -> fx.GraphModule:
    """The branch with one placeholder for each operand, in their order."""
    graph = part.graph
    first = next(iter(graph.nodes))
    for number, operand in enumerate(operands):
        with graph.inserting_before(first):
            made = graph.placeholder(f"input_{number}")
        old = part.inputs.get(operand)
        made.meta = {k: v for k, v in operand.meta.items() if k in ("example_value", "custom")}
        if old is not None:
            old.replace_all_uses_with(made)
    for old in part.inputs.values():
        graph.erase_node(old)
    named = {str(n.target): getattr(owner, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule(named, graph)


def insert_cond(
    region: Region, predicate: fx.Node, exit_branch: Branch, rewriter: Rewriter, label: str, before: fx.Node
) -> None:
    """Replace a region by the cond of its branches, inserted before a node."""
    graph, results = rewriter.graph, region.results
    owner = graph.owning_module
    if owner is None:
        raise RegionError("FX105", region.state, "the graph belongs to no module that could own the branches")
    for node in results:
        if not isinstance(depth.value(node), torch.Tensor):
            raise RegionError("FX204", node, "a size computed after the exit leaves the graph")
    run_branch = outline(region.nodes, results, {})
    order = {node: i for i, node in enumerate(graph.nodes)}
    operands = sorted({*exit_branch.inputs, *run_branch.inputs}, key=order.__getitem__)
    taken = []
    for kind, part in (("exit", exit_branch), ("run", run_branch)):
        name = f"fxopt_{label}_{kind}"
        setattr(owner, name, _module(part, operands, owner))
        with graph.inserting_before(before):
            node = graph.get_attr(name)
        node.meta["example_value"] = getattr(owner, name)
        _stamp(node, [region.state], rewriter)
        taken.append(node)
    with graph.inserting_before(before):
        cond = graph.call_function(torch.ops.higher_order.cond, (predicate, *taken, tuple(operands)))
    cond.meta["example_value"] = tuple(depth.value(node) for node in results)
    _stamp(cond, [region.state, *region.nodes], rewriter)
    for number, node in enumerate(results):
        with graph.inserting_before(before):
            part_node = graph.call_function(operator.getitem, (cond, number))
        part_node.meta["example_value"] = depth.value(node)
        _stamp(part_node, [node], rewriter)
        node.replace_all_uses_with(part_node, delete_user_cb=lambda u: u not in region.members, propagate_meta=False)
    rewriter.changed = True
    for node in reversed(region.nodes):
        graph.erase_node(node)
    for node in run_branch.attributes:
        if not node.users:
            graph.erase_node(node)
            delattr(owner, str(node.target))


def _stamp(node: fx.Node, sources: list[fx.Node], rewriter: Rewriter) -> None:
    provenance.stamp(node, sources, rewriter.pass_name, next(rewriter.numbers))
