"""Cases of decode attention for Triton's interpreter; `test_attention_kernels.py` starts this file as a script.

The interpreter must be chosen (TRITON_INTERPRET=1) before Triton is imported, hence a process of its own. Here, torch
fills uninitialised memory with NaN.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fxopt.codegen.kernels.attention import DecodeAttention, decode_attention, empty_partials
from fxopt.codegen.kernels.attention_reference import reference

TOLERANCE = {torch.float16: 1e-3, torch.float32: 2e-6}


def serve() -> None:
    """Reads `[case, arguments]` lines, answers each with its traceback or null."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    np.seterr(all="ignore")  # the rows that overflow on purpose
    torch.utils.deterministic.fill_uninitialized_memory = True
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            torch.manual_seed(0)
            globals()[name](**arguments)
            answer = None
        except Exception:
            answer = traceback.format_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def tensors(desc: DecodeAttention, batch: int, kv_heads: int, length: int) -> tuple[torch.Tensor, ...]:
    q = torch.randn(batch, kv_heads * desc.group, desc.q_len, desc.head_dim)
    k = torch.randn(batch, kv_heads, length, desc.head_dim)
    v = torch.randn(batch, kv_heads, length, desc.channels)
    return q.to(desc.dtype), k.to(desc.dtype), v.to(desc.dtype)


def compare(desc: DecodeAttention, q: Any, k: Any, v: Any, *, phi: Any = 0.0, **extras: Any) -> tuple[Any, list[int]]:
    """Runs the kernels, compares with float64, and returns the output and the counter."""
    scale = extras.pop("scale", desc.head_dim**-0.5)
    if desc.softmax == "async" and not isinstance(phi, torch.Tensor):
        phi = torch.full((k.shape[1],), float(phi))
    given = extras if desc.softmax == "online" else extras | {"phi": phi}
    out, counter = decode_attention(desc, q, k, v, scale=scale, **given)
    for extra in ("counter", "partials"):
        extras.pop(extra, None)
    expected = reference(desc, q, k, v, scale=scale, **extras)
    assert out.dtype == desc.dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[desc.dtype], rtol=1e-3, equal_nan=True)
    return out, counter.tolist()


def case_shapes(length: int, group: int, head_dim: int, dtype: str, softmax: str) -> None:
    desc = DecodeAttention(getattr(torch, dtype), head_dim, group, softmax=softmax)
    q, k, v = tensors(desc, 1, 2, length)
    _, (recomputed, rows) = compare(desc, q, k, v)
    assert (recomputed, rows) == ((0, 2 * group) if softmax == "async" else (0, 0))


VARIANTS: dict[str, dict[str, Any]] = {
    "soft_cap": {"soft_cap": 2.0},
    "sinks": {"has_sinks": True},
    "sinks, one row": {"has_sinks": True, "group": 1},
    "causal": {"q_len": 4, "causal": True, "group": 1},
    "window": {"q_len": 3, "window": 70, "causal": True, "group": 1},
    "window, one row": {"group": 1, "window": 70},
    "bool": {"mask": "bool", "q_len": 2},
    "bool, one row": {"mask": "bool", "group": 1},
    "additive": {"mask": "additive", "q_len": 2},
    "alibi": {"alibi": True, "q_len": 2, "causal": True},
    "alibi, one row": {"alibi": True, "group": 1},
    "value_dim": {"value_dim": 48},
    "extent": {"has_extent": True},
    "two tiles of rows": {"group": 9, "q_len": 2},
    "everything": {
        "soft_cap": 5.0, "has_sinks": True, "causal": True, "window": 100, "mask": "additive", "alibi": True,
        "q_len": 2, "value_dim": 80, "has_extent": True,
    },
}  # fmt: skip


def extras_of(desc: DecodeAttention, batch: int, kv_heads: int, length: int, shared: bool) -> dict[str, Any]:
    heads = kv_heads * desc.group
    extras: dict[str, Any] = {}
    if desc.has_sinks:
        extras["sinks"] = torch.randn(heads)
    if desc.alibi:
        extras["slopes"] = torch.logspace(-1, -3, heads)
    if desc.has_extent:
        extras["extent"] = torch.tensor([length - 37, length, 5][:batch])
    if desc.mask != "none":
        visible = torch.rand(batch, 1 if shared else heads, 1 if shared else desc.q_len, length) > 0.3
        visible[..., 0] = True
        additive = torch.randn(visible.shape).masked_fill(~visible, -torch.inf)
        extras["mask"] = visible if desc.mask == "bool" else additive
    return extras


def case_variant(name: str, softmax: str, shared: bool) -> None:
    fields = {"dtype": torch.float32, "head_dim": 64, "group": 2, "softmax": softmax, "split_size": 64}
    desc = DecodeAttention(**(fields | VARIANTS[name]))
    q, k, v = tensors(desc, 2, 2, 150)
    compare(desc, q, k, v, **extras_of(desc, 2, 2, 150, shared))


def case_strides() -> None:
    desc = DecodeAttention(torch.float32, 64, 2, q_len=2)
    q = torch.randn(2, 2, 4, 64).transpose(1, 2)  # [B, Hq, T, D] seen in [B, T, Hq, D]
    k = torch.randn(2, 100, 2, 128).transpose(1, 2)[..., ::2]
    v = torch.randn(100, 64, 2, 2).permute(2, 3, 0, 1)
    compare(desc, q, k, v)


def scored(scores: torch.Tensor, dtype: torch.dtype, group: int) -> tuple[torch.Tensor, ...]:
    """Query and key of one KV head whose scores at scale 1 are `scores` [S]."""
    q = torch.zeros(1, group, 1, 64)
    q[..., 0] = 1.0
    k = torch.zeros(1, 1, len(scores), 64)
    k[..., 0] = scores
    v = torch.randn(1, 1, len(scores), 64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def case_phi(dtype: str, group: int, phi: float, recomputed: bool) -> None:
    """Llama-2-7B's published range of scores, -16.8 to 6.5, under one phi."""
    desc = DecodeAttention(getattr(torch, dtype), 64, group)
    q, k, v = scored(torch.linspace(-16.8, 6.5, 1027), desc.dtype, group)
    _, counter = compare(desc, q, k, v, phi=phi, scale=1.0)
    assert counter == [group if recomputed else 0, group]


def case_extreme_scores(scores: list[float], recomputed: int) -> None:
    desc = DecodeAttention(torch.float32, 64, 2)
    q, k, v = scored(torch.tensor(scores), desc.dtype, 2)
    _, counter = compare(desc, q, k, v, scale=1.0)
    assert counter == [recomputed, 2]


def case_overflowing_rows(softmax: str) -> None:
    """Rows that overflow are recomputed, rows beside them keep their bits."""
    desc = DecodeAttention(torch.float32, 64, 3, softmax=softmax)
    q, k, v = tensors(desc, 2, 2, 200)
    calm, _ = compare(desc, q, k, v)
    q[0, 1] *= 200.0
    q[1, 5] *= 200.0
    wild, counter = compare(desc, q, k, v)
    assert counter == ([2, 12] if softmax == "async" else [0, 0])
    same = torch.ones(2, 6, dtype=torch.bool)
    same[0, 1] = same[1, 5] = False
    assert torch.equal(calm[same], wild[same])


def case_huge_values() -> None:
    """Numerators that overflow although the denominators do not are recomputed as well."""
    desc = DecodeAttention(torch.float32, 64, 2)
    q, k, v = scored(torch.full((100,), 60.0), desc.dtype, 2)
    _, counter = compare(desc, q, k, v * 0 + 1e20, scale=1.0)
    assert counter == [2, 2]


def case_nothing_visible(softmax: str, kind: str) -> None:
    """As scaled_dot_product_attention: zero for False and -inf, the mean of the values for the lowest finite number."""
    desc = DecodeAttention(torch.float32, 64, 2, mask="bool" if kind == "bool" else "additive", softmax=softmax)
    q, k, v = tensors(desc, 2, 1, 100)
    hidden = {"bool": False, "inf": -torch.inf, "finite": torch.finfo(torch.float32).min}[kind]
    mask = torch.full((2, 1, 1, 100), True if kind == "bool" else 0.0)
    mask[0] = hidden
    mask[1, ..., 50:] = hidden
    out, counter = compare(desc, q, k, v, mask=mask)
    eager = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, eager, atol=2e-6, rtol=0)
    if softmax == "async":
        assert counter == [2 if kind == "finite" else 0, 4]


def case_empty(softmax: str, group: int) -> None:
    desc = DecodeAttention(torch.float32, 64, group, has_extent=True, softmax=softmax)
    q, k, v = tensors(desc, 2, 1, 100)
    out, counter = compare(desc, q, k, v, extent=torch.tensor([0, 7], dtype=torch.int32))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert counter[0] == 0
    q, k, v = tensors(replace(desc, has_extent=False), 2, 1, 0)
    compare(replace(desc, has_extent=False), q, k, v)


def case_nan_score(softmax: str, everywhere: bool) -> None:
    desc = DecodeAttention(torch.float32, 64, 2, softmax=softmax)
    q, k, v = tensors(desc, 2, 1, 100)
    k[0, :, slice(None) if everywhere else 17] = torch.nan
    out, counter = compare(desc, q, k, v)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()
    assert counter[0] == (2 if softmax == "async" else 0)


def case_poison(softmax: str, group: int) -> None:
    """Nothing beyond a row's extent is read, neither of the cache nor of the scratch that was never written."""
    desc = DecodeAttention(torch.float32, 64, group, has_extent=True, softmax=softmax, window=150, split_size=64)
    q, k, v = tensors(desc, 3, 1, 400)
    extent = torch.tensor([63, 64, 301])
    for row, end in enumerate(extent.tolist()):
        k[row, :, end:] = torch.nan
        v[row, :, end:] = torch.nan
        q[row] *= 1.0 if row else 300.0  # one row that takes the fallback
    partials = empty_partials(desc, 3, 1, 400, q.device)
    assert partials.numerator.isnan().all()
    out, counter = compare(desc, q, k, v, extent=extent, partials=partials)
    assert not out.isnan().any()
    assert partials.numerator[0, :, 1:].isnan().all(), "a program wrote beyond the extent"
    assert partials.numerator[2, :, 0].isnan().all(), "a program wrote before the window"
    assert (counter[0] > 0) == (softmax == "async")


def case_independence(softmax: str, dtype: str, group: int) -> None:
    """A row alone, in a batch, and in a longer cache: the same bits; one row of them takes the fallback."""
    desc = DecodeAttention(getattr(torch, dtype), 64, group, has_extent=True, softmax=softmax)
    q, k, v = tensors(desc, 3, 1, 300)
    q[1] *= 100.0
    extent = torch.tensor([300, 120, 257])
    phi = torch.tensor([0.5])
    together, _ = compare(desc, q, k, v, extent=extent, phi=phi)
    for row in range(3):
        end = int(extent[row])
        one = slice(row, row + 1)
        alone, _ = compare(desc, q[one], k[one, :, :end], v[one, :, :end], extent=extent[one], phi=phi)
        assert torch.equal(together[one], alone)
    longer = (torch.cat([x, torch.randn(3, 1, 300, 64).to(x.dtype)], 2) for x in (k, v))
    again, _ = compare(desc, q, *longer, extent=extent, phi=phi)
    assert torch.equal(together, again)


def case_masked_tail(group: int) -> None:
    """The total length changes no bit either when a mask, not an extent, hides the rest of the cache."""
    desc = DecodeAttention(torch.float32, 64, group, mask="bool")
    q, k, v = tensors(desc, 2, 1, 700)
    visible = torch.arange(700) < 100
    long, _ = compare(desc, q, k, v, mask=visible[None, None, None])
    short, _ = compare(desc, q, k[:, :, :200], v[:, :, :200], mask=visible[None, None, None, :200])
    assert torch.equal(long, short)


def case_prefix_partials() -> None:
    desc = DecodeAttention(torch.float32, 64, 4)
    q, k, v = tensors(desc, 1, 1, 700)
    seen = []
    for length in (256, 300, 600, 700):
        partials = empty_partials(desc, 1, 1, length, q.device)
        compare(desc, q, k[:, :, :length], v[:, :, :length], partials=partials)
        seen.append(partials)
    for shorter, longer in zip(seen, seen[1:], strict=False):
        for a, b in zip(shorter, longer, strict=True):
            assert torch.equal(a[:, :, 0], b[:, :, 0])
    assert torch.equal(seen[2].numerator[:, :, :2], seen[3].numerator[:, :, :2])


def case_phi_per_row() -> None:
    desc = DecodeAttention(torch.float16, 64, 4, q_len=2)
    q, k, v = tensors(desc, 2, 2, 100)
    q[0, 3] *= 50.0
    scores = q.float() @ k.float().repeat_interleave(4, 1).transpose(-1, -2) * 64**-0.5
    _, counter = compare(desc, q, k, v, phi=scores.amax(-1))
    assert counter == [0, 32]
    _, counter = compare(desc, q, k, v, phi=torch.zeros(2))
    assert counter[0] > 0


def case_counter() -> None:
    desc = DecodeAttention(torch.float32, 64, 2)
    q, k, v = tensors(desc, 2, 1, 63)
    q[0, 1] *= 200.0
    counter = torch.zeros(2, dtype=torch.int64)
    for step in (1, 2, 3):
        _, seen = compare(desc, q, k, v, counter=counter)
        assert seen == [step, 4 * step] == counter.tolist()


if __name__ == "__main__":
    serve()
