"""The meaning of skipping in plain PyTorch: wrapped modules, no FX in it. Shared by references of depth techniques.

Deleting layers for good is :func:`fxopt.passes.modules.delete_layers`; here are the two things a deletion cannot
say: a part of a layer that contributes nothing, and a layer that is skipped in decode steps only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxopt.passes.modules import ATTENTION, WrappedLayer


class _Cache:
    """A Hugging Face cache as one layer sees it, hiding unwritten (all-zero) keys in a mask while it is updated."""

    def __init__(self, cache: Any, mask: Tensor) -> None:
        self._cache = cache
        self._mask = mask

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.update(keys, values, *args, **kwargs)
        written = (keys != 0).any(-1).any(1)[:, None, None, :]
        if self._mask.dtype == torch.bool:
            self._mask.logical_and_(written)
        else:
            self._mask.masked_fill_(~written, torch.finfo(self._mask.dtype).min)
        return keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class SkipInDecode(WrappedLayer):
    """`layer`, or a part of one, on prompts, chunks and several tokens; in a decode step ``shortcut`` of its input.

    A decode step is one new token on a filled cache. The cache then advances by an all-zero row, and on a later
    prompt it attends only to rows that were written.
    """

    def __init__(self, layer: nn.Module, index: int, *, zero: bool) -> None:
        super().__init__(layer, index)
        self.zero = zero
        self._tuple_length = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache, name = _find_cache(args, kwargs)
        filled = cache is not None and _filled(cache, self.index)
        if filled and hidden.shape[1] == 1:
            kept = cache.layers[self.index]
            # Each with its own width: they differ in multi-head latent attention.
            keys, values = (t.new_zeros(*t.shape[:2], 1, t.shape[3]) for t in (kept.keys, kept.values))
            cache.update(keys, values, self.index)
            result = torch.zeros_like(hidden) if self.zero else hidden
            return (result, *[None] * (self._tuple_length - 1)) if self._tuple_length else result
        if filled:
            mask = kwargs.get("attention_mask")
            if mask is None:
                past = cache.get_seq_length(self.index)
                rows = torch.arange(hidden.shape[1], device=hidden.device)[:, None] + past
                columns = torch.arange(past + hidden.shape[1], device=hidden.device)
                mask = (columns <= rows)[None, None].expand(hidden.shape[0], 1, -1, -1)
            mask = mask.clone()
            kwargs["attention_mask"] = mask
            proxy = _Cache(cache, mask)
            if isinstance(name, str):
                kwargs[name] = proxy
            else:
                args = tuple(proxy if a is cache else a for a in args)
        result = self.layer(*args, **kwargs)
        self._tuple_length = len(result) if isinstance(result, tuple) else 0
        return result


def _find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
    for name, value in [*kwargs.items(), *((None, a) for a in args)]:
        if hasattr(value, "update") and hasattr(value, "get_seq_length"):
            return getattr(value, "self_attention_cache", value), name
    return None, None


def _filled(cache: Any, index: int) -> bool:
    """Whether this layer of the cache holds keys and values; one of a running state alone never does."""
    layer = cache.layers[index] if len(cache.layers) > index else None
    return bool(getattr(layer, "is_initialized", False)) and int(cache.get_seq_length(index)) > 0


def skip_in_decode(layer: nn.Module, index: int) -> nn.Module:
    """The layer, skipped in decode steps."""
    return SkipInDecode(layer, index, zero=False)


def zero_part(layer: nn.Module, part: str, index: int, *, only_decode: bool) -> nn.Module:
    """`layer` with its ``"attention"`` or ``"mlp"`` contributing zero to the residual stream; changed in place."""
    attentions = [(name, child) for name, child in _blocks(layer) if ATTENTION.search(name)]
    if part == "attention":
        for name, child in attentions:
            if only_decode:
                owner, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(owner), attribute, SkipInDecode(child, index, zero=True))
            else:
                _zero_output(_last_projection(child), None)
        if not attentions:
            raise ValueError(f"no attention module was found in {type(layer).__name__}")
        return layer
    inside = {id(m) for _, child in attentions for m in child.modules()}
    rest = [m for m in layer.modules() if id(m) not in inside and m is not layer]
    target = _last_projection_of(rest)
    if target is None:
        raise ValueError(f"no MLP was found in {type(layer).__name__}")
    gate = None
    if only_decode:
        gate = _DecodeStep(index)
        layer.register_forward_pre_hook(gate.look, with_kwargs=True)
    _zero_output(target, gate)
    return layer


class _DecodeStep:
    """Whether the layer is in a decode step, seen from its arguments."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.now = False

    def look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache, _name = _find_cache(args, kwargs)
        self.now = cache is not None and hidden.shape[1] == 1 and _filled(cache, self.index)


def _zero_output(module: nn.Module, gate: _DecodeStep | None) -> None:
    def zero(_module: nn.Module, _args: Any, output: Any) -> Any:
        if gate is not None and not gate.now:
            return output
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    module.register_forward_hook(zero)


def _blocks(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Attention modules of a layer (outermost, with parameters below them) and its other children."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in layer.named_modules():
        if not name or any(name.startswith(f + ".") for f, _ in found):
            continue
        leaf = name.rpartition(".")[2]
        if ATTENTION.search(leaf) and "norm" not in leaf.lower() and any(_is_projection(m) for m in module.modules()):
            found.append((name, module))
    return found


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _last_projection(block: nn.Module) -> nn.Module:
    projections = [m for m in block.modules() if _is_projection(m)]
    return projections[-1]


def _last_projection_of(modules: list[nn.Module]) -> nn.Module | None:
    experts = [
        m for m in modules if any(isinstance(p, nn.Parameter) and p.ndim == 3 for p in m.parameters(recurse=False))
    ]
    if experts:  # a mixture of experts keeps its weights in stacked parameters; the block that holds it is the part
        blocks = [m for m in modules if experts[0] in list(m.children())]
        return blocks[0] if blocks else experts[0]
    projections = [m for m in modules if _is_projection(m)]
    return projections[-1] if projections else None
