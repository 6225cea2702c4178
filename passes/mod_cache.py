"""The KV cache of a routed block: the tokens that were routed, and where in the sequence they stand.

One layer of a Hugging Face ``DynamicCache`` or ``StaticCache`` is replaced, so that what routing has to remember lives,
is reordered, cropped and reset exactly with the keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from fxopt.passes.regions import Keys, Selection
from fxopt.passes.technique import SettingError

GROWTH = 64
"""Tokens after which a growing cache asks again how many of them were routed."""


class Rows(NamedTuple):
    """What a block writes for each token."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device


class RoutedLayer(DynamicLayer):
    """Keys and values of routed tokens alone, ``[B, H, K, D]``; ``positions: [B, K]``, their places in the sequence.

    To the rest of the model it looks as long as the sequence is (``get_seq_length``), so that masks are built in
    places of the sequence. Each row of the batch fills its cells one after the other, ``used: [B]`` of them; the others
    stand at place -1. How many that are only the device knows. The host knows what is enough: until ``seen`` reaches
    ``limit`` there is a cell for every token, routed or not, so that a step can be captured in a graph whose shapes do
    not change. Only then is ``used`` read and the storage made larger, :data:`GROWTH` tokens further. The limit depends
    on ``seen`` alone: all layers of a cache reach it at the same step.
    """

    routed = True
    static = False
    positions: Tensor
    used: Tensor

    def __init__(self, batch: int, device: torch.device, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self._empty(batch, device)
        if window is not None:
            self.sliding_window = window

    def _empty(self, batch: int, device: torch.device) -> None:
        self.seen = self.limit = 0
        self.used = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = torch.full((batch, 0), -1, dtype=torch.int64, device=device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, because rows that are hidden take part in the products of the attention.
        for name, new in (("keys", key_states), ("values", value_states)):
            setattr(self, name, new.new_zeros(*new.shape[:2], self.positions.shape[1], new.shape[3]))
        self.is_initialized = True

    def holds(self, tokens: int) -> bool:
        """Whether there is a cell for every one of so many new tokens; the device is not asked."""
        return self.is_initialized and self.seen + tokens <= self.limit

    def reserve(self, tokens: int, rows: int, used: int) -> None:
        """Make room for `tokens` new ones, of which `rows` are written, where `used` cells are in use; and for more.

        Cells that are not needed any more are given back.
        """
        after = self.seen + tokens
        # A long prompt is followed by another look at once: fewer tokens will have been routed than there was room for.
        self.limit = (after // GROWTH + 1) * GROWTH if tokens <= GROWTH else after
        cells = used + rows + self.limit - after
        self._resize((cells + GROWTH - 1) // GROWTH * GROWTH)

    def _resize(self, cells: int) -> None:
        more = cells - self.positions.shape[1]
        if not more:
            return
        self.positions = pad(self.positions, (0, more), value=-1)  # a copy, where it becomes smaller too
        if self.is_initialized:
            for name in ("keys", "values"):
                setattr(self, name, pad(getattr(self, name), (0, 0, 0, more)))

    def advance(self, member: Tensor, selection: Selection) -> Keys:
        """Before the block runs: the tokens of ``member: [B, S]`` were seen, the selected ones are written."""
        assert selection.valid is not None
        keys = Keys(self.positions, self.seen, self.window, first=self.used[:, None].clone())
        places = torch.where(selection.valid, selection.places + self.seen, -1)
        row = torch.arange(len(places), device=places.device)[:, None]
        self.positions.index_put_((row, keys.own(selection)), places)  # and no scatter_: see regions.Writer
        self.used.add_(selection.valid.sum(1))
        self.seen += member.shape[1]
        return keys

    @property
    def counts(self) -> Tensor:
        """Written rows of each sequence, [B]."""
        return self.used

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.window is None:
            return self.seen + query_length, 0
        kept = min(self.seen, self.window - 1)
        return kept + query_length, self.seen - kept

    def reset(self) -> None:
        super().reset()
        self._empty(len(self.used), self.used.device)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}.")
        removed = min(-tokens_to_remove, self.seen)
        self.seen -= removed
        self.limit -= removed  # the cells that are given back may have been of tokens that were not routed
        # Ascending within each row, so that those which stay come first.
        self.positions = self.positions.masked_fill(self.positions >= self.seen, -1)
        self.used = (self.positions >= 0).sum(1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices.to(t.device)])

    def _each(self, change: Any) -> None:
        for name in ("keys", "values", "positions", "used"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))


class RoutedStaticLayer(StaticLayer):
    """Keys and values of a static cache, ``[B, H, L, D]``, of which routed tokens alone are written, at their places.

    ``positions: [B, L]``, int64: the place of the token in each cell, which is the cell, or -1 where the token was not
    routed or there is none. A sliding layer keeps all L cells, and hides those outside of its window.
    """

    routed = True
    static = True
    positions: Tensor

    def __init__(self, max_cache_len: int, batch: int, device: torch.device, window: int | None = None) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.window = window
        self.is_sliding = window is not None
        self.cumulative_length = self.cumulative_length.to(device)
        self.cumulative_length_int = 0
        self.positions = torch.full((batch, max_cache_len), -1, dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.positions)

    def advance(self, member: Tensor, selection: Selection) -> Keys:
        """Before the block runs: the tokens of ``member: [B, S]`` were seen; members are written."""
        start = self.cumulative_length.clone()
        cells = torch.arange(member.shape[1], device=member.device) + start
        self.positions.index_copy_(1, cells, torch.where(member, cells, -1))
        self.cumulative_length.add_(member.shape[1])
        if self.window is not None:  # Dynamo guards a number; it is read where a mask slides
            self.cumulative_length_int += member.shape[1]
        return Keys(self.positions, start, self.window)

    def holds(self, tokens: int) -> bool:
        """Whether its tensors exist: it has a cell for every token."""
        return self.is_initialized

    @property
    def counts(self) -> Tensor:
        """Written rows of each sequence, [B]."""
        return (self.positions >= 0).sum(1)

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.window is None else self.cumulative_length_int

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.window is None:
            return self.max_cache_len, 0
        # Other sliding layers of the cache keep the window alone and are given the same mask.
        seen = self.cumulative_length_int
        offset = max(seen - self.window + 1, 0)
        if seen >= self.window:
            return self.window + query_length - 1, offset
        return max(seen + query_length, self.window), offset

    def reset(self) -> None:
        super().reset()
        self.cumulative_length_int = 0
        self.positions.fill_(-1)

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)
        self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))


def routed_layer(cache: Any, index: int, batch: int, device: torch.device, written: int = 0) -> Any:
    """The cache of the routed layer `index`, put in place on an empty cache.

    ``written``: tokens of this call that the layers before it have written already.

    Raises SettingError for a cache whose rows cannot be left out (a quantised one), and for one that was filled while
    this layer was not routed.
    """
    if type(cache) not in (DynamicCache, StaticCache):
        raise SettingError(
            f"a block with mixture of depths writes routed tokens alone, which {type(cache).__name__} has no form for. "
            "Use a DynamicCache (the default of generate()), a StaticCache, or use_cache=False."
        )
    while len(cache.layers) <= index and type(cache) is DynamicCache:
        cache.layers.append(DynamicLayer())
    found: Any = cache.layers[index]
    if not getattr(found, "routed", False) and not int(found.get_seq_length()):
        if isinstance(found, StaticLayer):
            window = found.max_cache_len if found.is_sliding else None
            _refuse_late(cache, index, 0, written)
            found = cache.layers[index] = RoutedStaticLayer(_cells(cache), batch, device, window)
        elif type(found) in (DynamicLayer, DynamicSlidingWindowLayer):
            window = getattr(found, "sliding_window", None)
            found = cache.layers[index] = RoutedLayer(batch, device, window)
    if not getattr(found, "routed", False):
        raise SettingError(
            f"layer {index} of this cache is a {type(found).__name__} with {int(found.get_seq_length())} tokens, and "
            "its block has mixture of depths. Start from an empty cache, filled in model.eval()."
        )
    if not found.static:
        _refuse_late(cache, index, found.seen, written)
    return found


def _refuse_late(cache: Any, index: int, seen: int, written: int) -> None:
    # Of a hybrid model, layers of a convolution or a recurrence know no length.
    earlier = next((layer for layer in cache.layers[:index] if hasattr(layer, "get_seq_length")), None)
    before = seen if earlier is None else int(earlier.get_seq_length()) - written
    if seen != before:
        raise SettingError(
            f"this cache was filled while layer {index} was not routed by its predictor ({seen} of {before} tokens "
            "were seen). Fill it in model.eval(), from the beginning."
        )


def ready(cache: Any, rows: Mapping[int, Rows], batch: int, tokens: int) -> None:
    """Put every routed layer of a cache in place, with its tensors and cells for `tokens` new tokens a row.

    ``rows``: what the layers write, by their index. The device is asked where a growing cache is at its limit, and then
    once for all layers. They get the same number of cells: sizes that are equal stay equal, which is what a graph with
    symbolic sizes was compiled for.
    """
    layers = {index: routed_layer(cache, index, batch, written.device) for index, written in rows.items()}
    growing = [layer for layer in layers.values() if not layer.static and layer.seen + tokens > layer.limit]
    if growing:
        most = [layer.used.max().to(growing[0].used.device) for layer in growing]
        used = int(torch.stack(most).max())
        for layer in growing:
            layer.reserve(tokens, tokens, used)
    for index, layer in layers.items():
        if not layer.is_initialized:
            written = rows[index]
            key = torch.empty(batch, written.heads, 0, written.key_width, dtype=written.dtype, device=written.device)
            layer.lazy_initialization(key, key.new_empty(batch, written.heads, 0, written.value_width))


def _cells(cache: Any) -> int:
    lengths = [layer.max_cache_len for layer in cache.layers if not getattr(layer, "is_sliding", True)]
    lengths += [layer.max_cache_len for layer in cache.layers if getattr(layer, "routed", False)]
    if not lengths:
        raise SettingError(
            "every layer of this static cache slides, so that it does not say how many tokens there can be, and routed "
            "tokens are kept at their places. Use a DynamicCache."
        )
    return max(lengths)
