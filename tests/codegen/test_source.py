"""Generated files: found by content, safe for parallel processes, importable, and still there when the cache is not."""

import inspect
import linecache
import subprocess
import sys
import warnings

import pytest

from fxopt.codegen import source

BODY = "LIMIT = 3\n\n\ndef double(x):\n    return 2 * x\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(source.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def test_header_and_content_hash(cache):
    path = source.write_source("double", BODY, {"graph nodes": "linear_3, add_4", "shapes": "[1, 8]\n[8, 8]"})
    assert path.parent == cache / "kernels"
    text = path.read_text()
    assert text.endswith("\n\n" + BODY)
    assert "#   graph nodes  linear_3, add_4\n" in text
    assert "#   shapes       [1, 8]\n#                [8, 8]\n" in text
    again = source.write_source("double", BODY, {"graph nodes": "linear_9, add_10"})
    assert again == path
    assert again.read_text() == text
    assert source.write_source("double", BODY.replace("2", "4"), {}) != path
    assert sorted(p.name for p in path.parent.iterdir() if p.suffix == ".tmp") == []


def test_name_must_be_an_identifier(cache):
    with pytest.raises(ValueError, match="identifier"):
        source.write_source("not a name", BODY, {})


def test_a_file_cut_short_is_written_again(cache):
    path = source.write_source("double", BODY, {})
    whole = path.read_text()
    path.write_text(whole[:-10])
    assert source.write_source("double", BODY, {}).read_text() == whole


def test_loaded_kernel_is_a_real_module(cache):
    path = source.write_source("double", BODY, {"configuration": "none"})
    double = source.load_kernel(path, "double")
    assert double(4) == 8
    assert sys.modules[double.__module__].LIMIT == 3
    assert inspect.getsource(double) == "def double(x):\n    return 2 * x\n"
    assert linecache.getline(str(path.resolve()), double.__code__.co_firstlineno).startswith("def double")
    assert source.load_kernel(path, "double") is double
    with pytest.raises(AttributeError, match="LIMIT, double"):
        source.load_kernel(path, "triple")


def test_a_module_that_fails_is_not_left_behind(cache):
    path = source.write_source("broken", "raise RuntimeError('no')\n", {})
    with pytest.raises(RuntimeError, match="no"):
        source.load_kernel(path, "anything")
    assert f"fxopt_generated_{path.stem}" not in sys.modules


def test_unwritable_folder_falls_back_with_one_warning(tmp_path, monkeypatch):
    # A file where the folder should be refuses everyone, root included.
    blocked = tmp_path / "occupied"
    blocked.write_text("")
    monkeypatch.setenv(source.CACHE_VARIABLE, str(blocked / "cache"))
    with pytest.warns(UserWarning, match="cannot write to its cache folder"):
        path = source.write_source("double", BODY, {})
    assert source.load_kernel(path, "double")(1) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source.write_source("double", BODY, {}) == path


def test_default_folder_without_platformdirs(monkeypatch):
    monkeypatch.delenv(source.CACHE_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert source.cache_folder().parts[-2:] == (".cache", "fxopt")


WORKER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("source", sys.argv[1])
source = importlib.util.module_from_spec(spec)
spec.loader.exec_module(source)
for i in range(150):
    body = "VALUE = " + repr("x" * 20000) + f"\\nINDEX = {i % 5}\\n"
    path = source.write_source("shared", body, {"writer": sys.argv[2]})
    assert path.read_text().endswith(body)
    assert source.load_kernel(path, "INDEX") == i % 5
"""


def test_processes_that_generate_at_once_see_whole_files(cache):
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, source.__file__, str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    for worker in workers:
        _, problem = worker.communicate(timeout=120)
        assert worker.returncode == 0, problem
    assert len(list((cache / "kernels").glob("shared_*.py"))) == 5
    assert list((cache / "kernels").glob(".*")) == []
