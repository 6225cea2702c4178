"""Compute a run of layers for some rows of the batch only: gather them, run the layers on fewer rows, put them back.

Before, for a batch of B rows of which those with ``keep`` go on::

    h1 = layers(h0, mask)                                 # [B, S, W], mask [B, 1, 1, S]

After::

    rows = nonzero(keep)                                  # [u], known when it runs
    h1 = h0.index_copy(0, rows, layers(h0[rows], mask[rows]))

The layers are copied node by node. A captured graph holds the batch size as a literal in its reshapes; a copy is right
when every one of its results has the shape of the original with u in the place of a leading B, and a size argument
that begins with B is tried with u where the node as it stands has not. What has a batch anywhere else, or writes memory
from outside, is refused before anything is changed for good.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxopt.codegen import compat
from fxopt.passes import depth
from fxopt.passes.exit_region import RegionError, written_memory
from fxopt.passes.nodes import name_of, same
from fxopt.passes.rewriter import Rewriter

_SIZED = frozenset("view reshape expand new_zeros new_ones new_empty new_full unflatten".split())
_FACTORIES = frozenset("zeros ones empty full".split())
_FAILURES = (RuntimeError, TypeError, ValueError, AssertionError)


@dataclass(frozen=True)
class Compacted:
    """``end``: what stands for the end of the layers, where rows that did not run are those of the start. ``nodes``:
    all that was made. ``zeros``: new cache rows of the whole batch, and what they are where no row runs."""

    end: fx.Node
    nodes: list[fx.Node]
    zeros: dict[fx.Node, fx.Node]


def compact(
    start: fx.Node, end: fx.Node, keep: fx.Node, rewriter: Rewriter,
    rows: Mapping[fx.Node, Collection[fx.Node]] = MappingProxyType({}),
) -> Compacted:  # fmt: skip
    """Let the nodes from `start` to `end`, both ``[B, S, W]``, compute the rows of ``keep: [B]`` (bool).

    `rows`: new keys and values, with the nodes that put them into a cache; those see all B rows, zeros where a row did
    not run. The originals are erased. Raises :class:`RegionError` with the graph as it was.
    """
    graph = rewriter.graph
    order = list(graph.nodes)
    after = set(order[order.index(start) + 1 :])
    through = depth.forward_slice([start], after)
    storing = {node for readers in rows.values() for node in readers if node.op != "output"}
    inside = through & (depth.backward_slice([end, *storing, *rows], after) | storing)
    nodes = [node for node in order if node in inside]
    for node in nodes:
        outside = [u for u in node.users if u not in inside and u not in rows.get(node, ())]
        if node is not end and node not in storing and outside:
            raise RegionError("FX110", node, f"{node.name} is read outside of the layers that fewer rows run")
        written = written_memory(node)
        if written is not None and written not in inside and node not in storing:
            raise RegionError("FX208", node, f"{node.target} writes memory that every row of the batch has a part in")
    known = set(order)
    last = max(nodes, key=order.index)
    compactor = _Compactor(start, keep, storing, rewriter, last.next)
    try:
        with compat.sizes_of_data(rewriter.fake_mode):
            compactor.begin()
            result = compactor.copy(nodes, end, rows)
    except (RegionError, *_FAILURES) as error:
        for node in reversed([n for n in graph.nodes if n not in known]):
            graph.erase_node(node)
        if isinstance(error, RegionError):
            raise
        raise RegionError("FX204", end, f"fewer rows: {str(error).splitlines()[0]}") from error
    made = [node for node in graph.nodes if node not in known]
    fresh = set(made)
    for old, new in ((end, result), *compactor.whole.items()):
        rewriter.replace(old, new, only=lambda user: user not in fresh and user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    rewriter.changed = True
    return Compacted(result, made, compactor.zeros)


class _Compactor:
    """Copies nodes twice at most: for the rows that run, and, of what stores them, for the whole batch."""

    def __init__(
        self, start: fx.Node, keep: fx.Node, storing: set[fx.Node], rewriter: Rewriter, place: fx.Node
    ) -> None:  # fmt: skip
        self.start, self.keep, self.storing = start, keep, storing
        self.rewriter, self.place, self.like = rewriter, place, start
        self.batch = depth.value(start).shape[0]
        self.copies: dict[fx.Node, fx.Node] = {}
        self.whole: dict[fx.Node, fx.Node] = {}
        self.zeros: dict[fx.Node, fx.Node] = {}

    def begin(self) -> None:
        rows = self._make("function", torch.nonzero, (self.keep,))
        self.rows = self._make("method", "squeeze", (rows, 1))
        self.count = self._make("function", torch.ops.aten.sym_size.int, (self.rows, 0))
        self.copies[self.start] = self._gather(self.start)

    def _make(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        make = self.rewriter.call if kind == "function" else self.rewriter.method
        return make(target, args, kwargs, like=self.like, before=self.place)

    def _gather(self, node: fx.Node) -> fx.Node:
        return self._make("method", "index_select", (node, 0, self.rows))

    def copy(self, nodes: Sequence[fx.Node], end: fx.Node, rows: Mapping[fx.Node, Any]) -> fx.Node:
        for node in nodes:
            self.like = node
            if node in self.storing:
                self.whole[node] = self.rewriter.copy(node, self.whole, before=self.place)
                continue
            self.copies[node] = self._copied(node)
            if node in rows:
                self.whole[node] = self._spread(node)
        self.like = end
        return self._make("method", "index_copy", (self.start, 0, self.rows, self.copies[end]))

    def _spread(self, node: fx.Node) -> fx.Node:
        """New rows of a cache for the whole batch: zeros for rows that did not run."""
        value = depth.value(node)
        # Of the stream, not of the copy: the zeros alone must not need any row to have run.
        sizes = [size if isinstance(size, int) else self._size_of(size, node) for size in value.shape]
        options = {"dtype": value.dtype, "device": value.device}
        zeros = self._make("function", torch.zeros, (tuple(sizes),), options)
        spread = self._make("method", "index_copy", (zeros, 0, self.rows, self.copies[node]))
        self.zeros[spread] = zeros
        return spread

    def _size_of(self, size: torch.SymInt, node: fx.Node) -> fx.Node:
        for dim, candidate in enumerate(depth.value(self.start).shape):
            if same(size, candidate):
                return self._make("function", torch.ops.aten.sym_size.int, (self.start, dim))
        raise RegionError("FX204", node, f"a size of {node.name}, new cache rows, is not in the residual stream")

    def _copied(self, node: fx.Node) -> fx.Node:
        """The node on fewer rows: as it stands, else with its leading size exchanged."""
        dims = max((t.ndim for t in _tensors(depth.value(node))), default=0)

        def operand(given: fx.Node) -> fx.Node:
            if given in self.copies:
                return self.copies[given]
            value = depth.value(given)
            carries = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
            if carries and value.ndim == dims and dims > 1 and same(value.shape[0], self.batch):
                self.copies[given] = self._gather(self.whole.get(given, given))
                return self.copies[given]
            return self.whole.get(given, given)

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        kind = "method" if node.op == "call_method" else "function"
        failure = "another shape"
        for given in (args, self._with_count(node, args)):
            if given is None:
                continue
            try:
                made = self._make(kind, node.target, given, kwargs)
            except _FAILURES as error:
                failure = str(error).splitlines()[0]
                self._undo()
                continue
            if self._fits(depth.value(node), depth.value(made)):
                return made
            self.rewriter.graph.erase_node(made)
        if name_of(node) == "linear" and dims > 2 and not kwargs:
            return self._flat_linear(node, args)
        raise RegionError("FX204", node, f"{node.name} cannot be computed for fewer rows of the batch: {failure}")

    def _flat_linear(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """A linear on a matrix of all positions: torch 2.11 asks one of three dimensions for the number of its rows."""
        given = depth.value(args[0])
        flat = self._make("method", "reshape", (args[0], (-1, given.shape[-1])))
        product = self._make("function", node.target, (flat, *args[1:]))
        sizes = [self._make("function", torch.ops.aten.sym_size.int, (args[0], dim)) for dim in range(given.ndim - 1)]
        made = self._make("method", "reshape", (product, (*sizes, depth.value(product).shape[-1])))
        if not self._fits(depth.value(node), depth.value(made)):
            raise RegionError("FX204", node, f"{node.name} cannot be computed for fewer rows: another shape")
        return made

    def _undo(self) -> None:
        last = self.place.prev
        if "example_value" not in last.meta:  # its value could not be computed
            self.rewriter.graph.erase_node(last)

    def _with_count(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with the leading size, where that is the batch, exchanged for the number of rows."""
        name = name_of(node)
        first = 1 if name in _SIZED else 0 if name in _FACTORIES else len(args)
        if first >= len(args):
            return None
        sizes = args[first]
        if isinstance(sizes, (tuple, list)):
            if not sizes or not self._is_batch(sizes[0]):
                return None
            return (*args[:first], (self.count, *sizes[1:]), *args[first + 1 :])
        return (*args[:first], self.count, *args[first + 1 :]) if self._is_batch(sizes) else None

    def _is_batch(self, size: Any) -> bool:
        value = depth.value(size) if isinstance(size, fx.Node) else size
        return isinstance(value, (int, torch.SymInt)) and same(value, self.batch)

    def _fits(self, old: Any, new: Any) -> bool:
        """Whether `new` is `old` with the number of rows in the place of a leading batch."""
        before, after = _tensors(old), _tensors(new)
        if not before:
            return True  # a size or a type
        if len(before) != len(after):
            return False
        count = depth.value(self.count)
        for one, other in zip(before, after, strict=True):
            if one.ndim != other.ndim or one.ndim == 0:
                return False
            if not (same(one.shape[0], self.batch) and same(other.shape[0], count)):
                return False
            if not all(same(a, b) for a, b in zip(one.shape[1:], other.shape[1:], strict=True)):
                return False
        return True


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return [t for v in value for t in _tensors(v)]
    return []
