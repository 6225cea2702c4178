"""Sparse attention that keeps state beside the cache: meaning, bounds, and caches that change under it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fxopt
import fxopt.codegen.ops.sparse_select
import fxopt.codegen.ops.sparse_state
from fxopt.codegen.ops.attention import attention
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.sparse_attention.calibration import first_channels, head_overlap, heaviest, product_sums, read_lists
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY

OPS = torch.ops.fxopt
PAGES = SparseAttention(method="pages", budget=64, min_length=0)


def channels_of(model, count):
    """The same channels for every KV head: the model's own shape, without a calibration."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    listed = tuple(sorted([*range(count // 2), *(c + width // 2 for c in range(count // 2))]))
    return (listed,) * config.num_key_value_heads


def settings(model):
    return {
        "pages": PAGES,
        "double_sparsity": SparseAttention(
            method="double_sparsity", budget=32, min_length=0, channels=channels_of(model, 4)
        ),
    }


def prompt(seed, tokens=90, rows=1):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def generated(model, rows=2, tokens=8):
    ids = prompt(5, 90, rows)
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            cache_implementation="static", output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("pages", {}), ("double_sparsity", {}), ("pages", {"tau": 0.6}), ("double_sparsity", {"tau": 0.5}),
        ("double_sparsity", {"bits": 8}), ("double_sparsity", {"bits": 4}), ("pages", {"heads": (1,)}),
        ("double_sparsity", {"heads": {0: 20, -1: 1.0}}), ("pages", {"budget": 0.8, "heads": {0: 64}}),
    ],
)  # fmt: skip
def test_decoding_equals_the_reference(method, fields, eager_lowering):
    model = TINY["llama"]()
    setting = replace(settings(model)[method], **fields)
    dense = generated(model)
    meant = generated(fxopt.reference(model, setting))
    fxopt.compile(model, setting, strict=True)
    torch.testing.assert_close(generated(model), meant, rtol=1e-4, atol=1e-4)
    assert (dense - meant).abs().max() > 1e-3
    assert fxopt.report(model).graphs[-1].count("sparse_attention") == model.config.num_hidden_layers


@pytest.mark.parametrize("method", ["pages", "double_sparsity"])
def test_a_budget_over_everything_is_dense(method, eager_lowering):
    model = TINY["llama"]()
    dense = generated(model)
    fxopt.compile(model, SparseAttention(method=method, budget=1.0))
    torch.testing.assert_close(generated(model), dense, rtol=1e-4, atol=1e-4)


def test_under_inductor():
    model = TINY["llama"]()
    meant = generated(fxopt.reference(model, PAGES), tokens=4)
    fxopt.compile(model, PAGES, strict=True)
    torch.testing.assert_close(generated(model, tokens=4), meant, rtol=1e-4, atol=1e-4)


def filled_inputs(filled=83, length=128, batch=2, heads=8, kv_heads=2, width=16):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(batch, heads, 1, width, generator=generator)
    key = torch.randn(batch, kv_heads, length, width, generator=generator)
    mask = (torch.arange(length) < filled).expand(batch, 1, 1, -1).clone()
    return query, key, mask, torch.tensor(filled)


def test_the_bound_is_never_below_a_score_of_its_page():
    query, key, _, extent = filled_inputs()
    bounds, known = torch.full((2, 2, 8, 32), torch.nan), torch.tensor(-1)
    OPS.update_page_bounds(bounds, known, key, extent, page=16)
    scores = OPS.page_scores(query, bounds, extent, page=16)
    exact = torch.einsum("bkgd,bksd->bkgs", query.view(2, 2, 4, 16), key).amax(2)[..., :83]
    for page in range(6):
        assert (scores[:, :, page] >= exact[..., page * 16 : page * 16 + 16].amax(-1) - 1e-5).all()
    assert (scores[:, :, 6:] == -torch.inf).all()


def test_step_by_step_equals_one_shot():
    _, key, _, _ = filled_inputs()
    stepped, whole = torch.zeros(2, 2, 8, 32), torch.zeros(2, 2, 8, 32)
    known, fresh = torch.tensor(-1), torch.tensor(-1)
    features, labels_known = torch.zeros(2, 2, 4, 128), torch.tensor(-1)
    channels = torch.tensor([[0, 3, 8, 11], [1, 2, 9, 10]])
    for end in range(20, 84):
        OPS.update_page_bounds(stepped, known, key, torch.tensor(end), page=16)
        OPS.update_features(features, labels_known, key, torch.tensor(end), channels)
    OPS.update_page_bounds(whole, fresh, key, torch.tensor(83), page=16)
    assert torch.equal(stepped, whole) and int(known) == int(labels_known) == 83
    for head in range(2):
        assert torch.equal(features[:, head, :, :83], key[:, head, :83][..., channels[head]].mT)


def test_all_channels_give_exact_scores():
    query, key, _, extent = filled_inputs()
    features, known = torch.zeros(2, 2, 16, 128), torch.tensor(-1)
    OPS.update_features(features, known, key, extent)
    scores = OPS.feature_scores(query, features, extent)
    exact = torch.einsum("bkgd,bksd->bkgs", query.view(2, 2, 4, 16), key).amax(2)
    torch.testing.assert_close(scores[..., :83], exact[..., :83])


@pytest.mark.parametrize("length", [128, 121])
def test_all_listed_blocks_are_dense_attention_and_rows_are_independent(length):
    query, key, mask, _ = filled_inputs(length=length)
    mask[0, :, :, :9] = False
    value = key.flip(2).contiguous()
    dense = attention(query, key, value, mask, scale=0.25)
    index = torch.arange(7).expand(2, 2, -1)
    # One block in two is listed twice as padding would be; nothing of what is not visible may count.
    padded = torch.cat((index, torch.full((2, 2, 2), -1)), -1)[:, :, torch.randperm(9)]
    from fxopt.codegen.ops.sparse_gather import attend_to

    torch.testing.assert_close(attend_to(query, key, value, padded, None, mask, 83, None, 0.25, 0.0, 16), dense)
    both = attend_to(query, key, value, index[:, :, :3], None, mask, 83, None, 0.25, 0.0, 16)
    alone = attend_to(query[1:], key[1:], value[1:], index[1:, :, :3], None, mask[1:], 83, None, 0.25, 0.0, 16)
    torch.testing.assert_close(both[1:], alone)


def test_what_is_always_read():
    _, key, mask, _ = filled_inputs()
    mask[0, :, :, :14] = False
    bias = OPS.block_bias(key, mask, sinks=4, newest=1, block=16)
    inf = torch.inf
    assert bias[0].tolist() == [inf, inf, 0, 0, 0, inf, -inf, -inf]
    assert bias[1].tolist() == [inf, 0, 0, 0, 0, inf, -inf, -inf]


def test_the_calibrator_is_a_mean_per_head():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(3, 4, 5, 8, generator=generator), torch.randn(3, 2, 5, 8, generator=generator)
    found = product_sums(query, key)
    for head in range(2):
        for channel in range(8):
            expected = sum(
                abs(float(query[b, g, t, channel]) * float(key[b, head, t, channel]))
                for b in range(3) for t in range(5) for g in (2 * head, 2 * head + 1)
            )  # fmt: skip
            assert abs(float(found[head, channel]) - expected) < 1e-5
    for listed in heaviest(found, 4):
        assert len(listed) == 4 and all((c + 4) % 8 in listed for c in listed)


def test_lists_in_the_authors_format(tmp_path):
    import json

    path = tmp_path / "lists.json"
    path.write_text(json.dumps({
        "model.layers.0.self_attn.k_proj": [[3, 1, 2, 0], [2, 0, 1, 3]],
        "model.layers.0.self_attn.v_proj": [[0, 0, 0, 0]], "model.layers.0.mlp.down_proj": [],
    }))  # fmt: skip
    assert read_lists(path) == {0: ((3, 1, 2, 0), (2, 0, 1, 3))}
    assert first_channels((3, 1, 2, 0), 2) == (1, 3)
    assert head_overlap(((3, 1, 2, 0), (2, 0, 1, 3)), 2) == 0.0
    for kind in ("q", "qk"):
        with pytest.raises(SettingError, match=f"no '.*{kind}_proj'"):
            read_lists(path, kind)
    with pytest.raises(SettingError, match="take 'k'"):
        read_lists(path, "v")
    with pytest.raises(SettingError, match="no file"):
        read_lists(tmp_path / "missing.json")
    for wrong in ([[3, 1, 1, 0]], [[1, 0], [1, 0, 2]], [["a", 1]], [[0.0, 1.0]]):
        path.write_text(json.dumps({"model.layers.0.self_attn.k_proj": wrong}))
        with pytest.raises(SettingError, match="permutation"):
            read_lists(path)
    path.write_text(json.dumps({"model.layers.0.self_attn.k_proj": [3, 1, 2, 0]}))
    with pytest.raises(SettingError, match="one list of channels for each head"):
        read_lists(path)
    path.write_text("{")
    with pytest.raises(SettingError, match="no JSON"):
        read_lists(path)


def test_channels_of_another_model(eager_lowering):
    model = TINY["llama"]()
    wrong = SparseAttention(method="double_sparsity", budget=32, min_length=0, channels=((0, 1),) * 7)
    fxopt.compile(model, wrong)
    with pytest.raises(Exception, match="calibrated for 7 KV heads"):
        generated(model)


def by_channel(q, keys, state):
    """SparQ's first step: scores on the channels in which the queries are largest."""
    channels = q.abs().sum(2).topk(4, -1)[1]
    rows = torch.take_along_dim(state, channels[..., None], 2)
    return torch.matmul(torch.take_along_dim(q, channels[:, :, None], 3), rows).amax(2)


def first_tokens(q, keys, state):
    """Indices instead of scores."""
    return torch.matmul(q, keys.transpose(2, 3)).amax(2).topk(16, -1)[1]


@pytest.mark.parametrize("function", [by_channel, first_tokens])
def test_a_function_of_ones_own(function, eager_lowering):
    model = TINY["llama"]()
    setting = SparseAttention(select=function, budget=28, min_length=0)
    dense = generated(model)
    meant = generated(fxopt.reference(model, setting))
    fxopt.compile(model, setting, strict=True)
    torch.testing.assert_close(generated(model), meant, rtol=1e-4, atol=1e-4)
    assert (dense - meant).abs().max() > 1e-3


def test_a_recipe_of_channels(tmp_path, eager_lowering):
    model = TINY["llama"]()
    asked = SparseAttention(method="double_sparsity", budget=32, min_length=0, channels=4)
    recipe = fxopt.tune(model, prompt(4, 128)[0], asked, context=32, show=False)
    layers = model.config.num_hidden_layers
    assert list(recipe.paths) == [f"model.layers.{i}.self_attn" for i in range(2, layers)]
    loaded = fxopt.Recipe.load(recipe.save(tmp_path / "channels.safetensors"))
    assert loaded.paths == recipe.paths
    fxopt.compile(model, loaded)
    generated(model)
    assert fxopt.report(model).graphs[-1].count("sparse_attention") == layers - 2
