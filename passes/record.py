"""What a compilation leaves behind: stages, remarks, settings and kernels, as plain data.

Everything here is strings and numbers. Nothing keeps a tensor, a module or a graph alive, so a record can be kept
for every compilation, and equal inputs give equal records.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxopt.passes.provenance import all_nodes, branches, module_path, node_id, origin_ids, source_line
from fxopt.passes.reasons import REASONS

SCHEMA_VERSION = 1
STATUSES = ("applied", "missed", "blocked", "analysis")


@dataclass(frozen=True)
class Remark:
    """One place a pass looked at.

    ``status``: applied, missed (``code`` names the first thing that did not match), blocked (``code`` names the rule
    that forbade it) or analysis (something found out on the way). ``count`` places share the remark.
    """

    technique: str
    status: str
    path: str
    message: str
    code: str = ""
    source: str = ""
    count: int = 1

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"remark status {self.status!r}; allowed are {STATUSES}")
        if self.status in ("missed", "blocked") and self.code not in REASONS:
            raise ValueError(f"a {self.status} remark needs a reason code of passes/reasons.py, not {self.code!r}")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node as data. ``origins``: ids of the captured nodes it descends from."""

    id: int
    name: str
    op: str
    target: str
    args: str
    shape: str
    dtype: str
    module: str
    source: str
    origins: tuple[int, ...]


@dataclass
class Stage:
    """The graph after one pass, as the difference to the stage before."""

    name: str
    level: str
    seconds: float
    nodes_before: int
    nodes_after: int
    added: list[NodeRow] = field(default_factory=list)
    changed: list[NodeRow] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    order: list[int] | None = None
    code: str = ""
    exact: bool = True

    @property
    def is_noop(self) -> bool:
        return not (self.added or self.changed or self.removed)


@dataclass(frozen=True)
class EffectiveSetting:
    """A setting that acted on this graph and where it came from."""

    key: str
    value: str
    origin: str


@dataclass
class KernelRecord:
    """A generated kernel: which nodes it computes, its source and its resources."""

    name: str
    family: str
    nodes: tuple[int, ...]
    modules: tuple[str, ...]
    source: str
    configuration: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """A kernel or library call that was timed: the nodes it computes, their modules, median seconds a call."""

    name: str
    nodes: tuple[int, ...]
    modules: tuple[str, ...]
    seconds: float


@dataclass
class Profile:
    """Times of a graph that was called under the profiler: medians of `calls` calls, in the order of the kernels."""

    calls: int
    seconds: float
    kernels: list[Measured] = field(default_factory=list)


@dataclass
class GraphRecord:
    """Everything kept of one compiled graph."""

    number: int
    compile_id: str
    model: str
    role: str = "forward"
    inputs: str = ""
    stages: list[Stage] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    settings: list[EffectiveSetting] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[KernelRecord] = field(default_factory=list)
    seconds: float = 0.0
    inductor_seconds: float = 0.0
    error: str = ""
    counted: dict[str, float] = field(default_factory=dict)
    """What the compiled graph counted while it ran, as of the moment the report was asked for."""
    profile: Profile | None = None
    """Measured times, where they were asked for (``fxopt/profiling.py``)."""
    owner: int = 0
    """Token of the `fxopt.compile` call (0: plain torch.compile)."""
    modules: frozenset[int] = frozenset()
    """ids of the modules seen; not part of the serialised record."""

    @property
    def nodes_before(self) -> int:
        return self.stages[0].nodes_after if self.stages else 0

    @property
    def nodes_after(self) -> int:
        return self.stages[-1].nodes_after if self.stages else 0

    def count(self, technique: str, status: str = "applied") -> int:
        """Number of places with that outcome."""
        return sum(r.count for r in self.remarks if r.technique == technique and r.status == status)

    def rows(self, stage: int) -> list[NodeRow]:
        """The node table after stage number `stage`, put together from the differences."""
        table: dict[int, NodeRow] = {}
        order: list[int] = []
        for current in self.stages[: stage + 1]:
            for gone in current.removed:
                table.pop(gone, None)
            for row in (*current.added, *current.changed):
                table[row.id] = row
            if current.order is not None:
                order = current.order
        return [table[i] for i in order if i in table]

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("modules", "owner")}
        for key in ("stages", "remarks", "settings", "kernels"):
            data[key] = [dataclasses.asdict(item) for item in data[key]]
        data["profile"] = dataclasses.asdict(self.profile) if self.profile is not None else None
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphRecord:
        values = dict(data)
        values["stages"] = [
            Stage(**{**s, "added": [_row(r) for r in s["added"]], "changed": [_row(r) for r in s["changed"]]})
            for s in data["stages"]
        ]
        values["remarks"] = [Remark(**r) for r in data["remarks"]]
        values["settings"] = [EffectiveSetting(**s) for s in data["settings"]]
        values["kernels"] = [
            KernelRecord(**{**k, "nodes": tuple(k["nodes"]), "modules": tuple(k["modules"])}) for k in data["kernels"]
        ]
        if data.get("profile") is not None:
            kernels = [Measured(**{**k, "nodes": tuple(k["nodes"]), "modules": tuple(k["modules"])})
                       for k in data["profile"]["kernels"]]  # fmt: skip
            values["profile"] = Profile(**{**data["profile"], "kernels": kernels})
        return cls(**values)


def _row(data: dict[str, Any]) -> NodeRow:
    return NodeRow(**{**data, "origins": tuple(data["origins"])})


def record_level() -> str:
    """``FXOPT_RECORD``: ``0`` remarks only, ``1`` (default) node tables too, ``full`` graph code as well."""
    level = os.environ.get("FXOPT_RECORD", "1").strip().lower()
    return level if level in ("0", "1", "full") else "1"


class Recorder:
    """Takes the node table of a graph after each stage and keeps what changed."""

    def __init__(self, record: GraphRecord, level: str | None = None) -> None:
        self.record = record
        self.level = level or record_level()
        self._rows: dict[int, NodeRow] = {}
        self._copies: dict[tuple[str, int, int], int] = {}

    def stage(self, name: str, graph: fx.Graph, *, level: str, seconds: float, exact: bool = True) -> Stage:
        """Append the state of `graph` after the pass `name`."""
        before = self.record.nodes_after
        size = sum(node.graph is graph or node.op not in ("placeholder", "output") for node in all_nodes(graph))
        stage = Stage(name, level, seconds, before, size, exact=exact)
        if self.level != "0":
            rows = {row.id: row for row in node_rows(graph, self._copies)}
            stage.removed = [i for i in self._rows if i not in rows]
            stage.added = [row for i, row in rows.items() if i not in self._rows]
            stage.changed = [row for i, row in rows.items() if i in self._rows and self._rows[i] != row]
            if not stage.is_noop:
                stage.order = list(rows)
            self._rows = rows
        if self.level == "full":
            stage.code = graph_code(graph)
        self.record.stages.append(stage)
        return stage


FIRST_COPY = 1 << 30
"""Ids of copied nodes begin here: a branch holds nodes that stand in the other branch too."""


def node_rows(graph: fx.Graph, copies: dict[tuple[str, int, int], int] | None = None) -> list[NodeRow]:
    """The node table of a graph; what the branches of a conditional hold stands before the call that chooses one.

    Inside a branch, operands have the names they have outside. The larger branch keeps the names and ids of its nodes;
    what stands in both gets ids of its own, which `copies` keeps the same from stage to stage.
    """
    rows: list[NodeRow] = []
    _add_rows(graph, {}, "", rows, {node.name for node in graph.nodes}, {}, {} if copies is None else copies)
    return rows


def _add_rows(
    graph: fx.Graph, names: dict[fx.Node, str], branch: str, rows: list[NodeRow], used: set[str],
    seen: dict[int, int], copies: dict[tuple[str, int, int], int],
) -> None:  # fmt: skip
    for node in graph.nodes:
        if branch and node.op in ("placeholder", "output"):
            continue
        for name, module in sorted(branches(node), key=lambda item: -len(item[1].graph.nodes)):
            operands = node.args[-1] if node.args and isinstance(node.args[-1], (tuple, list)) else ()
            inner = dict(zip(module.graph.find_nodes(op="placeholder"), operands, strict=False))
            outside = {own: names.get(given, given.name) for own, given in inner.items() if isinstance(given, fx.Node)}
            _add_rows(module.graph, outside, name, rows, used, seen, copies)
        number, times = node_id(node), seen.get(node_id(node), 0)
        if branch and (times or number < 0):
            number = copies.setdefault((branch, number, times), FIRST_COPY + len(copies))
        if branch and (times or node.name in used):
            names[node] = f"{branch}__{node.name}"
        seen[node_id(node)] = times + 1
        used.add(node.name)
        rows.append(dataclasses.replace(node_row(node, names), id=number, name=names.get(node, node.name)))


def graph_code(graph: fx.Graph) -> str:
    """A graph as Python: its ``forward``, after a function for each branch of its conditionals."""
    inner = {name: module for node in graph.nodes for name, module in branches(node)}
    parts = [graph_code(module.graph).replace("def forward(", f"def {name}(") for name, module in inner.items()]
    return "\n".join([*parts, str(graph.python_code("self").src)])


def node_row(node: fx.Node, names: Mapping[fx.Node, str] = MappingProxyType({})) -> NodeRow:
    """`node` as data; `names` has those of its operands that are called otherwise than in their graph."""
    value = node.meta.get("example_value", node.meta.get("val"))
    shape = dtype = ""
    if isinstance(value, torch.Tensor):
        shape = "x".join(str(size) for size in value.shape)
        dtype = str(value.dtype).removeprefix("torch.")
    arguments = [_argument(a, names) for a in node.args]
    arguments += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
    return NodeRow(
        node_id(node), node.name, node.op, target_name(node), ", ".join(arguments), shape, dtype,
        module_path(node), source_line(node), origin_ids(node),
    )  # fmt: skip


def target_name(node: fx.Node) -> str:
    """Readable name of what a node calls."""
    if isinstance(node.target, str):
        return node.target if node.op == "call_method" else node.target.rsplit(".", 1)[-1]
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = getattr(node.target, "__name__", str(node.target))
    return name.removeprefix("_") if name.startswith("_log") else name


def _argument(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names.get(value, value.name)
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_argument(v, names) for v in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, slice):
        start, stop, step = ("" if v is None else _argument(v, names) for v in (value.start, value.stop, value.step))
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
    return str(value)
