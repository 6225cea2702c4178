"""Which channels of the keys carry the scores: statistics after rotary embedding, one list for each KV head.

The importance of channel c for a KV head is the mean of ``|q_c k_c|`` over all tokens of all samples and over the query
heads that read it (a token's own query and key, Double Sparsity, arXiv 2408.07092). Rotary embedding mixes channels c
and c + D / 2, so both are kept or neither.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fxopt.passes.technique import SettingError

_KEY = re.compile(r"(?P<path>.*\.layers\.(?P<layer>\d+)\.self_attn)\.(?P<kind>q|k|qk)_proj$")

DENSE_LAYERS = 2
"""First layers that stay dense, as in the paper: their attention is spread over everything."""


def product_sums(query: Tensor, key: Tensor) -> Tensor:
    """Sum over samples, tokens and query heads of ``|q_c k_c|``: [Hkv, D], float64.

    ``query: [B, Hq, T, D]``, ``key: [B, Hkv, T, D]``, the same tokens, as attention reads them.
    """
    grouped = query.double().unflatten(1, (key.shape[1], -1))
    return (grouped * key.double()[:, :, None]).abs().sum((0, 2, 3))


def heaviest(importance: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """The `count` channels of every head with the largest importance, pairs (c, c + D / 2) together, ascending.

    ``importance: [Hkv, D]``. Raises SettingError for an odd count or more channels than there are.
    """
    width = importance.shape[1]
    if count % 2 or not 2 <= count <= width:
        raise SettingError(
            f"SparseAttention(channels={count}): channels come in rotated pairs; allowed are even numbers from 2 to "
            f"{width}, the width of a head."
        )
    pairs = importance[:, : width // 2] + importance[:, width // 2 :]
    best = pairs.topk(count // 2, -1).indices
    return tuple(tuple(sorted([*row, *(c + width // 2 for c in row)])) for row in best.tolist())


def read_lists(path: str | os.PathLike[str], kind: str = "k") -> dict[int, tuple[tuple[int, ...], ...]]:
    """Channel lists in the JSON format of the paper's authors: {layer: one permutation of the channels a head}.

    ``kind``: ``"q"``, ``"k"`` or ``"qk"``. Their ``qk`` lists are refused, with what shows it in this file: the
    published calibration merges heads with tokens and keeps only the last sample. Other keys of the file are ignored.
    Raises SettingError.
    """
    if kind not in ("q", "k", "qk"):
        raise SettingError(f"channel lists are of kind 'k', 'q' or 'qk', not {kind!r}; take 'k'.")
    source = pathlib.Path(path)
    if not source.is_file():
        raise SettingError(f"there is no file {os.fspath(path)!r} with channel lists.")
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{os.fspath(path)!r} is no JSON file: {error}") from error
    lists: dict[int, tuple[tuple[int, ...], ...]] = {}
    for name, heads in found.items() if isinstance(found, Mapping) else ():
        match = _KEY.match(name)
        if match and match["kind"] == kind:
            lists[int(match["layer"])] = _permutations(name, heads)
    if not lists:
        raise SettingError(f"{os.fspath(path)!r} has no '*.layers.N.self_attn.{kind}_proj' lists.")
    if kind == "qk":
        width = len(next(iter(lists.values()))[0])
        count = max(1, width // 8)
        raise SettingError(
            "the authors' qk_proj lists are not those of heads: they average over wrong dimensions (heads are mixed "
            f"with tokens), and only the last sample counts. In {os.fspath(path)!r} two heads of a layer share "
            f"{mean_overlap(lists, count):.1%} of their first {count} channels; by chance it were {count / width:.1%}. "
            "Use kind='k' or 'q', or calibrate with fxopt.tune."
        )
    return lists


def mean_overlap(lists: Mapping[int, tuple[tuple[int, ...], ...]], count: int) -> float:
    """:func:`head_overlap`, the mean over layers."""
    return sum(head_overlap(heads, count) for heads in lists.values()) / len(lists)


def first_channels(listed: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The first `count` channels of an order of importance, completed to rotated pairs (c, c + D / 2), ascending."""
    half = len(listed) // 2
    pairs = list(dict.fromkeys(c % half for c in listed))[: count // 2]
    return tuple(sorted([*pairs, *(c + half for c in pairs)]))


def head_overlap(lists: tuple[tuple[int, ...], ...], count: int) -> float:
    """Mean share of common channels among the first `count` of each two heads; chance is count / D."""
    tops = torch.zeros(len(lists), len(lists[0]))
    for head, listed in enumerate(lists):
        tops[head, list(listed[:count])] = 1
    common = (tops @ tops.T) / count
    heads = len(lists)
    return float((common.sum() - common.trace()) / (heads * (heads - 1))) if heads > 1 else 1.0


def _permutations(name: str, heads: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(heads, list) or not heads or not all(isinstance(h, list) for h in heads):
        raise SettingError(f"{name}: one list of channels for each head was expected.")
    for number, listed in enumerate(heads):
        if not all(type(c) is int for c in listed) or sorted(listed) != list(range(len(heads[0]))):
            raise SettingError(f"{name}: the list of head {number} is no permutation of {len(heads[0])} channels.")
    return tuple(tuple(listed) for listed in heads)
