"""The interpreter process of a module of kernel tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import interpreter
import pytest


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[interpreter.Run]:
    """Runs cases of the file that the test module imports as ``cases``, in a process that lives as long as it."""
    with interpreter.start(Path(request.module.cases.__file__), tmp_path_factory.mktemp("cache")) as run:
        yield run
