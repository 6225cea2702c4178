"""Writes a prologue as a Triton function: a tile of the input, computed where it is loaded; shared by every family."""

from __future__ import annotations

from fxopt.codegen.kernels.epilogue import Epilogue, Extra
from fxopt.codegen.kernels.epilogue_source import step_line


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
    """Lines of `prologue(x_rows, at, m, inside, M, extras, K)`.

    x_rows: pointers [rows, 1] or [1, 1]; at: columns [1, BLOCK_K]; the result is float32 [rows, BLOCK_K], and zero
    where a row or a column lies outside, since a step may make something of nothing (exp(0) is one).
    """
    origins = " ".join(step.origin for step in prologue.steps)
    names = ", ".join(["x_rows", "at", "m", "inside", "M", *parameters(prologue), "K: tl.constexpr"])
    value = prologue.outputs[0].value
    return [
        "", "", "@triton.jit", f"def prologue({names}):", f'    """x before the products: {origins}."""',
        "    p0 = tl.load(x_rows + at, mask=inside & (at < K), other=0.0).to(tl.float32)",
        *map(_load, prologue.extras), *map(step_line, prologue.steps),
        f"    return tl.where(inside & (at < K), {value}, 0.0)",
    ]  # fmt: skip
