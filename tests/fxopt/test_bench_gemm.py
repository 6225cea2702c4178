"""``fxopt bench gemm`` with a clock that is handed in: every figure that it states, going on, and the dry run."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fxopt.bench import gemm, keep_with, load_suite
from fxopt.codegen import roofline, source
from fxopt.codegen.dataflow import Table, TableKey
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.gemm import reference

SMALL = {"one": (64, 96), "two": (96, 64)}
SECONDS = {"gemv": 1.0, "flat": 1.6, "library": 2.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(source.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


class Clock:
    def __init__(self, limit=None):
        self.calls, self.limit = 0, limit

    def __call__(self, trial):
        self.calls += 1
        if self.limit is not None and self.calls > self.limit:
            raise KeyboardInterrupt
        if trial.config is not None and trial.config.stages == 4 and trial.choice == "flat":
            raise Unsupported("out of shared memory")
        slower = 1.0 if trial.config is None or trial.config.stages == 3 else 1.25
        seconds = SECONDS[trial.choice] * slower * (trial.rows if trial.choice == "gemv" else 1)
        return [seconds * 0.9, seconds, seconds * 1.2]


def bench(clock, rows=(1, 4, 16), shapes=SMALL, **more):
    return load_suite("gemm")(
        clock=clock, shapes=shapes, rows=rows, place=torch.device("cpu"), target=roofline.DEVICES["H200"],
        bandwidth=1e3, check=lambda *_: None, library=lambda fused: functools.partial(reference, fused), quick=True,
        **more,
    )  # fmt: skip


def test_every_peer_at_every_shape_and_number_of_rows():
    with pytest.warns(UserWarning, match="kernels left out .* out of shared memory"):
        result = bench(Clock())
    cases = {row.case for row in result.rows}
    assert cases == {f"{name} [{n}, {k}] M {m}" for name, (n, k) in SMALL.items() for m in (1, 4, 16)}
    assert {row.peer for row in result.rows} == {"cublas", "inductor", "own kernels", "dispatched"}
    first = {row.peer: row for row in result.rows if row.case == "one [64, 96] M 1"}
    assert (first["cublas"].ratio, first["own kernels"].ratio, first["dispatched"].ratio) == (1.0, 0.5, 0.5)
    assert first["own kernels"].median == 1.0
    assert 0.9 < first["own kernels"].low < 1.0 < first["own kernels"].high < 1.2
    # x, weights, residual and output, two bytes each, at the bandwidth handed in.
    assert first["cublas"].bound == 2 * (96 + 64 * 96 + 64 + 64) / 1e3
    assert len(result.table().splitlines()) > len(result.rows)


def test_the_figures_that_the_goals_name(monkeypatch):
    monkeypatch.setattr(gemm, "LARGE", 2 * 64 * 96)
    with pytest.warns(UserWarning, match="left out"):
        remarks = "\n".join(bench(Clock()).remarks)
    mean = math.exp((math.log(2.0) + 2 * math.log(2 / 1.6)) / 3)
    assert f"faster than every peer in 6 of 6 cases; {mean:.3f}x cuBLAS" in remarks
    assert "dispatched: at worst 0.800 of the best peer's time" in remarks
    assert "read bandwidth from 0 MB of weights on: " in remarks
    assert "one: M1 = 4, M2 = 17; stages, time over that of one: " in remarks
    assert "M 16 1:1.00 2:1.00 3:0.80 (best 3)" in remarks


def test_a_second_call_goes_on_where_the_first_stopped(cache):
    whole, first = Clock(), Clock()
    for clock, shapes in ((whole, SMALL), (first, dict(list(SMALL.items())[:1]))):
        with pytest.warns(UserWarning, match="left out"):
            bench(clock, shapes=shapes)
        for path in (cache / "bench").iterdir():
            path.unlink()
    with pytest.warns(UserWarning, match="left out"), pytest.raises(KeyboardInterrupt):
        bench(Clock(first.calls + 3))
    rest = Clock()
    with pytest.warns(UserWarning, match="left out"):
        result = bench(rest)
    assert rest.calls == whole.calls - first.calls > 3
    assert len(result.rows) == 24
    nothing = Clock(0)
    assert bench(nothing).to_dict()["rows"] == result.to_dict()["rows"]
    with pytest.raises(KeyboardInterrupt):
        bench(Clock(3), rows=(1, 2))  # another question is not answered from the file


def test_the_table_is_kept_for_this_gpu(cache, monkeypatch, tmp_path):
    with pytest.warns(UserWarning, match="left out"):
        bench(Clock())
    key = TableKey.current("bfloat16")
    table = Table.load(cache / "bench" / key.file_name)
    assert set(table.entries) == set(SMALL.values())
    monkeypatch.setattr(gemm, "SHIPPED", tmp_path / "shipped")
    if not torch.cuda.is_available():
        assert keep_with("gemm") == [], "no table of a CPU is shipped"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: key.gpu)
    (path,) = keep_with("gemm")
    assert Table.load(path) == table


def test_suites_that_keep_no_more_than_their_result():
    assert keep_with("overhead") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu():
    with pytest.raises(ValueError, match="needs a GPU; --device cpu compiles the kernels for one"):
        load_suite("gemm")(device="cuda")


def test_the_dry_run_shows_what_a_gpu_would_be_given():
    pytest.importorskip("triton")
    result = load_suite("gemm")(shapes={"o": (4096, 4096)}, rows=(1, 16))
    assert result.rows == []
    one, sixteen = result.remarks[1:]
    assert "o [4096, 4096] M 1: Config(family='gemv'" in one
    assert "sm_90" in one and "0 spilled" in one and "buffers" in one
    assert "family='flat'" in sixteen and "7.1 us at least" in sixteen
