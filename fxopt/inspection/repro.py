"""A graph stage as one file that runs alone: the graph as Python, inputs by shape and seed, versions in its head.

No weights and no inputs of the user are in it: every tensor is drawn anew. The file compares eager with Inductor on
the stage; it needs torch, and fxopt only where the stage calls fxopt's own operations.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from fxopt.inspection import minimal
from fxopt.inspection.diff import graph_name
from fxopt.inspection.minimal import Program
from fxopt.inspection.text import View
from fxopt.passes.record import GraphRecord, NodeRow
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.reporting import Report

SYMBOL_SIZE = 16
"""Value given to a symbolic size, where the record does not say one."""

_GLOBALS = {
    "torch": "import torch",
    "operator": "import operator",
    "math": "import math",
    "builtins": "import builtins",
    "fxopt": "import fxopt",
    "transformers": "import transformers",
    "device": "from torch import device",
    "inf": "from math import inf",
    "nan": "from math import nan",
    "NoneType": "NoneType = type(None)",
}

_MAIN = '''
def tensor(size, dtype):
    """A tensor of that shape and type, drawn from the seed; integers are 0 or 1, which every table has."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(size, generator=GENERATOR, dtype=torch.float32).mul(SCALE).to(DEVICE, dtype)
    return torch.randint(0, 2, size, generator=GENERATOR).to(DEVICE, dtype)


def inputs():
    """The inputs of the stage, fresh and always the same; the graph may write into them."""
    GENERATOR.manual_seed(SEED)
    if len(sys.argv) > 1:  # a list of tensors, kept with torch.save
        return torch.load(sys.argv[1], weights_only=True, map_location=DEVICE)
    return [
{inputs}
    ]


def gap(a, b):
    if isinstance(a, torch.Tensor):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf")).max()) if a.numel() else 0.0
    if isinstance(a, (tuple, list)):
        return max([gap(x, y) for x, y in zip(a, b, strict=True)], default=0.0)
    return 0.0


def difference():
    stage = Stage()
    with torch.no_grad():
        eager = stage(*inputs())
        return gap(eager, torch.compile(stage, backend=BACKEND)(*inputs()))


if __name__ == "__main__":
    found = difference()
    print(f"eager and {{BACKEND}} differ by at most {{found:.3g}}")
    sys.exit(found > TOLERANCE)
'''


def repro(
    report: Report,
    graph: int | None = None,
    stage: int = -1,
    *,
    kernel: str = "",
    minify: bool = False,
    tolerance: float = 1e-3,
) -> View:
    """The file for one stage of one graph of `report`, as a view whose text is the file.

    Args:
        graph: the first by default, or the first that has `kernel`.
        kernel: only the nodes that the kernel of this name computes.
        minify: leave out what the failure does not need: an error, or eager and Inductor further apart than
            `tolerance`. This runs the recorded code in this process, many times.

    Raises:
        SettingError: for a graph, stage or kernel that does not exist, a stage recorded without its code, or
            with `minify`, one that does not fail.
    """
    if graph is None:
        having = (i for i, found in enumerate(report.graphs) if kernel in [k.name for k in found.kernels])
        graph = next(having, 0)
    if not -len(report.graphs) <= graph < len(report.graphs):
        raise SettingError(f"graph {graph} does not exist; the report has {len(report.graphs)} (0 is the first).")
    record = report.graphs[graph]
    whole = program(record, stage)
    chosen = minimal.of_kernel(whole, record, kernel) if kernel else whole
    header = {**report.environment, "seed": "0"}
    render = lambda part: file_of(part, record, stage, header, tolerance)  # noqa: E731
    data: dict[str, Any] = {"graph": record.compile_id, "stage": record.stages[stage].name, "kernel": kernel}
    if minify:
        chosen, failure = minimal.minimal(chosen, render)
        data |= {"failure": failure, "statements": [len(whole.statements), len(chosen.statements)]}
    source = render(chosen)
    return Verbatim("repro", {**data, "source": source}, lambda width: [source])


class Verbatim(View):
    """A view whose text is a file and is never wrapped."""

    def text(self, width: int | None = None) -> str:
        return "\n".join(self.lines(0))


def program(record: GraphRecord, stage: int) -> Program:
    """The code of a stage, checked, as statements."""
    count = len(record.stages)
    if not -count <= stage < count:
        names = ", ".join(f"{n} {s.name}" for n, s in enumerate(record.stages))
        raise SettingError(f"stage {stage} does not exist; graph {record.compile_id} has {names or 'no stages'}.")
    code = record.stages[stage].code
    if not code:
        raise SettingError(
            "the record holds no code of its stages: compile again with FXOPT_RECORD=full in the environment, or with "
            "options={'record': 'full'}."
        )
    rows = record.rows(stage % count)
    function, branches = _checked(code)
    parameters = [a.arg for a in function.args.args if a.arg != "self"]
    given = [row for row in rows if row.op == "placeholder"]
    values = {row.name: row for row in rows} | dict(zip(parameters, given, strict=False))
    return Program(tuple(parameters), tuple(function.body), values, branches)


def file_of(part: Program, record: GraphRecord, stage: int, environment: dict[str, str], tolerance: float) -> str:
    """The text of the file for `part` of a stage."""
    stage %= len(record.stages)
    body = "\n\n".join(map(ast.unparse, part.functions()))
    placeholders = [(name, part.values[name]) for name in part.parameters]
    symbols = sorted({s for _, row in placeholders for s in re.findall(r"\bs\d+\b", f"{row.shape} {row.name}")})
    symbols += [s for s in re.findall(r"\bs\d+\b", body) if s not in symbols and s not in part.parameters]
    device = "cpu" if environment.get("device", "cpu") == "cpu" else "cuda"
    head = [
        f'"""{_comment(graph_name(record))}: stage {stage}, {_comment(record.stages[stage].name)}.',
        "",
        *(_comment(f"{s.key}: {s.value} (from {s.origin})") for s in record.settings),
        *(_comment(f"{key} {value}") for key, value in sorted(environment.items())),
        "Inputs and weights are random: only shapes, types and the graph are those of the model.",
        "A file of tensors given as argument replaces them. Exit code 1: eager and compiled differ.",
        '"""',
        "",
        *_imports(part),
        "",
        "SEED = 0",
        "SCALE = 0.05  # standard deviation of what is drawn",
        f"TOLERANCE = {float(tolerance)!r}",
        'BACKEND = "inductor"',
        f'DEVICE = "{device}"',
        "GENERATOR = torch.Generator()",
        *(f"{symbol} = {SYMBOL_SIZE}  # a symbolic size: choose" for symbol in dict.fromkeys(symbols)),
        "",
        "",
        "class Stage(torch.nn.Module):",
        *(f"    {line}".rstrip() for line in body.strip("\n").split("\n")),
        "",
        "",
    ]
    drawn = "\n".join(f"        {_input(row)},  # {_comment(name)}" for name, row in placeholders)
    return "\n".join(head) + _MAIN.replace("{inputs}", drawn).replace("{{", "{").replace("}}", "}")


def _comment(text: str) -> str:
    """`text` where nothing in it can end a comment or a docstring."""
    return re.sub(r"[^\x20-\x7e]", "?", text).replace("\\", "/").replace('"', "'")


def _input(row: NodeRow) -> str:
    if not row.dtype:
        symbol = re.search(r"\bs\d+\b", row.name)
        return symbol[0] if symbol else str(SYMBOL_SIZE)
    sizes = [size.strip() for size in row.shape.split("x") if size]
    for size in sizes:
        if not re.fullmatch(r"[\ds+*/() -]+", size):
            raise SettingError(f"the shape {row.shape!r} of {row.name} cannot be written as Python.")
    return f"tensor(({', '.join(sizes)}{',' if len(sizes) == 1 else ''}), torch.{_word(row.dtype)})"


def _word(text: str) -> str:
    if not text.isidentifier():
        raise SettingError(f"{text!r} is no data type.")
    return text


def _checked(code: str) -> tuple[ast.FunctionDef, tuple[ast.FunctionDef, ...]]:
    """The ``forward`` of FX's code, and the branches that its conditionals choose from. A record is data: anything else
    in it is refused."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise SettingError(f"the recorded code does not parse: {error}") from None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    others = [n for n in tree.body if n not in functions and not isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [function.name for function in functions]
    if not functions or others or names[-1] != "forward" or len(set(names)) != len(names):
        raise SettingError("the recorded code is not one forward function and its branches, as FX writes it.")
    for function in functions:
        _check_body(function, names[:-1])
    return functions[-1], tuple(functions[:-1])


def _check_body(function: ast.FunctionDef, branches: list[str]) -> None:
    allowed = (ast.Assign, ast.Expr, ast.Return, ast.Pass)
    if any(not isinstance(statement, allowed) for statement in function.body) or function.decorator_list:
        raise SettingError("the recorded code is not a list of assignments, as FX writes it.")
    for node in ast.walk(function):
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        if own and node.attr not in branches:  # type: ignore[attr-defined]
            raise SettingError(
                f"the stage holds a constant or a module (self.{node.attr}), which the record does not keep; "  # type: ignore[attr-defined]
                "take an earlier stage."
            )
    known = {a.arg for a in function.args.args} | minimal.stored(function)
    unknown = [n for n in minimal.loaded(function) if n not in known and n not in _GLOBALS and n not in _BUILTINS]
    if unknown:
        raise SettingError(f"the stage calls what only exists in the process that recorded it: {', '.join(unknown)}.")


def _imports(part: Program) -> list[str]:
    functions = part.functions()
    needed = {"torch"}
    for function in functions:
        known = {a.arg for a in function.args.args} | minimal.stored(function)
        needed |= {name for name in minimal.loaded(function) if name in _GLOBALS and name not in known}
    if any("torch.ops.fxopt" in ast.unparse(function) for function in functions):
        needed.add("fxopt")
    return ["import sys", "", *(_GLOBALS[name] for name in _GLOBALS if name in needed)]


_BUILTINS = {"slice", "range", "tuple", "list", "dict", "int", "float", "bool", "None", "True", "False", "Ellipsis"}
