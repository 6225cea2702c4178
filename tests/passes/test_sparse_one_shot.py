"""A text decoded in one forward is what it is step by step; shares and masses are those of a loop."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import StaticCache

import fxopt
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.sparse_attention.calibration import product_sums
from fxopt.passes.sparse_attention.one_shot import OneShot, channel_sums, kept_rows
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY

CHANNELS = ((0, 1, 8, 9), (2, 5, 10, 13))
SETTINGS = {
    "sink_window": SparseAttention(sinks=2, window=9),
    "sink_window by heads": SparseAttention(sinks=2, window=9, heads={1: 0.5}),
    "pages": SparseAttention(method="pages", budget=64, min_length=0),
    "pages, tau": SparseAttention(method="pages", budget=80, tau=0.5, min_length=0),
    "double_sparsity": SparseAttention(method="double_sparsity", budget=0.3, channels=CHANNELS, min_length=0),
    "double_sparsity, tau": SparseAttention(
        method="double_sparsity", budget=40, channels=CHANNELS, tau=0.6, heads=(1,), min_length=0
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_shot_equals_steps(name):
    setting, model, total, prompt = SETTINGS[name], TINY["llama"](), 100, 88
    ids = torch.randint(3, 128, (1, total), generator=torch.Generator().manual_seed(1))
    width = model.config.hidden_size // model.config.num_attention_heads
    assert width == 16 and model.config.num_key_value_heads == 2
    stepped = fxopt.reference(TINY["llama"](), setting)
    cache = StaticCache(config=model.config, max_cache_len=total)
    expected = []
    with torch.no_grad():
        stepped(ids[:, :prompt], past_key_values=cache, use_cache=True)
        for at in range(prompt, total):
            out = stepped(ids[:, at : at + 1], past_key_values=cache, position_ids=torch.tensor([[at]]))
            expected.append(out.logits[0, -1])
        dense = model(ids, use_cache=False).logits[0, prompt:]
        shot = OneShot(dict.fromkeys(range(model.config.num_hidden_layers), setting), prompt)
        with shot.attached(model):
            found = model(ids, use_cache=False).logits[0, prompt:]
        again = OneShot(shot.settings, prompt)
        start = model(ids[:, : prompt - 7], use_cache=True).past_key_values
        with again.attached(model):  # the same rows, with a part of the text on a cache
            tail = model(ids[:, prompt - 7 :], past_key_values=start).logits[0, 7:]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tail, found, rtol=1e-4, atol=1e-4)
    assert (found - dense).abs().max() > 1e-3
    for sums in shot.sums.values():
        assert bool((sums.density < 1).any()) and bool((sums.kept_mass <= 1 + 1e-5).all()) and sums.rows == 12


def test_kept_mass_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 70, 16, generator=generator) for h in (4, 2, 2))
    setting = SETTINGS["sink_window"]
    shot = OneShot({0: [setting, SparseAttention(budget=1.0)]}, 60)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert shot.attend(0, {"query": query, "key": key, "value": value, "is_causal": True}, dense) is dense
    mass, read = torch.zeros(2), 0
    for row in range(60, 70):
        listed = [*range(2), *range(row - 8, row + 1)]
        read += len(listed)
        for head in range(4):
            weights = (key[0, head // 2, : row + 1] @ query[0, head, row] / 4).softmax(0)
            mass[head // 2] += float(weights[listed].sum()) / 2
    torch.testing.assert_close(shot.sums[0, 0].kept_mass.float(), mass / 10, rtol=1e-5, atol=1e-6)
    assert shot.sums[0, 0].density.tolist() == [read / sum(range(61, 71))] * 2
    assert shot.sums[0, 1].density.tolist() == [1, 1] and math.isclose(
        float(shot.sums[0, 1].kept_mass[0]), 1, abs_tol=1e-5
    )


def test_importance_by_layer():
    model = TINY["llama"]()
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(2))
    recipe = fxopt.tune(
        model, ids.flatten(), SparseAttention(method="double_sparsity", budget=32, channels=4), context=12, show=False
    )
    # tune looks at the graph and leaves out the last token of a window, which predicts nothing.
    found = channel_sums(model, [row[:-1] for row in ids])
    for layer, sums in found.items():
        torch.testing.assert_close(recipe.data[f"sparse_attention.importance.model.layers.{layer}.self_attn"], sums)
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
    assert product_sums(query, key).tolist() == [[6.0] * 4]


def test_what_only_steps_can_measure():
    setting = SparseAttention(method="double_sparsity", budget=32, channels=CHANNELS, bits=8)
    with pytest.raises(SettingError, match="step by step"):
        kept_rows(setting, torch.ones(1, 2, 1, 1, 16), torch.ones(1, 2, 40, 16), torch.tensor([39]), 40, 0.25)
