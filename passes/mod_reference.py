"""What mixture of depths computes, in plain PyTorch: routers, the choice of tokens, the routed block.

For a block with residual, ``block(x) = x + f(x)``, and a router with weight w (Raposo et al., arXiv 2404.02258)::

    r  = x . w                                   # [B, S]
    X~ = the selected tokens of x, ascending     # [B, C, W]
    x' = x + r * f(X~) at those tokens, x elsewhere

The block is called on C tokens, in eager too: nothing is computed and masked afterwards. While training, the C tokens
with the highest r of each sequence are selected, which looks at the whole sequence. In ``eval()`` a predictor decides
for each token on its own, so that decoding can make the same choice one token at a time.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxopt.codegen import compat
from fxopt.passes.regions import Call, Selection, ascending, rows

ROUTERS = "fxopt_router"
"""Name of the child of the decorated model that holds the routers: ``state_dict`` keys ``fxopt_router.<layer>.*``."""
ROUTER = "_fxopt_router"
"""Attribute of a routed layer: its router, or None where routing was taken away again."""
ROUTED = "fxopt.routed"
"""Key of the annotation on the nodes that gather and scatter a routed layer's tokens."""
DECIDES = "fxopt.decides"
"""Key of the annotation on the nodes that decide on the device whether a part of a routed layer is needed."""
ONLY_IF = "fxopt.only_if"
"""Key of the annotation on the nodes of that part."""


class Router(nn.Module):
    """Scores tokens and decides which of them a block computes. ``x: [B, S, W]``."""

    scorer: nn.Module | None

    def __init__(
        self, width: int, capacity: int | float, predictor: str, seed: int, scorer: nn.Module | None = None
    ) -> None:
        super().__init__()
        # Own generators: a router depends on its layer alone, so that two copies of a model get the same one.
        generator = torch.Generator().manual_seed(seed)
        if scorer is None:
            self.weight = nn.Parameter(torch.randn(width, generator=generator) * width**-0.5)
        # Held without being registered: a scorer that is part of the model keeps its own place in the state_dict.
        object.__setattr__(self, "scorer", scorer)
        self.predictor: nn.Module | None = None
        if predictor == "auxiliary":
            hidden = max(width // 4, 8)
            self.predictor = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            with torch.no_grad():
                for parameter in self.predictor.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        self.path = ""
        self.cache_index: int | None = None
        """Number of the routed layer in a KV cache, where the layer knows it."""
        self.set_capacity(capacity)
        self.trained = False
        self.warned = {"untrained": False}
        """Whether it was said that predictors are untrained; the routers of one model share it."""
        self.watched = False
        self.extra: int | None = None
        """What the block returns beside the stream, once it has run in eager: how many, 0 where it returns a tensor."""
        self.rows: Any = None
        """What the block writes into a KV cache for each token, once it has (``mod_cache.Rows``)."""
        self.observed: tuple[Tensor, Tensor, Tensor | None] | None = None
        """Of the last training forward: predictor logits, membership (bool), real tokens (bool); all [B, S]."""
        self.routes: Tensor | None = None
        """Of the last forward while watched: which tokens were computed, [B, S], bool."""
        self.counts: Tensor | None = None
        """Tokens seen and computed while watched, by place: see :mod:`fxopt.passes.mod_counters`."""

    def forward(self, x: Tensor) -> Tensor:
        """r, [B, S]: how much of the block each token gets."""
        if self.scorer is not None:
            score = self.scorer(x)
            return score.squeeze(-1) if score.ndim == x.ndim else score
        return F.linear(x, self.weight[None]).squeeze(-1)

    def logits(self, x: Tensor, score: Tensor) -> Tensor:
        """What the causal decision is made of, [B, S]: above 0 (probability above a half) the token is computed."""
        if self.predictor is None:
            return score
        return self.predictor(x.detach()).squeeze(-1)

    def set_capacity(self, capacity: int | float) -> None:
        """A float is a fraction of the sequence (rounded up), an int a number of tokens (all of a shorter sequence)."""
        self.capacity = capacity
        share = Fraction(0 if isinstance(capacity, int) else capacity).limit_denominator(1_000_000)
        self.tokens = capacity if isinstance(capacity, int) else None
        self.share = (share.numerator, share.denominator)

    def count(self, length: int) -> int:
        """Tokens of a sequence of `length` that are computed in training: at least one, at most all."""
        if self.tokens is not None:
            return min(self.tokens, length)
        numerator, denominator = self.share
        return (length * numerator + denominator - 1) // denominator

    def room(self, length: int) -> int:
        """Tokens that a compiled eval forward has room for before it computes every one: a quarter over capacity."""
        return min(self.count(length) * 5 // 4 + 1, length)

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}"

    def __getstate__(self) -> dict[str, Any]:
        # What a forward left behind belongs to its autograd graph and can be neither copied nor pickled.
        return {**self.__dict__, "observed": None, "routes": None, "counts": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.trained = self.trained or any(name.startswith(prefix) for name in state_dict)


# -- the choice -----------------------------------------------------------------------------------------------------


def top_tokens(score: Tensor, count: int, real: Tensor | None = None) -> Selection:
    """Exactly `count` places for each row of ``score: [B, S]``, ascending; of equal scores the earlier places.

    ``real: [B, S]`` (bool): padding is never selected. A sequence with fewer real tokens is filled up.
    """
    score = score.detach()
    if real is not None:
        score = score.masked_fill(~real, -torch.inf)
    index = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    if real is None:
        return Selection(index.sort(dim=1).values, None, score.shape[1])
    return ascending(members(Selection(index, None, score.shape[1])) & real, count)


def members(selection: Selection) -> Tensor:
    """[B, S], bool: which tokens are selected."""
    index = selection.places
    valid = torch.ones_like(index, dtype=torch.bool) if selection.valid is None else selection.valid
    return torch.zeros(
        index.shape[0], selection.length, dtype=torch.bool, device=index.device
    ).scatter(1, index, valid)  # fmt: skip


# -- the routed block -----------------------------------------------------------------------------------------------


def compute(
    block: Callable[..., Any], call: Call, score: Tensor, selection: Selection, path: str = "", keys: Any = None,
    residual: bool = True,
) -> Any:  # fmt: skip
    """x + r * f(X~) at the selected tokens, x bit for bit elsewhere; the block runs on ``[B, C, W]``.

    A block that returns a tuple keeps its other members. ``residual=False``: the block is a part of a layer, without
    the addition to the stream; what it contributes is r * f(X~) at the selected tokens and zero elsewhere.
    """
    index, valid = selection.places, selection.valid
    with marked(path):
        before, args, kwargs = call.at(selection, keys)
    result = block(*args, **kwargs)
    after = result[0] if isinstance(result, tuple) else result
    with marked(path):
        weight = rows(score, index).to(after.dtype)[..., None]
        base = before if residual else torch.zeros_like(before)
        after = base + weight * (after - base if residual else after)
        if valid is not None:
            after = torch.where(valid[..., None], after, base)
        whole = call.stream if residual else torch.zeros_like(call.stream)
        output = whole.scatter(1, index[..., None].expand_as(after), after.to(whole.dtype))
    return (output, *result[1:]) if isinstance(result, tuple) else output


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def marked(path: str) -> Any:
    """Marks what moves tokens of the routed layer `path`."""
    return compat.annotate({ROUTED: path}) if torch.compiler.is_compiling() else _nothing()


def deciding(part: str) -> Any:
    """Marks what finds out whether `part` of a graph is needed: the last of these nodes, a 0-d bool, says it."""
    return compat.annotate({DECIDES: part}) if torch.compiler.is_compiling() else _nothing()


def only_if(part: str) -> Any:
    """Marks what need not be computed where `part` is not needed; what comes out of it then is not looked at."""
    return compat.annotate({ONLY_IF: part}) if torch.compiler.is_compiling() else _nothing()


def warn_untrained(router: Router) -> None:
    """One warning for a model with a predictor that decides without having been trained."""
    if not router.trained and not router.warned["untrained"]:
        router.warned["untrained"] = True
        warnings.warn(
            f"mixture of depths: the predictor of {router.path or 'a routed layer'} was never trained, so which tokens "
            "are computed in eval() is arbitrary. Add fxopt.passes.mod_reference.auxiliary_loss(model) to the training "
            "loss, or load a checkpoint that has fxopt_router.* in it. Said once for a model; others of its predictors "
            "may be untrained too.",
            UserWarning,
            stacklevel=2,
        )


# -- losses and counters --------------------------------------------------------------------------------------------


def routers(model: nn.Module) -> dict[str, Router]:
    """The routers of a model, by the path of the layer they route."""
    found = [r for m in model.modules() if (r := m.__dict__.get(ROUTER)) is not None]
    return {router.path: router for router in found}


def auxiliary_loss(model: nn.Module) -> Tensor:
    """What the predictors have to learn from the last training forward: add it to the loss before ``backward()``.

    Mean over routed layers of the binary cross-entropy between each real token's logit and its membership in the
    top C. With ``predictor="bce"`` its gradient reaches the router weight and the model, as in the paper's first
    method; with ``"auxiliary"`` the predictor alone. Reading it clears it, so that each micro-batch of a gradient
    accumulation counts once. Raises ValueError where no training forward was made since.
    """
    losses = []
    for router in routers(model).values():
        if router.observed is None:
            continue
        logits, member, real = router.observed
        router.observed = None
        router.trained = True
        each = F.binary_cross_entropy_with_logits(logits.float(), member.float(), reduction="none")
        if real is None:
            losses.append(each.mean())
        else:
            losses.append((each * real).sum() / real.expand_as(each).sum().clamp(min=1))
    if not losses:
        raise ValueError(
            "auxiliary_loss(model) reads what the last forward in model.train() with gradients left behind, and there "
            "is nothing: run the forward first, and read its loss once."
        )
    return torch.stack(losses).mean()


def layer_key(stack_path: str, index: int, several: bool) -> str:
    """Key of a layer's router below ``fxopt_router``."""
    return f"{re.sub(r'[^0-9A-Za-z]+', '_', stack_path)}_{index}" if several else str(index)
