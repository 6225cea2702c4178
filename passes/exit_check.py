"""What is computed at an exit: the model's own head on the state there, a confidence, and the decision.

The head is everything between the last layer's output and the logits: final norm, slices, projection, soft cap. It is
copied node by node, so that tied and capped heads need no case of their own. Only the last position is scored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxopt.passes import cache_rows, confidence, depth, inputs, own_modules
from fxopt.passes.exit_modules import OwnModules
from fxopt.passes.exit_region import RegionError
from fxopt.passes.layers import Stack
from fxopt.passes.nodes import argument, value_of
from fxopt.passes.rewriter import Rewriter
from fxopt.passes.streams import op_name
from fxopt.passes.technique import SettingError


@dataclass(frozen=True)
class Head:
    """The nodes from the last layer's output to the logits, both ends included for the logits."""

    start: fx.Node
    logits: fx.Node
    nodes: tuple[fx.Node, ...]
    projection: fx.Node
    vocabulary: int

    @property
    def weight(self) -> fx.Node:
        return self.projection.args[1]  # type: ignore[return-value]

    @property
    def classifies(self) -> bool:
        """Logits ``[B, C]`` for the whole input, not ``[B, S, V]`` for each position."""
        return depth.value(self.logits).ndim == 2


def find_head(graph: fx.Graph, last: fx.Node) -> Head:
    """The region between the last layer and the logits. Raises :class:`RegionError` when there is none."""
    output = next(iter(graph.find_nodes(op="output")))
    order = list(graph.nodes)
    after = set(order[order.index(last) + 1 :])
    dependent = depth.forward_slice([last], after)
    ends = []
    for node in output.all_input_nodes:
        if node not in dependent:
            continue
        nodes = [n for n in order if n in depth.backward_slice([node], dependent)]
        products = [n for n in nodes if op_name(n) == "linear" and n in dependent]
        if products:
            ends.append((node, nodes, products[-1]))
    if len(ends) != 1:
        raise RegionError(
            "FX101", output, f"{len(ends)} outputs of the graph are a projection of the last layer's output; an exit "
            "needs one, the logits"
        )  # fmt: skip
    logits, nodes, projection = ends[0]
    tensor = depth.value(logits)
    weight = projection.args[1]
    if tensor.ndim not in (2, 3) or not isinstance(weight, fx.Node) or tensor.shape[-1] != depth.value(weight).shape[0]:
        raise RegionError(
            "FX101", logits, f"logits of shape {tuple(tensor.shape)}: an exit scores [B, S, V] of a decoder or [B, C] "
            "of a classifier, with V or C the rows of the head"
        )  # fmt: skip
    return Head(last, logits, tuple(nodes), projection, int(depth.value(weight).shape[0]))


def position_is_visible(stack: Stack) -> bool:
    """Whether a graph tells how many tokens came before: no cache, a counter, or a cache that keeps every row.

    Of sliding windows alone, only the last rows are in the graph.
    """
    layers = stack.layers
    told = any(cache_rows.length_counter(layer) is not None or cache_rows.grows_whole(layer) for layer in layers)
    return told or not any(map(cache_rows.cache_inputs, layers))


def is_bidirectional(stack: Stack) -> bool:
    """Whether the first layer attends to several new tokens without any mask: an encoder's attention."""
    for node in stack.layers[0].nodes:
        if "scaled_dot_product_attention" in str(node.target):
            query, mask, causal = node.args[0], argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
            tokens = value_of(query).shape[-2]
            return mask is None and not causal and not (isinstance(tokens, int) and tokens == 1)
    return False


@dataclass
class Check:
    """What one exit inserted. ``logits``: at the exit, in the shape of the model's, or None where none were needed."""

    nodes: list[fx.Node]
    predicate: fx.Node
    exited: fx.Node
    logits: fx.Node | None
    level: fx.Node
    choice: fx.Node | None = None
    run: fx.Node | None = None


class Checker:
    """Inserts the checks of the exits of one graph, first exit first."""

    def __init__(
        self, setting: Any, stack: Stack, head: Head | None, own: OwnModules, rewriter: Rewriter
    ) -> None:  # fmt: skip
        self.setting = setting
        self.stack = stack
        self.own = own
        self.rewriter = rewriter
        self._found = head
        self.whole = head is None or head.classifies
        """An encoder: scored as a whole by its head, and by the state of its first position."""

    @property
    def head(self) -> Head:
        assert self._found is not None, "only confidences of the state go without a head"
        return self._found

    def insert(self, number: int, state: fx.Node, before_layer: fx.Node, earlier: Check | None) -> Check:
        """The check of exit `number`; `state` follows the layer whose input is `before_layer`."""
        setting, rewriter = self.setting, self.rewriter
        known = set(rewriter.graph.nodes)
        place = state.next
        put = partial(self._inline, place=place, like=state)
        n = setting.layers[number]
        at = 0 if self.whole else -1
        logits = choice = run = None
        if setting.confidence == "state":
            before = put(lambda h: h[:, at, :], [before_layer])
            sure = put(confidence.saturation, [put(lambda h: h[:, at, :], [state]), before])
        elif n in self.own.classifiers:
            told = self._apply(self.own.classifiers[n], put(lambda h: h[:, at, :], [state]), place, "confidence")
            sure = put(confidence.of_classifier, [told])
        else:
            logits = self._scores(n, state, place)
            scores = logits if self.whole else put(lambda x: x[:, -1, :], [logits])
            if setting.confidence == "patience":
                choice, run = put(
                    confidence.agreement, [scores, *((earlier.choice, earlier.run) if earlier else (None, None))]
                )
                sure = run
            elif callable(setting.confidence):
                sure = put(setting.confidence, [scores])
            else:
                size = int(depth.value(scores).shape[-1])
                sure = put(confidence.of_logits(setting.confidence, size), [scores])
        rows = depth.value(sure)
        if not isinstance(rows, torch.Tensor) or rows.ndim != 1:
            raise RegionError(
                "FX101", state, f"the confidence has shape {getattr(rows, 'shape', None)}; it is one number a row, [B]"
            )
        newly = self._above(n, sure, state, place, put)
        exited = newly
        if setting.rows == "each" and earlier is not None:
            exited = put(torch.logical_or, [newly, earlier.exited])
        predicate = put(torch.all, [exited])
        level = self._level(number, sure, exited, predicate, earlier, put)
        made = [n for n in rewriter.graph.nodes if n not in known]
        shape = None if logits is None else tuple(depth.value(self.head.logits).shape)
        usable = logits if logits is not None and tuple(depth.value(logits).shape) == shape else None
        return Check(made, predicate, exited, usable, level, choice, run)

    def putting(self, like: fx.Node, *, after: fx.Node) -> Callable[..., Any]:
        """A function that traces ``function(*nodes)`` into the graph behind a node."""
        return partial(self._inline, place=after.next, like=like)

    def full_logits(self, n: int, state: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """What the exit's own head says of `state`, in the shape of the model's logits, and the nodes made for it."""
        known = set(self.rewriter.graph.nodes)
        wanted = depth.value(self.head.logits)
        place = state.next
        if self.whole:
            given = self._inline(lambda h: h[:, 0, :], [state], place=place, like=state)
        elif isinstance(count := wanted.shape[1], int) and count != depth.value(state).shape[1]:
            # Hugging Face's logits_to_keep: those of the last positions.
            given = self._inline(lambda h: h[:, -count:, :], [state], place=place, like=state)
        else:
            given = state
        logits = self._apply(self.own.heads[n], given, place, "head")
        made = [node for node in self.rewriter.graph.nodes if node not in known and node.op != "placeholder"]
        if tuple(depth.value(logits).shape) != tuple(wanted.shape):
            raise SettingError(
                f"EarlyExit(head=...), exit after {n} layers: its logits are {tuple(depth.value(logits).shape)}, the "
                f"model's {tuple(wanted.shape)}."
            )
        return logits, made

    def _apply(self, module: nn.Module, given: fx.Node, place: fx.Node, part: str) -> fx.Node:
        setting = f"EarlyExit({part}=...)"
        return own_modules.inline_module(module, given, self.rewriter, before=place, setting=setting)

    def _scores(self, n: int, state: fx.Node, place: fx.Node) -> fx.Node:
        """Logits at an exit: ``[B, 1, V]`` of the last position, or ``[B, C]``."""
        put = partial(self._inline, place=place, like=state)
        if n in self.own.heads:
            given = put((lambda h: h[:, 0, :]) if self.whole else (lambda h: h[:, -1:, :]), [state])
            logits = self._apply(self.own.heads[n], given, place, "head")
            if int(depth.value(logits).shape[-1]) != self.head.vocabulary:
                raise SettingError(
                    f"EarlyExit(head=...), exit after {n} layers: {int(depth.value(logits).shape[-1])} logits, and the "
                    f"model's head has {self.head.vocabulary}."
                )
            return logits
        last = [] if self.whole else [put(lambda h: h[:, -1:, :], [state])]
        return self._head([*last, state], place)

    def _inline(
        self, function: Callable[..., Any], inputs: list[fx.Node | None], *, place: fx.Node, like: fx.Node
    ) -> Any:
        return confidence.inline(function, inputs, self.rewriter, before=place, like=like)

    def _head(self, sources: list[fx.Node], place: fx.Node) -> fx.Node:
        """The head on the last position, ``[B, 1, W]``; on all where its literal shapes allow no other."""
        wanted = depth.value(self.head.logits)
        graph = self.rewriter.graph
        for source in sources:
            known = set(graph.nodes)
            try:
                logits = self._copy_head(source, place)
            except (RuntimeError, ValueError, TypeError):
                logits = None
            if logits is not None:
                made = depth.value(logits)
                if made.ndim == wanted.ndim and made.shape[0] == depth.value(source).shape[0]:
                    return logits
            # The copy that failed has no value yet, so that the rewriter does not know it.
            for node in reversed(list(graph.nodes)):
                if node not in known:
                    graph.erase_node(node)
        raise RegionError("FX103", self.head.logits, "the head could not be copied: literal shapes in it do not fit")

    def _copy_head(self, source: fx.Node, place: fx.Node) -> fx.Node:
        mapping = {self.head.start: source}
        for node in self._head_and_helpers():
            copied = self.rewriter.copy(node, mapping, before=place)
            if node is self.head.projection and self.setting.shortlist is not None:
                self._shorten(copied)
            mapping[node] = copied
        return mapping[self.head.logits]

    def _head_and_helpers(self) -> list[fx.Node]:
        """The head with what it computes from weights alone, in order; those stand behind the exit in the graph."""
        order = list(self.rewriter.graph.nodes)
        start = order.index(self.head.start)
        after = {n for n in order[start + 1 :] if n.op in ("call_function", "call_method")}
        reach = depth.backward_slice([self.head.logits], after | set(self.head.nodes))
        return [n for n in order if n in reach]

    def _shorten(self, projection: fx.Node) -> None:
        make = partial(self.rewriter.method, like=projection, before=projection)
        for index in (1, 2):
            weight = projection.args[index] if len(projection.args) > index else None
            if isinstance(weight, fx.Node) and self.own.tokens is not None:
                listed = inputs.constant(self.own.tokens, self.rewriter, like=projection)
                self.rewriter.set_argument(projection, index, make("index_select", (weight, 0, listed)))
            elif isinstance(weight, fx.Node):
                count = min(int(self.setting.shortlist), self.head.vocabulary)
                self.rewriter.set_argument(projection, index, make("narrow", (weight, 0, 0, count)))

    def _above(self, n: int, sure: fx.Node, state: fx.Node, place: fx.Node, put: Callable[..., Any]) -> fx.Node:
        threshold = self.setting.threshold
        if self.setting.confidence == "patience":
            return put(lambda run: run >= threshold, [sure])
        schedule = confidence.schedule_of(threshold)
        if schedule is None:
            return put(lambda c: c > threshold, [sure])
        return put(lambda c, p: c > p, [sure, put(schedule, [self._position(n, state, put, place)])])

    def _position(self, n: int, state: fx.Node, put: Callable[..., Any], place: fx.Node) -> fx.Node:
        """0-d float tensor: the 0-based position of the last token, from the cache's own length."""
        layers = self.stack.layers
        new: Any = depth.value(state).shape[1]
        for index, layer in enumerate(layers):
            counter = cache_rows.length_counter(layer)
            if counter is not None and index < n:  # has been advanced by the tokens of this step
                return put(lambda filled: (filled - 1).float(), [counter])
            if counter is not None and isinstance(new, int):
                return put(lambda filled: (filled + (new - 1)).float(), [counter])
        total: Any = -1
        whole = next(filter(cache_rows.grows_whole, layers), None)
        sources = [(state, 1), *([(cache_rows.cache_inputs(whole)[0], 2)] if whole is not None else [])]
        for node, dim in sources:
            size: Any = depth.value(node).shape[dim]
            if not isinstance(size, int):
                size = self.rewriter.call(torch.ops.aten.sym_size.int, (node, dim), like=state, before=place)
            fixed = isinstance(size, int) and isinstance(total, int)
            total = total + size if fixed else self.rewriter.call(operator.add, (total, size), like=state, before=place)
        options = {"device": depth.value(state).device, "dtype": torch.float32}
        return self.rewriter.call(torch.full, ((), total), options, like=state, before=place)

    def _level(
        self,
        number: int,
        sure: fx.Node,
        exited: fx.Node,
        predicate: fx.Node,
        earlier: Check | None,
        put: Callable[..., Any],
    ) -> fx.Node:
        """``[B]`` int64: the exit a row took; the number of exits for none, one more for none because of NaN."""
        count = len(self.setting.layers)
        patience = self.setting.confidence == "patience"
        each = self.setting.rows == "each"

        def first(sure: Any) -> Any:
            return torch.full_like(sure, count, dtype=torch.int64)

        def undecided(level: Any, sure: Any) -> Any:
            return torch.where(torch.logical_and(sure != sure, level == count), count + 1, level)

        def taken(level: Any, goes: Any) -> Any:
            return torch.where(torch.logical_and(goes, level >= count), number, level)

        level = earlier.level if earlier is not None else put(first, [sure])
        if not patience:
            level = put(undecided, [level, sure])
        return put(taken, [level, exited if each else predicate])
