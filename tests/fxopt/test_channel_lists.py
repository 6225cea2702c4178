"""The channel lists that the authors of Double Sparsity ship become a recipe, or are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fxopt
from fxopt import SettingError, SparseAttention
from fxopt.channel_tuning import from_lists
from fxopt.passes.sparse_attention.calibration import mean_overlap, read_lists
from fxopt.testing import TINY

SHIPPED = Path(__file__).resolve().parents[2] / "../shared/data/double_sparsity/Llama-3.1-8B-Instruct.json"
ASKED = SparseAttention(method="double_sparsity", budget=32, min_length=0, channels=4)


@pytest.fixture(scope="module")
def shipped():
    if not SHIPPED.is_file():
        pytest.skip("the authors' file is not here; it is config/meta-llama/Llama-3.1-8B-Instruct.json of DoubleSparse")
    return SHIPPED


def written(path, lists, kind="k"):
    path.write_text(json.dumps({f"model.layers.{i}.self_attn.{kind}_proj": found for i, found in lists.items()}))
    return path


def permutations(heads, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(width, generator=generator).tolist() for _ in range(heads)]


def test_the_shipped_lists(shipped, tmp_path):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=64, intermediate_size=64, vocab_size=64, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128,
        ))  # fmt: skip
    recipe = from_lists(model, shipped, SparseAttention(method="double_sparsity", budget=1 / 16))
    assert list(recipe.paths) == [f"model.layers.{i}.self_attn" for i in range(2, 32)]
    lists = read_lists(shipped)
    for layer in (2, 31):
        channels = recipe.paths[f"model.layers.{layer}.self_attn"].channels
        assert len(channels) == 8 and all(len(c) == 8 for c in channels)
        assert all({lists[layer][h][0], (lists[layer][h][0] + 64) % 128} <= set(c) for h, c in enumerate(channels))
        assert all({(i + 64) % 128 for i in c} == set(c) for c in channels)
    assert fxopt.Recipe.load(recipe.save(tmp_path / "r.safetensors")).paths == recipe.paths
    # What is wrong with the lists of products is told with the file's own numbers.
    with pytest.raises(SettingError, match=r"heads are mixed .*share 96\.1% of their first 16 .*chance it were 12\.5%"):
        from_lists(model, shipped, ASKED, kind="qk")
    assert mean_overlap(lists, 16) < 0.5
    with pytest.raises(SettingError, match="32 layers of 32 heads .* 8 KV heads with 128. Take kind='k'"):
        from_lists(model, shipped, ASKED, kind="q")
    with pytest.raises(SettingError, match="32 layers of 8 heads with 128 channels; this .* 3 layers of 2 KV heads"):
        from_lists(TINY["llama"](), shipped, ASKED)


def test_a_recipe_from_lists_decodes_as_its_reference(tmp_path, eager_lowering):
    path = written(tmp_path / "lists.json", {i: permutations(2, 16, i) for i in range(3)})
    model, reference = TINY["llama"](), TINY["llama"]()
    recipe = from_lists(model, path, ASKED)
    assert list(recipe.paths) == ["model.layers.2.self_attn"] and recipe.notes["kind"] == "k"
    ids = torch.arange(3, 93)[None]
    found = []
    for one in (fxopt.compile(model, recipe), fxopt.reference(reference, *recipe.settings())):
        cache = StaticCache(config=one.config, max_cache_len=128)
        with torch.no_grad():
            one(ids, past_key_values=cache)
            found.append(one(torch.tensor([[5]]), past_key_values=cache, position_ids=torch.tensor([[90]])).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert fxopt.report(model).graphs[-1].count("sparse_attention") == 1


def test_which_layers(tmp_path):
    path = written(tmp_path / "lists.json", {i: permutations(2, 16, i) for i in range(3)})
    asked = SparseAttention(method="double_sparsity", budget=32, layers=(0, -1))
    recipe = from_lists(TINY["llama"](), path, asked)
    assert list(recipe.paths) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]


def test_lists_that_do_not_fit(tmp_path):
    model = TINY["llama"]()
    for lists, message in (
        ({i: permutations(2, 16, i) for i in range(1, 4)}, "3 layers"),
        ({0: permutations(2, 16, 0), 1: permutations(3, 16, 0), 2: permutations(2, 16, 0)}, "2 heads .* or 3 heads"),
        ({i: permutations(2, 8, i) for i in range(3)}, "2 heads with 8 channels"),
    ):
        with pytest.raises(SettingError, match=message):
            from_lists(model, written(tmp_path / "lists.json", lists), ASKED)
    with pytest.raises(SettingError, match="no file"):
        from_lists(model, tmp_path / "missing.json", ASKED)
    path = written(tmp_path / "lists.json", {i: permutations(2, 16, i) for i in range(3)})
    with pytest.raises(SettingError, match="channels belongs to double_sparsity"):
        from_lists(model, path, SparseAttention(method="pages", budget=64))
