"""What Inductor is told beside fxopt's kernels: settings that a decode step gains from, for graphs that hold operators
of fxopt. Others are compiled as Inductor alone would compile them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import fx

from fxopt.codegen import post_grad

KNOWN = frozenset({"aten", "prims", "prim", "fxopt"})
"""Namespaces of operators whose fake kernels are tested to give the strides that the real ones give."""
COMBINED = {"combo_kernels": True, "benchmark_combo_kernel": True}
"""Independent pointwise kernels become one launch where a measurement of Inductor's says that it pays."""


def beside_kernels(gm: fx.GraphModule) -> dict[str, Any]:
    """Settings for an inference graph; empty for one that records gradients.

    ``combo_kernels``, on GPUs: keys, values and queries of a layer are rotated and written by one kernel, not three.

    ``size_asserts`` off: ``assert_size_stride`` looks at every input, operand of a branch and result of an operator in
    each call, 300 times in a step of 12 layers. Dynamo's guards cover the inputs. What is left to catch is an operator
    whose fake kernel is wrong, so a graph that holds somebody else's operator keeps them, and all do where
    ``TORCHINDUCTOR_SIZE_ASSERTS`` is set.
    """
    if torch.is_grad_enabled():
        return {}
    nodes = post_grad.nodes_of(gm)
    found: dict[str, Any] = {}
    if "TORCHINDUCTOR_SIZE_ASSERTS" not in os.environ and not any(_is_foreign(node.target) for node in nodes):
        found["size_asserts"] = False
    if any(_is_on_gpu(node) for node in nodes):
        found |= COMBINED
    return found


def _is_foreign(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in KNOWN


def _is_on_gpu(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return node.op == "placeholder" and isinstance(value, torch.Tensor) and value.device.type == "cuda"
