"""The meaning of sparse attention in eager PyTorch: the positions that were not chosen are masked. No FX in it.

While a module that was given to :func:`attach` runs one new token, every ``scaled_dot_product_attention`` inside it
(cross-attention left out) sees a mask that hides what the method does not choose.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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


class _Decoding(TorchFunctionMode):
    """Answers ``scaled_dot_product_attention`` while a decode step runs."""

    def __init__(self, setting: SparseAttention) -> None:
        super().__init__()
        self.setting = setting
        self.inside: list[bool] = []
        self.paused = 0
        self.answered = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = _new_tokens(args, kwargs) == 1
        self.inside.append(step)
        self.answered = 0
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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.paused:
            return func(*args, **kwargs)
        self.answered += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if torch.is_grad_enabled() and given["query"].requires_grad:
            return func(*args, **kwargs)
        return _attend(self.setting, given)


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    named = [kwargs[n] for n in reversed(_TOKENS) if isinstance(kwargs.get(n), Tensor)]
    first = next(iter([*named, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))]), None)
    return first.shape[1] if first is not None and first.ndim > 1 else 0


def _attend(setting: SparseAttention, given: dict[str, Any]) -> Tensor:
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    batch, length = query.shape[0], key.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=query.device)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    visible = seen.flatten(1, 2).any(1).expand(batch, -1)  # [B, S]
    reach = torch.where(visible, torch.arange(1, length + 1, device=query.device), 0).amax(-1)
    extent = int(torch.where(reach == 0, length, reach).max())
    keep = kept(setting, query, key, visible, extent)  # [B or 1, Hq or 1, S]
    keep = keep[:, :, None]
    hidden = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, float("-inf"))
    options = {name: given[name] for name in ("scale", "enable_gqa") if given.get(name) is not None}
    return F.scaled_dot_product_attention(query, key, given["value"], attn_mask=hidden, **options)


def kept(setting: SparseAttention, query: Tensor, key: Tensor, visible: Tensor, extent: int) -> Tensor:
    """[B, Hq or 1, S] bool: what each query head reads; ``visible: [B, S]``, of which `extent` positions are in use."""
    if extent < setting.dense_below:
        return visible[:, None]
    if setting.select is None and setting.method == "sink_window":
        return window_kept(setting, visible)[:, None]
    bare = _bare(key, query.shape[1])
    chosen = _page_kept if setting.method == "pages" else _channel_kept
    chosen = chosen if setting.select is None else _own_kept
    # With one new token, rows of the query are query heads too: transformers packs a group that way in eager.
    grouped = query.unflatten(1, (bare.shape[1], -1)).flatten(2, 3)
    keep = chosen(setting, grouped, bare, visible, extent)
    return keep.repeat_interleave(query.shape[1] // bare.shape[1], 1)


def _bare(key: Tensor, heads: int) -> Tensor:
    """Keys of the KV heads alone: a model may have repeated each for the query heads that read it."""
    for group in range(heads, 1, -1):
        if key.shape[1] == heads and heads % group == 0:
            grouped = key.unflatten(1, (-1, group))
            if torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
                return grouped[:, :, 0]
    return key


def _page_kept(setting: SparseAttention, query: Tensor, key: Tensor, visible: Tensor, extent: int) -> Tensor:
    """Pages with the largest bounds; ``query: [B, Hkv, G, D]``, ``key: [B, Hkv, S, D]``; [B, Hkv, S]."""
    from fxopt.passes.sparse_attention.pages import NEWEST, PAGE

    length = key.shape[2]
    parts = [key[:, :, i : min(i + PAGE, extent)] for i in range(0, extent, PAGE)]
    top = torch.stack([part.amax(2) for part in parts], 2)[:, :, :, None]  # [B, Hkv, P, 1, D]
    bottom = torch.stack([part.amin(2) for part in parts], 2)[:, :, :, None]
    reached = torch.maximum(query[:, :, None] * top, query[:, :, None] * bottom).sum(-1).amax(-1)
    page = torch.arange(length, device=key.device) // PAGE
    taken = _best(setting, reached, _always(setting, visible, NEWEST), visible, page, extent, PAGE)
    return visible[:, None] & taken[:, :, page]


def _channel_kept(setting: SparseAttention, query: Tensor, key: Tensor, visible: Tensor, extent: int) -> Tensor:
    """Tokens with the largest scores on the calibrated channels; shapes as in :func:`_page_kept`."""
    from fxopt.passes.sparse_attention.double_sparsity import NEWEST, channels_for

    lists = channels_for(setting, key.shape[1], key.shape[3])
    scores = torch.stack(
        [(query[:, h][..., listed] @ key[:, h][..., listed].mT).amax(1) for h, listed in enumerate(lists)], 1
    )[..., :extent]  # fmt: skip
    position = torch.arange(key.shape[2], device=key.device)
    return visible[:, None] & _best(setting, scores, _always(setting, visible, NEWEST), visible, position, extent, 1)


def _own_kept(setting: SparseAttention, query: Tensor, key: Tensor, visible: Tensor, extent: int) -> Tensor:
    """Tokens with the largest scores of a function of the user's; shapes as in :func:`_page_kept`."""
    from fxopt.passes.sparse_attention.own import NEWEST

    found = setting.select(query, key, key.transpose(2, 3))
    if not found.dtype.is_floating_point:
        found = torch.full(key.shape[:3], -1.0, device=key.device).scatter(2, found, 1.0)
    position = torch.arange(key.shape[2], device=key.device)
    always = _always(setting, visible, NEWEST)
    return visible[:, None] & _best(setting, found[..., :extent], always, visible, position, extent, 1)


def _always(setting: SparseAttention, visible: Tensor, newest: int) -> Tensor:
    rank = visible.cumsum(-1)
    return visible & ((rank <= setting.sinks) | (rank > rank[:, -1:] - newest))


def _best(
    setting: SparseAttention, scores: Tensor, always: Tensor, visible: Tensor, number: Tensor, extent: int, block: int
) -> Tensor:
    """[B, Hkv, N] bool: the blocks that are read; ``number: [S]`` is the block of each position."""
    from fxopt.passes.sparse_attention.selection import blocks_to_read

    batch, heads, used = scores.shape
    blocks = int(number[-1]) + 1
    count = blocks_to_read(setting, visible.shape[1], block, setting.chosen_by.NEWEST)
    taken = torch.ones(batch, heads, blocks, dtype=torch.bool, device=scores.device)
    if count * block >= extent:
        return taken

    def any_in_block(what: Tensor) -> Tensor:
        found = torch.zeros(batch, blocks, dtype=torch.int64, device=what.device)
        return found.index_add_(1, number, what.long())[:, None, :used] > 0

    ranked = scores.float().masked_fill(~any_in_block(visible), -math.inf)
    ranked = ranked.masked_fill(any_in_block(always), math.inf)
    order = ranked.topk(count, -1).indices
    return torch.zeros_like(taken).scatter_(2, order, True)


def tokens_of(setting: SparseAttention, length: int) -> int:
    """The budget in tokens on a cache of that length."""
    if setting.window is not None:
        return setting.sinks + setting.window
    if isinstance(setting.budget, int):
        return setting.budget
    assert setting.budget is not None
    return max(math.ceil(length * Fraction(setting.budget).limit_denominator(1 << 16)), setting.sinks + 1)


def window_kept(setting: SparseAttention, visible: Tensor) -> Tensor:
    """[B, S]: the first `sinks` and the last ``budget - sinks`` of each row's visible positions."""
    rank = visible.cumsum(-1)
    window = tokens_of(setting, visible.shape[1]) - setting.sinks
    return visible & ((rank <= setting.sinks) | (rank > rank[:, -1:] - window))
