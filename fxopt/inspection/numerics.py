"""Where do the numbers part? The captured graph, the graph after each pass and what is compiled of the last one,
against a float64 reference.

An exact pass has to compute what the model computes; an approximate one what its technique's plain-PyTorch reference
computes. Both references run in float64, and a pass only counts as diverging when it is much further from them than
eager PyTorch in the model's own type is: rounding that differs, or is better, is no error.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxopt import reporting
from fxopt.backend import Backend
from fxopt.codegen import compat
from fxopt.compiler import Given, flatten, settle
from fxopt.inspection.replay import Only, Replay
from fxopt.inspection.scripts import next_number
from fxopt.inspection.text import View, table, wrapped
from fxopt.meaning import reference, shared_copy
from fxopt.passes.provenance import module_path, node_id, source_line
from fxopt.passes.record import target_name
from fxopt.passes.technique import Decorated, SettingError, Technique, nearest

COMPILED = "compiled"
"""The last stage: what Inductor and the generated kernels compute."""
SLACK = 8.0
"""How many times eager's own error a pass may have before it counts as diverging."""
FLOOR = 64
"""Errors below so many ULP of the model's type are rounding, however exact eager is."""


@dataclass(frozen=True)
class StageNumbers:
    """One stage against its float64 reference. ``error`` is relative in the 2-norm, ``ulp`` the largest absolute error
    in units of the last place of the largest value; ``kl`` (nats, a position) and ``agreement`` (of the largest
    logit) compare approximate stages with the unchanged model, and are None where the output has no logits."""

    name: str
    exact: bool
    verdict: str
    error: float
    ulp: float
    eager_error: float
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Culprit:
    """Where the first diverging pass first changed a value: a node that was there before, and what feeds it."""

    node: str
    target: str
    module: str
    source: str
    error: float
    made: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """The answer. ``first`` names the first diverging stage; empty when none does."""

    stages: tuple[StageNumbers, ...]
    first: str = ""
    culprit: Culprit | None = None

    @property
    def view(self) -> View:
        return View("numerics", dataclasses.asdict(self), self._lines)

    def text(self, width: int | None = None) -> str:
        return self.view.text(width)

    def to_dict(self) -> dict[str, Any]:
        return self.view.to_dict()

    def _lines(self, width: int) -> list[str]:
        rows = [
            (
                ("" if s.name in ("captured", COMPILED) else "= " if s.exact else "~ ") + s.name, s.verdict,
                f"{s.error:.1e}", f"{s.ulp:.0f}", f"{s.eager_error:.1e}", "" if s.kl is None else f"{s.kl:.3g}",
                "" if s.agreement is None else f"{100 * s.agreement:.1f}%",
            )
            for s in self.stages
        ]  # fmt: skip
        lines = table(("after", "verdict", "error", "ulp", "eager", "KL", "top-1"), rows, width)
        if not self.first:
            return [*lines, *wrapped("No stage diverges from its float64 reference.", width)]
        compiled = self.first == COMPILED
        text = f"{self.first} is the first {'stage' if compiled else 'pass'} that diverges."
        if compiled and self.culprit is None:
            text += " Where every value is kept, none does: look at what is fused (--view repro --minify)."
        if self.culprit is not None:
            c = self.culprit
            text += f" The first value that differs is {c.node} = {c.target}(...), relative error {c.error:.1e}"
            text += f", at {c.module}" * bool(c.module) + f" ({c.source})" * bool(c.source) + "."
            text += f" It is computed from what the pass made: {', '.join(c.made)}." * bool(c.made)
        return [*lines, *wrapped(text, width)]


def numerics(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...] | Tensor,
    *techniques: Given,
    disable: str | tuple[str, ...] = (),
    passes: int | Sequence[str] | None = None,
    compiled: bool = True,
) -> Numbers:
    """Run `model` as captured, after each pass and as compiled, and compare with float64 references.

    Args:
        inputs: keyword arguments or positional ones of one forward.
        disable: passes to go without.
        passes: only so many passes, or only those with these names.
        compiled: also what Inductor and the generated kernels make of the last graph, which takes a compilation.

    Raises:
        SettingError: for settings or pass names that cannot be meant.
    """
    settings, _ = settle(model, techniques, disable=disable)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (
        tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
    )  # fmt: skip
    replay = Replay(settings)
    call = compat.compile_alone(replay)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return _outputs(call(model, *copy.deepcopy((args, kwargs))))

    captured = run()
    names = _limited(replay.names, passes)
    base = _Reference(model, args, kwargs, ())
    stages = [_judge("captured", True, captured, base)]
    current, before = base, set[str]()
    first, culprit = "", None
    for name in names:
        cls = Technique.registry[name]
        allowed = before | {name}
        replay.allowed = frozenset(allowed)
        found = run()
        if not cls.exact:
            current = _Reference(model, args, kwargs, _given(model, techniques, allowed))
        numbers = _judge(name, cls.exact, found, current)
        if not cls.exact:
            kl, agreement = _logits(base.exact_outputs, found)
            numbers = dataclasses.replace(numbers, kl=kl, agreement=agreement)
        if not replay.acted(name):
            numbers = dataclasses.replace(numbers, verdict="no change")
        stages.append(numbers)
        if numbers.verdict == "diverges" and not first:
            first, culprit = name, _culprit(replay, frozenset(before), frozenset(allowed), run)
        before = allowed
    if compiled:
        found = _compiled(Only.of(settings, frozenset(before)), model, args, kwargs)
        numbers = _judge(COMPILED, True, found, current)
        if current is not base:
            kl, agreement = _logits(base.exact_outputs, found)
            numbers = dataclasses.replace(numbers, exact=False, kl=kl, agreement=agreement)
        stages.append(numbers)
        if numbers.verdict == "diverges" and not first:
            first, culprit = COMPILED, _compiled_culprit(replay, frozenset(before), run)
    if stages[0].verdict == "diverges":
        first, culprit = "captured", None
    return Numbers(tuple(stages), first, culprit)


def _compiled(settings: Only, model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """The outputs of `model` as ``fxopt.compile`` would make it; nothing of the compilation is kept."""
    start = next_number()
    try:
        with torch.no_grad():
            call = compat.compile_alone(Backend(settings, model))
            return _outputs(call(model, *copy.deepcopy((args, kwargs))))
    finally:
        reporting.discard([g for r in reporting.reports() for g in r.graphs if g.number >= start])


def _limited(names: list[str], passes: int | Sequence[str] | None) -> list[str]:
    if passes is None:
        return names
    if isinstance(passes, int):
        return names[:passes]
    for name in passes:
        if name not in names:
            raise SettingError(
                f"passes: {name!r} does not run on this model; these do: {', '.join(names) or 'none'}."
                f"{nearest(name, names)}"
            )
    return [name for name in names if name in passes]


# -- references -----------------------------------------------------------------------------------------------------


class _Float64(TorchFunctionMode):
    """Everything in float64: casts to narrower floats, written in the model's code, go to float64 instead."""

    _NARROW = (torch.float16, torch.bfloat16, torch.float32)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = lambda value: torch.float64 if value in self._NARROW else value  # noqa: E731
        args, kwargs = pytree.tree_map_only(torch.dtype, wide, (tuple(args), kwargs or {}))
        if getattr(func, "__name__", "") in ("float", "half", "bfloat16"):
            return args[0].double()
        return func(*args, **kwargs)


class _Reference:
    """What a setting means, in eager PyTorch: in float64, and in the model's own type for its rounding."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, given: tuple[Given, ...]) -> None:
        meant = reference(model, *given) if given else shared_copy(model)
        with torch.no_grad():
            own = _outputs(meant._call_impl(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
            wide = copy.deepcopy(meant).double()
            args, kwargs = pytree.tree_map(_widened, copy.deepcopy((args, kwargs)))
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                with _Float64():
                    self.exact_outputs = _outputs(wide._call_impl(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
            finally:
                torch.set_default_dtype(default)
        self.eager_error = max((_error(a, b)[0] for a, b in zip(own, self.exact_outputs, strict=True)), default=0.0)


def _widened(value: Any) -> Any:
    """An input in float64; a Hugging Face cache, which is one leaf, with what its layers hold."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    for layer in getattr(value, "layers", None) or ():
        for name, held in list(vars(layer).items()):
            if isinstance(held, Tensor):
                setattr(layer, name, _widened(held))
    return value


def _given(model: nn.Module, techniques: tuple[Given, ...], allowed: set[str]) -> tuple[Given, ...]:
    """The settings of the allowed passes, decorations included."""
    kept: list[Given] = []
    for given in flatten(model, techniques):
        if isinstance(given, Technique):
            kept += [given] if given.name in allowed else []
        else:
            kept.append({path: t for path, t in given.items() if t.name in allowed})
    named = {given.name for given in kept if isinstance(given, Technique)}
    for path, module in model.named_modules():
        for technique, _ in Decorated.techniques(module).values():
            if technique.name in allowed and technique.name not in named:
                kept.append({path: technique} if path else technique)
    return tuple(given for given in kept if given)


def _outputs(result: Any) -> list[Tensor]:
    """What of a model's result is compared: logits or hidden states where they are named, else every float tensor."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return [value.detach()]
    return [t.detach() for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def _error(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """(relative error in the 2-norm, largest error in units of the last place of the largest value)."""
    if found.shape != exact.shape:
        return math.inf, math.inf
    if not found.numel():
        return 0.0, 0.0
    spacing = torch.finfo(found.dtype).eps if found.is_floating_point() else 1.0
    a, b = found.double(), exact.double()
    alike = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(alike, 0.0, (a - b).abs())
    if not bool(gap.isfinite().all()):
        return math.inf, math.inf
    finite = torch.where(b.isfinite(), b, 0.0)
    largest = float(finite.abs().max()) or 1.0
    return float(gap.norm()) / (float(finite.norm()) or 1.0), float(gap.max()) / (spacing * largest)


def _judge(name: str, exact: bool, found: list[Tensor], against: _Reference) -> StageNumbers:
    if len(found) != len(against.exact_outputs):
        return StageNumbers(name, exact, "diverges", math.inf, math.inf, against.eager_error)
    errors = [_error(a, b) for a, b in zip(found, against.exact_outputs, strict=True)]
    error, ulp = max((e for e, _ in errors), default=0.0), max((u for _, u in errors), default=0.0)
    eps = max((torch.finfo(t.dtype).eps for t in found), default=0.0)
    if error <= against.eager_error:
        verdict = "as eager" if error == against.eager_error else "closer"
    elif error <= max(SLACK * against.eager_error, FLOOR * eps):
        verdict = "rounding"
    else:
        verdict = "diverges"
    return StageNumbers(name, exact, verdict, error, ulp, against.eager_error)


def _logits(base: list[Tensor], found: list[Tensor]) -> tuple[float | None, float | None]:
    if not base or not found or base[0].shape != found[0].shape or base[0].ndim < 2 or base[0].shape[-1] < 2:
        return None, None
    p, q = base[0].double().log_softmax(-1), found[0].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).double().mean())


# -- the first value that differs --------------------------------------------------------------------------------------


def _culprit(
    replay: Replay, before: frozenset[str], after: frozenset[str], run: Callable[[], list[Tensor]]
) -> Culprit | None:
    """The first node, in graph order, that was there before the pass and has another value after it."""
    replay.watching = True
    try:
        for allowed in (before, after):
            replay.allowed = allowed
            run()
    finally:
        replay.watching, replay.allowed = False, after
    for graph in replay.graphs:
        if before not in graph.values or after not in graph.values:
            continue
        old, new = graph.values[before], graph.values[after]
        for node in graph.stage(after).module.graph.nodes:
            number = node_id(node)
            if number not in old or number not in new:
                continue
            error, _ = _error(new[number], old[number])
            if error > FLOOR * (torch.finfo(new[number].dtype).eps if new[number].is_floating_point() else 0.0):
                return Culprit(
                    node.name, target_name(node), module_path(node), source_line(node), error, _made(node, old)
                )
    return None


def _compiled_culprit(replay: Replay, after: frozenset[str], run: Callable[[], list[Tensor]]) -> Culprit | None:
    """The first node whose compiled value is another than in eager; all values are kept, so that less is fused."""
    replay.allowed = after
    try:
        replay.watching = True
        run()
        replay.compiling = True
        run()
    finally:
        replay.watching = replay.compiling = False
    for graph in replay.graphs:
        eager, compiled = graph.values.get(after, {}), graph.compiled_values
        for node in graph.stage(after).module.graph.nodes:
            number = node_id(node)
            if number not in eager or number not in compiled or not compiled[number].is_floating_point():
                continue
            error, _ = _error(compiled[number], eager[number])
            if error > FLOOR * torch.finfo(compiled[number].dtype).eps:
                return Culprit(node.name, target_name(node), module_path(node), source_line(node), error, ())
    return None


def _made(node: fx.Node, old: dict[int, Tensor]) -> tuple[str, ...]:
    """Names of the new nodes that `node` reads, directly or through new ones, nearest first."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        for source in waiting.pop(0).all_input_nodes:
            if source not in found and source.op not in ("placeholder", "get_attr") and node_id(source) not in old:
                found[source] = None
                waiting.append(source)
    return tuple(source.name for source in list(found)[:8])
