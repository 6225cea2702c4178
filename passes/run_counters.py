"""What a compiled graph counts while it runs, on the device; read when somebody asks for the report."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

COUNTED = "fxopt.counted"
"""Mark on the outputs of a graph that belong to counters."""


class RunCounter:
    """One more result of a compiled graph, kept from the caller and gathered here. Lives as long as that graph.

    A subclass says what `add` does with the result and what `read` tells.
    """

    _living: ClassVar[weakref.WeakSet[RunCounter]] = weakref.WeakSet()

    def __init__(self, graph: int) -> None:
        self.graph = graph
        """Number of the graph's record in the report."""
        self._place = -1
        RunCounter._living.add(self)

    def attach(self, result: fx.Node, wrappers: list[Callable[..., Any]]) -> None:
        """Make `result` the last output of its graph, and take it away again from what the compiled graph returns."""
        output = result.graph.output_node()
        outputs = tuple(output.args[0])  # type: ignore[arg-type]
        # Wrappers act in the order in which they were added: earlier counters have taken theirs away by then.
        earlier = sum(isinstance(o, fx.Node) and COUNTED in o.meta for o in outputs)
        self._place = len(outputs) - earlier
        result.meta[COUNTED] = True
        output.args = ((*outputs, result),)
        wrappers.append(self.wrap)

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The call wrapper; passes that come later append their own results behind this one."""

        def run(*args: Any) -> Any:
            results = compiled(*args)
            self.add(results[self._place])
            return (*results[: self._place], *results[self._place + 1 :])

        return run

    def add(self, result: Tensor) -> None:
        """Take in the result of one call; nothing here waits for the device."""
        raise NotImplementedError

    @staticmethod
    def read(counters: Sequence[Any]) -> dict[str, float]:
        """What counters of this class on one graph have counted together; waits for the device."""
        raise NotImplementedError


def read_all(graph: int) -> dict[str, float]:
    """Everything that one living graph has counted so far."""
    found: dict[str, float] = {}
    counters = [c for c in RunCounter._living if c.graph == graph]
    for kind in {type(c) for c in counters}:
        found |= kind.read([c for c in counters if type(c) is kind])
    return found


class RecomputeCounter(RunCounter):
    """Rows of asynchronous softmax, and the bounds that norms gave: [2 + layers] float64.

    The first two are rows recomputed and rows computed in a call, the others the bound of each certified layer.
    """

    def __init__(self, graph: int) -> None:
        super().__init__(graph)
        self._rows: Tensor | None = None
        self._bounds: Tensor | None = None

    def add(self, result: Tensor) -> None:
        result = result.detach()
        if self._rows is None or self._rows.device != result.device or self._bounds is None:
            self._rows = torch.zeros(2, dtype=torch.float64, device=result.device)
            self._bounds = torch.empty_like(result[2:])
        self._rows += result[:2]
        # A copy: under a CUDA graph the result's memory belongs to the next call.
        self._bounds.copy_(result[2:])

    @staticmethod
    def read(counters: Sequence[RecomputeCounter]) -> dict[str, float]:
        used = [(c._rows, c._bounds) for c in counters if c._rows is not None and c._bounds is not None]
        if not used:
            return {}
        recomputed, rows = torch.stack([r.cpu() for r, _ in used]).sum(0).tolist()
        found = {
            "async_softmax rows": rows,
            "async_softmax rows recomputed": recomputed,
            "async_softmax recompute rate": recomputed / rows if rows else 0.0,
        }
        bounds = torch.cat([b.cpu() for _, b in used]).tolist()
        if bounds:
            found |= {"async_softmax lowest score bound": min(bounds), "async_softmax highest score bound": max(bounds)}
        return found
