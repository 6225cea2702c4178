"""Solve the threshold of :class:`fxopt.EarlyExit` for a wanted agreement with the unmodified model.

CALM (Schuster et al., arXiv 2207.07061) calibrates its threshold on held-out text too, by hypothesis tests that bound
the risk; here the share of equal top-1 tokens is measured, on the text given and on no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt import scoring
from fxopt.meaning import reference
from fxopt.passes.early_exit import EarlyExit
from fxopt.passes.exit_reference import Scorer
from fxopt.passes.modules import module_stacks
from fxopt.passes.technique import SettingError
from fxopt.recipe import Recipe, fingerprint

ROWS = 8
"""Windows that are decoded at once."""
MEASUREMENTS = 8
"""Most decode runs for one threshold."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a threshold gave: share of equal top-1 tokens, and layers run by a row and step on average."""

    threshold: float
    agreement: float
    mean_depth: float


def wanted_agreement(goal: str | None) -> float:
    """The number in ``goal="agreement=0.97"``. Raises SettingError for anything else."""
    name, _, number = (goal or "").partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if name.strip() != "agreement" or not 0 < value < 1:
        raise SettingError(
            f"tune(goal={goal!r}): for EarlyExit the goal is the share of tokens that stay the unmodified model's, "
            "between 0 and 1, such as goal='agreement=0.97'."
        )
    return value


def solve(model: Any, cut: Sequence[scoring.Window], technique: EarlyExit, goal: float, *, show: bool = True) -> Recipe:
    """The recipe with the lowest threshold found that keeps `goal` on the windows of `cut`.

    States of the unmodified model give a first threshold. What an exit does to later tokens, through the rows it
    leaves in the caches, is not in them: decode runs of the reference measure it and correct the threshold.

    Raises SettingError for patience, whose threshold is a count.
    """
    if technique.confidence == "patience":
        raise SettingError(f"{technique}: the threshold of patience is a count of exits; tune solves for numbers.")
    technique.check(model)
    prompt = (len(cut[0].inputs) + 1) // 2  # as fxopt.evaluate cuts
    first = prompt - 1
    states = [exit_scores(model, window, technique, first) for window in cut]
    sure, right = torch.cat([s for s, _, _ in states]), torch.cat([r for _, r, _ in states])  # [N, exits]
    choices = [top for _, _, top in states]
    tried: list[Measured] = []
    low, high = 0.0, 1.0
    threshold = solve_static(sure, right, goal)
    for _ in scoring.progress(range(MEASUREMENTS), MEASUREMENTS, f"agreement {goal:g}", show):
        tried.append(measure(model, cut, dataclasses.replace(technique, threshold=threshold), choices, prompt))
        # Between the highest that fell short and the lowest that held, by ranks: confidences crowd near 1.
        if tried[-1].agreement >= goal:
            high = threshold
        else:
            low = threshold
        between = sure[(sure > low) & (sure < high)]
        if len(between) < 2:
            break
        threshold = float(between.quantile(0.5))
    held = [m for m in tried if m.agreement >= goal]
    best = min(held, key=lambda m: m.threshold) if held else Measured(1.0, 1.0, float(len(module_stacks(model)[-1])))
    return Recipe(
        (dataclasses.replace(technique, threshold=best.threshold),),
        data={
            "early_exit.tried": torch.tensor([dataclasses.astuple(m) for m in tried], dtype=torch.float64),
        },
        fingerprint=fingerprint(model),
        notes={"goal": goal, "agreement": best.agreement, "mean_depth": best.mean_depth, "tokens": len(sure)},
    )


def solve_static(sure: Tensor, right: Tensor, goal: float) -> float:
    """Lowest threshold above which the first exit that is sure is right for a share of `goal` of the tokens.

    sure: [N, exits] confidences, right: [N, exits] bool. No exit taken counts as right. 1.0 when none keeps the goal.
    """
    candidates = torch.cat((torch.zeros(1), sure.flatten().unique()))
    if len(candidates) > 512:
        candidates = candidates[torch.linspace(0, len(candidates) - 1, 512).long()]
    rows = torch.arange(len(sure))
    best = 1.0
    for threshold in reversed(candidates.tolist()):
        above = sure > threshold
        taken = above.int().argmax(-1)
        agreed = torch.where(above.any(-1), right[rows, taken], True).float().mean()
        if agreed < goal:
            break
        best = min(threshold, 1.0)
    return best


@torch.no_grad()
def exit_scores(model: Any, window: scoring.Window, technique: EarlyExit, first: int) -> tuple[Tensor, ...]:
    """From position `first` on: confidence ``[S, exits]`` of each exit, whether its choice is the full model's, and
    that choice ``[S]``.
    """
    stack = module_stacks(model)[-1]
    kept: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        return lambda _module, args, kwargs: kept.__setitem__(index, args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(keep(i), with_kwargs=True) for i, layer in enumerate(stack.layers)]
    try:
        ids = window.inputs[None].to(next(model.parameters()).device)
        top = type(model).forward(model, input_ids=ids, use_cache=False).logits[0, first:].argmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    scorer = Scorer(technique, model, stack, whole=False)
    sure, right = [], []
    for n in technique.layers:
        logits = scorer.logits(n, kept[n][:, first:])[0]
        sure.append(scorer.sure(n, kept[n][0, first:], kept[n - 1][0, first:], logits))
        right.append(logits.argmax(-1) == top)
    return torch.stack(sure, -1).float().cpu(), torch.stack(right, -1).cpu(), top


def measure(
    model: Any, cut: Sequence[scoring.Window], technique: EarlyExit, choices: Sequence[Tensor], prompt: int
) -> Measured:
    """Agreement and mean depth of the reference, token by token on a cache after a prompt of `prompt` tokens.

    Windows of one length are decoded as rows of a batch that exit each by itself, which changes no row.
    """
    meant: Any = reference(model, dataclasses.replace(technique, rows="each"))
    rows = max(1, ROWS)
    agreed = tokens = 0
    for start in range(0, len(cut), rows):
        logits = decode(meant, cut[start : start + rows], prompt)
        wanted = torch.stack(list(choices[start : start + rows])).to(logits.device)
        agreed += int((logits.argmax(-1) == wanted).sum())
        tokens += wanted.numel()
    return Measured(float(technique.threshold), agreed / tokens, mean_depth(meant))


def mean_depth(meant: Any) -> float:
    """Layers that a row ran on average, over all forward passes of a reference; the prompt counts as one."""
    depths = [n for rows in meant.exit_state.depths for n in rows]
    return sum(depths) / max(1, len(depths))


@torch.no_grad()
def decode(model: Any, cut: Sequence[scoring.Window], prompt: int) -> Tensor:
    """Logits ``[N, S - prompt + 1, V]`` of the last positions of windows of one length S, token by token on a cache
    after a prompt of `prompt` tokens."""
    ids = torch.stack([window.inputs for window in cut]).to(next(model.parameters()).device)
    out = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)
    found = [out.logits[:, -1]]
    for place in range(prompt, ids.shape[1]):
        out = model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)
