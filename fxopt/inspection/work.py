"""Operations and bytes of a recorded graph, by component, against the roofline of a device.

Read from the node table, so it works on a saved report. Matrix products and attention are counted; everything else is
taken as fused into them, so the times are lower bounds.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

from fxopt.codegen import roofline
from fxopt.passes.record import GraphRecord, NodeRow

YARDSTICK = "H200"
"""The device times are given for where the report names none of the table."""
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "bool": 1, "int8": 1}
_PRODUCTS = ("linear", "fused_linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum")
_WORD = re.compile(r"[A-Za-z_]\w*")


def work(graph: GraphRecord, environment: dict[str, str]) -> dict[str, Any]:
    """``{"device": name, "rows": [[component, places, FLOPs, bytes, seconds, bound], ...]}``, dearest first.

    Layers are added up under ``*``. Nodes of symbolic shape are left out.
    """
    named = next((s.value for s in graph.settings if s.key == "target"), environment.get("device", ""))
    device = roofline.DEVICES.get(named) or roofline.find_device(named) or roofline.DEVICES[YARDSTICK]
    table = graph.rows(len(graph.stages) - 1)
    by_name = {row.name: row for row in table}
    sums: dict[str, list[float]] = {}
    for row in table:
        cost = _cost(row, by_name)
        if cost is None:
            continue
        flops, moved = cost
        dtype = row.dtype if row.dtype in device.flops else "float32"
        entry = sums.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.module) or "(graph)", [0, 0.0, 0.0, 0.0, 0.0])
        compute, memory = flops / device.peak(dtype), moved / device.bandwidth
        for i, value in enumerate((1, flops, moved, max(compute, memory), compute - memory)):
            entry[i] += value
    rows = [[name, int(n), f, b, s, "arithmetic" if gap > 0 else "memory"] for name, (n, f, b, s, gap) in sums.items()]
    return {"device": device.name, "rows": sorted(rows, key=lambda row: (-row[4], row[0]))}


def _cost(row: NodeRow, by_name: dict[str, NodeRow]) -> tuple[float, float] | None:
    """(floating-point operations, bytes) of a matrix product or an attention."""
    name = row.target.split(".")[-1] if row.target.startswith("fxopt") else row.target
    attention = "attention" in name
    if row.op not in ("call_function", "call_method") or not (attention or name in _PRODUCTS):
        return None
    operands = [by_name[word] for word in dict.fromkeys(_WORD.findall(row.args)) if word in by_name]
    shapes = [(_sizes(o.shape), o.dtype) for o in operands if o.dtype]
    out = _sizes(row.shape)
    if out is None or len(shapes) < 2 or any(shape is None for shape, _ in shapes):
        return None
    length = shapes[1][0][-2] if attention and len(shapes[1][0] or ()) > 1 else (shapes[0][0] or (1,))[-1]  # type: ignore[index]
    moved = sum(prod(shape or ()) * _SIZES.get(dtype, 4) for shape, dtype in [*shapes, (out, row.dtype)])
    return (4.0 if attention else 2.0) * prod(out) * length, float(moved)


def _sizes(shape: str) -> tuple[int, ...] | None:
    parts = [part for part in shape.split("x") if part]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else None
