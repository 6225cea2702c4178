"""``fxopt.plan``: what would be rewritten. No weights are read, no GPU is needed, nothing is computed or compiled."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt import reporting
from fxopt.backend import describe, run_passes
from fxopt.codegen import compat, roofline
from fxopt.compiler import Given, settle
from fxopt.kernel_plan import cross_compiled
from fxopt.options import Settings
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import EffectiveSetting, GraphRecord, Recorder, Remark
from fxopt.passes.technique import SettingError, nearest
from fxopt.reporting import Report

ESTIMATE = "roofline"
"""Under this name a plan's estimates stand among the remarks."""


def plan(
    model: nn.Module,
    *techniques: Given,
    inputs: Mapping[str, Any] | tuple[Any, ...] | torch.Tensor | None = None,
    target: str | None = None,
) -> Report:
    """A dry run: the report that compiling `model` with `techniques` would leave.

    The model may lie on the meta device (build it under ``torch.device("meta")``), so that one of any size can be
    planned on a laptop. Where Python needs a value of the model to go on, as after a graph break, it gets zeros.

    Args:
        inputs: keyword arguments (or a tuple of positional ones) of one forward; without them, token ids
            ``[1, 32]`` for a Hugging Face text model, zeros of the configured image size for a vision model. Only
            shapes and types matter: tensors are moved to the model's device, from or to meta. A Hugging Face model
            on the meta device is planned with ``use_cache=False`` unless a cache is handed in.
        target: name of a device in the roofline's table (``"h200"``): adds lower bounds of the time there, and
            the kernels of linears for it, cross-compiled (a second or two each), with registers, spills and shared
            memory.

    Raises:
        SettingError: for a setting that is misspelt or cannot be applied to this model.
    """
    settings, _ = settle(model, techniques)
    device = _target(target)
    args, kwargs = _example(model, inputs)
    graphs: list[GraphRecord] = []
    try:
        with torch.no_grad():
            compat.compile_alone(_dry(settings, type(model).__name__, device, graphs))(model, args, kwargs)
    finally:
        reporting.discard(graphs)
    return Report(graphs)


def _dry(settings: Settings, model: str, device: roofline.Device | None, graphs: list[GraphRecord]) -> Any:
    """A backend that runs the passes on each graph, and answers calls with zeros."""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        record = reporting.new_record(compat.compile_id(), -1)
        graphs.append(record)
        number_nodes(gm.graph)
        describe(record, gm)
        record.role, record.model = "plan", model
        answer = zeros_for(gm.graph)
        recorder = Recorder(record, settings.record)
        recorder.stage("captured", gm.graph, level="torch", seconds=time.perf_counter() - started)
        before = work(gm.graph)
        gm, _, _ = run_passes(gm, record, recorder, settings)
        if device is not None:
            record.remarks.append(Remark(ESTIMATE, "analysis", "", _estimate(before, work(gm.graph), device)))
            record.settings.append(EffectiveSetting("target", device.name, "plan"))
            cross_compiled(gm.graph, record, device)
        record.seconds = time.perf_counter() - started
        return answer

    return backend


def zeros_for(graph: fx.Graph) -> Callable[..., Any]:
    """A function with the inputs and outputs of `graph` that returns zeros (inputs that are outputs: themselves)."""
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    (result,) = graph.output_node().args
    wanted = fx.map_arg(result, lambda n: _Output(places.get(n, -1), _shape(n)))  # type: ignore[arg-type, return-value]

    def answer(*inputs: Any) -> Any:
        return pytree.tree_map_only(
            _Output, lambda o: inputs[o.place] if o.place >= 0 else o.zeros(), wanted, is_leaf=_is_output
        )

    return answer


class _Output:
    def __init__(self, place: int, shape: Any) -> None:
        self.place = place
        self.shape = shape

    def zeros(self) -> Any:
        if not isinstance(self.shape, tuple):
            return self.shape
        size, dtype, device = self.shape
        return torch.zeros(size, dtype=dtype, device=device)


def _is_output(value: Any) -> bool:
    return isinstance(value, _Output)


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        return tuple(int(size) for size in value.shape), value.dtype, value.device
    return value


# -- inputs and estimates -------------------------------------------------------------------------------------------


def _example(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = ((), default_inputs(model, device)) if inputs is None else _moved(inputs, device)
    accepted = inspect.signature(model.forward).parameters
    if device.type == "meta" and "use_cache" in accepted and not kwargs.get("past_key_values"):
        # A cache made inside of the call starts from torch.tensor([]), which Dynamo cannot trace on the meta device.
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def _moved(inputs: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta == (device.type == "meta"):
            return tensor
        return tensor.to("meta") if device.type == "meta" else torch.zeros_like(tensor, device=device)

    inputs = pytree.tree_map_only(torch.Tensor, moved, inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def default_inputs(model: nn.Module, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Keyword arguments of one forward: token ids ``[1, 32]`` 0 to 31, or zeros of the configured image size."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    if getattr(config, "image_size", None) and not getattr(text, "vocab_size", None):
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2  # type: ignore[union-attr]
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), *size, device=device)}
    if text is None or not getattr(text, "vocab_size", None):
        raise SettingError(
            f"plan cannot guess the inputs of {type(model).__name__}: give inputs={{...}}, the keyword arguments of "
            "one forward (meta tensors will do)."
        )
    ids = torch.arange(32, device=device).remainder(text.vocab_size)[None]  # type: ignore[union-attr]
    return {"input_ids": ids, **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})}


def _target(name: str | None) -> roofline.Device | None:
    if name is None:
        return None
    known = {device.name.lower(): device for device in roofline.DEVICES.values()}
    found = known.get(name.lower().replace("_", " ")) or roofline.find_device(name)
    if found is None:
        raise SettingError(
            f"target={name!r} is not in the device table: {', '.join(known)}.{nearest(name.lower(), known)}"
        )
    return found


def work(graph: fx.Graph) -> tuple[float, float, str]:
    """(floating-point operations, bytes read and written, data type) of the matrix products and attentions of `graph`.

    Everything else is taken as fused into them, so times made of it are lower bounds.
    """
    flops = moved = 0.0
    dtype = "bfloat16"
    for node in graph.nodes:
        out = node.meta.get("example_value")
        inputs = [v for a in node.all_input_nodes if isinstance(v := a.meta.get("example_value"), torch.Tensor)]
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        attention = "attention" in name
        if not isinstance(out, torch.Tensor) or len(inputs) < 2 or not (attention or name.split(".")[0] in _PRODUCTS):
            continue
        dtype = str(out.dtype).removeprefix("torch.")
        moved += sum(float(t.numel() * t.element_size()) for t in (*inputs, out))
        length = inputs[1].shape[-2] if attention and inputs[1].ndim > 1 else inputs[0].shape[-1]
        flops += (4.0 if attention else 2.0) * float(out.numel()) * float(length)
    return flops, moved, dtype


_PRODUCTS = ("linear", "fused_linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum")


def _estimate(before: tuple[float, float, str], after: tuple[float, float, str], device: roofline.Device) -> str:
    first, last = (
        1e3 * roofline.estimate(flops, moved, device, dtype if dtype in device.flops else "float32")
        for flops, moved, dtype in (before, after)
    )
    bound = "memory" if after[1] / device.bandwidth >= last * 0.999e-3 else "arithmetic"
    return (
        f"at least {first:.3g} ms as captured, {last:.3g} ms as rewritten on {device.name} ({bound}-bound, "
        f"{after[0] / 1e9:.3g} GFLOP, {after[1] / 1e9:.3g} GB; products and attention only)"
    )
