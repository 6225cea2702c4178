"""The benchmark harness and its suites: ``fxopt bench SUITE``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

SUITES = ("overhead", "depth", "attention", "sparse")


def load_suite(name: str) -> Callable[..., Any]:
    """The ``run`` function of a suite, imported when it is asked for."""
    return importlib.import_module(f"fxopt.bench.{name}").run
