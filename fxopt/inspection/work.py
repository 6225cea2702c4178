"""Operations and bytes of a recorded graph, by component, against the roofline of a device.

Read from the node table, so it works on a saved report, and for a plan before anything is saved. Matrix products and
attention are counted; everything else is taken as fused into them, so the times are lower bounds. Of a conditional,
the larger branch is counted: as if every layer ran.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from fxopt.codegen import roofline
from fxopt.inspection.text import table, wrapped
from fxopt.passes.record import FIRST_COPY, GraphRecord, Measured, NodeRow

YARDSTICK = "H200"
"""The device times are given for where the report names none of the table."""
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "bool": 1, "int8": 1}
_PRODUCTS = ("linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum")
_WORD = re.compile(r"[A-Za-z_]\w*")
_LISTS = re.compile(r"^(\w+), \[([^\]]*)\], \[([^\]]*)\]")


@dataclass(frozen=True)
class Cost:
    """What one node computes and moves, at least."""

    row: NodeRow
    flops: float
    moved: float
    dtype: str

    def seconds(self, device: roofline.Device) -> tuple[float, float]:
        """(by arithmetic, by memory); the node needs the larger."""
        return self.flops / device.peak(self.dtype if self.dtype in device.flops else "float32"), (
            self.moved / device.bandwidth
        )


def work(graph: GraphRecord, environment: dict[str, str]) -> dict[str, Any]:
    """``{"device": name, "rows": [[component, places, FLOPs, bytes, seconds, bound], ...]}``, dearest first.

    Layers are added up under ``*``. Nodes of symbolic shape are left out.
    """
    device = device_of(graph, environment)
    sums: dict[str, list[float]] = {}
    for cost in costs(graph.rows(len(graph.stages) - 1)):
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", cost.row.module) or "(graph)"
        entry = sums.setdefault(name, [0, 0.0, 0.0, 0.0, 0.0])
        compute, memory = cost.seconds(device)
        for i, value in enumerate((1, cost.flops, cost.moved, max(compute, memory), compute - memory)):
            entry[i] += value
    rows = [[name, int(n), f, b, s, "arithmetic" if gap > 0 else "memory"] for name, (n, f, b, s, gap) in sums.items()]
    return {"device": device.name, "rows": sorted(rows, key=lambda row: (-row[4], row[0]))}


def measured(graph: GraphRecord, environment: dict[str, str]) -> dict[str, Any] | None:
    """``{"calls", "seconds", "rows": [[kernel, places, modules, nodes, seconds, FLOPs, bytes, least], ...]}``.

    The same kernel in several layers is one row, dearest first. FLOPs and bytes are those of the products and
    attentions among its nodes; the least time is None where the report's device is not in the roofline's table.
    None where nothing was measured.
    """
    if graph.profile is None:
        return None
    known = environment.get("device", "")
    device = roofline.DEVICES.get(known) or roofline.find_device(known)
    own = {cost.row.id: cost for cost in costs(graph.rows(len(graph.stages) - 1))}
    # An operator's nodes share their mark, so that what is fused to a product names it too: the call comes first.
    holders: dict[int, Measured] = {}
    for kernel in sorted(graph.profile.kernels, key=lambda k: (is_generated(k.name), len(k.nodes))):
        for number in kernel.nodes:
            holders.setdefault(number, kernel)
    rows: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
    for kernel in graph.profile.kernels:
        mine = [own[n] for n in kernel.nodes if n in own and holders[n] is kernel]
        paths = (*(cost.row.module for cost in mine), *kernel.modules)  # first what takes the time
        modules = tuple(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) for path in paths if path))
        row = rows.setdefault((kernel.name, modules), [kernel.name, 0, list(modules), [], 0.0, 0.0, 0.0, 0.0])
        least = sum(max(cost.seconds(device)) for cost in mine) if device else 0.0
        row[3] += (*(cost.row.id for cost in mine), *kernel.nodes)
        numbers = (1, kernel.seconds, sum(c.flops for c in mine), sum(c.moved for c in mine), least)
        for place, value in zip((1, 4, 5, 6, 7), numbers, strict=True):
            row[place] += value
    found = [[*row[:3], list(dict.fromkeys(row[3])), *row[4:7], row[7] if device else None] for row in rows.values()]
    found.sort(key=lambda row: (-row[4], row[0]))
    return {"calls": graph.profile.calls, "seconds": graph.profile.seconds, "rows": found}


def measured_lines(graph: GraphRecord, environment: dict[str, str], width: int, most: int = 30) -> list[str]:
    """:func:`measured` as a table of at most `most` rows; nothing where nothing was measured."""
    found = measured(graph, environment)
    if found is None:
        return []
    spent = sum(row[4] for row in found["rows"])
    head = (
        f"graph {graph.compile_id} {graph.role}: kernels and library calls took {1e3 * spent:.3g} ms of "
        f"{1e3 * found['seconds']:.3g} ms, medians of {found['calls']} calls under the profiler"
    )
    rows = [
        (
            name if len(name) <= 36 else name[:35] + "…", f"x{places}", f"{1e6 * seconds:.4g}",
            f"{flops / seconds / 1e9:.3g}" if flops else "", f"{moved / seconds / 1e9:.3g}" if moved else "",
            f"{seconds / least:.2g}" if least else "", (modules or [""])[0] + " ..." * (len(modules) > 1),
        )
        for name, places, modules, _, seconds, flops, moved, least in found["rows"][:most]
    ]  # fmt: skip
    left = len(found["rows"]) - most
    titles = ("kernel", "", "us", "GFLOP/s", "GB/s", "of least", "for")
    return [*wrapped(head, width), *table(titles, rows, width), *[f"and {left} more"] * (left > 0), ""]


def is_generated(name: str) -> bool:
    """Whether Inductor wrote a kernel of this name, and no library has it."""
    return name.startswith(("cpp_", "triton_"))


def device_of(graph: GraphRecord, environment: dict[str, str]) -> roofline.Device:
    """The target of a plan, the device of the report, or the yardstick."""
    named = next((s.value for s in graph.settings if s.key == "target"), environment.get("device", ""))
    return roofline.DEVICES.get(named) or roofline.find_device(named) or roofline.DEVICES[YARDSTICK]


def least_seconds(graph: GraphRecord, environment: dict[str, str]) -> list[float]:
    """The least time of the graph after each stage, in seconds: what each pass is worth, as far as that tells."""
    device, found = device_of(graph, environment), list[float]()
    for number, stage in enumerate(graph.stages):
        if number and stage.is_noop:
            found.append(found[-1])
        else:
            found.append(sum(max(cost.seconds(device)) for cost in costs(graph.rows(number))))
    return found


def costs(table: Iterable[NodeRow]) -> Iterator[Cost]:
    """The matrix products and attentions of a node table, in its order."""
    rows = [row for row in table if row.id < FIRST_COPY]
    by_name = {row.name: row for row in rows}
    taken: dict[str, list[NodeRow]] = {}
    for row in rows:
        if row.target == "getitem":
            taken.setdefault(row.args.split(",")[0], []).append(row)
    for row in rows:
        found = _cost(row, by_name, taken.get(row.name, []))
        if found is not None:
            yield found


def _cost(row: NodeRow, by_name: dict[str, NodeRow], taken: list[NodeRow]) -> Cost | None:
    """`taken`: what is taken out of the result where that is a list."""
    if row.op not in ("call_function", "call_method"):
        return None
    name = row.target.split(".")[1] if row.target.startswith("fxopt.") else row.target
    operands = [by_name[word] for word in dict.fromkeys(_WORD.findall(row.args)) if word in by_name]
    operands = [operand for operand in operands if operand.dtype]
    shapes = [_sizes(operand.shape) for operand in operands]
    results = [row] if row.dtype else [result for result in taken if result.dtype and _sizes(result.shape)]
    outs = [_sizes(result.shape) for result in results]
    if len(shapes) < 2 or None in shapes or not outs or None in outs:
        return None
    if name == "fused_linear" and (lists := _LISTS.match(row.args)):
        weights = [by_name[word] for word in lists[2].split(", ") if word in by_name]
        rows = prod((shapes[0] or ())[:-1])
        flops = 2.0 * sum(rows * prod(_sizes(weight.shape) or ()) for weight in weights)
    elif "attention" in name and len(shapes[1] or ()) > 1:
        flops = 4.0 * prod(outs[0] or ()) * shapes[1][-2]  # type: ignore[index]
        results = results[:1]
    elif name in _PRODUCTS:
        flops = 2.0 * prod(outs[0] or ()) * (shapes[0] or (1,))[-1]
    else:
        return None
    touched = [*operands, *results]
    moved = sum(prod(_sizes(r.shape) or ()) * _SIZES.get(r.dtype, 4) for r in touched)
    return Cost(row, flops, float(moved), results[0].dtype)


def _sizes(shape: str) -> tuple[int, ...] | None:
    parts = [part for part in shape.split("x") if part]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else None
