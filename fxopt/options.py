"""The setting of one compilation: what ``options=`` may say, checked at once, and whose setting is nearest."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxopt.codegen import compat
from fxopt.passes import order
from fxopt.passes.provenance import all_nodes, module_stack
from fxopt.passes.record import EffectiveSetting
from fxopt.passes.technique import CLASS_KEY, INSTANCE_KEY, Decorated, SettingError, Technique, nearest

SWITCHES = ("disable", "strict", "record")


def as_technique(name: str, value: Any) -> Technique | None:
    """An option's value as a technique: itself, built from a dict, ``True`` for defaults, ``False`` for none."""
    cls = Technique.registry[name]
    if value is False or value is None:
        return None
    if value is True:
        try:
            return cls()
        except TypeError as error:
            raise SettingError(
                f"option {name!r}: True needs defaults for every field of {cls.__name__}: {error}"
            ) from None
    if isinstance(value, Mapping):
        cls.check_fields(value, f"option {name!r}: ")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
    if isinstance(value, cls):
        return value
    raise SettingError(
        f"option {name!r} takes a {cls.__name__}, a dict of its fields, True or False; given was {value!r} "
        f"({type(value).__name__})."
    )


@dataclass(frozen=True)
class Setting:
    """A technique and where it was set. ``kind`` orders nearness: instance > path > class > options > default."""

    technique: Technique
    kind: str
    place: str

    @property
    def origin(self) -> str:
        return f"{self.kind} {self.place}".strip()


_NEARNESS = ("instance", "path", "class", "options", "default")


@dataclass(frozen=True)
class Settings:
    """Validated options of one compilation."""

    techniques: tuple[Technique, ...] = ()
    paths: tuple[tuple[str, Technique], ...] = ()
    switched_off: frozenset[str] = frozenset()
    """Techniques set to False: on-by-default ones that this compilation goes without."""
    disable: frozenset[str] = frozenset()
    strict: bool = False
    record: str | None = None
    mode: str | None = None
    owner: int = field(default=0, compare=False)

    @classmethod
    def build(
        cls,
        techniques: Mapping[str, Any] | None = None,
        *,
        paths: Mapping[str, Any] | None = None,
        disable: Any = (),
        strict: Any = False,
        record: Any = None,
        mode: str | None = None,
    ) -> Settings:
        """Check everything a user can write; raises SettingError with what is allowed and what to do."""
        chosen, off = [], set()
        for name, value in (techniques or {}).items():
            if name not in Technique.registry:
                allowed = [*Technique.registry, *SWITCHES]
                raise SettingError(
                    f"Unknown option {name!r} for backend 'fxopt'. Known options: {', '.join(allowed)}."
                    f"{nearest(name, allowed)}"
                )
            technique = as_technique(name, value)
            if technique is None:
                off.add(name)
            else:
                chosen.append(technique)
        if not isinstance(strict, bool):
            raise SettingError(f"strict takes True or False, not {strict!r}.")
        if record is not None and str(record) not in ("0", "1", "full"):
            raise SettingError(f"record takes 0, 1 or 'full', not {record!r}.")
        if mode is not None and mode not in compat.inductor_modes():
            raise SettingError(
                f"Unknown mode {mode!r}; allowed are {', '.join(map(repr, compat.inductor_modes()))}."
                f"{nearest(mode, compat.inductor_modes())}"
            )
        mapped = []
        for pattern, value in (paths or {}).items():
            if not isinstance(pattern, str) or not isinstance(value, Technique):
                raise SettingError(
                    f"a path mapping is {{'model.layers.*.self_attn': technique}}; given was {pattern!r}: {value!r}."
                )
            mapped.append((pattern, value))
        settings = cls(
            tuple(chosen), tuple(mapped), frozenset(off), _disable(disable), strict,
            None if record is None else str(record), mode,
        )  # fmt: skip
        for technique in (*chosen, *(t for _, t in mapped)):
            settings.refuse_conflict(technique, "option" if technique in chosen else "path mapping")
        return settings

    def refuse_conflict(self, technique: Technique, place: str) -> None:
        """Raise when a technique was asked for at one place and disabled at another."""
        if technique.name in self.disable:
            raise SettingError(
                f"{technique} is set by {place}, and disable={tuple(sorted(self.disable))!r} switches "
                f"{technique.name!r} off. Remove one of the two."
            )

    def owned(self, owner: int) -> Settings:
        """The same setting on behalf of one ``fxopt.compile`` call."""
        return dataclasses.replace(self, owner=owner)

    # -- whose setting is nearest ------------------------------------------------------------------------------

    def reach(self, name: str, graph: fx.Graph) -> list[tuple[Setting, Callable[[fx.Node], bool] | None]]:
        """The distinct settings of technique `name` in this graph, each with the test for nodes it covers.

        A test of None covers every node.
        """
        fallback = self._fallback(name)
        by_node: dict[fx.Node, Setting] = {}
        holders = Decorated.holders(name)
        for node in all_nodes(graph) if Technique.registry[name].enters_branches else graph.nodes:
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            found = self._nearest(name, node, holders)
            if found is not None:
                by_node[node] = found
        if not by_node:
            return [(fallback, None)] if fallback is not None else []
        settings = list(dict.fromkeys(by_node.values()))
        reach: list[tuple[Setting, Callable[[fx.Node], bool] | None]] = [
            (setting, functools.partial(_covers, by_node, setting)) for setting in settings
        ]
        if fallback is not None and any(
            n not in by_node for n in graph.nodes if n.op in ("call_function", "call_method")
        ):
            reach.append((fallback, lambda node: node not in by_node))
        return reach

    def _fallback(self, name: str) -> Setting | None:
        for technique in self.techniques:
            if technique.name == name:
                return Setting(technique, "options", "")
        cls = Technique.registry[name]
        if cls.on_by_default and cls.exact and name not in self.switched_off:
            return Setting(cls(), "default", "")
        return None

    def _nearest(self, name: str, node: fx.Node, holders: Mapping[str, Technique]) -> Setting | None:
        stack = module_stack(node)
        custom = node.meta.get("custom") or {}
        candidates: dict[str, Setting] = {}
        for kind, key in (("instance", INSTANCE_KEY), ("class", CLASS_KEY)):
            technique = Technique.from_digest(custom.get(key + name, ""))
            if technique is not None:
                candidates[kind] = Setting(technique, kind, "")
        for key, path, module_class in stack:  # inner entries overwrite outer ones
            for pattern, technique in self.paths:
                if technique.name == name and fnmatch.fnmatchcase(path, pattern):
                    candidates["path"] = Setting(technique, "path", pattern)
            if "class" not in candidates:
                kept = getattr(module_class, "_fxopt_class_settings_kept", {})
                if name in kept:
                    candidates["class"] = Setting(kept[name], "class", f"{module_class.__qualname__} (annotation lost)")
            if "instance" not in candidates and key.split("@")[0] in holders:
                candidates["instance"] = Setting(holders[key.split("@")[0]], "instance", "(annotation lost)")
        for kind in _NEARNESS:
            if kind in candidates:
                return candidates[kind]
        return None

    def effective(self, used: list[Setting]) -> list[EffectiveSetting]:
        """Every value that acted, with its origin, for the report."""
        rows = [EffectiveSetting(s.technique.name, str(s.technique), s.origin) for s in used]
        if self.disable:
            rows.append(EffectiveSetting("disable", ", ".join(sorted(self.disable)), "options"))
        if self.mode:
            rows.append(EffectiveSetting("mode", self.mode, "options"))
        if self.strict:
            rows.append(EffectiveSetting("strict", "True", "options"))
        return rows


def _covers(by_node: dict[fx.Node, Setting], setting: Setting, node: fx.Node) -> bool:
    return by_node.get(node) == setting


def _disable(value: Any) -> frozenset[str]:
    allowed = order.names()
    if not isinstance(value, (str, tuple, list, set, frozenset)):
        raise SettingError(
            f"disable takes names of passes, such as disable=('gqa_packing',), not {value!r} ({type(value).__name__}). "
            f"Passes: {', '.join(allowed)}."
        )
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if name not in allowed:
            raise SettingError(
                f"disable: there is no pass {name!r}. Passes: {', '.join(allowed)}.{nearest(name, allowed)}"
            )
    return frozenset(names)


def parse_options(options: Mapping[str, Any] | None, mode: str | None) -> Settings:
    """``torch.compile(options=..., mode=...)`` as settings."""
    given = dict(options or {})
    switches = {key: given.pop(key) for key in SWITCHES if key in given}
    return Settings.build(given, mode=mode, **switches)
