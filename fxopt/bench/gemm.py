"""``fxopt bench gemm --device cuda``: linears of a decode step, a residual add after them, with a cold last cache.

Shapes of Llama-2-7B and Llama-3-8B, 1 to 64 rows. Peers: cuBLAS (eager), Inductor, Inductor with max-autotune; own
kernels alone (the faster family in its best configuration), and what the measured table dispatches to. An ablation runs
the best flat kernel with 1 to 4 stages. Each shape is written down when it is done, so that a second call goes on where
the first stopped; M1 and M2 go into a table, which ``--keep`` ships with the project.

On a CPU nothing is timed: the kernels that a GPU would get are compiled for it, and their resources shown.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import pathlib
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fxopt.bench.harness import Result, Row, environment, progress_bar, quartiles
from fxopt.bench.unfinished import Unfinished
from fxopt.codegen import measuring, roofline
from fxopt.codegen.dataflow import SHIPPED, Dataflow, Entry, Table, TableKey
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.gemm import Config, FusedLinear, bucket
from fxopt.codegen.kernels.gemm_launch import compile_for
from fxopt.codegen.kernels.gemm_launch import run as run_kernel
from fxopt.codegen.measuring import Trial, residual_group
from fxopt.codegen.source import cache_folder

SHAPES = {
    "llama-2-7b qkv": (12288, 4096), "llama-2-7b o": (4096, 4096), "llama-2-7b gate": (11008, 4096),
    "llama-2-7b down": (4096, 11008), "llama-3-8b qkv": (6144, 4096), "llama-3-8b o": (4096, 4096),
    "llama-3-8b gate, up": (28672, 4096),
    "llama-3-8b down": (4096, 14336), "llama-3-8b head": (128256, 4096),
}  # fmt: skip
"""[N, K] by name."""
ROWS = (1, 2, 4, 8, 16, 32, 64)
STAGES = (1, 2, 3, 4)
LARGE = 90e6
"""Bytes of weights from which the fraction of the read bandwidth is judged; below, launching shows."""
OWN, DISPATCHED, CUBLAS = "own kernels", "dispatched", "cublas"
AUTOTUNED = "inductor max-autotune"
GOALS = {"geometric mean": 1.15, "bandwidth": 0.8, "dispatched": 1.03}

Clock = Callable[[Trial], list[float]]


@dataclass
class Measured:
    """One [N, K]: seconds of every peer by M, as measured one after another; stages by M; what the table keeps."""

    times: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    stages: dict[int, dict[int, float]] = field(default_factory=dict)
    m1: int = 1
    m2: int = 1

    @staticmethod
    def of(data: dict[str, Any]) -> Measured:
        """From JSON, whose keys are strings."""
        times = {peer: {int(m): list(t) for m, t in row.items()} for peer, row in data["times"].items()}
        stages = {int(m): {int(s): t for s, t in row.items()} for m, row in data["stages"].items()}
        return Measured(times, stages, data["m1"], data["m2"])


def run(
    *,
    device: str = "cpu",
    quick: bool = False,
    clock: Clock | None = None,
    shapes: dict[str, tuple[int, int]] | None = None,
    rows: Sequence[int] | None = None,
    **injected: Any,
) -> Result:
    """All peers at every shape and number of rows. ``clock`` and `injected` stand in for a GPU in tests.

    Raises:
        ValueError: for ``--device cuda`` where there is none.
    """
    command = f"fxopt bench gemm{' --quick' if quick else ''} --device {device}"
    if device == "cuda" and clock is None and not torch.cuda.is_available():
        raise ValueError("fxopt bench gemm --device cuda needs a GPU; --device cpu compiles the kernels for one.")
    result = Result("gemm", command, environment(device if clock is None else "cpu"))
    chosen = shapes or (dict(list(SHAPES.items())[1:3]) if quick else SHAPES)
    tokens = tuple(rows or ((1, 16) if quick else ROWS))
    if device == "cpu" and clock is None:
        result.remarks += dry_run(chosen, tokens)
        return result
    place = injected.pop("place", None) or torch.device("cuda", torch.cuda.current_device())
    model = injected.pop("target", None) or roofline.current_device(place)
    watch = clock or measuring.cold_clock(place, model.cache_bytes)
    bandwidth = injected.pop("bandwidth", None) or read_bandwidth(watch, place)
    bench = Bench(model, place, watch, tokens, autotune=not quick, **injected)
    with progress_bar("gemm", len(chosen)) as tick:
        measured = bench.all(chosen, result.environment, tick)
    result.rows = [row for name in chosen for row in rows_of(name, chosen[name], measured[name], bandwidth)]
    result.remarks += summary(measured, chosen, bandwidth)
    return result


class Bench:
    """Measures shapes, keeping each as soon as it is done."""

    def __init__(
        self, model: roofline.Device, place: torch.device, clock: Clock, rows: Sequence[int], *, autotune: bool,
        check: measuring.Check = measuring.check, library: measuring.Library = measuring.compiled_library,
        launch: Callable[..., list[torch.Tensor]] = run_kernel, dtype: str = "bfloat16",
    ) -> None:  # fmt: skip
        self.model, self.place, self.clock, self.rows, self.autotune = model, place, clock, tuple(rows), autotune
        self.check, self.library, self.launch, self.dtype = check, library, launch, dtype
        self.key = TableKey.current(dtype, place)

    @property
    def folder(self) -> pathlib.Path:
        """Where unfinished measurements and the table lie."""
        return cache_folder() / "bench"

    def all(
        self, shapes: dict[str, tuple[int, int]], environment: dict[str, Any], tick: Callable[[], None]
    ) -> dict[str, Measured]:
        """Every shape, those that an earlier call finished taken from its file."""
        about = {**environment, "rows": list(self.rows), "autotune": self.autotune, "key": asdict(self.key)}
        kept = Unfinished("gemm", about, self.folder)
        table = Table(self.key)
        with contextlib.suppress(OSError, ValueError):
            found = Table.load(self.folder / self.key.file_name)
            table = found if found.key == self.key and kept.cases else table
        for name, (n, k) in shapes.items():
            if name not in kept or (n, k) not in table.entries:
                measured, table.entries[n, k] = self.shape(residual_group(n, k, self.dtype))
                kept.keep(name, asdict(measured))
                table.save(self.folder / self.key.file_name)
            tick()
        return {name: Measured.of(kept.cases[name]) for name in shapes}

    def shape(self, fused: FusedLinear) -> tuple[Measured, Entry]:
        """One [N, K] at every number of rows."""
        torch._dynamo.reset()
        kept: dict[tuple[str, int, Config | None], list[float]] = {}

        def timer(trial: Trial) -> float:
            kept[trial.choice, trial.rows, trial.config] = seconds = self.clock(trial)
            return statistics.median(seconds)

        entry = measuring.measure_entry(
            fused, self.model, self.place, timer, self.rows, check=self.check, library=self.library
        )
        found = Measured(m1=entry.thresholds.m1, m2=entry.thresholds.m2)
        body = self.library_body(fused)
        autotuned = torch.compile(body, mode="max-autotune-no-cudagraphs") if self.autotune else None
        for m in self.rows:
            x, weights, extras = measuring.operands(fused, m, self.place, m)
            own = {c: t for (choice, rows, c), t in kept.items() if choice != "library" and rows == m}
            if own:
                best = min(own, key=lambda config: statistics.median(own[config]))
                found.times.setdefault(OWN, {})[m] = own[best]
            found.times.setdefault("inductor", {})[m] = kept["library", m, None]
            for name, call in ((CUBLAS, body), (AUTOTUNED, autotuned)):
                if call is not None:
                    trial = Trial("library", m, None, functools.partial(call, x, weights, extras))
                    found.times.setdefault(name, {})[m] = self.clock(trial)
            choice = entry.thresholds.choose(m)
            config = self.dispatched(entry, fused, m)
            launch = functools.partial(self.launch, fused, x, weights, extras, config)
            stock = functools.partial(self.library(fused), x, weights, extras)
            again = Trial(choice, m, config, launch if config is not None else stock)
            found.times.setdefault(DISPATCHED, {})[m] = self.clock(again)
            found.stages[m] = self.ablation(fused, entry, m, x, weights, extras)
        return found, entry

    def dispatched(self, entry: Entry, fused: FusedLinear, m: int) -> Config | None:
        """What a table with this entry takes for m rows."""
        flow = Dataflow(fused.dtype, torch.device("cpu"), model=self.model)
        flow.table = Table(self.key, {(sum(fused.widths), fused.depth): entry})
        return flow.config(fused, m)

    def ablation(
        self, fused: FusedLinear, entry: Entry, m: int, x: Any, weights: Any, extras: Any
    ) -> dict[int, float]:
        """Median seconds of the best kernel for m rows by its number of stages."""
        base = entry.configs.get(f"flat-{max(16, bucket(m))}")
        found: dict[int, float] = {}
        if base is None:
            return found
        for stages in STAGES:
            config = replace(base, stages=stages)
            call = functools.partial(self.launch, fused, x, weights, extras, config)
            # Four stages of a large tile may not fit into shared memory.
            with contextlib.suppress(Unsupported):
                found[stages] = statistics.median(self.clock(Trial("flat", m, config, call)))
        return found

    @staticmethod
    def library_body(fused: FusedLinear) -> Callable[..., list[torch.Tensor]]:
        """The linear and the residual add as PyTorch runs them."""

        def body(x: Any, weights: Any, extras: Any) -> list[torch.Tensor]:
            return [torch.nn.functional.linear(x, weights[0]) + extras[0]]

        return body


def read_bandwidth(clock: Clock, place: torch.device) -> float:
    """Bytes per second of a sum over 2 GB."""
    data = torch.ones(1 << 30, dtype=torch.bfloat16, device=place)
    return data.nbytes / min(clock(Trial("library", 0, None, data.sum)))


def moved(n: int, k: int, m: int, dtype: str = "bfloat16") -> float:
    """Bytes that a linear with a residual add has to read and write."""
    return roofline.fused_linear(residual_group(n, k, dtype)).at(M=m)[1]


def rows_of(name: str, shape: tuple[int, int], measured: Measured, bandwidth: float) -> list[Row]:
    """Rows of the result, ratios to cuBLAS; the note is the fraction of the read bandwidth."""
    found = []
    for m, base in measured.times[CUBLAS].items():
        bound = moved(*shape, m) / bandwidth
        peers = [CUBLAS, *(peer for peer in measured.times if peer != CUBLAS)]
        for peer in (peer for peer in peers if m in measured.times[peer]):
            seconds = measured.times[peer][m]
            median, (low, high) = statistics.median(seconds), quartiles(seconds)
            ratio = median / statistics.median(base)
            case = f"{name} [{shape[0]}, {shape[1]}] M {m}"
            found.append(Row(case, peer, median, low, high, ratio, bound=bound, note=f"{bound / median:.0%}"))
    return found


def summary(measured: dict[str, Measured], shapes: dict[str, tuple[int, int]], bandwidth: float) -> list[str]:
    """Share won, geometric mean, bandwidth, dispatch, and where stages pay: the figures that the goals name."""
    won, speedups, fractions, losses = 0, [], [], []
    stages = []
    for name, found in measured.items():
        n, k = shapes[name]
        for m in found.times[CUBLAS]:
            medians = {peer: statistics.median(row[m]) for peer, row in found.times.items() if m in row}
            others = min(t for peer, t in medians.items() if peer not in (OWN, DISPATCHED))
            losses.append((medians[DISPATCHED] / others, f"{name} M {m}"))
            if OWN in medians:
                won += medians[OWN] < others
                speedups.append(medians[CUBLAS] / medians[OWN])
                if 2 * n * k >= LARGE:
                    fractions.append((moved(n, k, m) / bandwidth / medians[OWN], f"{name} M {m}"))
        lines = [f"M {m} {_stages(row)}" for m, row in found.stages.items() if row]
        stages.append(f"{name}: M1 = {found.m1}, M2 = {found.m2}; stages, time over that of one: {'; '.join(lines)}")
    cases = sum(len(found.times[CUBLAS]) for found in measured.values())
    lines = [f"read bandwidth, by a sum: {bandwidth / 1e9:.0f} GB/s"]
    if speedups:
        mean = statistics.geometric_mean(speedups)
        lines.append(
            f"own kernels alone: faster than every peer in {won} of {cases} cases; {mean:.3f}x cuBLAS in the geometric "
            f"mean (goal {GOALS['geometric mean']})"
        )
    else:
        lines.append("own kernels alone: none ran; see the warnings")
    if fractions:
        lines.append(
            f"read bandwidth from {LARGE / 1e6:.0f} MB of weights on: {statistics.median(f for f, _ in fractions):.0%} "
            f"in the median, least {min(fractions)[0]:.0%} at {min(fractions)[1]} (goal {GOALS['bandwidth']:.0%})"
        )
    lines.append(f"dispatched: at worst {max(losses)[0]:.3f} of the best peer's time, at {max(losses)[1]} "
                 f"(goal at most {GOALS['dispatched']})")  # fmt: skip
    return lines + stages


def _stages(row: dict[int, float]) -> str:
    best, first = min(row, key=row.__getitem__), row[min(row)]
    times = " ".join(f"{stages}:{row[stages] / first:.2f}" for stages in row)
    return f"{times} (best {best})"


def dry_run(shapes: dict[str, tuple[int, int]], rows: Sequence[int], target: str = "H200") -> list[str]:
    """What a GPU would be given: families and configurations by the roofline, compiled, with their resources."""
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed: kernels can be neither timed nor compiled"]
    device = roofline.DEVICES[target]
    lines = [f"nothing is timed on a CPU; what {target} would be given, compiled for sm_90:"]
    flow = Dataflow("bfloat16", torch.device("cpu"), model=device)
    flow.table = None
    for name, (n, k) in shapes.items():
        fused = residual_group(n, k, "bfloat16")
        for m in rows:
            config = flow.config(fused, m)
            floor = moved(n, k, m) / device.bandwidth * 1e6
            if config is None:
                lines.append(f"{name} [{n}, {k}] M {m}: the library; {floor:.1f} us at least")
                continue
            resources = "; ".join(info.summary() for info in compile_for(fused, config, "sm_90").values())
            lines.append(f"{name} [{n}, {k}] M {m}: {config}; {resources}; {floor:.1f} us at least")
    return lines


def keep() -> list[pathlib.Path]:
    """Ship the table that was measured on this GPU."""
    if not torch.cuda.is_available():
        return []
    key = TableKey.current("bfloat16", torch.device("cuda", torch.cuda.current_device()))
    source = cache_folder() / "bench" / key.file_name
    if not source.is_file() or Table.load(source).key != key:
        return []
    SHIPPED.mkdir(exist_ok=True)
    return [pathlib.Path(shutil.copy(source, SHIPPED / key.file_name))]
