"""Writes the Triton function that reads whole rows ahead of the product: a norm's mean and scale, or a reduction.

It is called once by a program, before the loop over K, and is the same for every family.
"""

from __future__ import annotations

from fxopt.codegen.kernels.epilogue import Epilogue
from fxopt.codegen.kernels.gemm import Norm
from fxopt.codegen.kernels.prologue_source import parameters
from fxopt.codegen.kernels.row_statistic import REDUCTIONS


def _opening(prologue: Epilogue | None, doc: str) -> list[str]:
    names = ", ".join(["x_rows", "inside", "m", "M", *parameters(prologue)])
    return [
        "", "", "@triton.jit",
        f"def row_statistic({names}, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):",
        f'    """x_rows: pointers [rows, 1] to {doc}."""',
        "    k = tl.arange(0, BLOCK)[None, :]",
    ]  # fmt: skip


def of_norm(norm: Norm, prologue: Epilogue | None, tile: str) -> list[str]:
    """Lines of a function that gives mean and scale, [rows, 1] each; `tile` is x at `start + k`, zero outside."""
    lines = _opening(prologue, "mean [rows, 1] and reciprocal deviation [rows, 1] over K")
    layer = norm.kind == "layer"
    if layer:
        lines += [
            "    total = tl.zeros((ROWS, BLOCK), tl.float32)",
            "    for start in range(0, K, BLOCK):",
            f"        total += {tile}",
            "    mean = tl.sum(total, axis=1)[:, None] / K",
        ]
    else:
        lines.append("    mean = 0.0")
    lines += [
        "    squares = tl.zeros((ROWS, BLOCK), tl.float32)",
        "    for start in range(0, K, BLOCK):",
        f"        value = {tile}",
        *(["        value = tl.where(start + k < K, value - mean, 0.0)"] if layer else []),
        "        squares += value * value",
        f"    return mean, tl.rsqrt(tl.sum(squares, axis=1)[:, None] / K + {norm.eps!r})",
    ]
    return lines


def of_prologue(prologue: Epilogue) -> list[str]:
    """Lines of a function that gives the reduction of a prologue's row, [rows, 1]."""
    statistic = prologue.statistic
    assert statistic is not None
    reduction = REDUCTIONS[statistic.op]
    extras = "".join(f"{name}, " for name in parameters(prologue))
    lines = []
    if statistic.op == "row_sum":
        folded = "tl.sum(found, axis=1)"
    else:
        # tl.max and tl.min drop a NaN.
        folded = "tl.reduce(found, 1, extreme)"
        lines += ["", "", "@triton.jit", "def extreme(a, b):", '    """The one of two that torch would keep."""']
        lines.append(f"    return {reduction.join.format('a', 'b')}")
    return [
        *lines,
        *_opening(prologue, f"{statistic.op} [rows, 1] of what the prologue makes of a row"),
        f"    found = tl.full((ROWS, BLOCK), {reduction.neutral}, tl.float32)",
        "    for start in range(0, K, BLOCK):",
        f"        value = reduced(x_rows, start + k, m, inside, M, {extras}K)",
        f"        found = {reduction.join.format('found', 'value')}",
        f"    return {folded}[:, None]",
    ]
