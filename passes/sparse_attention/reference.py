"""The meaning of sparse attention in eager PyTorch: the positions that were not chosen are masked. No FX in it.

While a module that was given to :func:`attach` runs one new token, every ``scaled_dot_product_attention`` inside it
(cross-attention left out) sees a mask that hides what the method does not choose. A window that moves its keys in every
step bounds what is read by itself: methods that keep state beside a cache leave it dense.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxopt.passes.sparse_attention.rolling_reference import Nearer
from fxopt.passes.sparse_attention.settings import Budget, block_counts, budgets, tokens_of

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

_CROSS = re.compile(r"encoder_attn|encdecattention|cross_?att", re.IGNORECASE)
_TOKENS = ("hidden_states", "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def attach(module: nn.Module, setting: SparseAttention) -> None:
    """Let `module` decode with `setting`, in place; its parameters and keys stay as they are."""
    decoding = _Decoding(setting)
    module.register_forward_pre_hook(decoding.enter, with_kwargs=True)
    module.register_forward_hook(decoding.leave, always_call=True)
    for name, child in module.named_modules():
        if name and _CROSS.search(name.rpartition(".")[2]):
            child.register_forward_pre_hook(decoding.pause)
            child.register_forward_hook(decoding.resume, always_call=True)
    if decoding.nearer is not None:
        decoding.nearer.attach(module)
    elif setting.select is None and setting.method == "sink_window":
        return
    for child in module.modules():
        if isinstance(getattr(child, "layer_idx", None), int):
            child.register_forward_pre_hook(decoding.look_at_window, with_kwargs=True)
            child.register_forward_hook(decoding.leave_window, always_call=True)


class _Decoding(TorchFunctionMode):
    """Answers ``scaled_dot_product_attention`` while a decode step runs."""

    def __init__(self, setting: SparseAttention) -> None:
        super().__init__()
        self.setting = setting
        self.inside: list[bool] = []
        self.paused = 0
        self.moving: list[bool] = []
        self.answered = 0
        self.nearer = Nearer(setting.sinks + setting.window) if setting.rolling and setting.window else None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = _new_tokens(args, kwargs) == 1
        self.inside.append(step)
        self.answered = 0
        if self.nearer is not None:
            self.nearer.enter(step)
        if step:
            self.__enter__()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.inside and self.inside.pop():
            self.__exit__(None, None, None)
            if not self.answered and output is not None:
                raise RuntimeError(
                    f"the reference of {self.setting} found no scaled_dot_product_attention in {type(module).__name__};"
                    ' call model.set_attn_implementation("sdpa") first.'
                )

    def pause(self, module: nn.Module, args: Any) -> None:
        self.paused += 1

    def resume(self, module: nn.Module, args: Any, output: Any) -> None:
        self.paused -= 1

    def look_at_window(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        index: Any = module.layer_idx
        moves = _slides if self.nearer is not None else _moves
        self.moving.append(index < len(layers) and moves(layers[index]))

    def leave_window(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.moving:
            self.moving.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.paused:
            return func(*args, **kwargs)
        self.answered += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if self.nearer is not None and self.nearer.asks:
            self.nearer.query = given["query"]
            return func(*args, **kwargs)
        if any(self.moving) or (torch.is_grad_enabled() and given["query"].requires_grad):
            return func(*args, **kwargs)
        return _attend(self.setting, given, None if self.nearer is None else self.nearer.query)


def _slides(layer: Any) -> bool:
    """Whether a layer's cache is a sliding window."""
    return bool(getattr(layer, "is_sliding", False))


def _moves(layer: Any) -> bool:
    """Whether the next token moves the keys of a layer's cache: a growing window drops rows, a static one once full."""
    return getattr(layer, "is_sliding", False) and int(layer.get_seq_length()) >= getattr(layer, "max_cache_len", 0)


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    named = [kwargs[n] for n in reversed(_TOKENS) if isinstance(kwargs.get(n), Tensor)]
    first = next(iter([*named, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))]), None)
    return first.shape[1] if first is not None and first.ndim > 1 else 0


def _attend(setting: SparseAttention, given: dict[str, Any], near: Tensor | None = None) -> Tensor:
    """One new token; ``near``: the query that meets the sinks, where that is another one."""
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    batch, length = query.shape[0], key.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=query.device)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    visible = seen.flatten(1, 2).any(1).expand(batch, -1)  # [B, S]
    reach = torch.where(visible, torch.arange(1, length + 1, device=query.device), 0).amax(-1)
    extent = int(torch.where(reach == 0, length, reach).max())
    scale = given.get("scale") or query.shape[-1] ** -0.5
    keep = kept(setting, query, key, visible, extent, scale)[:, :, None]  # [B, Hq or 1, 1, S]
    if near is not None:
        return _rolled(setting, given, near, mask & keep, visible, scale)
    hidden = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, float("-inf"))
    options = {name: given[name] for name in ("scale", "enable_gqa") if given.get(name) is not None}
    return F.scaled_dot_product_attention(query, key, given["value"], attn_mask=hidden, **options)


def _rolled(
    setting: SparseAttention, given: dict[str, Any], near: Tensor, keep: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Attention in which `near` meets the first `sinks` visible keys, and the query itself the others."""
    query, heads = given["query"], given["query"].shape[1]
    key, value = (given[n].repeat_interleave(heads // given[n].shape[1], 1) for n in ("key", "value"))
    sink = (visible & (visible.cumsum(-1) <= setting.sinks))[:, None, None]  # [B, 1, 1, S]
    scores = torch.where(sink, near.reshape(query.shape).float() @ key.float().mT, query.float() @ key.float().mT)
    weights = (scores * scale).masked_fill(~keep, -math.inf).softmax(-1)
    return weights.to(value.dtype) @ value


def kept(setting: SparseAttention, query: Tensor, key: Tensor, visible: Tensor, extent: int, scale: float) -> Tensor:
    """[B, Hq or 1, S] bool: what each query head reads; ``visible: [B, S]``, of which `extent` positions are in use."""
    if extent < setting.dense_below:
        return visible[:, None]
    bare = unrepeated(key, query.shape[1])
    heads = bare.shape[1]
    if setting.select is None and setting.method == "sink_window":
        amounts = budgets(setting, heads)
        rows = [visible if a is None else _window_kept(setting, visible, a) for a in amounts]
        return torch.stack(rows, 1).repeat_interleave(query.shape[1] // heads, 1)
    # With one new token, rows of the query are query heads too: transformers packs a group that way in eager.
    grouped = query.unflatten(1, (heads, -1)).flatten(2, 3)
    method = setting.chosen_by
    scores, block = _SCORES[method.__name__.rpartition(".")[2]](setting, grouped, bare, extent)
    number = torch.arange(key.shape[2], device=key.device) // block
    always = _always(setting, visible, method.NEWEST)
    counts = block_counts(setting, heads, visible.shape[1], block, method.NEWEST)
    most = max((c for c in counts if c is not None), default=0)
    keep = visible[:, None].repeat(1, heads, 1)
    if most * block < extent:  # else no list leaves anything out
        for head, count in enumerate(counts):
            if count is not None:
                taken = _best(scores[:, head].float(), always, visible, number, count, setting.tau, scale)
                keep[:, head] &= taken[:, number]
    return keep.repeat_interleave(query.shape[1] // heads, 1)


def unrepeated(key: Tensor, heads: int) -> Tensor:
    """Keys of the KV heads alone: a model may have repeated each for the query heads that read it."""
    for group in range(heads, 1, -1):
        if key.shape[1] == heads and heads % group == 0:
            grouped = key.unflatten(1, (-1, group))
            if torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
                return grouped[:, :, 0]
    return key


def _page_scores(setting: SparseAttention, query: Tensor, key: Tensor, extent: int) -> tuple[Tensor, int]:
    """Bounds of pages; ``query: [B, Hkv, G, D]``, ``key: [B, Hkv, S, D]``; [B, Hkv, P] and the positions of a page."""
    from fxopt.passes.sparse_attention.pages import PAGE, kept_dtype

    kept_in = kept_dtype(key.dtype, key.device)
    parts = [key[:, :, i : min(i + PAGE, extent)] for i in range(0, extent, PAGE)]
    top = torch.stack([part.amax(2) for part in parts], 2)[:, :, :, None]  # [B, Hkv, P, 1, D]
    bottom = torch.stack([part.amin(2) for part in parts], 2)[:, :, :, None]
    top, bottom = raised(top, kept_in), -raised(-bottom, kept_in)
    return torch.maximum(query[:, :, None] * top, query[:, :, None] * bottom).sum(-1).amax(-1), PAGE


def _channel_scores(setting: SparseAttention, query: Tensor, key: Tensor, extent: int) -> tuple[Tensor, int]:
    """Scores of tokens on the calibrated channels; shapes as in :func:`_page_scores`."""
    from fxopt.passes.sparse_attention.double_sparsity import channels_for

    lists = channels_for(setting, key.shape[1], key.shape[3])
    scores = []
    for h, listed in enumerate(lists):
        labels = rounded(key[:, h, :extent][..., listed], setting.bits)
        scores.append((query[:, h][..., listed] @ labels.to(query.dtype).mT).amax(1))
    return torch.stack(scores, 1), 1


def _own_scores(setting: SparseAttention, query: Tensor, key: Tensor, extent: int) -> tuple[Tensor, int]:
    """Scores of a function of the user's; shapes as in :func:`_page_scores`."""
    found = setting.select(query, key, key.transpose(2, 3))
    if not found.dtype.is_floating_point:
        found = torch.full(key.shape[:3], -math.inf, device=key.device).scatter(2, found, 1.0)
    return found[..., :extent], 1


_SCORES: dict[str, Callable[[SparseAttention, Tensor, Tensor, int], tuple[Tensor, int]]] = {
    "pages": _page_scores, "double_sparsity": _channel_scores, "own": _own_scores,
}  # fmt: skip


def raised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of `dtype` that are not below `x`, as numbers of x's own dtype."""
    near = x.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, math.inf))
    return torch.where(near.to(x.dtype) < x, above, near).to(x.dtype)


def rounded(labels: Tensor, bits: int | None) -> Tensor:
    """Channels of keys ``[..., S, C]`` as a label cache of so many bits holds them: one scale each 128 positions."""
    if not bits:
        return labels
    most = 127 if bits == 8 else 7
    parts = []
    for part in labels.float().split(128, -2):
        scale = part.abs().amax(-2, keepdim=True) / most
        parts.append(torch.where(scale > 0, (part / scale).round() * scale, 0.0))
    return torch.cat(parts, -2)


def _always(setting: SparseAttention, visible: Tensor, newest: int) -> Tensor:
    rank = visible.cumsum(-1)
    return visible & ((rank <= setting.sinks) | (rank > rank[:, -1:] - newest))


def _best(
    scores: Tensor, always: Tensor, visible: Tensor, number: Tensor, count: int, tau: float | None, scale: float
) -> Tensor:
    """[B, N] bool: the blocks that are read, of ``scores: [B, used]``; ``number: [S]``: the block of each position."""
    batch, used = scores.shape
    blocks = int(number[-1]) + 1

    def any_in_block(what: Tensor) -> Tensor:
        found = torch.zeros(batch, blocks, dtype=torch.int64, device=what.device)
        return found.index_add_(1, number, what.long())[:, :used] > 0

    seen, forced = any_in_block(visible), any_in_block(always)
    ranked = scores.masked_fill(~seen, -math.inf).masked_fill(forced, math.inf)
    # Of equal ones those that come first, which generated code chooses too; the library's top-k takes any.
    best, order = (x[:, :count] for x in ranked.sort(dim=-1, descending=True, stable=True))
    taken = torch.zeros(batch, blocks, dtype=torch.bool, device=scores.device)
    if tau is None:
        return taken.scatter_(1, order, best > -math.inf)
    shares = (scores * scale).masked_fill(~seen, -math.inf).softmax(-1)
    for row in range(batch):
        held = 0.0
        for block in order[row, best[row] > -math.inf].tolist():
            if forced[row, block] or held < tau:
                taken[row, block] = True
                held += float(shares[row, block])
    return taken


def _window_kept(setting: SparseAttention, visible: Tensor, budget: Budget) -> Tensor:
    """[B, S]: the first `sinks` and the last ``budget - sinks`` of each row's visible positions."""
    rank = visible.cumsum(-1)
    window = tokens_of(budget, visible.shape[1], setting.sinks + 1) - setting.sinks
    return visible & ((rank <= setting.sinks) | (rank > rank[:, -1:] - window))
