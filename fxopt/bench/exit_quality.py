"""``fxopt bench exit_quality``: what tuned exits of the shipped model cost in quality, and how deep they go.

Thresholds are solved by ``fxopt.tune`` on the first part of the held-out text and measured on the part behind it,
token by token on a cache: at batch 1, and at batch 8 where every row waits for the least sure one. No times: what they
cost is ``fxopt bench depth --technique early_exit``, which reads these thresholds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from fxopt import exit_tuning, scoring, tinylm
from fxopt.bench.harness import Result, environment, progress_bar
from fxopt.meaning import reference
from fxopt.passes.early_exit import EarlyExit

EXITS = (6, 8, 10)
GOALS = (0.99, 0.97, 0.90)
CONTEXT, PROMPT, ROWS = 256, 128, 8


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """A line for each confidence and goal; the first is the model without exits."""
    confidences, goals = (("margin",), (0.97,)) if quick else (("margin", "state"), GOALS)
    command = f"fxopt bench exit_quality{' --quick' if quick else ''} --device {device}"
    result = Result("exit_quality", command, environment(device))
    model, tokenizer = tinylm.load()
    model = model.to(device)
    cut = windows(tokenizer, quick)
    solved, measured = cut[: len(cut) // 2], cut[len(cut) // 2 :]
    with progress_bar("exit_quality", 1 + len(confidences) * len(goals)) as step:
        plain = exit_tuning.decode(model, measured, PROMPT)
        layers = model.config.num_hidden_layers
        result.figures.append(_line("no exits", None, None, None, 1.0, _bits(plain, measured), float(layers)))
        step()
        for confidence in confidences:
            for goal in goals:
                technique = EarlyExit(layers=EXITS, confidence=confidence, rows="each")
                recipe = exit_tuning.solve(model, solved, technique, goal, show=False)
                found: Any = recipe.techniques[0]
                line = _line(confidence, goal, found.threshold, recipe.notes["agreement"])
                for rows, name in (("each", "batch 1"), ("all", f"batch {len(measured)}")):
                    meant: Any = reference(model, dataclasses.replace(found, rows=rows))
                    logits = exit_tuning.decode(meant, measured, PROMPT)
                    agreed = float((logits.argmax(-1) == plain.argmax(-1)).float().mean())
                    line |= _quality(name, agreed, _bits(logits, measured), exit_tuning.mean_depth(meant))
                result.figures.append(line)
                step()
    result.figures[0] |= _quality(f"batch {len(measured)}", 1.0, _bits(plain, measured), float(layers))
    result.remarks.append(
        f"EarlyExit(layers={EXITS}), thresholds solved on {len(solved)} windows of {CONTEXT} tokens and measured on "
        f"the {len(measured)} behind them, token by token after a prompt of {PROMPT}; weights {weights(model)}"
    )
    return result


def windows(tokenizer: Any, quick: bool) -> list[scoring.Window]:
    """Windows of the held-out text, of one length."""
    cut = scoring.windows(tokenizer, scoring.read_text(tinylm.HELDOUT), CONTEXT, whole=True)
    return cut[: 2 if quick else 2 * ROWS]


def weights(model: Any) -> str:
    """A name for the weights of a model: figures measured on others are not of this one."""
    head = model.get_output_embeddings().weight.detach().float().cpu().contiguous()
    return hashlib.sha256(head.numpy().tobytes()).hexdigest()[:12]


def _line(
    confidence: str, goal: float | None, threshold: float | None, tuned: float | None, *batch_1: float
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "confidence": confidence, "goal": "" if goal is None else goal,
        "threshold": "" if threshold is None else threshold, "agreement, tuned on": "" if tuned is None else tuned,
    }  # fmt: skip
    return line | (_quality("batch 1", *batch_1) if batch_1 else {})


def _quality(name: str, agreement: float, bits: float, depth: float) -> dict[str, float]:
    return {f"agreement, {name}": agreement, f"bits per byte, {name}": bits, f"mean depth, {name}": depth}


def _bits(logits: torch.Tensor, cut: list[scoring.Window]) -> float:
    """Bits per byte of the tokens that were predicted one by one."""
    first = PROMPT - 1
    spent = sum(scoring.nll_bits(own, w.targets[first:].to(own.device)) for own, w in zip(logits, cut, strict=True))
    return spent / sum(int(w.sizes[first:].sum()) for w in cut)
