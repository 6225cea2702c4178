"""Times of kernels, measured when they are asked for: ``with measuring(): model(...)``, ``fxopt inspect --profile``.

What is compiled inside of the block runs under torch's profiler for its first calls, and the report has the median time
of every kernel with the nodes it computes, as Inductor's provenance tells them. What is compiled outside is left alone:
not a line of it differs. The profiler's own cost (some microseconds a kernel on a CPU) is in the times of short ones.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fxopt.codegen import compat
from fxopt.passes.provenance import ID
from fxopt.passes.record import GraphRecord, Measured, Profile

CALLS = 10
"""Calls of each graph that are measured."""
WARM = 2
"""So many first ones do not count where more follow: they allocate, and caches are cold."""

_blocks = 0


@contextmanager
def measuring() -> Iterator[None]:
    """Graphs compiled inside are measured while they are called; their compilation reads and fills no cache."""
    global _blocks
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1


def asked() -> bool:
    """Whether graphs that are compiled now are measured."""
    return _blocks > 0


def compile_measured(gm: Any, examples: Any, mode: str | None, patches: dict[str, Any], record: GraphRecord) -> Any:
    """:func:`compat.compile_with_inductor`, and its calls write :attr:`GraphRecord.profile`."""
    computed: dict[str, list[int]] = {}

    def keep(kernels: dict[str, list[dict[str, Any]]]) -> None:
        for label, nodes in kernels.items():
            computed[label] = sorted({int(custom[ID]) for custom in nodes if ID in custom})

    compiled = compat.compile_with_provenance(gm, examples, mode, patches, keep)
    return Measuring(compiled, record, computed)


class Measuring:
    """A compiled graph whose first calls run under the profiler."""

    def __init__(self, compiled: Callable[..., Any], record: GraphRecord, computed: dict[str, list[int]]) -> None:
        self.compiled = compiled
        self.record = record
        self.computed = computed
        """Kernels in the order in which the graph calls them (``name:number``), with the ids of their nodes."""
        self.calls: list[tuple[float, list[tuple[str, float]]]] = []

    def __call__(self, *inputs: Any) -> Any:
        if len(self.calls) >= CALLS or compat.profiler_is_on():
            return self.compiled(*inputs)
        result, whole, events = compat.profiled(self.compiled, inputs)
        self.calls.append((whole, events))
        self.record.profile = self._profile()
        return result

    def _profile(self) -> Profile:
        counted = self.calls[min(WARM, len(self.calls) - 1) :]
        times: dict[tuple[str, tuple[int, ...]], list[float]] = {}
        for _, events in counted:
            for key, seconds in placed(events, self.computed).items():
                times.setdefault(key, []).append(seconds)
        where = {row.id: row.module for row in self.record.rows(len(self.record.stages) - 1) if row.module}
        kernels = [
            Measured(
                name, nodes, tuple(dict.fromkeys(where[n] for n in nodes if n in where)), statistics.median(seconds)
            )
            for (name, nodes), seconds in times.items()
        ]
        return Profile(len(counted), statistics.median(whole for whole, _ in counted), kernels)


def placed(
    events: Iterable[tuple[str, float]], computed: dict[str, list[int]]
) -> dict[tuple[str, tuple[int, ...]], float]:
    """Seconds by (kernel, ids of its nodes).

    A name that ran as often as the graph calls it is taken call by call. One that ran otherwise (in the branch of a
    conditional, or in a loop) is added up, with the nodes of all its calls; one that the graph does not know has none.
    """
    ran: dict[str, list[float]] = {}
    for name, seconds in events:
        ran.setdefault(short_name(name), []).append(seconds)
    known: dict[str, list[tuple[int, ...]]] = {}
    for label, nodes in computed.items():
        known.setdefault(short_name(label), []).append(tuple(nodes))
    found: dict[tuple[str, tuple[int, ...]], float] = {}
    for name, times in ran.items():
        calls = known.get(name, [])
        if len(calls) != len(times):
            together = tuple(sorted({node for call in calls for node in call}))
            calls, times = [together], [sum(times)]
        for call, seconds in zip(calls, times, strict=True):
            found[name, call] = found.get((name, call), 0.0) + seconds
    return found


def short_name(name: str) -> str:
    """A kernel's name as both sides say it: ``mm`` of ``aten::mm`` and of ``extern_kernels.mm:7``."""
    name = re.sub(r":\d+$", "", name)
    name = re.sub(r"^graph_\d+_", "", name)
    if name.startswith("torch.ops."):
        return name.split(".")[3]
    return re.split(r"::|\.", name)[-1]
