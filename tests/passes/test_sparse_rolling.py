"""A cache that rolls behind its sinks: conversations far longer than it, with positions as StreamingLLM counts them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fxopt
from fxopt import EarlyExit, SparseAttention
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY

SINKS, WINDOW = 3, 13
CAPACITY = SINKS + WINDOW
ROLLING = SparseAttention(window=WINDOW, sinks=SINKS, rolling=True)


def tokens(count, rows=2, seed=1):
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(seed))


def static(model, capacity=CAPACITY):
    return StaticCache(config=model.config, max_cache_len=capacity)


def decoded(model, cache, ids, prompt=5, start=0):
    """Logits [B, N - prompt + 1, V] of ids [B, N], token by token behind a prompt."""
    found = []
    with torch.no_grad():
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            place = start + torch.arange(begin, end)[None]
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True, position_ids=place)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_many_times_the_window(name, eager_lowering):
    ids = tokens(4 * CAPACITY)
    reference = fxopt.reference(TINY[name](), ROLLING)
    meant = decoded(reference, DynamicCache(config=reference.config), ids)
    masked = fxopt.reference(TINY[name](), SparseAttention(window=WINDOW, sinks=SINKS))
    plain = decoded(masked, DynamicCache(config=masked.config), ids)
    model = fxopt.compile(TINY[name](), ROLLING, strict=True)
    cache = static(model)
    torch.testing.assert_close(decoded(model, cache, ids), meant, rtol=0, atol=1e-5)
    # As long as nothing was dropped both are the same; then the place of the sinks tells them apart.
    same = CAPACITY - 4
    torch.testing.assert_close(meant[:, :same], plain[:, :same], rtol=0, atol=1e-5)
    assert (meant - plain)[:, same + 1 :].abs().amax(-1).max() > 5e-5  # a quarter of a GPT-NeoX head is rotated
    assert all(layer.keys.shape[2] == CAPACITY for layer in cache.layers)
    graph = fxopt.report(model).graphs[-1]
    assert graph.count("sparse_attention") == len(cache.layers)


@pytest.mark.slow
def test_generates_through_inductor():
    """Real `generate` over three times the cache: what the reference gives on a cache that keeps everything."""
    ids = tokens(10)

    def generated(model, cache):
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=40, min_new_tokens=40,
                do_sample=False, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        return torch.stack(out.logits)

    reference = fxopt.reference(TINY["llama"](), ROLLING)
    meant = generated(reference, DynamicCache(config=reference.config))
    model = fxopt.compile(TINY["llama"](), ROLLING, strict=True)
    torch.testing.assert_close(generated(model, static(model)), meant, rtol=0, atol=1e-5)
    assert len(fxopt.report(model).graphs) == 2  # a prompt and a step, which serves them all


def test_positions_count_inside_the_cache(eager_lowering):
    """In a model of one layer what is cached depends on nothing before it: a step equals a short text of its own."""
    torch._dynamo.reset()
    ids = tokens(3 * CAPACITY + 2)

    def build():
        model = TINY["llama"]()
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        return model

    plain = build()
    model = fxopt.compile(build(), ROLLING, strict=True)
    found = decoded(model, static(model), ids)
    for end in (CAPACITY, CAPACITY + 1, 2 * CAPACITY, ids.shape[1]):
        kept = torch.cat((ids[:, :SINKS], ids[:, end - WINDOW : end]), 1)
        with torch.no_grad():
            expected = plain(kept).logits[:, -1]
        torch.testing.assert_close(found[:, end - 5], expected, rtol=1e-4, atol=1e-4)


def test_reset_reorder_and_conversations_in_turns(eager_lowering):
    model = fxopt.compile(TINY["llama"](), ROLLING, strict=True)
    reference = fxopt.reference(TINY["llama"](), ROLLING)

    def meant(ids):
        return decoded(reference, DynamicCache(config=reference.config), ids)

    first, second = static(model), static(model)
    a, b = tokens(40, seed=2), tokens(33, seed=3)
    with torch.no_grad():
        for cache, ids in ((first, a), (second, b)):
            model(ids[:, :5], past_key_values=cache, position_ids=torch.arange(5)[None])
        for at in range(5, 33):
            for cache, ids, expected in ((first, a, meant(a)), (second, b, meant(b))) if at == 32 else (
                (first, a, None), (second, b, None)
            ):  # fmt: skip
                out = model(ids[:, at : at + 1], past_key_values=cache, position_ids=torch.tensor([[at]])).logits
                if expected is not None:
                    torch.testing.assert_close(out[:, -1], expected[:, at - 4], rtol=1e-4, atol=1e-4)
        order = torch.tensor([1, 0])
        first.reorder_cache(order)
        rest = a[order]
        for at in range(33, 40):
            out = model(rest[:, at : at + 1], past_key_values=first, position_ids=torch.tensor([[at]])).logits
        torch.testing.assert_close(out[:, -1], meant(rest)[:, -1], rtol=1e-4, atol=1e-4)
    second.reset()
    c = tokens(30, seed=4)
    torch.testing.assert_close(decoded(model, second, c), meant(c), rtol=1e-4, atol=1e-4)
    with pytest.raises(AttributeError):
        first.crop(20)  # a static cache cannot be cropped, and this one has forgotten what a crop would need


def test_generate(eager_lowering):
    ids = tokens(6, rows=1)
    options = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
    reference = fxopt.reference(TINY["llama"](), ROLLING)
    model = fxopt.compile(TINY["llama"](), ROLLING, strict=True)
    with torch.no_grad():
        expected = reference.generate(ids, **options)
        found = model.generate(ids, past_key_values=static(model), **options)
    assert torch.equal(found, expected) and found.shape[1] == 56


def test_padded_rows_are_refused(eager_lowering):
    model = fxopt.compile(TINY["llama"](), ROLLING)
    ids, mask = tokens(8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad(), pytest.raises(RuntimeError, match="sinks of their own"):
        model.generate(ids, attention_mask=mask, past_key_values=static(model), max_new_tokens=4, min_new_tokens=4)


def test_more_tokens_than_fit_are_refused(eager_lowering):
    model = fxopt.compile(TINY["llama"](), ROLLING)
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of"):
        model(tokens(CAPACITY + 1), past_key_values=static(model))
    cache = static(model)
    decoded(model, cache, tokens(CAPACITY + 3))
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of"):
        model(tokens(2), past_key_values=cache, position_ids=CAPACITY + 3 + torch.arange(2)[None])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("llama", lambda m: static(m, 64), "16 rows and the cache has 64"),
        ("llama", lambda m: DynamicCache(config=m.config), "a dynamic cache"),
        ("gpt2", static, "not rotated by its position"),
        ("gemma2", static, "sliding layer|capped"),
    ],
)  # fmt: skip
def test_what_cannot_roll_is_told_and_stays_dense(name, make, message, eager_lowering):
    def build():
        model = TINY[name]()
        if name == "gemma2":
            model.set_attn_implementation("eager")  # the only one that caps scores in every version of transformers
        return model

    plain = build()
    model = fxopt.compile(build(), ROLLING)
    ids = tokens(9)
    expected = decoded(plain, make(plain), ids)
    with pytest.warns(UserWarning, match=message):
        found = decoded(model, make(model), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    model = fxopt.compile(build(), ROLLING, strict=True)
    with pytest.raises(Exception, match=message):
        decoded(model, make(model), ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rolling": True, "budget": 64}, "takes window=tokens"),
        ({"rolling": True, "window": 8, "layers": (1,)}, "leave layers out"),
        ({"rolling": True, "window": 8, "heads": (1,)}, "leave heads out"),
        ({"rolling": True, "window": 8, "min_length": 9}, "leave min_length out"),
        ({"rolling": True, "method": "pages", "budget": 64}, "only method='sink_window'"),
        ({"rolling": 1, "window": 8}, "True or False"),
    ],
)  # fmt: skip
def test_settings(given, message):
    with pytest.raises(SettingError, match=message):
        SparseAttention(**given)


def test_techniques_that_write_caches_their_own_way(eager_lowering):
    model = fxopt.compile(TINY["llama"](), ROLLING, EarlyExit(layers=(1,), threshold=0.5), strict=True)
    with pytest.raises(Exception, match="Remove one of the two"):
        decoded(model, static(model), tokens(7))
