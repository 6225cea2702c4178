"""Read the module stack of a graph: which numbered members of which containers ran, and what ran in each call.

Dynamo notes for every node the modules it ran in, as ``{key: (name, class)}``; the key of a module's second call ends
in ``@1``. Placeholders carry the stack of their first reader and are no part of a call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from torch import fx

from fxopt.passes.provenance import clean_path
from fxopt.passes.streams import Stream

_clean = lru_cache(maxsize=4096)(clean_path)
_NUMBERED = re.compile(r"^(.*?)(\d+)$")


@dataclass
class Call:
    """The nodes that ran in one call of one member of a container."""

    path: str
    call: int
    kind: object
    nodes: dict[fx.Node, None] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)

    @property
    def first(self) -> fx.Node:
        """The node that runs first."""
        return next(iter(self.nodes))


@dataclass
class Container:
    """Numbered members under one path (``"model.layers"``), or numbered names in one module (``"block_*"``)."""

    path: str
    calls: dict[tuple[str, int], Call] = field(default_factory=dict)

    @property
    def ordered(self) -> list[Call]:
        """The calls by their first node."""
        return list(self.calls.values())

    @property
    def same_kind(self) -> bool:
        """Whether it is a real container of modules of one class: what a reader would call repeated."""
        kinds = {call.kind for call in self.calls.values()}
        return len(self.calls) > 1 and len(kinds) == 1 and not self.path.endswith("*")


def split_member(path: str) -> tuple[str, int] | None:
    """``"h.3"`` to ``("h", 3)``; ``"layers.layer_3"`` to ``("layers.layer_*", 3)``; None without a number."""
    parent, _, name = path.rpartition(".")
    numbered = _NUMBERED.match(name)
    if not numbered:
        return None
    container = parent if not numbered[1] else f"{parent}.{numbered[1]}*".lstrip(".")
    return container, int(numbered[2])


def _members(stack: dict[str, tuple[str, type]]) -> list[tuple[str, str, int, object]]:
    """``(container, member, call, class)`` of every numbered name in a module stack."""
    found: list[tuple[str, str, int, object]] = []
    seen: set[str] = set()
    for key, (name, module_class) in stack.items():
        path, call = _clean(name), int(str(key).partition("@")[2] or 0)
        names = path.split(".")
        for length in range(1, len(names) + 1):
            member = ".".join(names[:length])
            split = None if member in seen else split_member(member)
            seen.add(member)
            if split is not None:
                # A member that is not called itself (a ModuleList in a ModuleList) has no class to compare.
                found.append((split[0], member, call, module_class if member == path else "list"))
    return found


def containers_of(graph: fx.Graph) -> list[Container]:
    """Everything numbered in the paths of the graph, outermost first."""
    found: dict[str, Container] = {}
    known: dict[tuple[str, ...], list[tuple[str, str, int, object]]] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if not stack or node.op in ("placeholder", "output"):
            continue
        key = tuple(stack)
        if key not in known:
            known[key] = _members(stack)
        for path, member, call, kind in known[key]:
            container = found.setdefault(path, Container(path))
            container.calls.setdefault((member, call), Call(member, call, kind)).nodes[node] = None
    return sorted(found.values(), key=lambda container: container.path.count("."))
