"""``torch.ops.fxopt.attention``: softmax attention that reads an unrepeated KV cache, up to its filled length.

    attention(query, key, value, mask, extent, sinks, *, scale, is_causal, soft_cap, window) -> out

    query [B, Hq, T, D], key [B, Hkv, S, D], value [B, Hkv, S, DV], Hq a multiple of Hkv; out [B, Hq, T, DV]

    scores = scale * query @ key^T                          query head h reads KV head h // (Hq // Hkv)
    scores = soft_cap * tanh(scores / soft_cap)             where soft_cap > 0
    scores = scores + mask, or -inf where a bool mask is False
    scores = -inf where is_causal and not i - window < j <= i       for query i and key j; window 0: no limit
    out    = softmax([scores, sinks]) without the sinks' column, @ value

A row with nothing unmasked is zero, as in ``scaled_dot_product_attention``. ``extent`` (0-d int64) is a promise: at and
beyond that position every key is masked in every row that has anything unmasked, so nobody needs to read it.
:func:`read_extent` derives it from a mask. As [B] it is that promise for each row of the batch, and a row of extent 0
is zero: it attends to nothing.

:func:`attention` is the meaning, and what runs wherever no kernel does. On a CPU a step of few new tokens runs in
generated C++ (:mod:`fxopt.codegen.kernels.cpu_attention`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.codegen.kernels import cpu_attention
from fxopt.codegen.ops import LIBRARY

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? extent=None, Tensor? sinks=None, *, "
    "float scale, bool is_causal=False, float soft_cap=0.0, int window=0) -> Tensor"
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference from float64 for scores and values of unit variance: a few units in the last place of a sum of
head_dim products, and of the rounded probabilities."""


SMALLEST_BLOCK, LARGEST_BLOCK = 64, 512
"""Queries of one block where a window bounds the keys: few calls, and few keys that only a part of the block sees."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    soft_cap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """The operator's body; see the module's docstring for shapes and meaning.

    ``mask``: bool (True: attend) or additive, broadcastable to [B, Hq, T, S]. ``sinks: [Hq]``, a logit a head that
    takes part in the sum and has no value. ``is_causal`` aligns at the first key, like
    ``scaled_dot_product_attention``; ``window`` needs it. The result lies in memory as [B, T, Hq, DV].
    """
    batch, heads, tokens, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    if value.shape[2] != length:  # the library's kernel would read past the end
        raise RuntimeError(f"fxopt.attention: {length} keys and {value.shape[2]} values; there must be as many.")
    options = {"scale": scale, "is_causal": is_causal, "soft_cap": soft_cap, "window": window}
    if extent is not None and extent.device.type == "cpu":
        if extent.ndim and not bool((extent > 0).all()):
            return _row_by_row(query, key, value, mask, extent, sinks, options)
        filled = max(1, min(int(extent.amax()), length))
        key, value = key.narrow(2, 0, filled), value.narrow(2, 0, filled)
        if mask is not None and mask.shape[-1] == length:
            mask = mask.narrow(-1, 0, filled)
        length = filled
    elif extent is not None and extent.ndim:  # reading a device's value would stop the host in every layer
        out = attention(query, key, value, mask, None, sinks, **options)  # type: ignore[arg-type]
        return torch.where(extent.reshape(-1, 1, 1, 1) > 0, out, 0)
    if is_causal and tokens == length and mask is None and (soft_cap or sinks is not None or 0 < window < tokens):
        return _laid_out(_in_blocks(query, key, value, sinks, scale, soft_cap, window or tokens))
    if is_causal and tokens == length and mask is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=group > 1)
        return _laid_out(out)
    if is_causal:
        allowed = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril()
        allowed = allowed.triu(1 - window) if window else allowed
        mask = allowed if mask is None else (mask & allowed if mask.dtype == torch.bool else _hidden(mask, allowed))
    packed = query.reshape(batch, kv_heads, group * tokens, query.shape[3])
    mask = pack_mask(mask, kv_heads, group, tokens)
    # The library takes additive masks of the query's own dtype only.
    foreign = mask is not None and mask.dtype not in (torch.bool, query.dtype)
    if soft_cap or sinks is not None or foreign:
        if sinks is not None:
            sinks = sinks.reshape(kv_heads, group, 1).expand(-1, -1, tokens).reshape(kv_heads, -1)
        out = _explicit(packed, key, value, mask, sinks, scale, soft_cap)
    else:
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    if tokens == 1:
        # Through one dimension, as in _laid_out; what is left of a copy is one.
        return out.reshape(-1).view(batch, 1, heads, value.shape[3]).transpose(1, 2)
    return _laid_out(out.reshape(batch, heads, tokens, -1))


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extent: Tensor, sinks: Tensor | None,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The rows of a batch that attend to anything, one by one and each up to its extent; zero for the others."""
    batch, heads, tokens, _ = query.shape
    out = query.new_zeros(batch, tokens, heads, value.shape[3]).transpose(1, 2)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        mask = mask.expand(batch, -1, -1, -1)
    for row in extent.nonzero().flatten().tolist():
        own = slice(row, row + 1)
        seen = None if mask is None else mask[own]
        out[own] = attention(query[own], key[own], value[own], seen, extent[row], sinks, **options)
    return out


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, soft_cap: float, window: int
) -> Tensor:
    """Causal attention with a window: each block of queries meets the keys that any of them sees, and no others."""
    tokens = query.shape[2]
    size = min(max(window, SMALLEST_BLOCK), LARGEST_BLOCK)
    place = torch.arange(tokens, device=query.device)
    parts = []
    for start in range(0, tokens, size):
        end, low = min(start + size, tokens), max(0, start - window + 1)
        distance = place[start:end, None] - place[low:end]
        parts.append(
            attention(
                query[:, :, start:end], key[:, :, low:end], value[:, :, low:end],
                (distance >= 0) & (distance < window), None, sinks, scale=scale, soft_cap=soft_cap,
            )
        )  # fmt: skip
    return torch.cat(parts, 2)


def pack_mask(mask: Tensor | None, kv_heads: int, group: int, tokens: int) -> Tensor | None:
    """A mask for [B, Hq, T, S] as one for [B, Hkv, G * T, S]; a view wherever broadcasting allows."""
    if mask is None or group == 1:
        return mask
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    batch, heads, rows, length = mask.shape
    if heads == 1:
        # One row for the whole group broadcasts as it is.
        return mask if rows == 1 else mask.repeat(1, 1, group, 1)
    return mask.expand(-1, -1, tokens, -1).reshape(batch, kv_heads, group * tokens, length)


def _hidden(bias: Tensor, allowed: Tensor) -> Tensor:
    return bias.masked_fill(~allowed, float("-inf"))


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, soft_cap: float
) -> Tensor:
    # What scaled_dot_product_attention has no form for. Softmax in float32 (float64 stays), as eager models do.
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = (scores if scores.dtype == torch.float64 else scores.float()).mul_(scale)
    if soft_cap:
        scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[:, :, None]
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0) if sinks is None else total + (sinks - top).exp()
    return torch.matmul(weights.div_(total).to(value.dtype), value)


def _laid_out(out: Tensor) -> Tensor:
    # [B, Hq, T, DV] in the memory of [B, T, Hq, DV], which is what follows an attention in every model.
    out = out.transpose(1, 2).contiguous()
    # Through one dimension, so that dimensions of size 1 have the strides that the fake promises.
    return out.view(-1).view(out.shape).transpose(1, 2)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    soft_cap: float = 0.0,
    window: int = 0,
) -> Tensor:
    batch, heads, tokens, width = query.shape
    torch._check(heads % key.shape[1] == 0, lambda: f"{heads} query heads do not divide into {key.shape[1]} KV heads")
    torch._check(width == key.shape[3], lambda: f"query has {width} channels and key {key.shape[3]}")
    torch._check(key.shape[2] == value.shape[2], lambda: f"{key.shape[2]} keys and {value.shape[2]} values")
    return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    soft_cap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """The generated C++ where it is the better way (few new tokens on a cache), else the body."""
    out = cpu_attention.run(
        query, key, value, mask, extent, sinks, scale=scale, is_causal=is_causal, soft_cap=soft_cap
    )  # fmt: skip
    if out is not None:
        return out
    return attention(
        query, key, value, mask, extent, sinks, scale=scale, is_causal=is_causal, soft_cap=soft_cap, window=window
    )


LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attention", attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention", _on_cpu, "CPU")
torch.library.register_fake("fxopt::attention", _fake, lib=LIBRARY)


def read_extent(mask: Tensor) -> Tensor:
    """How many leading positions of the cache anybody may look at: last unmasked position + 1, 0-d int64.

    ``mask``: bool or additive, [..., T, S]. Masked is ``False``, ``-inf`` or the lowest finite number of the dtype. A
    row with nothing unmasked attends to everything (or to nothing), so it keeps the full extent S.

        [0 1 1 0 0 0]   row reaches 3
        [1 1 1 1 0 0]   row reaches 4      -> 4
    """
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    length = mask.shape[-1]
    position = torch.arange(1, length + 1, device=mask.device)
    reach = torch.where(visible, position, 0).amax(-1)
    return torch.where(reach == 0, length, reach).amax()


def sample_inputs(
    *, batch: int = 2, heads: int = 8, kv_heads: int = 2, tokens: int = 1, length: int = 64, width: int = 16,
    filled: int | None = None, kind: str = "bool", dtype: torch.dtype = torch.float32, device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor | float | None]:  # fmt: skip
    """Keyword arguments of :func:`attention` for a cache of which `filled` positions are in use.

    ``kind``: mask as ``"bool"``, ``"-inf"``, ``"min"`` (lowest finite number) or ``"none"``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    filled = length if filled is None else filled
    # Token t of the newest `tokens` sees what was there before it.
    visible = torch.arange(length) <= (filled - tokens + torch.arange(tokens))[:, None]
    mask: Tensor | None = visible.expand(batch, 1, tokens, length).to(device)
    if kind == "none":
        mask = None
    elif kind != "bool":
        low = float("-inf") if kind == "-inf" else torch.finfo(dtype).min
        mask = torch.zeros(batch, 1, tokens, length, dtype=dtype, device=device).masked_fill(~mask, low)  # type: ignore[operator]
    return {
        "query": normal(batch, heads, tokens, width),
        "key": normal(batch, kv_heads, length, width),
        "value": normal(batch, kv_heads, length, width),
        "mask": mask,
        "extent": None if mask is None else read_extent(mask),
        "scale": width**-0.5,
    }
