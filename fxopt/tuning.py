"""``fxopt.tune``: run a text through a model, watch what happens, and write a recipe.

It calibrates (``goal=None``): for each attention module and KV head the range of its softmax inputs, and that of its
row maxima, which :class:`fxopt.AsyncSoftmax` needs where no bound is certified (FlashDecoding++, arXiv 2311.01282,
section 3). Where phi then stands, and whether there is one, depends on the dtype and is decided in the pass. And it
solves the threshold of :class:`fxopt.EarlyExit` (``goal="agreement=0.97"``), see :mod:`fxopt.exit_tuning`.
The kernels of :class:`fxopt.FlatGemm` are timed on the GPU that is there, see :mod:`fxopt.gemm_tuning`.
The channels that carry the scores, for ``SparseAttention(method="double_sparsity")``: :mod:`fxopt.channel_tuning`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from fxopt import exit_tuning, gemm_tuning, scoring, sparse_tuning
from fxopt.channel_tuning import ChannelStatistics
from fxopt.passes.async_softmax import AsyncSoftmax
from fxopt.passes.attention import AttentionSite, find_attentions
from fxopt.passes.early_exit import EarlyExit
from fxopt.passes.flat_gemm import FlatGemm
from fxopt.passes.provenance import module_path, name_modules
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.technique import SettingError, Technique
from fxopt.recipe import Recipe, fingerprint

KINDS = LOWEST, LOWEST_MAXIMUM, HIGHEST = tuple(
    f"async_softmax.{name}" for name in ("lowest", "lowest_maximum", "highest")
)
"""Of one KV head over the text: its lowest score, its lowest row maximum, its highest score (a row maximum too)."""

Ranges = dict[str, tuple[Tensor, Tensor, Tensor]]
"""``{module path: (lowest, lowest row maximum, highest)}``, each float32 [Hkv]."""


def tune(
    model: nn.Module,
    data: str | os.PathLike[str] | Tensor | Sequence[int] | None,
    *techniques: Technique,
    goal: str | None = None,
    tokenizer: Any = None,
    context: int = 512,
    limit: int = 8192,
    checkpoint: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> Recipe:
    """Calibrate `techniques` (default: ``AsyncSoftmax()``) on a text; returns the recipe to hand to ``fxopt.compile``.

    Args:
        goal: for one ``EarlyExit``, ``"agreement=0.97"``: its threshold is solved, the one it has is not used. For one
            ``SparseAttention``, ``"kl<0.01"``: method and budget of each layer are found, those it has are not used.
        data: a text, a path to one, or token ids; ``FlatGemm`` reads none, None will do.
        tokenizer: found by the model's name or path when not given.
        context, limit: tokens of a window, and tokens to read in all.
        checkpoint: a recipe file that is written after each window; a run that was interrupted goes on from it. For
            calibrations, and for ``SparseAttention`` with a goal.

    Raises:
        SettingError: for a goal that is not known, or a technique that has nothing to calibrate.
        TypeError, ValueError, FileNotFoundError: for a model that is no causal LM, or a text that cannot be read.
    """
    from fxopt.evaluation import find_tokenizer, read_data

    asked = techniques or (AsyncSoftmax(),)
    if checkpoint is not None and any(isinstance(t, (EarlyExit, FlatGemm)) for t in asked):
        raise SettingError(f"tune(checkpoint={os.fspath(checkpoint)!r}): there is none for {asked[0]}; leave it out.")
    if len(asked) == 1 and isinstance(asked[0], FlatGemm):
        if goal is not None:
            raise SettingError(f"tune(goal={goal!r}): a goal is for one EarlyExit; for FlatGemm leave it out.")
        return gemm_tuning.tune(model, asked[0], show=show)
    exits = asked[0] if len(asked) == 1 and isinstance(asked[0], EarlyExit) else None
    agreement = exit_tuning.wanted_agreement(goal) if exits is not None else None
    sparse = asked[0] if goal is not None and len(asked) == 1 and isinstance(asked[0], SparseAttention) else None
    kl = sparse_tuning.wanted_divergence(goal) if sparse is not None else None
    if goal is not None and exits is None and sparse is None:
        raise SettingError(
            f"tune(goal={goal!r}): a goal is for one EarlyExit or one SparseAttention; for AsyncSoftmax leave it out."
        )
    for technique in asked:
        if exits is None and not isinstance(technique, (AsyncSoftmax, SparseAttention)):
            raise SettingError(
                f"{technique} has nothing to calibrate; tune takes AsyncSoftmax(), one EarlyExit, FlatGemm(), or "
                "SparseAttention(method='double_sparsity', budget=...)."
            )
    if len(asked) > 1:
        raise SettingError(f"tune calibrates one technique at a time, and was given {len(asked)}.")
    scoring.require_causal(model)
    text = read_data(data)  # type: ignore[arg-type]
    if isinstance(text, str) and tokenizer is None:
        tokenizer = find_tokenizer(model)
    windows = scoring.windows(tokenizer, text, context, whole=True)[: max(1, limit // context)]
    if exits is not None and agreement is not None:
        return exit_tuning.solve(model, windows, exits, agreement, show=show)
    if sparse is not None and kl is not None:
        return sparse_tuning.solve(model, windows, sparse, kl, checkpoint=checkpoint, show=show)
    statistics = _statistics(asked[0])
    done = _resume(model, checkpoint, statistics, windows)
    device = next(model.parameters()).device
    with torch.no_grad():
        todo = windows[done:]
        watched = observed(model, statistics.look)
        for number, window in enumerate(scoring.progress(todo, len(todo), "calibrating", show), start=done + 1):
            watched(input_ids=window.inputs[None].to(device), use_cache=False)
            if checkpoint is not None:
                statistics.recipe(model, windows[:number]).save(checkpoint)
    return statistics.recipe(model, windows)


class Statistics(Protocol):
    """What a calibration gathers: shown every attention with the values of its graph, written into a recipe."""

    def look(self, path: str, site: AttentionSite, values: Mapping[fx.Node, Any]) -> None: ...

    def resume(self, recipe: Recipe) -> None: ...

    def recipe(self, model: nn.Module, seen: Sequence[scoring.Window]) -> Recipe: ...


def observed(model: nn.Module, look: Callable[..., None]) -> Callable[..., Any]:
    """`model` as a callable that shows ``look(module path, site, values)`` every attention before it runs.

    The captured graph is run node by node: nothing of the model is changed.
    """

    paths = {str(id(m)): (path, type(m)) for path, m in model.named_modules()}

    def watch(gm: fx.GraphModule, _: list[Any]) -> Any:
        name_modules(gm.graph, paths)
        return _Watch(gm, {site.output: site for site in find_attentions(gm.graph)[0]}, look).run

    return torch.compile(functools.partial(type(model).__call__, model), backend=watch)


class _Watch(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, sites: dict[fx.Node, AttentionSite], look: Callable[..., None]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.sites = sites
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        site = self.sites.get(n)
        if site is not None:
            self.look(module_path(n), site, self.env)
        return super().run_node(n)


def score_range(site: AttentionSite, values: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest softmax input, lowest row maximum and highest input of one attention: three float32 tensors [Hkv]."""
    query, key = values[site.query].float(), values[site.key].float()
    batch, heads, tokens, width = query.shape
    grouped = query.view(batch, site.kv_heads, heads // site.kv_heads, tokens, width)
    scores = torch.einsum("bkgtd,bksd->bkgts", grouped, key) * site.scale
    if site.soft_cap:
        scores = torch.tanh(scores / site.soft_cap) * site.soft_cap
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if site.is_causal:
        hidden |= torch.ones(tokens, key.shape[2], dtype=torch.bool, device=scores.device).tril().logical_not()
    for bias in site.biases:
        mask = values[bias.node]
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)).unsqueeze(2)
        if mask.shape[1] == heads and heads != 1:
            mask = mask.reshape(mask.shape[0], site.kv_heads, -1, *mask.shape[-2:])
        if mask.dtype == torch.bool:
            hidden |= (mask == bias.where) if bias.fill is not None else ~mask
        else:
            hidden |= mask <= torch.finfo(mask.dtype).min
            scores = scores + mask.clamp(min=torch.finfo(torch.float32).min / 2) * bias.multiplier
    maxima = scores.masked_fill(hidden, -torch.inf).amax(-1)
    # A row in which everything is masked has no maximum.
    least = maxima.masked_fill(maxima == -torch.inf, torch.inf).amin((0, 2, 3))
    return scores.masked_fill(hidden, torch.inf).amin((0, 2, 3, 4)), least, maxima.amax((0, 2, 3))


class SoftmaxRanges:
    """Softmax inputs and row maxima of each attention, by KV head; masked scores do not count."""

    def __init__(self, technique: AsyncSoftmax) -> None:
        self.technique = technique
        self.ranges: Ranges = {}

    def look(self, path: str, site: AttentionSite, values: Mapping[fx.Node, Any]) -> None:
        """Widen the ranges of an attention by what it sees now."""
        low, least, high = score_range(site, values)
        if path in self.ranges:
            before = self.ranges[path]
            low, least = torch.minimum(low, before[0]), torch.minimum(least, before[1])
            high = torch.maximum(high, before[2])
        self.ranges[path] = (low, least, high)

    def recipe(self, model: nn.Module, seen: Sequence[scoring.Window]) -> Recipe:
        """The range of the row maxima for each attention whose scores were finite on the text.

        For the others the pass estimates phi in each step instead.
        """
        data = {
            f"{name}.{path}": found
            for path, three in self.ranges.items()
            for name, found in zip(KINDS, three, strict=True)
        }
        paths: dict[str, Technique] = {}
        for path, (_, least, high) in self.ranges.items():
            pairs = tuple(zip(least.tolist(), high.tolist(), strict=True))
            if all(math.isfinite(end) for pair in pairs for end in pair):
                paths[path] = dataclasses.replace(self.technique, ranges=pairs)
        return Recipe(paths=paths, data=data, fingerprint=fingerprint(model), notes=scoring.seen(seen))

    def resume(self, recipe: Recipe) -> None:
        """Go on from a recipe that was written before. Raises SettingError when it holds no such calibration."""
        prefix = f"{LOWEST}."
        names = [name.removeprefix(prefix) for name in recipe.data if name.startswith(prefix)]
        if not names or any(f"{kind}.{name}" not in recipe.data for kind in KINDS for name in names):
            raise SettingError("the checkpoint holds no calibration that could go on; remove the file to begin again.")
        for name in names:
            low, least, high = (recipe.data[f"{kind}.{name}"] for kind in KINDS)
            self.ranges[name] = (low, least, high)


def _statistics(technique: Technique) -> Statistics:
    if isinstance(technique, SparseAttention):
        return ChannelStatistics(technique)
    assert isinstance(technique, AsyncSoftmax)
    return SoftmaxRanges(technique)


def _resume(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | None,
    statistics: Statistics,
    windows: Sequence[scoring.Window],
) -> int:
    if checkpoint is None or not pathlib.Path(checkpoint).is_file():
        return 0
    recipe = Recipe.load(checkpoint)
    recipe.check(model)
    done = int(recipe.notes.get("windows", 0))
    if recipe.notes != scoring.seen(windows[:done]):
        raise SettingError(
            f"the checkpoint {os.fspath(checkpoint)!r} was calibrated on {done} windows of another text or length. "
            "Give the same text and context, or remove the file to begin again."
        )
    statistics.resume(recipe)
    return done
