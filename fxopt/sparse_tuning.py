"""Choose method and budget of :class:`fxopt.SparseAttention` for each layer, so that a divergence is kept.

On one part of a text the label channels are calibrated. On another every candidate is measured alone in its layer, by
the KL divergence to the unmodified model. Small divergences of layers add up, so that these numbers give recipes from
gentle to fast, see :func:`family`; the fastest of them that keeps the goal as a whole is found by bisection. What the
recipe records is measured on a third part that chose nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt import scoring, sparse_costs
from fxopt.inspection.behaviour import Picture
from fxopt.passes.modules import module_stacks
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.sparse_attention.calibration import DENSE_LAYERS, heaviest
from fxopt.passes.sparse_attention.double_sparsity import default_channels
from fxopt.passes.sparse_attention.one_shot import HeadSums
from fxopt.passes.technique import SettingError
from fxopt.recipe import Recipe, fingerprint
from fxopt.sparse_measuring import Search, Tails

BUDGETS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
METHODS = ("sink_window", "pages", "double_sparsity")
ALONE = 2
"""Windows on which a candidate is measured alone in its layer: enough to rank, a recipe is judged as a whole."""
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
    """Of one decode step of this attention."""

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

    Of every four windows of `cut` the first calibrates, the second and the fourth choose: a recipe keeps `goal` where
    its mean over them plus one standard error is under it. The third says what the choice gives on a text that took no
    part in it; a warning where that is not under `goal`.

    ``technique``: sinks, layers, channels (how many) and min_length are taken from it; method and budget are found.
    ``checkpoint``: a file that is written after each window; a search that was interrupted goes on from it.
    Raises SettingError for fewer than three windows, where nothing that is faster keeps the goal, and for the
    checkpoint of another search.
    """
    if len(cut) < 3:
        raise SettingError(
            f"tune(goal='kl<{goal:g}'): {len(cut)} windows; one to calibrate on, one to choose by and one to confirm "
            "the choice on are needed: give a longer text, a smaller context=, or a larger limit=."
        )
    technique.check(model)
    # In turn: a text that changes on its way is in all three parts.
    known, deciding, confirming = cut[::4], cut[1::2], cut[2::4]
    asked = scoring.digest(cut, technique.to_dict(), goal, BUDGETS, METHODS, ALONE)
    search = Search(model, asked, checkpoint, show)
    stack = module_stacks(model)[0]
    names = {id(module): name for name, module in model.named_modules()}
    paths = {i: names[id(stack.layers[i])] for i in sorted(technique.chosen(len(stack)))}
    search.calibrate(known)
    options = {n: _candidates(technique, search.importance[n]) for n in paths if n in search.importance}
    if not search.costs:
        search.costs, search.costed = sparse_costs.costs(model, options, len(cut[0].inputs), show)
    tails = Tails(model, deciding, _prompt(cut))
    lost = _alone(search, tails, options, goal)
    alone = search.asked_for
    picked, kls = _fastest(search, tails, options, family(search.costs, lost), goal)
    if not picked:
        tried = search.measured[alone:] or search.measured
        least = min((with_error(found) for found in tried if found), default=math.inf)
        raise SettingError(
            f"tune(goal='kl<{goal:g}'): no choice of methods and budgets keeps it on this text (closest: {least:.4g}). "
            "Ask for a larger divergence."
        )
    settings = {layer: options[layer][n] for layer, n in picked.items()}
    others = Tails(model, confirming, tails.prompt)
    confirmed = statistics.fmean(search.divergences(others, settings, range(len(confirming)), math.inf, "confirming"))
    search.watch(others, {layer: [setting] for layer, setting in settings.items()})
    reached = statistics.fmean(kls)
    if not confirmed < goal:
        warnings.warn(
            f"tune(goal='kl<{goal:g}'): the choice gives {reached:.5f} where it was made and {confirmed:.5f} on text "
            "that took no part in it. Ask for a smaller divergence, or give more text.",
            stacklevel=2,
        )
    heads = next(iter(search.importance.values())).shape[0]
    chosen = [
        Choice(paths[n], settings.get(n), *_shares(search.sums.get((n, 0)), heads), search.costs[n][picked.get(n, -1)])
        for n in options
    ]
    numbers = {"kl": confirmed, "kl where chosen": reached, "with its error": with_error(kls)}
    exact = sum(costs[-1] for costs in search.costs.values())
    return _recipe(model, technique, chosen, numbers, goal, exact, search.costed, len(confirming))


def family(costs: Mapping[int, Sequence[float]], lost: Mapping[int, Mapping[int, float]]) -> list[dict[int, int]]:
    """Recipes from gentle to fast: for each layer the number of its candidate; dense ones left out.

    ``costs``: for each layer seconds by candidate, and of dense attention last. ``lost``: for each layer the divergence
    of the candidates that may be taken.

    Each differs from the one before in one layer, where a saved second costs least divergence. As far as divergences of
    layers add up, each has the smallest seconds + price * divergence of all for some price, so that none of its speed
    loses less (Lagrange multipliers, Everett 1963).
    """
    picked: dict[int, int] = {}
    found: list[dict[int, int]] = []
    while True:
        steps = []
        for layer, candidates in lost.items():
            now = picked.get(layer, -1)
            for number, divergence in candidates.items():
                saved = costs[layer][now] - costs[layer][number]
                if saved > 0:
                    steps.append(((divergence - candidates.get(now, 0.0)) / saved, saved, layer, number))
        if not steps:
            return found
        *_, layer, number = min(steps)
        picked = {**picked, layer: number}
        found.append(picked)


def with_error(kls: Sequence[float]) -> float:
    """Mean over windows plus its standard error; of one window, whose error nobody knows, the mean."""
    error = statistics.stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else 0.0
    return statistics.fmean(kls) + error


def _alone(
    search: Search, tails: Tails, options: Mapping[int, Sequence[SparseAttention]], goal: float
) -> dict[int, dict[int, float]]:
    """Divergence of each candidate in its layer with dense attention in the others, by layer and number.

    Left out: what costs as much as dense attention, and what reaches `goal` by itself with all smaller budgets.
    """
    count = len(tails.windows)
    numbers = range(0, count, max(1, count // ALONE))[:ALONE]
    lost: dict[int, dict[int, float]] = {layer: {} for layer in options}
    groups = list(itertools.product(options, METHODS))
    for layer, method in scoring.progress(groups, len(groups), "layers alone", search.show):
        for number in _by_budget(options[layer], method):
            if search.costs[layer][number] >= search.costs[layer][-1]:
                continue
            kls = search.divergences(tails, {layer: options[layer][number]}, numbers, goal)
            if not sum(kls) / len(numbers) < goal:
                break
            lost[layer][number] = statistics.fmean(kls)
    return lost


def _fastest(
    search: Search, tails: Tails, options: Mapping[int, Sequence[SparseAttention]],
    recipes: Sequence[dict[int, int]], goal: float,
) -> tuple[dict[int, int], list[float]]:  # fmt: skip
    """The fastest that keeps `goal`, and its divergences by window; no layers where none does.

    Of `recipes`, from gentle to fast, by bisection. Then whatever is faster of one method and budget in all layers but
    the first two takes its place, if it keeps the goal too.
    """
    windows = range(len(tails.windows))

    def kept(picked: Mapping[int, int], said: str) -> list[float]:
        settings = {layer: options[layer][n] for layer, n in picked.items()}
        kls = search.divergences(tails, settings, windows, goal, f"kl < {goal:g}: {said}")
        return kls if len(kls) == len(windows) and with_error(kls) < goal else []

    def seconds(picked: Mapping[int, int]) -> float:
        return sum(costs[picked.get(layer, -1)] for layer, costs in search.costs.items())

    best: tuple[dict[int, int], list[float]] = {}, []
    low, high = 0, len(recipes) - 1
    for turn in itertools.count(1):
        if low > high:
            break
        middle = (low + high) // 2
        kls = kept(recipes[middle], f"{turn} of {len(recipes).bit_length()}")
        if kls:
            low, best = middle + 1, (recipes[middle], kls)
        else:
            high = middle - 1
    late = [layer for layer in options if layer >= DENSE_LAYERS]
    for method in METHODS if late else ():
        for number in _by_budget(options[late[0]], method):
            same = dict.fromkeys(late, number)
            if seconds(same) >= seconds(best[0]):
                continue
            kls = kept(same, f"{method} everywhere")
            if not kls:
                break
            best = same, kls
    return best


def _by_budget(candidates: Sequence[SparseAttention], method: str) -> list[int]:
    """Numbers of one method's candidates, the largest budget first."""
    return [n for n in reversed(range(len(candidates))) if candidates[n].method == method]


def report_lines(recipe: Recipe) -> list[str]:
    """What :func:`solve` chose, with density, kept mass and their maps; empty for any other recipe."""
    if "report" not in recipe.notes:
        return []
    notes = recipe.notes
    said = (
        f"{notes['goal']}: KL {notes['kl']:.5f} on {notes['windows']} windows that took no part in the choice, "
        f"{notes['kl where chosen']:.5f} where it was made, {notes['with its error']:.5f} with a standard error; "
        f"attention of a decode step {notes['speedup of attention']}x, {notes['speedup known']}"
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


def _shares(sums: HeadSums | None, heads: int) -> tuple[Tensor, Tensor]:
    """Density and kept mass, each [Hkv]; dense where nothing was measured."""
    whole = torch.ones(heads, dtype=torch.float64)
    return (whole, whole) if sums is None else (sums.density, sums.kept_mass)


def _recipe(
    model: nn.Module, technique: SparseAttention, chosen: Sequence[Choice], measured: Mapping[str, float],
    goal: float, dense: float, costed: str, windows: int,
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
        "speedup of attention": round(faster, 2), "speedup known": costed,
        "layers": [c.path for c in chosen],
        "report": [f"{'layer':<28} {'chosen':<24} {'density':>7} {'kept mass':>9}", *map(str, chosen)],
    }  # fmt: skip
    return Recipe(paths=dict(paths), data=data, fingerprint=fingerprint(model), notes=notes)


def _share(budget: float | int | None) -> str:
    return f"1/{round(1 / budget)}" if isinstance(budget, float) else str(budget)
