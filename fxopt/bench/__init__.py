"""The benchmark harness and its suites: ``fxopt bench SUITE``."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable
from typing import Any

import torch

SUITES = (
    "overhead", "depth", "attention", "linear", "decode_step", "gemm", "decode", "context", "sparse", "sparse_quality",
    "recorder", "exit_quality",
)  # fmt: skip


def load_suite(name: str) -> Callable[..., Any]:
    """The ``run`` function of a suite, imported when it is asked for.

    Dynamo counts the graphs of all models of a class together and runs eagerly beyond its limit of eight; a suite
    compiles more than that.
    """
    run: Callable[..., Any] = importlib.import_module(f"fxopt.bench.{name}").run
    unlimited: Callable[..., Any] = torch._dynamo.config.patch(recompile_limit=64)(run)
    return unlimited


def keep_with(name: str) -> list[pathlib.Path]:
    """Write what a suite commits beside its result, such as measured tables; returns the paths."""
    keep: Callable[[], list[pathlib.Path]] = getattr(importlib.import_module(f"fxopt.bench.{name}"), "keep", list)
    return keep()


def draw(name: str, result: Any, path: pathlib.Path) -> None:
    """The suite's own picture of a result, or bars of the medians where it has none."""
    own: Callable[..., None] | None = getattr(importlib.import_module(f"fxopt.bench.{name}"), "picture", None)
    if own is None:
        result.plot(path)
    else:
        own(result.to_dict(), path)
