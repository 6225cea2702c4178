"""Choose method and budget of :class:`fxopt.SparseAttention` for each layer, so that a divergence is kept.

On one part of a text the label channels are calibrated; on another every candidate is measured in every layer by the
attention mass that it keeps. A bound on the mass that may be lost gives each layer the candidate that is fastest within
it (by the roofline of the device). The largest bound whose recipe as a whole keeps the goal, measured as KL divergence
to the unmodified model, is found by bisection. What the recipe records is measured on a third part that chose nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt import scoring
from fxopt.codegen import roofline
from fxopt.inspection.behaviour import Picture
from fxopt.passes.modules import module_stacks
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.sparse_attention.calibration import heaviest
from fxopt.passes.sparse_attention.double_sparsity import default_channels
from fxopt.passes.sparse_attention.one_shot import HeadSums
from fxopt.passes.technique import SettingError
from fxopt.recipe import Recipe, fingerprint
from fxopt.sparse_measuring import Search, Tails

BUDGETS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
METHODS = ("sink_window", "pages", "double_sparsity")
MEASUREMENTS = 7
"""Whole recipes whose divergence is measured."""
SCORED = 512
"""Last tokens of each window that are decoded and scored; what stands before them is their prompt."""


def wanted_divergence(goal: str | None) -> float:
    """The number in ``goal="kl<0.01"``, in nats a token. Raises SettingError for anything else."""
    found = re.fullmatch(r"\s*kl\s*(?:<=?|=)\s*([0-9.eE+-]+)\s*", goal or "")
    try:
        value = float(found[1]) if found else -1.0
    except ValueError:
        value = -1.0
    if not value > 0:
        raise SettingError(
            f"tune(goal={goal!r}): for SparseAttention the goal is the largest KL divergence to the unmodified model, "
            "in nats a token, such as goal='kl<0.01'."
        )
    return value


@dataclass(frozen=True)
class Choice:
    """What was chosen for one layer, and what it was measured to keep; None: dense."""

    path: str
    setting: SparseAttention | None
    density: Tensor
    """[Hkv]: share of the positions that is read."""
    mass: Tensor
    """[Hkv]: attention weight of what is read."""
    seconds: float
    """Of one decode step of this attention, by the roofline."""

    def __str__(self) -> str:
        name = "dense" if self.setting is None else f"{self.setting.method} {_share(self.setting.budget)}"
        return f"{self.path:<28} {name:<24} {float(self.density.mean()):>7.3f} {float(self.mass.mean()):>9.4f}"


def solve(
    model: Any,
    cut: Sequence[scoring.Window],
    technique: SparseAttention,
    goal: float,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> Recipe:
    """The fastest recipe found that keeps the divergence under `goal`.

    The first quarter of `cut` calibrates, the middle chooses, the last quarter says what the choice gives on a text
    that took no part in it; a warning where that is not under `goal`.

    ``technique``: sinks, layers, channels (how many) and min_length are taken from it; method and budget are found.
    ``checkpoint``: a file that is written after each window; a search that was interrupted goes on from it.
    Raises SettingError for fewer than three windows, where even the largest budget does not keep the goal, and for the
    checkpoint of another search.
    """
    if len(cut) < 3:
        raise SettingError(
            f"tune(goal='kl<{goal:g}'): {len(cut)} windows; one to calibrate on, one to choose by and one to confirm "
            "the choice on are needed: give a longer text, a smaller context=, or a larger limit=."
        )
    technique.check(model)
    quarter = max(1, len(cut) // 4)
    known, deciding, last = cut[:quarter], cut[quarter:-quarter], cut[-quarter:]
    search = Search(model, scoring.digest(cut, technique.to_dict(), goal, BUDGETS, METHODS), checkpoint, show)
    stack = module_stacks(model)[0]
    names = {id(module): name for name, module in model.named_modules()}
    paths = {i: names[id(stack.layers[i])] for i in sorted(technique.chosen(len(stack)))}
    search.calibrate(known)
    options = {n: _candidates(technique, search.importance[n]) for n in paths if n in search.importance}
    tails = Tails(model, deciding, _prompt(cut))
    search.watch(tails, options)
    costs = search.costs = search.costs or _costs(model, options, len(cut[0].inputs))
    losses = sorted({round(1 - float(s.kept_mass.mean()), 6) for s in search.sums.values()})
    low, high = 0, len(losses) - 1  # indices of bounds; the first keeps most
    best: tuple[dict[int, int], float] | None = None
    least = math.inf
    for number in range(MEASUREMENTS):
        if low > high:
            break
        middle = (low + high) // 2 if number else min(high, len(losses) // 4)
        picked = pick(search.sums, costs, losses[middle])
        reached = 0.0
        if picked:
            settings = {layer: options[layer][n] for layer, n in picked.items()}
            reached = search.divergence(tails, settings, f"kl < {goal:g}: {number + 1} of {MEASUREMENTS}")
            least = min(least, reached)
        if reached < goal:
            low, best = middle + 1, (picked, reached)
        else:
            high = middle - 1
    if best is None or not best[0]:
        raise SettingError(
            f"tune(goal='kl<{goal:g}'): no choice of methods and budgets keeps it on this text (closest: {least:.4f}). "
            "Ask for a larger divergence."
        )
    picked, reached = best
    chosen = [
        Choice(
            paths[layer], options[layer][picked[layer]] if layer in picked else None,
            *_shares(search.sums, layer, picked.get(layer)), costs[layer][picked.get(layer, -1)],
        )
        for layer in options
    ]  # fmt: skip
    settings = {layer: options[layer][n] for layer, n in picked.items()}
    confirmed = search.divergence(Tails(model, last, tails.prompt), settings, "confirming")
    if not confirmed < goal:
        warnings.warn(
            f"tune(goal='kl<{goal:g}'): the choice gives {reached:.5f} where it was made and {confirmed:.5f} on text "
            "that took no part in it. Ask for a smaller divergence, or give more text.",
            stacklevel=2,
        )
    numbers = {"kl": confirmed, "kl where chosen": reached}
    return _recipe(model, technique, chosen, numbers, goal, sum(c[-1] for c in costs.values()), len(last))


def pick(
    measured: Mapping[tuple[int, int], HeadSums], costs: Mapping[int, Sequence[float]], bound: float
) -> dict[int, int]:
    """For each layer the number of the cheapest candidate that loses at most `bound` of the mass; dense ones left out.

    ``costs``: for each layer seconds by candidate, and of dense attention last.
    """
    picked = {}
    for layer, seconds in costs.items():
        fit = [
            number for number in range(len(seconds) - 1)
            if 1 - float(measured[layer, number].kept_mass.mean()) <= bound and seconds[number] < seconds[-1]
        ]  # fmt: skip
        if fit:
            picked[layer] = min(fit, key=lambda n: (seconds[n], -float(measured[layer, n].kept_mass.mean())))
    return picked


def report_lines(recipe: Recipe) -> list[str]:
    """What :func:`solve` chose, with density, kept mass and their maps; empty for any other recipe."""
    if "report" not in recipe.notes:
        return []
    notes = recipe.notes
    said = (
        f"{notes['goal']}: KL {notes['kl']:.5f} on {notes['windows']} windows that took no part in the choice, "
        f"{notes['kl where chosen']:.5f} where it was made; attention of a decode step "
        f"{notes['modelled speedup of attention']}x by the roofline"
    )
    return [*notes["report"], said, *(line for picture in maps(recipe) for line in picture.text().splitlines())]


def maps(recipe: Recipe) -> list[Picture]:
    """Density and kept mass by layer (rows) and KV head (columns) of a recipe that :func:`solve` made."""
    found = []
    for name, title in (("density", "positions read"), ("kept_mass", "attention mass kept")):
        values = recipe.data.get(f"sparse_attention.{name}")
        if values is not None:
            rows = [str(path) for path in recipe.notes["layers"]]
            columns = [f"KV head {i}" for i in range(values.shape[1])]
            found.append(Picture("map", title, rows, columns, [[round(v, 4) for v in row] for row in values.tolist()]))
    return found


def _prompt(cut: Sequence[scoring.Window]) -> int:
    tokens = min(len(w.inputs) for w in cut)
    return tokens - min(SCORED, tokens // 2)


def _candidates(technique: SparseAttention, importance: Tensor) -> list[SparseAttention]:
    """All methods and budgets for one layer; what leaves nothing to choose is left out."""
    count = technique.channels if isinstance(technique.channels, int) else default_channels(importance.shape[1])
    channels = heaviest(importance, count)
    found = []
    for method in METHODS:
        for budget in BUDGETS:
            own = {"channels": channels} if method == "double_sparsity" else {"channels": None}
            tau = None if method == "sink_window" else technique.tau
            found.append(
                dataclasses.replace(
                    technique, method=method, budget=budget, window=None, layers=None, min_length=0, tau=tau, **own
                )
            )
    return found


def _costs(model: Any, options: Mapping[int, Sequence[SparseAttention]], length: int) -> dict[int, list[float]]:
    """Seconds of each candidate by the roofline of the model's device, and of dense attention last."""
    parameter = next(model.parameters())
    device, dtype = roofline.current_device(parameter.device), str(parameter.dtype).removeprefix("torch.")
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = {"B": 1, "L": length, "H": heads, "G": kv_heads, "D": width}

    def seconds(cost: roofline.Cost) -> float:
        flops, moved = cost.at(**{s: v for s, v in sizes.items()})
        return roofline.estimate(flops, moved, device, dtype if dtype in device.flops else "float32")

    size = parameter.element_size()
    dense = seconds(roofline.attention_decode(size))
    found = {}
    for layer, settings in options.items():
        found[layer] = [
            seconds(roofline.attention_chosen(size, s.budget * length, s.chosen_by.state_elements(s, width)))  # type: ignore[operator]
            for s in settings
        ] + [dense]
    return found


def _shares(measured: Mapping[tuple[int, int], HeadSums], layer: int, number: int | None) -> tuple[Tensor, Tensor]:
    if number is None:
        whole = torch.ones_like(measured[layer, 0].read)
        return whole, whole
    return measured[layer, number].density, measured[layer, number].kept_mass


def _recipe(
    model: nn.Module, technique: SparseAttention, chosen: Sequence[Choice], measured: Mapping[str, float],
    goal: float, dense: float, windows: int,
) -> Recipe:  # fmt: skip
    paths = {
        c.path: dataclasses.replace(c.setting, min_length=technique.min_length)
        for c in chosen if c.setting is not None
    }  # fmt: skip
    data = {
        "sparse_attention.density": torch.stack([c.density for c in chosen]),
        "sparse_attention.kept_mass": torch.stack([c.mass for c in chosen]),
    }
    faster = dense / sum(c.seconds for c in chosen)
    notes = {
        "goal": f"kl<{goal:g}", "windows": windows, **{name: round(kl, 6) for name, kl in measured.items()},
        "modelled speedup of attention": round(faster, 2),
        "layers": [c.path for c in chosen],
        "report": [f"{'layer':<28} {'chosen':<24} {'density':>7} {'kept mass':>9}", *map(str, chosen)],
    }  # fmt: skip
    return Recipe(paths=dict(paths), data=data, fingerprint=fingerprint(model), notes=notes)


def _share(budget: float | int | None) -> str:
    return f"1/{round(1 / budget)}" if isinstance(budget, float) else str(budget)
