"""Operators of routed blocks: take some tokens of a stream and normalise them, put them back, multiply or do not.

    gather_norm(x, index, gamma, beta, *, norm) -> (rows, normed)
        rows = x at index [B, C, W];  normed = norm(rows)
    scatter_residual(x, index, rows, after, weight, valid) -> out
        out = x, but rows + weight * (after - rows) at index; `rows` there where `valid` is False
    linear_if(active, x, weight, bias) -> y
        y = x @ weight.T + bias where `active`, else zeros, and no weight is read

x [B, S, W]; index [B, C] int64, ascending, no place twice; rows, normed, after [B, C, W]; weight and valid [B, C] (of
linear_if: [N, K]); ``norm``: an encoded :class:`fxopt.codegen.kernels.gemm.Norm`; ``active``: 0-d bool, on the device.
The first two have gradients. On CUDA and ROCm the kernels of :mod:`fxopt.codegen.kernels.routing` run, where they take
the shapes; elsewhere the PyTorch bodies. Mixture of depths: Raposo et al., arXiv 2404.02258.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels import routing as kernels
from fxopt.codegen.kernels.gemm import Norm
from fxopt.codegen.ops import LIBRARY
from fxopt.codegen.ops.cpu_linear import cpu_linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference from float64 for values of unit variance: a few roundings of the dtype."""


def _places(index: Tensor, width: Any) -> Tensor:
    return index[..., None].expand(*index.shape, width)


# -- gather and norm ------------------------------------------------------------------------------------------------


def gather_norm(
    x: Tensor, index: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *, norm: str
) -> tuple[Tensor, Tensor]:
    """The operator's body: rows of ``x: [B, S, W]`` at ``index: [B, C]``, as they are and normalised."""
    rows = x.gather(1, _places(index, x.shape[2]))
    return rows, Norm.decode(norm).evaluate(rows, gamma, beta)


def _fake_gather_norm(
    x: Tensor, index: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *, norm: str
) -> tuple[Tensor, Tensor]:
    described, width = Norm.decode(norm), x.shape[2]
    for name, given, wanted in (("gamma", gamma, described.gamma), ("beta", beta, described.beta)):
        torch._check(wanted == (given is not None), lambda name=name: f"{name} does not fit the norm {norm}")
    shape = (*index.shape, width)
    return x.new_empty(shape), x.new_empty(shape)


def _gather_norm_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, index, gamma, beta = inputs
    ctx.norm, ctx.length, ctx.beta_dtype = keyword_only_inputs["norm"], x.shape[1], getattr(beta, "dtype", None)
    ctx.save_for_backward(output[0], index, gamma)


def _gather_norm_backward(ctx: Any, grad_rows: Tensor, grad_normed: Tensor) -> tuple[Any, ...]:
    rows, index, gamma = ctx.saved_tensors
    norm = Norm.decode(ctx.norm)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    unit, grad = wide * scale, grad_normed.to(wide.dtype)
    inner = grad
    if gamma is not None:
        inner = grad * (1.0 + gamma.to(wide.dtype) if norm.unit_offset else gamma.to(wide.dtype))
    # The part along the row, and for a mean the part along (1, ..., 1), is taken out by the norm itself.
    change = inner - unit * (inner * unit).mean(-1, keepdim=True)
    if norm.kind == "layer":
        change = change - inner.mean(-1, keepdim=True)
    into = (grad_rows.to(wide.dtype) + scale * change).to(rows.dtype)
    whole = into.new_zeros(into.shape[0], ctx.length, into.shape[2])
    grad_x = whole.scatter(1, _places(index, into.shape[2]), into)
    grad_gamma = None if gamma is None else (grad * unit).sum((0, 1)).to(gamma.dtype)
    grad_beta = None if ctx.beta_dtype is None else grad.sum((0, 1)).to(ctx.beta_dtype)
    return grad_x, None, grad_gamma, grad_beta


# -- scatter with residual ------------------------------------------------------------------------------------------


def scatter_residual(
    x: Tensor, index: Tensor, rows: Tensor, after: Tensor, weight: Tensor, valid: Tensor | None = None
) -> Tensor:
    """The operator's body: x with ``rows + weight * (after - rows)`` at the places of ``index: [B, C]``."""
    mixed = rows + weight[..., None] * (after - rows)
    if valid is not None:
        mixed = torch.where(valid[..., None], mixed, rows)
    return x.scatter(1, _places(index, x.shape[2]), mixed.to(x.dtype))


def _fake_scatter_residual(
    x: Tensor, index: Tensor, rows: Tensor, after: Tensor, weight: Tensor, valid: Tensor | None = None
) -> Tensor:
    torch._check(rows.shape[1] == index.shape[1], lambda: f"{rows.shape[1]} rows for {index.shape[1]} places")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, rows, after, weight, valid = inputs
    ctx.save_for_backward(index, rows, after, weight, valid)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    index, rows, after, weight, valid = ctx.saved_tensors
    places = _places(index, grad.shape[2])
    dtype = torch.promote_types(torch.promote_types(rows.dtype, after.dtype), torch.float32)
    taken = grad.gather(1, places).to(dtype)
    mixed = taken if valid is None else taken * valid[..., None]
    share = weight[..., None].to(dtype)
    grad_rows = (taken - mixed * share).to(rows.dtype)
    grad_after = (mixed * share).to(after.dtype)
    grad_weight = (mixed * (after.to(dtype) - rows.to(dtype))).sum(-1).to(weight.dtype)
    return grad.scatter(1, places, 0.0), None, grad_rows, grad_after, grad_weight, None


# -- a linear that may not be needed --------------------------------------------------------------------------------


def linear_if(active: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator's body: a linear where the 0-d bool `active` holds, zeros elsewhere. No gradients."""
    if active.item():
        return cpu_linear(x, weight, bias)
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


def _fake_linear_if(active: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(active.ndim == 0, lambda: f"active has {active.ndim} dimensions; it is one decision for all rows")
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


for _name, _schema, _body, _fake in (
    ("gather_norm",
     "(Tensor x, Tensor index, Tensor? gamma=None, Tensor? beta=None, *, str norm) -> (Tensor, Tensor)",
     gather_norm, _fake_gather_norm),
    ("scatter_residual",
     "(Tensor x, Tensor index, Tensor rows, Tensor after, Tensor weight, Tensor? valid=None) -> Tensor",
     scatter_residual, _fake_scatter_residual),
    ("linear_if", "(Tensor active, Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
     linear_if, _fake_linear_if),
):  # fmt: skip
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{_name}", _fake, lib=LIBRARY)


def _on_gpu(kernel: Callable[..., Any], body: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, or the body (which may wait for the device) for what it does not take."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return kernel(*args, **kwargs)
        except Unsupported:
            return body(*args, **kwargs)

    return run


for _name, _body in (
    ("gather_norm", gather_norm), ("scatter_residual", scatter_residual), ("linear_if", linear_if),
):  # fmt: skip
    LIBRARY.impl(_name, _on_gpu(getattr(kernels, _name), _body), "CUDA")
torch.library.register_autograd(
    "fxopt::gather_norm", _gather_norm_backward, setup_context=_gather_norm_setup, lib=LIBRARY
)
torch.library.register_autograd("fxopt::scatter_residual", _scatter_backward, setup_context=_scatter_setup, lib=LIBRARY)


def sample_inputs(
    *, batch: int = 2, tokens: int = 13, count: int = 5, width: int = 24, dtype: torch.dtype = torch.float32,
    valid: bool = True, device: str = "cpu", seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Tensors by name: x, index, gamma, beta, after, weight and, with `valid`, valid; rows are x at index."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    order = torch.rand(batch, tokens, generator=generator).argsort(1)[:, :count].sort(1).values
    made = {"x": normal(batch, tokens, width), "index": order.to(device)}
    made |= {"gamma": normal(width), "beta": normal(width), "after": normal(batch, count, width)}
    made |= {"weight": normal(batch, count), "rows": made["x"].gather(1, _places(made["index"], width))}
    if valid:
        made["valid"] = (torch.rand(batch, count, generator=generator) > 0.3).to(device)
    return made
