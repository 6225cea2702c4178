"""``fxopt bench sparse_quality``: what each method of sparse attention costs the shipped model at context 4096.

Bits per byte and KL divergence of the last tokens of held-out windows, decoded at budgets from 1/32 to 1/2 of the cache
after a dense prompt; and the needle task, whose question and answer are decoded. Label channels are calibrated on
another part of the text. The first two layers stay dense, as in the papers of Quest and Double Sparsity. Everything is
eager PyTorch: quality, no time.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt import scoring, tinylm
from fxopt.bench.harness import Result, environment, progress_bar
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.sparse_attention.calibration import DENSE_LAYERS, heaviest
from fxopt.passes.sparse_attention.double_sparsity import default_channels
from fxopt.passes.sparse_attention.one_shot import OneShot, channel_sums
from fxopt.sparse_measuring import Tails
from fxopt.sparse_tuning import BUDGETS, METHODS
from fxopt.tinylm.needle import Needle, needle_task

CONTEXT, SCORED, WINDOWS, QUESTIONS = 4096, 256, 4, 24
ASKED = 8
"""Last tokens of a needle prompt that are decoded: the question is among them."""


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """All methods and budgets; ``quick``: context 512, two windows, few questions."""
    context, scored, windows, questions = (512, 64, 2, 4) if quick else (CONTEXT, SCORED, WINDOWS, QUESTIONS)
    command = f"fxopt bench sparse_quality{' --quick' if quick else ''} --device {device}"
    result = Result("sparse_quality", command, environment(device))
    model, tokenizer = tinylm.load()
    model.to(device)
    text = tinylm.heldout()
    cut = scoring.windows(tokenizer, text, context, whole=True)
    held_out = [cut[1 + i * (len(cut) - 1) // windows] for i in range(windows)]
    sums = channel_sums(model, [cut[0].inputs])
    tails = Tails(model, held_out, context - scored)
    dense = tails.divergence({})
    asked = list(needle_task(tokenizer, text, context, questions))
    with progress_bar("sparse quality", len(METHODS) * len(BUDGETS) + len(asked)) as step:
        answered = Needles(model, asked)
        rows = [_row("dense", 1.0, dense, answered.share({}))]
        for method in METHODS:
            for budget in BUDGETS:
                settings = {n: setting(method, budget, found) for n, found in sums.items() if n >= DENSE_LAYERS}
                rows.append(_row(method, budget, tails.divergence(settings), answered.share(settings)))
                step()
    result.figures = rows
    result.remarks.append(
        f"context {context}, {windows} windows of {scored} decoded tokens, first two layers dense; dense attention "
        f"answers {answered.right} of {len(asked)} needle questions, and kept are shares of those"
    )
    return result


def setting(method: str, budget: float, importance: torch.Tensor) -> SparseAttention:
    """One method at one budget, from the first filled position on; ``importance: [Hkv, D]`` for the label channels."""
    channels = heaviest(importance, default_channels(importance.shape[1])) if method == "double_sparsity" else None
    return SparseAttention(method=method, budget=budget, min_length=0, channels=channels)


class Needles:
    """Needle questions whose prompts are on caches; the last :data:`ASKED` tokens and the answer are decoded."""

    def __init__(self, model: Any, asked: list[Needle]) -> None:
        self.tails = []
        for question in asked:
            ids = torch.tensor([*question.input_ids, *question.answer_ids])
            window = scoring.Window(ids[:-1], ids[1:], torch.zeros_like(ids[1:]))
            self.tails.append((Tails(model, [window], len(question.input_ids) - ASKED), len(question.answer_ids)))
        known = [self._right(tails, answer, {}) for tails, answer in self.tails]
        self.tails = [tail for tail, right in zip(self.tails, known, strict=True) if right]
        self.right = len(self.tails)

    def share(self, settings: dict[int, SparseAttention]) -> float | None:
        """Of the questions that dense attention answers, those that are answered with these settings."""
        if not self.tails:
            return None
        return sum(self._right(tails, answer, settings) for tails, answer in self.tails) / len(self.tails)

    @staticmethod
    def _right(tails: Tails, answer: int, settings: dict[int, SparseAttention]) -> bool:
        logits = tails.run(0, OneShot(settings, tails.prompt) if settings else None)[-answer:]
        return bool((logits.argmax(-1).cpu() == tails.windows[0].targets[-answer:]).all())


def _row(method: str, budget: float, scores: dict[str, float | None], needles: float | None) -> dict[str, Any]:
    """A line of the table; ``needles``: of the questions that dense attention answers, those still answered."""
    return {
        "method": method, "budget": "all" if budget == 1 else f"1/{round(1 / budget)}",
        "bits per byte": round(scores["bits_per_byte"] or 0.0, 4), "KL, nats a token": round(scores["kl"] or 0.0, 5),
        "top-1 kept": round(scores["agreement"] or 0.0, 4),
        "needles kept": None if needles is None else round(needles, 3),
    }  # fmt: skip
