"""Layers that a prompt asks for: FiRST's form of layer skipping (arXiv 2410.12513), with the decision in the cache.

A router looks at the last position of the prompt as it enters a layer, and says for each row whether the layer is
wanted. A row that does not want it passes by, and leaves all-zero keys and values in its cache. No computed key is all
zero, so that later steps read the decision where it was left: it lives exactly as long as the cache, moves with
``reorder_cache`` and goes with ``reset``. A layer that no row wants is not read: it is the branch of a ``torch.cond``
that does not run.

Before and after, for one layer with a static cache::

    h1 = layer(h0)                                    keys.index_copy_(2, position, k)

    wants = where(length == 0, router(h0[:, -1]), any(keys[:, :, 0] != 0))
    h1 = cond(not any(wants), pass_by, run, (h0, wants, keys, ...))
        run:      where(wants, layer(h0), h0)         keys.index_copy_(2, position, where(wants, k, 0))
        pass_by:  h0                                  keys.index_copy_(2, position, 0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxopt.codegen import compat
from fxopt.passes import cache_rows, confidence, depth, inputs, own_modules
from fxopt.passes.compaction import Compacted, compact
from fxopt.passes.context import PassContext
from fxopt.passes.exit_cost import weight_bytes
from fxopt.passes.exit_region import RegionError, exit_nodes, find_region, insert_cond, outline
from fxopt.passes.layers import Layer, Stack
from fxopt.passes.modules import WrappedLayer
from fxopt.passes.nodes import same
from fxopt.passes.rewriter import Rewriter
from fxopt.passes.streams import op_name
from fxopt.passes.technique import SettingError

CONDITIONAL = "torch.ops.higher_order.cond"
CHILD = "fxopt_router"
"""Name of the child of the model that holds routers from a file: ``state_dict`` keys ``fxopt_router.<layer>.*``."""
Router = nn.Linear | Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class RandomPolicy:
    """A router for tests: each row of each layer runs with probability `rate`, by a hash of seed, layer and row."""

    rate: float
    seed: int = 0

    def __call__(self, state: Tensor, layer: int) -> Tensor:
        """state: [B, W] to [B] bool; the same in eager and compiled, because integers are hashed."""
        row = torch.cumsum(torch.ones_like(state[:, 0], dtype=torch.int64), 0)
        mixed = row * 1103515245 + (layer * 12345 + self.seed * 2654435 + 1) * 69069
        for _ in range(3):
            mixed = ((mixed ^ (mixed >> 15)) * 1274126177) & 0x7FFFFFFF
        return mixed < int(self.rate * 0x80000000)


def wanted(router: Router, state: Tensor, layer: int) -> Tensor:
    """``[B]`` bool: whether each row wants layer `layer`; ``state: [B, W]``, the prompt's last position."""
    if isinstance(router, nn.Linear):
        return F.linear(state, router.weight, router.bias)[:, 0] > 0  # sigmoid above one half
    return router(state, layer)


def find_routers(model: nn.Module, path: str, layers: int) -> dict[int, Router]:
    """The routers named by a dotted path in `model`, or by a .safetensors file, which then become its ``fxopt_router``.

    A router of layer i is ``nn.Linear(width, 1)``: entry i of a ModuleList, or the ModuleDict's ``"i"``; in a file,
    ``"i.weight"`` and ``"i.bias"``. Layers without one always run. Raises SettingError for anything else.
    """
    holder = own_modules.holder(model, path, CHILD, f"LayerSkip(router={path!r})")
    found: dict[int, Router] = {}
    for name, child in holder.named_children():
        if not name.isdigit() or not isinstance(child, nn.Linear) or child.out_features != 1:
            raise SettingError(
                f"LayerSkip(router={path!r}): {name!r} is {child}; a router is nn.Linear(width, 1) under its layer's "
                "number."
            )
        found[int(name)] = child
    if not found or max(found) >= layers:
        raise SettingError(
            f"LayerSkip(router={path!r}) holds routers of layers {sorted(found)}; the stack has {layers}, 0 to "
            f"{layers - 1}."
        )
    return found


# -- meaning --------------------------------------------------------------------------------------------------------


class _Cache:
    """A Hugging Face cache as one layer sees it: rows that do not want the layer write zeros."""

    def __init__(self, cache: Any, wants: Tensor) -> None:
        self._cache = cache
        self._wants = wants[:, None, None, None]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._cache.update(torch.where(self._wants, keys, 0), torch.where(self._wants, values, 0), *args,
                                  **kwargs)  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class RoutedLayer(WrappedLayer):
    """A layer that rows pass by when the prompt did not want it. ``decisions``: ``[B]`` bool of each forward pass."""

    def __init__(self, layer: nn.Module, index: int, router: Router) -> None:
        super().__init__(layer, index)
        object.__setattr__(self, "router", router)
        self.decisions: list[list[bool]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from fxopt.passes.skip_reference import _filled, _find_cache

        hidden = args[0] if args else kwargs["hidden_states"]
        cache, name = _find_cache(args, kwargs)
        if cache is not None and _filled(cache, self.index):
            wants = (cache.layers[self.index].keys[:, :, 0] != 0).flatten(1).any(1)
        else:
            wants = wanted(self.router, hidden[:, -1], self.index)
        self.decisions.append(wants.tolist())
        if cache is not None:
            masked = _Cache(cache, wants)
            if name is not None:
                kwargs[name] = masked
            else:
                args = tuple(masked if a is cache else a for a in args)
        result = self.layer(*args, **kwargs)
        keep = wants[:, None, None]
        if isinstance(result, tuple):
            return (torch.where(keep, result[0], hidden), *result[1:])
        return torch.where(keep, result, hidden)


# -- rewrite --------------------------------------------------------------------------------------------------------


def route_stack(stack: Stack, routers: Mapping[int, Router], context: PassContext) -> None:
    """Let every layer of `stack` that has a router run for the rows that want it."""
    if depth.value(stack.layers[-1].output).requires_grad:
        context.blocked("FX205", stack.path, "gradients are recorded; routed skipping is for inference under no_grad()")
        return
    routed = [layer for layer in stack.layers if layer.index in routers]
    for layer in routed:
        refusal = depth.refusal(layer)
        if refusal is not None:
            context.blocked(refusal.code, refusal.node, refusal.message)
            return
        if not compat.cond_may_write() and any(map(_writes_a_cache, layer.nodes)):
            context.blocked(
                "FX208", layer.path, f"the layer updates its cache in place, and this version of torch "
                f"({torch.__version__}) refuses writes in the branches of torch.cond; torch 2.12 and later take them"
            )  # fmt: skip
            return
    told = []
    try:
        for layer in reversed(routed):
            told.append((layer, _route(layer, routers[layer.index], context)))
    except RegionError as error:
        if context.rewriter.changed:
            raise
        context.blocked(error.code, error.node, error.message)
        return
    context.config_patches["unsafe_marked_cacheable_functions"] = {CONDITIONAL: "1"}
    context.note(
        stack.path, "whether a layer runs is decided on the host: one synchronisation a routed layer", code="FX604"
    )
    for layer, compacted in reversed(told):
        context.applied(
            layer.path, "not read when no row of the batch wants it; otherwise computed for " +
            ("the rows that want it" if compacted else "all rows, those that pass by too")
        )  # fmt: skip


def _writes_a_cache(node: fx.Node) -> bool:
    tensor = depth.value(node)
    return op_name(node) in ("index_copy_", "copy_") and isinstance(tensor, Tensor) and tensor.ndim == 4


def _route(layer: Layer, router: Router, context: PassContext) -> bool:
    """Put a layer into a branch; whether rows that do not want it are left out of the computation."""
    rewriter = context.rewriter
    graph = rewriter.graph
    known = set(graph.nodes)
    wants = _insert_decision(layer, router, rewriter)
    nobody = confidence.inline(lambda w: torch.logical_not(torch.any(w)), [wants], rewriter, before=wants.next,
                               like=layer.input)  # fmt: skip
    decision = {n for n in graph.nodes if n not in known}
    following = _after(layer)
    alias: dict[fx.Node, fx.Node] = {}
    within: list[fx.Node] = []
    done = _compacted(layer, wants, context)
    if done is not None:
        kept, within = done.end, done.nodes
        alias.update(done.zeros)
    else:
        _mask_rows(layer, wants, alias, rewriter)
        rows = rewriter.call(torch.reshape, (wants, (-1, 1, 1)), like=layer.output, after=layer.output)
        kept = rewriter.call(torch.where, (rows, layer.output, layer.input), like=layer.output, after=rows)
        rewriter.replace(layer.output, kept, only=lambda user: user is not kept)
    alias[kept] = layer.input
    order = list(graph.nodes)
    region = find_region(graph, layer.input, decision | set(order[order.index(following) :]), within)
    passing = outline(exit_nodes(region, alias, [layer]), region.results, alias)
    insert_cond(region, nobody, passing, rewriter, f"route_{layer.index}", following)
    return done is not None


def _after(layer: Layer) -> fx.Node:
    """The first node behind all of a layer."""
    last = max((*layer.nodes, layer.output))
    return last.next


def _compacted(layer: Layer, wants: fx.Node, context: PassContext) -> Compacted | None:
    """The layer on the rows that want it, on prompts; None, and a remark, where all rows are computed."""
    state = depth.value(layer.input)
    if same(state.shape[0], 1):
        return None
    loss = _loss_of_all_rows(layer)
    if same(state.shape[1], 1):
        context.note(
            layer.path, f"one token a row: its weights are read whatever the number of rows, so rows are not gathered; "
            f"where a quarter of them passes by, all rows cost at most {loss:.1%} more bytes than the others alone"
        )  # fmt: skip
        return None
    try:
        return compact(layer.input, layer.output, wants, context.rewriter, dict(cache_rows.new_rows(layer)))
    except RegionError as error:
        context.missed(error.code, error.node, f"rows that pass by are computed along: {error.message}")
        return None


def _loss_of_all_rows(layer: Layer) -> float:
    """Bytes of a step on all rows over those on three quarters of them, less one: weights once, caches by row."""
    caches = 0.0
    for node in cache_rows.cache_inputs(layer):
        tensor = depth.value(node)
        sizes = (s if isinstance(s, int) else s.node.hint or 1 for s in tensor.shape)  # a hint installs no guard
        caches += math.prod(sizes) * tensor.element_size()
    weights = float(weight_bytes(layer.nodes))
    return (weights + caches) / max(1.0, weights + 0.75 * caches) - 1


def _insert_decision(layer: Layer, router: Router, rewriter: Rewriter) -> fx.Node:
    """``[B]`` bool, before the layer: what its router says of a prompt, what the cache holds afterwards."""
    place = layer.input.next
    put = partial(confidence.inline, rewriter=rewriter, before=place, like=layer.input)
    caches = cache_rows.cache_inputs(layer)
    stored = put(lambda k: torch.any(torch.flatten(k[:, :, 0] != 0, 1), 1), [caches[0]]) if caches else None
    if stored is not None and (not cache_rows.is_static(layer) or cache_rows.is_rolled(layer)):
        return stored  # a growing cache that is an input is filled
    last = put(lambda h: h[:, -1, :], [layer.input])
    if isinstance(router, nn.Linear):
        weights = [inputs.weight(router, name, rewriter, like=layer.input) for name, _ in router.named_parameters()]
        said = put(lambda h, *w: F.linear(h, *w)[:, 0] > 0, [last, *weights])
    else:
        said = put(lambda h: router(h, layer.index), [last])
    if stored is None:
        return said
    counter = cache_rows.length_counter(layer)
    if counter is None:
        raise RegionError("FX208", layer.input, "whether the static cache is empty cannot be seen in this graph")
    return put(lambda n, new, old: torch.where(n == 0, new, old), [counter, said, stored])


def _mask_rows(layer: Layer, wants: fx.Node, alias: dict[fx.Node, fx.Node], rewriter: Rewriter) -> None:
    """Rows that do not want the layer put zeros into its cache; `alias` learns what is put when none wants it."""
    for node, readers in cache_rows.new_rows(layer):
        tensor = depth.value(node)
        sizes = depth.size_nodes(node, layer, rewriter)
        if sizes is None:
            raise RegionError("FX204", node, "a size of the new cache rows is not in the residual stream")
        options = {"dtype": tensor.dtype, "device": tensor.device}
        zeros = rewriter.call(torch.zeros, (tuple(sizes),), options, like=node, after=node)
        shaped = rewriter.call(torch.reshape, (wants, (-1, *[1] * (tensor.ndim - 1))), like=node, after=zeros)
        masked = rewriter.call(torch.where, (shaped, node, zeros), like=node, after=shaped)
        rewriter.replace(node, masked, only=lambda user, readers=readers: user in readers)  # type: ignore[misc]
        alias[masked] = zeros
