"""Self-speculation: the tokens are the model's own, whatever drafts them."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import LayerSkip, SettingError
from fxopt.testing import TINY

pytest.importorskip("transformers")
IDS = torch.tensor([[5, 17, 3, 99, 42]])
SETTINGS = {"max_new_tokens": 24, "do_sample": False}


@pytest.mark.parametrize("skip", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_the_model(name, skip):
    model = TINY[name]()
    expected = model.generate(IDS, **SETTINGS)
    assert torch.equal(fxopt.generate(model, IDS, draft=LayerSkip(skip=skip), **SETTINGS), expected)


def test_the_draft_shares_the_weights():
    from fxopt.speculation import _drafts

    model = TINY["llama"]()
    fxopt.generate(model, IDS, draft=LayerSkip(skip=(1,)), **SETTINGS)
    (draft,) = _drafts[model].values()
    assert {id(p) for p in draft.parameters()} < {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("ids", "arguments", "words"),
    [
        (IDS.expand(2, -1), {}, "one sequence"),
        (IDS, {"cache_implementation": "static"}, "dynamic"),
        (IDS, {"draft": 3}, "approximate technique"),
        (IDS, {"draft": fxopt.AsyncSoftmax()}, "approximate technique"),
    ],
)
def test_bad_input(ids, arguments, words):
    with pytest.raises(SettingError, match=words):
        fxopt.generate(TINY["llama"](), ids, **arguments)
