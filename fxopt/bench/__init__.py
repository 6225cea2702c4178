"""The benchmark harness and its suites: ``fxopt bench SUITE``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

SUITES = (
    "overhead", "depth", "attention", "decode_step", "context", "sparse", "sparse_quality", "recorder", "exit_quality",
)  # fmt: skip


def load_suite(name: str) -> Callable[..., Any]:
    """The ``run`` function of a suite, imported when it is asked for.

    Dynamo counts the graphs of all models of a class together and runs eagerly beyond its limit of eight; a suite
    compiles more than that.
    """
    run: Callable[..., Any] = importlib.import_module(f"fxopt.bench.{name}").run
    unlimited: Callable[..., Any] = torch._dynamo.config.patch(recompile_limit=64)(run)
    return unlimited
