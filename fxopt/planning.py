"""``fxopt.plan``: what would be rewritten. No weights are read, no GPU is needed, nothing is computed or compiled."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt import reporting
from fxopt.backend import describe, own_module, run_passes
from fxopt.codegen import compat, roofline
from fxopt.compiler import Given, settle
from fxopt.elsewhere import move_graph
from fxopt.inspection.work import Cost, costs
from fxopt.kernel_plan import record_kernels
from fxopt.options import Settings
from fxopt.passes import mod_forward
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import EffectiveSetting, GraphRecord, Recorder, Remark, node_rows
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
        target: name of a device in the roofline's table (``"h200"``): passes decide as they would there, and the
            report has lower bounds of the time and the generated kernels, cross-compiled (a second or two each), with
            registers, spills and shared memory. Without it, passes decide for the device the model is on.

    Raises:
        SettingError: for a setting that is misspelt or cannot be applied to this model.
    """
    settings, _ = settle(model, techniques)
    device = _target(target)
    args, kwargs = _example(model, inputs)
    graphs: list[GraphRecord] = []
    try:
        elsewhere = mod_forward.captured_for_a_device() if device is not None else contextlib.nullcontext()
        with torch.no_grad(), elsewhere:
            compat.compile_alone(_dry(settings, type(model).__name__, device, graphs))(model, args, kwargs)
    finally:
        reporting.discard(graphs)
    return Report(graphs)


PHASES = ("prompt", "decode", "both")


def plan_phases(
    model: nn.Module,
    *techniques: Given,
    target: str | None = None,
    phase: str = "both",
    tokens: int = 32,
    cache: int = 4096,
    batch: int = 1,
) -> Report:
    """:func:`plan` of a prompt, of a decode step on a static cache, or of both in one report.

    ``both`` is the prompt alone for a model that does not generate with a cache.

    Raises:
        SettingError: as :func:`plan` does, and for a phase that does not exist or that this model has not.
    """
    if phase not in PHASES:
        raise SettingError(f"phase={phase!r}: allowed are {', '.join(PHASES)}.{nearest(phase, PHASES)}")
    device = next((p.device for p in model.parameters()), "cpu")
    given = [default_inputs(model, device, tokens=tokens, batch=batch)] if phase != "decode" else []
    try:
        given += [decode_inputs(model, cache=cache, batch=batch)] if phase != "prompt" else []
    except SettingError:
        if phase == "decode":
            raise
    reports = [plan(model, *techniques, inputs=inputs, target=target) for inputs in given]
    graphs = [graph for report in reports for graph in report.graphs]
    for number, graph in enumerate(graphs):
        graph.number = number
    return Report(graphs)


def _dry(settings: Settings, model: str, device: roofline.Device | None, graphs: list[GraphRecord]) -> Any:
    """A backend that runs the passes on each graph, and answers calls with zeros."""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        record = reporting.new_record(compat.compile_id(), -1)
        graphs.append(record)
        number_nodes(gm.graph)
        describe(record, gm)
        record.role = "plan decode" if record.role == "decode" else "plan"
        record.model = model
        answer = zeros_for(gm.graph)
        gm = own_module(gm)
        if device is not None:
            move_graph(gm.graph)
        recorder = Recorder(record, settings.record)
        recorder.stage("captured", gm.graph, level="torch", seconds=time.perf_counter() - started)
        before = list(costs(node_rows(gm.graph)))
        with roofline.planning(device):
            gm, _, _ = run_passes(gm, record, recorder, settings)
        if device is not None:
            after = list(costs(node_rows(gm.graph)))
            record.remarks.append(Remark(ESTIMATE, "analysis", "", _estimate(before, after, device)))
            record.settings.append(EffectiveSetting("target", device.name, "plan"))
            record_kernels(gm, record, device, compiled=True)
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


def default_inputs(
    model: nn.Module, device: torch.device | str = "cpu", *, tokens: int = 32, batch: int = 1
) -> dict[str, Any]:
    """Keyword arguments of one forward: token ids ``[batch, tokens]`` from 0, or zeros of the configured image size."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    if getattr(config, "image_size", None) and not getattr(text, "vocab_size", None):
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2  # type: ignore[union-attr]
        return {"pixel_values": torch.zeros(batch, getattr(config, "num_channels", 3), *size, device=device)}
    if text is None or not getattr(text, "vocab_size", None):
        raise SettingError(
            f"plan cannot guess the inputs of {type(model).__name__}: give inputs={{...}}, the keyword arguments of "
            "one forward (meta tensors will do)."
        )
    ids = torch.arange(tokens, device=device).remainder(text.vocab_size).expand(batch, tokens)  # type: ignore[union-attr]
    return {"input_ids": ids, **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})}


def decode_inputs(model: nn.Module, *, cache: int = 4096, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments of one decode step on a static cache of `cache` positions, as ``generate`` makes them.

    The cache lies on the model's device; on the meta device it takes no memory.

    Raises:
        SettingError: for a model that does not generate with a cache.
    """
    config = getattr(model, "config", None)
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None or config is None or getattr(config, "is_encoder_decoder", False):
        raise SettingError(
            f"{type(model).__name__} does not generate with a cache that plan knows how to make: give inputs={{...}}, "
            "the keyword arguments of one step."
        )
    from transformers import StaticCache

    text = config.get_text_config()
    weight = next(model.parameters())
    heads = _key_value_heads(text)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = StaticCache(config=text, max_cache_len=cache)
    kept.early_initialization(batch, heads, width, weight.dtype, weight.device)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=weight.device)
    seen = torch.ones(batch, cache, dtype=torch.long, device=weight.device)
    return dict(
        prepare(ids, past_key_values=kept, attention_mask=seen, position_ids=torch.zeros_like(ids), use_cache=True,
                next_sequence_length=1)
    )  # fmt: skip


def _key_value_heads(config: Any) -> int:
    """KV heads of a text model; Falcon and GPT-BigCode say with a switch that it is one."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    names = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
    return next(int(heads) for name in names if (heads := getattr(config, name, None)))


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


def _estimate(before: list[Cost], after: list[Cost], device: roofline.Device) -> str:
    first, last = (1e3 * sum(max(cost.seconds(device)) for cost in costs) for costs in (before, after))
    memory = sum(max(0.0, by_memory - by_arithmetic) for by_arithmetic, by_memory in (c.seconds(device) for c in after))
    bound = "memory" if memory >= 0.5e-3 * last else "arithmetic"
    flops, moved = sum(cost.flops for cost in after), sum(cost.moved for cost in after)
    return (
        f"at least {first:.3g} ms as captured, {last:.3g} ms as rewritten on {device.name} ({bound}-bound, "
        f"{flops / 1e9:.3g} GFLOP, {moved / 1e9:.3g} GB; products and attention only)"
    )
