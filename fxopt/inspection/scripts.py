"""Run a script as ``python script.py args`` would, and keep what it compiled, also when it fails half-way."""

from __future__ import annotations

import contextlib
import os
import pathlib
import runpy
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from fxopt import reporting
from fxopt.passes.technique import SettingError
from fxopt.reporting import Report


class ScriptReport(Report):
    """The report of a script. ``failure`` says how it ended: empty when it ran to its end, and then ``names`` holds
    what it defined."""

    failure: str = ""
    names: dict[str, Any] = {}


def run_script(path: str | os.PathLike[str], args: Sequence[str] = ()) -> ScriptReport:
    """Run the script at `path` as ``__main__`` in this process; the report of all it compiled.

    An exception or a non-zero ``sys.exit`` of the script is kept in ``failure`` (and printed to stderr) rather than
    raised, so that what was compiled before it can be looked at. What the script prints goes to stderr: stdout belongs
    to the view, which may be JSON or a file.

    Raises:
        FileNotFoundError: when there is no such script.
    """
    script = pathlib.Path(path)
    if not script.is_file():
        raise FileNotFoundError(f"there is no script {str(path)!r}")
    first = next_number()
    kept_arguments, kept_path = sys.argv, list(sys.path)
    sys.argv = [str(path), *map(str, args)]
    sys.path.insert(0, str(script.resolve().parent))
    failure, names = "", {}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            names = runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            failure = f"SystemExit: {stop.code}"
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        failure = "".join(traceback.format_exception_only(error)).strip()
    finally:
        sys.argv, sys.path[:] = kept_arguments, kept_path
    report = ScriptReport(
        sorted((g for r in reporting.reports() for g in r.graphs if g.number >= first), key=lambda g: g.number)
    )
    report.failure, report.names = failure, names
    return report


def names_of(path: str | os.PathLike[str], args: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """Run the script at `path` as :func:`run_script` does, and return what it defined.

    Raises:
        FileNotFoundError: when there is no such script.
        SettingError: when it does not define one of the names in `wanted`, or fails.
    """
    report = run_script(path, args)
    missing = [name for name in wanted if name not in report.names]
    if missing:
        why = f" (it failed: {report.failure})" if report.failure else ""
        raise SettingError(f"the script {str(path)!r} defines no {' and no '.join(map(repr, missing))}{why}.")
    return report.names


def next_number() -> int:
    """The number that the next compiled graph will get."""
    return max((g.number for r in reporting.reports() for g in r.graphs), default=-1) + 1
