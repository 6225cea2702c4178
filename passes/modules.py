"""Stacks of layers in a module tree, for references and for checking a setting before anything is compiled.

The graph side of the same question is :mod:`fxopt.passes.layers`; this side needs no tracing and sees every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

_CONFIG_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
                  "decoder_layers")  # fmt: skip
ATTENTION = re.compile("attn|attention", re.IGNORECASE)
"""In the names of modules that attend."""
_LAYER_NUMBERS = ("layer_idx", "layer_id")
"""Where modules of Hugging Face keep their number in the stack, which picks their row of the cache."""


@dataclass(frozen=True)
class ModuleStack:
    """A container of repeated layers: `owner.name` is the ModuleList, `path` its dotted path."""

    path: str
    owner: nn.Module
    name: str
    layers: nn.ModuleList

    def __len__(self) -> int:
        return len(self.layers)


def module_stacks(model: nn.Module) -> list[ModuleStack]:
    """The outermost ModuleLists of `model` that hold layers: modules of one kind that contain modules themselves.

    Of a model in stages (Swin), whose outermost list is one of stages, each stage's list of layers is a stack.
    """
    found: list[ModuleStack] = []
    for path, module in model.named_modules():
        if any(path == s.path or path.startswith(s.path + ".") for s in found):
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and _holds_layers(child) and not all(map(_is_stage, child)):
                found.append(ModuleStack(f"{path}.{name}" if path else name, module, name, child))
    return found


def _holds_layers(container: nn.ModuleList) -> bool:
    # Layers own several parameterised modules; experts and heads are found inside layers or own a single one.
    return len(container) > 0 and all(
        sum(1 for m in layer.modules() if next(m.parameters(recurse=False), None) is not None) >= 3
        for layer in container
    )


def _is_stage(module: nn.Module) -> bool:
    """Whether a module holds a list of layers with an attention each; experts, which layers hold, have none."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and _holds_layers(m)]
    return any(all(any(ATTENTION.search(name) for name, _ in layer.named_modules()) for layer in m) for m in lists)


class WrappedLayer(nn.Module):
    """Stands in the place of `layer` number `index` of a stack: what it does not have itself, the layer answers."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer = layer
        self.index = index

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers (attention_type, layer_idx).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def delete_layers(stack: ModuleStack, kept: Iterable[int]) -> None:
    """Delete all layers but `kept` from a stack, in place: renumber ``layer_idx``, shorten per-layer config lists."""
    kept = list(kept)
    count = len(stack)
    new = nn.ModuleList(stack.layers[i] for i in kept)
    for number, (old, layer) in enumerate(zip(kept, new, strict=True)):
        for module in layer.modules():
            for name in _LAYER_NUMBERS:
                if vars(module).get(name) == old:
                    setattr(module, name, number)
    setattr(stack.owner, stack.name, new)
    config = getattr(stack.owner, "config", None)
    if config is not None:
        shorten_config(config, count, kept)


def shorten_config(config: object, count: int, kept: list[int]) -> None:
    """Let a Hugging Face config describe the shorter stack."""
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and count > 1 and _is_per_layer(name):
            setattr(config, name, type(value)(value[i] for i in kept))
        elif name in _CONFIG_COUNTS and value == count:
            setattr(config, name, len(kept))


def _is_per_layer(name: str) -> bool:
    return bool(re.search(r"layer|block|pattern|rope", name))
