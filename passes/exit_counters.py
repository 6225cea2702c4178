"""How deep the steps went: one histogram for each compiled graph, kept on the device, read when somebody asks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor


class DepthCounter:
    """Counts rows by the exit they took. Lives as long as the compiled graph; nothing waits for the device here."""

    _living: ClassVar[weakref.WeakSet[DepthCounter]] = weakref.WeakSet()

    def __init__(self, exits: tuple[int, ...], layers: int, graph: int = -1, owner: int = 0) -> None:
        self.exits = exits
        self.layers = layers
        self.graph = graph
        """Number of the graph's record in the report."""
        self.owner = owner
        self._counts: Tensor | None = None
        DepthCounter._living.add(self)

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Take the last result of the compiled graph, ``[B]`` int64 exit numbers, and add it up."""

        def run(*args: Any) -> Any:
            results = compiled(*args)
            self.add(results[-1])
            return results[:-1]

        return run

    def add(self, taken: Tensor) -> None:
        """Count one step; ``taken: [B]``: 0 for the first exit, ``len(exits)`` for none, one more after NaN."""
        if self._counts is None or self._counts.device != taken.device:
            self._counts = torch.zeros(len(self.exits) + 2, dtype=torch.int64, device=taken.device)
        self._counts.index_add_(0, taken, torch.ones_like(taken))

    def reset(self) -> None:
        """Begin again at zero."""
        if self._counts is not None:
            self._counts.zero_()

    @property
    def histogram(self) -> dict[int, int]:
        """``{layers that ran: rows}``, the full depth last; reads the device."""
        counts = [0] * (len(self.exits) + 2) if self._counts is None else self._counts.tolist()
        by_depth = dict(zip(self.exits, counts, strict=False))
        by_depth[self.layers] = counts[-2] + counts[-1]
        return by_depth

    @property
    def nan_rows(self) -> int:
        """Rows that ran every layer after a confidence was NaN."""
        return 0 if self._counts is None else int(self._counts[-1])

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


def counters(owner: int | None = None) -> list[DepthCounter]:
    """The counters of living graphs, oldest first; with `owner`, those of one ``fxopt.compile`` call."""
    found = [c for c in DepthCounter._living if owner is None or c.owner == owner]
    return sorted(found, key=lambda c: c.graph)


def total(found: list[DepthCounter] | None = None) -> dict[int, int]:
    """The histograms of several counters, added up."""
    summed: dict[int, int] = {}
    for counter in counters() if found is None else found:
        for n, rows in counter.histogram.items():
            summed[n] = summed.get(n, 0) + rows
    return dict(sorted(summed.items()))
