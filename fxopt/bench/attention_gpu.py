"""``fxopt bench attention --device cuda``: one decode attention of the generated kernels, with a cold last cache.

One new token a row on a full cache in bfloat16, 32 query heads of 128 channels on 32, 8 or 4 KV heads, batches of 1 to
64, lengths of 1k to 128k, up to 32 GiB of keys and values. The first peer is the asynchronous kernel with its fixed
split size, which is what a model gets; beside it the online kernel and splits fitted to the device, the library's
``scaled_dot_product_attention`` by each of its backends, as it stands and with the query heads of a group packed into
rows, and FlexAttention's decode kernel. Before a case is timed every result is compared with the library's while every
``torch.empty`` is filled with NaN. An ablation runs the asynchronous kernel at each split size.

Each case is written down when it is done. A call ends after about nine minutes, and the next one goes on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.bench.gemm import Clock, read_bandwidth
from fxopt.bench.harness import Peer, Result, Row, check_equal, environment, progress_bar, quartiles
from fxopt.bench.unfinished import Unfinished
from fxopt.codegen import lowering, measuring, roofline
from fxopt.codegen.measuring import Trial

HEADS, WIDTH = 32, 128
BATCHES, LENGTHS, GROUPS = (1, 8, 64), (1024, 8192, 32768, 131072), (1, 4, 8)
MOST = 32 << 30
"""Bytes of keys and values of the largest case."""
LARGE = 256 << 20
"""Bytes from which the fraction of the read bandwidth is judged; below, launching shows."""
SPLITS = (64, 128, 256, 512, 1024, 2048)
LIMIT = 540.0
"""Seconds after which no further case begins."""
OWN, ONLINE, FITTED, FLEX = "async", "online", "async, fitted splits", "flex_attention"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}  # fmt: skip
GOALS = {"bandwidth": 0.85, "flex": 1.1, "sdpa": 0.97}
TOLERANCE = 3e-2

Launch = Callable[..., tuple[Tensor, Tensor]]
"""``lowering.launch``, or what stands in for it where there is no GPU."""


@dataclass(frozen=True)
class Case:
    """Rows of a batch, positions of their caches, query heads on one KV head."""

    batch: int
    length: int
    group: int

    @property
    def kv_heads(self) -> int:
        return HEADS // self.group

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.length // 1024}k, group {self.group}"

    @property
    def bytes(self) -> int:
        """Of all keys and values, in 16 bits."""
        return 2 * self.batch * self.kv_heads * self.length * WIDTH * 2


def cases(quick: bool = False) -> list[Case]:
    """What is measured, small caches first, so that an interrupted call has the most of them."""
    found = [Case(b, s, g) for b, s, g in itertools.product(BATCHES, LENGTHS, GROUPS)]
    found = sorted((c for c in found if c.bytes <= MOST), key=lambda c: c.bytes)
    return found[:2] if quick else found


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every ``torch.empty`` is filled with NaN: what a kernel reads before it writes it shows in the result."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a peer has no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


class Attentions:
    """The tensors of one case and every way to attend with them; each call gives [B, Hq, 1, D]."""

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16, launch: Launch = lowering.launch
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, length: int) -> Tensor:
            shape = (case.batch, heads, length, WIDTH)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.case, self._launch = case, launch
        self.query = normal(HEADS, 1)
        self.key, self.value = normal(case.kv_heads, case.length), normal(case.kv_heads, case.length)
        # Scores of normal values are below 8 or so: phi 0 has room for ten times that in bfloat16.
        self.phi = torch.zeros(case.kv_heads, device=device)
        self.fitted = lowering.fitted_split(case.length, case.batch * case.kv_heads, device)

    def own(self, split: int = lowering.SPLIT_SIZE, unified: bool = True) -> tuple[Tensor, Tensor]:
        """The generated kernels: the result, and rows recomputed and computed, [2]."""
        phi = self.phi if unified else None
        return self._launch(
            self.query, self.key, self.value, None, None, None, phi,
            scale=WIDTH**-0.5, soft_cap=0.0, split_size=split,
        )  # fmt: skip

    def library(self, backend: SDPBackend | None = None, packed: bool = False) -> Tensor:
        """``scaled_dot_product_attention``; `packed`: the query heads of a group are rows of one head."""
        query, grouped = self.query, self.case.group > 1
        if packed:
            query, grouped = query.view(self.case.batch, self.case.kv_heads, self.case.group, WIDTH), False
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(query, self.key, self.value, enable_gqa=grouped)
        return out.reshape(self.query.shape)

    def peers(self, flex: bool = True) -> dict[str, Callable[[], Tensor]]:
        """Every peer by name, the first being what ratios refer to; those that this device cannot run are left out."""
        found: dict[str, Callable[[], Tensor]] = {
            OWN: lambda: self.own()[0],
            ONLINE: lambda: self.own(unified=False)[0],
            FITTED: lambda: self.own(self.fitted)[0],
        }
        others: dict[str, Callable[[], Tensor]] = {}
        for name, backend in BACKENDS.items():
            others[f"sdpa {name}"] = functools.partial(self.library, backend)
            if self.case.group > 1:
                others[f"sdpa {name}, packed"] = functools.partial(self.library, backend, packed=True)
        if flex:
            from torch.nn.attention.flex_attention import flex_attention

            compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
            grouped = self.case.group > 1
            others[FLEX] = lambda: compiled(self.query, self.key, self.value, enable_gqa=grouped)
        return found | {name: call for name, call in others.items() if _runs(call)}


def _runs(call: Callable[[], Tensor]) -> bool:
    """Whether torch has this on this device, at this shape; it says so by errors of many kinds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except torch.OutOfMemoryError:
        return False
    except (RuntimeError, ValueError, NotImplementedError, torch._dynamo.exc.TorchDynamoException):
        return False
    return True


def measured(attentions: Attentions, clock: Clock, flex: bool = True) -> dict[str, Any]:
    """Results compared, then seconds of every peer, medians by split size, and how many rows were recomputed."""
    calls = attentions.peers(flex)
    splits_of = {f"async, splits of {size}": functools.partial(attentions.own, size) for size in SPLITS}
    outputs = {**calls, **{name: lambda call=call: call()[0] for name, call in splits_of.items()}}  # type: ignore[misc]
    check_equal(
        [Peer("sdpa", lambda: None, attentions.library),
         *(Peer(name, call, poisoned()(call) if name.startswith((OWN, ONLINE)) else call)
           for name, call in outputs.items())],
        tolerance=TOLERANCE,
    )  # fmt: skip
    recomputed, rows = attentions.own()[1].tolist()
    times = {name: clock(Trial("flat", 1, None, call)) for name, call in calls.items()}
    splits = {
        size: statistics.median(clock(Trial("flat", 1, None, functools.partial(attentions.own, size))))
        for size in SPLITS
    }
    return {"times": times, "splits": splits, "recomputed": recomputed, "rows": rows, "fitted": attentions.fitted}


def rows_of(case: Case, found: dict[str, Any], bandwidth: float) -> list[Row]:
    """Rows of the result, ratios to the asynchronous kernel; the bound is reading every key and value once."""
    base, bound, rows = statistics.median(found["times"][OWN]), case.bytes / bandwidth, []
    for peer, seconds in found["times"].items():
        median, (low, high) = statistics.median(seconds), quartiles(seconds)
        row = Row(case.name, peer, median, low, high, median / base, bound=bound, note=f"{bound / median:.0%}")
        rows.append(row)
    return rows


def summary(done: dict[Case, dict[str, Any]], bandwidth: float) -> list[str]:
    """The figures that the goals name, what determinism costs, and the ablation of the split size."""
    medians = {case: {p: statistics.median(t) for p, t in found["times"].items()} for case, found in done.items()}
    lines = [f"read bandwidth, by a sum: {bandwidth / 1e9:.0f} GB/s"]
    shares = [(c.bytes / bandwidth / t[OWN], c.name) for c, t in medians.items() if c.bytes >= LARGE]
    if shares:
        lines.append(
            f"read bandwidth from {LARGE >> 20} MiB on: {statistics.median(s for s, _ in shares):.0%} in the median, "
            f"least {min(shares)[0]:.0%} at {min(shares)[1]} (goal {GOALS['bandwidth']:.0%})"
        )
    flex = [t[FLEX] / t[OWN] for t in medians.values() if FLEX in t]
    if flex:
        mean = geometric_mean(flex)
        lines.append(f"{mean:.3f}x FlexAttention in the geometric mean of {len(flex)} (goal {GOALS['flex']})")
    best = [
        (min(library) / t[OWN], c.name)
        for c, t in medians.items()
        if (library := [s for p, s in t.items() if p.startswith("sdpa")])
    ]
    if best:
        lines.append(
            f"{geometric_mean([b for b, _ in best]):.3f}x the library's best backend in the geometric mean, at worst "
            f"{min(best)[0]:.3f}x at {min(best)[1]} (goal {GOALS['sdpa']})"
        )
    lines.append(_against(medians, ONLINE, "async against online softmax"))
    lines.append(_against(medians, FITTED, "deterministic=True, fixed splits against fitted ones"))
    recomputed = sum(found["recomputed"] for found in done.values())
    lines.append(f"rows recomputed: {recomputed} of {sum(found['rows'] for found in done.values())}")
    for case, found in done.items():
        fixed = found["splits"][lowering.SPLIT_SIZE]
        over = " ".join(f"{size}:{seconds / fixed:.2f}" for size, seconds in found["splits"].items())
        lines.append(f"{case.name}: time by split size over that of {lowering.SPLIT_SIZE}: {over}; "
                     f"fitted {found['fitted']}")  # fmt: skip
    return lines


def _against(medians: dict[Case, dict[str, float]], peer: str, what: str) -> str:
    """Time of the first peer over that of `peer`."""
    found = [(times[OWN] / times[peer], case.name) for case, times in medians.items()]
    return (f"{what}: time {geometric_mean([f for f, _ in found]):.3f} in the geometric mean, {min(found)[0]:.3f} at "
            f"{min(found)[1]} to {max(found)[0]:.3f} at {max(found)[1]}")  # fmt: skip


def run(*, device: str = "cuda", quick: bool = False) -> Result:
    """All cases that fit into the device's memory; with `quick` the two smallest.

    Raises:
        ValueError: where there is no GPU.
        AssertionError: when a result is not the library's.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"fxopt bench attention --device {device} needs a GPU; --device cpu measures this processor.")
    place = torch.device("cuda", torch.cuda.current_device())
    clock = measuring.cold_clock(place, roofline.current_device(place).cache_bytes, 5 if quick else 20)
    command = f"fxopt bench attention{' --quick' if quick else ''} --device {device}"
    result = Result("attention", command, environment(device))
    kept = Unfinished("attention", {**result.environment, "quick": quick})
    bandwidth = read_bandwidth(clock, place)
    wanted = cases(quick)
    started, left = time.monotonic(), []
    with progress_bar("attention", len(wanted)) as tick, torch.no_grad():
        for case in wanted:
            # A quarter more than keys and values: what cuDNN and FlexAttention ask for beside them.
            if case.name not in kept and 1.25 * case.bytes > torch.cuda.mem_get_info()[0]:
                result.remarks.append(f"{case.name}: left out, its cache is {case.bytes / 1e9:.0f} GB")
            elif case.name not in kept and time.monotonic() - started > LIMIT:
                left.append(case.name)
            elif case.name not in kept:
                torch._dynamo.reset()
                kept.keep(case.name, measured(Attentions(case, place), clock))
                torch.cuda.empty_cache()
            tick()
    done = {case: _numbered(kept.cases[case.name]) for case in wanted if case.name in kept}
    result.rows = [row for case, found in done.items() for row in rows_of(case, found, bandwidth)]
    result.remarks += summary(done, bandwidth)
    if left:
        result.remarks.append(f"not measured yet, the same command goes on: {'; '.join(left)}")
    else:
        kept.done()
    return result


def _numbered(found: dict[str, Any]) -> dict[str, Any]:
    """Split sizes are strings in JSON."""
    return {**found, "splits": {int(size): seconds for size, seconds in found["splits"].items()}}
