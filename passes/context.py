"""What a pass is given besides the graph: its setting's reach, the rewriter, the structure, and an ear."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.passes.provenance import module_path, source_line, whole_place
from fxopt.passes.record import GraphRecord, KernelRecord, Remark
from fxopt.passes.rewriter import Rewriter

if TYPE_CHECKING:
    from fxopt.passes.layers import Structure


class PassContext:
    """Handed to ``Technique.rewrite(graph, context)``."""

    def __init__(
        self,
        graph: fx.Graph,
        technique: str,
        record: GraphRecord,
        *,
        covers: Callable[[fx.Node], bool] | None = None,
        origin: str = "default",
        strict: bool = False,
        disabled: frozenset[str] = frozenset(),
        in_use: frozenset[str] = frozenset(),
        around: PassContext | None = None,
        branch: str = "",
    ) -> None:
        self.graph = graph
        self.technique = technique
        self.record = record
        self.origin = origin
        """Where the setting came from, in words."""
        self.strict = strict
        self.disabled = disabled
        """Names in ``disable=(...)``, for passes that do several named things."""
        self.in_use = in_use
        """Names of all techniques that act on this graph, for rules about pairs."""
        self.branch = branch
        """The branch of a conditional that `graph` is, by the attributes that hold it; "" for a whole graph."""
        self.rewriter: Rewriter = Rewriter(graph, technique, None if around is None else around.rewriter.numbers)
        self.remarks: list[Remark] = [] if around is None else around.remarks
        self.call_wrappers: list[Callable[[Callable[..., object]], Callable[..., object]]] = []
        """Wrappers put around the compiled callable, for decisions that need a value of the call."""
        self.config_patches: dict[str, Any] = {}
        """Inductor settings that the rewritten graph needs."""
        self._covers = covers

    def inside(self, branch: str, graph: fx.Graph) -> PassContext:
        """The same setting for a branch of this graph; what is told there is told here."""
        return PassContext(
            graph, self.technique, self.record,
            covers=self._covers, origin=self.origin, strict=self.strict, disabled=self.disabled, in_use=self.in_use,
            around=self, branch=branch,
        )  # fmt: skip

    def covers(self, node: fx.Node) -> bool:
        """Whether `node` belongs to the modules that this setting was given for."""
        return self._covers is None or self._covers(node)

    # -- telling ------------------------------------------------------------------------------------------------

    def applied(self, place: fx.Node | str, message: str, *, count: int = 1, source: str = "") -> None:
        """A place was rewritten."""
        self._tell("applied", place, message, "", count, source)

    def missed(self, code: str, place: fx.Node | str, message: str, *, count: int = 1, source: str = "") -> None:
        """A place did not match; `code` names the first thing that differed."""
        self._tell("missed", place, message, code, count, source)

    def blocked(self, code: str, place: fx.Node | str, message: str, *, count: int = 1, source: str = "") -> None:
        """A place matched and a rule forbade the rewrite."""
        self._tell("blocked", place, message, code, count, source)

    def note(self, place: fx.Node | str, message: str, *, code: str = "", source: str = "") -> None:
        """Something was found out that a reader of the report wants to know."""
        self._tell("analysis", place, message, code, 1, source)

    def _tell(self, status: str, place: fx.Node | str, message: str, code: str, count: int, source: str) -> None:
        path = place if isinstance(place, str) else module_path(place)
        line = source or ("" if isinstance(place, str) else source_line(place))
        if status in ("missed", "blocked") and not path:  # of the whole graph: say at least where it begins
            path, line = whole_place(self.graph, self._covers)
        if self.branch:
            message += f" (in the branch {self.branch})"
        self.remarks.append(Remark(self.technique, status, path, message, code, line, count))

    def kernel(self, record: KernelRecord) -> None:
        """A kernel was generated for nodes of this graph; layers that share one share its record."""
        for known in self.record.kernels:
            if known.name == record.name:
                known.nodes = tuple(sorted({*known.nodes, *record.nodes}))
                known.modules = tuple(dict.fromkeys((*known.modules, *record.modules)))
                return
        self.record.kernels.append(record)

    # -- the graph ----------------------------------------------------------------------------------------------

    @cached_property
    def structure(self) -> Structure:
        """Stacks and layers of the graph as it is when first asked for."""
        from fxopt.passes.layers import find_layers

        return find_layers(self.graph)

    @cached_property
    def training(self) -> bool:
        """Whether gradients are recorded for this graph.

        A weight that is cast to the type it has is the weight itself, and requires gradients under no_grad too: what
        counts is a result that gradients flow through.
        """
        return any(
            isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf
            for node in self.graph.nodes
            if node.op in ("call_function", "call_method")
            for value in (node.meta.get("example_value"),)
        )
