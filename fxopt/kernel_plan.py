"""The kernels that a device which is not here would get: chosen by its roofline, cross-compiled, with resources."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import fx

from fxopt.codegen import compat, roofline
from fxopt.codegen.dataflow import Dataflow
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.gemm_launch import build, compile_for
from fxopt.passes.context import PassContext
from fxopt.passes.flat_gemm import origin
from fxopt.passes.linear_groups import plan_groups
from fxopt.passes.provenance import module_path, origin_ids
from fxopt.passes.record import GraphRecord, KernelRecord, Remark

ARCHITECTURES = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100", "MI300X": "gfx942"}
"""Target of the cross-compiler for a device of the roofline's table."""
MOST = 8
"""Different kernels compiled for one graph: a second or two each."""


def cross_compiled(graph: fx.Graph, record: GraphRecord, device: roofline.Device) -> None:
    """Add the linear kernels `device` would get for `graph` to the record, or a note why there are none."""
    target = ARCHITECTURES.get(device.name)
    if target is None or importlib.util.find_spec("triton") is None:
        why = "Triton is not installed" if target else f"there is no cross-compiler for {device.name}"
        record.remarks.append(Remark("kernels", "analysis", "", f"no kernels were compiled: {why}"))
        return
    found: dict[tuple[Any, ...], KernelRecord] = {}
    left_out = 0
    for group in plan_groups(graph, PassContext(graph, "flat_gemm", GraphRecord(-1, "-", ""))):
        fused = group.fused
        config = Dataflow(fused.dtype, model=device).config(fused, group.rows) if isinstance(group.rows, int) else None
        if config is None:
            continue
        nodes = tuple(sorted({i for node in group.nodes for i in origin_ids(node)}))
        modules = tuple(dict.fromkeys(module_path(node) for node in group.linears))
        key = (fused, config)
        if key in found:
            found[key].nodes += nodes
            found[key].modules += modules
        elif len(found) < MOST:
            kernel = _compiled(fused, config, target, origin(group))
            if kernel is not None:
                kernel.nodes, kernel.modules = nodes, modules
                found[key] = kernel
        else:
            left_out += 1
    record.kernels += found.values()
    if left_out:
        message = f"{left_out} groups of linears would get kernels beyond the {MOST} that were compiled"
        record.remarks.append(Remark("kernels", "analysis", "", message))


def _compiled(fused: Any, config: Any, target: str, where: str) -> KernelRecord | None:
    failures: tuple[type[Exception], ...] = (Unsupported, *compat.compile_errors())
    try:
        built = build(fused, config, where)
        compiled = compile_for(fused, config, target)
    except failures:
        return None
    resources: dict[str, Any] = {"target": target}
    for name, info in compiled.items():
        prefix = f"{name} " if len(compiled) > 1 else ""
        resources |= {
            f"{prefix}registers": info.registers,
            f"{prefix}spills": info.spills,
            f"{prefix}shared bytes": info.shared_bytes,
            f"{prefix}assembly": info.asm,
        }
    source = built.path.read_text(encoding="utf-8")
    return KernelRecord(built.path.stem, config.family, (), (), source, vars(config).copy(), resources)
