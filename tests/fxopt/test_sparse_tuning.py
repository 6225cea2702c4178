"""The search for method and budget by layer."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import sparse_tuning
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
    with pytest.raises(SettingError, match="1 window"):
        fxopt.tune(model, ids, asked, goal="kl<0.1", context=200, show=False)
