"""What a suite that was interrupted had measured, so that the next call goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from typing import Any

from fxopt.codegen import post_grad
from fxopt.codegen.files import write_whole
from fxopt.codegen.source import cache_folder


class Unfinished:
    """Measurements of a suite by case, written down as soon as each is done, in the cache folder.

    They are taken up again where nothing differs that they depend on: the sources of the kernels, and `about`, plain
    data such as machine, versions and sizes, without the date.
    """

    def __init__(self, suite: str, about: dict[str, Any], folder: pathlib.Path | None = None) -> None:
        device = re.sub(r"[^a-z0-9]+", "-", str(about.get("device", "")).lower()).strip("-")
        self.path = (folder or cache_folder() / "bench") / f"{suite}-{device}.json"
        lasting = {k: v for k, v in about.items() if k != "date"}
        self.about = json.loads(json.dumps({**lasting, "kernels": post_grad.digest()}))
        self.cases: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads(self.path.read_text(encoding="utf-8"))
            self.cases = dict(before["cases"]) if before["about"] == self.about else {}

    def __contains__(self, case: str) -> bool:
        return case in self.cases

    def keep(self, case: str, measured: Any) -> None:
        """Write a case down; a cache folder that cannot be written keeps nothing, and the suite goes on."""
        self.cases[case] = measured
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps({"about": self.about, "cases": self.cases}))

    def done(self) -> None:
        """Forget them: the suite ran to its end, and a later call measures again."""
        self.path.unlink(missing_ok=True)
