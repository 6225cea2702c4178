"""Calibration of :class:`fxopt.SparseAttention` ``method="double_sparsity"``: streaming sums by KV head and channel."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from fxopt import scoring
from fxopt.passes.attention import AttentionSite
from fxopt.passes.modules import module_stacks
from fxopt.passes.sparse_attention import SparseAttention, calibration, double_sparsity
from fxopt.passes.technique import SettingError, Technique
from fxopt.recipe import Recipe, fingerprint

PREFIX = "sparse_attention.importance."


class ChannelStatistics:
    """Sums of ``|q_c k_c|`` for each attention of a model, over every window that :meth:`look` sees."""

    def __init__(self, technique: SparseAttention) -> None:
        if technique.method != "double_sparsity":
            raise SettingError(f"{technique} has nothing to calibrate; only method='double_sparsity' does.")
        self.technique = technique
        self.sums: dict[str, Tensor] = {}

    def look(self, path: str, site: AttentionSite, values: Mapping[fx.Node, Any]) -> None:
        """Add one attention's queries and keys, as it reads them; cross-attention, of other lengths, is left out."""
        query, key = values[site.query], values[site.key]
        if query.shape[2] == key.shape[2]:
            found = calibration.product_sums(query, key).cpu()
            self.sums[path] = self.sums[path] + found if path in self.sums else found

    def resume(self, recipe: Recipe) -> None:
        """Go on from a recipe that was written before. Raises SettingError when it holds no such calibration."""
        self.sums = {name.removeprefix(PREFIX): t for name, t in recipe.data.items() if name.startswith(PREFIX)}
        if not self.sums:
            raise SettingError("the checkpoint holds no channel statistics; remove the file to begin again.")

    def recipe(self, model: nn.Module, seen: Sequence[scoring.Window]) -> Recipe:
        """Settings with channels for every attention but those of the first layers, which stay dense."""
        paths: dict[str, Technique] = {}
        wanted = self.technique.channels
        dense = set(dense_paths(model, self.technique))
        for path, sums in self.sums.items():
            if not any(path == d or path.startswith(f"{d}.") for d in dense):
                count = wanted if isinstance(wanted, int) else double_sparsity.default_channels(sums.shape[1])
                paths[path] = replace(self.technique, layers=None, channels=calibration.heaviest(sums, count))
        data = {PREFIX + path: sums for path, sums in self.sums.items()}
        return Recipe(paths=paths, data=data, fingerprint=fingerprint(model), notes=scoring.seen(seen))


def dense_paths(model: nn.Module, technique: SparseAttention) -> list[str]:
    """Paths of the layers that a recipe leaves dense: the first two, or all that ``layers=`` does not name."""
    found = []
    for stack in module_stacks(model):
        count = len(stack)
        chosen = range(calibration.DENSE_LAYERS, count) if technique.layers is None else technique.chosen(count)
        names = {id(module): name for name, module in model.named_modules()}
        found += [names[id(stack.layers[i])] for i in range(count) if i not in set(chosen)]
    return found


def from_lists(
    model: nn.Module, path: str | os.PathLike[str], technique: SparseAttention, *, kind: str = "k"
) -> Recipe:
    """A recipe from channel lists in the JSON format of the authors of Double Sparsity (arXiv 2408.07092).

    ``kind``: ``"k"`` or ``"q"`` (with grouped queries only ``"k"`` has one list for each KV head); ``"qk"`` is refused,
    see :func:`fxopt.passes.sparse_attention.calibration.read_lists`. Raises SettingError for a missing or foreign file
    and for lists of another model or head layout.
    """
    lists = calibration.read_lists(path, kind)
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stacks = module_stacks(model)
    stack = next((s for s in stacks if set(lists) == set(range(len(s)))), None)
    layouts = {(len(listed), len(listed[0])) for listed in lists.values()}
    if stack is None or layouts != {(heads, width)}:
        have = ", ".join(str(len(s)) for s in stacks)
        given = " or ".join(f"{h} heads with {w} channels" for h, w in sorted(layouts))
        raise SettingError(
            f"{os.fspath(path)!r} has {kind} lists for {len(lists)} layers of {given}; this {type(model).__name__} has "
            f"{have} layers of {heads} KV heads with {width}. "
            + ("Take kind='k'. " if kind == "q" and heads != config.num_attention_heads else "")
            + "Or calibrate it with fxopt.tune."
        )
    count = technique.channels if isinstance(technique.channels, int) else double_sparsity.default_channels(width)
    names = {id(module): name for name, module in model.named_modules()}
    dense = set(dense_paths(model, technique))
    paths: dict[str, Technique] = {}
    for layer, listed in sorted(lists.items()):
        path_of = names[id(stack.layers[layer])]
        if path_of not in dense:
            chosen = tuple(calibration.first_channels(order, count) for order in listed)
            paths[f"{path_of}.self_attn"] = replace(technique, layers=None, channels=chosen)
    overlap = round(calibration.mean_overlap(lists, count), 3)
    notes = {"source": os.path.basename(os.fspath(path)), "kind": kind, "mean overlap of heads": overlap}
    return Recipe(paths=paths, fingerprint=fingerprint(model), notes=notes)
