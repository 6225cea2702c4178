"""Kernels of sparse attention for Triton's interpreter: cases that `test_sparse_kernels.py` starts as a script."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fxopt.codegen.kernels.attention import DecodeAttention, decode_attention, empty_partials
from fxopt.codegen.kernels.attention_reference import reference
from fxopt.codegen.kernels.select_scores import feature_scores, page_scores
from fxopt.codegen.kernels.select_state import update_features, update_page_bounds
from fxopt.codegen.kernels.select_top import choose

TOLERANCE = {torch.float16: 1e-3, torch.float32: 2e-6}


# -- top-k ----------------------------------------------------------------------------------------------------------


def best_by_hand(
    scores: torch.Tensor, bias: torch.Tensor, end: int, count: int, block: int, limits: tuple[int, ...]
) -> torch.Tensor:
    """Lists by a sort in Python: NaN first, then by score, then by index."""
    lists = []
    for b in range(scores.shape[0]):
        own = bias[min(b, len(bias) - 1)].tolist()
        for h in range(scores.shape[1]):
            row = [s + o for s, o in zip(scores[b, h].tolist(), own, strict=False)]
            usable = [i for i in range(min(-(-end // block), len(own))) if -torch.inf not in (row[i], own[i])]
            usable.sort(key=lambda i, row=row: (row[i] == row[i], -row[i] if row[i] == row[i] else 0.0, i))
            taken = sorted(usable[: min(count, limits[h] if limits else count)])
            lists.append(taken + [-1] * (count - len(taken)))
    return torch.tensor(lists).view(*scores.shape[:2], count)


def case_choose(blocks: int, count: int, block: int, chunks: int, kind: str) -> None:
    scores = torch.randn(2, 2, blocks + 3)  # more columns than there are blocks
    if kind == "ties":
        scores = scores.mul(2).round()
    elif kind == "equal":
        scores = scores * 0
    elif kind == "extreme":
        scores[0, 0, ::3], scores[0, 1, 1::2], scores[1, 0, :2] = torch.nan, -torch.inf, torch.inf
        scores[1, 1] *= 1e38
    bias = torch.zeros(2 if kind == "random" else 1, blocks)
    bias[0, : blocks // 50] = torch.inf
    bias[-1, blocks // 2 : blocks // 2 + 2] = -torch.inf
    for filled in (None, max(1, blocks * block * 4 // 5)):
        for limits in ((), (max(1, count // 3), count)):
            end = blocks * block if filled is None else filled
            extent = None if filled is None else torch.tensor(filled)
            index, valid = choose(
                scores, bias, extent, count=count, block=block, limits=limits, chunks=chunks
            )
            assert torch.equal(index, best_by_hand(scores, bias, end, count, block, limits))
            assert torch.equal(valid, (index >= 0).sum(-1))


def case_nothing_to_choose() -> None:
    scores, bias = torch.randn(1, 2, 100), torch.full((1, 100), -torch.inf)
    for chunks in (1, 2):
        index, valid = choose(scores, bias, count=5, chunks=chunks)
        assert (index == -1).all()
        assert (valid == 0).all()
        # Up to `least` filled positions a cache is read whole: no list.
        index, valid = choose(scores, bias * 0, torch.tensor(40), count=5, least=40, chunks=chunks)
        assert (index == -1).all()
        assert (valid == 0).all()
        _, valid = choose(scores, torch.zeros(1, 100), torch.tensor(41), count=5, least=40, chunks=chunks)
        assert (valid == 5).all()


def case_chunks_change_nothing() -> None:
    scores, bias = torch.randn(1, 1, 5000).mul(3).round(), torch.zeros(1, 5000)
    alone, _ = choose(scores, bias, count=700, chunks=1)
    for chunks in (2, 5):
        index, _ = choose(scores, bias, count=700, chunks=chunks)
        assert torch.equal(index, alone)


# -- state ----------------------------------------------------------------------------------------------------------


def bounds_by_hand(key: torch.Tensor, end: int, page: int) -> torch.Tensor:
    parts = [key[:, :, at : min(at + page, end)] for at in range(0, end, page)]
    return torch.stack([torch.cat((part.amax(2), part.amin(2)), -1) for part in parts], 2)


def case_page_bounds(width: int, dtype: str) -> None:
    """From nothing, then step by step, then a step taken back: always what the keys say; nothing beyond is touched."""
    key = torch.randn(2, 3, 150, width).to(getattr(torch, dtype))
    key[0, 0, 3, 1] = torch.nan
    key[:, :, 133:] = torch.nan
    bounds = torch.empty(2, 3, 12, 2 * width, dtype=key.dtype)
    filled = torch.tensor(-1)
    for end in (100, 101, 112, 113, 133, 64, 133):
        used = -(-end // 16)
        update_page_bounds(bounds, filled, key, torch.tensor(end), page=16)
        assert int(filled) == end
        expected = bounds_by_hand(key, end, 16)
        torch.testing.assert_close(bounds[:, :, :used], expected, rtol=0, atol=0, equal_nan=True)
        assert bounds[:, :, 9:].isnan().all()
    # A step rewrites the last page alone.
    key[:, :, 16:32] = 7.0
    update_page_bounds(bounds, filled, key, torch.tensor(134), page=16)
    assert torch.equal(bounds[:, :, 1], expected[:, :, 1])
    # Up to `least` nothing is read or written.
    update_page_bounds(bounds, filled, key * torch.nan, torch.tensor(40), page=16, least=40)
    assert int(filled) == 134
    assert torch.equal(bounds[:, :, 1], expected[:, :, 1])


def case_features(listed: bool) -> None:
    key = torch.randn(2, 3, 150, 64)
    channels = torch.stack([torch.randperm(64)[:6].sort().values for _ in range(3)]) if listed else None
    meant = key if channels is None else key.gather(3, channels[None, :, None].expand(2, 3, 150, -1))
    features = torch.empty(2, 3, meant.shape[3], 160)
    filled = torch.tensor(-1)
    for end in (100, 101, 150, 30):
        update_features(features, filled, key, torch.tensor(end), channels)
        assert int(filled) == end
        assert torch.equal(features[..., :end], meant[:, :, :end].transpose(2, 3))
        assert features[..., 150:].isnan().all()
    features.zero_()
    update_features(features, filled, key, torch.tensor(31), channels)
    assert torch.equal(features[..., 30], meant[:, :, 30])
    assert (features[..., :30] == 0).all()


def decoded(features: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """[B, Hkv, C, S] of features in 8 or 4 bits."""
    if bits == 4:
        features = torch.stack(((features & 15).int() - 8, (features >> 4).int() - 8), -1).flatten(-2)
    return features * scales.repeat_interleave(128, -1)[..., : features.shape[-1]]


def coded_features(bits: int, key: torch.Tensor, channels: torch.Tensor) -> list[torch.Tensor]:
    lead = (*key.shape[:2], channels.shape[1])
    features = torch.zeros(*lead, 256 * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    return [features, torch.tensor(-1), torch.zeros(*lead, 2)]


def case_coded_features(bits: int) -> None:
    """Half a step of the block's scale from the keys, and the same codes step by step as in one shot."""
    key, channels = torch.randn(1, 2, 200, 64), torch.randint(0, 64, (2, 6))
    meant = key.gather(3, channels[None, :, None].expand(1, 2, 200, -1)).transpose(2, 3)
    features, filled, scales = coded_features(bits, key, channels)
    for end in (126, 127, 128, 129, 131):
        update_features(features, filled, key, torch.tensor(end), channels, scales, bits=bits)
        error = (decoded(features, scales, bits)[..., :end] - meant[..., :end]).abs()
        assert (error <= 0.501 * scales.repeat_interleave(128, -1)[..., :end]).all()
    once = coded_features(bits, key, channels)
    update_features(once[0], once[1], key, torch.tensor(131), channels, once[2], bits=bits)
    used = 131 * bits // 8
    assert torch.equal(features[..., :used], once[0][..., :used])
    assert torch.equal(scales, once[2])


# -- scores ---------------------------------------------------------------------------------------------------------


def case_page_scores(group: int, width: int, dtype: str) -> None:
    query = torch.randn(2, 2 * group, 1, width).to(getattr(torch, dtype))
    bounds = torch.randn(2, 2, 70, 2, width).sort(dim=3, descending=True).values.flatten(3).to(query.dtype)
    bounds[:, :, 63:] = torch.nan  # pages that nothing was written to
    found = page_scores(query, bounds, torch.tensor(63 * 16 - 5), page=16)
    grouped = query.double().view(2, 2, 1, group, width)
    high, low = bounds.double()[:, :, :63, None].chunk(2, -1)
    expected = torch.maximum(grouped * high, grouped * low).sum(-1).amax(3)
    torch.testing.assert_close(found[..., :63].double(), expected, rtol=1e-5, atol=1e-4)
    assert (found[..., 63:] == -torch.inf).all()
    if dtype == "float32":
        alone = page_scores(query[1:], bounds[1:], torch.tensor(63 * 16 - 5), page=16)
        assert torch.equal(alone, found[1:])
    assert (page_scores(query, bounds, torch.tensor(100), page=16, least=100) == -torch.inf).all()


def case_feature_scores(group: int, count: int, dtype: str) -> None:
    query = torch.randn(2, 3 * group, 1, 64).to(getattr(torch, dtype))
    features = torch.randn(2, 3, count, 300).to(query.dtype)
    features[..., 270:] = torch.nan
    channels = torch.stack([torch.randperm(64)[:count] for _ in range(3)])
    found = feature_scores(query, features, torch.tensor(270), channels)
    for h in range(3):
        listed = query.double().view(2, 3, group, 64)[:, h][..., channels[h]]
        expected = (listed @ features[:, h, :, :270].double()).amax(1)
        torch.testing.assert_close(found[:, h, :270].double(), expected, rtol=1e-5, atol=1e-4)
    assert (found[..., 270:] == -torch.inf).all()


def case_coded_scores(bits: int, group: int) -> None:
    query, key = torch.randn(1, 2 * group, 1, 64), torch.randn(1, 2, 200, 64)
    channels = torch.stack([torch.randperm(64)[:6] for _ in range(2)])
    features, filled, scales = coded_features(bits, key, channels)
    update_features(features, filled, key, torch.tensor(171), channels, scales, bits=bits)
    found = feature_scores(query, features, torch.tensor(171), channels, scales, bits=bits)
    plain = decoded(features, scales, bits)
    for h in range(2):
        listed = query.view(1, 2, group, 64)[:, h][..., channels[h]]
        torch.testing.assert_close(found[:, h, :171], (listed @ plain[:, h, :, :171]).amax(1), rtol=1e-5, atol=1e-5)
    assert (found[..., 171:] == -torch.inf).all()


# -- attention on lists ---------------------------------------------------------------------------------------------


def lists(batch: int, kv_heads: int, length: int, count: int, block: int) -> torch.Tensor:
    """Ascending blocks without repetition, padded with -1; the first row has fewer."""
    blocks = -(-length // block)
    order = torch.rand(batch, kv_heads, blocks).argsort(-1)[..., :count].sort(-1).values
    index = torch.nn.functional.pad(order, (0, max(count - blocks, 0)), value=-1)
    index[0, 0, count // 2 :] = -1
    return index


def listed_mask(index: torch.Tensor, block: int, length: int, group: int) -> torch.Tensor:
    """[B, Hq, 1, S] bool: the meaning of lists, as a mask."""
    batch, kv_heads, count = index.shape
    seen = torch.zeros(batch, kv_heads, length + block, dtype=torch.bool)
    at = (index[..., None] * block + torch.arange(block)).masked_fill(index[..., None] < 0, length + block - 1)
    seen.scatter_(2, at.reshape(batch, kv_heads, count * block).clamp(max=length + block - 1), True)
    return seen[..., :length].repeat_interleave(group, 1)[:, :, None]


def attend(
    desc: DecodeAttention, q: Any, k: Any, v: Any, index: Any, meant: Any, mask: Any = None, **given: Any
) -> torch.Tensor:
    """The kernels on lists, compared with float64 attention under the mask `meant`."""
    scale = desc.head_dim**-0.5
    phi = {"phi": torch.zeros(k.shape[1])} if desc.softmax == "async" else {}
    out, _ = decode_attention(desc, q, k, v, scale=scale, index=index, mask=mask, **given, **phi)
    plain = replace(desc, gather=0, counted=False, some_whole=False, mask="bool", mask_shared=False)
    if desc.mask == "bool":
        meant = meant & mask
    extras = {name: given[name] for name in ("extent", "sinks") if given.get(name) is not None}
    expected = reference(plain, q, k, v, scale=scale, mask=meant, **extras)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[desc.dtype], rtol=1e-3)
    return out


def tensors(desc: DecodeAttention, batch: int, kv_heads: int, length: int) -> tuple[torch.Tensor, ...]:
    q = torch.randn(batch, kv_heads * desc.group, 1, desc.head_dim)
    k, v = torch.randn(2, batch, kv_heads, length, desc.head_dim)
    return q.to(desc.dtype), k.to(desc.dtype), v.to(desc.dtype)


def case_gathered(length: int, group: int, head_dim: int, block: int, dtype: str, softmax: str) -> None:
    """Random lists, some shorter than the others; K above the length too."""
    desc = DecodeAttention(getattr(torch, dtype), head_dim, group, softmax=softmax, split_size=64, gather=block)
    q, k, v = tensors(desc, 2, 2, length)
    index = lists(2, 2, length, max(1, min(length // block // 2, 150)), block)
    attend(desc, q, k, v, index, listed_mask(index, block, length, group))
    longer = lists(2, 2, length, length // block + 3, block)
    attend(desc, q, k, v, longer, listed_mask(longer, block, length, group))


def case_gathered_with(block: int, mask: str, softmax: str, group: int) -> None:
    """Mask, extent, counted lists, sinks and heads that read everything, at once."""
    desc = DecodeAttention(
        torch.float32, 64, group, mask=mask, softmax=softmax, split_size=64, gather=block, counted=True,
        has_extent=True, has_sinks=True, some_whole=True,
    )  # fmt: skip
    q, k, v = tensors(desc, 3, 2, 300)
    index = lists(3, 2, 300, 250 // block, block)
    valid = (index >= 0).sum(-1)
    valid[2] = 3
    counted = index.masked_fill(torch.arange(index.shape[2]) >= valid[..., None], -1)
    meant = listed_mask(counted, block, 300, group)
    meant[:, group:] = True  # KV head 1 reads everything
    extent = torch.tensor([290, 40, 301])
    meant[1] = True  # no more than `least` positions: all of them
    visible = torch.rand(3, 1 if mask == "bool" else 2 * group, 1, 300) > 0.3
    given = visible if mask == "bool" else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    if mask == "additive":
        meant = meant & visible
    out = attend(
        desc, q, k, v, index, meant, mask=given, valid=valid, extent=extent, sinks=torch.randn(2 * group), least=40,
        whole_heads=(1,),
    )  # fmt: skip
    assert not out.isnan().any()


def case_nothing_listed(softmax: str, group: int) -> None:
    desc = DecodeAttention(torch.float32, 64, group, softmax=softmax, gather=1)
    q, k, v = tensors(desc, 1, 2, 100)
    index = torch.full((1, 2, 70), -1)
    index[0, 1, 5] = 7
    out = attend(desc, q, k, v, index, listed_mask(index, 1, 100, group))
    assert (out[:, :group] == 0).all()
    torch.testing.assert_close(out[:, group:], v[:, 1:2, 7:8].expand(1, group, 1, 64))


def case_whole_is_dense(softmax: str, group: int) -> None:
    """A cache no longer than `least` gives the bits of the dense kernel, whatever is listed."""
    desc = DecodeAttention(torch.float32, 64, group, softmax=softmax, split_size=64)
    q, k, v = tensors(desc, 2, 2, 200)
    phi = {"phi": torch.zeros(2)} if softmax == "async" else {}
    dense, _ = decode_attention(desc, q, k, v, scale=0.125, **phi)
    nothing = torch.full((1, 1, 4), -1)
    out, _ = decode_attention(
        replace(desc, gather=16), q, k, v, scale=0.125, index=nothing, least=200, **phi
    )
    assert torch.equal(out, dense)
    everything = torch.arange(13)[None, None]
    out, _ = decode_attention(replace(desc, gather=16), q, k, v, scale=0.125, index=everything, **phi)
    assert torch.equal(out, dense)


def case_gathered_poison(softmax: str, group: int, block: int) -> None:
    """What is not listed is not read: it is NaN. Scratch that no program had to write is NaN too."""
    desc = DecodeAttention(torch.float32, 64, group, softmax=softmax, gather=block, split_size=64, counted=True)
    q, k, v = tensors(desc, 2, 1, 400)
    index = lists(2, 1, 400, 320 // block, block)
    index[0, 0, 32 // block :] = -1
    valid = (index >= 0).sum(-1)
    meant = listed_mask(index, block, 400, 1)[:, :, 0]
    k.masked_fill_(~meant[..., None], torch.nan)
    v.masked_fill_(~meant[..., None], torch.nan)
    q[1] *= 100.0  # a row that takes the fallback
    partials = empty_partials(desc, 2, 1, 320, q.device)
    clean = [x.nan_to_num() for x in (k, v)]
    phi = {"phi": torch.zeros(1)} if softmax == "async" else {}
    out, _ = decode_attention(
        desc, q, k, v, scale=0.125, index=index, valid=valid, partials=partials, **phi
    )
    expected = reference(
        replace(desc, gather=0, counted=False, mask="bool"), q, *clean, scale=0.125, mask=meant[:, :, None]
    )
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-3)
    assert partials.numerator[0, :, 1:].isnan().all(), "a program wrote beyond the list"


def case_gathered_rows_are_independent(softmax: str, group: int) -> None:
    desc = DecodeAttention(torch.float32, 64, group, softmax=softmax, gather=1, split_size=64)
    q, k, v = tensors(desc, 3, 2, 300)
    q[1] *= 100.0
    index = lists(3, 2, 300, 150, 1)
    phi = {"phi": torch.zeros(2)} if softmax == "async" else {}
    together, _ = decode_attention(desc, q, k, v, scale=0.125, index=index, **phi)
    for row in range(3):
        one = slice(row, row + 1)
        alone, _ = decode_attention(desc, q[one], k[one], v[one], scale=0.125, index=index[one], **phi)
        assert torch.equal(alone, together[one])


if __name__ == "__main__":
    from interpreter import serve  # type: ignore[import-not-found]

    serve(globals())
