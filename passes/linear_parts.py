"""What one kernel may do after its products: from a linear along pointwise nodes to the one output they all lead to.

g = linear(x, Wg); s = silu(g); u = linear(x, Wu); a = s * u            g, s, u, a are one part that ends in a
y = linear(a, Wd); h = r + y; n = norm(h); ... h + ...                  y, h: h is read by two others and ends it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.epilogue import from_nodes
from fxopt.codegen.kernels.pointwise import OPERATIONS, spelling
from fxopt.passes.context import PassContext
from fxopt.passes.nodes import same, value_of

MAX_STEPS = 64
"""Nodes tried behind one linear."""
POINTWISE = frozenset(OPERATIONS) | set(
    "to float half bfloat16 type type_as iadd imul rsub dropout alpha_dropout contiguous clone detach pow clamp "
    "hardtanh relu6".split()
)
_CASTS = frozenset("to float half bfloat16 type type_as".split())


@dataclass
class Part:
    """Products that end in one output: the nodes between, and that output."""

    products: list[fx.Node]
    region: set[fx.Node]
    exit: fx.Node
    refused: str = ""
    code: str = "FX101"


class PartFinder:
    """Finds the parts of linears that share an input. `position`: of every node in the graph."""

    def __init__(self, context: PassContext, position: dict[fx.Node, int], claimed: set[fx.Node]) -> None:
        self.context = context
        self.position = position
        self.claimed = claimed
        """Nodes that belong to a norm, or to a part already, which no other part may take in."""

    def parts(self, linears: Sequence[fx.Node]) -> list[Part]:
        """The parts that one kernel may compute for `linears`, which share an input; their nodes are then claimed."""
        parts: list[Part] = []
        waiting = [Part([node], {node}, node) for node in linears]
        while waiting:
            part = waiting.pop(0)
            self._grow(part, waiting)
            self.claimed |= part.region
            parts.append(part)
        while late := self._late(parts):
            part, node = late
            parts.remove(part)
            if len(part.region) > len(part.products):
                parts += [Part([product], {product}, product) for product in part.products]
            message = f"it reads {node.name}, which comes after the first output of its group"
            self.context.missed("FX104", part.exit, message)
        return sorted(parts, key=lambda part: self.position[part.products[0]])

    def _late(self, parts: Sequence[Part]) -> tuple[Part, fx.Node] | None:
        """A part that reads something made after the first output of the family.

        The group stands where its first output stood: then whatever read any of its outputs comes after all that the
        group reads, and groups that read one another form no circle.
        """
        first = min((self.position[part.exit] for part in parts), default=0)
        for part in parts:
            for node in (n for own in part.region for n in own.all_input_nodes if n not in part.region):
                if self.position[node] >= first:
                    return part, node
        return None

    def _grow(self, part: Part, others: list[Part]) -> None:
        """Take in what follows as far as one output is left; `others` shrinks by the parts that joined."""
        region, products = set(part.region), list(part.products)
        joined: list[Part] = []
        for _ in range(MAX_STEPS):
            readers = sorted({u for n in region for u in n.users} - region, key=self.position.__getitem__)
            node = readers[0] if readers else None
            if node is None or not self._absorbable(node, part.products[0]):
                break
            for other in self._behind(node, region, [o for o in others if o not in joined]):
                joined.append(other)
                products += other.products
            region.add(node)
            exits = [n for n in region if any(user not in region for user in n.users)]
            if len(exits) != 1 or _widens(exits[0]):
                continue
            problem = self._problem(products, exits[0])
            if problem is not None:
                part.refused, part.code = problem
                continue
            part.region, part.products, part.exit, part.refused = set(region), list(products), exits[0], ""
            for other in joined:
                others.remove(other)
            joined.clear()
        self._tell_end(part)

    def _behind(self, node: fx.Node, region: set[fx.Node], others: Sequence[Part]) -> list[Part]:
        """Parts of `others` that `node` depends on through pointwise nodes; they and those nodes go into `region`."""
        earliest = min((self.position[product] for other in others for product in other.products), default=0)
        met: dict[fx.Node, bool] = {}
        found: list[Part] = []

        def leads(current: fx.Node) -> bool:
            if current in region:
                return True
            if current not in met:
                owner = next((other for other in others if current in other.region), None)
                if owner is not None:
                    found.append(owner)
                    region.update(owner.region)
                    return True
                met[current] = self.position[current] > earliest and self._absorbable(current, others[0].exit)
                if met[current]:
                    met[current] = any([leads(source) for source in current.all_input_nodes])
                if met[current]:
                    region.add(current)
            return met[current]

        for source in node.all_input_nodes if others else ():
            leads(source)
        return found

    def _tell_end(self, part: Part) -> None:
        if part.refused:
            self.context.missed(part.code, part.exit, f"what follows stays outside: {part.refused}")
        if len(part.region) > 1:
            return
        takes = [u for u in part.exit.users if self._absorbable(u, part.exit)]
        reader = next((u for u in part.exit.users if u not in takes), None)
        if takes and reader is not None:
            message = f"{takes[0].name} stays outside: {reader.name} reads {part.exit.name} too"
            self.context.missed("FX104", part.exit, message)

    def _absorbable(self, node: fx.Node, product: fx.Node) -> bool:
        value, like = value_of(node), value_of(product)
        if node.op not in ("call_function", "call_method") or spelling(node.target) not in POINTWISE:
            return False
        if node in self.claimed or not self.context.covers(node) or not isinstance(value, torch.Tensor):
            return False
        if value.ndim != like.ndim or not all(same(a, b) for a, b in zip(value.shape, like.shape, strict=True)):
            return False
        tensors = [value_of(n) for n in node.all_input_nodes]
        return all(isinstance(t, torch.Tensor) and t.device == like.device for t in tensors)

    def _problem(self, products: Sequence[fx.Node], end: fx.Node) -> tuple[str, str] | None:
        """Why `products` up to `end` are no epilogue, and the reason's code; None when they are one."""
        value = value_of(end)
        if not _lies_together(value):
            return f"{end.name} has strides {value.stride()}, kernels write rows that lie together", "FX101"
        if len({value_of(p).shape[-1] for p in products}) > 1:
            return f"{end.name} joins products of different widths", "FX101"
        try:
            from_nodes(products, [end])
        except Unsupported as reason:
            return reason.reason, "FX102" if reason.argument else "FX101"
        return None


def _widens(node: fx.Node) -> bool:
    """A cast that writes no fewer bytes than it reads: the start of what follows, and no end of a part."""
    source = value_of(node.all_input_nodes[0])
    return spelling(node.target) in _CASTS and source.dtype.itemsize <= value_of(node).dtype.itemsize


def _lies_together(value: torch.Tensor) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not same(size, 1) and not same(stride, expected):
            return False
        expected = expected * size
    return True
