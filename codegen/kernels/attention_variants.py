"""Variants of split-KV decode attention: their description, tile sizes, source and kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from fxopt.codegen.kernels import attention_source
from fxopt.codegen.kernels.phi import limits
from fxopt.codegen.source import fill, load_kernel, write_source

LOG2E = math.log2(math.e)
LANES = 16
"""Splits that the combine kernel sums side by side."""

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class DecodeAttention:
    """One variant of decode attention: everything that changes the generated source.

    Two calls whose descriptions are equal share one source file. A query token t of `q_len` stands at position
    `extent - q_len + t` (`length - q_len + t` without extents); `causal`, `window` and `alibi` are relative to it.
    """

    dtype: torch.dtype
    """Of query, key, value and output: float16, bfloat16 or float32."""
    head_dim: int
    """Channels of query and key, 16 to 256."""
    group: int
    """Query heads per KV head."""
    q_len: int = 1
    """New tokens, 1 to 16."""
    value_dim: int | None = None
    """Channels of value and output; None: as many as `head_dim`."""
    soft_cap: float | None = None
    """Scores become `cap * tanh(score / cap)` before any bias, as in Gemma 2."""
    has_sinks: bool = False
    """One more logit per query head in the denominator, with no value, as in GPT-OSS."""
    causal: bool = False
    """Query token t sees keys up to its own position."""
    window: int | None = None
    """A query token sees keys less than `window` positions before it (and itself)."""
    mask: Literal["none", "bool", "additive"] = "none"
    """A bool mask (True: visible) or an additive one of any float dtype."""
    mask_shared: bool = False
    """All query heads and tokens of a batch row share one mask row; `decode_attention` finds that out."""
    alibi: bool = False
    """Adds `slope * (key position - query position)`, one slope per query head."""
    softmax: Literal["async", "online"] = "async"
    """One unified maximum with a guard and a fallback, or a running maximum for each split."""
    split_size: int = 256
    """Cache positions of one program. Fixed, so that a row's result depends on no other row and on no total length."""
    has_extent: bool = False
    """A device tensor says how many cache positions of each batch row are filled; no others are read."""
    gather: int = 0
    """0: the cache in order; n: a list for each KV head names what is read, in blocks of n positions."""
    counted: bool = False
    """A device tensor says how many entries of each list count."""
    some_whole: bool = False
    """Some KV heads read everything, whatever their list says."""

    def __post_init__(self) -> None:
        def check(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"DecodeAttention: {message}")

        check(self.dtype in DTYPE_NAMES, f"dtype is {self.dtype}; use float16, bfloat16 or float32")
        for name, size in (("head_dim", self.head_dim), ("value_dim", self.channels)):
            check(16 <= size <= 256, f"{name} is {size}; the kernels take 16 to 256, use the PyTorch body otherwise")
        check(self.group >= 1, f"group is {self.group}; give the number of query heads per KV head, at least 1")
        check(1 <= self.q_len <= 16, f"q_len is {self.q_len}; decode is 1 to 16 new tokens, use prefill otherwise")
        check(self.soft_cap is None or self.soft_cap > 0, f"soft_cap is {self.soft_cap}; it must be positive or None")
        check(self.window is None or self.window >= 1, f"window is {self.window}; it must be at least 1 or None")
        check(self.mask in ("none", "bool", "additive"), f"mask is {self.mask!r}; use 'none', 'bool' or 'additive'")
        check(self.softmax in ("async", "online"), f"softmax is {self.softmax!r}; use 'async' or 'online'")
        check(
            self.split_size >= 64 and self.split_size & (self.split_size - 1) == 0,
            f"split_size is {self.split_size}; use a power of two of at least 64",
        )
        check(not self.mask_shared or self.mask != "none", "mask_shared needs a mask")
        check(
            self.gather >= 0 and self.gather & (self.gather - 1) == 0,
            f"gather is {self.gather}; use 0 (no list) or a power of two, the positions of a block",
        )
        if self.gather:
            check(
                not (self.causal or self.alibi or self.window is not None or self.q_len > 1),
                "a list is for one query token, and what depends on positions comes by a mask",
            )
        else:
            check(not (self.counted or self.some_whole), "counted and some_whole need gather")

    @property
    def channels(self) -> int:
        """Channels of value and output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def rows(self) -> int:
        """Query rows packed behind one KV head."""
        return self.group * self.q_len

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the probabilities, which bounds the unified maximum; see `phi.limits`."""
        return torch.float32 if self.rows == 1 else self.dtype


class Config(NamedTuple):
    """Tile sizes of the split kernel; they were chosen so that nothing spills on the targets in `targets.TARGETS`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def local_backend() -> str:
    """The backend of this torch: "hip" where it was built for ROCm, else "cuda"."""
    return "hip" if torch.version.hip else "cuda"


def config(desc: DecodeAttention, backend: str | None = None) -> Config:
    """The shipped tile sizes. They depend on the variant only, never on batch or length: results would change."""
    hip = (backend or local_backend()) == "hip"
    # AMD has 64 KB of local memory; and each masked column takes scalar registers, of which there are about a hundred.
    stages = 2 if hip else 3
    width = _power_of_two(max(desc.head_dim, desc.channels))
    heavy = width > 128 or desc.dtype == torch.float32
    if desc.rows == 1:
        return Config(1, 16 if heavy else 32, 4, stages)
    if desc.dtype == torch.float32:
        return Config(16, 16 if width > 64 else 32, 8 if width > 64 else 4, stages)
    block_m = min(max(16, _power_of_two(desc.rows)), 32 if width > 128 else 64)
    block_n = 64 if block_m == 16 and width <= 128 else 32
    return Config(block_m, block_n // 2 if hip else block_n, 4, stages)


def _values(desc: DecodeAttention, recompute: bool, backend: str | None) -> tuple[dict[str, bool], dict[str, object]]:
    tiles = config(desc, backend)
    vector = tiles.block_m == 1
    online = desc.softmax == "online" or recompute
    upper, lower = limits(desc.weight_dtype)
    cap = desc.soft_cap or 1.0
    # With one query token the last position is the query's own: nothing lies after it.
    causal = desc.causal and desc.q_len > 1
    holds = {
        "async": not online,
        "online": online,
        "recompute": recompute,
        "checked": not online or recompute,
        "vector": vector,
        "tile": not vector,
        "mask": desc.mask != "none",
        "bool": desc.mask == "bool",
        "additive": desc.mask == "additive",
        "shared": desc.mask_shared,
        "own": not desc.mask_shared,
        "alibi": desc.alibi,
        "extent": desc.has_extent,
        "window": desc.window is not None,
        "causal": causal,
        "position": desc.alibi or causal or desc.window is not None,
        "soft_cap": desc.soft_cap is not None,
        "gather": desc.gather > 0,
        "blocks": desc.gather > 1,
        "counted": desc.counted,
        "some_whole": desc.some_whole,
        "sinks": desc.has_sinks,
        "pad_d": _power_of_two(desc.head_dim) != desc.head_dim,
        "pad_dv": _power_of_two(desc.channels) != desc.channels,
    }
    unspecialized = ["length", "splits"]
    if desc.gather:
        unspecialized += ["count", "least"]
    if desc.some_whole:
        unspecialized += ["whole_heads"]
    also = unspecialized[2:] + (["rows"] if recompute else [])
    if not online:
        unspecialized += ["phi_batch"]
    if desc.mask != "none":
        unspecialized += ["mask_batch"] if desc.mask_shared else ["mask_batch", "mask_head", "mask_token"]
    values: dict[str, object] = {
        "unspecialized": ", ".join(f'"{name}"' for name in unspecialized),
        "also_unspecialized": "".join(f', "{name}"' for name in also),
        "G": desc.group,
        "T": desc.q_len,
        "D": desc.head_dim,
        "DV": desc.channels,
        "R": desc.rows,
        "SPLIT": desc.split_size,
        "BM": tiles.block_m,
        "BN": tiles.block_n,
        "BD": _power_of_two(desc.head_dim),
        "BDV": _power_of_two(desc.channels),
        "LANES": LANES,
        "STAGES": tiles.num_stages,
        "WINDOW": desc.window,
        "CAP_LOG2E": repr(cap * LOG2E),
        "TWICE_CAP_LOG2E": repr(2 * cap * LOG2E),
        "TWICE_LOG2E_BY_CAP": repr(2 * LOG2E / cap),
        "UPPER": repr(upper * LOG2E),
        "LOWER": repr(lower),
        "tile_origin": "tl.program_id(2) * BM" if desc.rows > tiles.block_m else "0",
        "precision": ', input_precision="ieee"' if desc.dtype == torch.float32 else "",
        "mask_live": "live" if vector else "in_rows[:, None] & live[None, :]",
        "AXIS": 0 if vector else 1,
        "ROW": "" if vector else "[:, None]",
        "KEY": "" if vector else "[None, :]",
        "MASK_KEY": "[None, :]" if not vector and not desc.mask_shared else "",
        "M_AT": "at[None, :]" if desc.gather and not vector and not desc.mask_shared else "at",
        "AT": "at[:, None]" if desc.gather else "at",
        "BLOCK": desc.gather,
        "PER_BLOCK": f" // {desc.gather}" if desc.gather > 1 else "",
        "UNITS": f"blocks of {desc.gather} positions" if desc.gather > 1 else "positions",
    }
    return holds, values


def kernel_names(desc: DecodeAttention) -> tuple[str, ...]:
    """The kernels of a variant in the order they are launched."""
    if desc.softmax == "online":
        return ("online_split", "online_combine")
    return ("async_split", "async_combine", "recompute_split", "recompute_combine")


@functools.cache
def source(desc: DecodeAttention, backend: str | None = None) -> str:
    """The Triton module of a variant, for "cuda" or "hip"; None: for the torch that runs here."""
    parts = [attention_source.PREAMBLE]
    for symbol in kernel_names(desc):
        holds, values = _values(desc, symbol.startswith("recompute"), backend)
        template = attention_source.SPLIT if symbol.endswith("split") else attention_source.COMBINE
        parts.append(fill(template, holds, values | {"symbol": symbol}))
    return "\n\n".join(part.rstrip("\n") + "\n" for part in parts)


def describe(desc: DecodeAttention, backend: str | None = None) -> dict[str, str]:
    """Header lines of the generated file: what differs from the plainest variant."""
    plain = DecodeAttention(desc.dtype, desc.head_dim, desc.group)
    names = ("dtype", "head_dim", "group", "q_len", "split_size", "softmax")
    lines = {name: str(getattr(desc, name)) for name in names}
    others = [name for name in desc.__dataclass_fields__ if name not in names]
    lines.update({name: str(getattr(desc, name)) for name in others if getattr(desc, name) != getattr(plain, name)})
    return lines | {"tiles": str(config(desc, backend))}


@functools.cache
def kernels(desc: DecodeAttention, backend: str | None = None) -> Mapping[str, Any]:
    """The `@triton.jit` functions of a variant by name; the source file is written on the first call."""
    path = write_source(f"decode_attention_{desc.softmax}", source(desc, backend), describe(desc, backend))
    return {symbol: load_kernel(path, symbol) for symbol in kernel_names(desc)}


class Signature(NamedTuple):
    """What `targets.cross_compile` wants to know of a kernel: what Triton's launcher finds for an ordinary cache."""

    types: dict[str, str]
    constexprs: dict[str, int]
    """Contiguous channels: a stride of one is a constant."""
    aligned: list[str]
    """Pointers, and the strides of query, key and value between rows: multiples of 16 for every usual head size."""


def signature(desc: DecodeAttention, symbol: str) -> Signature:
    """Argument types, constants and alignments of one kernel of a variant."""
    element = DTYPE_NAMES[desc.dtype]
    kinds = dict.fromkeys(("query", "key", "value", "out", "sinks"), f"*{element}")
    kinds |= dict.fromkeys(("numerator", "denominator", "maximum", "phi", "slopes"), "*fp32")
    kinds |= {"flags": "*i32", "extent": "*i32", "counter": "*i64", "scale": "fp32"}
    kinds |= {"index": "*i64", "valid": "*i64", "whole_heads": "i64"}
    kinds["mask"] = "*u8" if desc.mask == "bool" else f"*{element}"
    constants = {"query_dim": 1, "key_dim": 1, "value_dim": 1, "mask_position": 1}
    names = kernels(desc)[symbol].arg_names
    types = {name: kinds.get(name, "i32") for name in names if name not in constants}
    rows = [
        f"{tensor}_{axis}" for tensor in ("query", "key", "value") for axis in ("batch", "head", "token", "position")
    ]
    aligned = [name for name in names if name in rows or types.get(name, "").startswith("*")]
    return Signature(types, {name: value for name, value in constants.items() if name in names}, aligned)
