"""A captured graph as it would be captured on a device that is not here: the same nodes, fake tensors on that device.

What passes decide by the device of a tensor (has it generated kernels?) is then decided for the device of the plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

GPU = torch.device("cuda", 0)
"""CUDA and ROCm alike; with its number, so that torch does not ask which one is current."""


def move_graph(graph: fx.Graph, device: torch.device = GPU) -> None:
    """Let every value of `graph`, and every device among its arguments, be `device`; nothing is allocated.

    Only values that lie where the model does are moved: a tensor that was on the CPU beside a model on another device
    stays there.
    """
    home = next((d for node in graph.find_nodes(op="placeholder") if (d := _device(node)) is not None), None)
    for node in graph.nodes:
        if "example_value" in node.meta:
            node.meta["example_value"] = pytree.tree_map_only(
                torch.Tensor, lambda t: _moved(t, device) if t.device == home else t, node.meta["example_value"]
            )
        node.args = fx.node.map_aggregate(node.args, lambda a: _argument(a, home, device))
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: _argument(a, home, device))


def _device(node: fx.Node) -> torch.device | None:
    """Where a weight lies: inputs of a model may be anywhere."""
    value = node.meta.get("example_value")
    return value.device if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    with value.fake_mode:  # type: ignore[attr-defined]
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(moved, requires_grad=value.requires_grad)
    return moved.requires_grad_(value.requires_grad) if value.is_floating_point() else moved


def _argument(value: Any, home: torch.device | None, device: torch.device) -> Any:
    return device if isinstance(value, torch.device) and value == home else value
