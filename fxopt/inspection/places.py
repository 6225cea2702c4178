"""Where things are in a recorded graph: its layers, its module paths, the source lines of both.

Everything is read from the node tables of the record, so it works on a saved report without the model.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fxopt.passes.record import GraphRecord, NodeRow, Remark

MEMBER = re.compile(r"^((?:[^.]+\.)*?[^.0-9][^.]*)\.(\d+)(?=\.|$)")
"""Outermost numbered member of a path: container and number."""


@dataclass(frozen=True)
class LayerPlace:
    """One layer of a container. `kind` is equal for layers whose captured nodes compute the same."""

    path: str
    container: str
    index: int
    kind: str
    nodes: int


@dataclass(frozen=True)
class Run:
    """Neighbouring layers that nothing distinguishes: ``layers[0]`` stands for all of them."""

    layers: tuple[LayerPlace, ...]

    @property
    def label(self) -> str:
        first, last = self.layers[0].index, self.layers[-1].index
        return str(first) if first == last else f"{first}-{last}"


def captured_rows(graph: GraphRecord) -> list[NodeRow]:
    """The node table as captured; empty when the record was taken with ``FXOPT_RECORD=0``."""
    return graph.rows(0) if graph.stages else []


def layers_of(graph: GraphRecord) -> list[LayerPlace]:
    """Members of the outermost containers that repeat modules, in the order they are numbered."""
    members: dict[tuple[str, int], list[NodeRow]] = {}
    for row in captured_rows(graph):
        found = MEMBER.match(row.module)
        if found:
            members.setdefault((found[1], int(found[2])), []).append(row)
    repeated = {container for container, index in members if index > 0}
    return [
        LayerPlace(f"{container}.{index}", container, index, _kind(f"{container}.{index}", rows), len(rows))
        for (container, index), rows in sorted(members.items())
        if container in repeated
    ]


def _kind(path: str, rows: Iterable[NodeRow]) -> str:
    """Digest of what a layer computes, without the names and numbers that differ between equal layers."""
    parts = []
    for row in rows:
        target = "" if row.op in ("placeholder", "get_attr") else row.target
        parts.append((row.op, target, row.shape, row.dtype, row.module[len(path) :]))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def outcomes(remarks: Iterable[Remark], path: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """``{technique: ((status, code), ...)}`` of the remarks at `path` and below it."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for remark in remarks:
        if within(remark.path, path):
            found.setdefault(remark.technique, {})[(remark.status, remark.code)] = None
    return {technique: tuple(seen) for technique, seen in found.items()}


def folded(layers: Iterable[LayerPlace], remarks: Iterable[Remark]) -> list[Run]:
    """Neighbouring layers of one container with the same structure and the same outcomes, as runs."""
    remarks = list(remarks)
    runs: list[list[LayerPlace]] = []
    before: object = None
    for layer in layers:
        now = (layer.container, layer.kind, outcomes(remarks, layer.path))
        if now == before and runs[-1][-1].index + 1 == layer.index:
            runs[-1].append(layer)
        else:
            runs.append([layer])
        before = now
    return [Run(tuple(run)) for run in runs]


def differing(layers: Iterable[LayerPlace], remarks: Iterable[Remark]) -> list[LayerPlace]:
    """The layers that are not like most of their container: another structure, or another outcome."""
    remarks = list(remarks)
    groups: dict[str, dict[object, list[LayerPlace]]] = {}
    for layer in layers:
        key = (layer.kind, tuple(sorted(outcomes(remarks, layer.path).items())))
        groups.setdefault(layer.container, {}).setdefault(key, []).append(layer)
    odd: list[LayerPlace] = []
    for kinds in groups.values():
        common = max(kinds.values(), key=len)
        odd += [layer for members in kinds.values() if members is not common for layer in members]
    return sorted(odd, key=lambda layer: (layer.container, layer.index))


def within(path: str, place: str) -> bool:
    """Whether `path` is `place` or lies inside it; every path lies inside the whole graph, ``""``."""
    return not place or path == place or path.startswith(f"{place}.")


def module_paths(graphs: Iterable[GraphRecord]) -> list[str]:
    """Every module path that the graphs mention, parents included, sorted."""
    paths: set[str] = set()
    for graph in graphs:
        named = {row.module for row in captured_rows(graph)} | {remark.path for remark in graph.remarks}
        for path in named:
            pieces = path.split(".")
            paths.update(".".join(pieces[: i + 1]) for i in range(len(pieces)))
    return sorted(paths - {""})


def resolve(path: str, known: Iterable[str]) -> str | None:
    """`path` as the report spells it: itself, or the one known path that ends in it (``layers.3``)."""
    known = list(known)
    path = path.strip(".")
    if not path or path in known:
        return path
    ends = [k for k in known if k.endswith(f".{path}")]
    starts = [k for k in known if path.endswith(f".{k}")]
    if len(ends) == 1:
        return ends[0]
    return max(starts, key=len) if starts else None


def nearest_path(path: str, known: Iterable[str]) -> str:
    """The known path that looks most like `path`; empty when none does."""
    known = list(known)
    container, _, number = path.rpartition(".")
    if number.isdigit() and f"{container}.0" in known:
        members = [int(k[len(container) + 1 :]) for k in known if re.fullmatch(re.escape(container) + r"\.\d+", k)]
        return f"{container}.{max(members)}"
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    if close:
        return close[0]
    parents = [k for k in known if within(path, k)]
    return max(parents, key=len, default="")


def source_of(graph: GraphRecord, path: str) -> str:
    """The first line of code that ran inside the module at `path`; empty when none was kept."""
    for row in captured_rows(graph):
        if row.op not in ("placeholder", "get_attr") and row.source and within(row.module, path):
            return row.source
    return ""


_STATE = re.compile(r"\b[A-Za-z_]\w*?_(?:modules|parameters|buffers)_(\w+?)_*\b")


def short_names(text: str) -> str:
    """Dynamo's names of parameters and buffers as their path: ``layers.7.input_layernorm.weight``."""
    return _STATE.sub(lambda m: ".".join(re.split("_(?:modules|parameters|buffers)_", m[1])[-4:]), text)
