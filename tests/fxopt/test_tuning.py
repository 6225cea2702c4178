"""Calibration: the ranges it finds are the ranges that are there, and recipes are kept and refused rightly."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import AsyncSoftmax, LayerSkip, Recipe, SettingError
from fxopt.testing import TINY
from fxopt.tuning import HIGHEST, LOWEST

pytest.importorskip("safetensors")
TOKENS = torch.randint(2, 128, (96,), generator=torch.Generator().manual_seed(3)).tolist()


def by_hand(model, tokens, context):
    """Softmax inputs of a tiny Llama, from its own modules: (lowest, highest) by layer, [Hkv]."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found: dict[int, list] = {}

    def look(module, args, kwargs):
        x = kwargs["hidden_states"]
        batch, length, _ = x.shape
        shape = (batch, length, -1, module.head_dim)
        q, k = (p(x).view(shape).transpose(1, 2) for p in (module.q_proj, module.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * module.scaling
        seen = torch.ones(length, length).tril().bool()
        heads = scores[..., seen].view(k.shape[1], -1)
        found.setdefault(module.layer_idx, []).append((heads.amin(1), heads.amax(1)))

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        for start in range(0, len(tokens), context):
            model(input_ids=torch.tensor([tokens[start : start + context - 1]]))
    for hook in hooks:
        hook.remove()
    return {
        i: (torch.stack([a for a, _ in r]).amin(0), torch.stack([b for _, b in r]).amax(0)) for i, r in found.items()
    }


def test_ranges_are_those_of_the_softmax_inputs():
    model = TINY["llama"]()
    recipe = fxopt.tune(model, TOKENS, context=32, show=False)
    for layer, (low, high) in by_hand(model, TOKENS, 32).items():
        path = f"model.layers.{layer}.self_attn"
        torch.testing.assert_close(recipe.data[f"{LOWEST}.{path}"], low, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recipe.data[f"{HIGHEST}.{path}"], high, rtol=1e-4, atol=1e-5)
        assert recipe.paths[path] == AsyncSoftmax(phi=round(float(high.max()), 3))


def test_an_interrupted_run_goes_on(tmp_path):
    model = TINY["llama"]()
    whole = fxopt.tune(model, TOKENS, context=32, show=False)
    path = tmp_path / "part.safetensors"
    fxopt.tune(model, TOKENS[:64], context=32, checkpoint=path, show=False)
    assert Recipe.load(path).notes == {"windows": 2}
    resumed = fxopt.tune(model, TOKENS, context=32, checkpoint=path, show=False)
    for name, tensor in whole.data.items():
        assert torch.equal(resumed.data[name], tensor)


def test_a_recipe_compiles_its_model_and_no_other(tmp_path, eager_lowering):
    model = TINY["llama"]()
    recipe = fxopt.tune(model, TOKENS, context=32, show=False)
    again = Recipe.load(recipe.save(tmp_path / "r.safetensors"))
    assert again.paths == recipe.paths
    ids = torch.tensor([[5, 17, 3]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(fxopt.compile(model, again)(input_ids=ids).logits, expected)
    with pytest.raises(SettingError, match="another model"):
        fxopt.compile(TINY["qwen3"](), again)


def test_recipes_hold_techniques_of_the_whole_model(tmp_path):
    recipe = Recipe(techniques=(LayerSkip(skip=(1,)),))
    assert Recipe.load(recipe.save(tmp_path / "r.safetensors")).techniques == recipe.techniques


def test_bad_recipes_are_refused(tmp_path):
    with pytest.raises(SettingError, match="there is no recipe"):
        Recipe.load(tmp_path / "none")
    path = tmp_path / "r.safetensors"
    path.write_bytes(b"not a recipe")
    with pytest.raises(SettingError, match="no fxopt recipe"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"goal": "kl<0.01"}, SettingError, "calibrates only"),
        ({"context": 500}, ValueError, "fewer than one context"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        fxopt.tune(TINY["llama"](), TOKENS, show=False, **arguments)


def test_nothing_to_calibrate():
    with pytest.raises(SettingError, match="nothing to calibrate"):
        fxopt.tune(TINY["llama"](), TOKENS, LayerSkip(skip=(1,)), show=False)
