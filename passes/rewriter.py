"""The one way to change a captured graph: every node made here has a value and a descent, nothing is lost.

Never call ``graph.eliminate_dead_code()`` on a Dynamo graph: cache writes are method calls whose results nobody
reads, and it deletes them. :meth:`Rewriter.erase` removes what the caller replaced, and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxopt.passes import provenance
from fxopt.passes.technique import PassError

MUTATING_FUNCTIONS = frozenset({"setitem", "__setitem__", "iadd", "isub", "imul", "itruediv"})


def writes_in_place(node: fx.Node) -> bool:
    """Whether executing `node` has an effect besides its result (in-place methods, grad mode, logging)."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return bool(node.target._schema.is_mutable)
        name = getattr(node.target, "__name__", "")
        if name in ("and_", "or_", "not_", "is_"):  # of the operator module: the underscore avoids a keyword
            return False
        if name in MUTATING_FUNCTIONS or node.kwargs.get("inplace") or "out" in node.kwargs:
            return True
        return name in ("_set_grad_enabled", "_log_api_usage_once", "_enter_autocast", "_exit_autocast") or (
            name.endswith("_") and not name.endswith("__")
        )
    return False


def is_view(node: fx.Node) -> bool:
    """Whether the result of `node` may share memory with its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _VIEWS


_VIEWS = frozenset(
    "getitem view reshape transpose permute expand expand_as unsqueeze squeeze narrow select t flatten unflatten chunk "
    "split unbind contiguous to float half bfloat16 type_as detach view_as movedim swapaxes swapdims unfold diagonal "
    "type".split()
)


class Rewriter:
    """Edits one Dynamo-level graph on behalf of one pass."""

    def __init__(self, graph: fx.Graph, pass_name: str, numbers: Iterator[int] | None = None) -> None:
        self.graph = graph
        self.pass_name = pass_name
        self.changed = False
        self.numbers = numbers if numbers is not None else itertools.count(1 + provenance.largest_id(graph))
        """Ids of the nodes to come: those of a branch go on from those of the graph around it."""
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._fake_mode: FakeTensorMode | None = None

    # -- making nodes -------------------------------------------------------------------------------------------

    def call(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        like: fx.Node | Sequence[fx.Node],
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """Insert ``target(*args, **kwargs)``; descent from `like`, value computed on fake tensors.

        Without `before` or `after` the node is put before `like` (its first, if several).
        """
        return self._make("call_function", target, args, kwargs, like, before, after, name)

    def method(
        self,
        target: str,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        like: fx.Node | Sequence[fx.Node],
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """Insert ``args[0].target(*args[1:], **kwargs)``."""
        return self._make("call_method", target, args, kwargs, like, before, after, name)

    def _make(
        self, op: str, target: Any, args: Any, kwargs: Any, like: Any, before: Any, after: Any, name: str | None
    ) -> fx.Node:
        sources = [like] if isinstance(like, fx.Node) else list(like)
        place = self.graph.inserting_after(after) if after is not None else self.graph.inserting_before(
            before if before is not None else sources[0]
        )  # fmt: skip
        with place:
            node = self.graph.create_node(op, target, tuple(args), dict(kwargs or {}), name=name)
        node.meta["example_value"] = self._value(node)
        provenance.stamp(node, sources, self.pass_name, next(self.numbers))
        self.changed = True
        return node

    def copy(self, node: fx.Node, mapping: dict[fx.Node, fx.Node], *, before: fx.Node) -> fx.Node:
        """Insert a copy of `node` whose arguments are looked up in `mapping`, with its value computed anew."""
        args = fx.map_arg(node.args, lambda n: mapping.get(n, n))
        kwargs = fx.map_arg(node.kwargs, lambda n: mapping.get(n, n))
        return self._make(node.op, node.target, args, kwargs, node, before, None, None)

    def adopt(self, node: fx.Node, like: fx.Node) -> None:
        """Give a node that was made by hand, with its value, a descent."""
        provenance.stamp(node, [like], self.pass_name, next(self.numbers))
        self.changed = True

    # -- replacing and erasing ----------------------------------------------------------------------------------

    def replace(self, old: fx.Node, new: fx.Node, *, only: Callable[[fx.Node], bool] | None = None) -> int:
        """Let users of `old` (those for which `only` holds) read `new`; returns how many did."""
        users = old.replace_all_uses_with(new, delete_user_cb=only or (lambda _: True), propagate_meta=False)
        if only is None:
            self._replaced[old] = new
        self.changed = self.changed or bool(users)
        return len(users)

    def current(self, node: fx.Node) -> fx.Node:
        """What users of `node` read by now: `node` itself, or what :meth:`replace` put in its place."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def set_argument(self, node: fx.Node, index: int, value: Any) -> None:
        """Change one positional argument and compute the node's value again."""
        node.update_arg(index, value)
        node.meta["example_value"] = self._value(node)
        self.changed = True

    def set_keyword(self, node: fx.Node, name: str, value: Any) -> None:
        """Change one keyword argument and compute the node's value again."""
        node.update_kwarg(name, value)
        node.meta["example_value"] = self._value(node)
        self.changed = True

    def erase(self, nodes: Iterable[fx.Node]) -> int:
        """Erase those of `nodes` that nobody reads, last first; returns how many went."""
        position = {n: i for i, n in enumerate(self.graph.nodes)}
        erased = 0
        for node in sorted(set(nodes), key=position.__getitem__, reverse=True):
            if not node.users and node.op != "placeholder":
                self.graph.erase_node(node)
                erased += 1
        self.changed = self.changed or bool(erased)
        return erased

    # -- values -------------------------------------------------------------------------------------------------

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The fake mode of the captured graph."""
        if self._fake_mode is None:
            for node in self.graph.nodes:
                value = node.meta.get("example_value")
                if isinstance(value, FakeTensor):
                    self._fake_mode = value.fake_mode
                    break
            else:
                raise PassError("the graph carries no fake tensors; it was not captured by Dynamo")
        return self._fake_mode

    def _value(self, node: fx.Node) -> Any:
        missing = [a.name for a in node.all_input_nodes if "example_value" not in a.meta and a.op != "get_attr"]
        if missing:
            raise PassError(f"cannot compute {node.name}: no example_value on {', '.join(missing)}")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("example_value"))
        if node.op == "call_method" and node.target == "copy_":
            return args[0]  # a plan's tensors are on devices that torch may not know, where a copy asks for a guard
        with self.fake_mode:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]


def verify(graph: fx.Graph) -> None:
    """Raise :class:`PassError` when a graph does not hold together: lint, orphans, values."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise PassError(f"the graph does not lint: {str(error).splitlines()[0][:200]}") from error
    lost = provenance.orphans(graph)
    if lost:
        raise PassError(
            f"nodes without descent (make them through the rewriter): {', '.join(n.name for n in lost[:5])}"
        )
    for node in graph.nodes:
        made_here = provenance.PASS in (node.meta.get("custom") or {})
        if made_here and "example_value" not in node.meta:
            raise PassError(f"node {node.name} has no example_value; compile caches would be bypassed")
