"""``fxopt.plan``: what would be rewritten, on fake tensors: no weights are read, no GPU is needed, nothing compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxopt import reporting
from fxopt.backend import describe, run_passes
from fxopt.codegen import compat
from fxopt.compiler import Given, settle
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import Recorder
from fxopt.passes.technique import SettingError
from fxopt.reporting import Report


def plan(
    model: nn.Module,
    *techniques: Given,
    inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    target: str | None = None,
) -> Report:
    """A dry run: the report that compiling `model` with `techniques` would leave.

    Args:
        inputs: keyword arguments (or a tuple of positional ones) of one forward; without them, token ids
            ``[1, 32]`` for a Hugging Face text model. Meta tensors will do, and so will a model on the meta device.
        target: name of the device to plan for, as in the roofline's table (``"h200"``); default: the model's own.

    Raises:
        SettingError: for a setting that is misspelt or cannot be applied to this model.
    """
    settings, _ = settle(model, techniques)
    if target is not None:
        from fxopt.codegen import roofline

        known = {name.lower().replace(" ", "_"): name for name in roofline.DEVICES}
        if target.lower().replace(" ", "_") not in known:
            raise SettingError(f"target={target!r} is not in the device table: {', '.join(roofline.DEVICES)}.")
    args, kwargs = _example(model, inputs)
    graphs = []

    def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        record = reporting.new_record(compat.compile_id(), -1)
        record.role = "plan"
        number_nodes(gm.graph)
        describe(record, gm)
        recorder = Recorder(record, settings.record)
        recorder.stage("captured", gm.graph, level="torch", seconds=0.0)
        rewritten, _, _ = run_passes(gm, record, recorder, settings)
        graphs.append(record)
        return rewritten.forward

    with compat.tracing_on_fake_tensors(model, args, kwargs) as (fake_args, fake_kwargs), torch.no_grad():
        compat.capture(capture, model, fake_args, fake_kwargs)
    reporting.discard(graphs)
    return Report(graphs)


def _example(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if inputs is not None:
        return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
    config = getattr(model, "config", None)
    if config is None:
        raise SettingError("plan needs inputs={...} (the keyword arguments of one forward) for this model.")
    device = next(model.parameters()).device
    if getattr(config, "image_size", None) and not getattr(config, "vocab_size", None):
        size = config.image_size
        return (), {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), size, size, device=device)}
    ids = torch.zeros(1, 32, dtype=torch.long, device=device)
    if getattr(config, "is_encoder_decoder", False):
        return (), {"input_ids": ids, "decoder_input_ids": ids}
    return (), {"input_ids": ids}
