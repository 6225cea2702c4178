"""From a semantic operator to a generated kernel: which variant it needs, and the operator that runs it.

``torch.ops.fxopt.decode_attention`` computes what :func:`fxopt.codegen.ops.attention.attention` computes, for at most
16 new tokens, and takes in addition the unified maximum ``phi`` of asynchronous softmax (None: online softmax). On CUDA
and ROCm it launches the kernels of :mod:`fxopt.codegen.kernels.attention`; elsewhere phi, which changes no softmax, is
not needed and the PyTorch body runs. Its second result counts rows, [2] int64: recomputed with online softmax, all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.codegen import roofline
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.attention import decode_attention
from fxopt.codegen.kernels.attention_variants import DecodeAttention
from fxopt.codegen.ops import LIBRARY
from fxopt.codegen.ops.attention import attention

SPLIT_SIZE = 256
"""Cache positions of one program where results must not depend on the batch or on the total length."""
DECODE_TOKENS = 16
KERNEL_DEVICES = ("cuda",)
"""Device types that the generated kernels run on; ROCm calls itself cuda."""

SCHEMA = (
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? extent=None, "
    "Tensor? sinks=None, Tensor? phi=None, *, float scale, float soft_cap=0.0, int split_size=256) -> (Tensor, Tensor)"
)


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    unified: bool,
    soft_cap: float = 0.0,
    split_size: int = SPLIT_SIZE,
) -> DecodeAttention:
    """The kernel variant for these tensors (real or fake); raises :class:`Unsupported` with the reason."""
    tokens, width = query.shape[2], query.shape[3]
    if not all(isinstance(size, int) for size in (tokens, width, value.shape[3])):
        raise Unsupported("the number of new tokens or channels is symbolic")
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    try:
        return DecodeAttention(
            dtype=query.dtype,
            head_dim=width,
            group=query.shape[1] // key.shape[1],
            q_len=tokens,
            value_dim=value.shape[3],
            soft_cap=soft_cap or None,
            has_sinks=sinks is not None,
            mask=kind,  # type: ignore[arg-type]
            softmax="async" if unified else "online",
            split_size=split_size,
            has_extent=extent is not None,
        )
    except ValueError as error:
        raise Unsupported(str(error)) from error


def fitted_split(length: int, pairs: int, device: torch.device) -> int:
    """A split size that gives every multiprocessor about four programs: faster, and dependent on batch and length.

    ``length``: cache positions; ``pairs``: batch rows times KV heads.
    """
    planned = roofline.planned_device()
    on_gpu = torch.cuda.get_device_properties(device) if planned is None and device.type == "cuda" else None
    processors = planned.units if planned else on_gpu.multi_processor_count if on_gpu else 1
    wanted = length * pairs / (4 * processors)
    size = 64
    while size < wanted and size < 4096:
        size *= 2
    return size


def lowered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    phi: Tensor | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    split_size: int = SPLIT_SIZE,
) -> tuple[Tensor, Tensor]:
    """The operator's body: kernels where they run, PyTorch elsewhere. [B, Hq, T, DV], contiguous, and row counts."""
    if query.device.type not in KERNEL_DEVICES:
        out = attention(query, key, value, mask, extent, sinks, scale=scale, soft_cap=soft_cap)
        counts = torch.tensor([0, out.shape[:3].numel()], device=out.device)
        return out.contiguous(memory_format=torch.contiguous_format).view(-1).view(out.shape), counts
    return launch(query, key, value, mask, extent, sinks, phi, scale=scale, soft_cap=soft_cap, split_size=split_size)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extent: Tensor | None,
    sinks: Tensor | None,
    phi: Tensor | None,
    *,
    scale: float,
    soft_cap: float,
    split_size: int,
) -> tuple[Tensor, Tensor]:
    """Run the generated kernels; no host synchronisation."""
    variant = describe(
        query, key, value, mask, extent, sinks, unified=phi is not None, soft_cap=soft_cap, split_size=split_size
    )
    # One extent for all rows here; the kernel takes one for each.
    rows = None if extent is None else extent.expand(query.shape[0])
    return decode_attention(variant, query, key, value, scale=scale, mask=mask, extent=rows, phi=phi, sinks=sinks)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    phi: Tensor | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    split_size: int = SPLIT_SIZE,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(2, dtype=torch.int64)


LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("decode_attention", lowered, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::decode_attention", _fake, lib=LIBRARY)
