"""What one kernel may do before its products: a norm, or pointwise nodes with at most one row statistic.

    n = norm(h); q = linear(n, Wq)                                          the norm
    a = silu(gate) * up; y = linear(a, Wd)                                  a prologue: silu, mul
    s = abs(x); m = amax(s, -1, keepdim); a = x / m; y = linear(a, W)       a prologue: abs, amax, div

A kernel reads its rows once ahead of the product for the statistic. It computes one; a second stays outside, with a
remark.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.epilogue import Step, dtype_name
from fxopt.codegen.kernels.pointwise import spelling
from fxopt.codegen.kernels.prologue import NormMatch, PointwiseMatch, match_norm, match_pointwise
from fxopt.codegen.kernels.row_statistic import REDUCING, SPREADING
from fxopt.passes.context import PassContext
from fxopt.passes.linear_parts import MAX_STEPS, POINTWISE
from fxopt.passes.nodes import same, value_of

PROLOGUE_ROWS = 16
"""Rows up to which pointwise nodes before a linear go inside. Every program computes them for its own columns of the
weights: 16 rows cost a quarter of the time that their weights take to arrive, 64 rows as much as all of it."""
PROLOGUE_STEPS = 12
_NORMS = frozenset("layer_norm rms_norm group_norm".split())
_TWICE = frozenset("var std var_mean std_mean logsumexp softmax log_softmax".split())
"""What reduces a row twice, the second time with the result of the first."""
STATISTICS = REDUCING | _NORMS | _TWICE | {"max", "min", "vector_norm", "prod"}
"""What makes one number of a row, or has one inside."""
_OTHER = "round floor ceil trunc sign fmod remainder nan_to_num log1p expm1 softplus".split()
BETWEEN = POINTWISE | SPREADING | set(_OTHER)
"""What may stand between a row statistic and a linear."""


class Before:
    """A norm directly before linears that share an input, and pointwise nodes before it, or before them without one.

    x: what `linears` read, `rows` of it. They are found in two steps, since what follows a product belongs to that.
    """

    def __init__(self, context: PassContext, x: fx.Node, linears: Sequence[fx.Node], rows: Any) -> None:
        self.context, self.x, self.linears, self.rows = context, x, linears, rows
        self.norm: NormMatch | None = None
        self.pointwise: PointwiseMatch | None = None
        self._no_norm = ""
        self._refused: tuple[str, fx.Node, str] | None = None

    @property
    def norm_nodes(self) -> tuple[fx.Node, ...]:
        return self.norm.nodes if self.norm is not None else ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (*(self.pointwise.nodes if self.pointwise is not None else ()), *self.norm_nodes)

    @property
    def normed(self) -> fx.Node:
        """What the norm reads; where there is none, what the linears read."""
        return self.norm.x if self.norm is not None else self.x

    @property
    def source(self) -> fx.Node:
        """What the kernel reads."""
        return self.pointwise.x if self.pointwise is not None else self.normed

    @property
    def operands(self) -> list[fx.Node]:
        """Nodes of `FusedLinear.extras` that stand before the products: gamma, beta, the prologue's."""
        own = [] if self.norm is None else [p for p in (self.norm.gamma, self.norm.beta) if p is not None]
        return own + ([] if self.pointwise is None else list(self.pointwise.extras))

    # -- the norm -----------------------------------------------------------------------------------------------

    def find_norm(self) -> None:
        """Fills `norm`; why one stays outside is told later, as its nodes may still be taken one by one."""
        try:
            match = match_norm(self.x)
        except Unsupported as reason:
            self._no_norm = reason.reason
            return
        like = value_of(self.x)
        read = [value_of(p) for p in (match.x, match.gamma, match.beta) if p is not None]
        if not all(isinstance(t, torch.Tensor) and t.device == like.device for t in read):
            self._no_norm = "it reads what does not lie on its device"
            return
        if read[0].ndim != like.ndim or not all(map(same, read[0].shape, like.shape)):
            self._no_norm = "it reads another shape than it makes"
            return
        odd = {t.dtype for t in read}
        if odd != {like.dtype}:
            dtypes = ", ".join(sorted(map(dtype_name, odd)))
            message = f"the norm reads {dtypes} and the linears {dtype_name(like.dtype)}; it stays outside"
            self._refused = ("FX201", self.x, message)
            return
        own = {*match.nodes, *self.linears}
        for node in match.nodes:
            reader = next((user for user in node.users if user not in own), None)
            if reader is not None:
                message = f"the norm stays outside of the group: {reader.name} reads {node.name} too"
                self._refused = ("FX104", self.x, message)
                return
        self.norm = match

    # -- pointwise nodes ----------------------------------------------------------------------------------------

    def find_pointwise(self, claimed: Collection[fx.Node]) -> None:
        """Fills `pointwise` with nodes that are not `claimed` by other groups; a statistic outside gets a remark."""
        self.pointwise, problem = self._pointwise(claimed)
        if self._refused is not None:
            if self._computed is None:
                self.context.missed(*self._refused)
            return
        statistic = self._outside(claimed)
        if statistic is not None:
            name = str(spelling(statistic.target))
            message = f"the {name} before it stays outside: {self._why_outside(name, problem)}"
            self.context.missed("FX101", self.linears[0], message)

    @property
    def _computed(self) -> Step | None:
        """The row statistic among the pointwise nodes."""
        return self.pointwise.prologue.statistic if self.pointwise is not None else None

    def _pointwise(self, claimed: Collection[fx.Node]) -> tuple[PointwiseMatch | None, str]:
        """The nodes, or what was the matter with them or with more of them."""
        readers = {*self.linears, *self.norm_nodes}
        if any(user not in readers for user in self.normed.users):
            return None, ""
        if not isinstance(self.rows, int) or self.rows > PROLOGUE_ROWS:
            return None, f"{self.rows} rows, and every program would compute it; up to {PROLOGUE_ROWS} that is cheap"
        first = ""
        for statistic in (True, False) if self.norm is None else (False,):
            found, problem = self._match(claimed, statistic)
            first = first or problem
            if found is not None:
                return found, first
        return None, first

    def _match(self, claimed: Collection[fx.Node], statistic: bool) -> tuple[PointwiseMatch | None, str]:
        value = value_of(self.normed)
        whole, narrow = tuple(value.shape), (*value.shape[:-1], 1)

        def takes(node: fx.Node) -> bool:
            made, kind = value_of(node), _kind(node)
            return (
                (kind in POINTWISE or (statistic and kind in REDUCING | SPREADING))
                and node not in claimed and self.context.covers(node)
                and isinstance(made, torch.Tensor) and made.device == value.device
                and (tuple(made.shape) == whole or (statistic and tuple(made.shape) == narrow))
            )  # fmt: skip

        try:
            found = match_pointwise(self.normed, takes)
        except Unsupported as problem:
            return None, problem.reason
        tensors = [value_of(extra) for extra in found.extras]
        if any(not isinstance(t, torch.Tensor) or t.device != value.device for t in tensors):
            return None, "it reads what does not lie on its device"
        if value.dtype != value_of(self.x).dtype:
            return None, f"it ends in {dtype_name(value.dtype)}"
        steps = len(found.prologue.steps)
        if not 0 < steps <= PROLOGUE_STEPS:
            return None, f"{steps} steps, and every program would compute them; up to {PROLOGUE_STEPS} that is cheap"
        # Whatever computes the first statistic may compute the second where it has the row at hand.
        if found.prologue.statistic is not None and _kind(found.x) in STATISTICS:
            return None, f"the {_kind(found.x)} that it reads is a row statistic too; a kernel computes one"
        return found, found.refused

    # -- row statistics that stay outside -----------------------------------------------------------------------

    def _outside(self, claimed: Collection[fx.Node]) -> fx.Node | None:
        """A row statistic outside that leads to the linears through nodes that nobody else reads; None without one."""
        own, seen = set(self.nodes), {*self.linears, *self.norm_nodes}
        waiting = [self.normed]
        while waiting and len(seen) <= MAX_STEPS:
            node = waiting.pop(0)
            if node in seen or node in claimed or any(user not in seen for user in node.users):
                continue
            seen.add(node)
            if _kind(node) in STATISTICS and node not in own:
                return node
            if _kind(node) in BETWEEN or node in own:
                waiting += node.all_input_nodes
        return None

    def _why_outside(self, name: str, problem: str) -> str:
        if self.norm is not None:
            return "a kernel computes one row statistic, and the norm after it is one"
        if name in _TWICE:
            return "it reduces a row twice; a kernel computes one row statistic"
        if self._computed is not None:
            return "a kernel computes one row statistic, and has another"
        if name in _NORMS:
            return self._no_norm
        return problem if name in REDUCING and problem else "no kernel computes it"


def _kind(node: fx.Node) -> str | None:
    return spelling(node.target) if node.op in ("call_function", "call_method") else None
