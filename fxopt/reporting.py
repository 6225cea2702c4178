"""Reports: what compilations left behind, read after the fact."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import re
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import nn

from fxopt.codegen import compat
from fxopt.codegen.files import write_whole
from fxopt.passes.counters import DepthCounter, counters, read_all
from fxopt.passes.mod_counters import routing, routing_lines
from fxopt.passes.record import SCHEMA_VERSION, GraphRecord, KernelRecord, Remark, Stage
from fxopt.passes.technique import SettingError, Technique, nearest

log = logging.getLogger("fxopt")

CAPACITY = 256
"""Graphs kept in the ring buffer."""
ROWS = 400_000
"""Rows of node tables kept in it, about 200 MB: beyond that, the oldest graphs keep all but their tables and code."""

_graphs: deque[GraphRecord] = deque(maxlen=CAPACITY)
_lock = threading.Lock()
_count = 0
_owners: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def owner_of(model: nn.Module) -> int:
    """The token under which ``fxopt.compile`` keeps the records of `model`; 0 when it never did."""
    return _owners.get(model, 0)


def set_owner(model: nn.Module, owner: int) -> None:
    """Keep the records of `model` under `owner`, weakly."""
    _owners[model] = owner


def new_record(compile_id: str, owner: int) -> GraphRecord:
    """A record for a compilation that begins now; it is kept even when the compilation fails."""
    global _count
    with _lock:
        record = GraphRecord(number=_count, compile_id=compile_id, model="", owner=owner)
        _count += 1
        _graphs.append(record)
    return record


def discard(records: Iterable[GraphRecord]) -> None:
    """Take records of a dry run out of the ring buffer."""
    with _lock:
        for record in records:
            _graphs.remove(record)


def finished(record: GraphRecord) -> None:
    """Log one block, mirror the record into TORCH_TRACE, and keep memory bounded."""
    _trim()
    log.info("%s", Lazy(lambda: graph_summary(record)))
    compat.trace_artifact("fxopt_record", record.to_dict)


def _trim() -> None:
    """Drop the node tables of the oldest graphs where all together are more than :data:`ROWS`."""
    with _lock:
        newest_first = list(reversed(_graphs))
    kept = 0
    for graph in newest_first:
        kept += sum(len(stage.added) + len(stage.changed) for stage in graph.stages)
        if kept > ROWS and graph is not newest_first[0]:
            for stage in graph.stages:
                stage.added, stage.changed, stage.removed, stage.order, stage.code = [], [], [], None, ""


class Lazy:
    """A log argument that is built only when it is printed."""

    def __init__(self, build: Any) -> None:
        self.build = build

    def __str__(self) -> str:
        return str(self.build())


class Report:
    """What was done to one model: its compiled graphs with stages, remarks and kernels."""

    routing: dict[str, dict[str, Any]]
    """Tokens that mixture of depths computed, by layer path, where the model was watched: ``passes/mod_counters``."""

    def __init__(
        self,
        graphs: Iterable[GraphRecord],
        environment: dict[str, str] | None = None,
        routing: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.graphs: tuple[GraphRecord, ...] = tuple(graphs)
        self.routing = routing or {}
        self.environment = environment or _environment()

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def passes(self) -> tuple[Stage, ...]:
        """The stages of all graphs, in order; the first of each graph is the capture."""
        return tuple(stage for graph in self.graphs for stage in graph.stages)

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """The remarks of all graphs, in order."""
        return tuple(remark for graph in self.graphs for remark in graph.remarks)

    @property
    def kernels(self) -> tuple[KernelRecord, ...]:
        """The generated kernels of all graphs."""
        return tuple(kernel for graph in self.graphs for kernel in graph.kernels)

    def count(self, technique: str, status: str = "applied") -> int:
        """Number of places with that outcome, over all graphs."""
        return sum(graph.count(technique, status) for graph in self.graphs)

    def summary(self) -> str:
        """One block of text per graph, at most 100 columns wide."""
        if not self.graphs:
            return "fxopt: nothing has been compiled yet"
        blocks = [graph_summary(graph) for graph in self.graphs]
        if self.routing:
            blocks += ["tokens computed by routed layers, while watched:", *routing_lines(self.routing)]
        return "\n".join(blocks)

    def why(self, technique: str, module_path: str = "") -> str:
        """One paragraph: what happened to `technique` at `module_path` (or everywhere), why, and what to do."""
        from fxopt.inspection.why import why

        return why(self, technique, module_path)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<fxopt.Report of {len(self.graphs)} graphs, {len(self.remarks)} remarks>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the summary, and below it the page in a frame of its own (folded; cut to 400 kB)."""
        from html import escape

        from fxopt.inspection.html import MissingExtra, page

        text = f"<pre>{escape(self.summary())}</pre>"
        try:
            whole = page(self, limit=400_000)
        except MissingExtra:
            return text
        frame = whole.replace("&", "&amp;").replace("'", "&#39;")
        style = "width:100%;height:40rem;border:1px solid #8884"
        return f"{text}<details><summary>page</summary><iframe style='{style}' srcdoc='{frame}'></iframe></details>"

    # -- writing ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data with ``schema_version``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": self.environment,
            "graphs": [graph.to_dict() for graph in self.graphs],
            **({"routing": self.routing} if self.routing else {}),
        }

    def to_json(self, path: str | os.PathLike[str], *, times: bool = True) -> pathlib.Path:
        """Write the report as JSON; returns the path. Without `times`, equal input gives equal bytes."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, default=str) + "\n"
        if not times:
            text = re.sub(r'("(?:inductor_)?seconds": )[0-9.e-]+', r"\g<1>0.0", text)
        return write_whole(path, text)

    def to_html(self, path: str | os.PathLike[str], pictures: Iterable[Any] = ()) -> pathlib.Path:
        """Write the report as one self-contained page; returns the path. `pictures`: what
        :func:`fxopt.inspection.behaviour.pictures` saw; the depths counted in this process are in it anyway."""
        from fxopt.inspection.behaviour import counted
        from fxopt.inspection.html import page

        return write_whole(path, page(self, pictures=[*counted(self), *pictures]))

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """The report of :meth:`to_dict`; raises ValueError for another schema or a damaged file."""
        if not isinstance(data, dict) or "schema_version" not in data:
            raise ValueError("this is no fxopt report: it has no schema_version")
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"the report has schema {data['schema_version']}, this fxopt reads {SCHEMA_VERSION}; "
                "write it again with the installed version"
            )
        try:
            graphs = [GraphRecord.from_dict(g) for g in data["graphs"]]
            return cls(graphs, dict(data["environment"]), data.get("routing"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the report is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report written by :meth:`to_json`."""
        try:
            data = json.loads(pathlib.Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON (truncated?): {error}") from error
        return cls.from_dict(data)


def reports() -> list[Report]:
    """All reports in the ring buffer, oldest first: one for each compiled model."""
    with _lock:
        graphs = list(_graphs)
    for graph in graphs:
        graph.counted.update(read_all(graph.number))
    groups: dict[Any, list[GraphRecord]] = {}
    for graph in graphs:
        groups.setdefault(_group(graph, groups), []).append(graph)
    return [Report(group) for group in groups.values()]


def _group(graph: GraphRecord, groups: dict[Any, list[GraphRecord]]) -> Any:
    if graph.owner:
        return graph.owner
    for key, members in groups.items():
        if any(not m.owner and (m.modules & graph.modules) for m in members):
            return key
    return ("graph", graph.number)


def report(model: nn.Module | None = None) -> Report:
    """The report of `model`, or the last one. Empty (with a summary that says so) when nothing was compiled."""
    found = reports()
    if model is None:
        return max(found, key=lambda r: r.graphs[-1].number, default=Report([]))
    ids = {id(module) for module in model.modules()}
    owner = owner_of(model)
    for candidate in reversed(found):
        last = candidate.graphs[-1]
        if (owner and last.owner == owner) or (not last.owner and ids & last.modules):
            candidate.routing = routing(model)
            return candidate
    return Report([])


def clear() -> None:
    """Forget every kept record."""
    with _lock:
        _graphs.clear()


def graph_summary(graph: GraphRecord) -> str:
    """The terminal block of one graph: a line for each technique, at most 100 columns wide."""
    return "\n".join(line if len(line) <= 100 else line[:97] + "..." for line in summary_lines(graph))


def summary_lines(graph: GraphRecord) -> list[str]:
    """The lines of :func:`graph_summary`, however wide they are."""
    passes = len(graph.stages) - 1
    head = (
        f"fxopt: graph {graph.compile_id} {graph.model} {graph.role}"
        f"{f' {graph.inputs}' if graph.inputs else ''}  {graph.nodes_before}->{graph.nodes_after} nodes, "
        f"{passes} pass{'' if passes == 1 else 'es'}, {graph.seconds:.2f} s"
    )
    lines = [head]
    names = list(dict.fromkeys(r.technique for r in graph.remarks))
    width = max((len(n) for n in names), default=0)
    for name in names:
        remarks = [r for r in graph.remarks if r.technique == name]
        applied = sum(r.count for r in remarks if r.status == "applied")
        refused = [r for r in remarks if r.status in ("missed", "blocked")]
        total = applied + sum(r.count for r in refused)
        mark = ("=" if _exact(name) else "~") if applied else "."
        if total:
            state = "applied" if applied else refused[0].status
            line = f"  {mark} {name:<{width}}  {applied}/{total} {state}"
            firsts = [r.message for r in remarks if r.status == "applied"][:1]
            if firsts and applied == 1:
                line += f"  {firsts[0]}"
            if refused:
                first = refused[0]
                more = f" (+{len(refused) - 1})" if len(refused) > 1 else ""
                line += f"  {first.code} {first.path + ': ' if first.path else ''}{first.message}{more}"
        else:
            line = f"  . {name:<{width}}  {remarks[0].message}"
        lines.append(line)
    lines += [f"  # {name}: {value:.6g}" for name, value in graph.counted.items()]
    lines += _depths(graph)
    if graph.error:
        lines.append(f"  ! {graph.error.splitlines()[0]}")
    return lines


def _depths(graph: GraphRecord) -> list[str]:
    """How deep the steps of a graph of this process went; reads the device."""
    with _lock:
        if not any(kept is graph for kept in _graphs):  # a report from a file, whose numbers are not ours
            return []
    own = [c for c in counters(DepthCounter, graph.owner) if c.graph == graph.number]
    return [str(counter) for counter in own if sum(counter.histogram.values())]


def _exact(name: str) -> bool:
    cls = Technique.registry.get(name)
    return cls.exact if cls is not None else True


def check_technique_name(name: str) -> str:
    """`name` if some technique or remark can have it; raises SettingError with the nearest."""
    if name not in Technique.registry:
        raise SettingError(
            f"There is no technique {name!r}. Known: {', '.join(Technique.registry)}."
            f"{nearest(name, Technique.registry)}"
        )
    return name


def _environment() -> dict[str, str]:
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "python": platform.python_version(), "device": device}
