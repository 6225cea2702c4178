"""``torch.ops.fxopt.cpu_linear``: a linear of few rows on a CPU.

    cpu_linear(x, weight, bias) -> y                y = x @ weight^T + bias, x [..., K], weight [N, K], bias [N]

``torch.nn.functional.linear`` is the meaning, and what runs where generated C++
(:mod:`fxopt.codegen.kernels.cpu_linear`) does not take the tensors. No gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.codegen.kernels import cpu_linear as kernels
from fxopt.codegen.ops import LIBRARY

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference from float64 for outputs of unit variance."""


def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator's body: ``[..., N]``, contiguous."""
    here = x.is_cpu and weight.is_cpu and (bias is None or bias.is_cpu)
    out = kernels.run(x, weight, bias) if here else None
    return F.linear(x, weight, bias).contiguous() if out is None else out


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


LIBRARY.define("cpu_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("cpu_linear", cpu_linear, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::cpu_linear", _fake, lib=LIBRARY)
