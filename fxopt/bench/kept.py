"""Kept results as Markdown: the tables of the README come from the JSON files that ``fxopt bench SUITE --keep`` wrote.

    python -m fxopt.bench.kept README.md     # writes the newest result of a suite between its marks

A document marks a place by ``<!-- bench SUITE -->`` and ``<!-- end bench -->``, and a picture, which is drawn again, by
``![...](FILE.png)<!-- picture of SUITE -->``.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import sys
from typing import Any

from fxopt.bench.harness import RESULTS, shown
from fxopt.codegen.files import write_whole

_PICTURE = re.compile(r"!\[[^\]]*\]\((\S+)\)<!-- picture of (\S+) -->")
_PLACE = re.compile(r"(<!-- bench (\S+) -->\n).*?(<!-- end bench -->)", re.DOTALL)


def newest(suite: str, folder: pathlib.Path = RESULTS) -> dict[str, Any]:
    """The kept result of a suite with the latest date. Raises FileNotFoundError when none was kept."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [result for result in found if result["suite"] == suite]
    if not found:
        raise FileNotFoundError(f"no result of {suite!r} is kept in {folder}; run: fxopt bench {suite} --keep")
    return max(found, key=lambda result: result["environment"]["date"])


def markdown(result: dict[str, Any]) -> str:
    """Medians, quartiles, and the ratio to the first peer of each case, pair by pair; then the other figures."""
    lines: list[str] = []
    if result["rows"]:
        lines += ["| case | | median ms | quartiles | time over the first |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        median, low, high = (_milliseconds(row[name]) for name in ("median", "low", "high"))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        lines.append(f"| {row['case']} | {row['peer']} | {median} | {low} to {high} | {ratio} |")
    figures = result.get("figures") or []
    if figures:
        lines += [""] if lines else []
        lines += [f"| {' | '.join(figures[0])} |", "|---" * len(figures[0]) + "|"]
        lines += [f"| {' | '.join(map(shown, line.values()))} |" for line in figures]
    machine = result["environment"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    said = "; ".join(result["remarks"])
    return "\n".join([
        *lines, "",
        f"`{result['command']}`, {machine['date']}, {machine['device']}, {threads}, torch {machine['torch']}."
        + (f" {said}." if said else ""),
    ])  # fmt: skip


def filled(text: str, folder: pathlib.Path = RESULTS) -> str:
    """`text` with the newest result of each marked suite in its place."""
    return _PLACE.sub(lambda place: f"{place[1]}{markdown(newest(place[2], folder))}\n{place[3]}", text)


def pictures(text: str) -> dict[str, str]:
    """The picture files that `text` marks, as it names them, and the suite of each."""
    return dict(_PICTURE.findall(text))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        document = pathlib.Path(name)
        text = filled(document.read_text(encoding="utf-8"))
        write_whole(document, text)
        for path, suite in pictures(text).items():
            importlib.import_module(f"fxopt.bench.{suite}").picture(newest(suite), document.parent / path)
