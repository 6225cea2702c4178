"""Guards that a rewritten graph can do without: those on parameters that nothing reads any more.

Dynamo guards every tensor of the model that it captured, and looks at all of them before each call, also at those of
layers that a technique took out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fxopt.codegen import compat


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
