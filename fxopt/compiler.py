"""``fxopt.compile``: in place, the same object, and Hugging Face's ``generate`` reaches it."""

from __future__ import annotations

import fnmatch
import itertools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import nn

from fxopt import reporting
from fxopt.backend import Backend
from fxopt.codegen import compat
from fxopt.options import Settings
from fxopt.passes import kv_policy
from fxopt.passes.technique import Decorated, SettingError, Technique, nearest
from fxopt.recipe import Recipe

Model = TypeVar("Model", bound=nn.Module)
Given: TypeAlias = Technique | Recipe | Mapping[str, Technique]

_owners = itertools.count(1)


def compile(
    model: Model,
    *techniques: Given,
    mode: str | None = None,
    dynamic: bool | None = None,
    disable: str | tuple[str, ...] = (),
    strict: bool = False,
) -> Model:
    """Compile `model` in place with fxopt and return it; called again it replaces the earlier setting.

    Args:
        techniques: techniques, recipes, or path mappings ``{"model.layers.*.self_attn": technique}``. Exact
            rewrites run without being named. The nearest setting wins: instance, path, class, then these.
        mode: a mode of ``torch.compile``, with the meaning Inductor gives it.
        dynamic: as in ``torch.compile``.
        disable: names of passes to go without.
        strict: raise where a technique that was asked for cannot act, instead of warning once.

    Raises:
        SettingError: for a setting that is misspelt or cannot be applied to this model.

    A technique that adds parameters (``MixtureOfDepths``: routers) adds them here, as decorating the model would; they
    stay when the model is compiled again without it. Make the optimizer afterwards.

    ``copy.deepcopy`` and pickle keep decorations and drop the compilation, as torch does: compile the copy.
    """
    settings, whole = settle(model, techniques, mode=mode, disable=disable, strict=strict)
    for technique in whole.values():
        # A decoration is nearer, and prepared the model itself.
        if type(technique).prepare is not Technique.prepare and technique.name not in Decorated.techniques(model):
            technique.prepare(model)
            technique.check(model)
    backend = _backend(model, settings)
    model.compile(backend=backend, dynamic=dynamic, options={"guard_filter_fn": backend.guards})
    carried = {name: t for m in model.modules() for name, (t, _) in Decorated.techniques(m).items()}
    for technique in (whole | carried).values():
        if type(technique).called is not Technique.called:
            compat.around_compiled_call(model, technique.called)
    return model


# Dynamo keeps compiled code by the backend's identity: going back to an earlier setting finds its code again.
_backends: weakref.WeakKeyDictionary[nn.Module, dict[Settings, Backend]] = weakref.WeakKeyDictionary()


def _backend(model: nn.Module, settings: Settings) -> Backend:
    made = _backends.setdefault(model, {})
    if settings not in made:
        made[settings] = Backend(settings.owned(next(_owners)), model)
    reporting.set_owner(model, made[settings].settings.owner)
    return made[settings]


def settle(
    model: nn.Module,
    techniques: tuple[Given, ...],
    *,
    mode: str | None = None,
    disable: str | tuple[str, ...] = (),
    strict: bool = False,
) -> tuple[Settings, dict[str, Technique]]:
    """Check everything against the model; the settings, and the whole-model techniques by name."""
    require_module(model)
    whole: dict[str, Technique] = {}
    paths: dict[str, Technique] = {}
    for given in flatten(model, techniques):
        if isinstance(given, Technique):
            if given.name in whole:
                raise SettingError(f"two settings for the whole model: {whole[given.name]} and {given}. Give one.")
            whole[given.name] = given.check(model)
        else:
            paths.update(check_paths(model, given))
    Decorated.refresh(model)
    settings = Settings.build(whole, paths=paths, disable=disable, strict=strict, mode=mode)
    for path, module in model.named_modules():
        for technique, kind in Decorated.techniques(module).values():
            settings.refuse_conflict(technique, f"the decoration of {path or type(module).__name__} ({kind})")
            technique.check(module)
    refuse_pairs([*whole.values(), *(t for t, _ in Decorated.techniques(model).values())])
    return settings, whole


def refuse_pairs(techniques: Iterable[Technique]) -> None:
    """Raise for two techniques whose caches cannot both be kept right; with path mappings the graph decides."""
    by_name = {technique.name: technique for technique in techniques}
    for name, technique in by_name.items():
        clash = kv_policy.conflict(name, by_name)
        if clash is not None:
            raise SettingError(f"{technique} together with {by_name[clash[0]]}: {clash[1]}. Remove one of the two.")


def flatten(model: nn.Module, techniques: tuple[Given, ...]) -> list[Technique | Mapping[str, Technique]]:
    """Techniques and path mappings in the order given, recipes opened."""
    flat: list[Technique | Mapping[str, Technique]] = []
    for given in techniques:
        if isinstance(given, Recipe):
            given.check(model)
            flat += given.settings()
        elif isinstance(given, (Technique, Mapping)):
            flat.append(given)
        elif isinstance(given, type) and issubclass(given, Technique):
            raise SettingError(f"{given.__name__} is a class; write {given.__name__}(...) with its fields.")
        else:
            raise SettingError(
                f"fxopt.compile takes techniques, recipes and path mappings, not {given!r} ({type(given).__name__})."
            )
    return flat


def check_paths(model: nn.Module, mapping: Mapping[str, Technique]) -> dict[str, Technique]:
    """A path mapping whose patterns all name modules of the model."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern, technique in mapping.items():
        if not isinstance(technique, Technique):
            raise SettingError(f"the path mapping gives {pattern!r} a {type(technique).__name__}, not a technique.")
        matched = [name for name in names if fnmatch.fnmatchcase(name, str(pattern))]
        if not matched:
            raise SettingError(
                f"no module of {type(model).__name__} matches the path {pattern!r}.{nearest(pattern, names)} "
                "Paths are dotted names of model.named_modules(), with * as a wildcard."
            )
        for name in matched:
            technique.check(model.get_submodule(name))
    return dict(mapping)


def require_module(model: Any) -> None:
    """Raise for anything but a plain module."""
    if not isinstance(model, nn.Module):
        raise SettingError(f"a model is an nn.Module; given was {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise SettingError(
            "the model is wrapped by torch.compile; hand over the model itself (wrapper._orig_mod). "
            "fxopt.compile works in place and needs no wrapper."
        )
