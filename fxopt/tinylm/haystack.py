"""Training batches that ask many needle questions of one long text, at the price of a short one.

A needle at 4,096 tokens gives one answer to learn from for the most expensive forward there is. Here the text is a
row of windows, each causal in itself, and a number of short tails stand side by side behind them: every tail attends
to all windows and to itself, ends with a question of its own, and mostly sees no needle but the one it is asked for.
So one pass over the text carries as many single-needle questions as it has tails. The windows may leave gaps in the
positions (after PoSE, arXiv 2309.10400), so that half of the text shows all of the distances; with one window the text
is an ordinary long context, with all of its distracting keys.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.tinylm.needle import ids_of, pairs_of

SINK = 4
"""Tokens at the start of a later window that tails do not see: a real context has one start, where heads with nothing
to look for rest."""


@dataclass(frozen=True)
class Batch:
    """What one training step computes: inputs, targets and weights [B, T] of the predictions, positions [T].

    With `mask` [t, T] (true: seen) B is 1, the first T - t places are `windows` causal windows of equal length, and the
    last t places see what the mask says.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    windows: int = 1
    mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of a window."""
        text = self.inputs.shape[1] - (0 if self.mask is None else self.mask.shape[0])
        return text // self.windows


def spread(windows: int, slots: int, rng: random.Random) -> list[int]:
    """Which `windows` of `slots` stretches of the context are computed: the last one, where the tails begin, and of the
    others as many from the far half as from the near half, or one more.

    Raises ValueError when there are fewer slots than windows.
    """
    if not 1 <= windows <= slots:
        raise ValueError(f"{windows} windows in a context of {slots}")
    far = min(windows // 2, slots // 2)
    half = slots // 2
    return sorted([*rng.sample(range(half), far), *rng.sample(range(half, slots - 1), windows - 1 - far), slots - 1])


def haystack(
    tokenizer: Any,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    tails: int,
    tail: int,
    answer_weight: float,
    alone: float,
    rng: random.Random,
) -> Batch:
    """`tails` questions of `tail` tokens behind the windows `texts`, each of length + 1 ids, at positions from
    `starts` on.

    As many needles as questions are spread evenly over the windows, and each is asked for once. A share `alone` of the
    tails sees no other needle. Predictions inside a needle line do not count (the model is not to write such lines by
    itself), those of an answer count `answer_weight` times.

    Raises ValueError when the tails do not divide evenly among the windows, or are too short for a question.
    """
    windows, length = len(texts), len(texts[0]) - 1
    if tails % windows:
        raise ValueError(f"{tails} tails for {windows} windows; the number of tails must be a multiple of the windows")
    pairs = pairs_of(rng, tails)
    inputs: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    spans: list[tuple[int, int]] = []  # of each needle line, in the row of inputs
    rest: list[int] = []
    for text, first in zip(texts, range(0, tails, tails // windows), strict=True):
        lines = [ids_of(tokenizer, f"\nKEY {key} {value}\n") for key, value in pairs[first : first + tails // windows]]
        room = length - sum(map(len, lines))
        insert = sorted(rng.randrange(room) for _ in lines)
        ids: list[int] = []
        last = 0
        counts = [1.0] * length
        for place, line in zip(insert, lines, strict=True):
            ids += text[last:place]
            start, last = len(ids), place
            ids += line
            spans.append((len(inputs) + start, len(inputs) + len(ids)))
            counts[max(0, start - 1) : len(ids) - 1] = [0.0] * (len(ids) - max(1, start))
        ids += text[last:]
        inputs += ids[:length]
        targets += ids[1 : length + 1]
        weights += counts
        rest = ids[length:]  # what the lines have pushed out goes on behind the last window
    extent = len(inputs)
    mask = torch.zeros(tails * tail, extent + tails * tail, dtype=torch.bool)
    for index, (key, value) in enumerate(pairs):
        question, answer = ids_of(tokenizer, f"\nKEY {key}"), ids_of(tokenizer, f" {value}")
        spare = tail + 1 - len(question) - len(answer)
        if spare < 0:
            raise ValueError(f"a question has {len(question) + len(answer)} tokens and a tail only {tail}")
        lead = rest[: rng.randrange(min(spare, len(rest)) + 1)]
        ids = lead + question + answer
        padded = ids + [0] * (tail + 1 - len(ids))
        inputs += padded[:tail]
        targets += padded[1:]
        asked = range(len(ids) - len(answer) - 1, len(ids) - 1)
        weights += [answer_weight if place in asked else 0.0 for place in range(tail)]
        rows = slice(index * tail, (index + 1) * tail)
        mask[rows, :extent] = True
        if rng.random() < alone:
            for other, (start, stop) in enumerate(spans):
                if other != index:
                    mask[rows, start:stop] = False
        mask[rows, extent + rows.start : extent + rows.stop] = torch.ones(tail, tail, dtype=torch.bool).tril()
    for start in range(length, extent, length):
        mask[:, start : start + SINK] = False
    places = [torch.arange(start, start + length) for start in starts]
    positions = torch.cat([*places, starts[-1] + length + torch.arange(tail).repeat(tails)])
    return Batch(torch.tensor([inputs]), torch.tensor([targets]), torch.tensor([weights]), positions, windows, mask)
