"""The KV cache as a graph sees it: where keys and values live, how they are written, and what may move past a write."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxopt.passes.attention import AttentionSite
from fxopt.passes.nodes import argument, name_of, value_of
from fxopt.passes.rewriter import is_view, writes_in_place

_PURE = (operator.and_, operator.or_, operator.not_, operator.is_)
"""Functions that end in an underscore only because their name is a word of Python."""
_ALLOCATIONS = frozenset("zeros empty full new_zeros new_empty zeros_like empty_like".split())


@dataclass(frozen=True)
class CacheFacts:
    """Where an attention's keys and values come from.

    ``kind``:
      - ``"static"``: preallocated buffers, written in place at the new positions (``index_copy_``, a slice);
      - ``"sliding"``: preallocated, full, and shifted by every step (``roll`` and ``copy_``);
      - ``"dynamic"``: grown by ``cat``, so that the result is a new tensor;
      - ``"fixed"``: inputs of the graph that it does not write (cross-attention of a decoding step);
      - ``"none"``: computed in this graph.
    """

    kind: str
    key: fx.Node
    """The buffer (static, sliding, fixed), the ``cat`` (dynamic), or what computes the keys."""
    value: fx.Node
    writes: tuple[fx.Node, ...] = ()
    """Nodes that write the buffers, in order."""

    @property
    def preallocated(self) -> bool:
        return self.kind in ("static", "sliding")


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may show, through views and what may be one (a reshape, a cast)."""
    while is_view(node) and node.all_input_nodes and node.op in ("call_function", "call_method"):
        node = node.all_input_nodes[0]
    return node


def writes_to(*bases: fx.Node) -> list[fx.Node]:
    """Nodes that write the memory of any of `bases` in place, themselves or through a view, in order."""
    found: dict[fx.Node, None] = {}
    pending = list(bases)
    while pending:
        for user in pending.pop().users:
            if _written(user) in bases:
                found[user] = None
            elif is_view(user):
                pending.append(user)
    return sorted(found)


def _written(node: fx.Node) -> fx.Node | None:
    if node.op not in ("call_function", "call_method") or node.target in _PURE or not writes_in_place(node):
        return None
    out = node.kwargs.get("out")
    target = out if isinstance(out, fx.Node) else (node.all_input_nodes[0] if node.all_input_nodes else None)
    return base_of(target) if target is not None else None


def cache_of(site: AttentionSite) -> CacheFacts:
    """What is known of the cache behind an attention."""
    key, value = base_of(site.key), base_of(site.value)
    before = tuple(node for node in writes_to(key, value) if node < site.output)
    held = key.op == "placeholder" or name_of(key) in _ALLOCATIONS
    if before and held:
        shifted = any(name_of(w) == "copy_" and _has_roll(w) for w in before)
        return CacheFacts("sliding" if shifted else "static", key, value, before)
    if key.op == "placeholder" and value.op == "placeholder":
        return CacheFacts("fixed", key, value)
    if name_of(key) == "cat" and name_of(value) == "cat":
        return CacheFacts("dynamic", key, value)
    return CacheFacts("none", key, value)


def grown_from(keys: fx.Node) -> tuple[fx.Node, int] | None:
    """The input that a growing cache was before this step, and by how many positions it grew; None for others.

    What is sought is ``cat((input, new), 2)`` [B, Hkv, S, D] that the graph gives back.
    """
    if name_of(keys) != "cat":
        return None
    parts, dim = argument(keys, 0, "tensors", ()), argument(keys, 1, "dim", 0)
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or dim not in (2, -2):
        return None
    before, new = parts
    if not isinstance(before, fx.Node) or before.op != "placeholder" or value_of(keys).ndim != 4:
        return None
    added = value_of(new).shape[2]
    given_back = any(user.op == "output" for user in keys.users)
    return (before, added) if given_back and isinstance(added, int) else None


def _has_roll(write: fx.Node) -> bool:
    sources = write.args[1:2]
    return any(isinstance(s, fx.Node) and name_of(base_of(s)) == "roll" for s in sources)


def written_between(nodes: Iterable[fx.Node], start: fx.Node, end: fx.Node) -> fx.Node | None:
    """The first node after `start` and before `end` that writes the memory of any of `nodes`; None if there is none."""
    bases = {base_of(node) for node in nodes}
    node = start
    while node is not end and node.op != "root":
        if node is not start and _written(node) in bases:
            return node
        node = node.next
    return None
