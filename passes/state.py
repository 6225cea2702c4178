"""State that follows a KV cache: explicit inputs of the graph, looked up at each call by the cache's key tensor.

    state = add_state(rewriter, keys, ("pages", 16), {"bounds": (shape, dtype)}, like=...)   # in a pass: placeholders
    run = wrapper(graph)(compiled)                                                    # the backend: hands them over

State lives exactly as long as the key tensor it was made for (a weak table, so that it goes with the cache) and
carries its filled length, a tensor, which the operators that keep it compare with the cache's own: where the two do
not fit (a crop, a step taken back, another length) they derive it from the keys again. What a length cannot show is
told apart here, on the host and without waiting for the device: a reordered or a new cache is another tensor; a cache
that was written since by anybody else (``reset``, an eager prompt) has another version; and a compiled graph that
writes the cache without keeping its state says so (:func:`writes`). In those cases the filled length is set to -1.

A cache that grows is another tensor after each step (``cat``), which the graph returns. Its state moves on to that
tensor after the call. It is made with room for :data:`ROOM` positions more and made larger when they are used up; its
sizes are a function of the cache's length, so that a graph that is symbolic in one is so in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from fxopt.passes.inputs import INPUT, Supplied, placeholder, zeros
from fxopt.passes.kv import grown_from
from fxopt.passes.nodes import value_of
from fxopt.passes.rewriter import Rewriter
from fxopt.passes.technique import PassError

WRITTEN = "fxopt_state_written"
ROOM = 1024
"""State of a growing cache is made larger once in so many positions."""

Shape = Callable[..., tuple[Any, ...]]
"""(B, Hkv, S, D) of the keys to the sizes of a state tensor; S may be symbolic."""


@dataclass(frozen=True)
class StateInput:
    """What a placeholder stands for: tensor `name` of the state `kind` that belongs to the cache input `cache`."""

    cache: fx.Node
    kind: Hashable
    name: str
    shape: Shape
    dtype: torch.dtype
    grown: fx.Node | None
    """The cache after the step, where that is another tensor."""
    added: int
    """Positions by which it is longer."""

    def sizes(self, keys: Any) -> tuple[Any, ...]:
        """Sizes beside a cache input of that shape, (B, Hkv, S, D)."""
        batch, heads, length, width = keys
        if self.grown is not None:
            length = ((length + self.added) // ROOM + 1) * ROOM
        return self.shape(batch, heads, length, width)


class _State:
    """The tensors of one kind for one cache, and the version of the key tensor that they were left at."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.version: int | None = None

    def fit(self, inputs: Sequence[StateInput], keys: Tensor) -> None:
        """Make the tensors, or make them larger; what they hold stays."""
        for item in inputs:
            shape = item.sizes(keys.shape)
            old = self.tensors.get(item.name)
            if old is not None and tuple(old.shape) == shape:
                continue
            new = torch.full(shape, -1 if item.name == "filled" else 0, dtype=item.dtype, device=keys.device)
            if old is not None:
                common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, shape, strict=True))
                new[common] = old[common]
            self.tensors[item.name] = new
            if item.grown is None:
                # CUDA graphs then read and write it where it lies.
                torch._dynamo.mark_static_address(new, guard=False)


_STATES = WeakTensorKeyDictionary()
"""Key tensor of a cache -> {kind: state}; an entry goes when its tensor does."""


def add_state(
    rewriter: Rewriter, keys: fx.Node, kind: Hashable, tensors: Mapping[str, tuple[Shape, torch.dtype]], *,
    like: fx.Node,
) -> dict[str, fx.Node]:  # fmt: skip
    """Placeholders for the state `kind` beside the keys of an attention: an input of the graph, or grown from one.

    ``tensors``: sizes and dtype of each. One more comes with them: ``filled``, 0-d int64, the length that the state
    covers, -1 where nothing is known. Operators write all of them in place. Raises PassError for keys that do not live
    from step to step.
    """
    grows = grown_from(keys)
    cache = keys if grows is None else grows[0]
    if cache.op != "placeholder":
        raise PassError(f"{keys.name} is no cache that state could be kept beside")
    grown, added = (None, 0) if grows is None else (keys, grows[1])
    wanted: dict[str, tuple[Shape, torch.dtype]] = {"filled": (lambda *_: (), torch.int64), **tensors}
    made: dict[str, fx.Node] = {}
    value = value_of(cache)
    for name, (shape, dtype) in wanted.items():
        item = StateInput(cache, kind, name, shape, dtype, grown, added)
        fake = zeros(rewriter, item.sizes(value.shape), dtype, value.device)
        node = placeholder(rewriter, f"fxopt_state_{name}", fake, item, like=like)
        if grown is None:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        made[name] = node
    return made


def writes(cache: fx.Node) -> None:
    """Say that this graph writes a cache (its key tensor, a placeholder) without keeping the state beside it."""
    cache.meta[WRITTEN] = True


@dataclass(frozen=True)
class _Group:
    """All tensors of one kind of state of one cache: where its keys come in, and where they go out if they grow."""

    cache: int
    kind: Hashable
    inputs: tuple[StateInput, ...]
    result: int | None


def wrapper(graph: fx.Graph) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """What to put around the compiled graph, which takes what passes added after its own inputs; None for nothing."""
    places = {node.name: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    added: list[StateInput | Supplied] = [
        node.meta[INPUT] for node in graph.find_nodes(op="placeholder") if INPUT in node.meta
    ]
    written = [places[n.name] for n in graph.find_nodes(op="placeholder") if WRITTEN in n.meta]
    if not added and not written:
        return None
    inputs = [item for item in added if isinstance(item, StateInput)]
    results = [n.name if isinstance(n, fx.Node) else "" for n in graph.output_node().args[0]]  # type: ignore[union-attr]
    kinds: dict[tuple[int, Hashable], list[StateInput]] = {}
    for item in inputs:
        # By name: a pass that failed and was undone leaves copies of the nodes.
        kinds.setdefault((places[item.cache.name], item.kind), []).append(item)
    groups = {
        key: _Group(*key, tuple(items), None if items[0].grown is None else results.index(items[0].grown.name))
        for key, items in kinds.items()
    }
    order: list[Callable[[], Tensor] | tuple[tuple[int, Hashable], str]] = [
        i.get if isinstance(i, Supplied) else ((places[i.cache.name], i.kind), i.name) for i in added
    ]

    def wrap(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            for index in written:
                forget(args[index])
            states = {key: _find(args[group.cache], group) for key, group in groups.items()}
            result = compiled(*args, *(o() if callable(o) else states[o[0]].tensors[o[1]] for o in order))
            for key, group in groups.items():
                keys = args[group.cache] if group.result is None else result[group.result]
                if group.result is not None:
                    _move(states[key], group.kind, args[group.cache], keys)
                states[key].version = _version(keys)
            return result

        return run

    return wrap


def forget(keys: Tensor) -> None:
    """Let all state of the cache with that key tensor be derived anew at its next use."""
    for state in (_STATES.get(keys) or {}).values():
        state.tensors["filled"].fill_(-1)


def state_of(keys: Tensor) -> dict[Hashable, dict[str, Tensor]]:
    """The state beside the cache with that key tensor: {kind: {name: tensor}}."""
    return {kind: state.tensors for kind, state in (_STATES.get(keys) or {}).items()}


def _find(keys: Tensor, group: _Group) -> _State:
    kept = _STATES.get(keys)
    if kept is None:
        kept = _STATES[keys] = {}
    state: _State | None = kept.get(group.kind)
    if state is None:
        state = kept[group.kind] = _State()
    elif state.version != _version(keys):
        state.tensors["filled"].fill_(-1)
    state.fit(group.inputs, keys)
    return state


def _move(state: _State, kind: Hashable, before: Tensor, after: Tensor) -> None:
    """Keep a state beside the tensor that its cache has become; the one before is nobody's step any more."""
    _STATES[before].pop(kind, None)
    kept = _STATES.get(after)
    if kept is None:
        kept = _STATES[after] = {}
    kept[kind] = state


def _version(keys: Tensor) -> int | None:
    # Tensors made under inference_mode count no versions; there only what compiled graphs say is known.
    return None if keys.is_inference() else keys._version
