"""What sparse attention keeps beside a cache: bounds of pages of keys, and some channels of every key.

    update_page_bounds(bounds!, filled!, key, extent, *, page, least)        bounds [B, Hkv, P, 2 D]: maximum, minimum,
                                                                             rounded outwards where they have fewer bits
    update_features(features!, filled!, key, extent, channels, scales!, *, least, bits)
                                                                             features [B, Hkv, C, S']: of the keys

key [B, Hkv, S, D]; ``P * page`` and S' are S or more (the state of a growing cache is made with room to grow).
``extent``: filled positions, 0-d int64, None for S. ``filled``: 0-d int64, how many positions the state covers, -1 for
none. The newest key is added where that is one short of `extent`; wherever it is not, everything is derived from the
keys. Up to `least` filled positions attention is dense, and nothing is read or written here.

Features are kept as they are, or with ``bits`` 8 (int8) or 4 (uint8, two neighbouring positions a byte, the even one in
the low half, each plus 8): then ``scales`` [B, Hkv, C, S' / 128], float32, holds absmax / 127 or absmax / 7 of each
``QUANTUM`` positions of a channel (channels of keys differ in size, positions hardly: KIVI, arXiv 2402.02750). The
newest of these stretches is quantised from the keys in every step, so that steps give what one shot gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.codegen.kernels.cpu_select import QUANTUM
from fxopt.codegen.ops import LIBRARY
from fxopt.codegen.ops.sparse_gather import filled_length


def update_page_bounds(
    bounds: Tensor, filled: Tensor, key: Tensor, extent: Tensor | None = None, *, page: int, least: int = 0
) -> None:
    """Keep per page the maximum and the minimum of every channel (Quest, arXiv 2406.10774)."""
    known, end = int(filled.item()), filled_length(key.shape[2], extent)
    if end <= least:
        return
    width, dtype = key.shape[3], bounds.dtype
    top, bottom = bounds[..., :width], bounds[..., width:]
    at = (end - 1) // page
    if known == end - 1:
        highest, lowest = outward(key[:, :, end - 1], dtype)
        if (end - 1) % page == 0:
            top[:, :, at], bottom[:, :, at] = highest, lowest
        else:
            torch.maximum(top[:, :, at], highest, out=top[:, :, at])
            torch.minimum(bottom[:, :, at], lowest, out=bottom[:, :, at])
    else:
        whole = end // page
        paged = key[:, :, : whole * page].unflatten(2, (whole, page))
        top[:, :, :whole] = outward(paged.amax(3), dtype)[0]
        bottom[:, :, :whole] = outward(paged.amin(3), dtype)[1]
        if whole * page < end:
            rest = key[:, :, whole * page : end]
            top[:, :, whole] = outward(rest.amax(2), dtype)[0]
            bottom[:, :, whole] = outward(rest.amin(2), dtype)[1]
    filled.fill_(end)


def outward(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` in another dtype, never below it and never above it."""
    if x.dtype == dtype:
        return x, x
    near = x.to(dtype)
    ends = near.new_full((2,), float("inf"))
    return torch.where(near < x, torch.nextafter(near, ends[0]), near), torch.where(
        near > x, torch.nextafter(near, -ends[1]), near
    )


def update_features(
    features: Tensor,
    filled: Tensor,
    key: Tensor,
    extent: Tensor | None = None,
    channels: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    least: int = 0,
    bits: int = 0,
) -> None:
    """Keep some channels of every key, or all of them, channel by channel; ``channels: [Hkv, C]``, None for all."""
    known, end = int(filled.item()), filled_length(key.shape[2], extent)
    if end <= least:
        return
    first = end - 1 if known == end - 1 else 0
    if bits:
        first = first // QUANTUM * QUANTUM
    new = key[:, :, first:end]  # [B, Hkv, n, D]
    if channels is not None:
        new = new.gather(3, channels[None, :, None].expand(*new.shape[:3], -1))
    if scales is None:
        features[..., first:end] = new.transpose(2, 3)
    else:
        stretches = -(-(end - first) // QUANTUM)
        whole = torch.nn.functional.pad(new.transpose(2, 3).float(), (0, stretches * QUANTUM - (end - first)))
        parts = whole.unflatten(3, (stretches, QUANTUM))
        most = 127 if bits == 8 else 7
        scale = parts.abs().amax(-1) / most
        codes = (parts / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().flatten(3)
        start = first // QUANTUM
        scales[..., start : start + stretches] = scale
        if bits == 8:
            features[..., first : first + codes.shape[3]] = codes.to(torch.int8)
        else:
            pairs = (codes + 8).to(torch.uint8).unflatten(3, (-1, 2))
            packed = pairs[..., 0] | (pairs[..., 1] << 4)
            features[..., first // 2 : first // 2 + packed.shape[3]] = packed
    filled.fill_(end)


def restored(features: Tensor, scales: Tensor | None, end: int, bits: int) -> Tensor:
    """The first `end` positions of features ``[C, S']`` as numbers."""
    if scales is None:
        return features[..., :end]
    stretches = -(-end // QUANTUM)
    size = stretches * QUANTUM
    if bits == 8:
        codes = features[..., :size].float()
    else:
        packed = features[..., : size // 2]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).float() - 8
    return (codes.unflatten(-1, (stretches, QUANTUM)) * scales[..., :stretches, None]).flatten(-2)[..., :end]


def _fake_update(*args: object, **kwargs: object) -> None:
    return None


for _name, _schema, _body in (
    ("update_page_bounds",
     "(Tensor(a!) bounds, Tensor(b!) filled, Tensor key, Tensor? extent=None, *, int page, SymInt least=0) -> ()",
     update_page_bounds),
    ("update_features",
     "(Tensor(a!) features, Tensor(b!) filled, Tensor key, Tensor? extent=None, Tensor? channels=None, "
     "Tensor(c!)? scales=None, *, SymInt least=0, int bits=0) -> ()",
     update_features),
):  # fmt: skip
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{_name}", _fake_update, lib=LIBRARY)
