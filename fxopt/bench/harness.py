"""One harness for every suite: the same process, interleaved rounds, medians with spread, correctness first."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fxopt.codegen.files import write_whole

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclass
class Peer:
    """A way to do the work: ``call()`` does it once. ``output()``, when given, is compared before timing; ``after()``
    follows each call and is not timed."""

    name: str
    call: Callable[[], Any]
    output: Callable[[], torch.Tensor] | None = None
    after: Callable[[], Any] = lambda: None


@dataclass
class Row:
    """One measurement: seconds as median, with the quartiles, and the ratio to the baseline pair by pair."""

    case: str
    peer: str
    median: float
    low: float
    high: float
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    bound: float | None = None
    note: str = ""


@dataclass
class Result:
    """A suite's measurements with what is needed to trust them."""

    suite: str
    command: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    """What a suite found besides times, one dict of the same keys a line."""

    def table(self) -> str:
        """The rows as text: times in milliseconds, ratios to the first peer of each case; then the figures."""
        return "\n".join([*(self._times() if self.rows else ()), *_aligned(self.figures), *self.remarks])

    def _times(self) -> list[str]:
        lines = [f"{'case':<34} {'peer':<22} {'median ms':>10} {'quartiles':>17} {'ratio':>7} {'bound ms':>9}"]
        for row in self.rows:
            ratio = f"{row.ratio:.3f}" if row.ratio is not None else ""
            bound = f"{row.bound * 1e3:.3f}" if row.bound is not None else ""
            spread = f"{row.low * 1e3:.3f}..{row.high * 1e3:.3f}"
            lines.append(
                f"{row.case:<34} {row.peer:<22} {row.median * 1e3:>10.3f} {spread:>17} {ratio:>7} {bound:>9}"
                f"{'  ' + row.note if row.note else ''}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, **asdict(self)}

    def to_json(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the result; returns the path."""
        return write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def keep(self) -> pathlib.Path:
        """Write the result among the kept ones, under suite, device and date."""
        RESULTS.mkdir(exist_ok=True)
        device = re.sub(r"[^a-z0-9]+", "-", str(self.environment["device"]).lower().replace("(r)", "")).strip("-")
        return self.to_json(RESULTS / f"{self.suite}-{device}-{self.environment['date']}.json")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Bars of the medians, one group a case (needs matplotlib, in the inspect extra)."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'fxopt[inspect]'") from error
        cases = list(dict.fromkeys(r.case for r in self.rows))
        peers = list(dict.fromkeys(r.peer for r in self.rows))
        figure = Figure(figsize=(max(6, 1.6 * len(cases)), 4))
        axes = figure.subplots()
        for number, peer in enumerate(peers):
            found = {r.case: r.median * 1e3 for r in self.rows if r.peer == peer}
            positions = [i + number * 0.8 / len(peers) for i, case in enumerate(cases) if case in found]
            axes.bar(positions, [found[c] for c in cases if c in found], 0.8 / len(peers), label=peer)
        axes.set_xticks([i + 0.4 - 0.4 / len(peers) for i in range(len(cases))], cases, rotation=20, ha="right")
        axes.set_ylabel("ms")
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path)


def _aligned(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Dicts of the same keys as a table of text."""
    if not figures:
        return []
    lines = [list(figures[0]), *([shown(v) for v in line.values()] for line in figures)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def shown(value: Any) -> str:
    """A figure as text, five digits at most."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and date of a measurement."""
    name = torch.cuda.get_device_name() if device == "cuda" else (_cpu_name() or platform.machine())
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": triton_version,
        "python": platform.python_version(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return ""


def check_equal(peers: Sequence[Peer], *, tolerance: float) -> None:
    """Raise before anything is timed when two peers that must agree do not."""
    outputs = [(p.name, p.output()) for p in peers if p.output is not None]
    for name, output in outputs[1:]:
        reference = outputs[0][1]
        error = (output.double() - reference.double()).abs().max().item()
        scale = reference.double().abs().max().item() + 1e-12
        if not error / scale <= tolerance:
            first = outputs[0][0]
            raise AssertionError(f"{name} differs from {first} by {error / scale:.2e} (allowed {tolerance:.0e})")


def measure(
    case: str, peers: Sequence[Peer], *, rounds: int, device: str = "cpu", progress: Callable[[], None] | None = None
) -> list[Row]:
    """Time the peers in turn, A B C A B C ..., after one warm-up each; ratios are taken pair by pair to the first."""
    for peer in peers:
        peer.call()
        peer.after()
    times: dict[str, list[float]] = {p.name: [] for p in peers}
    gc.collect()
    with _no_collection():
        for turn in range(rounds):
            # Each in every place of a turn, so that a drift of the machine's speed favours nobody; and none twice in a
            # row, as an order that alternates has it: the second time finds its weights and caches warm.
            start = turn % len(peers) if len(peers) > 2 else 0
            for peer in (*peers[start:], *peers[:start]):
                times[peer.name].append(_seconds(peer.call, device))
                peer.after()
            if progress is not None:
                progress()
    first = peers[0].name
    rows = []
    for peer in peers:
        ratios = [own / base for own, base in zip(times[peer.name], times[first], strict=True)]
        low, high = quartiles(times[peer.name])
        ratio_low, ratio_high = quartiles(ratios)
        rows.append(
            Row(case, peer.name, statistics.median(times[peer.name]), low, high,
                statistics.median(ratios), ratio_low, ratio_high)
        )  # fmt: skip
    return rows


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call once a step; a rich bar on a terminal, silent elsewhere or without rich."""
    try:
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    with Progress(transient=True, disable=not os.isatty(2)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
