"""The training helpers: schedules against their formulas, dropout that drops, a loss that equals the plain one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fxopt import training
from fxopt.testing import Handwritten


def test_layer_dropout_follows_the_formula():
    rates = training.layer_dropout(5, 0.2)
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[2] == pytest.approx(0.2 * (math.exp(2 * math.log(2) / 4) - 1))
    assert training.layer_dropout(1) == [0.0]
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        training.layer_dropout(4, 1.0)


def test_dropped_layers_do_not_run_and_come_back():
    model = Handwritten(layers=4)
    ids = torch.randint(0, 128, (2, 7))
    before = model(ids)
    with training.dropped_layers(model.layers, [0.0, 1.0, 0.0, 1.0]) as dropped:
        during = model(ids)
    shorter = Handwritten(layers=4)
    shorter.load_state_dict(model.state_dict())
    shorter.layers = torch.nn.ModuleList([shorter.layers[0], shorter.layers[2]])
    assert dropped == {1, 3}
    assert torch.equal(during, shorter(ids))
    assert torch.equal(model(ids), before)


def test_dropout_rate_over_many_draws_and_repeats_with_the_seed():
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    counts = [0, 0]
    for _ in range(2000):
        with training.dropped_layers(layers, [0.25, 0.5], generator=generator) as dropped:
            for index in dropped:
                counts[index] += 1
    for count, rate in zip(counts, (0.25, 0.5), strict=True):
        assert abs(count - 2000 * rate) < 4 * math.sqrt(2000 * rate * (1 - rate))
    draws = []
    for _ in range(2):
        with training.dropped_layers(layers, [0.5, 0.5], generator=torch.Generator().manual_seed(7)) as dropped:
            draws.append(dropped)
    assert draws[0] == draws[1]


def test_loss_of_one_depth_is_the_plain_loss():
    head = torch.nn.Linear(8, 11)
    states = {1: torch.randn(2, 5, 8), 3: torch.randn(2, 5, 8)}
    labels = torch.randint(0, 11, (2, 5))
    labels[0, 3] = training.IGNORED
    plain = {n: F.cross_entropy(head(s)[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1)) for n, s in states.items()}
    assert torch.allclose(training.early_exit_loss(states, head, labels, {3: 1.0}), plain[3])
    both = training.early_exit_loss(states, head, labels, {1: 0.25, 3: 0.75})
    assert torch.allclose(both, 0.25 * plain[1] + 0.75 * plain[3])
    with pytest.raises(ValueError, match="no state after"):
        training.early_exit_loss(states, head, labels, {2: 1.0})


def test_exit_weights_and_curricula():
    weights = training.exit_weights((2, 4), 6)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights[2] < weights[4] < weights[6]
    with pytest.raises(ValueError, match="no exit"):
        training.exit_weights((6,), 6)
    seen = {n for step in range(3) for n in training.rotating_exits(step, 8, 3)}
    assert seen == set(range(1, 8))
    assert training.gradual_exits(0, 100, 8) == (7,)
    assert training.gradual_exits(60, 100, 8) == tuple(range(1, 8))
    assert training.ramp(0, 10, 0.1) == 0
    assert training.ramp(9, 10, 0.1) == pytest.approx(0.1)
