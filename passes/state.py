"""State that follows a KV cache: explicit inputs of the graph, looked up at each call by the cache's key tensor.

    bounds, filled = add_state(rewriter, keys, ("pages", 16), {"bounds": shape})      # in a pass: new placeholders
    run = wrapper(graph)(compiled)                                                    # the backend: hands them over

State lives exactly as long as the key tensor it was made for (a weak table, so that it goes with the cache) and
carries its filled length, a tensor, which the operators that keep it compare with the cache's own: where the two do
not fit (a crop, a step taken back, another length) they derive it from the keys again. What a length cannot show is
told apart here, on the host and without waiting for the device: a reordered or a new cache is another tensor; a cache
that was written since by anybody else (``reset``, an eager prompt) has another version; and a compiled graph that
writes the cache without keeping its state says so (:func:`writes`). In those cases the filled length is set to -1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from fxopt.passes.inputs import INPUT, Supplied, placeholder, zeros
from fxopt.passes.rewriter import Rewriter

WRITTEN = "fxopt_state_written"


@dataclass(frozen=True)
class StateInput:
    """What a placeholder stands for: tensor `name` of the state `kind` that belongs to the cache input `cache`."""

    cache: fx.Node
    kind: Hashable
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class _State:
    """The tensors of one kind for one cache, and the version of the key tensor that they were left at."""

    def __init__(self, inputs: Sequence[StateInput], device: torch.device) -> None:
        self.tensors = {i.name: torch.zeros(i.shape, dtype=i.dtype, device=device) for i in inputs}
        self.tensors["filled"].fill_(-1)
        for tensor in self.tensors.values():
            # CUDA graphs then read and write it where it lies.
            torch._dynamo.mark_static_address(tensor, guard=False)
        self.version: int | None = None


_STATES = WeakTensorKeyDictionary()
"""Key tensor of a cache -> {kind: state}; an entry goes when its tensor does."""


def add_state(
    rewriter: Rewriter, cache: fx.Node, kind: Hashable, tensors: Mapping[str, tuple[int, ...]], *, like: fx.Node,
) -> dict[str, fx.Node]:  # fmt: skip
    """Placeholders for the state `kind` of the cache whose key tensor is the placeholder `cache`.

    ``tensors``: the shape of each, of the cache's dtype. One more comes with them: ``filled``, 0-d int64, the length
    that the state covers, -1 where nothing is known. Operators write all of them in place.
    """
    value = cache.meta["example_value"]
    wanted = {"filled": ((), torch.int64), **{name: (shape, value.dtype) for name, shape in tensors.items()}}
    made: dict[str, fx.Node] = {}
    for name, (shape, dtype) in wanted.items():
        made[name] = placeholder(
            rewriter, f"fxopt_state_{name}", zeros(rewriter, shape, dtype, value.device),
            StateInput(cache, kind, name, shape, dtype), like=like,
        )  # fmt: skip
        made[name].meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return made


def writes(cache: fx.Node) -> None:
    """Say that this graph writes a cache (its key tensor, a placeholder) without keeping the state beside it."""
    cache.meta[WRITTEN] = True


def wrapper(graph: fx.Graph) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """What to put around the compiled graph, which takes what passes added after its own inputs; None for nothing."""
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    added: list[StateInput | Supplied] = [node.meta[INPUT] for node in places if INPUT in node.meta]
    written = [places[node] for node in places if WRITTEN in node.meta]
    if not added and not written:
        return None
    inputs = [item for item in added if isinstance(item, StateInput)]
    kinds: dict[tuple[int, Hashable], list[StateInput]] = {}
    for item in inputs:
        kinds.setdefault((_place(places, item.cache), item.kind), []).append(item)
    order: list[Callable[[], Tensor] | tuple[tuple[int, Hashable], str]] = [
        item.get if isinstance(item, Supplied) else ((_place(places, item.cache), item.kind), item.name)
        for item in added
    ]

    def wrap(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            for index in written:
                forget(args[index])
            states = {key: _find(args[key[0]], key[1], group) for key, group in kinds.items()}
            result = compiled(*args, *(o() if callable(o) else states[o[0]].tensors[o[1]] for o in order))
            for (index, _), state in states.items():
                state.version = _version(args[index])
            return result

        return run

    return wrap


def _place(places: Mapping[fx.Node, int], cache: fx.Node) -> int:
    # A pass that failed and was undone leaves copies of the nodes; their names stay.
    return next(i for node, i in places.items() if node.name == cache.name)


def forget(keys: Tensor) -> None:
    """Let all state of the cache with that key tensor be derived anew at its next use."""
    for state in (_STATES.get(keys) or {}).values():
        state.tensors["filled"].fill_(-1)


def state_of(keys: Tensor) -> dict[Hashable, dict[str, Tensor]]:
    """The state beside the cache with that key tensor: {kind: {name: tensor}}."""
    return {kind: state.tensors for kind, state in (_STATES.get(keys) or {}).items()}


def _find(keys: Tensor, kind: Hashable, inputs: Sequence[StateInput]) -> _State:
    kept = _STATES.get(keys)
    if kept is None:
        kept = _STATES[keys] = {}
    state = kept.get(kind)
    if state is None:
        state = kept[kind] = _State(inputs, keys.device)
    elif state.version != _version(keys):
        state.tensors["filled"].fill_(-1)
    return state


def _version(keys: Tensor) -> int | None:
    # Tensors made under inference_mode count no versions; there only what compiled graphs say is known.
    return None if keys.is_inference() else keys._version
