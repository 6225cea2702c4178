"""Layer skipping: a fixed set of layers (or of their attention or MLP parts) that never runs.

The choice by a wanted speed-up: ``balanced`` spaces the kept layers evenly; ``unified`` is the released rule of
Unified Layer Skipping (Liu et al., arXiv 2404.06954), which floors and therefore leaves its widest gap at the top.

Before, for one decoder layer with a static cache::

    h1 = attention(norm(h0)); h2 = h0 + h1; h3 = mlp(norm(h2)); h4 = h2 + h3; next(h4)
    cumulative_length.add_(1); keys.index_copy_(2, position, k); values.index_copy_(2, position, v)

After ``LayerSkip(skip=(this one,))``::

    next(h0)
    cumulative_length.add_(1)         # lengths and masks of other layers are derived from it
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx, nn

from fxopt.passes import cache_rows, depth, skip_router
from fxopt.passes.context import PassContext
from fxopt.passes.layers import Layer, Stack
from fxopt.passes.modules import ModuleStack, delete_layers, module_stacks
from fxopt.passes.skip_reference import skip_in_decode, zero_part
from fxopt.passes.technique import SettingError, Technique, nearest

PARTS = ("layer", "attention", "mlp")
PHASES = ("all", "decode")
RULES = ("balanced", "unified")


@dataclass(frozen=True)
class LayerSkip(Technique):
    """Skip layers, always the same ones.

    Give one of

    - ``skip=(i, ...)``: 0-based indices of the layers to leave out, negative from the end;
    - ``keep=(i, ...)``: the indices that run;
    - ``speedup=r``: layers are left out until ``1/r`` of them remain, chosen by ``rule``: ``"balanced"`` (evenly
      spaced, first and last kept) or ``"unified"`` (the released rule of Unified Layer Skipping, r >= 2);
    - ``router=path``: layers that a prompt does not want are left out for that row, in the prompt and in all that
      follows on its cache (FiRST, arXiv 2410.12513). The path names the routers, ``nn.Linear(width, 1)`` for each
      layer, in the model or in a .safetensors file; or a function of the prompt's last state ``[B, W]`` and the
      layer's index to ``[B]`` bool that can be traced. See :mod:`fxopt.passes.skip_router`.

    ``part``: leave out the whole ``"layer"``, or only its ``"attention"`` or ``"mlp"``. ``phase="decode"``: run every
    layer on prompts, chunks and verification of several tokens, and skip only where one new token meets a filled
    cache; a layer that was skipped then attends, in later prompts, to the positions it has seen.

    Approximate: the model's outputs change. Raises SettingError for settings that cannot hold.
    """

    name: ClassVar[str] = "layer_skip"
    exact: ClassVar[bool] = False

    skip: tuple[int, ...] | None = None
    keep: tuple[int, ...] | None = None
    speedup: float | None = None
    rule: str = "balanced"
    router: str | Callable[..., Any] | None = None
    decide: str = "prompt"
    part: str = "layer"
    phase: str = "all"

    def __post_init__(self) -> None:
        for name in ("skip", "keep"):
            object.__setattr__(self, name, _indices(name, getattr(self, name)))
        if self.decide != "prompt":
            raise SettingError(
                f"LayerSkip(decide={self.decide!r}): a decision for each token is not available in this version; leave "
                "it out, and the prompt decides."
            )
        given = [n for n in ("skip", "keep", "speedup", "router") if getattr(self, n) is not None]
        if len(given) != 1:
            raise SettingError(
                "LayerSkip needs exactly one of skip=(i, ...), keep=(i, ...), speedup=r or router=path; "
                f"given: {', '.join(f'{n}={getattr(self, n)!r}' for n in given) or 'none'}."
            )
        if self.rule == "measured":
            raise SettingError(
                "LayerSkip(rule='measured') needs measured costs of each layer, which this version does not take; "
                "use rule='balanced'."
            )
        _one_of("rule", self.rule, RULES)
        _one_of("part", self.part, PARTS)
        _one_of("phase", self.phase, PHASES)
        if self.router is not None and (self.part, self.phase) != ("layer", "all"):
            raise SettingError(
                f"{self}: the prompt decides about whole layers, for itself and for what follows; leave part and phase "
                "out."
            )
        if self.speedup is not None:
            if isinstance(self.speedup, bool) or not isinstance(self.speedup, (int, float)):
                raise SettingError(f"LayerSkip(speedup={self.speedup!r}): a number above 1, such as 1.5.")
            if not self.speedup > 1:
                raise SettingError(
                    f"LayerSkip(speedup={self.speedup!r}): must be above 1 (2 keeps half of the layers). "
                    "To skip nothing, leave the technique out."
                )
            if self.rule == "unified" and self.speedup < 2:
                raise SettingError(
                    f"LayerSkip(speedup={self.speedup!r}, rule='unified'): the rule is defined for speedup >= 2 "
                    "(below, it drops one contiguous run of layers); use rule='balanced'."
                )
        elif self.rule != "balanced":
            raise SettingError(
                f"LayerSkip(rule={self.rule!r}) chooses layers for speedup=r; with indices leave it out."
            )
        if self.keep == ():
            raise SettingError("LayerSkip(keep=()): at least one layer has to run.")

    @property
    def late(self) -> bool:
        return self.router is not None

    def kept(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the layers that run in a stack of `num_layers`, ascending.

        Raises SettingError for an index out of range, and where every layer would be skipped.
        """
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise SettingError(f"kept(num_layers) takes the number of layers, not {num_layers!r}.")
        if self.router is not None:
            return tuple(range(num_layers))  # each of them runs for some prompt
        if self.speedup is not None:
            rule = _unified if self.rule == "unified" else _balanced
            return rule(num_layers, float(self.speedup), self)
        given = self.skip if self.skip is not None else self.keep
        assert given is not None
        for index in given:
            if not -num_layers <= index < num_layers:
                raise SettingError(
                    f"{self}: layer {index} does not exist; the stack has {num_layers} layers, indices "
                    f"0 to {num_layers - 1} or {-num_layers} to -1."
                )
        named = {index % num_layers for index in given}
        kept = tuple(i for i in range(num_layers) if (i in named) == (self.keep is not None))
        if not kept:
            raise SettingError(f"{self} skips every one of the {num_layers} layers; leave at least one.")
        return kept

    # -- meaning ------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> Technique:
        for stack in module_stacks(model):
            self.kept(len(stack))
        if self.router is None:
            return self
        resolved = replace(self)
        object.__setattr__(resolved, "_routers", weakref.WeakValueDictionary(self._find_routers(model)))
        return resolved

    def _find_routers(self, model: nn.Module) -> dict[int, Any]:
        stacks = module_stacks(model)
        if not stacks:
            raise SettingError(f"{self}: {type(model).__name__} holds no stack of layers to route.")
        # An encoder-decoder's prompt is the decoder's.
        layers = len(stacks[-1])
        if callable(self.router):
            return dict.fromkeys(range(layers), self.router)
        assert self.router is not None
        return skip_router.find_routers(model, self.router, layers)

    def reference(self, model: nn.Module) -> nn.Module:
        """The model with the layers really deleted (parts zeroed; with ``phase="decode"``, skipped in decode steps;
        with a router, passed by by the rows that do not want them)."""
        if self.router is not None:
            routers = self._find_routers(model)
            last = module_stacks(model)[-1]
            for index, router in routers.items():
                last.layers[index] = skip_router.RoutedLayer(last.layers[index], index, router)
            return model
        for stack in module_stacks(model):
            kept = self.kept(len(stack))
            if self.part == "layer" and self.phase == "all":
                delete_layers(stack, kept)
                continue
            for index in range(len(stack)):
                if index not in kept:
                    stack.layers[index] = self._reference_layer(stack, index)
        return model

    def _reference_layer(self, stack: ModuleStack, index: int) -> nn.Module:
        layer = stack.layers[index]
        if self.part == "layer":
            return skip_in_decode(layer, index)
        return zero_part(layer, self.part, index, only_decode=self.phase == "decode")

    # -- rewrite ------------------------------------------------------------------------------------------------

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        structure = context.structure
        for rejected in structure.rejected:
            context.note(
                rejected.node if rejected.node is not None else rejected.path,
                f"{rejected.path or 'this graph'} is no stack of layers: {rejected.reason}",
                code=rejected.code,
            )
        if not structure.stacks:
            if depth.ends_in_a_break(graph):
                context.note("", "no layers in this part of the model", code="FX105")
            else:
                context.missed("FX112", "", "no stack of repeated layers in this graph")
            return
        if self.router is not None:
            self._route(structure.stacks[-1], context)
            return
        original = depth.OriginalGraph(graph)
        for stack in structure.stacks:
            covered = [layer for layer in stack.layers if any(context.covers(n) for n in layer.nodes)]
            if not covered:
                continue
            begin = len(context.remarks)
            # Last layer first: a layer's input is the output of the one before, which must still be in the graph.
            for layer in reversed(self._skipped(stack, context)):
                if layer not in covered:
                    context.blocked("FX504", layer.path, f"layer {layer.index} is outside of the modules of {self}")
                else:
                    self._rewrite_layer(layer, stack, original, context)
            context.remarks[begin:] = reversed(context.remarks[begin:])
        original.finish(context)

    def _route(self, stack: Stack, context: PassContext) -> None:
        routers = dict(getattr(self, "_routers", {}))
        if callable(self.router):
            routers = {layer.index: self.router for layer in stack.layers}
        if not routers:
            context.blocked("FX506", stack.path, "routers are found by fxopt.compile(model, LayerSkip(router=...))")
        elif depth.is_partial(stack, context.graph):
            context.blocked("FX105", stack.path, "only some layers of the stack are in this graph")
        else:
            skip_router.route_stack(stack, routers, context)

    def _skipped(self, stack: Stack, context: PassContext) -> list[Layer]:
        numbers = [layer.index for layer in stack.layers]
        count = max(numbers) + 1
        if not depth.is_placed(stack):
            context.missed(
                "FX505", stack.path, "one layer compiled on its own: its number is not known; compile the whole model"
            )
            return []
        broken = depth.is_partial(stack, context.graph)
        if broken and (self.speedup is not None or any(i < 0 for i in (*(self.skip or ()), *(self.keep or ())))):
            context.blocked(
                "FX105", stack.path, f"only layers {numbers[0]} to {numbers[-1]} are in this graph, and {self} counts "
                "from the whole stack"
            )  # fmt: skip
            return []
        if broken:
            named = set(self.skip if self.skip is not None else self.keep or ())
            beyond = sorted(i for i in named if i >= count)
            if beyond:
                context.note(stack.path, f"layers {beyond} are not in this graph", code="FX505")
            return [layer for layer in stack.layers if (layer.index in named) == (self.skip is not None)]
        kept = self.kept(count)
        return [layer for layer in stack.layers if layer.index not in kept]

    def _rewrite_layer(self, layer: Layer, stack: Stack, original: depth.OriginalGraph, context: PassContext) -> None:
        if self.phase == "decode":
            phase = depth.phase_of(layer)
            if phase == "prompt" and depth.keeps_running_state(layer):
                context.blocked("FX208", layer.path, "it keeps a running state (convolution, recurrence) and no keys "
                                "and values, so that a decode step is not told from a prompt; phase='all' skips it")
                return
            if phase == "prompt":
                context.blocked("FX503", layer.path, "a prompt on an empty cache runs every layer")
                return
            if phase == "continuation":
                if self.part != "mlp" and cache_rows.attend_to_written_rows(layer, context):
                    context.note(layer.path, "several tokens on a filled cache: every layer runs, this one attends to "
                                 "the positions it has seen")  # fmt: skip
                context.blocked("FX503", layer.path, "several tokens on a filled cache run every layer")
                return
        refusal = depth.refusal(layer)
        if refusal is not None:
            context.blocked(refusal.code, refusal.node, refusal.message)
            return
        if self.part != "layer":
            parts = [part for part in layer.parts if part.kind == self.part]
            if not parts:
                context.missed("FX113", layer.path, f"no residual addition of its {self.part} part was found")
                return
            beside = depth.beside_attention(layer, parts) if self.part == "attention" else ""
            if beside:
                message = f"{beside} is added together with its attention; part='layer' skips both"
                context.blocked("FX113", layer.path, message)
                return
        if self.phase == "decode":
            original.needed_for_empty_cache(layer, stack)
        if self.part == "layer":
            erased = depth.skip_layer(layer, context, keep_rows=self.phase == "decode")
            context.applied(layer.path, f"layer {layer.index} of {len(stack.layers)} skipped, {erased} nodes erased")
        else:
            erased = depth.skip_parts(layer, parts, context, keep_rows=self.phase == "decode")
            context.applied(layer.path, f"{self.part} of layer {layer.index} skipped, {erased} nodes erased")


def _balanced(count: int, speedup: float, technique: LayerSkip) -> tuple[int, ...]:
    kept = int(count / speedup)
    if kept < 1:
        raise SettingError(f"{technique} leaves no layer of {count}; the largest speed-up is {count} (one layer runs).")
    if kept == 1:
        return (0,)
    return tuple(round(i * (count - 1) / (kept - 1)) for i in range(kept))


def _unified(count: int, speedup: float, technique: LayerSkip) -> tuple[int, ...]:
    budget = int(count / speedup)
    if budget <= 1:
        raise SettingError(
            f"{technique}: for {count} layers the rule divides by zero (it keeps {budget}); use rule='balanced', or a "
            f"speed-up of at most {count / 2:g}."
        )
    interval = int(count / (budget - 1))
    kept = {0, count - 1}
    for index in range(1, count - 1):
        if index % interval == 0 and len(kept) < budget:
            kept.add(index)
    return tuple(sorted(kept))


def _indices(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        raise SettingError(f"LayerSkip({name}={value!r}): write a tuple, {name}=({value},).")
    try:
        indices = tuple(value)
    except TypeError:
        raise SettingError(f"LayerSkip({name}={value!r}): a tuple of layer indices.") from None
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise SettingError(f"LayerSkip({name}={value!r}): {index!r} is no layer index (an int).")
    return indices


def _one_of(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingError(
            f"LayerSkip({field}={value!r}): allowed are {', '.join(map(repr, allowed))}.{nearest(value, allowed)}"
        )
