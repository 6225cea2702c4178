"""The views behind ``fxopt inspect``: plain functions, each giving an object with ``.text()`` and ``.to_dict()``."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fxopt.inspection import diff as differences
from fxopt.inspection import places, typecheck
from fxopt.inspection import why as reasons_why
from fxopt.inspection.repro import repro
from fxopt.inspection.scripts import ScriptReport, run_script
from fxopt.inspection.text import View, wrapped
from fxopt.inspection.work import measured_lines
from fxopt.passes import reasons
from fxopt.passes.record import GraphRecord, KernelRecord, NodeRow
from fxopt.passes.technique import SettingError, nearest

if TYPE_CHECKING:
    from torch import nn

    from fxopt.reporting import Report

__all__ = [
    "ScriptReport",
    "Unmet",
    "View",
    "diff",
    "diff_stages",
    "expect",
    "explain",
    "kernels",
    "load",
    "numerics",
    "reason_page",
    "repro",
    "run_script",
    "stages",
    "summary",
    "unmet",
    "why",
]


class Unmet(AssertionError):
    """An expectation about a report does not hold; the message says what was counted and why."""


def load(path: str | os.PathLike[str]) -> Report:
    """Read a saved report.

    Raises:
        ValueError: for a file that is no report, is truncated, damaged, or has another schema version. Every value is
            checked against the type its field has, so that a hostile file fails here and nowhere later.
        OSError: for a file that cannot be read.
    """
    from fxopt.reporting import Report

    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no report {str(path)!r}") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no JSON report (truncated?): {str(error)[:200]}") from None
    try:
        report = Report.from_dict(data)
    except (AttributeError, RecursionError) as error:
        raise ValueError(f"the report is damaged: {type(error).__name__}: {error}") from None
    wrong = typecheck.first_mismatch(report.graphs) or typecheck.first_mismatch(report.environment, dict[str, str])
    if wrong:
        raise ValueError(f"the report is damaged: {wrong}")
    return report


def summary(report: Report) -> View:
    """One block a graph: what was applied, what not, the first reason."""
    from fxopt.reporting import summary_lines

    data = {
        "environment": dict(report.environment),
        "graphs": [
            {
                "compile_id": g.compile_id, "model": g.model, "role": g.role, "inputs": g.inputs, "error": g.error,
                "nodes_before": g.nodes_before, "nodes_after": g.nodes_after, "seconds": g.seconds,
                "techniques": {
                    name: {s: g.count(name, s) for s in ("applied", "missed", "blocked") if g.count(name, s)}
                    for name in dict.fromkeys(r.technique for r in g.remarks)
                },
                "layers": _layer_lines(g),
            }
            for g in report.graphs
        ],
    }  # fmt: skip

    def lines(width: int) -> Iterable[str]:
        if not report.graphs:
            yield "fxopt: nothing has been compiled yet"
        for graph in report.graphs:
            for line in summary_lines(graph):
                yield from _hanging(line, width)
            yield from (f"  {line}" for line in _layer_lines(graph))
            if graph.error:
                yield from wrapped(f"This compilation failed: {graph.error.splitlines()[0]}", width, "  ")
        if isinstance(report, ScriptReport) and report.failure:
            yield from wrapped(f"fxopt: the script failed: {report.failure.splitlines()[-1]}", width)

    return View("summary", data, lines)


def _hanging(line: str, width: int) -> list[str]:
    """A line of the summary; where it is too wide, what goes on stands under its own text."""
    indent = len(line) - len(line.lstrip())
    return textwrap.wrap(line, width, subsequent_indent=" " * (indent + 4), break_on_hyphens=False) or [""]


def _layer_lines(graph: GraphRecord) -> list[str]:
    layers = places.layers_of(graph)
    odd = places.differing(layers, graph.remarks)
    lines = []
    for container in dict.fromkeys(layer.container for layer in layers):
        own = [layer for layer in layers if layer.container == container]
        indices = [str(layer.index) for layer in odd if layer.container == container]
        tail = f", {len(indices)} differ: {', '.join(indices)}" if indices else ""
        lines.append(f"{container} x{len(own)}{tail}")
    return lines


def numerics(model: nn.Module, inputs: Any, *techniques: Any, **options: Any) -> View:
    """The view of :func:`fxopt.inspection.numerics.numerics`, with the same arguments."""
    from fxopt.inspection.numerics import numerics as bisect

    return bisect(model, inputs, *techniques, **options).view


def why(report: Report, technique: str, module_path: str = "") -> View:
    """The paragraph of :meth:`fxopt.Report.why`."""
    answer = reasons_why.ask(report, technique, module_path)
    paragraph = reasons_why.paragraph(answer)
    return View("why", answer.to_dict(), lambda width: wrapped(paragraph, width))


def explain(code: str) -> View:
    """A reason code in words. Raises SettingError for one that does not exist."""
    if not code.strip():
        raise SettingError("explain needs a reason code: fxopt inspect --view explain FX104")
    found = reasons.REASONS.get(code.strip().upper())
    if found is None:
        raise SettingError(
            f"There is no reason code {code!r}. Known codes: {', '.join(reasons.REASONS)}."
            f"{nearest(code.upper(), reasons.REASONS)}"
        )
    return View(
        "explain",
        dataclasses.asdict(found),
        lambda width: [
            f"{found.code} {found.title}",
            *wrapped(found.meaning, width, "  "),
            *wrapped(f"What to do: {found.advice}", width, "  "),
        ],
    )


def reason_page() -> str:
    """``docs/reason_codes.md``: every reason code with its meaning and what to do, from the one table."""
    families = {
        "FX1": "The graph is built differently",
        "FX2": "The meaning is not proven",
        "FX3": "It would not pay",
        "FX4": "Resources of the device",
        "FX5": "What was asked for",
        "FX6": "The road to the backend",
        "FX9": "Inside fxopt",
    }
    lines = [
        "# Reason codes",
        "",
        "Every place a pass looked at and did not rewrite has one of these codes in its remark. `fxopt inspect --view "
        "explain FX104` prints one; `fxopt.report().why(technique, module_path)` says which one it was, where, "
        "and what to change.",
        "",
        "This page is `fxopt.inspection.views.reason_page()`, made of `passes/reasons.py`; a test compares the two.",
    ]
    for family, title in families.items():
        lines += ["", f"## {family}xx: {title}"]
        for reason in reasons.REASONS.values():
            if reason.code.startswith(family):
                lines += [
                    "",
                    f"### {reason.code} {reason.title}",
                    "",
                    reason.meaning,
                    "",
                    f"What to do: {reason.advice}",
                ]
    return "\n".join(lines) + "\n"


def kernels(report: Report) -> View:
    """Measured times, where there are, and the generated kernels: places, configuration, resources."""
    found = [(graph, kernel) for graph in report.graphs for kernel in graph.kernels]
    data = {
        "kernels": [{"graph": g.compile_id, **dataclasses.asdict(k)} for g, k in found],
        "measured": [{"graph": g.compile_id, **dataclasses.asdict(g.profile)} for g in report.graphs if g.profile],
    }

    def lines(width: int) -> Iterable[str]:
        yield from (line for graph in report.graphs for line in measured_lines(graph, report.environment, width))
        if not found:
            yield from wrapped(
                "No kernel was generated: rewritten graphs without kernels of their own are finished by Inductor.",
                width,
            )
            return
        for graph, kernel in found:
            yield from wrapped(f"{kernel.name}  {kernel.family}, graph {graph.compile_id} {graph.role}", width)
            yield from wrapped(f"for {_modules(kernel)}", width, "  ")
            told = {k: v for k, v in kernel.resources.items() if not _per_function(k) and not _long(v)}
            yield from wrapped(_pairs({**kernel.configuration, **told}), width, "  ")
            yield from _functions(kernel)
        spilled = [k.name for _, k in found if _spills(k)]
        if spilled:
            yield from wrapped(f"Registers spilled: {', '.join(spilled)}.", width)

    return View("kernels", data, lines)


def _modules(kernel: KernelRecord) -> str:
    """Where a kernel runs, layers folded: ``model.layers.*.mlp.down_proj x80``."""
    counts: dict[str, int] = {}
    for path in kernel.modules:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} x{n}" if n > 1 else name for name, n in counts.items()) or "no module"


_MEASURES = ("registers", "spills", "shared bytes", "assembly")


def _per_function(key: str) -> str:
    """The measure at the end of a resource's name; empty where it is none: ``async_split registers``."""
    return next((m for m in _MEASURES if key == m or key.endswith(f" {m}")), "")


def _functions(kernel: KernelRecord) -> list[str]:
    """One line for each function of a kernel: registers, spills, shared memory."""
    functions: dict[str, dict[str, Any]] = {}
    for key, value in kernel.resources.items():
        measure = _per_function(key)
        if measure and not _long(value):
            functions.setdefault(key.removesuffix(measure).strip() or kernel.family, {})[measure] = value
    width = max(map(len, functions), default=0)
    return [
        f"  {name:<{width}}  " + "  ".join(f"{found[m]:>5} {m}" for m in _MEASURES if m in found)
        for name, found in functions.items()
    ]


def _long(value: object) -> bool:
    return isinstance(value, str) and (len(value) > 60 or "\n" in value)


def _pairs(values: dict[str, object]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())


def _spills(kernel: KernelRecord) -> bool:
    return any("spill" in key and isinstance(v, (int, float)) and v > 0 for key, v in kernel.resources.items())


def diff(report_a: Report, report_b: Report) -> View:
    """What the second report has otherwise than the first."""
    found = differences.compare(report_a, report_b)

    def lines(width: int) -> Iterable[str]:
        if found.same:
            yield "no difference"
            return
        for line in found.environment:
            yield from wrapped(line, width)
        for mark, names in (("-", found.only_a), ("+", found.only_b)):
            for name in names:
                yield from wrapped(f"{mark} graph {name}", width)
        for graph in found.graphs:
            if graph.same:
                continue
            yield f"graph {graph.name}: {graph.nodes[0]} -> {graph.nodes[1]} nodes"
            for technique, status, a, b in graph.counts:
                yield f"  {technique} {status}: {a} -> {b}"
            for mark, remarks in (("-", graph.gone), ("+", graph.new)):
                for r in remarks:
                    text = f"{mark} {r.technique} {r.status} {r.code} {r.path}: {r.message}".replace("  ", " ")
                    yield from wrapped(text, width, "  ")
            for line in (*graph.settings, *graph.kernels):
                yield from wrapped(line, width, "  ")

    return View("diff", found.to_dict(), lines)


def diff_stages(graph: GraphRecord, i: int, j: int) -> View:
    """Nodes that stages `i` to `j` of one graph added, removed and changed."""
    found = differences.compare_stages(graph, i, j)

    def lines(width: int) -> Iterable[str]:
        yield (
            f"graph {found.graph}: {found.names[0]} -> {found.names[1]}  "
            f"+{len(found.added)} -{len(found.removed)} ~{len(found.changed)}"
        )
        marked: dict[str, list[tuple[str, NodeRow]]] = {}
        for mark, rows in (("-", found.removed), ("+", found.added)):
            for row in rows:
                marked.setdefault(row.module, []).append((mark, row))
        for before, after in found.changed:
            marked.setdefault(after.module, []).extend((("~<", before), ("~>", after)))
        for module, entries in marked.items():
            yield module or "(outside of modules)"
            for mark, row in entries:
                yield f"  {mark} {row_text(row)}"

    return View("diff_stages", found.to_dict(), lines)


def stages(report: Report, graph: int, i: int, j: int) -> tuple[GraphRecord, int, int]:
    """The arguments of :func:`diff_stages` for graph number `graph` of a report; raises SettingError without it."""
    if not -len(report.graphs) <= graph < len(report.graphs):
        raise SettingError(f"graph {graph} does not exist; the report has {len(report.graphs)} (0 is the first).")
    return report.graphs[graph], i, j


def row_text(row: NodeRow) -> str:
    """``name = target(args)  dtype[shape]``."""
    shape = f"  {row.dtype}[{row.shape}]" if row.dtype else ""
    target = "" if row.op in ("placeholder", "get_attr") else f" = {row.target}({places.short_names(row.args)})"
    return f"{places.short_names(row.name)}{target}{shape}"


# -- expectations ---------------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_EXPECTATION = re.compile(r"^\s*([A-Za-z_][\w-]*)(?:\.(applied|missed|blocked))?\s*(>=|<=|==|!=|>|<|=)\s*(\d+)\s*$")


def unmet(report: Report, expectation: str) -> str:
    """Why `expectation` does not hold, in words; empty when it holds.

    An expectation is ``NAME[.STATUS] COMPARISON NUMBER``, several of them with commas: ``"layer_skip>=1"``,
    ``"async_softmax.missed==0"``, ``"graphs<=2"``, ``"kernels>0"``, ``"errors==0"``.

    Raises:
        SettingError: for a text that is no expectation, or a technique that does not exist.
    """
    messages = [message for part in expectation.split(",") if (message := _unmet(report, part))]
    return " ".join(messages)


def expect(report: Report, expectation: str) -> bool:
    """True, or raises :class:`Unmet` saying what was counted; see :func:`unmet` for the form."""
    message = unmet(report, expectation)
    if message:
        raise Unmet(message)
    return True


def _unmet(report: Report, text: str) -> str:
    found = _EXPECTATION.match(text)
    if not found:
        raise SettingError(
            f"{text.strip()!r} is no expectation. Write NAME>=NUMBER, such as 'layer_skip>=1', 'layer_skip.missed==0', "
            f"'graphs<=2' or 'kernels>0'; comparisons are {' '.join(_COMPARISONS)}."
        )
    name, status, sign, wanted = found[1], found[2] or "applied", found[3], int(found[4])
    totals = {
        "graphs": len(report.graphs),
        "kernels": len(report.kernels),
        "errors": sum(bool(graph.error) for graph in report.graphs),
    }
    counted = totals[name] if name in totals else report.count(name, status)
    if _COMPARISONS["==" if sign == "=" else sign](counted, wanted):
        if name not in totals and not counted:
            reasons_why.ask(report, name)  # a misspelt technique is never there, and that must not pass
        return ""
    if name in totals:
        errors = "; ".join(g.error.splitlines()[0] for g in report.graphs if g.error) if name == "errors" else ""
        return f"expected {text.strip()}, found {counted}.{f' {errors}' if errors else ''}"
    return f"expected {text.strip()}, found {counted} {status}. {reasons_why.why(report, name)}"
