"""Fixtures every test may use."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item):
    from fxopt.codegen import compat

    if item.get_closest_marker("branches_write") and not compat.cond_may_write():
        pytest.skip("before torch 2.12 branches of torch.cond must not write a cache: fxopt blocks it, FX208")


@pytest.fixture(autouse=True)
def _fresh():
    """Each test starts with no compiled code, no kept reports and no warning given."""
    import fxopt.backend
    import fxopt.reporting

    torch._dynamo.reset()
    fxopt.reporting.clear()
    fxopt.backend._reset_warnings()


@pytest.fixture
def eager_lowering(monkeypatch):
    """Run the rewritten graph as it stands instead of handing it to Inductor: the same graph, compiled in no time.

    What a rewrite means is decided by the graph; that Inductor lowers it is tested where that is the question.
    """
    from fxopt.codegen import compat

    monkeypatch.setattr(compat, "compile_with_inductor", lambda gm, inputs, mode, patches: gm.forward)
