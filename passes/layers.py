"""Find the layers of a model in its captured graph: by module containers and data flow, never by names of models.

A *stack* is a container ``X`` whose numbered members ``X.0``, ``X.1``, ... are called one after another, each turning
a residual stream into one of the same shape by adding parts to it (:mod:`fxopt.passes.streams`)::

    embed -> [ x0 ] -> model.layers.0 -> [ x1 ] -> model.layers.1 -> [ x2 ] -> ... -> norm -> lm_head

What else goes in (rotary tables, masks, position biases, encoder states, caches) and out (caches, biases computed
once for all layers, attention weights) is left alone. Three roads, tried in this order:

1. members that hold their own residual additions: almost every model;
2. members whose additions are written in the loop of the parent (``x = x + block(norm(x))``): the layer then reaches
   from one stream value to the next;
3. no container at all: the whole graph is one layer, because that layer was compiled on its own.

What repeats and is no layer is listed with the reason, for the report.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from torch import fx
from torch._ops import HigherOrderOperator

from fxopt.passes.containers import Call, Container, containers_of, split_member
from fxopt.passes.provenance import module_path, source_line
from fxopt.passes.streams import (
    Part,
    Stream,
    activations,
    live_in,
    live_out,
    mixes,
    op_name,
    shape_text,
    signature,
    streams_through,
    value,
)

__all__ = ["Layer", "Part", "Rejection", "Stack", "Structure", "find_layers", "module_path", "source_line"]

SHAPE_CHANGES = "FX110"
NOT_CHAINED = "FX111"
NOTHING_REPEATED = "FX112"
NO_STREAM = "FX114"


@dataclass(frozen=True)
class Layer:
    """One call of one layer. Skipping it means replacing `output` by `input`."""

    index: int
    """Number in the container; for one module that is called again and again, the number of the call."""
    path: str
    """Dotted path of the module, ``"model.layers.3"``; empty when the layer is the compiled model itself."""
    call: int
    """0 for the first call of this module in the graph, 1 for the second."""
    input: fx.Node
    """The residual stream as the layer receives it."""
    output: fx.Node
    """The residual stream as the layer leaves it: same shape and type as `input`."""
    nodes: tuple[fx.Node, ...]
    """What runs inside this call, in graph order, cache writes and other side effects included; no placeholders."""
    parts: tuple[Part, ...]
    """What the layer adds to the stream, in the order it is computed."""

    @property
    def attention(self) -> tuple[Part, ...]:
        """The attention parts: one, or two with cross-attention."""
        return tuple(part for part in self.parts if part.kind == "attention")

    @property
    def mlp(self) -> tuple[Part, ...]:
        """The parts that are no attention."""
        return tuple(part for part in self.parts if part.kind == "mlp")


@dataclass(frozen=True)
class Stack:
    """Layers chained through one residual stream, in the order they run.

    As a rule ``layers[i].output is layers[i + 1].input``; where the model does something to the stream between two
    layers, the later input is computed from the earlier output.
    """

    path: str
    """Dotted path of the container, ``"model.layers"``."""
    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        kinds = list(dict.fromkeys(" + ".join(part.kind for part in layer.parts) for layer in self.layers))
        calls = f" ({len(self.layers)} calls)" if any(layer.call for layer in self.layers) else ""
        count = len({layer.path for layer in self.layers})
        name = self.path or "the compiled module"
        return f"{name}: {count} layer{'s' * (count != 1)}{calls}, stream {shape_text(self.layers[0].input)}, " + (
            " or ".join(kinds)
        )


@dataclass(frozen=True)
class Rejection:
    """A container that repeats modules and is no stack of layers, or the graph when it has none."""

    path: str
    code: str
    reason: str
    node: fx.Node | None


@dataclass(frozen=True)
class Structure:
    """The stacks of a graph and what was not taken for one."""

    stacks: tuple[Stack, ...] = ()
    rejected: tuple[Rejection, ...] = ()

    def layers(self) -> Iterator[Layer]:
        """All layers of all stacks."""
        for stack in self.stacks:
            yield from stack.layers

    def layer_of(self, node: fx.Node) -> Layer | None:
        """The layer a node runs in."""
        return self._owner.get(node)

    @property
    def _owner(self) -> dict[fx.Node, Layer]:
        cached: dict[fx.Node, Layer] | None = self.__dict__.get("_owners")
        if cached is None:
            cached = {node: layer for layer in self.layers() for node in layer.nodes}
            object.__setattr__(self, "_owners", cached)
        return cached

    def __str__(self) -> str:
        lines = [str(stack) for stack in self.stacks]
        lines += [f"{r.path or 'this graph'}: {r.code} {r.reason}" for r in self.rejected]
        return "\n".join(lines)


def find_layers(graph: fx.Graph) -> Structure:
    """The stacks of repeated layers in a torch-level graph that Dynamo captured.

    Reads ``nn_module_stack`` and ``example_value``; changes nothing. Works with static and symbolic shapes, with and
    without caches, in inference and training.
    """
    return _Search(graph).run()


class _Search:
    """One search through one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.position = {node: number for number, node in enumerate(graph.nodes)}
        self.active = activations(graph)
        self.stacks: list[Stack] = []
        self.rejected: dict[str, Rejection] = {}
        self.taken: set[fx.Node] = set()

    def run(self) -> Structure:
        containers = containers_of(self.graph)
        singles: list[Container] = []
        for container in containers:
            if len(container.calls) > 1:
                self._by_members(container)
            else:
                singles.append(container)
        self._take_loops(containers)
        self._take_singles(singles)
        self._take_whole_graph()
        if not self.stacks and not self.rejected:
            self._reject("", NOTHING_REPEATED, self._nothing_repeats(), None)
        self.stacks.sort(key=lambda stack: self.position[stack.layers[0].output])
        return Structure(tuple(self.stacks), tuple(self.rejected.values()))

    # -- the three roads ----------------------------------------------------------------------------------------

    def _by_members(self, container: Container) -> None:
        """First road: every member holds its own additions."""
        calls = container.ordered
        if self._inside(calls):
            if container.same_kind and not self._chained(calls):
                self._reject(container.path, NOT_CHAINED, "parallel modules inside a layer", calls[0].first)
            return
        for call in calls:
            call.streams = streams_through(call.nodes, self.active)
        members = {node for call in calls for node in call.nodes}
        runs = [run for run in self._runs(calls, members) if len(run) > 1]
        for run in runs:
            self._accept(container.path, run)
        left_out = len(calls) - sum(map(len, runs))
        if left_out and container.same_kind:
            stray = next(call for call in calls if call.first not in self.taken)
            self._reject(container.path, *self._why_not(calls, stray), stray.first)

    def _take_loops(self, containers: list[Container]) -> None:
        """Second road: the additions stand in the parent's loop, between the calls of the members."""
        candidates = [c for c in containers if len(c.calls) > 1 and not self._inside(c.ordered)]
        candidates.sort(key=lambda c: -sum(len(call.nodes) for call in c.ordered))
        for container in candidates:
            calls = sorted(container.ordered, key=lambda call: self.position[call.first])
            if self._inside(calls) or not all(any(mixes(n) for n in call.nodes) for call in calls):
                continue
            spans = self._spans(calls)
            if spans is None:
                continue
            members = {node for span in spans for node in span.nodes}
            for run in self._runs(spans, members):
                if len(run) > 1:
                    self._accept(container.path, [self._trimmed(call, stream) for call, stream in run])
                    self.rejected.pop(container.path, None)

    def _take_singles(self, containers: list[Container]) -> None:
        """A container with one member called once: a layer if it has both parts and holds no stack itself."""
        for container in containers:
            call = container.ordered[0]
            if self._inside([call]):
                continue
            holding = [stack for stack in self.stacks if f"{stack.path}.".startswith(f"{call.path}.")]
            if holding and not all(_is_one_block(stack) for stack in holding):
                continue
            found = streams_through(call.nodes, self.active)
            whole = [s for s in found if (kinds := {p.kind for p in s.parts}) >= _BOTH or "routed" in kinds]
            if whole:
                self.stacks = [stack for stack in self.stacks if stack not in holding]
                self._accept(container.path, [(call, whole[0])])

    def _take_whole_graph(self) -> None:
        """Third road: one layer compiled on its own. The root module is not on the module stack."""
        if self.stacks and not (len(self.stacks) == 1 and _is_one_block(self.stacks[0])):
            return
        nodes = {node: None for node in self.graph.nodes if node.op not in ("placeholder", "output")}
        if not nodes:
            return
        found = streams_through(nodes, self.active)
        ends = {(stream.input, stream.output) for stream in found if stream.input.op == "placeholder"}
        if len(ends) == 1:
            stream = next(s for s in found if s.input.op == "placeholder")
            self.stacks, self.rejected = [], {}
            self._accept("", [(Call("", 0, None, nodes), stream)])

    # -- chains -------------------------------------------------------------------------------------------------

    def _runs(self, calls: list[Call], members: Collection[fx.Node]) -> list[list[tuple[Call, Stream]]]:
        """Longest sequences of calls in which each one's stream continues the one before."""
        runs: list[list[tuple[Call, Stream]]] = []
        for call in sorted(calls, key=lambda call: self.position[call.first]):
            previous = runs[-1][-1] if runs else None
            linked = None
            if previous is not None:
                linked = self._link(previous[0], call, members)
            if previous is not None and linked is not None:
                runs[-1][-1] = (previous[0], linked[0])
                runs[-1].append((call, linked[1]))
            elif call.streams:
                runs.append([(call, self._preferred(call, members))])
        return runs

    def _link(self, before: Call, after: Call, members: Collection[fx.Node]) -> tuple[Stream, Stream] | None:
        """Streams of two calls that are one stream."""
        for direct in (True, False):
            for left in before.streams:
                for right in after.streams:
                    if left.output is right.input if direct else self._leads(left.output, right.input, members):
                        before.streams = [s for s in before.streams if s.output is left.output]
                        same_end = [s for s in before.streams if s.input is left.input]
                        return same_end[0], right
        return None

    def _preferred(self, call: Call, members: Collection[fx.Node]) -> Stream:
        """Of several paths into a first layer, the one whose input the other layers do not read."""
        own = [s for s in call.streams if not any(u in members and u not in call.nodes for u in s.input.users)]
        return (own or call.streams)[0]

    def _leads(self, source: fx.Node, target: fx.Node, members: Collection[fx.Node]) -> bool:
        """Whether `target` is computed from `source` outside of the members of the container."""
        if signature(source) != signature(target):
            return False
        waiting, seen = [target], set()
        while waiting:
            node = waiting.pop()
            if node is source:
                return True
            if node not in seen and node not in members and self.position[node] > self.position[source]:
                seen.add(node)
                waiting.extend(node.all_input_nodes)
        return False

    def _spans(self, calls: list[Call]) -> list[Call] | None:
        """Regions from the first node of each call up to the first of the next; None when calls interleave."""
        order = list(self.graph.nodes)
        starts = [self.position[call.first] for call in calls]
        ends = [max(self.position[node] for node in call.nodes) for call in calls]
        if any(end >= start for end, start in zip(ends, starts[1:], strict=False)):
            return None
        spans = []
        for call, start, stop in zip(calls, starts, starts[1:], strict=False):
            nodes = dict.fromkeys(node for node in order[start:stop] if node.op != "placeholder")
            span = Call(call.path, call.call, call.kind, nodes)
            span.streams = streams_through(nodes, self.active)
            # The next layer's norm runs before its first own node: the stream is what the next span adds to.
            span.streams = [s for s in span.streams if any(self.position[u] >= stop for u in s.output.users)]
            spans.append(span)
        last = self._last_span(calls[-1], spans[-1], starts[-2], starts[-1], order)
        return [*spans, last] if last is not None else spans

    def _last_span(self, call: Call, model: Call, model_start: int, start: int, order: list[fx.Node]) -> Call | None:
        """The last layer of a loop ends where it would if it looked like the one before it."""
        for stream in model.streams:
            stop = start + self.position[stream.output] - model_start
            if stop < len(order) and op_name(order[stop]) == op_name(stream.output):
                nodes = dict.fromkeys(node for node in order[start : stop + 1] if node.op != "placeholder")
                if set(call.nodes) <= set(nodes):
                    span = Call(call.path, call.call, call.kind, nodes)
                    span.streams = [s for s in streams_through(nodes, self.active) if s.output is order[stop]]
                    if span.streams:
                        return span
        return None

    def _trimmed(self, span: Call, stream: Stream) -> tuple[Call, Stream]:
        """A span moved to where its layer begins and ends: after the stream comes in, up to where it goes out."""
        order = list(self.graph.nodes)
        begin, end = self.position[stream.input], self.position[stream.output]
        derived = {stream.input}
        nodes: dict[fx.Node, None] = {}
        for node in order[begin + 1 : end + 1]:
            if node.op != "placeholder" and (node in span.nodes or any(a in derived for a in node.all_input_nodes)):
                derived.add(node)
                nodes[node] = None
        return replace(span, nodes=nodes), stream

    # -- verdicts -----------------------------------------------------------------------------------------------

    def _inside(self, calls: list[Call]) -> bool:
        """Whether a container lies in layers that were found already."""
        return any(node in self.taken for call in calls for node in call.nodes)

    def _chained(self, calls: list[Call]) -> bool:
        """Whether any member reads, directly or through others, what an earlier one made."""
        reached: set[fx.Node] = set(calls[0].nodes)
        for node in list(self.graph.nodes)[self.position[calls[0].first] :]:
            if any(a in reached for a in node.all_input_nodes):
                reached.add(node)
        return all(any(a in reached for a in live_in(call.nodes)) for call in calls[1:])

    def _why_not(self, calls: list[Call], stray: Call) -> tuple[str, str]:
        if not self._chained(calls):
            return NOT_CHAINED, "the modules do not feed one another: parallel branches are no stack of layers"
        sources = [n for n in live_in(stray.nodes) if n in self.active]
        results = [n for n in live_out(stray.nodes) if value(n) is not None]
        if not sources or not results:
            return NOT_CHAINED, f"{stray.path} passes no float tensor on"
        if not {signature(n) for n in sources} & {signature(n) for n in results}:
            shapes = f"{shape_text(sources[0])} to {shape_text(results[0])}"
            return SHAPE_CHANGES, f"{stray.path} maps {shapes}: no residual stream of one shape"
        if stray.streams:
            return NOT_CHAINED, f"{stray.path} does not continue the residual stream of the modules before it"
        return NO_STREAM, f"nothing is added to the input of {stray.path}: without a residual path it cannot be skipped"

    def _nothing_repeats(self) -> str:
        reason = "no container of repeated modules, and no residual path from an input of the graph to an output"
        hidden = sorted({op_name(n) for n in self.graph.nodes if isinstance(n.target, HigherOrderOperator)})
        return f"{reason}; regions inside {', '.join(hidden)} are not searched" if hidden else reason

    def _reject(self, path: str, code: str, reason: str, node: fx.Node | None) -> None:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        self.rejected.setdefault(pattern, Rejection(pattern, code, reason, node))

    def _accept(self, path: str, run: list[tuple[Call, Stream]]) -> None:
        members = {call.path for call, _ in run}
        layers = []
        for number, (call, stream) in enumerate(run):
            split = split_member(call.path)
            index = number if len(members) == 1 or split is None else split[1]
            nodes = tuple(call.nodes)
            layers.append(Layer(index, call.path, call.call, stream.input, stream.output, nodes, stream.parts))
            self.taken.update(nodes)
        self.stacks.append(Stack(path, tuple(layers)))


_BOTH = {"attention", "mlp"}


def _is_one_block(stack: Stack) -> bool:
    """Whether a stack is really the sublayers of one layer: attention once or twice, then one MLP."""
    kinds = [[part.kind for part in layer.parts] for layer in stack.layers]
    return kinds in ([["attention"], ["mlp"]], [["attention"], ["attention"], ["mlp"]])
