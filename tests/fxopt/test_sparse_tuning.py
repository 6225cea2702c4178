"""The search for method and budget by layer."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import fxopt
from fxopt import scoring, sparse_measuring, sparse_tuning
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.sparse_attention.one_shot import HeadSums
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY


def test_goals():
    assert sparse_tuning.wanted_divergence("kl<0.01") == sparse_tuning.wanted_divergence(" kl <= 1e-2 ") == 0.01
    for goal in (None, "kl", "kl<0", "kl<-1", "agreement=0.9", "kl<x"):
        with pytest.raises(SettingError, match="kl<0.01"):
            sparse_tuning.wanted_divergence(goal)


def test_the_cheapest_within_the_bound():
    def kept(mass):
        one = torch.ones(1, dtype=torch.float64)
        return HeadSums(one, one, one * mass, 1)

    measured = {(0, 0): kept(0.8), (0, 1): kept(0.95), (1, 0): kept(0.99), (1, 1): kept(0.999)}
    costs = {0: [1.0, 2.0, 8.0], 1: [1.0, 9.0, 8.0]}  # dense last
    assert sparse_tuning.pick(measured, costs, 0.1) == {0: 1, 1: 0}
    assert sparse_tuning.pick(measured, costs, 0.3) == {0: 0, 1: 0}
    assert sparse_tuning.pick(measured, costs, 0.001) == {}  # what keeps enough there costs more than dense


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
    assert "model.layers.1" in text and "attention mass kept" in text and "by the roofline" in text
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
    # Another last window changes nothing but what is recorded of it.
    other = torch.cat((ids[:320], ids[320:].flip(0)))
    moved = fxopt.tune(tune.args[0], other, *tune.args[2:], **tune.keywords)
    assert moved.paths == recipe.paths and moved.notes["kl where chosen"] == recipe.notes["kl where chosen"]
    assert moved.notes["kl"] != recipe.notes["kl"]
    # Measured by itself, it is what that window gives.
    model = tune.args[0]
    tails = sparse_measuring.Tails(model, scoring.windows(None, ids, 64, whole=True)[-1:], 32)
    settings = {
        int(path.rpartition(".")[2]): dataclasses.replace(p, min_length=0) for path, p in recipe.paths.items()
    }  # fmt: skip
    assert tails.divergence(settings)["kl"] == pytest.approx(recipe.notes["kl"], abs=1e-6)


def test_a_choice_that_does_not_hold_elsewhere_is_told(searched, monkeypatch):
    tune, _ = searched
    told = iter([0.001, 0.2])

    def divergence(search, tails, settings, said):
        return 0.2 if said == "confirming" else next(told)

    monkeypatch.setattr(sparse_tuning, "MEASUREMENTS", 1)
    monkeypatch.setattr(sparse_measuring.Search, "divergence", divergence)
    with pytest.warns(UserWarning, match="0.00100 where it was made and 0.20000 on text that took no part"):
        assert tune().notes["kl"] == 0.2


@pytest.mark.parametrize("saved", [1, 2, 5, 6, 9, 13])
def test_killed_and_resumed_gives_the_same_recipe(searched, tmp_path, monkeypatch, saved):
    """After any window: of the calibration, of the kept mass, in the middle of a divergence and between two."""
    tune, ids = searched
    path = tmp_path / "search.safetensors"
    whole = tune(checkpoint=tmp_path / "whole.safetensors")
    count, save = 0, sparse_measuring.Search._save

    def dies(search):
        nonlocal count
        save(search)
        count += 1
        if count == saved:
            raise KeyboardInterrupt

    monkeypatch.setattr(sparse_measuring.Search, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(checkpoint=path)
    monkeypatch.setattr(sparse_measuring.Search, "_save", save)
    if saved > 5:  # a CPU's bandwidth is measured in each process: the resumed run must not measure another one
        monkeypatch.setattr(sparse_tuning, "_costs", None)
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
