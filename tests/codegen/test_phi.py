"""Where the unified maximum may stand."""

from __future__ import annotations

import math

import pytest
import torch

from fxopt.codegen.kernels.phi import certified_phi, fits, limits, newest_key_phi, place, qk_norm_bound

ALL = [torch.float16, torch.bfloat16, torch.float32]


def weights(scores: torch.Tensor, phi: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and denominator as a kernel forms them: exp in float32, rounded to `dtype`, small ones flushed."""
    p = torch.exp(scores.float() - phi)
    p = torch.where(p < 2.0**-126, 0.0, p)
    total = p.sum()
    return p.to(dtype).double() / total.double(), total


@pytest.mark.parametrize("dtype", ALL)
def test_inside_the_limits_the_weights_are_right_and_outside_they_are_not(dtype: torch.dtype) -> None:
    upper, lower = limits(dtype)
    torch.manual_seed(0)
    scores = torch.randn(4096).double()
    exact = torch.softmax(scores, 0)
    top, total = scores.max().item(), scores.exp().sum().log().item()
    # Differences of scores from a distant phi are themselves rounded: 77 * 2^-24 at the ends.
    error = max(torch.finfo(dtype).eps * 4, 1e-5)

    def off(phi: float) -> float:
        got, _ = weights(scores, phi, dtype)
        return (got - exact).abs().sum().item()

    assert off(top - upper + 0.01) < error
    assert off(total - math.log(lower) - 0.01) < error * (2 if dtype == torch.float16 else 1)
    # Far outside, everything overflows or underflows.
    assert not off(top - 89.0) < error
    assert not off(total + 110.0) < error


def test_limits_of_float16_are_its_own() -> None:
    assert limits(torch.float16).upper == pytest.approx(11.09, abs=0.01)
    assert limits(torch.bfloat16).upper == pytest.approx(88.72 - math.log(2**17), abs=0.01)
    assert limits(torch.bfloat16, value_max=1e6).upper == pytest.approx(
        88.72 - math.log(2**17) - math.log(1e6), abs=0.01
    )
    assert limits(torch.float16, value_max=1e6).upper == pytest.approx(11.09, abs=0.01)
    with pytest.raises(ValueError, match="float64"):
        limits(torch.float64)


@pytest.mark.parametrize(
    ("low", "high", "fitting"),
    [
        (-2.0, 6.5, {torch.float16, torch.bfloat16, torch.float32}),
        (-16.8, 6.5, {torch.bfloat16, torch.float32}),  # Llama-2-7B, if a row's maximum could lie that low
        (-10.5, 13.7, {torch.bfloat16, torch.float32}),  # ChatGLM2-6B
        (-50.0, 50.0, {torch.bfloat16, torch.float32}),
        (-496.8, 363.5, set()),  # OPT-6.7B
        (1.0, 0.0, set()),
        (0.0, math.inf, set()),
        (math.nan, 0.0, set()),
    ],
)
def test_ranges_that_fit(low: float, high: float, fitting: set[torch.dtype]) -> None:
    assert {dtype for dtype in ALL if fits(low, high, dtype)} == fitting


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("low", "high"), [(-2.0, 6.5), (3.0, 12.0), (-9.0, -1.0), (0.0, 0.0)])
def test_the_placed_phi_passes_the_guard_at_both_ends(low: float, high: float, dtype: torch.dtype) -> None:
    phi = place(low, high, dtype)
    upper, lower = limits(dtype)
    assert high - phi <= upper
    assert math.exp(low - phi) >= lower
    assert phi <= high


def test_a_range_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="use softmax='online'"):
        place(-496.8, 363.5, torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_soft_caps_are_certified(dtype: torch.dtype) -> None:
    assert certified_phi(50.0, dtype) == 0.0  # Gemma 2
    assert certified_phi(50.0, torch.float16) is None
    assert certified_phi(5.0, torch.float16) is not None
    assert certified_phi(200.0, dtype) is None
    upper, lower = limits(dtype)
    for cap in (30.0, 50.0, 59.0, 65.0):
        phi = certified_phi(cap, dtype)
        assert phi is not None
        assert cap - phi <= upper
        assert math.exp(-cap - phi) >= lower


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_bound_of_normalised_queries_and_keys_holds_and_is_reached(offset: float) -> None:
    torch.manual_seed(0)
    q_weight, k_weight = torch.rand(64) + 0.2, torch.rand(64) * 3
    bound = qk_norm_bound(q_weight, k_weight, head_dim=64, scale=64**-0.5, offset=offset)

    def normalise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (64,), weight + offset)

    q, k = normalise(torch.randn(500, 64), q_weight), normalise(torch.randn(500, 64), k_weight)
    assert (q @ k.T * 64**-0.5).abs().max() <= bound
    worst = torch.zeros(64)
    worst[q_weight.argmax()] = 1.0
    other = torch.zeros(64)
    other[k_weight.argmax()] = 1.0
    # A rotation may align the two largest channels: lengths alone reach the bound.
    reached = normalise(worst, q_weight).norm() * normalise(other, k_weight).norm() * 64**-0.5
    torch.testing.assert_close(reached, bound, rtol=1e-3, atol=0)


def test_the_bound_follows_the_weights() -> None:
    q_weight, k_weight = torch.ones(64), torch.ones(64)
    before = qk_norm_bound(q_weight, k_weight, head_dim=64, scale=0.125)
    q_weight.mul_(3)
    after = qk_norm_bound(q_weight, k_weight, head_dim=64, scale=0.125)
    torch.testing.assert_close(after, before * 3)
    assert before.item() == pytest.approx(8.0)
    scaled = qk_norm_bound(q_weight, k_weight, head_dim=64, scale=0.125, rotary_scale=1.2)
    torch.testing.assert_close(scaled, after * 1.44)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_newest_key_gives_each_row_its_own_phi(cap: float | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 3, 16), torch.randn(2, 2, 10, 16)
    phi = newest_key_phi(q, k[:, :, -3:], scale=0.25, soft_cap=cap)
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * 0.25
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    own = torch.stack([scores[:, :, t, 7 + t] for t in range(3)], -1)
    torch.testing.assert_close(phi, own)
    alone = newest_key_phi(q[1:, :3, 1:2], k[1:, :1, 8:9], scale=0.25, soft_cap=cap)
    assert torch.equal(alone, phi[1:, :3, 1:2])
    with pytest.raises(ValueError, match="do not divide"):
        newest_key_phi(q[:, :5], k[:, :, -3:], scale=1.0)
