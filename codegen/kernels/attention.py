"""Split-KV decode attention by generated Triton kernels: the launcher.

`decode_attention` runs on CUDA and ROCm, and on CPU tensors under TRITON_INTERPRET=1. What it computes is said by
`reference` in `attention_reference.py`, what varies by `DecodeAttention` in `attention_variants.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.codegen.kernels.attention_variants import DecodeAttention, config, kernels
from fxopt.codegen.kernels.launch import launch

__all__ = ["DecodeAttention", "Partials", "decode_attention", "empty_partials"]

MAX_GRID_Y = 65535
"""CUDA's limit on the second grid dimension: splits in one kernel, rows in the other."""


class Partials(NamedTuple):
    """What the splits hand to the combine kernel, all float32; programs that have nothing to read write nothing."""

    numerator: Tensor
    """[B, Hkv, splits, R, DV]"""
    denominator: Tensor
    """[B, Hkv, splits, R]"""
    maximum: Tensor
    """[B, Hkv, splits, R], in units of log 2"""


def empty_partials(desc: DecodeAttention, batch: int, kv_heads: int, length: int, device: torch.device) -> Partials:
    """Uninitialised scratch for `length` positions that are read; it may be shared by the layers of a step."""
    shape = (batch, kv_heads, max(1, -(-length // desc.split_size)), desc.rows)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
    return Partials(empty((*shape, desc.channels)), empty(shape), empty(shape))


def _check(desc: DecodeAttention, q: Tensor, k: Tensor, v: Tensor, needed: Mapping[str, tuple[bool, Any]]) -> None:
    def fail(message: str) -> None:
        raise ValueError(f"decode_attention: {message}")

    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        fail(f"q, k and v need four dimensions [B, H, S, D]; got {q.dim()}, {k.dim()} and {v.dim()}")
    batch, heads, tokens, channels = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    if (channels, tokens) != (desc.head_dim, desc.q_len) or heads != kv_heads * desc.group:
        fail(
            f"q is {tuple(q.shape)}; the description and {kv_heads} KV heads ask for "
            f"{(batch, kv_heads * desc.group, desc.q_len, desc.head_dim)}"
        )
    if k.shape != (batch, kv_heads, length, desc.head_dim) or v.shape != (batch, kv_heads, length, desc.channels):
        fail(
            f"k is {tuple(k.shape)} and v is {tuple(v.shape)}; they need B, Hkv and S in common, and q's batch {batch}"
        )
    if {q.dtype, k.dtype, v.dtype} != {desc.dtype}:
        fail(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; the description says {desc.dtype}; cast them first")
    if not q.device == k.device == v.device:
        fail(f"q, k and v are on {q.device}, {k.device} and {v.device}; move them together")
    if -(-length // desc.split_size) > MAX_GRID_Y:
        fail(f"{length} positions in splits of {desc.split_size} are more than {MAX_GRID_Y}; raise split_size")
    shapes: dict[str, list[tuple[int, ...]]] = {
        "sinks": [(heads,)],
        "slopes": [(heads,)],
        "extent": [(batch,)],
        "phi": [(kv_heads,), (batch, heads, tokens)],
    }
    for name, (wanted, given) in needed.items():
        if wanted != (given is not None):
            fail(f"{name} is {'missing' if wanted else 'given'}, but the description says otherwise")
        if given is not None and name in shapes and tuple(given.shape) not in shapes[name]:
            fail(f"{name} is {tuple(given.shape)}; it needs {' or '.join(map(str, shapes[name]))}")
        if isinstance(given, Tensor) and given.device != q.device:
            fail(f"{name} is on {given.device}, q on {q.device}; move it")


def _listed(
    desc: DecodeAttention, index: Tensor, valid: Tensor | None, shape: tuple[int, int, int], least: int,
    whole_heads: Collection[int],
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """How many positions a program of some head may reach, and the arguments that say what is read."""
    batch, kv_heads, length = shape
    wanted = f"{(batch, kv_heads)}, or ones"
    if index.dim() != 3 or any(have not in (1, full) for have, full in zip(index.shape, shape[:2], strict=False)):
        raise ValueError(f"decode_attention: index is {tuple(index.shape)}; it needs {wanted}, and K")
    if valid is not None and (
        valid.dim() != 2 or any(have not in (1, full) for have, full in zip(valid.shape, shape[:2], strict=True))
    ):
        raise ValueError(f"decode_attention: valid is {tuple(valid.shape)}; it needs {wanted}")
    if any(not 0 <= head < min(kv_heads, 63) for head in whole_heads):
        raise ValueError(f"decode_attention: whole_heads is {tuple(whole_heads)} of {kv_heads} KV heads, at most 63")
    count = index.shape[2]
    index = index.expand(batch, kv_heads, count)
    index = index if index.stride(2) == 1 or count == 1 else index.contiguous()
    arguments = {
        "index": index, "index_batch": index.stride(0), "index_head": index.stride(1), "count": count, "least": least,
        "valid": None if valid is None else valid.expand(batch, kv_heads).contiguous(),
        "whole_heads": sum(1 << head for head in whole_heads),
    }  # fmt: skip
    reached = length if whole_heads else min(least, length)
    return max(count * desc.gather, reached), arguments


def decode_attention(
    desc: DecodeAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    phi: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    counter: Tensor | None = None,
    partials: Partials | None = None,
    index: Tensor | None = None,
    valid: Tensor | None = None,
    least: int = 0,
    whole_heads: Collection[int] = (),
) -> tuple[Tensor, Tensor]:
    """Attention of a few new tokens on a KV cache; no host synchronisation, no atomics, capturable in a CUDA graph.

    Args:
        desc: the variant.
        q: [B, Hq, T, D]. k: [B, Hkv, S, D]. v: [B, Hkv, S, DV]. Any strides; read in place.
        scale: factor of the scores.
        mask: broadcastable to [B, Hq, T, S]: bool (True: visible) or additive, as `desc.mask` says.
        extent: [B], int32 or int64, filled positions of each batch row; beyond it nothing is read.
        phi: [Hkv], or [B, Hq, T] for one of each query row; the unified maximum in units of the scores, needed for
            `softmax="async"`.
        sinks: [Hq], a logit per query head. slopes: [Hq], float32, ALiBi.
        counter: [2], int64: rows recomputed and rows computed are added to it; None: starts from zero.
        partials: scratch from `empty_partials`; None: allocated here.
        index: [B or 1, Hkv or 1, K], int32 or int64, what is read: positions, or blocks of `desc.gather` of them; -1 is
            nothing, and of a block only what is filled. valid: [B or 1, Hkv or 1], integers, how many entries count.
        least: rows of at most so many filled positions read all of them, in order, whatever is listed.
        whole_heads: KV heads (below 63) that always read everything.

    Returns:
        The output [B, Hq, T, DV], contiguous, and the counter. A row with nothing unmasked is zero, as in
        `scaled_dot_product_attention`; a row masked with the lowest finite number everywhere is the mean of the values.

    Raises:
        RuntimeError: CPU tensors without TRITON_INTERPRET=1.
        ValueError: shapes, dtypes, devices or optional arguments that do not fit the description.
    """
    unified = desc.softmax == "async"
    _check(
        desc, q, k, v,
        {
            "mask": (desc.mask != "none", mask), "extent": (desc.has_extent, extent), "phi": (unified, phi),
            "sinks": (desc.has_sinks, sinks), "slopes": (desc.alibi, slopes), "index": (desc.gather > 0, index),
            "valid": (desc.counted, valid), "whole_heads": (desc.some_whole, tuple(whole_heads) or None),
        },
    )  # fmt: skip
    batch, heads, tokens, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    arguments: dict[str, Any] = {}
    positions = length
    if index is not None:
        positions, given = _listed(desc, index, valid, (batch, kv_heads, length), least, whole_heads)
        arguments |= given
    if mask is not None:
        if (mask.dtype == torch.bool) != (desc.mask == "bool"):
            raise ValueError(f"decode_attention: mask is {mask.dtype}, the description says {desc.mask!r}")
        wanted = (batch, heads, tokens, length)
        if any(size not in (1, full) for size, full in zip(reversed(mask.shape), reversed(wanted), strict=False)):
            raise ValueError(f"decode_attention: mask is {tuple(mask.shape)}; it must broadcast to {wanted}")
        mask = mask.expand(wanted)
        shared = (mask.stride(1) == 0 or heads == 1) and (mask.stride(2) == 0 or tokens == 1)
        desc = replace(desc, mask_shared=shared)
        arguments |= {"mask": mask.view(torch.uint8) if desc.mask == "bool" else mask}
        arguments |= dict(zip(("mask_batch", "mask_head", "mask_token", "mask_position"), mask.stride(), strict=True))
    if phi is not None:
        rows = phi.view(1, kv_heads, 1) if phi.dim() == 1 else phi.reshape(batch, kv_heads, desc.rows)
        rows = rows.to(torch.float32).expand(batch, kv_heads, desc.rows)
        arguments |= {"phi": rows} | dict(zip(("phi_batch", "phi_head", "phi_row"), rows.stride(), strict=True))
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        arguments[name] = tensor
        middle = "token" if name == "query" else "position"
        arguments |= dict(
            zip((f"{name}_{axis}" for axis in ("batch", "head", middle, "dim")), tensor.stride(), strict=True)
        )
    if partials is None:
        partials = empty_partials(desc, batch, kv_heads, positions, q.device)
    elif partials.numerator.shape != (
        batch, kv_heads, max(1, -(-positions // desc.split_size)), desc.rows, desc.channels,
    ):  # fmt: skip
        raise ValueError(f"decode_attention: partials are {tuple(partials.numerator.shape)}; use empty_partials")
    splits = partials.denominator.shape[2]
    out = torch.empty((batch, heads, tokens, desc.channels), dtype=q.dtype, device=q.device)
    if counter is not None and (counter.shape != (2,) or counter.dtype != torch.int64):
        raise ValueError(f"decode_attention: counter is {counter.dtype} {tuple(counter.shape)}; it needs int64 (2,)")
    if counter is None:
        counter = torch.zeros(2, dtype=torch.int64, device=q.device)
    flags = torch.empty((batch, kv_heads, desc.rows), dtype=torch.int32, device=q.device) if unified else None
    # The kernels step through these one element at a time, whatever their strides are.
    vectors = {"sinks": sinks, "slopes": slopes, "extent": extent}
    arguments |= {name: None if given is None else given.contiguous() for name, given in vectors.items()}
    arguments |= partials._asdict() | {
        "out": out, "flags": flags, "counter": counter,
        "scale": scale, "length": length, "splits": splits, "kv_heads": kv_heads, "rows": batch * kv_heads * desc.rows,
    }  # fmt: skip
    tiles = config(desc)
    grids = {
        "split": (batch * kv_heads, splits, -(-desc.rows // tiles.block_m)),
        "combine": (batch * kv_heads, desc.rows, 1),
    }
    if out.numel():
        for symbol, kernel in kernels(desc).items():
            launch(kernel, grids[symbol.rpartition("_")[2]], arguments, q, num_warps=tiles.num_warps)
    return out, counter
