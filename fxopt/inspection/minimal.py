"""Part of a recorded graph: what one kernel computes, or the least that still fails."""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxopt.passes.record import GraphRecord, NodeRow
from fxopt.passes.technique import SettingError, nearest

TRIALS = 120
"""Most programs that :func:`minimal` runs."""


@dataclass(frozen=True)
class Program:
    """Statements of a graph's ``forward``. ``values``: the recorded row of every name, for shape and type;
    ``branches``: what its conditionals choose from, as methods."""

    parameters: tuple[str, ...]
    statements: tuple[ast.stmt, ...]
    values: dict[str, NodeRow]
    branches: tuple[ast.FunctionDef, ...] = ()

    def functions(self) -> list[ast.FunctionDef]:
        """The branches that are left, those that they need first, and ``forward``."""
        forward = self.function()
        needed, waiting = set[str](), [forward]
        while waiting:
            function = waiting.pop()
            named = {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)} - needed
            waiting += [b for b in self.branches if b.name in named]
            needed |= {b.name for b in self.branches if b.name in named}
        return [*(b for b in self.branches if b.name in needed), forward]

    def function(self) -> ast.FunctionDef:
        names = [ast.arg(arg=name) for name in ("self", *self.parameters)]
        arguments = ast.arguments(posonlyargs=[], args=names, kwonlyargs=[], kw_defaults=[], defaults=[])
        function = ast.FunctionDef(name="forward", args=arguments, body=list(self.statements), decorator_list=[])
        function.type_params = []  # type: ignore[attr-defined]  # a field since Python 3.12
        return ast.fix_missing_locations(function)

    def only(self, kept: list[ast.stmt]) -> Program | None:
        """The program of these statements: what they read from others becomes an input, what nobody reads a result.

        None where an input would have to be something else than a tensor or a size.
        """
        kept = [s for s in kept if not _frees(s) and not isinstance(s, ast.Return)]
        made: set[str] = set()
        read: dict[str, None] = {}
        parameters: dict[str, None] = {}
        for statement in kept:
            for name in loaded(statement):
                read[name] = None
                if name not in made and name in self.values:
                    parameters[name] = None
            made |= stored(statement)
        for name in parameters:
            if not self.values[name].dtype and name not in self.parameters:
                return None
        results = [n for s in kept for n in sorted(stored(s)) if n not in read and self._is_tensor(n)]
        if not results:
            return None
        result = ast.Return(ast.Tuple([ast.Name(n, ast.Load()) for n in dict.fromkeys(results)], ast.Load()))
        ordered = [p for p in self.parameters if p in parameters] + [p for p in parameters if p not in self.parameters]
        return dataclasses.replace(self, parameters=tuple(ordered), statements=(*kept, result))

    def _is_tensor(self, name: str) -> bool:
        return name in self.values and bool(self.values[name].dtype)


def loaded(tree: ast.AST) -> list[str]:
    """Names that `tree` reads, in order."""
    return list(dict.fromkeys(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)))


def stored(tree: ast.AST) -> set[str]:
    """Names that `tree` writes."""
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _frees(statement: ast.stmt) -> bool:
    """Whether a statement only drops references (``a = b = None``), as FX ends the life of a value."""
    return isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)


def of_kernel(program: Program, record: GraphRecord, name: str) -> Program:
    """The part of a program that the kernel `name` computes."""
    names = list(dict.fromkeys(k.name for k in record.kernels))
    kernel = next((k for k in record.kernels if k.name == name), None)
    if kernel is None:
        raise SettingError(
            f"graph {record.compile_id} has no kernel {name!r}; it has {', '.join(names) or 'none'}."
            f"{nearest(name, names)}"
        )
    wanted = set(kernel.nodes)
    captured = {row.id for row in record.rows(0)}
    rows = [row for row in program.values.values() if wanted & set(row.origins)]
    made = {row.name for row in rows if row.id not in captured} or {row.name for row in rows}
    part = program.only([s for s in program.statements if stored(s) & made])
    if part is None:
        raise SettingError(f"no statement of this stage is computed by {name}; take the last stage.")
    return part


def minimal(program: Program, render: Callable[[Program], str]) -> tuple[Program, str]:
    """The least program found that fails as `program` does, and how it fails; at most :data:`TRIALS` are run.

    Delta debugging (Zeller and Hildebrandt, 2002) on the statements: runs of them are left out, long ones first.

    Raises:
        SettingError: when the program does not fail.
    """
    wanted = failure(render(program))
    if not wanted:
        raise SettingError("there is nothing to minify: eager and Inductor agree on this stage, within the tolerance.")
    trials = 1
    best, kept = program, [s for s in program.statements if not _frees(s) and not isinstance(s, ast.Return)]
    size = len(kept)
    while size >= 1 and trials < TRIALS:
        start, shrunk = 0, False
        while start < len(kept) and trials < TRIALS:
            rest = kept[:start] + kept[start + size :]
            part = program.only(rest) if rest else None
            if part is not None:
                trials += 1
                if failure(render(part)) == wanted:
                    best, kept, shrunk = part, rest, True
                    continue
            start += size
        if size == 1 and not shrunk:
            break
        size = max(1, min(size, len(kept)) // 2) if size > 1 else 1
    return best, wanted


def failure(source: str) -> str:
    """How the file of a repro fails when it is run here: empty when it does not."""
    module = types.ModuleType("fxopt_repro")
    arguments, sys.argv = sys.argv, ["repro"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(source, "<repro>", "exec"), module.__dict__)
            found = module.difference()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return type(cause).__name__
    finally:
        sys.argv = arguments
        torch._dynamo.reset()
    return "" if math.isfinite(found) and found <= module.TOLERANCE else "eager and compiled differ"
