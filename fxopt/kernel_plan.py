"""The generated kernels of a rewritten graph, as records; for a device that is not here, compiled for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt.codegen import (
    ahead,
    ahead_launched,  # noqa: F401  its operators tell their kernels
    lowering,
    roofline,
)
from fxopt.codegen.ahead import Ahead
from fxopt.passes.provenance import module_path, origin_ids
from fxopt.passes.record import GraphRecord, KernelRecord, Remark

MOST = 16
"""Different kernels compiled for one graph: a second or two each."""


def record_kernels_here(module: fx.GraphModule, record: GraphRecord) -> None:
    """:func:`record_kernels` for the GPU that the graph runs on; nothing where it runs on another kind of device."""
    values = (node.meta.get("example_value") for node in module.graph.find_nodes(op="placeholder"))
    found = (v.device for v in values if isinstance(v, torch.Tensor) and v.device.type in lowering.KERNEL_DEVICES)
    device = next(found, None)
    if device is not None:
        record_kernels(module, record, roofline.current_device(device), compiled=False)


def record_kernels(module: fx.GraphModule, record: GraphRecord, device: roofline.Device, compiled: bool) -> None:
    """Add the kernels that `module` launches on `device` to the record, with their resources where `compiled`.

    A kernel that several nodes share is one record. Branches of conditionals are looked into.
    """
    if importlib.util.find_spec("triton") is None:
        _tell(record, "no kernels were generated: Triton is not installed (pip install triton, on Linux)")
        return
    found: dict[str, KernelRecord] = {k.name: k for k in record.kernels}
    told: dict[str, Ahead] = {}
    for node, target, args, kwargs in _calls(module):
        kernel = ahead.kernel_of(target, args, kwargs, device)
        if kernel is None:
            continue
        told[kernel.name] = kernel
        entry = found.setdefault(
            kernel.name, KernelRecord(kernel.name, kernel.family, (), (), kernel.source, dict(kernel.configuration))
        )
        entry.resources |= kernel.known
        entry.nodes = tuple(sorted({*entry.nodes, *origin_ids(node)}))
        entry.modules = tuple(dict.fromkeys((*entry.modules, *_modules(node))))
    for entry in found.values():
        entry.modules = tuple(sorted(entry.modules, key=_in_turn))
    record.kernels = list(found.values())
    if not compiled or not told:
        return
    if not device.target:
        _tell(record, f"kernels were chosen and not compiled: no cross-compiler knows {device.name}")
        return
    for name in list(told)[:MOST]:
        found[name].resources |= resources(told[name], device.target)
    if len(told) > MOST:
        _tell(record, f"{len(told) - MOST} more kernels were chosen and not compiled; {MOST} are compiled of one graph")


def resources(kernel: Ahead, target: str) -> dict[str, Any]:
    """Registers, spills, shared memory and assembly of each function of a kernel, or why it did not compile."""
    try:
        compiled = kernel.compile(target)
    except ahead.failures() as error:
        return {"target": target, "not compiled": str(error).splitlines()[0][:200] if str(error) else "no reason given"}
    told: dict[str, Any] = {"target": target}
    for name, info in compiled.items():
        prefix = f"{name} " if len(compiled) > 1 else ""
        told |= {
            f"{prefix}registers": info.registers,
            f"{prefix}spills": info.spills,
            f"{prefix}shared bytes": info.shared_bytes,
            f"{prefix}assembly": info.asm,
        }
    return told


def _modules(node: fx.Node) -> list[str]:
    """Paths of the modules a call stands for: its own, or those its ``origin`` lists with ``*`` for its layer."""
    path, listed = module_path(node), str(node.kwargs.get("origin") or "")
    numbers = [part for part in path.split(".") if part.isdigit()]
    named = [name for name in listed.split(", ") if name and name.count("*") == len(numbers)]
    filled = [name.replace("*", "{}").format(*numbers) for name in named]
    return filled or [path] * bool(path)


def _calls(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Any, tuple[Any, ...], dict[str, Any]]]:
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(inner := getattr(module, str(node.target), None), fx.GraphModule):
            yield from _calls(inner)
        elif node.op == "call_function":
            try:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            except KeyError:  # an operand without a value: nothing can be said about its shape
                continue
            yield node, node.target, args, kwargs


def _in_turn(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _tell(record: GraphRecord, message: str) -> None:
    record.remarks.append(Remark("kernels", "analysis", "", message))
