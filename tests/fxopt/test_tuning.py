"""Calibration: the ranges it finds are the ranges that are there, and recipes are kept and refused rightly."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import AsyncSoftmax, LayerSkip, Recipe, SettingError, SparseAttention
from fxopt.testing import TINY
from fxopt.tuning import HIGHEST, LOWEST, LOWEST_MAXIMUM

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
        maxima = scores.masked_fill(~seen, -torch.inf).amax(-1).view(k.shape[1], -1)
        found.setdefault(module.layer_idx, []).append((heads.amin(1), maxima.amin(1), heads.amax(1)))

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        for start in range(0, len(tokens), context):
            model(input_ids=torch.tensor([tokens[start : start + context - 1]]))
    for hook in hooks:
        hook.remove()
    return {
        i: (*(torch.stack([w[n] for w in r]).amin(0) for n in (0, 1)), torch.stack([w[2] for w in r]).amax(0))
        for i, r in found.items()
    }


def test_ranges_are_those_of_the_softmax_inputs():
    model = TINY["llama"]()
    recipe = fxopt.tune(model, TOKENS, context=32, show=False)
    for layer, (low, least, high) in by_hand(model, TOKENS, 32).items():
        path = f"model.layers.{layer}.self_attn"
        torch.testing.assert_close(recipe.data[f"{LOWEST}.{path}"], low, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recipe.data[f"{HIGHEST}.{path}"], high, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recipe.data[f"{LOWEST_MAXIMUM}.{path}"], least, rtol=1e-4, atol=1e-5)
        pairs = zip(*(recipe.data[f"{n}.{path}"].tolist() for n in (LOWEST_MAXIMUM, HIGHEST)), strict=True)
        assert recipe.paths[path] == AsyncSoftmax(ranges=tuple(pairs))


def test_an_interrupted_run_goes_on(tmp_path):
    model = TINY["llama"]()
    whole = fxopt.tune(model, TOKENS, context=32, show=False)
    path = tmp_path / "part.safetensors"
    fxopt.tune(model, TOKENS[:64], context=32, checkpoint=path, show=False)
    assert Recipe.load(path).notes["windows"] == 2
    resumed = fxopt.tune(model, TOKENS, context=32, checkpoint=path, show=False)
    for name, tensor in whole.data.items():
        assert torch.equal(resumed.data[name], tensor)
    with pytest.raises(SettingError, match="another text"):
        fxopt.tune(model, TOKENS[::-1], context=32, checkpoint=path, show=False)
    asked = SparseAttention(method="double_sparsity", budget=32, channels=4)
    with pytest.raises(SettingError, match="no channel statistics"):
        fxopt.tune(model, TOKENS, asked, context=32, checkpoint=path, show=False)
    with pytest.raises(SettingError, match="there is none for EarlyExit"):
        fxopt.tune(model, TOKENS, fxopt.EarlyExit(layers=(2,)), goal="agreement=0.9", checkpoint=path, show=False)


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
        ({"goal": "kl<0.01"}, SettingError, "is for one EarlyExit"),
        ({"context": 500}, ValueError, "fewer than one context"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        fxopt.tune(TINY["llama"](), TOKENS, show=False, **arguments)


def test_nothing_to_calibrate():
    with pytest.raises(SettingError, match="nothing to calibrate"):
        fxopt.tune(TINY["llama"](), TOKENS, LayerSkip(skip=(1,)), show=False)


# -- thresholds of exits -----------------------------------------------------------------------------------------------


def test_threshold_is_solved_for_an_agreement(tmp_path):
    model = TINY["llama"]()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 12)
    ids = torch.randint(3, 128, (4 * 32,), generator=torch.Generator().manual_seed(0))
    asked = fxopt.EarlyExit(layers=(1, 2), confidence="margin")
    recipe = fxopt.tune(model, ids, asked, goal="agreement=0.9", context=32, show=False)
    (found,) = recipe.techniques
    assert (found.layers, found.confidence) == (asked.layers, asked.confidence)
    assert recipe.notes["agreement"] >= 0.9
    assert recipe.notes["mean_depth"] < 3
    # Measured again, by the road every user has.
    table = fxopt.evaluate(model, ids, found, context=32, score="decode", speed=False, limit=10**6, show=False)
    assert table.rows[-1].agreement == pytest.approx(recipe.notes["agreement"])
    kept = fxopt.Recipe.load(recipe.save(tmp_path / "exits.safetensors"))
    assert kept.techniques == recipe.techniques


def test_static_solution_counts_the_first_exit_that_is_sure():
    from fxopt.exit_tuning import solve_static

    sure = torch.tensor([[0.9, 0.1], [0.5, 0.8], [0.2, 0.3], [0.1, 0.95]])
    right = torch.tensor([[True, True], [False, True], [False, False], [False, True]])
    assert solve_static(sure, right, 0.99) == pytest.approx(0.5)  # above 0.5 rows 0, 1 and 3 leave, and are right
    assert solve_static(sure, right, 0.7) == pytest.approx(0.3)
    assert solve_static(sure, ~right, 0.99) == pytest.approx(0.95)


@pytest.mark.parametrize("goal", [None, "agreement", "agreement=2", "speedup=2", "agreement=x"])
def test_goals_that_are_no_agreement_are_refused(goal):
    with pytest.raises(fxopt.SettingError, match=r"agreement=0\.97"):
        fxopt.tune(TINY["llama"](), torch.arange(100), fxopt.EarlyExit(layers=(1,)), goal=goal)


def test_patience_is_not_solved_for():
    patience = fxopt.EarlyExit(layers=(1, 2), confidence="patience", threshold=2)
    with pytest.raises(fxopt.SettingError, match="is a count of exits"):
        fxopt.tune(TINY["llama"](), torch.arange(100), patience, goal="agreement=0.9", context=32, show=False)
