"""Measures a dataflow table: every family and configuration that is worth a try against the library, at each M.

FlashDecoding++ (arXiv 2311.01282, section 5) raises M for each [N, K] until another kernel wins. Here the kernel is the
group that the model has, with its norm and its epilogue; the last cache is emptied before every call, and a kernel that
does not compile, or does not compute what the library computes, is left out.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxopt.codegen import roofline
from fxopt.codegen.dataflow import Choice, Entry, Table, TableKey, find_table, place_of, thresholds_from_times
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Output, Step
from fxopt.codegen.kernels.gemm import Config, Family, FusedLinear, configure, reference, shared_bytes
from fxopt.codegen.kernels.gemm_launch import run
from fxopt.codegen.source import cache_folder

MEASURED_ROWS = (1, 2, 3, 4, 8, 16, 32, 64)
GEMV_ROWS = 8
"""Rows up to which GEMV is timed: four at a time, so that it reads the weights twice for eight."""


@dataclass(frozen=True)
class Trial:
    """One way to multiply `rows` rows: ``choice`` with its configuration (None: the library), and how to do it once."""

    choice: Choice
    rows: int
    config: Config | None
    call: Callable[[], Any]


Timer = Callable[[Trial], float]
"""Seconds of one call."""
Check = Callable[[Trial, Trial], None]
"""Raises Unsupported where the first trial does not compute what the second, the library, does."""
Library = Callable[[FusedLinear], Callable[..., list[torch.Tensor]]]
"""A group as the library would run it: a function of x, weights and extras."""


def compiled_library(fused: FusedLinear) -> Callable[..., list[torch.Tensor]]:
    """A group under Inductor: cuBLAS or hipBLAS with norm and epilogue in fused kernels. Compiled for M 1 and once for
    all others."""
    return torch.compile(functools.partial(reference, fused))


def residual_group(n: int, k: int, dtype: str) -> FusedLinear:
    """The group that tables are measured with: one linear and a residual add, [N, K]."""
    epilogue = Epilogue(
        1, (Output("s0", dtype),), (Step("s0", "add", ("p0", "e0"), "residual"),), (Extra("e0", "full", dtype),)
    )
    return FusedLinear(dtype, k, (n,), epilogue)


def candidates(fused: FusedLinear, m: int, family: Family, device: roofline.Device) -> list[Config]:
    """Configurations worth timing, of every number of splits; :func:`settled` takes one number for a table's entry."""
    base = configure(fused, m, family, device)
    if family == "gemv":
        widths = sorted({base.block_n, max(1, base.block_n // 2), min(32, base.block_n * 2)})
        return [replace(base, stages=stages, block_n=width) for stages in (1, 2, 3) for width in widths]
    total = sum(fused.widths[segment.products[0]] for segment in fused.epilogue.segments())
    found = []
    for splits in roofline.split_counts(total, fused.depth, device):
        for block_n in (32, 64, 128):
            for stages in sorted({2, 3, 4, base.stages}):
                swap = base.swap and block_n >= 64
                config = replace(base, block_n=block_n, stages=stages, splits=splits, swap=swap)
                if shared_bytes(fused, config) <= device.shared_bytes:
                    found.append(config)
    return found


def settled(measured: Mapping[str, Mapping[Config, Mapping[int, float]]]) -> dict[str, Config]:
    """The fastest configuration of each place by its seconds over all M that were timed there, with one split count.

    A row's sum must not depend on how many rows there are, so the flat kernels of an entry share the number of splits
    that is the fastest for all of them together.

    Args:
        measured: seconds by M of every configuration, by place (:func:`dataflow.place_of`).
    """

    def fastest(configs: Mapping[Config, Mapping[int, float]], splits: int) -> tuple[float, Config] | None:
        most = max(map(len, configs.values()))
        whole = {c: sum(row.values()) for c, row in configs.items() if c.splits == splits and len(row) == most}
        best = min(whole, key=whole.__getitem__, default=None)
        return None if best is None else (whole[best], best)

    counts = sorted({config.splits for configs in measured.values() for config in configs})
    flat = {place: configs for place, configs in measured.items() if place.startswith("flat")}
    shared = {s: [fastest(configs, s) for configs in flat.values()] for s in counts}
    totals = {s: sum(f[0] for f in found if f) for s, found in shared.items() if all(found)}
    splits = min(totals, key=totals.__getitem__, default=1)
    chosen = {place: fastest(configs, splits if place in flat else 1) for place, configs in measured.items()}
    return {place: found[1] for place, found in chosen.items() if found is not None}


def cold_timer(device: torch.device, cache_bytes: int, repeats: int = 20) -> Timer:
    """The median of :func:`cold_clock`."""
    clock = cold_clock(device, cache_bytes, repeats)
    return lambda trial: statistics.median(clock(trial))


def cold_clock(device: torch.device, cache_bytes: int, repeats: int = 20) -> Callable[[Trial], list[float]]:
    """Seconds between CUDA events around one call, `repeats` times, the last cache emptied before each.

    The queue is kept full by the emptying and a pause, so that what Python needs to launch is not measured: in a decode
    step kernels are launched by a CUDA graph, or ahead of the device.
    """
    flush = torch.empty(max(2 * cache_bytes, 64 << 20), dtype=torch.int8, device=device)

    def clock(trial: Trial) -> list[float]:
        trial.call()
        seconds = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(2_000_000)
            start.record()
            trial.call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) * 1e-3)
        return seconds

    return clock


def check(trial: Trial, library: Trial) -> None:
    """Raises Unsupported unless the trial agrees with the library within what its dtype rounds."""
    for got, right in zip(trial.call(), library.call(), strict=True):
        grain = torch.finfo(got.dtype).eps * 8
        off = (got.double() - right.double()).abs().max().item()
        scale = max(1.0, right.double().abs().max().item())
        if not off <= grain * scale + (1e-4 if got.dtype is torch.float32 else 0.0):
            raise Unsupported(f"{trial.config} at {trial.rows} rows is {off:.3g} from the library, of {scale:.3g}")


def operands(
    fused: FusedLinear, rows: int, device: torch.device, seed: int
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """x [rows, K], weights and extras of about unit variance; the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: str = fused.dtype) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator, device=device)
        return made > 0 if dtype == "bool" else made.to(getattr(torch, dtype))

    weights = [normal(width, fused.depth).mul_(fused.depth**-0.5) for width in fused.widths]
    extras = []
    for extra in fused.extras:
        width = fused.extra_width(extra)
        shape = {"full": (rows, width), "column": (width,), "row": (rows, 1), "scalar": ()}[extra.layout]
        extras.append(normal(*shape, dtype=extra.dtype))
    return normal(rows, fused.depth), weights, extras


def trials(
    fused: FusedLinear, rows: int, model: roofline.Device, device: torch.device, library: Callable[..., Any], seed: int
) -> tuple[Trial, list[Trial]]:
    """The library, and every family and configuration worth timing, on the same operands."""
    x, weights, extras = operands(fused, rows, device, seed)
    own = []
    for family in ("gemv", "flat") if rows <= GEMV_ROWS else ("flat",):
        for config in candidates(fused, rows, family, model):
            own.append(Trial(family, rows, config, functools.partial(run, fused, x, weights, extras, config)))
    return Trial("library", rows, None, functools.partial(library, x, weights, extras)), own


def measure_entry(
    fused: FusedLinear,
    model: roofline.Device,
    device: torch.device,
    timer: Timer,
    rows: Sequence[int] = MEASURED_ROWS,
    seed: int = 0,
    check: Check = check,
    library: Library = compiled_library,
    tick: Callable[[], None] = lambda: None,
) -> Entry:
    """Times a group at each number of rows; configurations that cannot run, or compute wrongly, are left out."""
    times: dict[Choice, dict[int, float]] = {"gemv": {}, "flat": {}, "library": {}}
    measured: dict[str, dict[Config, dict[int, float]]] = {}
    refused: dict[str, None] = {}
    stock = library(fused)
    for m in rows:
        other, own = trials(fused, m, model, device, stock, seed)
        times["library"][m] = timer(other)
        for trial in own:
            assert trial.config is not None
            try:
                check(trial, other)
                seconds = timer(trial)
            except Unsupported as problem:
                refused[problem.reason] = None
                continue
            measured.setdefault(place_of(trial.config), {}).setdefault(trial.config, {})[m] = seconds
        tick()
    if refused:
        shown = "; ".join(list(refused)[:2]) + (f"; and {len(refused) - 2} more" if len(refused) > 2 else "")
        warnings.warn(f"kernels left out for {list(fused.widths)} of K {fused.depth}: {shown}")
    configs = settled(measured)
    for place, config in configs.items():  # what will run at these M, and not the best of what was tried for each
        times[config.family] |= measured[place][config]
    return Entry(thresholds_from_times(times), configs, {choice: times[choice] for choice in times})


def measure_table(
    groups: Iterable[FusedLinear],
    key: TableKey,
    path: Path | None = None,
    *,
    device: torch.device,
    model: roofline.Device,
    timer: Timer,
    rows: Sequence[int] = MEASURED_ROWS,
    seed: int = 0,
    check: Check = check,
    library: Library = compiled_library,
    progress: Callable[[str], None] = lambda line: None,
    tick: Callable[[], None] = lambda: None,
) -> Table:
    """M1, M2 and the best configurations of groups; of several with the same N (in all) and K the first is measured.

    The table is written after every shape, so that an interrupted run goes on where it stopped. ``progress`` gets a
    line a shape, ``tick`` a call for every measured number of rows (also for those that were measured before).

    Args:
        key: what the table holds for; groups of another dtype are passed over.
        path: where it is kept; None: in the cache, where it is found again without being named.
    """
    place = path or cache_folder() / "tables" / key.file_name
    table = (find_table(key, place) if place.exists() else None) or Table(key)
    chosen: dict[tuple[int, int], FusedLinear] = {}
    for fused in groups:
        if fused.dtype == key.dtype:
            chosen.setdefault((sum(fused.widths), fused.depth), fused)
    for number, ((n, k), fused) in enumerate(chosen.items(), start=1):
        if (n, k) in table.entries:
            for _ in rows:
                tick()
        else:
            table.entries[n, k] = measure_entry(
                fused, model, device, timer, rows, seed + n + k, check, library, tick
            )
            table.save(place)
        found = table.entries[n, k].thresholds
        progress(f"[{number}/{len(chosen)}] [{n}, {k}] {key.dtype}: M1 = {found.m1}, M2 = {found.m2}")
    return table
