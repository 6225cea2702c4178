"""One question, one paragraph: what happened to this technique at this place, why, and what to change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fxopt.inspection import places
from fxopt.passes.reasons import REASONS
from fxopt.passes.record import GraphRecord, Remark
from fxopt.passes.technique import SettingError, Technique, nearest

if TYPE_CHECKING:
    from fxopt.reporting import Report

MOST = 4
"""Outcomes told in one paragraph; the others are counted."""
WHOLE = ("FX501", "FX901", "FX902")
"""Codes of remarks about everything a technique would have done in a graph, wherever they point to."""


@dataclass(frozen=True)
class Finding:
    """One outcome and the graphs it was the same in. ``code`` is empty for applied places."""

    status: str
    path: str
    message: str
    code: str
    source: str
    graphs: tuple[str, ...]
    count: int

    @property
    def rule(self) -> str:
        reason = REASONS.get(self.code)
        return f"{reason.code}, {reason.title}: {reason.meaning}" if reason else ""

    @property
    def advice(self) -> str:
        reason = REASONS.get(self.code)
        return reason.advice if reason else ""


@dataclass(frozen=True)
class Answer:
    """What :func:`ask` found out. ``status`` is applied, missed, blocked, analysis, absent (no remark), unknown
    (no such module) or empty (nothing was compiled)."""

    technique: str
    path: str
    status: str
    findings: tuple[Finding, ...] = ()
    settings: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    nearest: str = ""
    source: str = ""
    passes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        for finding, kept in zip(data["findings"], self.findings, strict=True):
            finding["rule"], finding["advice"] = kept.rule, kept.advice
        return {**data, "paragraph": paragraph(self)}


def why(report: Report, technique: str, module_path: str = "") -> str:
    """The paragraph for `technique` at `module_path` (everywhere when empty)."""
    return paragraph(ask(report, technique, module_path))


def ask(report: Report, technique: str, module_path: str = "") -> Answer:
    """The facts behind the paragraph.

    Raises:
        SettingError: for a technique that neither this installation nor the report knows.
    """
    known = {*Technique.registry, *(r.technique for r in report.remarks), *(s.name for s in report.passes)}
    if technique not in known:
        names = sorted(known - {"captured"})
        raise SettingError(
            f"There is no technique {technique!r}. Known: {', '.join(names)}.{nearest(technique, names)}"
        )
    if not report.graphs:
        return Answer(technique, module_path, "empty")
    settings = tuple(
        dict.fromkeys(
            f"{s.value} ({s.origin})" for graph in report.graphs for s in graph.settings if s.key == technique
        )
    )
    paths = places.module_paths(report.graphs)
    path = places.resolve(module_path, paths)
    if path is None:
        return Answer(
            technique, module_path, "unknown", settings=settings, nearest=places.nearest_path(module_path, paths)
        )
    findings = _findings(report.graphs, technique, path)
    here = next((s for g in report.graphs if path and (s := places.source_of(g, path))), "")
    passes = tuple(dict.fromkeys(s.name for s in report.passes if s.name == technique))
    if findings:
        return Answer(technique, path, findings[0].status, findings, settings, (), "", here, passes)
    acted = (r.path for r in report.remarks if r.technique == technique and r.status == "applied" and r.path)
    return Answer(technique, path, "absent", (), settings, tuple(dict.fromkeys(acted)), "", here, passes)


_RANK = {"blocked": 0, "missed": 1, "applied": 2, "analysis": 3}


def _findings(graphs: tuple[GraphRecord, ...], technique: str, path: str) -> tuple[Finding, ...]:
    merged: dict[tuple[str, str, str, str, str], tuple[list[str], int]] = {}
    for graph in graphs:
        for remark in graph.remarks:
            if remark.technique != technique or not (remark.code in WHOLE or _concerns(remark, path)):
                continue
            source = remark.source or places.source_of(graph, remark.path or path)
            key = (remark.status, remark.path, remark.message, remark.code, source)
            seen, count = merged.get(key, ([], 0))
            merged[key] = ([*dict.fromkeys([*seen, _graph_name(graph)])], count + remark.count)
    findings = [
        Finding(status, at, message, code, source, tuple(seen), count)
        for (status, at, message, code, source), (seen, count) in merged.items()
    ]
    # A place that was rewritten answers first; otherwise the rule or the difference does. Nearer places come first.
    exact = any(f.path == path and f.code not in WHOLE for f in findings)
    if path:
        findings = [f for f in findings if not exact or places.within(f.path, path)]
        order = {"applied": 0, "blocked": 1, "missed": 2, "analysis": 3}
    else:
        order = _RANK
    return tuple(sorted(findings, key=lambda f: (order[f.status], _distance(f.path, path))))


def _concerns(remark: Remark, path: str) -> bool:
    """A remark concerns a path when it is about it, about something inside it, or about what holds it."""
    return places.within(remark.path, path) or places.within(path, remark.path)


def _distance(at: str, path: str) -> int:
    return abs(at.count(".") - path.count(".")) + (at != path)


def _graph_name(graph: GraphRecord) -> str:
    inputs = f" {graph.inputs}" if graph.inputs else ""
    return f"{graph.compile_id} ({graph.model} {graph.role}{inputs})"


def paragraph(answer: Answer) -> str:
    """`answer` in words: one paragraph, no line breaks."""
    place = answer.path or "the whole model"
    name = answer.technique
    if answer.status == "empty":
        return (
            f"Nothing can be said about {name}: nothing has been compiled yet. Compile with "
            "fxopt.compile(model, ...) or torch.compile(model, backend='fxopt'), call the model once, and ask again."
        )
    if answer.status == "unknown":
        hint = f" Did you mean {answer.nearest}?" if answer.nearest else ""
        return (
            f"The report knows no module {answer.path!r}.{hint} Paths are dotted names of model.named_modules() that "
            "ran in a compiled graph; a module that is missing here ran outside of it (a graph break) or not at all."
        )
    if answer.status == "absent":
        return _absent(answer, place)
    if not answer.path:
        return _everywhere(answer)
    alike = _alike(answer.findings)
    sentences, told = [], {""}
    for i, finding in enumerate(alike[:MOST]):
        sentences.append(_sentence(name, finding, first=i == 0, rule=finding.code not in told))
        told.add(finding.code)
    if len(alike) > MOST:
        sentences.append(f"{sum(f.count for f in alike[MOST:])} more remarks at {place}.")
    if answer.settings and answer.status == "applied":
        sentences.append(f"Set by: {'; '.join(answer.settings)}.")
    return " ".join(sentences)


def _alike(findings: tuple[Finding, ...]) -> list[Finding]:
    """Findings that differ in nothing but their place, as one that names the first two places."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for f in findings:
        groups.setdefault((f.status, f.message, f.code, f.graphs), []).append(f)
    merged = []
    for same in groups.values():
        paths = list(dict.fromkeys(f.path for f in same))
        more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
        count = sum(f.count for f in same) if len(paths) == 1 else 1
        merged.append(dataclasses.replace(same[0], path=", ".join(paths[:2]) + more, count=count))
    return merged


def _sentence(name: str, finding: Finding, *, first: bool, rule: bool = True) -> str:
    where = finding.path or "the whole graph"
    count = f" ({finding.count} places)" if finding.count > 1 else ""
    graphs = ", ".join(finding.graphs[:MOST]) + (", ..." if len(finding.graphs) > MOST else "")
    subject = name if first else "It"
    verb = {
        "applied": f"{subject} was applied at",
        "missed": f"{subject} did not match at",
        "blocked": f"{subject} was not allowed at",
        "analysis": f"{name} changed nothing and noted at" if first else "It was noted at",
    }[finding.status]
    text = f"{verb} {where}{count} in graph {graphs}: {finding.message}"
    text = text if text.endswith(".") else f"{text}."
    if finding.rule and rule:
        text += f" The rule is {finding.rule}"
    if finding.source:
        text += f" The code is at {finding.source}."
    if finding.advice and rule:
        text += f" What to change: {finding.advice}"
    return text


def _everywhere(answer: Answer) -> str:
    totals: dict[str, int] = {}
    for finding in answer.findings:
        totals[finding.status] = totals.get(finding.status, 0) + finding.count
    counted = [f"{totals[s]} {s}" for s in ("applied", "missed", "blocked") if s in totals]
    text = f"{answer.technique}: {', '.join(counted) or 'only notes'}."
    told: set[tuple[str, str]] = set()
    for finding in answer.findings:
        key = (finding.status, finding.code)
        if key not in told and len(told) < MOST:
            told.add(key)
            text += " " + _sentence(answer.technique, finding, first=False)
    if answer.settings:
        text += f" Set by: {'; '.join(answer.settings)}."
    return text


def _absent(answer: Answer, place: str) -> str:
    name = answer.technique
    at = f" The code there begins at {answer.source}." if answer.source else ""
    if not answer.settings and not answer.passes:
        return (
            f"{name} did not look at {place}: it was not asked for in this compilation. Give it to fxopt.compile, "
            f"to options={{{name!r}: ...}}, or decorate the module.{at}"
        )
    elsewhere = ""
    if answer.elsewhere:
        shown = ", ".join(answer.elsewhere[:8]) + (
            f" and {len(answer.elsewhere) - 8} more" * (len(answer.elsewhere) > 8)
        )
        elsewhere = f" It acted at {shown}."
    setting = f" The setting is {'; '.join(answer.settings)}." if answer.settings else ""
    technique = Technique.registry.get(name)
    general = all(s.endswith(("(default)", "(options)")) for s in answer.settings)
    cause = "there is nothing there that it rewrites"
    if technique is None or not technique.exact or not general:  # such a setting may be for some layers only
        cause = f"its setting does not name this place, or {cause}"
    return f"{name} left {place} as it is: {cause}.{setting}{elsewhere}{at}"
