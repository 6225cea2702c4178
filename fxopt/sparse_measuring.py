"""What the search of :mod:`fxopt.sparse_tuning` measures, window by window, kept in a file from which it can go on."""

from __future__ import annotations

import contextlib
import copy
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt import scoring
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.sparse_attention.one_shot import HeadSums, OneShot, channel_sums
from fxopt.passes.technique import SettingError
from fxopt.recipe import Recipe, fingerprint

EVERY = 4
"""Kept mass is measured at every so many of the decoded tokens."""


class Tails:
    """Windows whose prompts are on caches, so that what follows a prompt runs again and again at its own cost."""

    def __init__(self, model: Any, windows: Sequence[scoring.Window], prompt: int) -> None:
        self.model, self.prompt = model, prompt
        self.device = next(model.parameters()).device
        self.windows = list(windows)
        self.caches: list[Any] = [None] * len(self.windows)
        self.base: dict[int, Tensor] = {}

    @torch.no_grad()
    def run(self, number: int, shot: OneShot | None = None) -> Tensor:
        """Logits [S - prompt, V] of one window after its prompt; rows choose as `shot` says."""
        ids = self.windows[number].inputs[None].to(self.device)
        if self.caches[number] is None:
            self.caches[number] = self.model(ids[:, : self.prompt], use_cache=True, logits_to_keep=1).past_key_values
        cache = copy.deepcopy(self.caches[number])
        with shot.attached(self.model) if shot is not None else contextlib.nullcontext():
            return self.model(ids[:, self.prompt :], past_key_values=cache, use_cache=True).logits[0]

    def score(self, number: int, settings: Mapping[int, SparseAttention], found: scoring.Divergence) -> None:
        """Add one window's tail to `found`, decoded with these settings by layer.

        In one forward a window, see :mod:`fxopt.passes.sparse_attention.one_shot`.
        """
        if number not in self.base:
            self.base[number] = self.run(number)
        base, window = self.base[number], self.windows[number]
        logits = self.run(number, OneShot(settings, self.prompt)) if settings else base
        targets = window.targets[self.prompt :].to(self.device)
        found.add(logits, base, targets, int(window.sizes[self.prompt :].sum()))

    def divergence(self, settings: Mapping[int, SparseAttention]) -> dict[str, float | None]:
        """Scores (bits per byte, KL, agreement) of all tails, decoded with these settings by layer."""
        found = scoring.Divergence()
        for number in range(len(self.windows)):
            self.score(number, settings, found)
        return found.result()


class Search:
    """Importance of channels, divergences of recipes, kept mass of what was chosen: by window or summed over windows.

    Measurements are asked for in the same order in every run; what `file` holds of them is not made again. ``asked``:
    a digest of everything that decides them. Raises SettingError for the file of another model or search.
    """

    def __init__(self, model: Any, asked: str, file: str | os.PathLike[str] | None, show: bool) -> None:
        self.model, self.asked, self.file, self.show = model, asked, file, show
        self.importance: dict[int, Tensor] = {}
        """By layer, [Hkv, D]."""
        self.sums: dict[tuple[int, int], HeadSums] = {}
        """By layer and number of the candidate."""
        self.costs: dict[int, list[float]] = {}
        """By layer, seconds of the candidates and of dense attention: a CPU is measured, and never twice the same."""
        self.costed = ""
        """How they are known."""
        self.windows = {"calibrating": 0, "kept mass": 0}
        self.measured: list[list[float]] = []
        """KL divergences of the windows done, one list a recipe."""
        self.asked_for = 0
        if file is not None and pathlib.Path(file).is_file():
            self._load(Recipe.load(file))

    def calibrate(self, windows: Sequence[scoring.Window]) -> None:
        """Add up the importance of channels in every layer."""
        for number in self._todo("calibrating", len(windows)):
            for layer, sums in channel_sums(self.model, [windows[number].inputs]).items():
                self.importance[layer] = self.importance[layer] + sums if layer in self.importance else sums
            self._done("calibrating", number)

    def watch(self, tails: Tails, options: Mapping[int, Sequence[SparseAttention]]) -> None:
        """Add up what each candidate keeps in its layer, under dense attention."""
        shot = OneShot(options, tails.prompt, every=EVERY, sums=self.sums)
        for number in self._todo("kept mass", len(tails.windows)):
            tails.run(number, shot)
            self._done("kept mass", number)

    def divergences(
        self, tails: Tails, settings: Mapping[int, SparseAttention], numbers: Sequence[int], goal: float,
        said: str | None = None,
    ) -> list[float]:  # fmt: skip
        """KL divergence to the unmodified model, nats a token, of each of these windows; settings by layer.

        None is negative, so it ends where those behind can no longer bring the mean over all under `goal`.
        ``said``: what a progress bar says; without it there is none.
        """
        place, self.asked_for = self.asked_for, self.asked_for + 1
        if place == len(self.measured):
            self.measured.append([])
        kls = self.measured[place]
        todo = numbers[len(kls) :]
        for number in scoring.progress(todo, len(todo), said or "", self.show and said is not None):
            if sum(kls) / len(numbers) >= goal:
                break
            found = scoring.Divergence()
            tails.score(number, settings, found)
            kl = found.result()["kl"]
            assert kl is not None
            kls.append(kl)
            self._save()
        return kls

    def _todo(self, what: str, count: int) -> Any:
        first = self.windows[what]
        return scoring.progress(range(first, count), count - first, what, self.show)

    def _done(self, what: str, number: int) -> None:
        self.windows[what] = number + 1
        self._save()

    def _save(self) -> None:
        if self.file is None:
            return
        data = {f"importance.{layer}": sums for layer, sums in self.importance.items()}
        for (layer, number), sums in self.sums.items():
            data[f"kept.{layer}.{number}"] = torch.stack((sums.read, sums.visible, sums.mass))
        data |= {f"costs.{layer}": torch.tensor(s, dtype=torch.float64) for layer, s in self.costs.items()}
        rows_of = {f"{layer}.{number}": sums.rows for (layer, number), sums in self.sums.items()}
        notes = {"search": self.asked, "windows": self.windows, "rows": rows_of, "measured": self.measured,
                 "costed": self.costed}  # fmt: skip
        Recipe(data=data, fingerprint=fingerprint(self.model), notes=notes).save(self.file)

    def _load(self, kept: Recipe) -> None:
        kept.check(self.model)
        if kept.notes.get("search") != self.asked:
            raise SettingError(
                f"{os.fspath(self.file or '')!r} was not written by this search: text, context, limit, setting and "
                "goal have to be the same. Name another file, or remove it to begin again."
            )
        self.windows.update(kept.notes["windows"])
        self.measured, self.costed = kept.notes["measured"], kept.notes["costed"]
        for name, tensor in kept.data.items():
            kind, *place = name.split(".")
            if kind == "importance":
                self.importance[int(place[0])] = tensor
            elif kind == "costs":
                self.costs[int(place[0])] = tensor.tolist()
            elif kind == "kept":
                read, visible, mass = (t.clone() for t in tensor)
                rows = kept.notes["rows"][".".join(place)]
                self.sums[int(place[0]), int(place[1])] = HeadSums(read, visible, mass, rows)
