"""Writes an epilogue as a Triton function on float32 tiles; shared by every family of kernels that ends in one."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Segment, Step
from fxopt.codegen.kernels.pointwise import OPERATIONS


def _literal(value: str | float) -> str:
    if isinstance(value, str):
        return value
    # A literal is put in brackets where a sign could meet an operator.
    text = repr(float(value)) if abs(value) != float("inf") and value == value else f'float("{value}")'
    return f"({text})" if text.startswith("-") else text


def step_line(step: Step) -> str:
    """One step as a line of a function on float32 tiles."""
    arguments = [_literal(a) for a in step.args]
    if step.op == "cast":
        rounds = step.dtype in ("float16", "bfloat16")
        value = f"{arguments[0]}.to(tl.{step.dtype}){'.to(tl.float32)' if rounds else ''}"
    else:
        value = OPERATIONS[step.op].triton.format(*arguments)
    return f"    {step.name} = {value}  # {step.origin}"


def _load(extra: Extra, width: int, even: bool) -> str:
    place = {
        "full": f"{extra.name} + m * {extra.name}_stride + n, mask=inside, other=0",
        "column": f"{extra.name} + n" + ("" if even else f", mask=n < {width}, other=0"),
        "row": f"{extra.name} + m, mask=m < M, other=0",
        "scalar": extra.name,
    }[extra.layout]
    # The pointer parameter gives way to its value: below, a name is what the graph computed.
    return f"    {extra.name} = tl.load({place}){' != 0' if extra.dtype == 'bool' else '.to(tl.float32)'}"


def finish(
    name: str, epilogue: Epilogue, segment: Segment, width: int, even: bool, parameters: Sequence[str]
) -> list[str]:
    """Lines of `name(products, m, n, M, extras, outputs)`: it computes a segment's outputs and stores them.

    Products are float32 [rows, BLOCK_N], m int64 [rows, 1] and n [1, BLOCK_N] say where they lie in [M, width]. With
    `even`, BLOCK_N divides the width and columns need no mask.
    """
    reach: set[str] = set().union(*(epilogue.reach(o) for o in segment.outputs))
    steps = [step for step in epilogue.steps if step.name in reach]
    products, outputs = (
        ", ".join(f"{p}{i}" for i in n) for p, n in (("p", segment.products), ("out", segment.outputs))
    )
    origins = " ".join(step.origin for step in steps) or "stored as they are"
    lines = ["", "", "@triton.jit", f"def {name}({', '.join(parameters)}):"]
    lines.append(f'    """Products {products} to {outputs}: {origins}."""')
    lines.append("    inside = m < M" if even else f"    inside = (m < M) & (n < {width})")
    lines += [_load(extra, width, even) for extra in epilogue.extras if extra.name in reach]
    lines += [step_line(step) for step in steps]
    for number in segment.outputs:
        value = f"{epilogue.outputs[number].value}.to(out{number}.dtype.element_ty)"
        lines.append(f"    tl.store(out{number} + m * {width} + n, {value}, mask=inside)")
    return lines
