"""How sure a model is at an exit: plain functions of tensors, shared by references and by graph rewrites.

A graph rewrite traces the same function into the graph (:func:`inline`), so that the two cannot disagree. Every
confidence lies in [0, 1]; NaN in, NaN out, and no comparison with NaN holds, so that NaN never exits.

Measures: top-1 minus top-2 probability, top-1 probability and saturation of the hidden state (CALM, Schuster et al.,
arXiv 2207.07061); entropy (DeeBERT, arXiv 2004.12993); agreement of successive exits (PABEE, arXiv 2006.04152).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.passes.rewriter import Rewriter
from fxopt.passes.technique import SettingError

NAMES = ("margin", "max", "entropy", "state", "patience")
HEADLESS = ("state",)
"""Confidences that read no logits: an exit that is not taken costs no head."""

Schedule = Callable[[Tensor], Tensor]


def margin(logits: Tensor) -> Tensor:
    """Probability of the first choice minus that of the second; ``logits: [B, V]`` to ``[B]``."""
    logits = logits.float()
    # Reductions, which compile into one kernel; torch.topk is a call of its own, and took twice the time on a CPU.
    first = torch.amax(logits, -1, keepdim=True)
    smaller = torch.amax(torch.where(logits < first, logits, -torch.inf), -1, keepdim=True)
    second = torch.where(torch.sum(logits == first, -1, keepdim=True) > 1, first, smaller)
    total = torch.sum(torch.exp(logits - first), -1, keepdim=True)
    return torch.squeeze((1 - torch.exp(second - first)) / total, -1)


def largest(logits: Tensor) -> Tensor:
    """Probability of the first choice; ``logits: [B, V]`` to ``[B]``."""
    logits = logits.float()
    return torch.exp(torch.amax(logits, -1) - torch.logsumexp(logits, -1))


def certainty(logits: Tensor, *, vocabulary: int) -> Tensor:
    """``1 - H / ln V``: 1 for a single choice, 0 for none preferred; ``logits: [B, V]`` to ``[B]``."""
    chances = torch.softmax(logits.float(), -1)
    return torch.clamp(1 + torch.xlogy(chances, chances).sum(-1) / math.log(vocabulary), 0.0, 1.0)


def saturation(now: Tensor, before: Tensor) -> Tensor:
    """Cosine of the hidden states after and before a layer, clamped to [0, 1]; ``[B, W]`` twice, to ``[B]``."""
    return torch.clamp(torch.cosine_similarity(now.float(), before.float(), -1), 0.0, 1.0)


def of_classifier(logit: Tensor) -> Tensor:
    """Sigmoid of what a classifier says: ``[B]`` or ``[B, 1]`` to ``[B]``."""
    return torch.sigmoid(logit.float()).reshape(-1)


def agreement(logits: Tensor, earlier: Tensor | None, run: Tensor | None) -> tuple[Tensor, Tensor]:
    """The choice at this exit and the number of successive exits that made it; ``logits: [B, V]``, each ``[B]``.

    A row with NaN has no choice: its run is 0, so that it never reaches a patience of at least 1.
    """
    choice = torch.argmax(logits, -1)
    count = torch.ones_like(choice) if earlier is None or run is None else torch.where(choice == earlier, run + 1, 1)
    return choice, torch.where(torch.isnan(torch.amax(logits, -1)), 0, count)


def of_logits(name: str, vocabulary: int) -> Callable[[Tensor], Tensor]:
    """The function of logits with that name."""
    if name == "entropy":
        return partial(certainty, vocabulary=vocabulary)
    return {"margin": margin, "max": largest}[name]


# -- thresholds -----------------------------------------------------------------------------------------------------


def decay(start: float, tokens: int, tau: float = 4.0) -> Schedule:
    """CALM's schedule: ``clip(0.9 * start + 0.1 * exp(-tau * t / tokens), 0, 1)`` at position t."""

    def threshold(position: Tensor) -> Tensor:
        return torch.clamp(0.9 * start + 0.1 * torch.exp(position * (-tau / tokens)), 0.0, 1.0)

    return threshold


def steps(pairs: Sequence[tuple[int, float]]) -> Schedule:
    """A step function: from each position on, its threshold."""

    def threshold(position: Tensor) -> Tensor:
        level = position * 0 + pairs[0][1]
        for start, value in pairs[1:]:
            level = torch.where(position >= start, value, level)
        return level

    return threshold


def check_threshold(value: Any, confidence: Any, exits: int) -> None:
    """Raise SettingError for a threshold that cannot be meant."""
    if confidence == "patience":
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(
                f"EarlyExit(confidence='patience', threshold={value!r}): the threshold is an int of at least 1, the "
                "number of consecutive exits that agree; write threshold=2."
            )
        if value > exits:
            raise SettingError(
                f"EarlyExit(confidence='patience', threshold={value}): {exits} exit{'s' * (exits != 1)} can never "
                "agree "
                f"{value} times; give layers=(...) at least {value} entries, or a threshold of at most {exits}."
            )
        return
    if callable(value):
        return
    if isinstance(value, tuple):
        _check_pairs(value)
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise SettingError(
            f"EarlyExit(threshold={value!r}): allowed are numbers in [0, 1] (an exit is taken when the confidence is "
            "above it: 0.0 always, 1.0 never), ((position, threshold), ...) or a function of the position. Choose one, "
            "for example 0.9."
        )


def _check_pairs(pairs: tuple[Any, ...]) -> None:
    shaped = bool(pairs) and all(
        isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], int) and isinstance(p[1], (int, float))
        and 0 <= p[1] <= 1
        for p in pairs
    )  # fmt: skip
    if not shaped or pairs[0][0] != 0 or any(a[0] >= b[0] for a, b in zip(pairs, pairs[1:], strict=False)):
        raise SettingError(
            f"EarlyExit(threshold={pairs!r}): a schedule is ((0, t0), (position, t1), ...), with rising positions that "
            "begin at 0 and thresholds in [0, 1]."
        )


def schedule_of(value: Any) -> Schedule | None:
    """The function of the position behind a threshold; None for a number."""
    if callable(value):
        return value
    return steps(value) if isinstance(value, tuple) else None


# -- into a graph ---------------------------------------------------------------------------------------------------


def inline(function: Callable[..., Any], inputs: Sequence[fx.Node | None], rewriter: Rewriter, *, before: fx.Node,
           like: fx.Node) -> Any:  # fmt: skip
    """Trace ``function(*inputs)`` and insert it before a node; returns what it returns, in nodes.

    The function is plain PyTorch on tensors without control flow on values; None stands for an argument left out.
    """

    given = [node for node in inputs if node is not None]
    graph = traced(function, inputs)
    mapping: dict[fx.Node, fx.Node] = {}
    places = iter(given)
    result: Any = None
    for node in graph.nodes:
        if node.op == "placeholder":
            mapping[node] = next(places)
        elif node.op in ("call_function", "call_method"):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: mapping[n])
            make = rewriter.call if node.op == "call_function" else rewriter.method
            mapping[node] = make(node.target, args, kwargs, like=like, before=before)  # type: ignore[arg-type]
        elif node.op == "output":
            result = fx.map_arg(node.args[0], lambda n: mapping[n])
        else:
            raise SettingError(
                f"{getattr(function, '__qualname__', function)} reads a tensor or module of its own ({node.target}); a "
                "traced confidence or schedule takes everything it needs as arguments or plain numbers."
            )
    return result


def traced(function: Callable[..., Any], inputs: Sequence[fx.Node | None]) -> fx.Graph:
    """The graph of ``function(*inputs)``, one placeholder for each input that is given."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [None if node is None else fx.Proxy(graph.placeholder(f"a{i}"), tracer) for i, node in enumerate(inputs)]
    try:
        result = function(*proxies)
    except (fx.proxy.TraceError, TypeError) as error:
        raise SettingError(
            f"{getattr(function, '__qualname__', function)} cannot be traced into the graph: {error}. Write it as "
            "plain PyTorch on tensors, without `if` on values or sizes."
        ) from error
    if not all(isinstance(part, fx.Proxy) for part in (result if isinstance(result, tuple) else (result,))):
        raise SettingError(
            f"{getattr(function, '__qualname__', function)} returns {result!r} ({type(result).__name__}); it has to "
            "return a tensor that it computes from its arguments, such as logits.amax(-1)."
        )
    graph.output(fx.map_arg(_nodes(result), lambda n: n))
    return graph


def _nodes(value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        return value.node
    return tuple(_nodes(v) for v in value) if isinstance(value, tuple) else value
