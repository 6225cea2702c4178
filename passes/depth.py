"""The executor that the depth techniques share: take a layer, or a part of it, out of a captured graph.

What a skipped layer leaves behind is decided here, once. Its counters still advance, because positions and masks of
other layers are derived from them. Its keys and values (DESIGN: KV policy ``none``) are not computed: a static cache
is not written, a growing cache gets a stand-in of the right length that occupies no memory. With ``keep_rows`` (a
layer that is skipped in some steps only) the cache does advance, by all-zero rows, which
:func:`fxopt.passes.cache_rows.attend_to_written_rows` later recognises.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.passes import cache_rows
from fxopt.passes.context import PassContext
from fxopt.passes.layers import Layer, Part, Stack
from fxopt.passes.mod_reference import ROUTED
from fxopt.passes.modules import ATTENTION
from fxopt.passes.nodes import name_of
from fxopt.passes.provenance import module_path
from fxopt.passes.rewriter import Rewriter, is_view, writes_in_place


@dataclass(frozen=True)
class Refusal:
    """Why a layer cannot be taken out."""

    code: str
    node: fx.Node
    message: str


def value(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta.get("example_value")


def base(node: fx.Node) -> fx.Node:
    """The node whose memory `node` shows, followed through views and in-place results."""
    while node.op in ("call_function", "call_method") and (is_view(node) or writes_in_place(node)) and node.args:
        first = node.args[0]
        if not isinstance(first, fx.Node):
            break
        node = first
    return node


def forward_slice(start: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """Nodes of `within` that depend on any of `start`."""
    reached: set[fx.Node] = set()
    queue = list(start)
    while queue:
        for user in queue.pop().users:
            if user in within and user not in reached:
                reached.add(user)
                queue.append(user)
    return reached


def backward_slice(start: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """`start` and the nodes of `within` that it depends on."""
    reached = set(start)
    queue = list(reached)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source in within and source not in reached:
                reached.add(source)
                queue.append(source)
    return reached


def is_partial(stack: Stack, graph: fx.Graph) -> bool:
    """Whether only some layers of the stack were found: a graph break, or layers that are routed in a branch."""
    if stack.layers[0].index != 0 or not is_placed(stack) or _routed_elsewhere(stack, graph):
        return True
    return ends_in_a_break(graph) and all(user.op == "output" for user in stack.layers[-1].output.users)


def _routed_elsewhere(stack: Stack, graph: fx.Graph) -> bool:
    """Whether a routed layer with the stack's container is not among the layers of the stack."""
    paths = {path for node in graph.nodes if (path := (node.meta.get("custom") or {}).get(ROUTED))}
    found = {f".{layer.path}" for layer in stack.layers}
    return any(
        f".{stack.path}".endswith(f".{path.rpartition('.')[0]}") and not any(f.endswith(f".{path}") for f in found)
        for path in paths
    )


def ends_in_a_break(graph: fx.Graph) -> bool:
    """Whether the graph is a part of the model that ends where Dynamo could not go on."""
    reason = getattr(graph.owning_module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def is_placed(stack: Stack) -> bool:
    """Whether the numbers of its layers are known: a layer that was compiled on its own has none."""
    return stack.layers[0].path[-1:].isdigit() or len(stack.layers) > 1


def phase_of(layer: Layer) -> str:
    """``"decode"``: one new token and a cache; ``"continuation"``: several; ``"prompt"``: no cache, or an empty one.

    A static cache that happens to be empty is told apart at run time, see :class:`OriginalGraph`.
    """
    if not cache_rows.cache_inputs(layer):
        return "prompt"
    length = value(layer.input).shape[-2]
    return "decode" if isinstance(length, int) and length == 1 else "continuation"


def beside_attention(layer: Layer, parts: Sequence[Part]) -> str:
    """The module that multiplies in a part of the layer beside one that attends (a recurrence, an MLP); empty without.

    Where both are summed before they join the residual stream, the part is both.
    """
    own, waiting = set(layer.nodes), [part.branch for part in parts]
    seen = {layer.input, *(part.stream for part in parts)}
    paths = set()
    while waiting:
        node = waiting.pop()
        if node in seen or node not in own:
            continue
        seen.add(node)
        waiting += node.all_input_nodes
        if name_of(node) in ("linear", "addmm"):
            paths.add(module_path(node).removeprefix(layer.path + "."))
    others = sorted(path for path in paths if path and not ATTENTION.search(path))
    return others[0] if others and len(others) < len(paths) else ""


def keeps_running_state(layer: Layer) -> bool:
    """Whether a layer of one token without keys and values writes to a tensor that is handed in: a convolution's or a
    recurrence's state, which does not say whether anything was seen."""
    if value(layer.input).shape[-2] != 1 or cache_rows.cache_inputs(layer):
        return False
    return any(n.op == "placeholder" and value(n).is_floating_point() for n in _written(layer))


def _written(layer: Layer) -> set[fx.Node]:
    """What the nodes of a layer write in place."""
    return {base(n) for n in layer.nodes if writes_in_place(n) and n.args and isinstance(n.args[0], fx.Node)}


def refusal(layer: Layer) -> Refusal | None:
    """Why `layer` cannot be taken out, or None."""
    before, after = value(layer.input), value(layer.output)
    if tuple(before.shape) != tuple(after.shape):
        return Refusal("FX110", layer.output, f"input {tuple(before.shape)}, output {tuple(after.shape)}")
    for node in layer.nodes:
        if writes_in_place(node) and node.args and isinstance(node.args[0], fx.Node) and base(node) is layer.input:
            return Refusal("FX106", node, f"{node.target} writes the residual stream in place")
    for user in layer.output.users:
        if user not in layer.nodes and writes_in_place(user) and user.op != "output" and user.args[0] is layer.output:
            return Refusal("FX106", user, f"{user.target} writes the layer's output in place")
    return None


def skip_layer(layer: Layer, context: PassContext, *, keep_rows: bool) -> int:
    """Let what follows `layer` read what came before it, and erase the layer; returns the number of erased nodes."""
    rewriter = context.rewriter
    if keep_rows:
        cache_rows.write_empty_rows(layer, rewriter)
    _bypass(layer.output, layer.input, rewriter)
    if not keep_rows:
        _put_stand_ins(layer, rewriter)
    return _prune(layer, rewriter, discard_cache=not keep_rows)


def skip_parts(layer: Layer, parts: Sequence[Part], context: PassContext, *, keep_rows: bool) -> int:
    """Drop the contribution of `parts` to the residual stream; returns the number of erased nodes."""
    rewriter = context.rewriter
    attention = [part for part in parts if part.kind == "attention"]
    if attention and keep_rows:
        cache_rows.write_empty_rows(layer, rewriter)
    for part in reversed(parts):
        _bypass(part.add, part.stream, rewriter)
    if attention and not keep_rows:
        _put_stand_ins(layer, rewriter)
    return _prune(layer, rewriter, discard_cache=bool(attention) and not keep_rows)


def _bypass(node: fx.Node, by: fx.Node, rewriter: Rewriter) -> None:
    if value(node).dtype != value(by).dtype:
        by = rewriter.method("to", (by, value(node).dtype), like=node, after=node)
    rewriter.replace(node, by, only=lambda user: user is not by)
    if writes_in_place(node):  # x += part: the addition would still happen, in the memory of x
        rewriter.erase([node])


def _is_cache_like(node: fx.Node) -> bool:
    tensor = value(node)
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.ndim >= 3


def _prune(layer: Layer, rewriter: Rewriter, *, discard_cache: bool) -> int:
    """Erase the nodes of `layer` that nothing outside needs: neither a reader nor an effect that has to stay."""
    present = set(rewriter.graph.nodes)
    inside = {node for node in layer.nodes if node in present}
    effects = [node for node in inside if writes_in_place(node)]

    def discarded(node: fx.Node) -> bool:
        target = base(node)
        if target is node or not _is_cache_like(target):
            return False
        is_cache = target.op == "placeholder" or any(user.op == "output" for user in target.users)
        return is_cache and discard_cache

    def is_private(node: fx.Node) -> bool:
        return base(node) in inside and base(node) is not node

    needed = backward_slice(
        [n for n in inside if any(u not in inside for u in n.users)]
        + [n for n in effects if not discarded(n) and not is_private(n)],
        inside,
    )
    while True:  # a private buffer that is needed needs the writes into it
        more = [n for n in effects if n not in needed and is_private(n) and base(n) in needed and not discarded(n)]
        if not more:
            break
        needed |= backward_slice(more, inside)
    return rewriter.erase(inside - needed)


def _put_stand_ins(layer: Layer, rewriter: Rewriter) -> None:
    """Replace keys and values that leave the graph as cache by tensors of that size without memory.

    A recurrence's state, which the next call writes in place, gets its memory.
    """
    inside = set(layer.nodes)
    written = _written(layer)
    depends = forward_slice([layer.input], inside)
    for node in layer.nodes:
        readers = [user for user in node.users if user not in inside]
        if not readers or node not in depends or node is layer.output:
            continue
        tensor = value(node)
        if not (isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and tensor.is_floating_point()):
            continue
        if any(user.op != "output" for user in readers):
            continue
        sizes = size_nodes(node, layer, rewriter)
        if sizes is None:
            continue
        kind = {"dtype": tensor.dtype, "device": tensor.device}
        if base(node) in written:
            stand_in = rewriter.call(torch.zeros, (tuple(sizes),), kind, like=node, before=node)
        else:
            zero = rewriter.call(torch.zeros, ((1, 1, 1, 1),), kind, like=node, before=node)
            stand_in = rewriter.method("expand", (zero, *sizes), like=node, before=node)
        rewriter.replace(node, stand_in, only=lambda user: user.op == "output")


def size_nodes(node: fx.Node, layer: Layer, rewriter: Rewriter) -> list[Any] | None:
    """The sizes of `node` as ints and size nodes that do not depend on the layer's computation; None if unknown."""
    sizes: list[Any] = []
    stream = value(layer.input)
    for dim, size in enumerate(value(node).shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        found = _size_of(size, stream, layer.input, rewriter, node)
        if found is None:
            found = _size_of_cat(node, dim, layer, rewriter)
        if found is None:
            return None
        sizes.append(found)
    return sizes


def _size_of(size: Any, tensor: torch.Tensor, source: fx.Node, rewriter: Rewriter, near: fx.Node) -> fx.Node | None:
    for dim, candidate in enumerate(tensor.shape):
        if not isinstance(candidate, int) and candidate.node.expr == size.node.expr:
            return rewriter.call(torch.ops.aten.sym_size.int, (source, dim), like=near, before=near)
    return None


def _size_of_cat(node: fx.Node, dim: int, layer: Layer, rewriter: Rewriter) -> fx.Node | None:
    """Size along the growing dimension of ``cat((past, new))``: the past's own plus the new tokens'."""
    if getattr(node.target, "__name__", "") not in ("cat", "concat"):
        return None
    total: Any = None
    for operand in node.args[0]:  # type: ignore[union-attr]
        tensor = value(operand)  # type: ignore[arg-type]
        if tensor.ndim == 1 and tensor.shape[0] == 0:
            continue
        size = tensor.shape[dim]
        part: Any = size
        if not isinstance(size, int):
            source = operand if operand.op == "placeholder" else layer.input  # type: ignore[union-attr]
            part = _size_of(size, value(source), source, rewriter, node)  # type: ignore[arg-type]
            if part is None:
                return None
        total = part if total is None else rewriter.call(operator.add, (total, part), like=node, before=node)
    return total


class OriginalGraph:
    """The graph as captured, run as it stands for the one case that a decode graph cannot exclude: an empty cache.

    With a static cache, a prompt of one token and a decode step are the same graph; only the cache's own counter
    tells them apart. The prompt then runs the captured graph eagerly, once per conversation.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._copy: fx.GraphModule | None = None
        self._counter: int | None = None

    def needed_for_empty_cache(self, layer: Layer, stack: Stack) -> bool:
        """Keep the graph if `layer` has a static cache; False where its fill level cannot be seen.

        All layers of a stack see the same tokens, so that any of their counters tells. A sliding window that rolls
        is full, and needs no counter.
        """
        if not cache_rows.is_static(layer) or any(cache_rows.is_rolled(other) for other in stack.layers):
            return True
        counter = next(filter(None, map(cache_rows.length_counter, (layer, *stack.layers))), None)
        if counter is None:
            return False
        if self._copy is None:
            copied = fx.Graph()
            copied.output(copied.graph_copy(self._graph, {}))
            self._copy = fx.GraphModule(self._graph.owning_module or torch.nn.Module(), copied)
            self._counter = [n for n in self._graph.nodes if n.op == "placeholder"].index(counter)
        return True

    def finish(self, context: PassContext) -> None:
        """Hand the run-time choice to the backend."""
        if self._copy is None:
            return
        original, counter = self._copy, self._counter
        assert counter is not None

        def choose(compiled: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                return original(*args) if int(args[counter]) == 0 else compiled(*args)

            return run

        context.call_wrappers.append(choose)
        context.note(
            "", "the static cache's counter is read on the host at each step: a one-token prompt runs every layer",
            code="FX604",
        )  # fmt: skip
