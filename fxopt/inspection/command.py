"""``fxopt inspect``: run a script or read a saved report, and look at it."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer

VIEWS = ("summary", "why", "diff", "stages", "kernels", "numerics", "repro", "explain")
"""What ``--view`` takes."""

SHORTFALL, MISUSE, SCRIPT_FAILED, PIPE_CLOSED = 1, 2, 3, 141
"""Exit codes besides 0: an expectation does not hold, or a pass diverges; bad input; the script failed; the output was
closed before its end (what a shell says of ``head``)."""


def inspect(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(help="A saved report (.json) or a script (.py); numerics also take a model, explain a code."),
    ] = None,
    view: Annotated[str, typer.Option(help=", ".join(VIEWS) + ".")] = "summary",
    technique: Annotated[str, typer.Option(help="For why.")] = "",
    path: Annotated[str, typer.Option(help="For why: a module path.")] = "",
    other: Annotated[
        pathlib.Path | None, typer.Option(help="For diff: the second report; it may also follow the first.")
    ] = None,
    code: Annotated[str, typer.Option(help="For explain: a reason code; it may also stand alone.")] = "",
    graph: Annotated[
        int | None,
        typer.Option(help="For stages and repro: the graph, 0 is the first. Default: 0, or one that has the kernel."),
    ] = None,
    stage: Annotated[int, typer.Option(help="For repro: the stage, -1 is the last. For stages: the later one.")] = -1,
    since: Annotated[int, typer.Option(help="For stages: the earlier one, 0 is the captured graph.")] = 0,
    kernel: Annotated[str, typer.Option(help="For repro: only what this kernel computes.")] = "",
    minify: Annotated[bool, typer.Option(help="For repro: make it small. Runs the recorded code.")] = False,
    tolerance: Annotated[float, typer.Option(help="For repro: how far compiled may be from eager.")] = 1e-3,
    set_: Annotated[list[str] | None, typer.Option("--set", help="For numerics: a technique. Repeatable.")] = None,
    passes: Annotated[str, typer.Option(help="For numerics: so many passes, or only these names (a,b).")] = "",
    compiled: Annotated[bool, typer.Option(help="For numerics: also as compiled, which takes a compilation.")] = True,
    expect: Annotated[list[str] | None, typer.Option(help='Exit with 1 unless it holds, e.g. "layer_skip>=1".')] = None,
    profile: Annotated[bool, typer.Option(help="Measure each kernel while the script runs; compiles afresh.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[pathlib.Path | None, typer.Option(help="Write the page.")] = None,
    save: Annotated[pathlib.Path | None, typer.Option(help="Save the report as JSON.")] = None,
) -> None:
    """Look at what was compiled.

    Everything after ``--`` is a script with its arguments: ``fxopt inspect -- script.py 3``. Exit codes: 0 it is as
    asked, 1 an expectation does not hold or a pass diverges, 2 bad input, 3 the script failed (what it compiled before
    is shown all the same).
    """
    from fxopt.inspection import views
    from fxopt.profiling import measuring

    if view not in VIEWS:
        _fail(f"there is no view {view!r}: {', '.join(VIEWS)}.")
    try:
        if view == "explain":
            _show(views.explain(code or source or ""), as_json)
            return
        if view == "numerics":
            numbers = _numerics(source, context.args, set_, passes, compiled)
            _show(numbers.view, as_json)
            if numbers.first:
                raise typer.Exit(SHORTFALL)
            return
        if profile and not (source or "").endswith(".py"):
            _fail("--profile measures while a script runs: fxopt inspect --profile -- script.py args")
        with _recording("full" if view == "repro" else ""), measuring() if profile else nullcontext():
            if view == "diff" and other is None and len(context.args) == 1:
                other = pathlib.Path(context.args.pop())
            report = _report(source, context.args)
        # Saved before it is shown: a view that cannot be made must not lose what a script compiled.
        if save is not None:
            report.to_json(save)
        if html is not None:
            report.to_html(html)
        shown: Any
        if view == "why":
            if not technique:
                _fail("why needs --technique NAME, and --path MODULE for one place.")
            shown = views.why(report, technique, path)
        elif view == "kernels":
            shown = views.kernels(report)
        elif view == "diff":
            if other is None:
                _fail("diff needs two reports: fxopt inspect --view diff before.json after.json")
            shown = views.diff(report, views.load(other))  # type: ignore[arg-type]
        elif view == "stages":
            shown = views.diff_stages(*views.stages(report, graph or 0, since, stage))
        elif view == "repro":
            shown = views.repro(report, graph, stage, kernel=kernel, minify=minify, tolerance=tolerance)
        else:
            shown = views.summary(report)
        _show(shown, as_json)
        failed = [message for message in (views.unmet(report, text) for text in expect or []) if message]
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None
    except (ValueError, KeyError, OSError, ImportError) as error:
        _fail(str(error.args[0]) if isinstance(error, KeyError) else str(error))
    for message in failed:
        print(f"fxopt: {message}", file=sys.stderr)
    if failed:
        raise typer.Exit(SHORTFALL)
    if getattr(report, "failure", ""):
        print(f"fxopt: the script failed: {report.failure}", file=sys.stderr)
        raise typer.Exit(SCRIPT_FAILED)


def _report(source: str | None, args: list[str]) -> Any:
    from fxopt.inspection import views

    if source is None:
        _fail("inspect needs a saved report, or a script after --: fxopt inspect -- script.py args")
    assert source is not None
    if source.endswith(".py"):
        return views.run_script(source, args)
    if args:
        _fail(f"{' '.join(args)!r} is one report too many; two are for --view diff.")
    return views.load(source)


def _numerics(source: str | None, args: list[str], settings: list[str] | None, passes: str, compiled: bool) -> Any:
    """Of a model by name, or of ``model`` and ``inputs`` that a script defines (and ``techniques``, if it does)."""
    from fxopt import commands
    from fxopt.inspection.numerics import numerics
    from fxopt.inspection.scripts import names_of
    from fxopt.planning import default_inputs

    if source is None or source.endswith(".json"):
        _fail("numerics runs the model, which no report holds: give a model (folder or hub name), or a script after -- "
              "that defines `model` and `inputs`.")  # fmt: skip
    assert source is not None
    techniques: list[Any] = list(commands.techniques_of(settings))
    limit = int(passes) if passes.isdigit() else [p.strip() for p in passes.split(",")] if passes else None
    if source.endswith(".py"):
        names = names_of(source, args, ("model", "inputs"))
        techniques = [*names.get("techniques", ()), *techniques]
        return numerics(names["model"], names["inputs"], *techniques, passes=limit, compiled=compiled)
    model = commands.load_model(source)
    return numerics(model, default_inputs(model), *techniques, passes=limit, compiled=compiled)


@contextmanager
def _recording(level: str) -> Iterator[None]:
    """``FXOPT_RECORD`` at `level`, for what a script compiles."""
    before = os.environ.get("FXOPT_RECORD")
    if level:
        os.environ["FXOPT_RECORD"] = level
    try:
        yield
    finally:
        if level:
            os.environ.pop("FXOPT_RECORD")
            if before is not None:
                os.environ["FXOPT_RECORD"] = before


def _show(shown: Any, as_json: bool) -> None:
    print(json.dumps(shown.to_dict(), indent=1) if as_json else shown.text(), flush=True)


def _fail(message: str) -> Any:
    print(f"fxopt: {message}", file=sys.stderr)
    raise typer.Exit(MISUSE)
