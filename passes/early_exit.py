"""Early exit: stop after some of the layers when the model is sure, with a right KV cache.

Decided in every step, on the device, from the last position: CALM (Schuster et al., arXiv 2207.07061) for the measures
of confidence and the propagated state, DeeBERT and PABEE for entropy and patience. ``rows="all"`` leaves when every row
of the batch is sure; ``rows="each"`` freezes a row at its exit, and leaves when no row is left.

Before and after: :mod:`fxopt.passes.exit_region`. What becomes of the caches: :mod:`fxopt.passes.kv_policy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxopt.passes import confidence as measures
from fxopt.passes import depth, exit_modules, kv_policy
from fxopt.passes.context import PassContext
from fxopt.passes.counters import DepthCounter
from fxopt.passes.exit_check import Head, find_head, is_bidirectional, position_is_visible
from fxopt.passes.exit_insert import insert_exits
from fxopt.passes.exit_modules import OwnModules
from fxopt.passes.exit_reference import with_exits
from fxopt.passes.exit_region import RegionError
from fxopt.passes.layers import Stack
from fxopt.passes.modules import ModuleStack, delete_layers, module_stacks
from fxopt.passes.technique import SettingError, Technique, nearest

CONDITIONAL = "torch.ops.higher_order.cond"


@dataclass(frozen=True)
class EarlyExit(Technique):
    """Leave the stack of layers after ``layers=(n, ...)`` of them have run, when the confidence is above the threshold.

    - ``confidence``: ``"margin"`` (top-1 minus top-2 probability), ``"max"`` (top-1), ``"entropy"`` (1 - H / ln V),
      ``"state"`` (cosine of the hidden state after and before the last layer that ran; reads no head), ``"patience"``
      (consecutive exits with one choice), the path of a classifier (reads the state and no head), or a function of
      the last position's logits ``[B, V]`` to ``[B]`` that can be traced.
    - ``threshold``: a number in [0, 1], exits when the confidence is **above** it; ``((0, t0), (position, t1), ...)``;
      or a function of the position (0-d float tensor), such as :func:`fxopt.passes.confidence.decay`. For patience, the
      number of exits that agree.
    - ``head``: ``"model"``, its own final norm and head; or the path of a module (one for all exits, or a ModuleList
      or ModuleDict of them by count) or of a .safetensors file, or ``{n: path}``: its logits decide, and are the
      result of a row that exits there. See :mod:`fxopt.passes.exit_modules`.
    - ``shortlist``: score only the first so many tokens of the vocabulary, or those in a file (.json, .txt,
      .safetensors); the full head runs when the exit is taken.
    - ``rows``: ``"all"`` exits when every row agrees; ``"each"`` freezes a row at its own exit.
    - ``kv``: ``"propagate"``, or ``"none"`` for an exit that is always taken (``confidence="max", threshold=0.0``).
    - ``phase="decode"``: only where one new token meets a filled cache; ``"all"``: on prompts too, where the last
      position decides for all.

    Approximate: the model's outputs change. Raises SettingError for settings that cannot hold.
    """

    name: ClassVar[str] = "early_exit"
    exact: ClassVar[bool] = False

    layers: tuple[int, ...]
    confidence: str | Callable[[torch.Tensor], torch.Tensor] = "margin"
    threshold: Any = 0.9
    head: Any = "model"
    shortlist: Any = None
    rows: str = "all"
    kv: str = "propagate"
    phase: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _counts(self.layers))
        if isinstance(self.threshold, list):
            object.__setattr__(self, "threshold", tuple(tuple(p) if isinstance(p, list) else p for p in self.threshold))
        exit_modules.check_confidence(self)
        measures.check_threshold(self.threshold, self.confidence, len(self.layers))
        if self.head != "model":
            object.__setattr__(self, "head", exit_modules.head_paths(self.head, self.layers))
        exit_modules.check_shortlist(self)
        _one_of("rows", self.rows, ("all", "each"))
        _one_of("phase", self.phase, ("all", "decode"))
        reason = kv_policy.refusal(self.name, self.kv)
        if reason:
            raise SettingError(f"EarlyExit(kv={self.kv!r}): {reason}")
        if self.kv == "none" and not self.always:
            raise SettingError(
                "EarlyExit(kv='none') keeps no keys and values after the exit, so that no later token may run those "
                "layers: it needs an exit that is always taken, confidence='max', threshold=0.0, phase='all' and one "
                "layer count. Use kv='propagate' for exits that depend on the input."
            )

    @property
    def reads_logits(self) -> bool:
        """Whether the confidence is one of logits, so that an exit that is not taken costs a head."""
        return self.confidence not in measures.HEADLESS and not exit_modules.is_path(self.confidence)

    @property
    def needs_modules(self) -> bool:
        """Whether paths of this setting name something in a model or a file."""
        return self.head != "model" or exit_modules.is_path(self.confidence) or isinstance(self.shortlist, str)

    @property
    def always(self) -> bool:
        """Whether the first exit is taken whatever the input: the largest probability is above zero."""
        return self.confidence == "max" and self.threshold == 0.0 and self.phase == "all" and len(self.layers) == 1

    @property
    def never(self) -> bool:
        """Whether no confidence can be above the threshold."""
        return isinstance(self.threshold, (int, float)) and self.confidence != "patience" and self.threshold >= 1.0

    # -- meaning ------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> Technique:
        if is_whole(model) and not is_encoder(model, trunk=not self.reads_logits and self.head == "model"):
            raise SettingError(
                f"{self}: {type(model).__name__} does not generate, and classifies no whole inputs. Exits are for "
                "decoders together with their language-model head, for encoders that end in one classification of a "
                "text or an image, and, with confidence='state', for encoders that end in their states."
            )
        stacks = module_stacks(model)
        if stacks:
            self._check_counts(len(stacks[-1]), stacks[-1].path)
        if not self.needs_modules:
            return self
        resolved = replace(self)
        object.__setattr__(resolved, "_own", self.find(model))
        return resolved

    def find(self, model: nn.Module) -> OwnModules:
        """What the paths of this setting name in `model`; raises SettingError for what they cannot mean."""
        return exit_modules.find(self, model, whole=is_whole(model))

    def _check_counts(self, count: int, path: str) -> None:
        for n in self.layers:
            if n >= count:
                raise SettingError(
                    f"{self}: an exit after {n} layers in {path or 'the stack'}, which has {count}; counts run from "
                    "1 to "
                    f"{count - 1}, because after the last layer nothing is left to save."
                )

    def reference(self, model: nn.Module) -> nn.Module:
        """The model with its layers wrapped: a layer after the exit still fills its cache, and returns its input."""
        stacks: list[ModuleStack] = module_stacks(model)
        if not stacks:
            raise SettingError(f"{self}: {type(model).__name__} holds no stack of layers to exit from.")
        stack = stacks[-1]
        self._check_counts(len(stack), stack.path)
        if self.kv == "none":
            delete_layers(stack, range(self.layers[0]))
            return model
        return with_exits(model, stack, self, whole=is_whole(model))

    # -- rewrite ------------------------------------------------------------------------------------------------

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        stacks = [
            s for s in context.structure.stacks if any(context.covers(n) for layer in s.layers for n in layer.nodes)
        ]
        if not stacks:
            context.missed("FX112", "", "no stack of repeated layers in this graph")
            return
        # An encoder-decoder's logits come from its last stack.
        stack = stacks[-1]
        if not self._legal(stack, context):
            return
        if self.never:
            context.note(stack.path, f"threshold {self.threshold} is never exceeded: nothing is inserted")
            return
        if self.kv == "none":
            self._truncate(stack, context)
            return
        original = depth.OriginalGraph(graph)
        if self.phase == "decode" and not original.needed_for_empty_cache(stack.layers[0], stack):
            context.blocked("FX208", stack.path, "whether the static cache is empty cannot be seen in this graph")
            return
        own: OwnModules = getattr(self, "_own", OwnModules())
        if self.needs_modules and not hasattr(self, "_own"):
            context.blocked(
                "FX506", stack.path, "heads, classifiers and lists are found by fxopt.compile(model, EarlyExit(...))"
            )
            return
        try:
            costs, level = insert_exits(self, stack, self._head(graph, stack), own, context)
        except RegionError as error:
            # Everything is found out before anything is changed, but for checks, which the backend takes back.
            if context.rewriter.changed:
                raise
            context.blocked(error.code, error.node, error.message)
            return
        counter = DepthCounter(self.layers, len(stack.layers), context.record.number, context.record.owner)
        counter.attach(level, len(self.layers) + 2, torch.int64, context.rewriter)
        if self.phase == "decode":
            original.finish(context)
        context.config_patches["unsafe_marked_cacheable_functions"] = {CONDITIONAL: "1"}
        context.note(
            stack.path,
            "the branch of each exit is chosen on the host: one synchronisation for each exit",
            code="FX604",
        )  # fmt: skip
        for n, cost in zip(self.layers, costs, strict=True):
            context.applied(stack.layers[n - 1].path, str(cost))

    def _legal(self, stack: Stack, context: PassContext) -> bool:
        # Not context.training: a weight that is only cast shows its own requires_grad under no_grad too.
        if depth.value(stack.layers[-1].output).requires_grad:
            context.blocked(
                "FX205",
                stack.path,
                "gradients are recorded; exits are for inference: model.eval() under torch.no_grad()",
            )
            return False
        clash = kv_policy.conflict(self.name, context.in_use)
        if clash is not None:
            raise SettingError(f"{self} together with {clash[0]!r}: {clash[1]}. Remove one of the two.")
        if depth.is_partial(stack, context.graph):
            context.blocked(
                "FX105",
                stack.path,
                f"only layers {stack.layers[0].index} to {stack.layers[-1].index} are in this graph",
            )
            return False
        self._check_counts(len(stack.layers), stack.path)
        if self.phase == "decode":
            phase = depth.phase_of(stack.layers[0])
            if phase != "decode":
                context.blocked("FX503", stack.path, f"a {phase} runs every layer")
                return False
        if measures.schedule_of(self.threshold) is not None and not position_is_visible(stack):
            context.blocked(
                "FX208", stack.path, "every layer's cache is a sliding window, whose length does not tell the position "
                "that the threshold depends on; give a number"
            )  # fmt: skip
            return False
        for layer in stack.layers[self.layers[0] :]:
            refusal = depth.refusal(layer)
            if refusal is not None:
                context.blocked(refusal.code, refusal.node, refusal.message)
                return False
        return True

    def _head(self, graph: fx.Graph, stack: Stack) -> Head | None:
        """The head; None where the confidence needs none and the graph, an encoder's, ends in no logits."""
        last = stack.layers[-1].output
        try:
            head = find_head(graph, last)
        except RegionError:
            if self.reads_logits or self.head != "model" or not is_bidirectional(stack):
                raise
            return None
        if not head.classifies and is_bidirectional(stack):
            raise RegionError(
                "FX101", head.logits, "attention without a causal mask: the last position decides for a decoder only"
            )
        return head

    def _truncate(self, stack: Stack, context: PassContext) -> None:
        for layer in reversed(stack.layers[self.layers[0] :]):
            erased = depth.skip_layer(layer, context, keep_rows=False)
            context.applied(
                layer.path,
                f"never reached: the exit after {self.layers[0]} layers is always taken; {erased} nodes erased",
            )


def is_whole(model: nn.Module) -> bool:
    """Whether a model of Hugging Face answers for a whole input: it does not generate."""
    generates = getattr(model, "can_generate", None)
    return generates is not None and not generates()


def is_encoder(model: nn.Module, *, trunk: bool) -> bool:
    """Whether a Hugging Face model attends in both directions and classifies whole inputs, or (`trunk`) has no head."""
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    headless = trunk and getattr(model, "base_model", None) is model
    classifies = type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification"))
    return not causal and (classifies or headless)


def _counts(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        raise SettingError(f"EarlyExit(layers={value!r}): write a tuple, layers=({value},).")
    try:
        counts = tuple(value)
    except TypeError:
        raise SettingError(f"EarlyExit(layers={value!r}): a tuple of layer counts, such as (8, 16).") from None
    for n in counts:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SettingError(
                f"EarlyExit(layers={value!r}): {n!r} is no count of layers that have run (an int from 1 on)."
            )
    if not counts:
        raise SettingError("EarlyExit(layers=()): name at least one exit, such as layers=(8,).")
    if len(set(counts)) != len(counts):
        raise SettingError(f"EarlyExit(layers={value!r}): each exit once.")
    return tuple(sorted(counts))


def _one_of(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingError(
            f"EarlyExit({field}={value!r}): allowed are {', '.join(map(repr, allowed))}.{nearest(str(value), allowed)}"
        )
