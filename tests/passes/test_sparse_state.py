"""State that sparse attention keeps beside a cache, while the cache changes: every step equals the reference."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fxopt
from fxopt.passes import state
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.sparse_attention.one_shot import OneShot
from fxopt.testing import TINY

PAGES = SparseAttention(method="pages", budget=64, min_length=0)
KIND = ("pages", 16)
CHANNELS = ((0, 3, 8, 11), (1, 2, 9, 10))
METHODS = {
    "pages": PAGES,
    "double_sparsity": SparseAttention(method="double_sparsity", budget=32, min_length=0, channels=CHANNELS),
    "sink_window": SparseAttention(window=20, sinks=2),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


class Pair:
    """A compiled model and its reference, driven alike; `step` compares their logits."""

    def __init__(self, setting=PAGES):
        self.model = TINY["llama"]()
        self.reference = fxopt.reference(TINY["llama"](), setting)
        fxopt.compile(self.model, setting, strict=True)

    def caches(self, kind):
        def one():
            if kind == "static":
                return StaticCache(config=self.model.config, max_cache_len=128)
            return DynamicCache(config=self.model.config)

        return one(), one()

    def run(self, caches, ids, at):
        """Feed tokens from position `at` on to both; the last logits have to be equal."""
        position = at + torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            logits = [
                model(ids, past_key_values=cache, use_cache=True, position_ids=position).logits[:, -1]
                for model, cache in zip((self.model, self.reference), caches, strict=True)
            ]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)

    def steps(self, caches, at, count=2, rows=1):
        for number in range(count):
            self.run(caches, torch.full((rows, 1), 7 + number), at + number)


def prompt(seed, tokens=90, rows=1):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def filled(cache):
    """How far the state beside the cache says that it covers it; for a method without one, the cache's own length."""
    kept = state.state_of(cache.layers[0].keys)
    return {int(one["filled"]) for one in kept.values()} if kept else {int(cache.get_seq_length())}


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_two_conversations_in_turns(kind, method, eager_lowering):
    pair = Pair(method)
    first, second = pair.caches(kind), pair.caches(kind)
    pair.run(first, prompt(1), 0)
    pair.run(second, prompt(2, 93), 0)
    for number in range(3):
        pair.steps(first, 90 + number, 1)
        pair.steps(second, 93 + number, 1)
    assert (filled(first[0]), filled(second[0])) == ({93}, {96})
    assert fxopt.report(pair.model).graphs[-1].count("sparse_attention") == 3


def test_reset_and_steps_taken_back(method, eager_lowering):
    pair = Pair(method)
    caches = pair.caches("static")
    pair.run(caches, prompt(1), 0)
    pair.steps(caches, 90)
    for back in (1, 2):  # the next step finds the length that it covers already, or a longer one
        for cache in caches:
            for layer in cache.layers:
                layer.cumulative_length.sub_(back)
        pair.run(caches, torch.tensor([[50 + back]]), 92 - back)
        pair.steps(caches, 93 - back, back - 1)
    # A longer prompt, so that the first step finds the length it would expect.
    for cache in caches:
        cache.reset()
    pair.run(caches, prompt(3, 92), 0)
    pair.steps(caches, 92)


def test_reorder(method, eager_lowering):
    pair = Pair(method)
    for kind in ("static", "dynamic"):
        caches = pair.caches(kind)
        pair.run(caches, prompt(4, rows=2), 0)
        pair.steps(caches, 90, rows=2)
        for cache in caches:
            cache.reorder_cache(torch.tensor([1, 1]))
        pair.steps(caches, 92, rows=2)


def test_crop_of_a_growing_cache(method, eager_lowering):
    pair = Pair(method)
    caches = pair.caches("dynamic")
    pair.run(caches, prompt(5), 0)
    pair.steps(caches, 90)
    for cache in caches:
        cache.crop(-5)
    pair.steps(caches, 87)
    assert filled(caches[0]) == {89}


def test_step_by_step_equals_one_shot_and_rows_are_independent(method, eager_lowering):
    """Two rows decoded together are what one forward says of each row alone."""
    model = TINY["llama"]()
    ids = prompt(8, 104, rows=2)
    with torch.no_grad(), OneShot(dict.fromkeys(range(3), method), 90).attached(model):
        # Rows of a static cache of 104 positions: the budgets here are in tokens, so that the length does not matter.
        expected = torch.cat([model(row[None], use_cache=False).logits[:, 90:] for row in ids])
    fxopt.compile(model, method, strict=True)
    cache = StaticCache(config=model.config, max_cache_len=104)
    found = []
    with torch.no_grad():
        model(ids[:, :90], past_key_values=cache, use_cache=True)
        for at in range(90, 104):
            position = torch.tensor([[at]])
            out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True, position_ids=position)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
    assert fxopt.report(model).graphs[-1].count("sparse_attention") == 3


def test_growth_beyond_the_room_that_was_made(eager_lowering, monkeypatch):
    monkeypatch.setattr(state, "ROOM", 32)
    pair = Pair()
    caches = pair.caches("dynamic")
    pair.run(caches, prompt(6, 93), 0)
    pair.steps(caches, 93, 5)
    bounds = state.state_of(caches[0].layers[0].keys)[KIND]["bounds"]
    assert bounds.shape[2] == 8 and filled(caches[0]) == {98}


@pytest.mark.slow
def test_a_growing_cache_under_inductor():
    setting = SparseAttention(method="pages", budget=0.7, min_length=0)
    pair = Pair(setting)
    caches = pair.caches("dynamic")
    pair.run(caches, prompt(7, 300), 0)
    pair.steps(caches, 300, 3)
    assert filled(caches[0]) == {303}


def test_a_write_from_outside_is_noticed(eager_lowering):
    pair = Pair()
    caches = pair.caches("static")
    pair.run(caches, prompt(1), 0)
    pair.steps(caches, 90, 1)
    for cache in caches:
        cache.layers[0].keys[:, :, 3] = 5.0
    pair.steps(caches, 91, 1)


def test_state_goes_with_its_cache(eager_lowering):
    pair = Pair()
    caches = pair.caches("static")
    pair.run(caches, prompt(1), 0)
    pair.steps(caches, 90, 1)
    gc.collect()  # what earlier tests left
    before = len(state._STATES)
    assert before >= pair.model.config.num_hidden_layers
    del caches
    gc.collect()
    assert len(state._STATES) == before - pair.model.config.num_hidden_layers
