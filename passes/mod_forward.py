"""``forward`` of a routed layer: which tokens are computed, in training, in eval, compiled and with a KV cache.

What is computed once that is decided stands in :mod:`fxopt.passes.mod_reference`. In eager the number of tokens is read
on the host and is exact. A compiled graph has branches instead (``torch.cond``)::

    no cache; a chunk on a filled cache    room for a little over the capacity, or every token where that overflows
    one new token on a cache               the block, or nothing where every row of the batch declines

There a branch writes the rows of its tokens into the cache of the layer. Which rows count is written beside it, outside
of the branches, for all tokens of the call. A growing cache has cells in reserve for a number of steps, and is enlarged
between two calls (:func:`called`).

Inductor reads the predicate of a branch on the host. Where that means to wait for a device (:data:`DEVICE_DECIDES`),
there is no branch: the block stands in the graph once for the room and once more for every token, and whether it is
needed is a tensor that each of its linears is given; one that is not reads no weight.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.codegen import compat
from fxopt.passes.mod_counters import observe
from fxopt.passes.mod_reference import (
    ROUTER,
    ROUTERS,
    Router,
    compute,
    deciding,
    marked,
    members,
    only_if,
    routers,
    top_tokens,
    warn_untrained,
)
from fxopt.passes.regions import CACHES, Call, Keys, Selection, Writer, ascending, padding

DEVICE_DECIDES: tuple[str, ...] = ("cuda",)
"""Device types (ROCm calls itself cuda) where no branch is taken on the host."""


@contextlib.contextmanager
def captured_for_a_device() -> Iterator[None]:
    """Capture as on a device that decides by itself, wherever the model is: for the plan of one that is not here."""
    global DEVICE_DECIDES
    before, DEVICE_DECIDES = DEVICE_DECIDES, (*DEVICE_DECIDES, "meta", "cpu")
    try:
        yield
    finally:
        DEVICE_DECIDES = before


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
    if cache is not None:
        layer = _layer(cache, router.cache_index)
        held = getattr(layer, "routed", False) and layer.holds(call.stream.shape[1])
        # What writes to a cache has no derivative.
        if not torch.compiler.is_compiling() or not held or torch.is_grad_enabled():
            return routed.on_host_with_cache(cache)
        return routed.with_cache(layer)
    return routed.by_room(None, None) if torch.compiler.is_compiling() else routed.exactly(None)


def called(model: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Before a compiled model is entered: the routed layers of its KV cache are put in place, with cells to write to.

    Here and not in the model, because what has to be asked of the device would break the graph. The first call with a
    cache runs in eager: it shows what each block writes.
    """
    if model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compiled(*args, **kwargs)
    # At each step: where the whole model was decorated, its modules need not be searched.
    own: Any = model._modules.get(ROUTERS) or routers(model)
    written = {r.cache_index: r.rows for r in own.values() if r.cache_index is not None}
    names = _parameters(type(model).forward)
    given = dict(zip(names, args, strict=False)) | kwargs
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if cache is None and written and CACHES[0] in names and CACHES[0] not in names[: len(args)]:
        cache = _made_by_default(model, given)
        kwargs = kwargs if cache is None else {**kwargs, CACHES[0]: cache}
    tokens = _tokens(given)
    if cache is None or tokens is None or not written:
        return compiled(*args, **kwargs)
    if None in written.values():
        return model._call_impl(*args, **kwargs)
    from fxopt.passes.mod_cache import ready

    ready(cache, written, tokens.shape[0], tokens.shape[1])
    return compiled(*args, **kwargs)


@functools.lru_cache(maxsize=16)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _tokens(given: dict[str, Any]) -> Tensor | None:
    """The new tokens of a call, ``[B, S, ...]``: not a mask, which is as long as the sequence."""
    named = (given.get(name) for name in ("input_ids", "inputs_embeds"))
    others = (t for name, t in given.items() if "mask" not in name and "position" not in name)
    return next((t for t in (*named, *others) if isinstance(t, Tensor) and t.ndim > 1), None)


def _made_by_default(model: nn.Module, given: dict[str, Any]) -> Any:
    """The empty cache that a Hugging Face model makes for itself where it is given none; None where it makes none."""
    config = getattr(model, "config", None)
    use = given.get("use_cache")
    if config is None or not (getattr(config, "use_cache", False) if use is None else use):
        return None
    from transformers import DynamicCache

    return DynamicCache(config=config)


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
        if self.router.extra is None or not getattr(layer, "is_initialized", True):
            count = max(count, 1)  # what the block returns, or what its rows of a cache look like, is not known yet
        selection = ascending(self.member, count)
        keys = None
        if layer is not None:
            if not layer.static and layer.seen + self.length > layer.limit:
                layer.reserve(self.length, count, int(layer.used.max()))
            keys = layer.advance(self.member, selection)
            keys = keys._replace(cache=Writer(layer, keys.own(selection)))
        if not count:
            return self.returned(self.declined())
        result = self.compute(selection, keys)
        self.router.extra = len(result) - 1 if isinstance(result, tuple) else 0
        return result

    @torch.compiler.disable
    def on_host_with_cache(self, cache: Any) -> Any:
        """For a cache, and a graph break: its layer is put in place, and has as many rows as there are tokens."""
        from fxopt.passes.mod_cache import Rows, routed_layer

        index = self.router.cache_index
        if index is None:
            raise ValueError(
                f"the block of {self.router.path or 'a routed layer'} is given a cache and has no layer_idx that says "
                "which of its layers."
            )
        batch, tokens = self.member.shape
        layer = routed_layer(cache, index, batch, self.member.device, tokens)
        result = self.exactly(layer)
        if self.router.rows is None:
            keys = layer.keys
            self.router.rows = Rows(keys.shape[1], keys.shape[3], layer.values.shape[3], keys.dtype, keys.device)
        return result

    # -- in a graph -------------------------------------------------------------------------------------------------

    def with_cache(self, layer: Any) -> Any:
        """Places are written for all tokens here, keys and values by the part of the graph that computes them."""
        with marked(self.router.path):
            selection = self._whole()
            keys = layer.advance(self.member, selection)
        return self.by_room(layer, keys)

    def by_room(self, layer: Any, keys: Keys | None) -> Any:
        """Room for a little over the capacity, every token where that overflows; of one token, itself or nothing."""
        with marked(self.router.path):
            whole = self._whole()
        if self._host_decides():
            return self.returned(self._in_branches(whole, layer, keys))
        return self.returned(self._on_device(whole, layer, keys))

    def _host_decides(self) -> bool:
        if self.call.stream.device.type in DEVICE_DECIDES:
            return False
        # dynamic=True makes every float of the block an input, which Dynamo cannot share between two branches.
        return compat.cond_may_write() and torch._dynamo.config.assume_static_by_default

    def _in_branches(self, whole: Selection, layer: Any, keys: Keys | None) -> Tensor:
        def computed(count: int) -> Tensor:
            # Sliced in here: what a branch closes over must not share memory with what the other does.
            few = whole.first(count)
            return self.stream(few, keys and keys._replace(cache=Writer(layer, keys.own(few))))

        length, room = self.length, self.router.room(self.length)
        if length == 1:
            return torch.cond(self.member.any(), lambda: computed(1), self.declined, ())
        if room == length:
            return computed(length)
        fits = self.member.sum(1).max() <= room
        return torch.cond(fits, lambda: computed(room), lambda: computed(length), ())

    def _on_device(self, whole: Selection, layer: Any, keys: Keys | None) -> Tensor:
        def computed(count: int, least: int, name: str) -> tuple[Tensor, Tensor]:
            part = f"{self.router.path}:{name}"
            few = whole.first(count)
            with deciding(part):
                needed = self.member.sum(1).max() > least
            with only_if(part):
                cache = Writer(layer, keys.own(few), needed if least else None) if keys else None
                return self.stream(few, keys and keys._replace(cache=cache)), needed

        length, room = self.length, self.router.room(self.length)
        some, _ = computed(room, 0, "room")
        if room == length:
            return some
        every, needed = computed(length, room, "every token")
        with marked(self.router.path):
            return torch.where(needed, every, some)

    def _whole(self) -> Selection:
        if self.length == 1:
            return Selection(torch.zeros_like(self.member, dtype=torch.int64), self.member, self.length)
        return ascending(self.member, self.length)
