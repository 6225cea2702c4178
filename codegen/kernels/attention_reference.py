"""What `decode_attention` computes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.codegen.kernels.attention_variants import DecodeAttention


def reference(
    desc: DecodeAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Decode attention computed in `dtype`: [B, Hq, T, DV]; arguments as in `decode_attention`.

    The unified maximum, splits and tiles do not occur here: they change the way, not the meaning.
    """
    batch, heads, tokens, _ = q.shape
    length = k.shape[2]
    end = torch.full((batch,), length, device=q.device) if extent is None else extent.clamp(0, length)
    filled = torch.arange(length, device=q.device) < end[:, None]  # [B, S]
    # What lies beyond the extent is not read: it may be anything, NaN included.
    k = k.to(dtype).masked_fill(~filled[:, None, :, None], 0.0).repeat_interleave(desc.group, 1)
    v = v.to(dtype).masked_fill(~filled[:, None, :, None], 0.0).repeat_interleave(desc.group, 1)
    scores = q.to(dtype) @ k.transpose(-1, -2) * scale  # [B, Hq, T, S]
    if desc.soft_cap is not None:
        scores = desc.soft_cap * torch.tanh(scores / desc.soft_cap)
    visible = filled[:, None, None, :].expand(scores.shape)
    position = end[:, None] - tokens + torch.arange(tokens, device=q.device)  # [B, T]
    distance = torch.arange(length, device=q.device) - position[:, None, :, None]  # [B, 1, T, S], key minus query
    if slopes is not None:
        scores = scores + slopes.to(dtype)[:, None, None] * distance
    if desc.mask == "bool" and mask is not None:
        visible = visible & mask
    if desc.mask == "additive" and mask is not None:
        scores = scores + mask.to(dtype)
    if desc.causal:
        visible = visible & (distance <= 0)
    if desc.window is not None:
        visible = visible & (distance > -desc.window)
    scores = scores.masked_fill(~visible, -torch.inf)
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(dtype)[None, :, None, None].expand(batch, heads, tokens, 1)], -1)
    if logits.shape[-1] == 0:
        return torch.zeros(batch, heads, tokens, desc.channels, dtype=dtype, device=q.device)
    weights = torch.softmax(logits, -1)[..., :length]
    # scaled_dot_product_attention gives zero where nothing is visible, and so does this.
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return weights.masked_fill(empty, 0.0) @ v
