"""Views as text and as data: tables and paragraphs that fit 100 columns, degrade to 60 and to a pipe."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.passes.record import SCHEMA_VERSION

WIDEST = 100
NARROWEST = 60


def terminal_width() -> int:
    """Columns to write for: the terminal's, within 60 and 100; 100 where the output is a pipe or a file."""
    if not sys.stdout.isatty():
        return WIDEST
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


@dataclass(frozen=True)
class View:
    """Something to look at. ``kind`` names the view in ``to_dict()``."""

    kind: str
    data: dict[str, Any]
    lines: Callable[[int], Iterable[str]]

    def text(self, width: int | None = None) -> str:
        """The view in words, no line wider than `width` columns (60 to 100; default: the terminal's)."""
        width = terminal_width() if width is None else max(NARROWEST, min(WIDEST, width))
        return "\n".join(fit(line, width) for text in self.lines(width) for line in clean(text).split("\n"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data with ``schema_version`` and ``view``."""
        return {"schema_version": SCHEMA_VERSION, "view": self.kind, **self.data}

    def __str__(self) -> str:
        return self.text()


def clean(text: str) -> str:
    """`text` without control characters: a name in a report must not steer the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "?" for c in str(text))


def fit(line: str, width: int) -> str:
    """`line`, cut with an ellipsis when it is too wide."""
    return line if len(line) <= width else line[: width - 3] + "..."


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """A paragraph as lines; only what is longer than a line is broken inside."""
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False) or [
        indent.rstrip()
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[object]], width: int) -> list[str]:
    """Columns as wide as their content; where that is too much, the widest ones wrap."""
    cells = [[clean(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    widths = [max([len(title), *(len(row[i]) for row in cells)]) for i, title in enumerate(head)]
    room = width - 2 * (len(head) - 1)
    while sum(widths) > room:
        widest = max(range(len(widths)), key=widths.__getitem__)
        second = max([w for i, w in enumerate(widths) if i != widest], default=0)
        excess = sum(widths) - room
        target = max(second if second < widths[widest] else widths[widest] - 1, widths[widest] - excess)
        if target < 6:
            break
        widths[widest] = target
    lines = ["  ".join(t.ljust(w) for t, w in zip(head, widths, strict=True)).rstrip()]
    lines.append("  ".join("-" * w for w in widths))
    for row in cells:
        parts = [textwrap.wrap(cell, w, break_on_hyphens=False) or [""] for cell, w in zip(row, widths, strict=True)]
        for k in range(max(map(len, parts))):
            line = "  ".join((p[k] if k < len(p) else "").ljust(w) for p, w in zip(parts, widths, strict=True))
            lines.append(line.rstrip())
    return lines
