"""The pointwise operations an epilogue may hold: how FX spells each, what it means in torch, how Triton says it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Pointwise:
    """One operation. `triton` is a format string over its arguments, which are names or literals of float32 values."""

    torch: Callable[..., torch.Tensor]
    triton: str
    arity: int
    boolean: bool = False
    """Whether the result is a truth value."""
    takes_boolean: tuple[int, ...] = ()
    """Positions of arguments that are truth values."""


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


# tl.maximum drops a NaN where torch keeps it, hence tl.where or an explicit propagate_nan. tanh is written with sigmoid
# because libdevice exists neither in the interpreter nor on AMD; its absolute error is one float32 rounding.
OPERATIONS: dict[str, Pointwise] = {
    "add": Pointwise(operator.add, "{0} + {1}", 2),
    "sub": Pointwise(operator.sub, "{0} - {1}", 2),
    "mul": Pointwise(operator.mul, "{0} * {1}", 2),
    "div": Pointwise(operator.truediv, "{0} / {1}", 2),
    "maximum": Pointwise(torch.maximum, "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)", 2),
    "minimum": Pointwise(torch.minimum, "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)", 2),
    "neg": Pointwise(torch.neg, "-{0}", 1),
    "abs": Pointwise(torch.abs, "tl.abs({0})", 1),
    "square": Pointwise(torch.square, "{0} * {0}", 1),
    "cube": Pointwise(lambda x: x**3, "{0} * {0} * {0}", 1),
    "exp": Pointwise(torch.exp, "tl.exp({0})", 1),
    "log": Pointwise(torch.log, "tl.log({0})", 1),
    "sqrt": Pointwise(torch.sqrt, "tl.sqrt({0})", 1),
    "rsqrt": Pointwise(torch.rsqrt, "tl.rsqrt({0})", 1),
    "reciprocal": Pointwise(torch.reciprocal, "1.0 / {0}", 1),
    "erf": Pointwise(torch.erf, "tl.erf({0})", 1),
    "sin": Pointwise(torch.sin, "tl.sin({0})", 1),
    "cos": Pointwise(torch.cos, "tl.cos({0})", 1),
    "sigmoid": Pointwise(torch.sigmoid, "tl.sigmoid({0})", 1),
    "tanh": Pointwise(torch.tanh, "2.0 * tl.sigmoid(2.0 * {0}) - 1.0", 1),
    "relu": Pointwise(F.relu, "tl.where({0} < 0.0, 0.0, {0})", 1),
    "silu": Pointwise(F.silu, "{0} * tl.sigmoid({0})", 1),
    "gelu": Pointwise(F.gelu, "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))", 1),
    # 0.5 * (1 + tanh(u)) is sigmoid(2 * u).
    "gelu_tanh": Pointwise(_gelu_tanh, "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))", 1),
    "leaky_relu": Pointwise(F.leaky_relu, "tl.where({0} < 0.0, {1} * {0}, {0})", 2),
    "clamp_min": Pointwise(torch.clamp_min, "tl.where({0} < {1}, {1}, {0})", 2),
    "clamp_max": Pointwise(torch.clamp_max, "tl.where({0} > {1}, {1}, {0})", 2),
    "where": Pointwise(torch.where, "tl.where({0}, {1}, {2})", 3, takes_boolean=(0,)),
    "lt": Pointwise(operator.lt, "{0} < {1}", 2, boolean=True),
    "le": Pointwise(operator.le, "{0} <= {1}", 2, boolean=True),
    "gt": Pointwise(operator.gt, "{0} > {1}", 2, boolean=True),
    "ge": Pointwise(operator.ge, "{0} >= {1}", 2, boolean=True),
    "eq": Pointwise(operator.eq, "{0} == {1}", 2, boolean=True),
    "ne": Pointwise(operator.ne, "{0} != {1}", 2, boolean=True),
    "logical_and": Pointwise(torch.logical_and, "{0} & {1}", 2, boolean=True, takes_boolean=(0, 1)),
    "logical_or": Pointwise(torch.logical_or, "{0} | {1}", 2, boolean=True, takes_boolean=(0, 1)),
    "logical_not": Pointwise(torch.logical_not, "({0} == 0)", 1, boolean=True, takes_boolean=(0,)),
}

_SPELLINGS = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "and_": "logical_and",
    "or_": "logical_or",
    "invert": "logical_not",
    "greater": "gt",
    "less": "lt",
    "_to_copy": "to",
    "convert_element_type": "to",
    "clip": "clamp",
}

_HOMES = {
    "torch", "torch.functional", "torch.nn.functional", "torch._C", "torch._C._nn", "torch._C._linalg", "_operator",
}  # fmt: skip


def spelling(target: Any) -> str | None:
    """The plain name of an FX target: `operator.add`, `torch.add`, `"add"` and `aten.add.Tensor` all give `"add"`.

    None for what is not an operation of torch, a tensor method or a core ATen overload.
    """
    name: str | None = None
    if isinstance(target, str):
        name = target
    elif isinstance(target, torch._ops.OpOverload):
        space, _, plain = target._schema.name.partition("::")
        name = plain if space in ("aten", "prims") else None
    elif callable(target):
        plain = getattr(target, "__name__", "")
        known = getattr(target, "__module__", None) in _HOMES
        name = plain if known or getattr(operator, plain, None) is target else None
    if name is None:
        return None
    return _SPELLINGS.get(name, name)
