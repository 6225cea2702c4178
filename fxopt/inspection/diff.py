"""What differs: between two reports (did a regression lose a rewrite?) or between two stages of one graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxopt.passes.record import GraphRecord, KernelRecord, NodeRow, Remark
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.reporting import Report


@dataclass(frozen=True)
class GraphDifference:
    """Two graphs that stand for the same thing. Counts are ``(technique, status, in a, in b)``."""

    name: str
    nodes: tuple[int, int]
    counts: tuple[tuple[str, str, int, int], ...]
    gone: tuple[Remark, ...]
    new: tuple[Remark, ...]
    settings: tuple[str, ...]
    kernels: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not (self.gone or self.new or self.settings or self.kernels) and self.nodes[0] == self.nodes[1]


@dataclass(frozen=True)
class ReportDifference:
    """Graphs that only one report has, and what differs in the others."""

    environment: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    graphs: tuple[GraphDifference, ...]

    @property
    def same(self) -> bool:
        return not (self.environment or self.only_a or self.only_b) and all(g.same for g in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "same": self.same}


def compare(a: Report, b: Report) -> ReportDifference:
    """Differences from `a` to `b`. Graphs are matched by model, role and input shape, then by order."""
    environment = tuple(
        f"{key}: {a.environment.get(key, '-')} -> {b.environment.get(key, '-')}"
        for key in sorted({*a.environment, *b.environment})
        if a.environment.get(key) != b.environment.get(key)
    )
    left = list(b.graphs)
    pairs: list[tuple[GraphRecord, GraphRecord]] = []
    only_a = []
    for graph in a.graphs:
        match = next((g for g in left if _key(g) == _key(graph)), None)
        if match is None:
            only_a.append(graph_name(graph))
        else:
            left.remove(match)
            pairs.append((graph, match))
    return ReportDifference(
        environment, tuple(only_a), tuple(map(graph_name, left)), tuple(_graphs(x, y) for x, y in pairs)
    )


def _key(graph: GraphRecord) -> tuple[str, str, str]:
    return graph.model, graph.role, graph.inputs


def graph_name(graph: GraphRecord) -> str:
    """``0/1 LlamaForCausalLM decode 1x1``."""
    return " ".join(str(word) for word in (graph.compile_id, *_key(graph)) if word)


def _graphs(a: GraphRecord, b: GraphRecord) -> GraphDifference:
    pairs = dict.fromkeys((r.technique, r.status) for r in (*a.remarks, *b.remarks))
    counts = tuple((t, s, a.count(t, s), b.count(t, s)) for t, s in pairs if a.count(t, s) != b.count(t, s))
    settings_a = {f"{s.value} ({s.origin})" for s in a.settings}
    settings_b = {f"{s.value} ({s.origin})" for s in b.settings}
    settings = [f"- {s}" for s in sorted(settings_a - settings_b)] + [f"+ {s}" for s in sorted(settings_b - settings_a)]
    return GraphDifference(
        graph_name(b), (a.nodes_after, b.nodes_after), counts,
        _missing(a.remarks, b.remarks), _missing(b.remarks, a.remarks), tuple(settings), _kernels(a.kernels, b.kernels),
    )  # fmt: skip


def _missing(remarks: list[Remark], others: list[Remark]) -> tuple[Remark, ...]:
    known = {(r.technique, r.status, r.path, r.code, r.count) for r in others}
    return tuple(r for r in remarks if (r.technique, r.status, r.path, r.code, r.count) not in known)


def _kernels(a: list[KernelRecord], b: list[KernelRecord]) -> tuple[str, ...]:
    before, after = {k.name: k for k in a}, {k.name: k for k in b}
    lines = [f"- {name}" for name in before if name not in after] + [
        f"+ {name}" for name in after if name not in before
    ]
    for name in before:
        if name not in after:
            continue
        for what in ("configuration", "resources"):
            old, new = getattr(before[name], what), getattr(after[name], what)
            lines += [
                f"~ {name}: {key} {_brief(old.get(key))} -> {_brief(new.get(key))}"
                for key in sorted({*old, *new})
                if old.get(key) != new.get(key)
            ]
        if before[name].source != after[name].source:
            lines.append(f"~ {name}: another source")
    return tuple(lines)


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 and "\n" not in text else f"({len(text)} characters)"


# -- stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageDifference:
    """What stages `i` to `j` did to a graph; ``changed`` holds (before, after)."""

    graph: str
    names: tuple[str, str]
    added: tuple[NodeRow, ...]
    removed: tuple[NodeRow, ...]
    changed: tuple[tuple[NodeRow, NodeRow], ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare_stages(graph: GraphRecord, i: int, j: int) -> StageDifference:
    """Nodes added, removed and changed from stage `i` to stage `j` (0 is the capture, -1 the last).

    Raises:
        SettingError: for a stage that does not exist.
    """
    count = len(graph.stages)
    for number in (i, j):
        if not -count <= number < count:
            names = ", ".join(f"{n} {stage.name}" for n, stage in enumerate(graph.stages))
            raise SettingError(f"stage {number} does not exist; graph {graph.compile_id} has {names or 'no stages'}.")
    i, j = i % count, j % count
    before = {row.id: row for row in graph.rows(i)}
    after = {row.id: row for row in graph.rows(j)}
    return StageDifference(
        graph_name(graph),
        (graph.stages[i].name, graph.stages[j].name),
        tuple(row for number, row in after.items() if number not in before),
        tuple(row for number, row in before.items() if number not in after),
        tuple((before[n], row) for n, row in after.items() if n in before and before[n] != row),
    )
