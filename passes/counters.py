"""What compiled graphs count while they run, each in a tensor on the device; read when somebody asks for the report.

A counter is an input of its graph, and the graph adds to it: one more write in its last kernel. Nothing waits for the
device, and what was counted lives as long as the compiled graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx

from fxopt.passes import inputs
from fxopt.passes.rewriter import Rewriter

Kind = TypeVar("Kind", bound="Counter")


class Counter:
    """One tensor that one compiled graph counts in. A subclass says what it holds and how a call adds to it."""

    _living: ClassVar[weakref.WeakSet[Counter]] = weakref.WeakSet()

    def __init__(self, graph: int, owner: int = 0) -> None:
        self.graph = graph
        """Number of the graph's record in the report."""
        self.owner = owner
        self.counts: Tensor | None = None
        """None before the first call."""
        self._made: tuple[tuple[int, ...], torch.dtype, torch.device] | None = None
        Counter._living.add(self)

    def attach(self, result: fx.Node, size: int, dtype: torch.dtype, rewriter: Rewriter) -> None:
        """Let the graph count `result` at its end, in a tensor ``[size]``."""
        device = result.meta["example_value"].device
        self._made = (size,), dtype, device
        fake = inputs.zeros(rewriter, (size,), dtype, device)
        kept = inputs.placeholder(rewriter, "fxopt_counts", fake, inputs.Supplied(self._tensor), like=result)
        kept.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        self.add(kept, result, rewriter)

    def _tensor(self) -> Tensor:
        if self.counts is None:
            assert self._made is not None
            shape, dtype, device = self._made
            with torch.inference_mode(False):  # it outlives the mode that it happens to be made in
                self.counts = torch.zeros(shape, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(self.counts, guard=False)
        return self.counts

    def add(self, kept: fx.Node, result: fx.Node, rewriter: Rewriter) -> None:
        """Insert what counts one call, before the graph's output."""
        raise NotImplementedError

    def reset(self) -> None:
        """Begin again at zero."""
        if self.counts is not None:
            self.counts.zero_()

    @staticmethod
    def read(counters: Sequence[Any]) -> dict[str, float]:
        """What counters of this class on one graph have counted together, for the report; waits for the device."""
        return {}


def counters(kind: type[Kind], owner: int | None = None) -> list[Kind]:
    """The counters of a kind of living graphs, oldest first; with `owner`, those of one ``fxopt.compile`` call."""
    found = [c for c in Counter._living if isinstance(c, kind) and owner in (None, c.owner)]
    return sorted(found, key=lambda c: c.graph)


def read_all(graph: int) -> dict[str, float]:
    """Everything that one living graph has counted so far, by name."""
    found: dict[str, float] = {}
    living = [c for c in Counter._living if c.graph == graph]
    for kind in {type(c) for c in living}:
        found |= kind.read([c for c in living if type(c) is kind])
    return found


class DepthCounter(Counter):
    """Rows by the exit they took: 0 for the first exit, ``len(exits)`` for none, one more for none after NaN."""

    def __init__(self, exits: tuple[int, ...], layers: int, graph: int = -1, owner: int = 0) -> None:
        super().__init__(graph, owner)
        self.exits = exits
        self.layers = layers

    def add(self, kept: fx.Node, result: fx.Node, rewriter: Rewriter) -> None:
        """`result`: ``[B]`` int64."""
        end = result.graph.output_node()
        size = len(self.exits) + 2
        device = kept.meta["example_value"].device
        kinds = rewriter.call(torch.arange, (size,), {"device": device}, like=result, before=end)
        column = rewriter.method("unsqueeze", (result, 1), like=result, before=end)
        taken = rewriter.call(torch.eq, (column, kinds), like=result, before=end)
        rows = rewriter.method("sum", (taken, 0), like=result, before=end)
        rewriter.method("add_", (kept, rows), like=result, before=end)

    @property
    def histogram(self) -> dict[int, int]:
        """``{layers that ran: rows}``, the full depth last; reads the device."""
        counts = [0] * (len(self.exits) + 2) if self.counts is None else self.counts.tolist()
        by_depth = dict(zip(self.exits, counts, strict=False))
        by_depth[self.layers] = counts[-2] + counts[-1]
        return by_depth

    @property
    def nan_rows(self) -> int:
        """Rows that ran every layer after a confidence was NaN."""
        return 0 if self.counts is None else int(self.counts[-1])

    def __str__(self) -> str:
        """One line of a report, at most 100 columns wide."""
        rows = ", ".join(f"{n}: {count}" for n, count in self.histogram.items())
        nan = f"; NaN confidence: {self.nan_rows}" if self.nan_rows else ""
        line = f"  ~ rows by layers run  {rows}; mean {self.mean_depth:.2f} of {self.layers}{nan}"
        return line if len(line) <= 100 else f"  ~ mean depth  {self.mean_depth:.2f} of {self.layers} layers{nan}"

    @property
    def mean_depth(self) -> float:
        """Mean number of layers over rows and steps; NaN before the first."""
        histogram = self.histogram
        rows = sum(histogram.values())
        return sum(n * count for n, count in histogram.items()) / rows if rows else float("nan")


def depths(found: Sequence[DepthCounter]) -> dict[int, int]:
    """The histograms of several counters, added up."""
    summed: dict[int, int] = {}
    for counter in found:
        for n, rows in counter.histogram.items():
            summed[n] = summed.get(n, 0) + rows
    return dict(sorted(summed.items()))


class RecomputeCounter(Counter):
    """Rows of asynchronous softmax, and the bounds that norms gave: [2 + layers] float64.

    The first two are rows recomputed and rows computed, added up; the others the last bound of each certified layer.
    """

    def add(self, kept: fx.Node, result: fx.Node, rewriter: Rewriter) -> None:
        end = result.graph.output_node()
        rows = rewriter.method("narrow", (result, 0, 0, 2), like=result, before=end)
        old = rewriter.method("narrow", (kept, 0, 0, 2), like=result, before=end)
        summed = rewriter.call(torch.add, (old, rows), like=result, before=end)
        bounds = rewriter.method("narrow", (result, 0, 2, kept.meta["example_value"].shape[0] - 2), like=result,
                                 before=end)  # fmt: skip
        both = rewriter.call(torch.cat, ((summed, bounds),), like=result, before=end)
        rewriter.method("copy_", (kept, both), like=result, before=end)

    @staticmethod
    def read(counters: Sequence[RecomputeCounter]) -> dict[str, float]:
        used = [c.counts.cpu() for c in counters if c.counts is not None]
        if not used:
            return {}
        recomputed, rows = torch.stack([c[:2] for c in used]).sum(0).tolist()
        found = {
            "async_softmax rows": rows,
            "async_softmax rows recomputed": recomputed,
            "async_softmax recompute rate": recomputed / rows if rows else 0.0,
        }
        bounds = torch.cat([c[2:] for c in used]).tolist()
        if bounds:
            found |= {"async_softmax lowest score bound": min(bounds), "async_softmax highest score bound": max(bounds)}
        return found
