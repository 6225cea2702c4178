"""``fxopt.reference``: the meaning of a setting, in eager PyTorch, on a copy that shares the weights."""

from __future__ import annotations

import copy
import fnmatch

from torch import nn

from fxopt.compiler import Given, check_paths, flatten, require_module
from fxopt.passes import order
from fxopt.passes.technique import Decorated, Technique


def reference(model: nn.Module, *techniques: Given) -> nn.Module:
    """An eager model that computes what ``fxopt.compile(model, *techniques)`` has to compute.

    Without techniques: the decorations the model carries. The copy shares every parameter and buffer with `model`;
    `model` itself is left alone.
    """
    require_module(model)
    whole: list[Technique] = []
    paths: dict[str, Technique] = {}
    for given in flatten(model, techniques):
        if isinstance(given, Technique):
            whole.append(given.check(model))
        else:
            paths.update(check_paths(model, given))
    meant = shared_copy(model)
    placed = _placed(meant, paths) if techniques else _decorations(meant)
    # Innermost modules first, so that an outer technique sees what its parts have become.
    for path, technique in sorted(placed, key=lambda item: -item[0].count(".") if item[0] else 1):
        meant = _apply(meant, path, technique)
    rank = {name: i for i, name in enumerate(order.names())}
    for technique in sorted(whole, key=lambda t: rank[t.name]):
        meant = technique.reference(meant)
    return meant


def shared_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the module tree whose parameters and buffers are the originals."""
    memo: dict[int, object] = {id(p): p for p in model.parameters()}
    memo.update({id(b): b for b in model.buffers()})
    return copy.deepcopy(model, memo)


def _placed(model: nn.Module, paths: dict[str, Technique]) -> list[tuple[str, Technique]]:
    return [
        (name, technique)
        for pattern, technique in paths.items()
        for name, _ in model.named_modules()
        if name and fnmatch.fnmatchcase(name, pattern)
    ]


def _decorations(model: nn.Module) -> list[tuple[str, Technique]]:
    return [
        (name, technique)
        for name, module in model.named_modules()
        for technique, _ in Decorated.techniques(module).values()
    ]


def _apply(model: nn.Module, path: str, technique: Technique) -> nn.Module:
    if not path:
        return technique.reference(model)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, technique.reference(model.get_submodule(path)))
    return model
