"""What a mask hides, by evaluating it: a mask that the graph builds from constants has one value, which is read.

A mask that depends on an input (a padding mask, or a decode mask handed in whole) is not guessed at. Its read extent is
computed on the device each step instead, see :func:`read_extent_node`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxopt.passes.kv import writes_to
from fxopt.passes.nodes import name_of, value_of
from fxopt.passes.rewriter import Rewriter

LARGEST = 1 << 27
"""Elements of the largest mask that is evaluated while compiling."""

_PURE = frozenset(
    "arange zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like tensor add sub mul neg floordiv "
    "mod remainder truediv div le lt ge gt eq ne and_ or_ xor invert __and__ __or__ __invert__ bitwise_and bitwise_or "
    "bitwise_not logical_and logical_or logical_not where getitem cumsum diff expand expand_as unsqueeze squeeze view "
    "reshape transpose permute to bool long int float type contiguous clone tril triu masked_fill repeat any all abs "
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ "
    "maximum minimum clamp cat stack broadcast_to t flatten size getattr finfo ceil floor log min max sum".split()
)


_SIZE_ONLY = frozenset("new_zeros new_ones new_full zeros_like ones_like full_like".split())


@dataclass(frozen=True)
class MaskFacts:
    """What is known of a mask over T queries and S keys.

    ``kind``: ``"full"`` (hides nothing), ``"causal"``, ``"window"`` (causal, and only the last `window` keys),
    ``"constant"`` (known, of no named shape), ``"input"`` (depends on an input of the graph), ``"unknown"``.
    ``offset``: the key position of the first query, where causal.
    """

    kind: str
    window: int = 0
    offset: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == "window":
            return f"causal with a window of {self.window} keys"
        return self.kind + (f" ({self.reason})" if self.reason else "")


def facts_of(mask: fx.Node, *, hides: bool = False) -> MaskFacts:
    """What `mask`, bool or additive with [..., T, S], hides; ``hides``: a bool mask is True where a key is masked."""
    value = value_of(mask)
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return MaskFacts("unknown", reason="not [..., T, S]")
    try:
        # A dry run works on fake tensors; constants are evaluated for real there too.
        with unset_fake_temporarily():
            known = constant_value(mask)
            return classify(~known if hides else known)
    except NotConstant as reason:
        kind = "input" if reason.placeholder else "unknown"
        return MaskFacts(kind, reason=str(reason))


def classify(mask: torch.Tensor) -> MaskFacts:
    """The shape of a mask [..., T, S] that is known: bool, or additive with nothing but zero and masked."""
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min
        if bool((~hidden & (mask != 0)).any()):
            return MaskFacts("constant", reason="an additive bias")
        mask = ~hidden
    tokens, length = mask.shape[-2:]
    one = mask.reshape(-1, tokens, length)
    if one.shape[0] == 0 or tokens == 0 or length == 0:
        return MaskFacts("unknown", reason="empty")
    if bool((one != one[:1]).any()):
        return MaskFacts("constant", reason="differs between rows of the batch")
    rows = one[0]
    if bool(rows.all()):
        return MaskFacts("full")
    reach = torch.where(rows, torch.arange(1, length + 1), 0).amax(-1) - 1
    offset = int(reach[0])
    position = offset + torch.arange(tokens)[:, None]
    key = torch.arange(length)
    causal = key <= position
    if bool((rows == causal).all()):
        return MaskFacts("causal", offset=offset)
    if offset < 0:
        return MaskFacts("constant", reason="hides whole rows")
    window = int(rows[-1].sum())
    if bool((rows == (causal & (key > position - window))).all()):
        return MaskFacts("window", window=window, offset=offset)
    return MaskFacts("constant", reason="no causal, window or full structure")


class NotConstant(Exception):
    """A value that depends on something besides constants; ``placeholder`` when that is an input."""

    def __init__(self, reason: str, placeholder: bool = False) -> None:
        super().__init__(reason)
        self.placeholder = placeholder


def ancestors(node: fx.Node) -> list[fx.Node]:
    """`node` and everything it is computed from, inputs first."""
    order: dict[fx.Node, None] = {}
    pending: list[tuple[fx.Node, bool]] = [(node, False)]
    while pending:
        current, ready = pending.pop()
        if ready:
            order.setdefault(current)
        elif current not in order:
            pending.append((current, True))
            pending += [(a, False) for a in _read_by(current) if a not in order]
    return list(order)


def _read_by(node: fx.Node) -> list[fx.Node]:
    """Inputs whose values matter to `node`; ``x.new_ones(...)`` looks at the dtype and size of x alone."""
    return node.all_input_nodes[1:] if name_of(node) in _SIZE_ONLY else node.all_input_nodes


def constant_value(node: fx.Node) -> torch.Tensor:
    """The value of a node that is computed from constants alone, on the CPU; raises :class:`NotConstant`."""
    line = ancestors(node)
    for current in line:
        value = value_of(current)
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        if current.op == "placeholder" and isinstance(value, torch.Tensor):
            raise NotConstant(f"depends on the input {current.name}", placeholder=True)
        if any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes):
            raise NotConstant("its size is symbolic")
        if name_of(current) not in _PURE:
            raise NotConstant(f"depends on {name_of(current) or current.op}")
        if isinstance(value, torch.Tensor) and value.numel() > LARGEST:
            raise NotConstant(f"{value.numel()} elements are too many to evaluate")
        if isinstance(value, torch.Tensor) and writes_to(current):
            raise NotConstant(f"{current.name} is written in place")
    results: dict[fx.Node, Any] = {}
    for current in line:
        args, kwargs = fx.map_arg((current.args, current.kwargs), lambda n: results.get(n, n))
        if name_of(current) in _SIZE_ONLY and isinstance(args[0], fx.Node):
            like = value_of(args[0])
            args = (torch.empty((), dtype=like.dtype).expand(like.shape), *args[1:])
        args, kwargs = _on_cpu(args), _on_cpu(kwargs)
        if current.op == "call_method":
            results[current] = getattr(args[0], str(current.target))(*args[1:], **kwargs)
        else:
            results[current] = current.target(*args, **kwargs)  # type: ignore[operator]
    return results[node]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(v) for v in value)
    return {k: _on_cpu(v) for k, v in value.items()} if isinstance(value, dict) else value


def read_extent_node(mask: fx.Node, rewriter: Rewriter, *, like: fx.Node) -> fx.Node:
    """Nodes before `like` that compute :func:`fxopt.codegen.ops.attention.read_extent` of `mask`: 0-d int64."""
    value = value_of(mask)
    length = value.shape[-1]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return rewriter.call(target, args, kwargs, like=like, before=like)

    if not isinstance(length, int):
        length = rewriter.method("size", (mask, -1), like=like, before=like)
    visible = mask if value.dtype == torch.bool else call(torch.gt, mask, torch.finfo(value.dtype).min)
    steps = call(torch.arange, length, device=value.device)
    reach = call(torch.amax, call(torch.where, visible, call(torch.add, steps, 1), 0), -1)
    # A row with nothing unmasked keeps the full extent.
    whole = call(torch.where, call(torch.eq, reach, 0), length, reach)
    return call(torch.amax, whole)
