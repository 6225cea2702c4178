"""Guards that a rewritten graph does without, and those that it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt import LayerSkip
from fxopt.testing import TINY

IDS = torch.tensor([[5, 17, 3, 99, 42]])


def skipped(drop: int = 1):
    model = TINY["llama"]()
    return fxopt.compile(model, LayerSkip(skip=(drop,)), strict=True), LayerSkip(skip=(drop,))


def graphs(model):
    return len(fxopt.report(model).graphs)


@torch.no_grad()
def test_what_an_unread_parameter_is_does_not_matter(eager_lowering):
    model, technique = skipped()
    expected = model(IDS).logits
    model.model.layers[1].mlp.double()
    assert torch.equal(model(IDS).logits, expected)
    assert graphs(model) == 1, "a layer that does not run was captured again"
    assert torch.equal(expected, fxopt.reference(model, technique)(IDS).logits)


@torch.no_grad()
def test_what_a_read_parameter_is_still_matters(eager_lowering):
    model, technique = skipped()
    before = model(IDS).logits
    layer = model.model.layers[0].mlp
    half = layer.down_proj.in_features // 2
    layer.gate_proj.weight = nn.Parameter(layer.gate_proj.weight[:half].clone())
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight[:half].clone())
    layer.down_proj.weight = nn.Parameter(layer.down_proj.weight[:, :half].clone())
    found = model(IDS).logits
    assert graphs(model) == 2
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, fxopt.reference(model, technique)(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("change", ["other class", "taken out"])
def test_a_skipped_layer_that_is_rebuilt_is_captured_again(change, eager_lowering):
    model, _ = skipped()
    expected = model(IDS).logits
    if change == "other class":
        model.model.layers[1].mlp = nn.Sequential(nn.Linear(64, 64))
    else:
        model.model.layers[1].mlp.gate_proj = nn.Identity()
        model.model.layers[1].mlp.up_proj = nn.Identity()
        model.model.layers[1].mlp.down_proj = nn.Identity()
    assert torch.equal(model(IDS).logits, expected)
    assert graphs(model) == 2


@torch.no_grad()
def test_a_layer_that_comes_back_is_guarded_again(eager_lowering):
    model, _ = skipped()
    model(IDS)
    fxopt.compile(model)
    before = model(IDS).logits
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(model.model.layers[1].mlp.down_proj.weight.double())
    with pytest.raises(RuntimeError, match="dtype"):  # as the model itself says, and no stale code
        model(IDS)
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(model.model.layers[1].mlp.down_proj.weight.float())
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_guards_of_one_frame_are_not_dropped_from_the_next():
    kept = fxopt.guards.GuardFilter()
    kept._unread = frozenset({"L['x']"})

    class Guard:
        guard_type = "TENSOR_MATCH"

        class orig_guard:
            class originating_source:
                name = "L['x']"

    assert kept([Guard]) == [False]
    assert kept([Guard]) == [True]
