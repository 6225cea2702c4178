"""A graph stage as one file that runs alone: the graph as Python, inputs by shape and seed, versions in its head.

No weights and no inputs of the user are in it: every tensor is drawn anew. The file compares eager with Inductor on
the stage; it needs torch, and fxopt only where the stage calls fxopt's own operations.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from fxopt.inspection.diff import graph_name
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
        return torch.randn(size, generator=GENERATOR, dtype=torch.float32).mul(SCALE).to(dtype)
    return torch.randint(0, 2, size, generator=GENERATOR).to(dtype)


def inputs():
    """The inputs of the stage, fresh and always the same; the graph may write into them."""
    GENERATOR.manual_seed(SEED)
    return [
{inputs}
    ]


def gap(a, b):
    if isinstance(a, torch.Tensor):
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    if isinstance(a, (tuple, list)):
        return max([gap(x, y) for x, y in zip(a, b, strict=True)], default=0.0)
    return 0.0


if __name__ == "__main__":
    stage = Stage()
    with torch.no_grad():
        eager = stage(*inputs())
        compiled = torch.compile(stage, backend=BACKEND)(*inputs())
    print(f"eager and {{BACKEND}} differ by at most {{gap(eager, compiled):.3g}}")
'''


def repro(report: Report, graph: int = 0, stage: int = -1) -> View:
    """The file for one stage of one graph of `report`, as a view whose text is the file.

    Raises:
        SettingError: for a graph or stage that does not exist, or was recorded without its code.
    """
    if not -len(report.graphs) <= graph < len(report.graphs):
        raise SettingError(f"graph {graph} does not exist; the report has {len(report.graphs)} (0 is the first).")
    record = report.graphs[graph]
    source = stage_source(record, stage, report.environment)
    data = {"graph": record.compile_id, "stage": record.stages[stage].name, "source": source}
    return Verbatim("repro", data, lambda width: [source])


class Verbatim(View):
    """A view whose text is a file and is never wrapped."""

    def text(self, width: int | None = None) -> str:
        return "\n".join(self.lines(0))


def stage_source(record: GraphRecord, stage: int, environment: dict[str, str]) -> str:
    """The text of the file."""
    count = len(record.stages)
    if not -count <= stage < count:
        names = ", ".join(f"{n} {s.name}" for n, s in enumerate(record.stages))
        raise SettingError(f"stage {stage} does not exist; graph {record.compile_id} has {names or 'no stages'}.")
    stage %= count
    code = record.stages[stage].code
    if not code:
        raise SettingError(
            "the record holds no code of its stages: compile again with FXOPT_RECORD=full in the environment, or with "
            "options={'record': 'full'}."
        )
    body, imports = _checked(code)
    placeholders = [row for row in record.rows(stage) if row.op == "placeholder"]
    symbols = sorted({s for row in placeholders for s in re.findall(r"\bs\d+\b", f"{row.shape} {row.name}")})
    head = [
        f'"""{_comment(graph_name(record))}: stage {stage}, {record.stages[stage].name}.',
        "",
        *(_comment(f"{s.key}: {s.value} (from {s.origin})") for s in record.settings),
        *(_comment(f"{key} {value}") for key, value in sorted(environment.items())),
        "Inputs and weights are random: only shapes, types and the graph are those of the model.",
        '"""',
        "",
        *imports,
        "",
        "SEED = 0",
        "SCALE = 0.05  # standard deviation of what is drawn",
        'BACKEND = "inductor"',
        "GENERATOR = torch.Generator()",
        *(f"{symbol} = {SYMBOL_SIZE}  # a symbolic size: choose" for symbol in symbols),
        "",
        "",
        "class Stage(torch.nn.Module):",
        *(f"    {line}".rstrip() for line in body.strip("\n").split("\n")),
        "",
    ]
    drawn = "\n".join(f"        {_input(row)},  # {_comment(row.name)}" for row in placeholders)
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


def _checked(code: str) -> tuple[str, list[str]]:
    """The ``forward`` of FX's code, and the imports it needs. A record is data: anything else in it is refused."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise SettingError(f"the recorded code does not parse: {error}") from None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    others = [n for n in tree.body if n not in functions and not isinstance(n, (ast.Import, ast.ImportFrom))]
    if len(functions) != 1 or others:
        raise SettingError("the recorded code is not one forward function, as FX writes it.")
    function = functions[0]
    function.name, function.decorator_list, function.returns = "forward", [], None
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        argument.annotation = None
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign):
            raise SettingError("the recorded code has annotated assignments; record it with this version of fxopt.")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            raise SettingError(
                f"the stage calls a subgraph or holds a constant (self.{node.attr}), which the record does not keep; "
                "take an earlier stage."
            )
    names = {n.id: None for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    stored |= {a.arg for a in function.args.args}
    unknown = [n for n in names if n not in stored and n not in _GLOBALS and n not in _BUILTINS]
    if unknown:
        raise SettingError(f"the stage calls what only exists in the process that recorded it: {', '.join(unknown)}.")
    text = ast.unparse(function)
    needed = {"torch"} | {name for name in names if name in _GLOBALS and name not in stored}
    if "torch.ops.fxopt" in text:
        needed.add("fxopt")
    return text, [_GLOBALS[name] for name in _GLOBALS if name in needed]


_BUILTINS = {"slice", "range", "tuple", "list", "dict", "int", "float", "bool", "None", "True", "False", "Ellipsis"}
