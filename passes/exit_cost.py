"""What an exit costs and when it pays, from the weights it reads. In decoding, time goes with the bytes of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.passes import depth
from fxopt.passes.exit_check import Check, Head
from fxopt.passes.layers import Layer


@dataclass(frozen=True)
class ExitCost:
    """Bytes of weights: of the check at an exit, of the layers after it, of the caches it still fills, of the head."""

    after: int
    layers: int
    check: int
    remaining: int
    policy: int
    head: int
    reused: bool
    """The check's logits are the result when the exit is taken: the head does not run again."""

    @property
    def saved(self) -> int:
        """Bytes not read when the exit is taken, against the whole model."""
        return self.remaining - self.policy + (self.head if self.reused else 0)

    @property
    def break_even(self) -> float:
        """Fraction of the steps that reach this exit which has to take it, so that nothing is lost."""
        return self.check / self.saved if self.saved > 0 else float("inf")

    def __str__(self) -> str:
        layer = max(1.0, self.remaining / (self.layers - self.after))
        pays = (
            f"it pays from {self.break_even:.0%} of the steps on"
            if self.break_even <= 1
            else "it can never pay: use confidence='state' or a shortlist"
        )
        return (
            f"exit after {self.after} of {self.layers} layers: its check reads {_bytes(self.check)} of weights "
            f"({self.check / layer:.2f} layers), taking it saves {_bytes(self.saved)} ({self.saved / layer:.2f} "
            "layers) and "
            f"still fills the caches ({self.policy / layer:.2f}); {pays}"
        )


def exit_cost(
    after: int, layers: Sequence[Layer], sizes: Sequence[int], head: Head | None, check: Check, policy: int
) -> ExitCost:  # fmt: skip
    """The cost of one exit; `sizes` are the bytes of each layer as it was captured, `policy` those read for caches."""
    return ExitCost(
        after=after,
        layers=len(layers),
        check=weight_bytes(check.nodes),
        remaining=sum(sizes[after:]),
        policy=policy,
        head=weight_bytes(head.nodes) if head is not None else 0,
        reused=check.logits is not None,
    )


def weight_bytes(nodes: Iterable[fx.Node]) -> int:
    """Bytes of the parameters that `nodes` read, each counted once."""
    sizes: dict[fx.Node, int] = {}
    for node in nodes:
        for weight in node.all_input_nodes:
            tensor = depth.value(weight)
            if isinstance(tensor, torch.nn.Parameter) and all(isinstance(s, int) for s in tensor.shape):
                read = depth.value(node) if node.target in ("narrow", "index_select") else tensor
                # Rows that are gathered are read, written and read again.
                times = 3 if node.target == "index_select" else 1
                sizes[weight] = max(sizes.get(weight, 0), times * read.numel() * tensor.element_size())
    return sum(sizes.values())


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
