"""The search for method and budget by layer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types

import pytest
import torch

import fxopt
from fxopt import scoring, sparse_costs, sparse_measuring, sparse_tuning
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY

timed = sparse_costs.timed


@pytest.fixture(autouse=True)
def costs_by_bytes(monkeypatch):
    """What a long cache would cost: on the short ones here nothing is faster than exact attention."""

    def by_bytes(settings, heads, kv_heads, width, *_):
        return [s.budget + s.chosen_by.state_elements(s, width) / (2 * width) for s in settings] + [1.0]

    monkeypatch.setattr(sparse_costs, "timed", by_bytes)


def test_goals():
    assert sparse_tuning.wanted_divergence("kl<0.01") == sparse_tuning.wanted_divergence(" kl <= 1e-2 ") == 0.01
    for goal in (None, "kl", "kl<0", "kl<-1", "agreement=0.9", "kl<x"):
        with pytest.raises(SettingError, match="kl<0.01"):
            sparse_tuning.wanted_divergence(goal)


def test_no_choice_of_the_speed_loses_less():
    """Against every combination, where divergences add up exactly."""
    generator = torch.Generator().manual_seed(0)
    costs = {layer: [*torch.rand(5, generator=generator).tolist(), 0.9] for layer in (1, 2, 4)}  # dense last
    lost = {layer: {n: float(torch.rand(1, generator=generator)) ** 3 for n in (0, 1, 3, 4)} for layer in costs}

    def seconds(picked):
        return sum(costs[layer][picked.get(layer, -1)] for layer in costs)

    def loss(picked):
        return sum(lost[layer][number] for layer, number in picked.items())

    def combinations():
        for numbers in itertools.product((None, 0, 1, 3, 4), repeat=3):
            yield {layer: n for layer, n in zip(costs, numbers, strict=True) if n is not None}

    found = sparse_tuning.family(costs, lost)
    assert len(found) > 4
    for before, recipe in itertools.pairwise([{}, *found]):
        assert seconds(recipe) < seconds(before) and loss(recipe) >= loss(before)
        assert sum(before.get(layer) != recipe.get(layer) for layer in costs) == 1
        assert min(loss(c) for c in combinations() if seconds(c) <= seconds(recipe) + 1e-9) > loss(recipe) - 1e-9
    assert seconds(found[-1]) == pytest.approx(min(map(seconds, combinations())))
    assert sparse_tuning.family(costs, {layer: {} for layer in costs}) == []


class Table:
    """A search whose divergences are given: ``kls(numbers of candidates by layer)`` by window."""

    candidates = tuple(
        SparseAttention(method=method, budget=budget)
        for method in ("pages", "sink_window") for budget in (1 / 8, 1 / 4, 1 / 2)
    )  # fmt: skip
    options = dict.fromkeys(range(4), candidates)
    costs = dict.fromkeys(range(4), (0.15, 0.3, 0.6, 0.1, 0.2, 0.5, 1.0))
    tails = types.SimpleNamespace(windows=range(4))
    show = False

    def __init__(self, kls):
        self.kls, self.asked = kls, []

    def divergences(self, tails, settings, numbers, goal, said=None):
        picked = {layer: self.options[layer].index(s) for layer, s in settings.items()}
        self.asked.append(picked)
        return self.kls(picked)[: len(numbers)]

    def fastest(self, lost, goal):
        recipes = sparse_tuning.family(self.costs, lost)
        return sparse_tuning._fastest(self, self.tails, self.options, recipes, goal)


LOST = {layer: {n: kl / (layer + 1) for n, kl in enumerate((0.05, 0.01, 0.002, 0.2, 0.08, 0.03))} for layer in range(4)}


def added(picked):
    return [math.fsum(LOST[layer][n] for layer, n in picked.items())] * 4


def test_the_fastest_of_the_family_that_keeps_the_goal():
    search = Table(added)
    assert sparse_tuning._alone(search, search.tails, search.options, 1.0) == LOST
    for goal in (0.0004, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2):
        search = Table(added)
        picked, kls = search.fastest(LOST, goal)
        recipes = sparse_tuning.family(search.costs, LOST)
        fit = [recipe for recipe in recipes if added(recipe)[0] < goal]
        assert picked == (fit[-1] if fit else {}) and kls == (added(picked) if fit else [])
        assert len(search.asked) <= len(recipes).bit_length() + 2


def test_left_out_with_all_smaller_budgets_where_one_reaches_the_goal_alone():
    search = Table(added)
    lost = sparse_tuning._alone(search, search.tails, search.options, 0.009)
    assert set(lost[0]) == {2} and set(lost[3]) == {1, 2, 5}
    assert {0: 1} in search.asked and {0: 0} not in search.asked  # 1/4 reaches it, so 1/8 is not measured


def test_kept_means_with_one_standard_error():
    assert sparse_tuning.with_error([0.1]) == 0.1
    assert sparse_tuning.with_error([0.0, 0.02]) == pytest.approx(0.02)
    lost = {0: {2: 0.009}}
    even, uneven = [0.009] * 4, [0.0, 0.0, 0.0, 0.036]  # of one mean
    for kls, found in ((even, {0: 2}), (uneven, {}), ([0.001], {})):  # the last ended early: out of reach
        search = Table(lambda picked, kls=kls: kls if picked == {0: 2} else [1.0])
        assert search.fastest(lost, 0.01)[0] == found


def test_one_setting_for_all_layers_is_never_faster():
    """Layers that together lose less than each alone, so that the family is no guide."""

    def together(picked):
        same = len(set(picked.values())) == 1 and set(picked) == {2, 3}
        return [0.001 if same and picked[2] != 3 else 1.0] * 4

    search = Table(together)
    picked, kls = search.fastest(LOST, 0.01)
    assert picked == {2: 0, 3: 0} and kls == [0.001] * 4
    # A window of 1/2, 1/4, and of 1/8 in vain; of pages only those of 1/8 are faster than that of 1/4.
    assert [a for a in search.asked if set(a) == {2, 3}][-4:] == [{2: n, 3: n} for n in (5, 4, 3, 0)]


def test_a_recipe_that_keeps_its_goal(tmp_path):
    model = TINY["llama"]()
    ids = torch.randint(3, 128, (320,), generator=torch.Generator().manual_seed(3))
    asked = SparseAttention(budget=1.0, layers=(1, 2), min_length=0)
    recipe = fxopt.tune(model, ids, asked, goal="kl<0.05", context=80, show=False)
    assert recipe.paths and set(recipe.paths) <= {"model.layers.1", "model.layers.2"}
    assert recipe.notes["kl"] < 0.05 and recipe.data["sparse_attention.density"].shape == (2, 2)
    assert all(p.budget in sparse_tuning.BUDGETS for p in recipe.paths.values())
    loaded = fxopt.Recipe.load(recipe.save(tmp_path / "sparse.safetensors"))
    assert loaded.paths == recipe.paths
    text = "\n".join(sparse_tuning.report_lines(loaded))
    assert "model.layers.1" in text and "attention mass kept" in text and "x, timed here" in text
    assert sparse_tuning.report_lines(fxopt.Recipe()) == []
    with pytest.raises(SettingError, match="no choice"):
        fxopt.tune(model, ids, asked, goal="kl<1e-12", context=80, show=False)
    with pytest.raises(SettingError, match="2 windows"):
        fxopt.tune(model, ids, asked, goal="kl<0.1", context=150, show=False)


@pytest.fixture
def searched():
    """A search of six windows of 64 tokens in two layers, as a function of what else tune is given."""
    model = TINY["llama"]()
    ids = torch.randint(3, 128, (384,), generator=torch.Generator().manual_seed(3))
    asked = SparseAttention(budget=1.0, layers=(1, 2), min_length=0)
    return functools.partial(fxopt.tune, model, ids, asked, goal="kl<0.05", context=64, show=False), ids


def test_the_recorded_divergence_is_that_of_a_text_that_chose_nothing(searched):
    tune, ids = searched
    recipe = tune()
    assert recipe.notes["windows"] == 1 and recipe.notes["kl"] != recipe.notes["kl where chosen"]
    # Another third window changes nothing but what is recorded of it.
    other = torch.cat((ids[:128], ids[128:192].flip(0), ids[192:]))
    moved = fxopt.tune(tune.args[0], other, *tune.args[2:], **tune.keywords)
    assert moved.paths == recipe.paths and moved.notes["kl where chosen"] == recipe.notes["kl where chosen"]
    assert moved.notes["kl"] != recipe.notes["kl"]
    # Measured by itself, it is what that window gives.
    model = tune.args[0]
    tails = sparse_measuring.Tails(model, scoring.windows(None, ids, 64, whole=True)[2:3], 32)
    settings = {
        int(path.rpartition(".")[2]): dataclasses.replace(p, min_length=0) for path, p in recipe.paths.items()
    }  # fmt: skip
    assert tails.divergence(settings)["kl"] == pytest.approx(recipe.notes["kl"], abs=1e-6)


def test_a_choice_that_does_not_hold_elsewhere_is_told(searched, monkeypatch):
    tune, _ = searched

    def divergences(search, tails, settings, numbers, goal, said=None):
        return [0.2 if said == "confirming" else 0.001] * len(numbers)

    monkeypatch.setattr(sparse_measuring.Search, "divergences", divergences)
    with pytest.warns(UserWarning, match="0.00100 where it was made and 0.20000 on text that took no part"):
        assert tune().notes["kl"] == 0.2


def test_a_measurement_ends_where_the_goal_is_out_of_reach():
    model = TINY["llama"]()
    ids = torch.randint(3, 128, (256,), generator=torch.Generator().manual_seed(3))
    tails = sparse_measuring.Tails(model, scoring.windows(None, ids, 64, whole=True), 32)
    settings = {1: SparseAttention(budget=8, min_length=0)}
    search = sparse_measuring.Search(model, "", None, False)
    whole = search.divergences(tails, settings, range(4), math.inf)
    assert len(whole) == 4 and sum(whole) / 4 == pytest.approx(tails.divergence(settings)["kl"])
    assert search.divergences(tails, settings, range(4), sum(whole[:2]) / 4) == whole[:2]
    assert search.divergences(tails, settings, [1, 3], math.inf) == [whole[1], whole[3]]


def test_layers_with_a_window_of_their_own_stay_dense():
    model = TINY["gemma3_text"]()
    ids = torch.randint(3, 128, (192,), generator=torch.Generator().manual_seed(3))
    asked = SparseAttention(budget=1.0, min_length=0)
    assert set(fxopt.tune(model, ids, asked, goal="kl<0.05", context=64, show=False).paths) == {"model.layers.2"}


@pytest.mark.parametrize("saved", [1, 2, 3, 4, 22, -8, -6, -3, -2, -1])
def test_killed_and_resumed_gives_the_same_recipe(searched, tmp_path, monkeypatch, saved):
    """After any window, from the end or the beginning: of the calibration, of layers alone, of recipes, of the last."""
    tune, ids = searched
    path = tmp_path / "search.safetensors"
    count, save = 0, sparse_measuring.Search._save

    def counts(search):
        nonlocal count
        save(search)
        count += 1

    def dies(search):
        counts(search)
        if count == saved:
            raise KeyboardInterrupt

    monkeypatch.setattr(sparse_measuring.Search, "_save", counts)
    whole = tune(checkpoint=tmp_path / "whole.safetensors")
    if saved < 0:
        saved += count
    count = 0
    monkeypatch.setattr(sparse_measuring.Search, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(checkpoint=path)
    monkeypatch.setattr(sparse_measuring.Search, "_save", save)
    if saved > 2:  # a CPU's bandwidth is measured in each process: the resumed run must not measure another one
        monkeypatch.setattr(sparse_costs, "costs", None)
    runs = []
    forward = type(tune.args[0]).forward
    monkeypatch.setattr(type(tune.args[0]), "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    resumed = tune(checkpoint=path)
    assert runs
    assert resumed.paths == whole.paths and resumed.notes["kl"] == whole.notes["kl"]
    for name, tensor in whole.data.items():
        assert torch.equal(resumed.data[name], tensor), name
    runs.clear()
    again = tune(checkpoint=path)
    assert not runs and again.notes == resumed.notes  # nothing is measured twice
    with pytest.raises(SettingError, match="not written by this search"):
        fxopt.tune(tune.args[0], ids.flip(0), *tune.args[2:], **tune.keywords, checkpoint=path)


def some_settings():
    channels = ((0, 1, 8, 9), (2, 3, 10, 11))
    return [
        SparseAttention(method=method, budget=budget, min_length=0, channels=channels if "double" in method else None)
        for method in ("sink_window", "pages", "double_sparsity") for budget in (1 / 8, 1 / 4, 1 / 2)
    ]  # fmt: skip


def test_attention_is_timed_by_method_and_budget(eager_lowering):
    settings = some_settings()
    found = timed(settings, 4, 2, 16, 256, torch.float32, False)
    assert len(found) == len(settings) + 1 and min(found) > 0
    for method in range(3):
        small, middle, large = found[3 * method : 3 * method + 3]
        assert middle == pytest.approx(small + (large - small) / 3)
    acted = [r for g in fxopt.reports()[-1].graphs for r in g.remarks if r.technique == "sparse_attention"]
    assert acted == []  # exact attention is compiled last
    acted = [r.status for report in fxopt.reports() for r in report.remarks if r.technique == "sparse_attention"]
    assert acted.count("applied") >= 6 * sparse_costs.LAYERS


def test_where_nothing_is_faster_bytes_decide_with_a_warning(monkeypatch):
    model, settings = TINY["llama"](), some_settings()
    monkeypatch.setattr(sparse_costs, "timed", lambda settings, *_: [3e-6 + s.budget * 1e-6 for s in settings] + [2e-6])
    with pytest.warns(UserWarning, match=r"2 microseconds a layer; sink_window 3\)"):
        found, known = sparse_costs.costs(model, {1: settings, 2: settings}, 4096, False)
    assert known == sparse_costs.BY_ROOFLINE and found[1] == found[2]
    assert found[1][:3] == sorted(found[1][:3]) and found[1][2] < found[1][-1]
    monkeypatch.setattr(sparse_costs, "timed", lambda settings, *_: [1e-6] * len(settings) + [2e-6])
    assert sparse_costs.costs(model, {1: settings}, 4096, False) == ({1: [1e-6] * 9 + [2e-6]}, "timed here")
