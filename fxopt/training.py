"""Training helpers for models that will exit early or skip layers: plain PyTorch, no compiler in it.

Layer dropout and the early-exit loss follow LayerSkip (Elhoushi et al., arXiv 2404.16710): deeper layers are dropped
more often, and a loss at some exits each step teaches earlier layers to speak the language of the shared head.

    rates = layer_dropout(12, p_max=0.1)
    with dropped_layers(model.model.layers, rates, generator=generator):
        out = model(ids, output_hidden_states=True, use_cache=False)
    states = dict(enumerate(out.hidden_states))
    weights = exit_weights(rotating_exits(step, 12, every=4), layers=12)
    loss = early_exit_loss(states, head, labels, weights)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""The label that no loss is computed for, as in ``torch.nn.functional.cross_entropy``."""


def layer_dropout(layers: int, p_max: float = 0.1) -> list[float]:
    """Dropout rate of each layer: ``p_max * (exp(l ln2 / (L - 1)) - 1)``, 0 for the first and `p_max` for the last.

    Raises ValueError for a rate outside of [0, 1).
    """
    if not 0 <= p_max < 1:
        raise ValueError(f"p_max={p_max!r}: the rate of the deepest layer lies in [0, 1), for example 0.1.")
    if layers < 1:
        raise ValueError(f"layers={layers!r}: at least one layer.")
    if layers == 1:
        return [0.0]
    return [p_max * (math.exp(index * math.log(2) / (layers - 1)) - 1) for index in range(layers)]


def ramp(step: int, total: int, final: float) -> float:
    """LayerSkip's schedule over time for training from scratch: exponential from 0 at the first step to `final`."""
    if total <= 1:
        return final
    return final * (math.exp(min(max(step, 0), total - 1) * math.log(2) / (total - 1)) - 1)


@contextlib.contextmanager
def dropped_layers(
    layers: nn.ModuleList, rates: Sequence[float], *, generator: torch.Generator | None = None
) -> Iterator[frozenset[int]]:
    """Within the block, layers drawn by their rates return their first argument and compute nothing.

    One draw for the whole batch, so that the work is really saved. Yields the indices that are dropped. A layer that
    fills a KV cache must not be dropped: train with ``use_cache=False``.
    """
    if len(rates) != len(layers):
        raise ValueError(
            f"{len(rates)} rates for {len(layers)} layers; give one for each (layer_dropout(len(layers)))."
        )
    draws = torch.rand(len(layers), generator=generator).tolist()
    chosen = frozenset(index for index, rate in enumerate(rates) if draws[index] < rate)
    kept = {index: layers[index].__dict__.get("forward") for index in chosen}
    for index in chosen:
        object.__setattr__(layers[index], "forward", _identity)
    try:
        yield chosen
    finally:
        for index, forward in kept.items():
            if forward is None:
                object.__delattr__(layers[index], "forward")
            else:
                object.__setattr__(layers[index], "forward", forward)


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def exit_weights(exits: Sequence[int], layers: int, scale: float = 0.2) -> dict[int, float]:
    """Weight of the loss after n layers, growing with the sum of layers below (LayerSkip, section 4.2), summing to 1
    with the last layer's own. `scale` weighs the exits against the last layer.
    """
    for n in exits:
        if not 1 <= n < layers:
            raise ValueError(f"exit after {n} layers: counts run from 1 to {layers - 1}; the last layer is no exit.")
    raw = {n: scale * n * (n - 1) / 2 for n in exits}
    raw[layers] = float(layers - 1) + scale * (layers - 1) * (layers - 2) / 2
    total = sum(raw.values())
    return {n: weight / total for n, weight in raw.items()}


def rotating_exits(step: int, layers: int, every: int) -> tuple[int, ...]:
    """The rotational curriculum: each step trains the exits ``n = step + 1, step + 1 + every, ...`` (mod `every`)."""
    if every < 1:
        raise ValueError(f"every={every!r}: a distance of at least 1 layer between exits of one step.")
    return tuple(n for n in range(1, layers) if (n - 1) % every == step % every)


def gradual_exits(step: int, total: int, layers: int) -> tuple[int, ...]:
    """The gradual curriculum: exits are switched on from the last towards the first over half of the training."""
    if total < 1:
        raise ValueError(f"total={total!r}: the number of training steps.")
    count = min(layers - 1, int((layers - 1) * 2 * step / total) + 1)
    return tuple(range(layers - count, layers))


def early_exit_loss(
    states: Mapping[int, Tensor], head: Callable[[Tensor], Tensor], labels: Tensor, weights: Mapping[int, float]
) -> Tensor:
    """Weighted sum of next-token losses at several depths.

    Args:
        states: ``{layers that ran: hidden state [B, S, W]}``; the last layer's own among them.
        head: final norm and head, ``[B, S, W]`` to ``[B, S, V]``, the one the exits will use.
        labels: ``[B, S]``, shifted here; ``-100`` counts for nothing.
        weights: of each depth, as :func:`exit_weights` gives them.
    """
    missing = [n for n in weights if n not in states]
    if missing:
        raise ValueError(f"no state after {missing} layers; states has {sorted(states)}.")
    targets = labels[:, 1:].reshape(-1)
    total: Tensor | None = None
    for n, weight in weights.items():
        logits = head(states[n][:, :-1])
        part = weight * F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets, ignore_index=IGNORED)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("weights={}: at least one depth.")
    return total
