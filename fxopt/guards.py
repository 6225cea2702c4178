"""What is checked in every call, and which of it a rewritten graph can do without.

Dynamo guards every tensor of the model that it captured, and Inductor's code compares the size and the strides of every
input, operand of a branch and result of an operator with what was compiled. A step of a small model has 150 of the ones
and 300 of the others, a tenth of its time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.codegen import compat

KNOWN = frozenset({"aten", "prims", "prim", "fxopt"})
"""Namespaces of operators whose fake kernels are tested to give the strides that the real ones give."""


class GuardFilter:
    """A ``guard_filter_fn`` of ``torch.compile``: it drops the guards on shape, dtype and device of unread parameters.

    What a parameter is does not matter to a graph that does not read it, and a layer that a technique took out has nine
    of them. The guards on the modules they lie in stay, so that a layer that is changed is captured again.
    """

    def __init__(self) -> None:
        self._unread: frozenset[str] = frozenset()

    def note(self, graph: fx.Graph) -> None:
        """Remember what the rewritten `graph` does not read, for the guards of the frame that is being compiled."""
        idle = [node for node in graph.find_nodes(op="placeholder") if not node.users]
        held = [n.meta.get("grapharg") for n in idle if isinstance(n.meta.get("example_value"), nn.Parameter)]
        self._unread = frozenset(compat.source_name(argument.source) for argument in held if argument is not None)

    def __call__(self, guards: Sequence[Any]) -> list[bool]:
        """Whether each of Dynamo's guards is kept; what was noted holds for one frame."""
        unread, self._unread = self._unread, frozenset()
        return [
            guard.guard_type != "TENSOR_MATCH" or compat.source_name(guard.orig_guard.originating_source) not in unread
            for guard in guards
        ]


def without_asserts(gm: fx.GraphModule) -> dict[str, Any]:
    """The Inductor setting that leaves ``assert_size_stride`` out of a graph's code; empty where the checks stay.

    Dynamo's guards cover the inputs. What is left to catch is an operator whose fake kernel is wrong, so a graph that
    holds somebody else's operator keeps them, a graph that records gradients too, and all do where
    ``TORCHINDUCTOR_SIZE_ASSERTS`` is set.
    """
    if torch.is_grad_enabled() or "TORCHINDUCTOR_SIZE_ASSERTS" in os.environ:
        return {}
    nodes = [node for module in gm.modules() if isinstance(module, fx.GraphModule) for node in module.graph.nodes]
    return {} if any(_is_foreign(node.target) for node in nodes) else {"size_asserts": False}


def _is_foreign(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in KNOWN
