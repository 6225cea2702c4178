"""Where the unified maximum phi of asynchronous softmax may stand, and how it is chosen.

Softmax is unchanged when any number phi is subtracted instead of the row maximum; what limits phi is the range of the
probabilities' dtype. The kernels check each row after the fact (`limits`) and recompute the rows that do not pass, so a
bad phi costs time and never a result. All values here are in natural units of the scores, after scale and soft-cap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LN_FP16_MAX = math.log(65504.0)
LN_FP32_MAX = math.log(torch.finfo(torch.float32).max)
SUMMED_KEYS = 2**17
"""Keys of a row for which the guard leaves room."""


class Limits(NamedTuple):
    """The guard of one row."""

    upper: float
    """The row maximum may exceed phi by this much."""
    lower: float
    """The denominator, the sum of exp(score - phi), may not be smaller."""


def limits(dtype: torch.dtype, keys: int = SUMMED_KEYS, value_max: float = 1.0) -> Limits:
    """The guard for probabilities of `dtype`.

    Above, a single probability must fit the dtype, and the float32 sum over `keys` of probabilities times values up to
    `value_max` must stay finite: ln(max) - ln(keys) - ln(value_max). Below, what underflow takes from a row must stay
    small beside the row's total. bfloat16 and float32 lose probabilities under 2^-126: at most the rounding of the
    dtype, 2^-9 and 2^-23, of the total over `SUMMED_KEYS` keys. float16 rounds everything under 2^-14 to multiples of
    2^-24; an ordinary softmax has a total of at least 1 and the same rounding, the guard allows four times its error.
    """
    accumulated = LN_FP32_MAX - math.log(max(keys, 1)) - math.log(max(value_max, 1.0))
    if dtype == torch.float16:
        return Limits(min(LN_FP16_MAX, accumulated), 0.25)
    if dtype == torch.bfloat16:
        return Limits(accumulated, SUMMED_KEYS * 2.0**-126 * 2.0**9)
    if dtype == torch.float32:
        return Limits(accumulated, SUMMED_KEYS * 2.0**-126 * 2.0**23)
    raise ValueError(f"probabilities are float16, bfloat16 or float32, not {dtype}")


def fits(low: float, high: float, dtype: torch.dtype, keys: int = SUMMED_KEYS, value_max: float = 1.0) -> bool:
    """Whether one phi serves every row whose maximum lies in [low, high]; a planner refuses what does not fit.

    With float16 that is about 12 nats, with bfloat16 about 145. OPT-6.7B, with scores of -496.8 to 363.5, fits none.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        return False
    upper, lower = limits(dtype, keys, value_max)
    return high - low <= upper - math.log(lower)


def place(low: float, high: float, dtype: torch.dtype, keys: int = SUMMED_KEYS, value_max: float = 1.0) -> float:
    """The phi with equal room on both sides for row maxima in [low, high], and never above `high`.

    Raises:
        ValueError: the range fits no phi; see `fits`.
    """
    if not fits(low, high, dtype, keys, value_max):
        raise ValueError(
            f"row maxima from {low} to {high} fit no unified maximum for {dtype}; use softmax='online' for this layer"
        )
    upper, lower = limits(dtype, keys, value_max)
    return min(high, 0.5 * (high - upper + low - math.log(lower)))


def largest_certified(dtype: torch.dtype, keys: int = SUMMED_KEYS, value_max: float = 1.0) -> float:
    """The largest bound on |score| for which phi 0 is certain to pass the guard."""
    upper, lower = limits(dtype, keys, value_max)
    return min(upper, -math.log(lower))


def certified_phi(bound: float, dtype: torch.dtype, keys: int = SUMMED_KEYS, value_max: float = 1.0) -> float | None:
    """The phi for scores that provably lie in [-bound, bound] (a soft-cap), or None when they do not fit.

    It is 0 whenever 0 is as safe: soft-caps up to 69 with bfloat16 and 59 with float32. A phi of `bound` would not be
    safe, since rows near -bound would reach -2 bound.
    """
    if bound <= largest_certified(dtype, keys, value_max):
        return 0.0
    return place(-bound, bound, dtype, keys, value_max) if fits(-bound, bound, dtype, keys, value_max) else None


def qk_norm_bound(
    q_weight: Tensor, k_weight: Tensor, *, head_dim: int, scale: float, offset: float = 0.0, rotary_scale: float = 1.0
) -> Tensor:
    """The largest |score| that RMS-normalised queries and keys can have: [], float32, computed where the weights are.

    A normalised vector has at most length sqrt(D), its weight stretches it by at most max|g|, rotary embedding keeps
    lengths: |score| <= scale * D * max|g_q| * max|g_k|. The bound is reached, but trained weights may make it loose.

    Args:
        q_weight, k_weight: the norms' weights over the head's channels, as they are now; [D] or [H, D].
        offset: added to the weights (1.0 for norms that multiply by 1 + w, as in Gemma).
        rotary_scale: what the rotary embedding multiplies queries and keys with (YaRN's attention factor).
    """
    q_max = (q_weight.detach().float() + offset).abs().amax()
    k_max = (k_weight.detach().float() + offset).abs().amax()
    return q_max * k_max * (abs(scale) * head_dim * rotary_scale**2)


def newest_key_phi(q: Tensor, newest: Tensor, *, scale: float, soft_cap: float | None = None) -> Tensor:
    """A phi per query row from this step's own inputs: the score of the newest key, [B, Hq, T], float32.

    Every query token sees its own key, so its row maximum is at least this: a row can only fail upwards, with 77 nats
    of room in bfloat16 and float32 (11 in float16). It depends on the row alone, which keeps results independent of
    the batch. A bias is not taken into account; add what the row's own key gets.

    Args:
        q: [B, Hq, T, D]. newest: [B, Hkv, T, D], the keys of the new tokens, as they enter the cache.
    """
    heads, kv_heads = q.shape[1], newest.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide into {kv_heads} KV heads")
    grouped = q.float().unflatten(1, (kv_heads, heads // kv_heads))  # [B, Hkv, G, T, D]
    scores = (grouped * newest.float().unsqueeze(2)).sum(-1).flatten(1, 2) * scale
    return scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
