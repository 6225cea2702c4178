"""Measuring a dataflow table with a clock that is handed in: what is timed, what is kept, and that it goes on."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from fxopt.codegen import measuring, roofline
from fxopt.codegen.dataflow import Dataflow, Table, TableKey, Thresholds
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.gemm import Config, reference, shared_bytes
from fxopt.codegen.measuring import candidates, measure_entry, measure_table, residual_group
from fxopt.codegen.ops.fused_linear import sample_inputs

H200 = roofline.DEVICES["H200"]
CPU = torch.device("cpu")
KEY = TableKey("GPU of this test", "1", "2", "bfloat16")
ROWS = (1, 2, 4, 16, 64)


class Clock:
    """Seconds by family and M; a family is fastest with one configuration. Runs nothing."""

    def __init__(self, gemv=1.0, flat=1.5, library=2.0, best_stages=3):
        self.rates = {"gemv": lambda m: gemv * m, "flat": lambda m: flat + 0.01 * m, "library": lambda m: library}
        self.best_stages = best_stages
        self.seen = []

    def __call__(self, trial):
        self.seen.append(trial)
        slower = 1.0 if trial.config is None or trial.config.stages == self.best_stages else 1.3
        return slower * self.rates[trial.choice](trial.rows)


def agrees(trial, library):
    """No kernel runs on a CPU."""


def eager(fused):
    return functools.partial(reference, fused)


def entry(fused, clock, check=agrees, rows=ROWS):
    return measure_entry(fused, H200, CPU, clock, rows, check=check, library=eager)


def test_every_family_is_timed_against_the_library_on_the_group_that_the_model_has():
    fused, *_ = sample_inputs(depth=64, widths=(32, 32), dtype=torch.bfloat16)
    clock = Clock()
    found = entry(fused, clock)
    assert {(t.choice, t.rows) for t in clock.seen} == {
        *(("library", m) for m in ROWS), *(("flat", m) for m in ROWS), *(("gemv", m) for m in (1, 2, 4))
    }  # fmt: skip
    assert found.thresholds == Thresholds(2, 64)
    assert found.times["gemv"] == {1: 1.0, 2: 2.0, 4: 4.0}
    assert set(found.configs) == {"gemv-1", "gemv-2", "gemv-4", "flat-16", "flat-64"}
    assert {config.stages for config in found.configs.values()} == {3}
    library = next(t for t in clock.seen if t.choice == "library" and t.rows == 2)
    (y,) = library.call()
    assert y.shape == (2, 32)


def test_kernels_that_are_wrong_or_do_not_compile_are_left_out():
    def check(trial, library):
        if trial.choice == "gemv":
            raise Unsupported("it does not compile")
        if trial.config.stages == 3:
            raise Unsupported("it is 0.5 from the library")

    with pytest.warns(UserWarning, match="left out for .*does not compile; it is 0.5 from the library"):
        found = entry(residual_group(64, 64, "bfloat16"), Clock(), check)
    assert found.times["gemv"] == {}
    assert found.thresholds.m1 == 1
    assert all(config.family == "flat" and config.stages != 3 for config in found.configs.values())


def test_where_nothing_compiles_the_library_stays():
    def check(trial, library):
        raise Unsupported("no")

    with pytest.warns(UserWarning, match="left out"):
        found = entry(residual_group(64, 64, "bfloat16"), Clock(), check)
    assert (found.thresholds, found.configs) == (Thresholds(1, 1), {})


def test_the_check_finds_a_wrong_kernel():
    fused = residual_group(24, 40, "float32")
    x, weights, extras = measuring.operands(fused, 3, CPU, 0)
    right = measuring.Trial("library", 3, None, lambda: reference(fused, x, weights, extras))
    measuring.check(right, right)
    for make in (lambda y: y + 0.01, lambda y: y * float("nan"), lambda y: y.roll(1, 0)):
        wrong = measuring.Trial("flat", 3, None, lambda make=make: [make(y) for y in right.call()])
        with pytest.raises(Unsupported, match="from the library"):
            measuring.check(wrong, right)


def measure(path, groups, clock, rows=ROWS, **more):
    return measure_table(
        groups, KEY, path, device=CPU, model=H200, timer=clock, rows=rows, check=agrees, library=eager, **more
    )


def test_measuring_goes_on_where_it_stopped(tmp_path):
    path, lines, ticks = tmp_path / "table.json", [], []
    groups = [residual_group(n, 64, "bfloat16") for n in (64, 96, 64)] + [residual_group(32, 64, "float16")]

    class Interrupted(Clock):
        def __call__(self, trial):
            if sum(t.choice == "library" for t in self.seen) == len(ROWS) and trial.choice == "library":
                raise KeyboardInterrupt
            return super().__call__(trial)

    with pytest.raises(KeyboardInterrupt):
        measure(path, groups, Interrupted())
    assert set(Table.load(path).entries) == {(64, 64)}
    clock = Clock()
    table = measure(path, groups, clock, progress=lines.append, tick=lambda: ticks.append(1))
    # x, weights and extras follow the group that `eager` binds.
    assert {t.call.args[2][0].shape[0] for t in clock.seen if t.choice == "library"} == {96}
    assert set(table.entries) == set(Table.load(path).entries) == {(64, 64), (96, 64)}
    assert len(ticks) == 2 * len(ROWS), "the bar counts what was measured before, too"
    assert lines == [f"[{i}/2] [{n}, 64] bfloat16: M1 = 2, M2 = 64" for i, n in ((1, 64), (2, 96))]


def test_a_table_measured_elsewhere_is_begun_again(tmp_path):
    path = tmp_path / "table.json"
    Table(TableKey("another", "1", "2", "bfloat16")).save(path)
    with pytest.warns(UserWarning, match="another instead of GPU of this test"):
        measure(path, [residual_group(64, 64, "bfloat16")], Clock(), rows=(1, 16))
    assert Table.load(path).key == KEY


def test_what_was_measured_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(TableKey, "current", staticmethod(lambda *_: KEY))
    path = tmp_path / "table.json"
    fused = residual_group(64, 64, "bfloat16")
    measure(path, [fused], Clock(best_stages=2))
    flow = Dataflow("bfloat16", path=path, model=H200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [flow.choose(m, 64, 64) for m in (1, 2, 16, 63, 64)] == ["gemv", "flat", "flat", "flat", "library"]
    assert flow.config(fused, 3).stages == 2
    assert flow.config(fused, 64) is None


def test_the_same_seed_gives_the_same_operands():
    fused, *_ = sample_inputs(dtype=torch.bfloat16)
    first, again, other = (measuring.operands(fused, 3, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1][0], again[1][0])
    assert not torch.equal(first[0], other[0])
    assert [e.shape for e in first[2]] == [(40,), (24,), (24,), (3, 24)]


def test_candidates_fit_and_try_few_splits():
    fused = residual_group(4096, 4096, "bfloat16")
    for device in (H200, roofline.DEVICES["L4"], roofline.DEVICES["MI300X"]):
        tried = [{c.splits for c in candidates(fused, m, "flat", device)} for m in (1, 16, 32, 64)]
        assert tried == [set(roofline.split_counts(4096, 4096, device))] * 4
        for m in (1, 16, 32, 64):
            assert all(shared_bytes(fused, c) <= device.shared_bytes for c in candidates(fused, m, "flat", device))


def test_one_number_of_splits_serves_every_number_of_rows():
    narrow, split = Config("flat", 16, 32, 128), Config("flat", 16, 64, 128, splits=4)
    wide, wide_split = Config("flat", 64, 32, 64), Config("flat", 64, 64, 64, splits=4)
    gemv = {Config("gemv", 1, 8, 512): {1: 5.0}, Config("gemv", 1, 4, 512): {1: 4.0}}
    found = measuring.settled({
        "gemv-1": gemv,
        # Splitting wins by one at 8 and 16 rows and loses by three at 64.
        "flat-16": {narrow: {8: 4.0, 16: 4.0}, split: {8: 3.5, 16: 3.5}},
        "flat-64": {wide: {64: 5.0}, wide_split: {64: 8.0}},
    })  # fmt: skip
    assert found == {"gemv-1": Config("gemv", 1, 4, 512), "flat-16": narrow, "flat-64": wide}


def test_a_configuration_that_failed_at_some_rows_is_not_chosen():
    whole, part = Config("flat", 16, 32, 128), Config("flat", 16, 64, 128)
    assert measuring.settled({"flat-16": {whole: {8: 4.0, 16: 4.0}, part: {8: 1.0}}}) == {"flat-16": whole}
