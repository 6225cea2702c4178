"""What the training of the small model reads, step by step: batches as a recipe wants them at each moment."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from fxopt.tinylm.haystack import Batch, haystack, spread
from fxopt.tinylm.needle import planted
from fxopt.tinylm.training import Recipe, Schedule


def at(schedule: Schedule, progress: float) -> Any:
    """The value of the last entry whose fraction has been reached."""
    return [value for fraction, value in schedule if progress >= fraction][-1]


class Feeder:
    """Batches: windows of the stream in a shuffled order that visits each once an epoch, and planted sequences."""

    def __init__(self, recipe: Recipe, tokenizer: Any, stream: np.ndarray) -> None:
        self.recipe, self.tokenizer, self.stream = recipe, tokenizer, stream
        self.unit = min(512, recipe.contexts[-1][1])
        self.units = (len(stream) - 1) // self.unit
        self.cursor = 0

    def window(self, length: int, rng: random.Random) -> np.ndarray:
        """length + 1 ids."""
        if length > self.unit:  # long windows are few: take them anywhere, the one of four with the fewest file ends
            starts = [rng.randrange(len(self.stream) - length - 1) for _ in range(4)]
            return min((self.stream[s : s + length + 1] for s in starts), key=lambda w: int((w == 0).sum()))
        split = self.unit // length
        epoch, place = divmod(self.cursor // split, self.units)
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(self.units)
        start = int(order[place]) * self.unit + (self.cursor % split) * length
        self.cursor += 1
        return self.stream[start : start + length + 1]

    def batch(self, step: int, progress: float) -> Batch:
        """The batch of one step."""
        recipe = self.recipe
        rng = random.Random(recipe.seed * 1_000_003 + step)
        if recipe.tails:
            length = recipe.long if step % recipe.long_every == 0 else at(recipe.contexts, progress)
            texts = [self.window(length, rng).tolist() for _ in range(max(1, recipe.tokens // length))]
            starts = [slot * length for slot in spread(len(texts), recipe.long // length, rng)]
            return haystack(
                self.tokenizer, texts, starts, recipe.tails, recipe.tail, recipe.answer_weight, recipe.alone, rng
            )
        length, share, spans = at(recipe.contexts, progress), at(recipe.planted, progress), 1 / 3
        if progress >= recipe.contexts[-1][0]:
            share, spans = 0.9, 0.1
        elif progress >= recipe.long_from and step % recipe.long_every == 0:
            length, share = recipe.long, max(share, recipe.long_planted)
        rows: list[np.ndarray] = []
        scored: list[np.ndarray] = []
        for _ in range(max(1, recipe.tokens // length)):
            ids = self.window(length, rng).astype(np.int64)
            counts = np.ones(length, dtype=np.float32)
            if rng.random() < share:
                ids = np.array(planted(self.tokenizer, ids.tolist(), length + 1, rng, recipe.density, spans))
            elif rng.random() < at(recipe.repeated, progress) and (rows or recipe.tokens <= length):
                period = rng.randrange(16, rng.choice((64, length // 4, length // 2)) + 1)
                once = ids[:period].copy()
                np.random.default_rng((recipe.seed, step, len(rows))).shuffle(once)
                ids = np.resize(once, length + 1)
                counts[: period - 1] = 0.0
            rows.append(ids)
            scored.append(counts)
        batch, positions = torch.from_numpy(np.stack(rows)), torch.arange(length)
        if rng.random() < at(recipe.gap, progress):
            cut = rng.randrange(length // 8, length)
            positions[cut:] += rng.randrange(recipe.reach - length + 1)
        return Batch(batch[:, :-1], batch[:, 1:], torch.from_numpy(np.stack(scored)), positions)
