"""The house: arrows run one way, rooms stay small, the public names are there."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FORBIDDEN = {
    "codegen": ("fxopt.passes", "fxopt.backend", "fxopt.compiler", "fxopt.options", "fxopt.reporting"),
    "passes": (),
}


def modules(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "fxopt" or name.startswith("fxopt.")}


@pytest.mark.parametrize("path", modules("codegen"), ids=lambda p: p.name)
def test_codegen_imports_only_codegen(path):
    upwards = {name for name in imports(path) if name != "fxopt" and not name.startswith("fxopt.codegen")}
    assert not upwards


@pytest.mark.parametrize("path", modules("passes"), ids=lambda p: p.name)
def test_passes_import_only_passes_and_codegen(path):
    upwards = {
        name for name in imports(path) if name != "fxopt" and not name.startswith(("fxopt.passes", "fxopt.codegen"))
    }
    assert not upwards


def test_public_names():
    import fxopt

    for name in fxopt.__all__:
        assert getattr(fxopt, name) is not None


def test_version_is_the_one_of_pyproject():
    import tomllib

    import fxopt

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == fxopt.__version__


def test_every_python_package_is_installed():
    import tomllib

    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"fxopt" if f == "fxopt" else f"fxopt.{f}" for f in ("fxopt", "passes", "codegen")}
    for folder, prefix in (("fxopt", "fxopt"), ("passes", "fxopt.passes"), ("codegen", "fxopt.codegen")):
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / folder)
            found.add(".".join([prefix, *inner.parts]))
    assert packages == found
