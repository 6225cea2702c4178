"""One self-contained page of a report: style, script and data inside, nothing fetched, safe to open from a file.

The data is JSON in a script element of type ``application/json`` with ``<``, ``>`` and ``&`` written as escapes, and
the page's script puts every text into the document as text, never as markup. A content security policy allows that
one script by its hash and nothing else, so that a name in a hostile report cannot run or fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any

from fxopt.inspection import places
from fxopt.inspection.work import least_seconds, measured, work
from fxopt.passes.reasons import REASONS
from fxopt.passes.record import SCHEMA_VERSION, GraphRecord, NodeRow, Remark, Stage

if TYPE_CHECKING:
    from fxopt.inspection.behaviour import Picture
    from fxopt.reporting import Report

LIMIT = 3_000_000
"""Largest page in bytes. What is left out beyond it, first to last: see :data:`TRIMMED`."""

TRIMMED = (
    ("code", "the Python code of stages"),
    ("assembly", "intermediate and machine code of kernels"),
    ("sources", "source text of kernels"),
    ("tables", "node tables of all graphs but the first"),
    ("all tables", "node tables"),
)


class MissingExtra(ImportError):
    """A package of an optional extra is not installed."""


def page(report: Report, *, limit: int = LIMIT, pictures: Iterable[Picture] = ()) -> str:
    """The page as text; equal reports give equal pages.

    Raises:
        MissingExtra: without jinja2.
    """
    template = _template()
    styles = _asset("report.css")
    script = "".join(map(_asset, ("report_model.js", "report_view.js", "report_work.js", "report_nav.js")))
    fixed = len(styles) + len(script) + 8_000
    drawn = [vars(picture) for picture in pictures]
    data = ""
    for level in range(len(TRIMMED) + 1):
        data = embedded({**payload(report, level), "pictures": drawn})
        if len(data) + fixed <= limit:
            break
    return template.render(
        title=_title(report), styles=styles, script=script, data=data, summary=report.summary(),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra(
            "the page needs jinja2: pip install 'fxopt[inspect]' (report.to_json works without)"
        ) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_asset("report.html.j2"))


def _asset(name: str) -> str:
    return (resources.files("fxopt.inspection") / name).read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """`data` as ASCII JSON that cannot end or open an HTML element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, sort_keys=True, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(report: Report) -> str:
    models = list(dict.fromkeys(str(graph.model) for graph in report.graphs))
    return f"fxopt: {', '.join(models[:3])}" if models else "fxopt: nothing compiled"


# -- data -----------------------------------------------------------------------------------------------------------


class _Strings:
    """Every text of the node tables once; the tables hold its number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: object) -> int:
        return self.numbers.setdefault(str(text), len(self.numbers))


def payload(report: Report, trim: int = 0) -> dict[str, Any]:
    """What the page shows, as plain data; `trim` entries of :data:`TRIMMED` are left out."""
    left_out = {name for name, _ in TRIMMED[:trim]}
    strings = _Strings()
    graphs = [
        {
            **_graph(graph, index, strings, left_out),
            "work": work(graph, report.environment),
            "measured": measured(graph, report.environment),
            "least": least_seconds(graph, report.environment),
        }
        for index, graph in enumerate(report.graphs)
    ]
    used = {remark.code for remark in report.remarks if remark.code}
    return {
        "schema": SCHEMA_VERSION,
        "title": _title(report),
        "environment": dict(report.environment),
        "leftOut": [words for name, words in TRIMMED[:trim]],
        "reasons": {c: [r.title, r.meaning, r.advice] for c, r in REASONS.items() if c in used},
        "graphs": graphs,
        "strings": list(strings.numbers),
    }


def _graph(graph: GraphRecord, index: int, strings: _Strings, left_out: set[str]) -> dict[str, Any]:
    tables = "all tables" not in left_out and ("tables" not in left_out or index == 0)
    return {
        "id": graph.compile_id,
        "model": graph.model,
        "role": graph.role,
        "inputs": graph.inputs,
        "error": graph.error,
        "seconds": graph.seconds,
        "inductor": graph.inductor_seconds,
        "before": graph.nodes_before,
        "after": graph.nodes_after,
        "settings": [[s.key, s.value, s.origin] for s in graph.settings],
        "techniques": _techniques(graph),
        "strips": _strips(graph),
        "remarks": [
            [r.technique, r.status, r.path, r.message, r.code, r.source or places.source_of(graph, r.path), r.count]
            for r in graph.remarks
        ],
        "stages": [_stage(stage, strings, tables, "code" not in left_out) for stage in graph.stages],
        "kernels": [
            {
                "name": k.name, "family": k.family, "nodes": k.nodes, "modules": k.modules,
                "source": "" if "sources" in left_out else k.source,
                "configuration": k.configuration,
                "resources": {
                    key: value for key, value in k.resources.items()
                    if "assembly" not in left_out or len(str(value)) < 200
                },
            }
            for k in graph.kernels
        ],
    }  # fmt: skip


def _techniques(graph: GraphRecord) -> list[list[Any]]:
    """``[name, exact]`` of what ran or was refused, in the order of the passes."""
    exact = {stage.name: stage.exact for stage in graph.stages[1:]}
    for remark in graph.remarks:
        if remark.status != "analysis":
            exact.setdefault(remark.technique, True)
    return [[name, value] for name, value in exact.items()]


def _strips(graph: GraphRecord) -> list[dict[str, Any]]:
    """One strip a container of layers, runs of like layers folded; what lies in no layer goes to the last one."""
    layers = places.layers_of(graph)
    runs = places.folded(layers, graph.remarks)
    odd = {layer.path for layer in places.differing(layers, graph.remarks)}
    strips: list[dict[str, Any]] = []
    for container in dict.fromkeys(layer.container for layer in layers):
        own = [run for run in runs if run.layers[0].container == container]
        members = [layer for run in own for layer in run.layers]
        strips.append(
            {
                "path": container,
                "count": len(members),
                "kinds": len({layer.kind for layer in members}),
                "differ": [layer.index for layer in members if layer.path in odd],
                "runs": [
                    {
                        "label": run.label,
                        "paths": [layer.path for layer in run.layers],
                        "cells": _cells(graph.remarks, run.layers[0].path),
                    }
                    for run in own
                ],
            }
        )
    outside = [r for r in graph.remarks if not any(places.within(r.path, layer.path) for layer in layers)]
    if outside or not strips:
        rest = {"label": "outside of layers" if strips else "graph", "paths": [""], "cells": _cells(outside, "")}
        strips.append({"path": "", "count": 0, "kinds": 0, "differ": [], "runs": [rest]})
    return strips


def _cells(remarks: Iterable[Remark], path: str) -> dict[str, list[Any]]:
    """``{technique: [[status, code, places], ...]}`` at `path` and below."""
    cells: dict[str, dict[tuple[str, str], int]] = {}
    for remark in remarks:
        if places.within(remark.path, path):
            counts = cells.setdefault(remark.technique, {})
            key = (remark.status, remark.code)
            counts[key] = counts.get(key, 0) + remark.count
    return {name: [[*key, number] for key, number in counts.items()] for name, counts in cells.items()}


def _stage(stage: Stage, strings: _Strings, tables: bool, code: bool) -> dict[str, Any]:
    return {
        "name": stage.name,
        "level": stage.level,
        "seconds": stage.seconds,
        "before": stage.nodes_before,
        "after": stage.nodes_after,
        "exact": stage.exact,
        "counts": [len(stage.added), len(stage.removed), len(stage.changed)],
        "noop": stage.is_noop and stage.nodes_before == stage.nodes_after,
        "added": [_row(row, strings) for row in stage.added] if tables else [],
        "changed": [_row(row, strings) for row in stage.changed] if tables else [],
        "removed": stage.removed if tables else [],
        "order": ranges(stage.order) if tables and stage.order is not None else None,
        "code": stage.code if code else "",
    }


def _row(row: NodeRow, strings: _Strings) -> list[Any]:
    texts = (row.name, row.op, row.target, row.args, row.shape, row.dtype, row.module, row.source)
    own = tuple(row.origins) == (row.id,)
    return [row.id, *map(strings, texts), 0 if own else list(row.origins)]


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Consecutive numbers as ``[first, how many]``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][0] + found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found
