"""Mixture of depths: a router chooses, block by block, which tokens are computed; the others pass by.

Raposo et al., arXiv 2404.02258. The meaning is in :mod:`fxopt.passes.mod_reference`, and it already computes C tokens
and no more: eager gathers them, calls the block on ``[B, C, W]``, scatters the result. So Dynamo captures a graph whose
matrix products have C rows, with autograd, for static and symbolic lengths::

    r = linear(x, w)                                  # [B, S]
    index = sort(argsort(r)[:, :C])                   # [B, C]
    h = gather(x, index); ... block on C tokens ...   # [B, C, W]
    x' = scatter(x, index, h + r * (block(h) - h))    # [B, S, W]

The pass has nothing to derive from a dense graph. It recognises what was routed, by annotations that the reference
leaves on the graph, tells what each layer computes, and hands to kernels what they do better than Inductor
(:mod:`fxopt.passes.mod_rewrite`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxopt.passes.context import PassContext
from fxopt.passes.mod_forward import called, routed_forward
from fxopt.passes.mod_mixing import module_mixes, neighbours_mixed
from fxopt.passes.mod_reference import (
    ONLY_IF,
    ROUTED,
    ROUTER,
    ROUTERS,
    Router,
    layer_key,
    routers,
    warn_untrained,
)
from fxopt.passes.mod_rewrite import (
    fuse_movement,
    mark_of,
    marked_nodes,
    skip_where_not_needed,
)
from fxopt.passes.modules import ModuleStack, module_stacks
from fxopt.passes.nodes import name_of
from fxopt.passes.skip_reference import _blocks, _is_projection
from fxopt.passes.streams import op_name
from fxopt.passes.technique import SettingError, Technique, nearest

PARTS = ("layer", "attention", "mlp")
PREDICTORS = ("bce", "auxiliary")
DECIDES_ITSELF = "its predictor decides"
"""How the remark on a layer begins whose count of tokens is not known beforehand."""


@dataclass(frozen=True)
class MixtureOfDepths(Technique):
    """Route tokens around blocks: ``capacity`` of each sequence's tokens are computed in every routed layer.

    Args:
        capacity: a float in (0, 1]: that fraction of the sequence, rounded up; an int: that many tokens (all of a
            shorter sequence).
        layers: 0-based indices of the routed layers, negative from the end. Without it, every `every`-th: ``every=2``
            routes 1, 3, 5, ... and leaves the first layer dense, the paper's best setting.
        router: ``"linear"`` (one weight vector a layer), the dotted path of a module of the model that maps
            ``[B, S, W]`` to ``[B, S]`` or ``[B, S, 1]``, or a .safetensors file with the routers' tensors.
        predictor: how the choice is made causally in ``eval()``: ``"bce"``, by the router itself, trained with an
            auxiliary loss; ``"auxiliary"``, by a small MLP behind a stop-gradient, trained the same way.
        part: ``"layer"``, or only its ``"attention"`` or ``"mlp"``.

    Decorating a model adds the routers to it, as parameters ``fxopt_router.<layer>.*``, and from then on eager routes
    too. Approximate: the model has to be trained with it. Raises SettingError for settings that cannot hold.
    """

    name: ClassVar[str] = "mixture_of_depths"
    exact: ClassVar[bool] = False

    capacity: float | int
    layers: tuple[int, ...] | None = None
    every: int = 2
    router: str = "linear"
    predictor: str = "bce"
    part: str = "layer"

    def __post_init__(self) -> None:
        if isinstance(self.capacity, bool) or not isinstance(self.capacity, (int, float)):
            raise SettingError(
                f"MixtureOfDepths(capacity={self.capacity!r}): a fraction of the sequence such as 0.125, or a number "
                "of tokens such as 256."
            )
        if isinstance(self.capacity, float) and not 0 < self.capacity <= 1:
            raise SettingError(
                f"MixtureOfDepths(capacity={self.capacity!r}): a float is a fraction of the sequence, above 0 and at "
                "most 1.0; write an int for a number of tokens."
            )
        if self.capacity < 1 and isinstance(self.capacity, int):
            raise SettingError(
                f"MixtureOfDepths(capacity={self.capacity!r}): at least one token has to be computed. To compute none, "
                "use LayerSkip."
            )
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise SettingError(f"MixtureOfDepths(every={self.every!r}): an int of at least 1 (2: every second layer).")
        if self.layers is not None:
            if isinstance(self.layers, int):
                raise SettingError(f"MixtureOfDepths(layers={self.layers!r}): write a tuple, layers=({self.layers},).")
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers or any(isinstance(i, bool) or not isinstance(i, int) for i in self.layers):
                raise SettingError(f"MixtureOfDepths(layers={self.layers!r}): a tuple of layer indices (ints).")
            if self.every != 2:
                raise SettingError("MixtureOfDepths takes layers=(i, ...) or every=n, not both.")
        for field, allowed in (("predictor", PREDICTORS), ("part", PARTS)):
            value = getattr(self, field)
            if value not in allowed:
                raise SettingError(
                    f"MixtureOfDepths({field}={value!r}): allowed are {', '.join(map(repr, allowed))}."
                    f"{nearest(value, allowed)}"
                )
        if not isinstance(self.router, str) or not self.router:
            raise SettingError(
                f"MixtureOfDepths(router={self.router!r}): 'linear', the dotted path of a module in the model, or a "
                ".safetensors file."
            )

    def routed(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the routed layers in a stack of `num_layers`, ascending."""
        if self.layers is None:
            return tuple(range(self.every - 1, num_layers, self.every))
        for index in self.layers:
            if not -num_layers <= index < num_layers:
                raise SettingError(
                    f"{self}: layer {index} does not exist; the stack has {num_layers} layers, indices 0 to "
                    f"{num_layers - 1} or {-num_layers} to -1."
                )
        return tuple(sorted({index % num_layers for index in self.layers}))

    # -- meaning ------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> Technique:
        for stack in self._stacks(model):
            self.routed(len(stack))
        for router in routers(model).values():
            if not model.training:
                warn_untrained(router)  # here, because a compiled forward cannot
        return self

    def reference(self, model: nn.Module) -> nn.Module:
        """The model with routers, which routes in eager: itself where it was decorated."""
        self.prepare(model)
        return model

    def prepare(self, module: nn.Module) -> None:
        """Add routers to `module`, or change them to this setting; routers that stay keep their weights."""
        stacks = self._stacks(module)
        wanted = [
            (layer_key(stack.path, index, len(stacks) > 1), stack, index)
            for stack in stacks
            for index in self.routed(len(stack))
        ]
        if not wanted:
            raise SettingError(f"{self} routes no layer of {', '.join(f'{s.path} ({len(s)})' for s in stacks)}.")
        targets = {key: self._target(stack, index) for key, stack, index in wanted}
        scorer = self._scorer(module)
        before = module._modules.get(ROUTERS)
        earlier: dict[str, nn.Module] = dict(before.items()) if isinstance(before, nn.ModuleDict) else {}
        unroute(module)
        chosen = nn.ModuleDict()
        made = False
        warned = next((r.warned for r in earlier.values() if isinstance(r, Router)), {"untrained": False})
        for number, (key, stack, index) in enumerate(wanted):
            kept = earlier.get(key)
            if not isinstance(kept, Router) or not self._fits(kept, scorer):
                kept, made = self._make_router(module, stack.layers[index], number, scorer), True
            kept.set_capacity(self.capacity)
            kept.path = f"{stack.path}.{index}"
            kept.warned = warned
            chosen[key] = kept
            _route(targets[key], kept, residual=self.part == "layer")
        module.add_module(ROUTERS, chosen)
        if made and self.router.endswith(".safetensors"):  # and not over what was trained since
            _load(chosen, self.router)

    def called(self, model: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Makes the KV cache ready, see :func:`fxopt.passes.mod_forward.called`."""
        return called(model, compiled, *args, **kwargs)

    def prepare_class(self, cls: type[nn.Module]) -> None:
        """Instances get their routers when they are made."""
        original = cls.__init__

        @functools.wraps(original)
        def make(instance: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(instance, *args, **kwargs)
            if type(instance) is cls:  # a subclass may add its layers after this
                self.prepare(instance)

        cls.__init__ = make  # type: ignore[method-assign,assignment]

    def _stacks(self, model: nn.Module) -> list[ModuleStack]:
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise SettingError(f"{self}: {type(model).__name__} is an encoder-decoder; only decoders are routed.")
        stacks = module_stacks(model)
        if not stacks:
            raise SettingError(
                f"{self}: no stack of layers was found in {type(model).__name__}. Decorate the module that holds them "
                "(an nn.ModuleList of blocks); layers=(i,) chooses among them."
            )
        return stacks

    def _scorer(self, model: nn.Module) -> nn.Module | None:
        if self.router == "linear" or self.router.endswith(".safetensors"):
            return None
        try:
            return model.get_submodule(self.router)
        except AttributeError:
            names = [name for name, _ in model.named_modules() if name]
            raise SettingError(
                f"{self}: there is no module {self.router!r} in {type(model).__name__}."
                f"{nearest(self.router, names)} Allowed are 'linear', a dotted path, or a .safetensors file."
            ) from None

    def _target(self, stack: ModuleStack, index: int) -> nn.Module:
        layer = stack.layers[index]
        target = self._routed_part(layer)
        for module in target.modules():
            if module_mixes(module):
                raise SettingError(
                    f"{self}: {type(module).__name__} in {stack.path}.{index} mixes each token with its neighbours or "
                    "with a running state, which has no meaning for tokens picked out of a sequence. Route other "
                    "layers (layers=...) or another part."
                )
        return target

    def _routed_part(self, layer: nn.Module) -> nn.Module:
        for module in layer.modules():
            if getattr(module, "is_causal", True) is False:
                raise SettingError(f"{self}: {type(module).__name__} is not causal; only causal decoders are routed.")
        attentions = [child for _, child in _blocks(layer)]
        if self.part == "layer":
            return layer
        if sum("norm" in type(child).__name__.lower() for child in layer.children()) > 2:
            raise SettingError(
                f"{self}: {type(layer).__name__} normalises what its parts contribute, which would undo the router's "
                "weight; use part='layer'."
            )
        if self.part == "attention":
            found = attentions
        else:
            found = [
                child
                for child in layer.children()
                if child not in attentions and sum(map(_is_projection, child.modules())) > 1
            ]
        if not found:
            raise SettingError(
                f"{self}: {type(layer).__name__} has no module of its own for its {self.part}; use part='layer'."
            )
        return found[-1]

    def _fits(self, router: Router, scorer: nn.Module | None) -> bool:
        return router.scorer is scorer and (router.predictor is not None) == (self.predictor == "auxiliary")

    def _make_router(self, model: nn.Module, layer: nn.Module, number: int, scorer: nn.Module | None) -> Router:
        like = next(p for p in layer.parameters() if p.is_floating_point())
        router = Router(_width(model, layer), self.capacity, self.predictor, number, scorer)
        return router.to(device=like.device, dtype=like.dtype)

    # -- rewrite ------------------------------------------------------------------------------------------------

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        marked = marked_nodes(graph, context, ROUTED)
        if not marked and context.origin.startswith(("options", "path")):
            context.blocked(
                "FX504", "", f"no layer of this graph has a router. Routers are parameters of the model: write {self}"
                "(model), train it, then compile"
            )  # fmt: skip
        elif not marked:
            context.note("", "no routed layer in this graph; it is a part of a model that has some", code="FX105")
        told = {path: _told(graph, nodes) for path, nodes in marked.items()}
        given = skip_where_not_needed(graph, context)
        moved = fuse_movement(graph, context)
        for path, message in told.items():
            mixing = neighbours_mixed(graph, path)
            if mixing is not None:
                what = f"{name_of(mixing)} in {path} mixes each token with its neighbours"
                if message.startswith(DECIDES_ITSELF):
                    raise SettingError(
                        f"{self}: {what}, and in eval() with those that fill the rows of a batch up; there are others "
                        "in a compiled model than in eager. Route other layers (layers=...) or another part."
                    )
                context.blocked(
                    "FX209", mixing, f"{what}; those of a token picked out of the sequence are others; the model "
                    "computes it so, in eager too. Route other layers (layers=...)"
                )  # fmt: skip
                continue
            if not message:
                context.note(
                    path, "its predictor decides on the host, and the block runs in eager: gradients are recorded with "
                    "a KV cache, or its layer of the cache is not in place yet", code="FX604",
                )  # fmt: skip
                continue
            linears = [counts for part, counts in given.items() if part.rpartition(":")[0] == path]
            if linears:
                done, all_of_them = (sum(counts) for counts in zip(*linears, strict=True))
                message += f"; {done} of {all_of_them} products read no weight where they are not needed"
            context.applied(path, "; ".join([message, *sorted(set(moved.get(path, ())))]))


def unroute(model: nn.Module) -> nn.Module:
    """Take routers and routing away again; returns the model, dense as it was."""
    for module in model.modules():
        if ROUTER in module.__dict__:
            object.__setattr__(module, ROUTER, None)
    if ROUTERS in model._modules:
        del model._modules[ROUTERS]
    return model


def _route(target: nn.Module, router: Router, *, residual: bool) -> None:
    object.__setattr__(target, ROUTER, router)
    numbers: list[Any] = [m.layer_idx for m in target.modules() if getattr(m, "layer_idx", None) is not None]
    router.cache_index = int(numbers[0]) if numbers else None
    own = target.__dict__.get("forward")
    if isinstance(own, functools.partial) and own.func is routed_forward:
        return
    signature = inspect.signature(type(target).forward)
    names = tuple(n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]
    if "tuple" in str(signature.return_annotation).lower():  # Hugging Face's attention: (output, weights or None)
        router.extra = 1
    # As a decoration does: a partial of a module-level function survives pickle and is bound anew by deepcopy.
    object.__setattr__(target, "forward", functools.partial(routed_forward, target, own, names, residual))


def _width(model: nn.Module, layer: nn.Module) -> int:
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(width, int):
        return width
    weights = [getattr(child, "weight", None) for child in layer.children()]
    norms = [w for w in weights if isinstance(w, torch.Tensor) and w.ndim == 1]
    if norms:
        return int(norms[0].shape[0])
    projections: list[Any] = [m for m in layer.modules() if _is_projection(m)]
    return int(projections[0].weight.shape[-1])


def _load(chosen: nn.ModuleDict, file: str) -> None:
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (OSError, ValueError) as error:
        raise SettingError(f"MixtureOfDepths(router={file!r}): cannot read that file: {error}") from error
    state = {name.split(f"{ROUTERS}.")[-1]: tensor for name, tensor in tensors.items()}
    missing = sorted(set(chosen.state_dict()) - set(state))
    if missing:
        raise SettingError(
            f"MixtureOfDepths(router={file!r}): the file has no {', '.join(f'{ROUTERS}.{name}' for name in missing)}; "
            f"it has {', '.join(sorted(tensors)[:6])}."
        )
    chosen.load_state_dict({name: state[name] for name in chosen.state_dict()})


def _told(graph: fx.Graph, nodes: list[fx.Node]) -> str:
    found = [size for node in nodes if (size := _gathered(node)) is not None]
    on_device = any(mark_of(node, ONLY_IF) for node in nodes)
    if found and not on_device:
        return f"{found[0][0]} of {found[0][1]} tokens are computed"
    inside = found or [
        size for branch in _branches(graph, nodes[-1]) for node in branch.graph.nodes if (size := _gathered(node))
    ]
    decides = f"{DECIDES_ITSELF}, on the device" if on_device else DECIDES_ITSELF
    if inside and inside[0][1] == 1:
        return f"{decides}: a step in which every row declines skips the block"
    if inside:
        return f"{decides}: room for {inside[0][0]} of {inside[0][1]} tokens, all of them on overflow"
    return ""


def _gathered(node: fx.Node) -> tuple[Any, Any] | None:
    value = node.meta.get("example_value")
    if op_name(node) != "gather" or not isinstance(value, torch.Tensor) or value.ndim != 3:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return value.shape[1], source.meta["example_value"].shape[1]


def _branches(graph: fx.Graph, last: fx.Node) -> list[fx.GraphModule]:
    """The branches of the first ``torch.cond`` after `last`."""
    for node in list(graph.nodes)[list(graph.nodes).index(last) :]:
        if node.target is torch.ops.higher_order.cond and graph.owning_module is not None:
            names = [str(a.target) for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
            return [m for name in names if isinstance(m := getattr(graph.owning_module, name, None), fx.GraphModule)]
    return []
