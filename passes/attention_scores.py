"""Reads attention that is written out: from softmax back to the product of query and key, and on to the values.

What it goes through and understands, in any order that still means scale, soft-cap, additive terms, softmax:

    matmul(q, k^T) -> * scale -> cap * tanh(. / cap) -> + bias, + mask, masked_fill, where -> [cat sinks]
        -> softmax -> [drop the sinks' column] -> cast -> dropout that does nothing -> matmul(., v)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.passes.nodes import argument, is_tensor, name_of, number_of, same, value_of

_CASTS = frozenset("to float half bfloat16 double type type_as contiguous clone".split())
_ADDITIONS = frozenset("add add_ iadd __add__ __iadd__".split())
_SUBTRACTIONS = frozenset("sub sub_ isub".split())
_PRODUCTS = frozenset("mul mul_ imul __mul__".split())
_QUOTIENTS = frozenset("div div_ truediv itruediv __truediv__".split())
_FILLS = frozenset("masked_fill masked_fill_".split())
_MATMULS = frozenset("matmul __matmul__ bmm".split())
_THROUGH = (
    _CASTS
    | _ADDITIONS
    | _SUBTRACTIONS
    | _PRODUCTS
    | _QUOTIENTS
    | _FILLS
    | {"tanh", "tanh_", "where", "max", "maximum", "view", "reshape"}
)
_DEPTH = 16


@dataclass(frozen=True)
class Bias:
    """One additive term on the scores: ``multiplier * node``, or `fill` where the bool `node` is `where`."""

    node: fx.Node
    multiplier: float = 1.0
    fill: float | None = None
    where: bool = True


@dataclass(frozen=True)
class WrittenOut:
    """Attention as it was read: query [B, Hq, T, D], key and value [B, H, S, D] as multiplied, output [B, Hq, T, D]."""

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    biases: tuple[Bias, ...]
    soft_cap: float
    sinks: fx.Node | None
    interior: tuple[fx.Node, ...]


class Differs(Exception):
    """The first thing that is not as in attention: a reason code of passes/reasons.py and a message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def leads_to_product(node: Any, depth: int = 0) -> bool:
    """Whether scores (a product of two matrices) are found below `node` through operations that scores go through."""
    if not isinstance(node, fx.Node) or depth > _DEPTH or not isinstance(value_of(node), torch.Tensor):
        return False
    name = name_of(node)
    if name in _MATMULS:
        # A weight on the right makes a linear layer, such as a router of experts.
        return value_of(node).ndim >= 3 and getattr(value_of(argument(node, 1, "other")), "ndim", 0) >= 3
    if name == "baddbmm":
        return getattr(value_of(argument(node, 2, "batch2")), "ndim", 0) >= 3
    if name == "cat":
        parts = argument(node, 0, "tensors")
        return bool(parts) and leads_to_product(parts[0], depth + 1)
    return name in _THROUGH and any(leads_to_product(a, depth + 1) for a in node.args)


def read_written_out(softmax: fx.Node) -> WrittenOut | None:
    """The attention around a softmax; None where its input is no scores at all; raises :class:`Differs`."""
    scores = argument(softmax, 0, "input")
    if not leads_to_product(scores):
        return None
    dims = value_of(softmax).ndim
    dim = argument(softmax, 1, "dim")
    if dim not in (-1, dims - 1):
        raise Differs("FX102", f"softmax runs over dimension {dim}, not over the keys")
    if dims != 4:
        raise Differs("FX102", f"scores have {dims} dimensions, not [B, H, T, S]")
    chain = _Scores(softmax)
    chain.read(scores)
    output, weights = _weights(softmax, chain)
    value = argument(output, 1, "other")
    if not is_tensor(value, 4):
        raise Differs("FX102", "the values have other than 4 dimensions")
    query, key = chain.operands()
    interior = (*chain.nodes, *weights)
    return WrittenOut(
        output, query, key, value, chain.outer, tuple(chain.biases), chain.soft_cap, chain.sinks, interior
    )


class _Scores:
    """Reads the scores from softmax inwards, and keeps what it went through."""

    def __init__(self, softmax: fx.Node) -> None:
        self.nodes: list[fx.Node] = [softmax]
        self.product: fx.Node = softmax
        self.outer = 1.0  # what was multiplied onto the scores so far, seen from softmax
        self.soft_cap = 0.0
        self.biases: list[Bias] = []
        self.sinks: fx.Node | None = None
        self.sink_column = False

    def read(self, node: Any) -> None:
        """Walk to the product of query and key; raises :class:`Differs`."""
        for _ in range(_DEPTH):
            name = name_of(node)
            assert isinstance(node, fx.Node)
            if name in _MATMULS:
                self._take(node)
                self.product = node
                return
            node = self._step(node, name)
        raise Differs("FX101", "more operations between the scores and softmax than expected")

    def _take(self, node: fx.Node, users: int = 1) -> None:
        if len(node.users) != users:
            others = [u.name for u in node.users if u not in self.nodes]
            raise Differs("FX104", f"the scores {node.name} are also read by {', '.join(others[:3])}")
        self.nodes.append(node)

    def _step(self, node: fx.Node, name: str) -> Any:
        if not value_of(node).is_floating_point():
            raise Differs("FX201", f"the scores become {value_of(node).dtype}")
        if name in _CASTS:
            self._take(node)
            return node.args[0]
        if name in _PRODUCTS or name in _QUOTIENTS:
            self._take(node)
            return self._factor(node, name)
        if name in ("tanh", "tanh_"):
            if self.soft_cap:
                raise Differs("FX101", "tanh is applied twice")
            self._take(node)
            self.soft_cap = self.outer
            return node.args[0]
        if name in _ADDITIONS:
            self._take(node)
            return self._addition(node)
        if name in _FILLS or name == "where":
            self._take(node)
            return self._fill(node, name)
        if name in _SUBTRACTIONS:
            return self._without_maximum(node)
        if name == "cat":
            return self._with_sinks(node)
        raise Differs("FX101", f"{name or node.op} between the scores and softmax")

    def _factor(self, node: fx.Node, name: str) -> Any:
        a, b = node.args[0], node.args[1]
        if name in _PRODUCTS and number_of(a) is not None:
            a, b = b, a
        factor = number_of(b)
        if factor is None or factor == 0.0 or not isinstance(a, fx.Node):
            raise Differs("FX103", "the scores are scaled by a tensor")
        self.outer *= factor if name in _PRODUCTS else 1.0 / factor
        return a

    def _addition(self, node: fx.Node) -> Any:
        a, b = node.args[0], node.args[1]
        if node.kwargs.get("alpha", 1) != 1:
            raise Differs("FX102", "an addition to the scores has alpha")
        if self.soft_cap:
            raise Differs("FX101", "a bias is added inside of the soft-cap")
        leads = [leads_to_product(x) for x in (a, b)]
        if all(leads):
            raise Differs("FX101", "two products are added before softmax")
        inner, bias = (a, b) if leads[0] else (b, a)
        if not isinstance(bias, fx.Node):
            return inner  # a constant added to all scores changes no softmax
        self.biases.append(Bias(bias, self.outer))
        return inner

    def _fill(self, node: fx.Node, name: str) -> Any:
        if name == "where":
            mask, a, b = node.args[:3]
            hides = leads_to_product(b)  # where(mask, low, scores)
            inner, low = (b, a) if hides else (a, b)
        else:
            inner, mask, low = node.args[0], argument(node, 1, "mask"), argument(node, 2, "value")
            hides = True
        dtype = value_of(node).dtype
        if isinstance(low, fx.Node) and name_of(low) in ("full", "tensor", "full_like"):
            low = argument(low, 1, "fill_value") if name_of(low) != "tensor" else argument(low, 0, "data")
        number = number_of(low)
        if number is None or number > torch.finfo(dtype).min or self.soft_cap or self.outer != 1.0:
            raise Differs("FX103", "scores are replaced by something that is not the lowest number of their dtype")
        if not isinstance(mask, fx.Node) or value_of(mask).dtype != torch.bool:
            raise Differs("FX102", "the mask of a fill is not bool")
        self.biases.append(Bias(mask, fill=number, where=hides))
        return inner

    def _without_maximum(self, node: fx.Node) -> Any:
        # x - max(x) before softmax changes nothing.
        inner: Any = node.args[0]
        top: Any = node.args[1]
        picks_values = isinstance(top, fx.Node) and name_of(top) == "getitem" and top.args[1] == 0
        source = top.args[0] if picks_values else top
        if name_of(source) not in ("max", "amax") or not isinstance(source, fx.Node) or source.args[0] is not inner:
            raise Differs("FX101", "something is subtracted from the scores")
        if argument(source, 1, "dim") not in (-1, 3) or not argument(source, 2, "keepdim", False):
            raise Differs("FX101", "a maximum over other than the keys is subtracted from the scores")
        for extra in {node, top, source}:
            self._take(extra)
        if name_of(inner) == "cat":
            return self._with_sinks(inner, users=2)
        raise Differs("FX104", "the scores are also read for their maximum")

    def _with_sinks(self, node: Any, users: int = 1) -> Any:
        parts = argument(node, 0, "tensors")
        if argument(node, 1, "dim", 0) not in (-1, 3) or len(parts) != 2 or len(self.nodes) > 1 + 3:
            raise Differs("FX101", "scores are concatenated with something else than a column of sinks")
        inner, column = parts
        self._take(node, users)
        self.sinks = _sinks_of(column)
        self.nodes.append(column)
        if self.biases or self.outer != 1.0 or self.soft_cap:
            raise Differs("FX101", "the sinks' column is changed before softmax")
        self.sink_column = True
        return inner

    def operands(self) -> tuple[fx.Node, fx.Node]:
        """(query [B, H, T, D], key [B, H, S, D])."""
        query: Any = self.product.args[0]
        transposed: Any = argument(self.product, 1, "other")
        if not (is_tensor(query, 4) and is_tensor(transposed, 4)):
            raise Differs("FX102", "queries or keys have other than 4 dimensions")
        name = name_of(transposed)
        if name in ("transpose", "swapaxes", "swapdims") and {d % 4 for d in transposed.args[1:3]} == {2, 3}:
            return query, transposed.args[0]
        if name == "getattr" and transposed.args[1] == "mT":
            return query, transposed.args[0]
        if name == "permute":
            order = transposed.args[1] if isinstance(transposed.args[1], (tuple, list)) else transposed.args[1:]
            if tuple(d % 4 for d in order) == (0, 1, 3, 2):
                return query, transposed.args[0]
        raise Differs("FX202", f"the keys {transposed.name} arrive transposed, [B, H, D, S]")


def _sinks_of(column: Any) -> fx.Node:
    """The parameter [H] behind a column [B, H, T, 1] that repeats it."""
    node = column
    while name_of(node) in ("expand", "reshape", "view", "repeat", "to", "unsqueeze", "getitem", "float", "type_as"):
        below = node.args[0]
        if value_of(below).ndim == 1:
            heads = value_of(column).shape[1]
            shape = value_of(node).shape
            if same(value_of(below).shape[0], heads) and len(shape) == 4 and tuple(shape)[1] == heads:
                return below
        node = below
    raise Differs("FX101", "the extra column of the scores is no parameter per head")


def _weights(softmax: fx.Node, chain: _Scores) -> tuple[fx.Node, list[fx.Node]]:
    """(the product with the values, nodes from softmax to it)."""
    node = softmax
    nodes: list[fx.Node] = []
    dropped_column = False
    for _ in range(8):
        if len(node.users) != 1:
            others = ", ".join(u.name for u in list(node.users)[:3])
            raise Differs("FX104", f"the attention weights {node.name} are read by {others or 'nobody'}")
        (user,) = node.users
        name = name_of(user)
        if name in _MATMULS:
            if user.args[0] is not node:
                raise Differs("FX101", "the attention weights are the right-hand side of the product")
            if chain.sink_column and not dropped_column:
                raise Differs("FX101", "the sinks' column has values")
            return user, [*nodes, user]
        if name == "dropout" or name == "dropout_":
            if argument(user, 2, "training", True) and argument(user, 1, "p", 0.5) != 0.0:
                raise Differs("FX205", "attention dropout is active")
        elif name == "getitem" and chain.sink_column and _drops_last(user.args[1]):
            dropped_column = True
        elif name not in _CASTS:
            where = "returned by the graph" if user.op == "output" else f"read by {name or user.name}"
            raise Differs("FX104", f"the attention weights are {where}")
        if not value_of(user).is_floating_point():
            raise Differs("FX201", f"the attention weights become {value_of(user).dtype}")
        nodes.append(user)
        node = user
    raise Differs("FX101", "more operations between softmax and the values than expected")


def _drops_last(index: Any) -> bool:
    last = index[-1] if isinstance(index, tuple) else None
    rest = index[:-1] if isinstance(index, tuple) else ()
    return last == slice(None, -1, None) and all(i is Ellipsis or i == slice(None, None, None) for i in rest)
