"""Inputs that a pass adds to a graph: placeholders behind Dynamo's own, handed over by the backend at each call.

A weight of the model that the captured graph did not read (a router, an exit's head) and a counter are tensors that
live elsewhere. As an input, a weight is looked up where it lives in every call, so that the compiled graph keeps
nothing alive and a weight that was exchanged is the one that is read; a counter is written in place by the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import LocalSource

from fxopt.passes.rewriter import Rewriter

INPUT = "fxopt_input"
"""Mark on placeholders that are not Dynamo's; says where their tensor comes from."""


@dataclass(frozen=True)
class Supplied:
    """A tensor that ``get()`` finds at each call."""

    get: Callable[[], Tensor]


def placeholder(rewriter: Rewriter, label: str, value: Tensor, origin: object, *, like: fx.Node) -> fx.Node:
    """A placeholder behind all others for the fake tensor `value`; `origin` says where its tensor comes from."""
    graph = rewriter.graph
    last = graph.find_nodes(op="placeholder")[-1]
    name = f"{label}_{len([n for n in graph.find_nodes(op='placeholder') if INPUT in n.meta])}"
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta[INPUT] = origin
    node.meta["example_value"] = value
    node._dynamo_source = LocalSource(name, is_input=True)  # type: ignore[attr-defined]
    rewriter.adopt(node, like)
    return node


def weight(owner: nn.Module, name: str, rewriter: Rewriter, *, like: fx.Node) -> fx.Node:
    """The tensor ``owner.name``, as an input; one placeholder for each tensor of a graph."""
    value = getattr(owner, name)
    for node in rewriter.graph.find_nodes(op="placeholder"):
        origin = node.meta.get(INPUT)
        if isinstance(origin, Supplied) and isinstance(origin.get, _Attribute) and origin.get() is value:
            return node
    fake = rewriter.fake_mode.from_tensor(value, static_shapes=True)
    return placeholder(rewriter, f"fxopt_{name}", fake, Supplied(_Attribute(weakref.ref(owner), name)), like=like)


def constant(value: Tensor, rewriter: Rewriter, *, like: fx.Node) -> fx.Node:
    """A small tensor that belongs to the setting, as an input on the device of `like`."""
    there = value.to(like.meta["example_value"].device)
    fake = rewriter.fake_mode.from_tensor(there, static_shapes=True)
    return placeholder(rewriter, "fxopt_constant", fake, Supplied(lambda: there), like=like)


@dataclass(frozen=True)
class _Attribute:
    owner: weakref.ref[nn.Module]
    name: str

    def __call__(self) -> Tensor:
        owner = self.owner()
        if owner is None:
            raise RuntimeError(f"the module whose {self.name!r} this compiled graph reads is gone; compile again")
        return getattr(owner, self.name)  # type: ignore[no-any-return]


def examples(graph: fx.Graph) -> list[Tensor]:
    """Example inputs for the placeholders that passes added, in order."""
    return [node.meta["example_value"] for node in graph.find_nodes(op="placeholder") if INPUT in node.meta]


def zeros(rewriter: Rewriter, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fake tensor for :func:`placeholder`."""
    with rewriter.fake_mode:
        return torch.zeros(shape, dtype=dtype, device=device)
