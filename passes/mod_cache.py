"""The KV cache of a routed block: the tokens that were routed, and where in the sequence they stand.

One layer of a Hugging Face ``DynamicCache`` or ``StaticCache`` is replaced, so that what routing has to remember lives,
is reordered, cropped and reset exactly with the keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from fxopt.passes.regions import Keys, Selection
from fxopt.passes.technique import SettingError


class Writer:
    """Stands for the cache of a static layer: writes rows to their own places, ``places: [B, C]``."""

    def __init__(self, layer: RoutedStaticLayer, places: Tensor) -> None:
        self.layer, self.places = layer, places

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``keys, values: [B, H, C, D]``; rows of fillers are written as well, to places of no token."""
        layer: Any = self.layer
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        places = self.places[:, None, :, None]
        layer.keys.scatter_(2, places.expand_as(keys), keys)
        layer.values.scatter_(2, places.expand_as(values), values)
        return layer.keys, layer.values


class RoutedLayer(DynamicLayer):
    """Keys and values of routed tokens alone, ``[B, H, K, D]``, with their places in the sequence, ``[B, K]``.

    To the rest of the model it looks as long as the sequence is (``get_seq_length``), so that masks are built in
    places of the sequence. Rows of a batch hold different numbers of tokens; the shorter ones have rows of no token
    (place -1).
    """

    routed = True
    static = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.seen = 0
        self.positions: Tensor | None = None
        if window is not None:
            self.sliding_window = window

    def advance(self, member: Tensor, selection: Selection) -> Keys:
        """Before the block runs: the tokens of ``member: [B, S]`` were seen, the selected ones are written."""
        assert selection.valid is not None
        positions = torch.where(selection.valid, selection.places + self.seen, -1)
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)
        keys = Keys(self.positions, self.seen, self.window)
        self.seen += member.shape[1]
        return keys

    def writer(self, keys: Keys, selection: Selection) -> None:
        """Nothing stands for the cache: it appends by itself."""
        return

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.window is None:
            return self.seen + query_length, 0
        kept = min(self.seen, self.window - 1)
        return kept + query_length, self.seen - kept

    def reset(self) -> None:
        super().reset()
        self.seen = 0
        self.positions = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}.")
        self.seen = max(self.seen + tokens_to_remove, 0)
        if self.positions is not None:
            # Rows stay where they are and are never looked at again.
            self.positions = self.positions.masked_fill(self.positions >= self.seen, -1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices.to(t.device)])

    def _each(self, change: Any) -> None:
        for name in ("keys", "values", "positions"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel():
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
        return Keys(self.positions, start, self.window, self.max_cache_len)

    def writer(self, keys: Keys, selection: Selection) -> Writer:
        """What the block writes to."""
        return Writer(self, selection.places + keys.start)

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


def routed_layer(cache: Any, index: int, stream: Tensor) -> Any:
    """The cache of the routed layer `index`, put in place on an empty cache; ``stream: [B, S, W]`` are the new tokens.

    Raises SettingError for a cache whose rows cannot be left out (a quantised one), and for one that was filled while
    this layer was not routed.
    """
    if type(cache) not in (DynamicCache, StaticCache):
        raise SettingError(
            f"a block with mixture of depths writes routed tokens alone, which {type(cache).__name__} has no form for. "
            "Use a DynamicCache (the default of generate()), a StaticCache, or use_cache=False."
        )
    tokens = stream.shape[1]
    if len(cache.layers) == index:
        cache.layers.append(RoutedLayer())
    found: Any = cache.layers[index]
    first: Any = cache.layers[0]
    if not getattr(found, "routed", False) and not int(found.get_seq_length()):
        if isinstance(found, StaticLayer):
            if index:
                _refuse_late(index, 0, int(first.get_seq_length()) - tokens)
            found = cache.layers[index] = RoutedStaticLayer(
                _cells(cache), stream.shape[0], stream.device, found.max_cache_len if found.is_sliding else None
            )
        elif type(found) in (DynamicLayer, DynamicSlidingWindowLayer):
            found = cache.layers[index] = RoutedLayer(getattr(found, "sliding_window", None))
    if not getattr(found, "routed", False):
        raise SettingError(
            f"layer {index} of this cache is a {type(found).__name__} with {int(found.get_seq_length())} tokens, and "
            "its block has mixture of depths. Start from an empty cache, filled in model.eval()."
        )
    if index and not found.static:
        _refuse_late(index, found.seen, first.get_seq_length() - tokens)
    return found


def _refuse_late(index: int, seen: int, before: int) -> None:
    if seen != before:
        raise SettingError(
            f"this cache was filled while layer {index} was not routed by its predictor ({seen} of {before} tokens "
            "were seen). Fill it in model.eval(), from the beginning."
        )


def _cells(cache: Any) -> int:
    lengths = [layer.max_cache_len for layer in cache.layers if not layer.is_sliding]
    lengths += [layer.max_cache_len for layer in cache.layers if getattr(layer, "routed", False)]
    if not lengths:
        raise SettingError(
            "every layer of this static cache slides, so that it does not say how many tokens there can be, and routed "
            "tokens are kept at their places. Use a DynamicCache."
        )
    return max(lengths)
