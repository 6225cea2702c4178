"""Reading nodes of Dynamo's graph without caring how a call was written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def name_of(node: Any) -> str:
    """What a node calls, whether as function, method or operator: ``torch.add``, ``x.add`` and ``x + y`` are "add"."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def value_of(node: Any) -> Any:
    """The fake value of a node, or the constant itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols; installs no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else bool(statically_known_true(a == b))


def number_of(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def is_tensor(node: Any, dims: int) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.ndim == dims
