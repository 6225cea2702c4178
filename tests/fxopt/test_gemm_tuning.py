"""``fxopt tune MODEL --only flat_gemm``: which shapes a model has, what is kept, what is said without a GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from typer.testing import CliRunner

import fxopt
from fxopt import gemm_tuning
from fxopt.codegen import roofline, source
from fxopt.codegen.dataflow import Table, TableKey, find_table
from fxopt.codegen.kernels.gemm import reference
from fxopt.commands import app
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY

INJECTED = {
    "timer": lambda trial: {"gemv": 1.0 * trial.rows, "flat": 1.5, "library": 2.0}[trial.choice],
    "check": lambda trial, library: None,
    "library": lambda fused: functools.partial(reference, fused),
    "rows": (1, 2, 16),
    "target": roofline.DEVICES["H200"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(source.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def on_meta(name="llama", dtype=torch.bfloat16):
    return TINY[name]().to("meta", dtype)


def test_the_groups_of_a_model_without_weights():
    found = gemm_tuning.groups_of(on_meta())
    assert {(sum(f.widths), f.depth, len(f.widths)) for f in found} == {
        (128, 64, 3), (64, 64, 1), (192, 64, 2), (64, 96, 1), (128, 64, 1)
    }  # fmt: skip
    assert {f.dtype for f in found} == {"bfloat16"}
    assert {f.norm.kind for f in found if len(f.widths) > 1} == {"rms"}, "measured as the model has it"


def test_a_model_without_such_linears_says_why():
    model = TINY["llama"]().double()
    with pytest.raises(SettingError, match="no linear that kernels are generated for: FX201"):
        gemm_tuning.groups_of(model)


def test_a_table_is_kept_where_it_is_found_again(cache):
    recipe = gemm_tuning.tune(on_meta(), fxopt.FlatGemm(), show=False, **INJECTED)
    key = TableKey.current("bfloat16")
    (path,) = recipe.notes["tables"]
    assert path == str(cache / "tables" / key.file_name)
    table = find_table(key)
    assert table is not None
    assert (128, 64) in table.entries
    assert recipe.techniques == (fxopt.FlatGemm(),)
    assert recipe.notes["gpu"] == key.gpu


def test_a_second_run_measures_nothing(tmp_path, capsys):
    groups = gemm_tuning.groups_of(on_meta())
    gemm_tuning.measure(groups, tmp_path / "table.json", **INJECTED)
    first = capsys.readouterr().out
    silent = {**INJECTED, "timer": lambda trial: pytest.fail("measured again")}
    gemm_tuning.measure(groups, tmp_path / "table.json", **silent)
    assert capsys.readouterr().out == first
    assert "[1/4] [128, 64] bfloat16: M1 = 2, M2 = 17" in first


def test_two_dtypes_are_two_tables(tmp_path):
    groups = gemm_tuning.groups_of(on_meta()) + gemm_tuning.groups_of(on_meta(dtype=torch.float16))
    with pytest.raises(SettingError, match="bfloat16 and float16: a table is of one dtype, so give a folder"):
        gemm_tuning.measure(groups, tmp_path / "table.json", show=False, **INJECTED)
    tables = gemm_tuning.measure(groups, tmp_path, show=False, **INJECTED)
    assert [Table.load(path).key.dtype for path, _ in tables] == ["bfloat16", "float16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu():
    with pytest.raises(SettingError, match="finds none; without a table the roofline model decides"):
        fxopt.tune(TINY["llama"](), None, fxopt.FlatGemm())
    done = CliRunner().invoke(app, ["tune", "--only", "flat_gemm"])
    assert done.exit_code == 2
    assert "CUDA or ROCm GPU" in done.output


def test_a_goal_is_for_exits():
    with pytest.raises(SettingError, match="for FlatGemm leave it out"):
        fxopt.tune(TINY["llama"](), None, fxopt.FlatGemm(), goal="agreement=0.9")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(gemm_tuning, "measure", functools.partial(gemm_tuning.measure, **INJECTED))
    place = tmp_path / "table.json"
    done = CliRunner().invoke(app, ["tune", "--only", "flat_gemm", "--output", str(place)])
    assert done.exit_code == 0, done.output
    assert f"written: {place}" in done.output
    # The shipped model: width 160, its own MLP, in the dtype that its config names.
    table = Table.load(place)
    assert table.key.dtype == "float32"
    assert 160 in {k for _, k in table.entries}
