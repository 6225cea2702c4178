"""``forward`` of a routed layer: which tokens are computed, in training, in eval, compiled and with a KV cache.

What is computed once that is decided stands in :mod:`fxopt.passes.mod_reference`. In eager the number of tokens is read
on the host and is exact. A compiled graph has branches instead (``torch.cond``)::

    no cache; a chunk on a static cache    room for a little over the capacity, or every token where that overflows
    one new token on a static cache        the block, or nothing where every row of the batch declines

There a branch writes the rows of its tokens into the cache of the layer. Which rows count is written beside it, outside
of the branches, for all tokens of the call. A growing cache is written on the host, at a graph break.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.codegen import compat
from fxopt.passes.mod_counters import observe
from fxopt.passes.mod_reference import (
    ROUTER,
    Router,
    compute,
    marked,
    members,
    top_tokens,
    warn_untrained,
)
from fxopt.passes.regions import CACHES, Call, Keys, Selection, ascending, padding


def routed_forward(
    module: nn.Module, own: Any, names: tuple[str, ...], residual: bool, /, *args: Any, **kwargs: Any
) -> Any:
    """``forward`` of a routed layer. `own`: the instance's earlier forward, or None for the class's."""
    router: Router | None = getattr(module, ROUTER)
    block = functools.partial(type(module).forward, module) if own is None else own
    if router is None:
        return block(*args, **kwargs)
    call = Call(names, args, kwargs)
    if module.training:
        with marked(router.path):
            score = router(call.stream)
            real = padding(call.mask, call.stream.shape[1])
        return _train(router, block, call, score, real, residual)
    cache = call.get(*CACHES)
    with marked(router.path):
        score = router(call.stream)
        real = padding(call.mask, call.stream.shape[1], _first_column(cache, router.cache_index))
        logits = router.logits(call.stream, score)
        member = logits > 0 if real is None else (logits > 0) & real
    if router.watched:
        observe(router, member, real, _seen(cache, router.cache_index))
    routed = Routed(router, block, call, score, member, residual)
    # dynamic=True makes every float of the block an input, which Dynamo cannot share between two branches.
    branches = torch.compiler.is_compiling() and torch._dynamo.config.assume_static_by_default
    if cache is not None:
        layer = _ready(cache, router.cache_index) if branches else None
        # A branch that writes has no derivative.
        if layer is None or torch.is_grad_enabled():
            return routed.on_host_with_cache(cache)
        return routed.with_static(layer)
    if branches:
        return routed.in_branches(None)
    return routed.on_host() if torch.compiler.is_compiling() else routed.exactly(None)


def _train(router: Router, block: Any, call: Call, score: Tensor, real: Tensor | None, residual: bool) -> Any:
    length = call.stream.shape[1]
    for name in CACHES:
        if call.get(name) is not None:
            call.set(name, None)  # top-C of a cached sequence has no meaning for the tokens that follow
    with marked(router.path):
        selection = top_tokens(score, router.count(length), real)
        if torch.is_grad_enabled() or router.watched:
            chosen = members(selection)
            router.observed = (router.logits(call.stream, score), chosen, real)
            if router.watched:
                observe(router, chosen, real)
    return compute(block, call, score, selection, router.path, residual=residual)


def _layer(cache: Any, index: int | None) -> Any:
    layers = getattr(cache, "layers", ())
    return layers[index] if index is not None and index < len(layers) else None


def _seen(cache: Any, index: int | None) -> Any:
    """Tokens before this call, a number or a tensor; 0 where the layer of the cache is not routed yet."""
    layer = _layer(cache, index)
    if not getattr(layer, "routed", False):
        return 0
    return layer.cumulative_length if layer.static else layer.seen


def _first_column(cache: Any, index: int | None) -> Any:
    """The column of a static cache's mask that is this call's first token; None where the last is its last."""
    layer = _layer(cache, index)
    if getattr(layer, "max_cache_len", None) is None:
        return None
    seen = getattr(layer, "cumulative_length_int", None)
    if getattr(layer, "is_sliding", False) and seen is not None:
        return seen - layer.get_mask_sizes(1)[1]
    return layer.cumulative_length


def _ready(cache: Any, index: int | None) -> Any:
    """The routed layer of the cache where a graph can write it: it exists, with its tensors; else None."""
    layer = _layer(cache, index)
    if not getattr(layer, "routed", False) or not layer.is_initialized:
        return None
    # A growing cache has as many rows as were routed, which the host has to know.
    return layer if layer.static and compat.cond_may_write() else None


class Routed:
    """One call of a routed layer in eval: ``score: [B, S]``, ``member: [B, S]`` (bool), and the ways to compute it."""

    def __init__(
        self, router: Router, block: Any, call: Call, score: Tensor, member: Tensor, residual: bool
    ) -> None:  # fmt: skip
        self.router, self.block, self.call = router, block, call
        self.score, self.member, self.residual = score, member, residual
        self.length = call.stream.shape[1]

    def compute(self, selection: Selection, keys: Keys | None) -> Any:
        """The block on the selected tokens."""
        path = self.router.path
        return compute(self.block, self.call, self.score, selection, path, keys=keys, residual=self.residual)

    def stream(self, selection: Selection, keys: Keys | None) -> Tensor:
        """The first result of the block, for a branch: the others are known to be None."""
        result = self.compute(selection, keys)
        if isinstance(result, tuple) and not self.router.extra:
            raise ValueError(
                "mixture of depths: this block returns a tuple, which its forward's annotation does not say; run the "
                "model once in eager and eval() before it is compiled."
            )
        return result[0] if isinstance(result, tuple) else result

    def declined(self) -> Tensor:
        """What comes out where no token is computed."""
        return self.call.stream.clone() if self.residual else torch.zeros_like(self.call.stream)

    def returned(self, output: Tensor) -> Any:
        """The output as the block returns it."""
        return (output, *[None] * self.router.extra) if self.router.extra else output

    # -- on the host: eager -----------------------------------------------------------------------------------------

    def exactly(self, layer: Any) -> Any:
        """The count is read on the host: the tokens that the longest row of the batch needs, or none at all."""
        warn_untrained(self.router)
        count = int(self.member.sum(1).max())
        if self.router.extra is None:
            count = max(count, 1)  # what the block returns is not known yet
        selection = ascending(self.member, count)
        keys = None
        if layer is not None:
            keys = layer.advance(self.member, selection)
            keys = keys._replace(cache=layer.writer(keys, selection))
        if not count:
            return self.returned(self.declined())
        result = self.compute(selection, keys)
        self.router.extra = len(result) - 1 if isinstance(result, tuple) else 0
        return result

    @torch.compiler.disable
    def on_host(self) -> Any:
        """A graph break, and then eager."""
        return self.exactly(None)

    @torch.compiler.disable
    def on_host_with_cache(self, cache: Any) -> Any:
        """The same, for a cache: its layer is put in place, and as many rows are written as there are tokens."""
        from fxopt.passes.mod_cache import routed_layer

        index = self.router.cache_index
        if index is None:
            raise ValueError(
                f"the block of {self.router.path or 'a routed layer'} is given a cache and has no layer_idx that says "
                "which of its layers."
            )
        return self.exactly(routed_layer(cache, index, self.call.stream))

    # -- in a graph -------------------------------------------------------------------------------------------------

    def in_branches(self, layer: Any, keys: Keys | None = None) -> Any:
        """Room for a little over the capacity, every token where that overflows."""
        length, room = self.length, self.router.room(self.length)
        with marked(self.router.path):
            whole = ascending(self.member, length)
        index, valid = whole.places, whole.valid
        assert valid is not None

        def computed(count: int) -> Tensor:
            # Sliced in here: what a branch closes over must not share memory with what the other does.
            few = Selection(index[:, :count], valid[:, :count], length)
            return self.stream(few, keys if keys is None else keys._replace(cache=layer.writer(keys, few)))

        if room == length:
            return self.returned(computed(length))
        fits = self.member.sum(1).max() <= room
        return self.returned(torch.cond(fits, lambda: computed(room), lambda: computed(length), ()))

    def with_static(self, layer: Any) -> Any:
        """A static cache: places are written for all tokens here, keys and values by the branch that runs."""
        selection = self._only_token()
        with marked(self.router.path):
            keys = layer.advance(self.member, selection)
        if self.length > 1:
            return self.in_branches(layer, keys)

        def run() -> Tensor:
            return self.stream(selection, keys._replace(cache=layer.writer(keys, selection)))

        return self.returned(torch.cond(self.member.any(), run, self.declined, ()))

    def _only_token(self) -> Selection:
        return Selection(torch.zeros_like(self.member, dtype=torch.int64), self.member, self.length)
