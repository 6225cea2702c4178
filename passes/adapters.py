"""Low-rank adapters (LoRA) in a graph: ``base(x) + scale * up(down(drop(x)))``, with nothing bent in between.

They are left to the library: adapters come and go while a model serves, and their ranks are too thin for a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxopt.passes.nodes import name_of

_STRAIGHT = frozenset("dropout to float half bfloat16 type_as contiguous mul imul div truediv".split())


def find_adapters(graph: fx.Graph, linears: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """Linears that are part of an adapter, base included, with the words for it."""
    known = set(linears)
    found: dict[fx.Node, str] = {}
    base_of_sum: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if name_of(node) not in ("add", "iadd", "add_") or len(node.args) < 2:
            continue
        for this, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            base, up = _bare(this), _bare(other)
            base = base_of_sum.get(base, base)
            if base not in known or up not in known or base is up:
                continue
            down = _bare(up.args[0])
            if down in known and _bare(down.args[0]) is _bare(base.args[0]):
                base_of_sum[node] = base
                found[base] = f"a low-rank adapter ({down.name}, {up.name}) is added to it"
                found[down] = found[up] = f"it is a low-rank adapter of {base.name}"
    return found


def _bare(node: Any) -> Any:
    """What is under casts, dropout and multiplication by numbers."""
    while name_of(node) in _STRAIGHT:
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        if len(tensors) != 1:
            break
        node = tensors[0]
    return node
