"""The KV cache of a routed block: the tokens that were routed, and where in the sequence they stand.

One layer of a Hugging Face ``DynamicCache`` is replaced, so that what routing has to remember lives, is reordered,
cropped and reset exactly with the keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fxopt.passes.regions import Keys
from fxopt.passes.technique import SettingError


class RoutedLayer(DynamicLayer):
    """Keys and values of routed tokens alone, ``[B, H, K, D]``, with their places in the sequence, ``[B, K]``.

    To the rest of the model it looks as long as the sequence is (``get_seq_length``), so that masks are built in
    places of the sequence. Rows of a batch hold different numbers of tokens; the shorter ones have rows of no token
    (place -1).
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.seen = 0
        self.positions: Tensor | None = None
        if window is not None:
            self.sliding_window = window

    def advance(self, positions: Tensor, tokens: int) -> Keys:
        """Before the block runs: `tokens` tokens were seen, those at ``positions: [B, C]`` (-1: none) are written."""
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)
        keys = Keys(self.positions, self.seen, self.window)
        self.seen += tokens
        return keys

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


def routed_layer(cache: Any, index: int, tokens: int) -> RoutedLayer:
    """The cache of the routed layer `index`, put in place on an empty cache; `tokens` are new in this call.

    Raises SettingError for a cache whose rows cannot be left out (a static one), and for one that was filled while
    this layer was not routed.
    """
    if type(cache) is not DynamicCache:
        raise SettingError(
            f"a block with mixture of depths writes routed tokens alone, which {type(cache).__name__} has no form for. "
            "Use a DynamicCache (the default of generate(); leave cache_implementation out), or use_cache=False."
        )
    if len(cache.layers) == index:
        cache.layers.append(RoutedLayer())
    found: Any = cache.layers[index]
    if type(found) in (DynamicLayer, DynamicSlidingWindowLayer) and not found.get_seq_length():
        found = cache.layers[index] = RoutedLayer(getattr(found, "sliding_window", None))
    if not isinstance(found, RoutedLayer):
        raise SettingError(
            f"layer {index} of this cache is a {type(found).__name__} with {found.get_seq_length()} tokens, and its "
            "block has mixture of depths. Start from an empty DynamicCache, filled in model.eval()."
        )
    first: Any = cache.layers[0]
    if index and first.get_seq_length() != found.seen + tokens:
        raise SettingError(
            f"this cache was filled while layer {index} was not routed by its predictor ({found.seen} of "
            f"{first.get_seq_length() - tokens} tokens were seen). Fill it in model.eval(), from the beginning."
        )
    return found
