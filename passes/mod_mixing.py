"""What in a block combines tokens in a way that tokens picked out of a sequence do not have.

A convolution sees other neighbours, a recurrence or a scan other predecessors, a sum over the tokens other terms; in
``eval()`` it also sees the tokens that fill the rows of a batch up, which attention hides from itself by its mask and
nothing else does. Modules are known by their class, when routers are added. What a ``forward`` writes out by hand
shows in the captured graph alone::

    x.cumsum(1)                                    a scan along the tokens
    k.transpose(-1, -2) @ v                        a product whose result has no tokens any more: linear attention
    x.mean(1)                                      a sum over the tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxopt.passes.mod_reference import ROUTED
from fxopt.passes.nodes import argument, name_of, same, value_of
from fxopt.passes.provenance import all_nodes, module_path
from fxopt.passes.streams import op_name

_RUNNING = ("mamba", "rwkv", "deltanet", "linearattention", "linearattn", "recurrent", "retention", "shortconv")
_NEIGHBOURS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "roll", "unfold")
_SCANS = ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
_SUMS = ("sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp")
_PRODUCTS = ("matmul", "bmm", "einsum", "__matmul__")


def module_mixes(module: nn.Module) -> bool:
    """Whether a module is a convolution over the sequence, a recurrence, or attention by a running state."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return any(size > 1 for size in module.kernel_size)
    name = type(module).__name__.lower()
    return isinstance(module, nn.RNNBase) or any(part in name for part in _RUNNING)


def neighbours_mixed(graph: fx.Graph, path: str) -> fx.Node | None:
    """A node of the layer `path`, branches included, that mixes tokens in such a way; None where there is none."""
    nodes = [node for node in all_nodes(graph) if f"{module_path(node)}.".startswith(f"{path}.")]
    counts: dict[fx.Graph, list[Any]] = {}
    for node in nodes:
        if _mark(node) == path and op_name(node) == "gather" and _floats(node, 3):
            counts.setdefault(node.graph, []).append(value_of(node).shape[1])
    for node in nodes:
        name = name_of(node)
        if name in _NEIGHBOURS:
            weight = value_of(node.args[1]) if len(node.args) > 1 else None
            if not isinstance(weight, torch.Tensor) or any(size != 1 for size in weight.shape[2:]):
                return node
        elif _mark(node) is None and any(_mixes(node, name, count) for count in counts.get(node.graph, ())):
            return node
    return None


def _mixes(node: fx.Node, name: str, count: Any) -> bool:
    """Whether `node` scans along dimensions of `count` tokens, or leaves none of them."""
    if same(count, 1):
        return False
    if name in _SCANS:
        read: Any = node.args[0] if node.args else None
        dim = argument(node, 1, "dim", argument(node, 1, "axis"))
        if not _floats(read, 3) or not isinstance(dim, int):
            return False
        shape = value_of(read).shape
        return dim % len(shape) != len(shape) - 1 and same(shape[dim], count)
    if name in _SUMS or name in _PRODUCTS:
        terms = [a for a in node.all_input_nodes if _floats(a, 3)]
        enough = len(terms) >= (2 if name in _PRODUCTS else 1)
        return enough and all(_has(a, count) for a in terms) and _floats(node, 0) and not _has(node, count)
    return False


def _has(node: fx.Node, count: Any) -> bool:
    """Whether a dimension besides the first, the batch, has that size."""
    return any(same(size, count) for size in value_of(node).shape[1:])


def _floats(node: Any, dims: int) -> bool:
    """Whether a node stands for floating-point numbers in at least so many dimensions."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= dims


def _mark(node: fx.Node) -> Any:
    return (node.meta.get("custom") or {}).get(ROUTED)
