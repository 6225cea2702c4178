"""What a pass is told about the graph as a whole."""

from __future__ import annotations

import pytest

from fxopt.passes.context import PassContext
from fxopt.passes.record import GraphRecord
from fxopt.testing import TINY, capture, inputs_for

pytest.importorskip("transformers")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2"])  # Gemma casts its norm weights to the type that they have
def test_gradients_are_recorded_where_results_have_them(name, grad):
    model = TINY[name]()
    (module,) = capture(model, grad=grad, **inputs_for(name, model))
    assert PassContext(module.graph, "", GraphRecord(1, "0/0", "")).training is grad
