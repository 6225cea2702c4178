"""Row statistics before a product: one reduction of `[M, K]` over K to `[M, 1]`, and how FX spells it.

A statistic is a step of a prologue like the pointwise ones around it. `x / x.norm(dim=-1, keepdim=True)` is

    t0 = square(x); t1 = row_sum(t0); t2 = sqrt(t1); t3 = div(x, t2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from fxopt.codegen.kernels import Unsupported


@dataclass(frozen=True)
class Reduction:
    """One reduction. `join` is a Triton format string over two float32 tiles, which it takes to one."""

    torch: Callable[..., torch.Tensor]
    """Floats [M, K] to [M, 1]."""
    join: str
    neutral: str
    """A Triton literal that changes no result; it stands where a tile lies outside of the row."""


def _wide_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


# Without propagate_nan a NaN is dropped where torch keeps it.
REDUCTIONS = {
    "row_sum": Reduction(_wide_sum, "{0} + {1}", "0.0"),
    "row_amax": Reduction(
        lambda x: x.amax(-1, keepdim=True),
        "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        'float("-inf")',
    ),
    "row_amin": Reduction(
        lambda x: x.amin(-1, keepdim=True),
        "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        'float("inf")',
    ),
}

_PARAMETERS = {
    "sum": ("input", "dim", "keepdim", "dtype"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "amax": ("input", "dim", "keepdim"),
    "amin": ("input", "dim", "keepdim"),
    "norm": ("input", "p", "dim", "keepdim", "dtype"),
    "linalg_norm": ("input", "p", "dim", "keepdim", "dtype"),
    "linalg_vector_norm": ("input", "p", "dim", "keepdim", "dtype"),
    "normalize": ("input", "p", "dim", "eps"),
}
_SYNONYMS = {"self": "input", "A": "input", "x": "input", "axis": "dim", "keepdims": "keepdim", "ord": "p"}
REDUCING = frozenset(_PARAMETERS)
"""Spellings of nodes that a row statistic is read from; `normalize` is one with the division behind it."""
SPREADING = frozenset({"expand", "expand_as", "broadcast_to"})
"""Spellings of nodes that repeat `[..., 1]` over the row, which a kernel does where it meets a row."""


class _Steps(Protocol):
    def add_step(self, op: str, args: Sequence[str | float], origin: str, dtype: str = "") -> str: ...


def add_statistic(reader: _Steps, node: fx.Node, kind: str, names: dict[fx.Node, str], origin: str) -> str:
    """Adds the steps of `node`, one of `REDUCING`, to `reader`; returns the name of its value.

    Args:
        kind: the spelling of the node's target.
        names: of the values that are there already, the node's input among them.

    Raises:
        Unsupported: a reduction over another dimension than the last or one that drops it, a norm of another order.
    """
    given = _arguments(node, kind)
    source = given["input"]
    value = source.meta.get("example_value", source.meta.get("val"))
    last = value.dim() - 1
    dims = given.get("dim", 1 if kind == "normalize" else None)
    dims = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    if len(dims) != 1 or dims[0] not in (-1, last):
        which = "all dimensions" if dims == (None,) else f"dimensions {', '.join(map(str, dims))}"
        raise Unsupported(f"{node.name} reduces {which}; a kernel reduces the last one")
    if kind != "normalize" and given.get("keepdim") is not True:
        raise Unsupported(f"{node.name} drops the dimension that it reduces; a kernel wants keepdim=True")

    def add(op: str, *args: str | float, dtype: str = "") -> str:
        return reader.add_step(op, args, origin, dtype)

    dtype, name = given.get("dtype", value.dtype), names[source]
    if dtype is not value.dtype:
        name = add("cast", name, dtype=str(dtype).removeprefix("torch."))
    if kind in ("amax", "amin"):
        return add(f"row_{kind}", name)
    if kind in ("sum", "mean"):
        total = add("row_sum", name)
        return total if kind == "sum" else add("div", total, float(value.shape[-1]))
    # torch squares and adds in float32, where float16 would overflow.
    wide = name if dtype is torch.float32 else add("cast", name, dtype="float32")
    length = _length(node, given.get("p", 2.0), wide, add)
    return length if kind != "normalize" else add("div", name, add("clamp_min", length, given.get("eps", 1e-12)))


def _arguments(node: fx.Node, kind: str) -> dict[str, Any]:
    names = _PARAMETERS[kind]
    given = dict(zip(names, node.args, strict=False))
    given |= {_SYNONYMS.get(name, name): value for name, value in node.kwargs.items()}
    given = {name: value for name, value in given.items() if value is not None}
    odd = set(given) - set(names)
    if odd or len(node.args) > len(names) or not isinstance(given.get("dtype", torch.float32), torch.dtype):
        raise Unsupported(f"{node.name}: {kind} takes {', '.join(names)} here, got {node.args} and {node.kwargs}")
    if not isinstance(given.get("input"), fx.Node) or not isinstance(given.get("eps", 1e-12), (int, float)):
        raise Unsupported(f"{node.name}: {kind} of what is no tensor, or with an eps that is no number")
    return given


def _length(node: fx.Node, order: Any, wide: str, add: Callable[..., str]) -> str:
    """The vector norm of a float32 row."""
    if order in (2, "fro"):
        return add("sqrt", add("row_sum", add("square", wide)))
    if order == 1:
        return add("row_sum", add("abs", wide))
    if order in (math.inf, -math.inf):
        return add("row_amax" if order > 0 else "row_amin", add("abs", wide))
    raise Unsupported(f"{node.name} is a norm of order {order}; a kernel computes orders 1, 2, inf and -inf")
