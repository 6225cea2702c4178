"""The operators of sparse attention on CUDA and ROCm: which generated kernels each launches.

    update_page_bounds, update_features    codegen/kernels/select_state.py
    page_scores, feature_scores            codegen/kernels/select_scores.py
    choose                                 codegen/kernels/select_top.py
    gathered_attention                     codegen/kernels/attention.py, with a list of what is read

Elsewhere their PyTorch bodies run, in :mod:`fxopt.codegen.ops`. Nothing here waits for the device: whether a cache is
short enough to be read whole, whether state has to be derived anew and how long a list is are read by the kernels.
``block_bias`` and ``window_positions``, once a step, are PyTorch on the device as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The operators have to be defined before they get kernels.
import fxopt.codegen.ops.sparse_attention
import fxopt.codegen.ops.sparse_select
import fxopt.codegen.ops.sparse_state  # noqa: F401
from fxopt.codegen.kernels import Unsupported, select_scores, select_state, select_top
from fxopt.codegen.kernels.attention import decode_attention
from fxopt.codegen.kernels.attention_variants import DecodeAttention
from fxopt.codegen.ops import LIBRARY

MOST_HEADS = 63
"""KV heads of which some read everything: one bit each."""


def check(
    query: Tensor, key: Tensor, value: Tensor, *, soft_cap: float = 0.0, block: int = 1, dense_heads: Sequence[int] = ()
) -> None:
    """Raise :class:`Unsupported`, with the reason, where these tensors (real or fake) have no kernels."""
    sizes = (query.shape[1], query.shape[3], key.shape[1], value.shape[3])
    if not all(isinstance(size, int) for size in sizes):
        raise Unsupported("the number of heads or channels is symbolic")
    if dense_heads and key.shape[1] > MOST_HEADS:
        raise Unsupported(f"{key.shape[1]} KV heads with lists of their own; kernels know {MOST_HEADS}")
    describe(query, key, value, block=block, soft_cap=soft_cap)
    select_scores.Scores(query.dtype, query.shape[3], query.shape[1] // key.shape[1], block if block > 1 else 0)
    select_state.Kept(query.shape[3], block if block > 1 else 0)


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
    block: int = 1,
    count: int = 1,
    some_whole: bool = False,
) -> DecodeAttention:
    """The variant of decode attention that reads `count` blocks of each list; raises Unsupported."""
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    try:
        return DecodeAttention(
            dtype=query.dtype,
            head_dim=query.shape[3],
            group=query.shape[1] // key.shape[1],
            q_len=query.shape[2],
            value_dim=value.shape[3],
            soft_cap=soft_cap or None,
            has_sinks=sinks is not None,
            mask=kind,  # type: ignore[arg-type]
            softmax="online",
            split_size=list_split(count * block),
            has_extent=extent is not None,
            gather=block,
            counted=valid is not None,
            some_whole=some_whole,
        )
    except ValueError as error:
        raise Unsupported(str(error)) from error


def list_split(positions: int) -> int:
    """Listed positions of one program: about 32 programs for each KV head, whatever the batch, so that rows stay
    independent of it; lists are short, and few programs would leave most of the device idle."""
    size = 64
    while size < 512 and size * 32 < positions:
        size *= 2
    return size


def choose(
    scores: Tensor,
    bias: Tensor,
    extent: Tensor | None = None,
    *,
    count: int,
    block: int = 1,
    least: int = 0,
    counts: Sequence[int] = (),
    tau: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``fxopt.choose`` by the kernels; with `tau`, what they list is cut by PyTorch on the device."""
    index, valid = choose_blocks(scores, bias, extent, count=count, block=block, least=least, counts=counts)
    return _cut(index, scores, bias, tau, scale) if tau else (index, valid)


def choose_blocks(
    scores: Tensor, bias: Tensor, extent: Tensor | None = None, *, count: int, block: int = 1, least: int = 0,
    counts: Sequence[int] = (), tau: float = 0.0, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The part of :func:`choose` that is a kernel: `tau` and `scale` do not reach it."""
    return select_top.choose(scores, bias, extent, count=count, block=block, least=least, limits=tuple(counts))


def _cut(
    index: Tensor, scores: Tensor, bias: Tensor, tau: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Of each list the best blocks that together reach `tau` of the softmax over all; +inf in `bias` stays."""
    blocks = bias.shape[1]
    scores, bias = scores[..., :blocks], bias[:, None]
    hidden = float("-inf")
    listed, at = index >= 0, index.clamp(min=0)
    ranked = (scores + bias).gather(-1, at).masked_fill(~listed, hidden)
    ranked, order = ranked.sort(dim=-1, descending=True, stable=True)
    at, listed = at.gather(-1, order), listed.gather(-1, order)
    share = torch.softmax((scores * scale).masked_fill(bias == hidden, hidden), -1).nan_to_num(0.0).gather(-1, at)
    # Those that are read in any case come first; behind the first that is left out nothing is kept.
    keep = listed & ((share.cumsum(-1) - share < tau) | (ranked == float("inf")))
    return torch.where(keep, at, -1), keep.sum(-1)


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    min_length: int = 0,
    block: int = 1,
    dense_heads: Sequence[int] = (),
) -> Tensor:
    """``fxopt.gathered_attention`` by the kernels: [B, Hq, 1, DV], in memory as [B, 1, Hq, DV]."""
    batch, count = query.shape[0], index.shape[-1]
    if valid is not None and valid.ndim == 1:
        valid = valid[:, None]
    variant = describe(
        query, key, value, valid, mask, extent, sinks,
        soft_cap=soft_cap, block=block, count=count, some_whole=bool(dense_heads),
    )  # fmt: skip
    out, _ = decode_attention(
        variant, query, key, value, scale=scale, mask=mask, sinks=sinks, valid=valid,
        extent=None if extent is None else extent.expand(batch), index=index[:, None] if index.ndim == 2 else index,
        least=max(count * block, min_length - 1), whole_heads=tuple(dense_heads),
    )  # fmt: skip
    return out.view(batch, 1, query.shape[1], value.shape[3]).transpose(1, 2)


for _name, _kernel in (
    ("update_page_bounds", select_state.update_page_bounds),
    ("update_features", select_state.update_features),
    ("page_scores", select_scores.page_scores),
    ("feature_scores", select_scores.feature_scores),
    ("choose", choose),
    ("gathered_attention", gathered_attention),
):
    LIBRARY.impl(_name, _kernel, "CUDA")
