"""What an operation must compute and move, as sympy expressions, and how long a device needs for that at least.

Letters: B batch, S sequence length, L filled cache length, M rows (B * S), N output width, K depth, H query heads,
G key-value heads, D head dimension. Bytes count every operand once, which is what DRAM sees of a kernel that reads
nothing twice past the caches.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

B, S, L, M, N, K, H, G, D = sympy.symbols("B S L M N K H G D", positive=True, integer=True)
BLOCK_N = sympy.Symbol("BLOCK_N", positive=True, integer=True)


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply-add counts two) and bytes moved, as expressions."""

    flops: sympy.Expr
    bytes: sympy.Expr

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def at(self, **sizes: float) -> tuple[float, float]:
        """Numbers for given letters, `cost.at(M=1, N=4096, K=4096)`; raises KeyError naming a letter left open."""
        values = {letter: sizes[letter.name] for letter in self.flops.free_symbols | self.bytes.free_symbols}
        return float(self.flops.subs(values)), float(self.bytes.subs(values))


def linear(size: int, biased: bool = False) -> Cost:
    """`[M, K] @ [N, K].T`, elements of `size` bytes."""
    extra = N if biased else sympy.Integer(0)
    return Cost(2 * M * N * K + M * extra, size * (N * K + M * K + M * N + extra))


def fused_linear(fused: Any, size: int | None = None) -> Cost:
    """A `kernels.gemm.FusedLinear` as an expression in M: every weight, x, extra and output once.

    Args:
        fused: the group.
        size: bytes of an element of x and the weights; None takes it from the group's dtype.
    """
    size = getattr(torch, fused.dtype).itemsize if size is None else size
    total = sum(fused.widths)
    flops, moved = 2 * M * total * fused.depth, size * (total * fused.depth + M * fused.depth)
    if fused.norm is not None:
        flops += norm(size, fused.norm.kind).flops.subs(K, fused.depth)
        moved += size * fused.depth * (int(fused.norm.gamma) + int(fused.norm.beta))
    if fused.prologue is not None:
        per_row = len(_per_row(fused.prologue))
        flops += M * (fused.depth * (len(fused.prologue.steps) - per_row) + per_row)
        for extra in fused.prologue.extras:
            moved += getattr(torch, extra.dtype).itemsize * _elements(extra, fused.depth)
    for index, (output, width) in enumerate(zip(fused.epilogue.outputs, fused.output_widths, strict=True)):
        moved += getattr(torch, output.dtype).itemsize * M * width
        reach = fused.epilogue.reach(index)
        flops += M * width * sum(step.name in reach for step in fused.epilogue.steps)
    for extra in fused.epilogue.extras:
        width = next(w for i, w in enumerate(fused.output_widths) if extra.name in fused.epilogue.reach(i))
        moved += getattr(torch, extra.dtype).itemsize * _elements(extra, width)
    return Cost(sympy.expand(flops), sympy.expand(moved))


def _elements(extra: Any, width: int) -> Any:
    return {"full": M * width, "column": width, "row": M, "scalar": 1}[extra.layout]


def _per_row(prologue: Any) -> set[str]:
    """Steps that are computed once a row, [M, 1], from a prologue's statistic; the reduction itself takes M * K."""
    if prologue.statistic is None:
        return set()
    own: set[str] = set()
    narrow = {prologue.statistic.name, *(e.name for e in prologue.extras if e.layout in ("row", "scalar"))}
    for step in prologue.steps:
        if step is not prologue.statistic and all(a in narrow | own for a in step.args if isinstance(a, str)):
            own.add(step.name)
    return own


def norm(size: int, kind: str = "rms") -> Cost:
    """RMSNorm (`"rms"`) or LayerNorm (`"layer"`) of `[M, K]` with gamma (LayerNorm: and beta) `[K]`."""
    affine = 1 if kind == "rms" else 2
    # Square and sum, scale, gamma; LayerNorm also sums, subtracts and adds beta.
    return Cost(M * K * (4 if kind == "rms" else 7), size * (2 * M * K + affine * K))


def attention_decode(size: int) -> Cost:
    """One new token per sequence against L filled positions of G key-value heads, each read once for its group."""
    return Cost(4 * B * H * L * D, size * (2 * B * G * L * D + 2 * B * H * D))


def attention_chosen(size: int, kept: float, state: float) -> Cost:
    """One new token per sequence against `kept` chosen ones of L positions.

    ``state``: elements that are read a position and key-value head to choose them; each query head's score of a
    position takes a multiply-add for every one of them.
    """
    moved = 2 * B * G * kept * D + B * G * L * state + 2 * B * H * D
    return Cost(4 * B * H * kept * D + 2 * B * H * L * state, size * moved)


def attention_prefill(size: int, causal: bool = True) -> Cost:
    """S new tokens against themselves; a causal mask halves the products, not the bytes."""
    pairs = S * (S + 1) / 2 if causal else S * S
    return Cost(4 * B * H * pairs * D, size * (2 * B * H * S * D + 2 * B * G * S * D))


def intensity() -> sympy.Expr:
    """FLOPs per element moved when blocks of BLOCK_N columns each read all of x: FlashDecoding++, equation 5."""
    return 2 * M * K / (K + M * K / BLOCK_N + M)


@dataclass(frozen=True)
class Device:
    """Dense peaks from data sheets, without sparsity. flops per dtype in 1/s, bandwidth of DRAM in bytes/s."""

    name: str
    flops: Mapping[str, float] = field(hash=False)
    bandwidth: float
    units: int
    """Streaming multiprocessors, compute units or cores."""
    shared_bytes: int
    """Shared memory one block may use."""
    cache_bytes: int
    """The last cache before DRAM."""
    target: str = ""
    """What kernels are cross-compiled for (``codegen.targets``); empty where no cross-compiler knows it."""

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of matrix products in `dtype`; float32 is the vector rate, since TF32 is not float32."""
        return self.flops[dtype]


def _device(
    name: str, half: float, single: float, bandwidth: float, units: int, shared: int, cache: int, target: str = ""
) -> Device:
    flops = {"float16": half * 1e12, "bfloat16": half * 1e12, "float32": single * 1e12}
    return Device(name, flops, bandwidth * 1e9, units, shared * 1024, cache << 20, target)


DEVICES = {
    device.name: device
    for device in (
        #        name      fp16, bf16  fp32   GB/s  units  KiB  MiB
        _device("A100", 312.0, 19.5, 2039, 108, 163, 40, "sm_80"),
        _device("H100", 989.4, 66.9, 3350, 132, 227, 50, "sm_90"),
        _device("H200", 989.4, 66.9, 4800, 132, 227, 50, "sm_90"),
        _device("B200", 2250.0, 75.0, 8000, 148, 227, 126, "sm_100"),
        _device("MI300X", 1307.4, 163.4, 5300, 304, 64, 256, "gfx942"),
        _device("L4", 121.0, 30.3, 300, 58, 99, 48),
        _device("RTX 4090", 165.2, 82.6, 1008, 128, 99, 72),
    )
}


def find_device(name: str) -> Device | None:
    """The device of the table whose name occurs as words in `name`, such as `"NVIDIA H100 80GB HBM3"`."""
    words = name.replace("-", " ").split()
    return next((d for d in DEVICES.values() if all(part in words for part in d.name.split())), None)


_planned: contextvars.ContextVar[Device | None] = contextvars.ContextVar("planned device", default=None)


@contextlib.contextmanager
def planning(device: Device | None) -> Iterator[None]:
    """Let `device` be the GPU of this process, for decisions about one that is not here; None changes nothing."""
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)


def planned_device() -> Device | None:
    """The device of :func:`planning`; None outside of it."""
    return _planned.get()


def current_device(device: torch.device | None = None) -> Device:
    """The table's entry for a torch device; a GPU the table does not know is scaled from the A100 by its units."""
    planned = planned_device()
    if planned is not None and (device is None or device.type == "cuda"):
        return planned
    if (device is not None and device.type == "cpu") or not torch.cuda.is_available():
        return measure_cpu()
    properties = torch.cuda.get_device_properties(device)
    known = find_device(properties.name)
    if known is not None:
        return known
    base, units = DEVICES["A100"], properties.multi_processor_count
    flops = {dtype: rate * units / base.units for dtype, rate in base.flops.items()}
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    cache = getattr(properties, "L2_cache_size", base.cache_bytes)
    return Device(properties.name, flops, base.bandwidth * units / base.units, units, shared, cache)


@functools.cache
def measure_cpu() -> Device:
    """This CPU: peak from matrix products, bandwidth from reading 128 MB, well under a second, once per process."""

    def best(action: Any, repeats: int = 4) -> float:
        action()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return min(times)

    size = 384
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        flops[str(dtype).removeprefix("torch.")] = 2 * size**3 / best(lambda a=a: a @ a, 2)
    flops["float16"] = flops["bfloat16"]
    buffer = torch.ones(32 << 20)
    bandwidth = buffer.nbytes / best(buffer.sum)
    return Device("CPU", flops, bandwidth, torch.get_num_threads(), 32 << 10, 32 << 20)


def estimate(flops: float, bytes: float, device: Device, dtype: str = "bfloat16") -> float:
    """Seconds that `device` needs at least: the slower of computing and moving."""
    return max(flops / device.peak(dtype), bytes / device.bandwidth)


FILLED = 5 / 6
"""Blocks over units from which a device counts as busy: the units left idle cost less than another kernel would."""
LATENCY = 1e-6
"""Seconds from asking DRAM under load to having the data."""
MAX_SPLITS = 8


def block_n(n: int, device: Device) -> int:
    """Columns per block of a flat GEMM: as many as leave a block for every unit, at least 32.

    Wide blocks read x less often (equation 5), but where N gives too few of them, K has to be split, and that is a
    kernel more: 128 blocks of 32 columns of a [4096, 4096] keep 132 units as busy as 256 quarters of blocks of 64 do.
    """
    if n >= 128 * 2 * device.units:
        return 128
    return 64 if math.ceil(n / 64) >= FILLED * device.units else 32


def split_count(n: int, k: int, device: Device) -> int:
    """Runs that K is cut into where blocks of the least width leave units idle: a power of two, at least 512 deep each.

    A function of N, K and the device and not of M, so that a row's result does not depend on who else is in the batch.
    """
    blocks = math.ceil(n / block_n(n, device))
    splits = 1
    while splits < MAX_SPLITS and blocks * splits < FILLED * device.units and k // (2 * splits) >= 512:
        splits *= 2
    return splits


def split_counts(n: int, k: int, device: Device) -> list[int]:
    """Split counts worth measuring: :func:`split_count`, and 4 where that leaves a unit no more than 4 blocks."""
    few = math.ceil(n / block_n(n, device)) <= device.units and k // 4 >= 512
    return sorted({split_count(n, k, device), *([4] if few else [])})


def stages_in_flight(tile_bytes: int, blocks: int, device: Device) -> int:
    """Pipeline stages whose loads hide DRAM's latency (Little's law), 4 to 6: few blocks have to ask for more each."""
    wanted = device.bandwidth * LATENCY / device.units
    resident = max(1.0, blocks / device.units)
    return max(4, min(6, 1 + math.ceil(wanted / (tile_bytes * resident))))
