"""Writes a prologue as a Triton function: a tile of the input, computed where it is loaded; shared by every family."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.codegen.kernels.epilogue import Epilogue, Extra
from fxopt.codegen.kernels.epilogue_source import step_line
from fxopt.codegen.kernels.row_statistic import REDUCTIONS


def parameters(prologue: Epilogue | None) -> list[str]:
    """Run-time parameters of a prologue's extras; full ones come with a row stride."""
    if prologue is None:
        return []
    return [
        part for extra in prologue.extras
        for part in ([extra.name, f"{extra.name}_stride"] if extra.layout == "full" else [extra.name])
    ]  # fmt: skip


def _load(extra: Extra) -> str:
    place = {
        "full": f"{extra.name} + m * {extra.name}_stride + at, mask=inside & (at < K), other=0",
        "column": f"{extra.name} + at, mask=at < K, other=0",
        "row": f"{extra.name} + m, mask=m < M, other=0",
        "scalar": extra.name,
    }[extra.layout]
    # The pointer parameter gives way to its value: below, a name is what the graph computed.
    return f"    {extra.name} = tl.load({place}){' != 0' if extra.dtype == 'bool' else '.to(tl.float32)'}"


def function(prologue: Epilogue) -> list[str]:
    """Lines of `prologue(x_rows, at, m, inside, M, extras, statistic, K)`, the tile that the norm or the product takes.

    The row statistic, [rows, 1], is a parameter where there is one; then `reduced(x_rows, at, m, inside, M, extras, K)`
    comes before, the tile that it reduces. Either function holds only the steps that lead to its result.

    x_rows: pointers [rows, 1] or [1, 1]; at: columns [1, BLOCK_K]; a result is float32 [rows, BLOCK_K], and neutral
    where a row or a column lies outside, since a step may make something of nothing (exp(0) is one).
    """
    statistic, value = prologue.statistic, prologue.outputs[0].value
    if statistic is None:
        return _tile("prologue", "x before the products", prologue, value, (), "0.0")
    neutral = REDUCTIONS[statistic.op].neutral
    return [
        *_tile("reduced", f"What {statistic.op} reduces", prologue, str(statistic.args[0]), (), neutral),
        *_tile("prologue", "x before the products", prologue, value, (statistic.name,), "0.0"),
    ]


def _tile(name: str, doc: str, prologue: Epilogue, value: str, given: Sequence[str], outside: str) -> list[str]:
    needed = prologue.needed(value, given)
    steps = [step for step in prologue.steps if step.name in needed and step.name not in given]
    names = ", ".join(["x_rows", "at", "m", "inside", "M", *parameters(prologue), *given, "K: tl.constexpr"])
    origins = " ".join(step.origin for step in steps) or "as it is read"
    return [
        "", "", "@triton.jit", f"def {name}({names}):", f'    """{doc}: {origins}."""',
        "    p0 = tl.load(x_rows + at, mask=inside & (at < K), other=0.0).to(tl.float32)",
        *(_load(extra) for extra in prologue.extras if extra.name in needed), *map(step_line, steps),
        f"    return tl.where(inside & (at < K), {value}, {outside})",
    ]  # fmt: skip
