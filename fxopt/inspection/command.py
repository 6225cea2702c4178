"""``fxopt inspect``: run a script or read a saved report, and look at it."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Annotated, Any

import typer


def inspect(
    context: typer.Context,
    source: Annotated[pathlib.Path | None, typer.Argument(help="A saved report (.json).")] = None,
    view: Annotated[str, typer.Option(help="summary, why, diff, kernels, explain.")] = "summary",
    technique: Annotated[str, typer.Option(help="For why.")] = "",
    path: Annotated[str, typer.Option(help="For why: a module path.")] = "",
    other: Annotated[pathlib.Path | None, typer.Option(help="For diff: the second report.")] = None,
    code: Annotated[str, typer.Option(help="For explain: a reason code.")] = "",
    expect: Annotated[list[str] | None, typer.Option(help='Exit with 1 unless it holds, e.g. "layer_skip>=1".')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[pathlib.Path | None, typer.Option(help="Write the page.")] = None,
    save: Annotated[pathlib.Path | None, typer.Option(help="Save the report as JSON.")] = None,
) -> None:
    """Everything after ``--`` is a script with its arguments: ``fxopt inspect -- script.py 3``."""
    from fxopt.inspection import views

    try:
        if view == "explain":
            _show(views.explain(code), as_json)
            return
        if source is not None and source.suffix == ".py":
            report = views.run_script(source, context.args)
        elif source is not None:
            report = views.load(source)  # type: ignore[assignment]
        else:
            _fail("inspect needs a saved report, or a script after --: fxopt inspect -- script.py args")
        shown: Any
        if view == "summary":
            shown = views.summary(report)
        elif view == "why":
            shown = views.why(report, technique, path)
        elif view == "kernels":
            shown = views.kernels(report)
        elif view == "diff":
            if other is None:
                _fail("diff needs --other REPORT.json")
            shown = views.diff(report, views.load(other))  # type: ignore[arg-type]
        else:
            _fail(f"there is no view {view!r}: summary, why, diff, kernels, explain.")
        _show(shown, as_json)
        if html is not None:
            report.to_html(html)
        if save is not None:
            report.to_json(save)
    except (ValueError, KeyError, OSError, ImportError) as error:
        _fail(str(error.args[0]) if isinstance(error, KeyError) else str(error))
    failed = [message for message in (views.unmet(report, text) for text in expect or []) if message]
    for message in failed:
        print(f"fxopt: {message}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _show(shown: Any, as_json: bool) -> None:
    print(json.dumps(shown.to_dict(), indent=1) if as_json else shown.text())


def _fail(message: str) -> Any:
    print(f"fxopt: {message}", file=sys.stderr)
    raise typer.Exit(2)
