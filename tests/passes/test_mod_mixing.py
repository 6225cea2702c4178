"""Blocks that mix tokens in a way that tokens picked out of a sequence do not have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt import SettingError
from fxopt.passes.mixture_of_depths import MixtureOfDepths
from fxopt.passes.mod_reference import routers
from fxopt.testing import TINY, inputs_for


def test_blocks_that_mix_neighbours_are_refused():
    model = TINY["handwritten"]()
    model.layers[1].extra = nn.Conv1d(64, 64, 3)
    with pytest.raises(SettingError, match=r"Conv1d in layers\.1 mixes each token with its neighbours"):
        MixtureOfDepths(0.5)(model)
    assert not routers(model) and "fxopt_router" not in dict(model.named_children())
    MixtureOfDepths(0.5, layers=(0,))(model)
    model.layers[0].extra = nn.GRU(64, 64)
    with pytest.raises(SettingError, match="running state"):
        MixtureOfDepths(0.5, layers=(0,))(model)


def _by_convolution(x):
    kernel = torch.ones(x.shape[-1], 1, 3, device=x.device)
    return nn.functional.conv1d(x.transpose(1, 2), kernel, padding=1, groups=x.shape[-1]).transpose(1, 2)


def _by_linear_attention(x):
    return x @ (x.transpose(-1, -2).softmax(-1) @ x)


def _by_attention(x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return (x @ x.transpose(-1, -2)).masked_fill(~mask, float("-inf")).softmax(-1) @ x


def _by_channel(x):
    return x.cumsum(-1) + x.mean(-1, keepdim=True) + (x @ torch.eye(x.shape[-1], device=x.device)).sum(2, keepdim=True)


MIXING = [
    (_by_convolution, "conv1d"),
    (lambda x: x.roll(1, 1), "roll"),
    (lambda x: x.cumsum(1), "cumsum"),
    (lambda x: torch.cumsum(x.unflatten(-1, (4, -1)).transpose(1, 2), dim=-2).transpose(1, 2).flatten(2), "cumsum"),
    (_by_linear_attention, "matmul"),
    (lambda x: x.mean(1, keepdim=True), "mean"),
]


def with_forward(mix):
    """A hand-written model whose layer 1 adds `mix` of its stream to it."""

    class Mixing(type(TINY["handwritten"]().layers[1])):
        def forward(self, x):
            return x + mix(x)

    model = TINY["handwritten"]()
    model.layers[1] = Mixing(64, 4)
    return MixtureOfDepths(0.5)(model)


@pytest.mark.parametrize(("mix", "name"), MIXING)
def test_a_forward_that_mixes_tokens_is_blocked_with_the_reason(eager_lowering, mix, name):
    """Nothing but the captured graph shows what no module stands for. What is computed is what eager computes."""
    model = with_forward(mix).train()
    inputs = inputs_for("handwritten", model)
    expected = model(**inputs)
    fxopt.compile(model)
    with pytest.warns(UserWarning, match=rf"FX209 \w*{name}\w* in layers\.1 mixes each token"):
        torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="FX209"):
        fxopt.compile(model, strict=True)(**inputs)


@pytest.mark.parametrize(("mix", "name"), MIXING)
def test_in_eval_it_is_refused(eager_lowering, mix, name):
    """It would meet the tokens that fill rows up, and a compiled graph has others of them than eager."""
    model = with_forward(mix).eval()
    routers(model)["layers.1"].trained = True
    fxopt.compile(model)
    with torch.no_grad(), pytest.raises(Exception, match=rf"{name}\w* in layers\.1 mixes .* Route other layers"):
        model(**inputs_for("handwritten", model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mix", [_by_attention, _by_channel])
def test_attention_and_sums_over_channels_are_routed(eager_lowering, mix, training):
    model = with_forward(mix).train(training)
    routers(model)["layers.1"].trained = True
    inputs = inputs_for("handwritten", model)
    expected = model(**inputs)
    fxopt.compile(model, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
    assert fxopt.report(model).count("mixture_of_depths") == 1


@pytest.mark.filterwarnings("ignore:mixture of depths. the predictor")
def test_a_mask_of_whole_numbers_is_refused():
    """As an encoder that is not marked as one hands it to its layers (DeBERTa)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DebertaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model = MixtureOfDepths(capacity=0.5)(transformers.DebertaForMaskedLM(config).eval())
    with pytest.raises(SettingError, match=r"torch\.int64 for a stream \[2, 8, 64\]"):
        model(torch.ones(2, 8, dtype=torch.int64), attention_mask=torch.ones(2, 8, dtype=torch.int64))
