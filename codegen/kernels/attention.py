"""Split-KV decode attention by generated Triton kernels: description of a variant, its kernels, and the launcher.

`decode_attention` runs on CUDA and ROCm, and on CPU tensors under TRITON_INTERPRET=1. What it computes is said by
`reference` in `attention_reference.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fxopt.codegen.kernels import attention_source
from fxopt.codegen.kernels.phi import limits
from fxopt.codegen.source import load_kernel, write_source

LOG2E = math.log2(math.e)
LANES = 16
"""Splits that the combine kernel sums side by side."""
COMBINE_WARPS = 4
MAX_GRID_Y = 65535
"""CUDA's limit on the second grid dimension: splits in one kernel, rows in the other."""

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


class Partials(NamedTuple):
    """What the splits hand to the combine kernel, all float32; programs that have nothing to read write nothing."""

    numerator: Tensor
    """[B, Hkv, splits, R, DV]"""
    denominator: Tensor
    """[B, Hkv, splits, R]"""
    maximum: Tensor
    """[B, Hkv, splits, R], in units of log 2"""


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def local_backend() -> str:
    """"hip" where this torch was built for ROCm, else "cuda"."""
    return "hip" if torch.version.hip else "cuda"


def config(desc: DecodeAttention, backend: str | None = None) -> Config:
    """The shipped tile sizes. They depend on the variant only, never on batch or length: results would change.

    Stages change no result; AMD's 64 KB of local memory has room for two.
    """
    stages = 2 if (backend or local_backend()) == "hip" else 3
    width = _power_of_two(max(desc.head_dim, desc.channels))
    heavy = width > 128 or desc.dtype == torch.float32
    if desc.rows == 1:
        return Config(1, 16 if heavy else 32, 4, stages)
    if desc.dtype == torch.float32:
        return Config(16, 16 if width > 64 else 32, 8 if width > 64 else 4, stages)
    block_m = min(max(16, _power_of_two(desc.rows)), 32 if width > 128 else 64)
    return Config(block_m, 64 if block_m == 16 and width <= 128 else 32, 4, stages)


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
        "mask": desc.mask != "none",
        "bool": desc.mask == "bool",
        "additive": desc.mask == "additive",
        "shared": desc.mask_shared,
        "alibi": desc.alibi,
        "extent": desc.has_extent,
        "window": desc.window is not None,
        "causal": causal,
        "position": desc.alibi or causal or desc.window is not None,
        "soft_cap": desc.soft_cap is not None,
        "sinks": desc.has_sinks,
        "pad_d": _power_of_two(desc.head_dim) != desc.head_dim,
        "pad_dv": _power_of_two(desc.channels) != desc.channels,
    }
    unspecialized = ["length", "splits"]
    if not online:
        unspecialized += ["phi_batch"]
    if desc.mask != "none":
        unspecialized += ["mask_batch"] if desc.mask_shared else ["mask_batch", "mask_head", "mask_token"]
    values = {
        "unspecialized": ", ".join(f'"{name}"' for name in unspecialized),
        "also_unspecialized": ', "rows"' if recompute else "",
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
        parts.append(attention_source.fill(template, holds, values | {"symbol": symbol}))
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
    """What `targets.cross_compile` wants to know of a kernel, as Triton's launcher would find it for an ordinary cache."""

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
    kinds["mask"] = "*u8" if desc.mask == "bool" else f"*{element}"
    constants = {"query_dim": 1, "key_dim": 1, "value_dim": 1, "mask_position": 1}
    names = kernels(desc)[symbol].arg_names
    types = {name: kinds.get(name, "i32") for name in names if name not in constants}
    rows = [f"{tensor}_{axis}" for tensor in ("query", "key", "value") for axis in ("batch", "head", "token", "position")]
    aligned = [name for name in names if name in rows or types.get(name, "").startswith("*")]
    return Signature(types, {name: value for name, value in constants.items() if name in names}, aligned)


def empty_partials(desc: DecodeAttention, batch: int, kv_heads: int, length: int, device: torch.device) -> Partials:
    """Uninitialised scratch for a cache of `length` positions; it may be shared by the layers of a step."""
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
        fail(f"k is {tuple(k.shape)} and v is {tuple(v.shape)}; they need B, Hkv and S in common, and q's batch {batch}")
    if {q.dtype, k.dtype, v.dtype} != {desc.dtype}:
        fail(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; the description says {desc.dtype}; cast them first")
    if -(-length // desc.split_size) > MAX_GRID_Y:
        fail(f"{length} positions in splits of {desc.split_size} are more than {MAX_GRID_Y}; raise split_size")
    shapes = {"sinks": [(heads,)], "slopes": [(heads,)], "extent": [(batch,)], "phi": [(kv_heads,), q.shape[:3]]}
    for name, (wanted, given) in needed.items():
        if wanted != (given is not None):
            fail(f"{name} is {'missing' if wanted else 'given'}, but the description says otherwise")
        if given is not None and name in shapes and given.shape not in shapes[name]:
            fail(f"{name} is {tuple(given.shape)}; it needs {' or '.join(str(tuple(shape)) for shape in shapes[name])}")
        if given is not None and given.device != q.device:
            fail(f"{name} is on {given.device}, q on {q.device}; move it")


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

    Returns:
        The output [B, Hq, T, DV], contiguous, and the counter. A row with nothing unmasked is zero, as in
        `scaled_dot_product_attention`; a row masked with the lowest finite number everywhere is the mean of the values.

    Raises:
        ValueError: shapes, dtypes, devices or optional arguments that do not fit the description.
    """
    unified = desc.softmax == "async"
    _check(
        desc, q, k, v,
        {
            "mask": (desc.mask != "none", mask), "extent": (desc.has_extent, extent), "phi": (unified, phi),
            "sinks": (desc.has_sinks, sinks), "slopes": (desc.alibi, slopes),
        },
    )  # fmt: skip
    batch, heads, tokens, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    arguments: dict[str, Any] = {}
    if mask is not None:
        if (mask.dtype == torch.bool) != (desc.mask == "bool"):
            raise ValueError(f"decode_attention: mask is {mask.dtype}, the description says {desc.mask!r}")
        mask = mask.expand(batch, heads, tokens, length)
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
        arguments |= dict(zip((f"{name}_{axis}" for axis in ("batch", "head", middle, "dim")), tensor.stride(), strict=True))
    if partials is None:
        partials = empty_partials(desc, batch, kv_heads, length, q.device)
    splits = partials.denominator.shape[2]
    out = torch.empty((batch, heads, tokens, desc.channels), dtype=q.dtype, device=q.device)
    if counter is None:
        counter = torch.zeros(2, dtype=torch.int64, device=q.device)
    flags = torch.empty((batch, kv_heads, desc.rows), dtype=torch.int32, device=q.device) if unified else None
    arguments |= partials._asdict() | {
        "out": out, "flags": flags, "counter": counter, "sinks": sinks, "slopes": slopes, "extent": extent,
        "scale": scale, "length": length, "splits": splits, "kv_heads": kv_heads, "rows": batch * kv_heads * desc.rows,
    }  # fmt: skip
    tiles = config(desc)
    grids = {
        "split": (batch * kv_heads, splits, -(-desc.rows // tiles.block_m)),
        "combine": (batch * kv_heads, desc.rows, 1),
    }
    if out.numel():
        with torch.cuda.device_of(q):
            for symbol, kernel in kernels(desc).items():
                options = {"num_warps": tiles.num_warps} if symbol.endswith("split") else {"num_warps": COMBINE_WARPS}
                given = {name: arguments[name] for name in kernel.arg_names}
                kernel[grids[symbol.rpartition("_")[2]]](**given, **options)
    return out, counter
