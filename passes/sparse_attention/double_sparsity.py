"""``method="double_sparsity"``: tokens by approximate scores on few channels (Yang et al., arXiv 2408.07092).

Beside the cache: the r channels of every key that carry most of the scores (the label cache), chosen for each KV head
by calibration (:mod:`.calibration`), after rotary embedding, both channels of a rotated pair together. A step scores
all positions on those channels, takes the best, one list a KV head, and attends to them exactly.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from fxopt.codegen.kernels.cpu_select import QUANTUM
from fxopt.passes.attention import AttentionSite
from fxopt.passes.confidence import inline
from fxopt.passes.context import PassContext
from fxopt.passes.nodes import value_of
from fxopt.passes.sparse_attention import selection
from fxopt.passes.state import Shape
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

NEWEST = 8
"""Newest tokens that are always read: labels say little about a key's neighbourhood, which nearly always matters."""
MIN_LENGTH = 2048
"""Filled positions from which choosing is faster than reading everything; see docs/decisions.md."""


def state_elements(setting: SparseAttention, width: int) -> float:
    """Elements of the cache's dtype that a step reads a position and KV head to choose."""
    channels = setting.channels
    return len(channels[0]) if isinstance(channels, tuple) else channels or default_channels(width)


def default_channels(width: int) -> int:
    """A sixteenth of a head's channels, in rotated pairs, and eight of a narrow head: two of 32 lose the needles."""
    return min(width, max(8, width // 32 * 2))


def check(setting: SparseAttention) -> None:
    """A budget that pays for more than what is always read, and channels that can be meant."""
    selection.check(setting, 1, NEWEST)
    channels = setting.channels
    if channels is None or (isinstance(channels, int) and not isinstance(channels, bool) and channels >= 2):
        return
    if not isinstance(channels, tuple) or not channels:
        raise SettingError(
            f"SparseAttention(channels={channels!r}): how many channels to calibrate (2 or more), or one tuple of "
            "channels for each KV head, as fxopt.tune writes them into a recipe."
        )
    for head, listed in enumerate(channels):
        proper = isinstance(listed, tuple) and listed and all(isinstance(c, int) and c >= 0 for c in listed)
        if not proper or len(set(listed)) != len(listed) or len(listed) != len(channels[0]):
            raise SettingError(
                f"SparseAttention(channels=...): KV head {head} has {listed!r}; every head takes the same number of "
                "different channels, each from 0 on."
            )


def channels_for(setting: SparseAttention, kv_heads: int, width: int) -> tuple[tuple[int, ...], ...]:
    """The lists for an attention with that many KV heads of that width; raises SettingError where they do not fit."""
    channels = setting.channels
    if not isinstance(channels, tuple):
        raise SettingError(
            "SparseAttention(method='double_sparsity') needs calibrated channels: hand fxopt.compile the recipe that "
            "fxopt.tune(model, text, technique) returns."
        )
    largest = max(c for listed in channels for c in listed)
    if len(channels) != kv_heads or largest >= width:
        raise SettingError(
            f"the channels were calibrated for {len(channels)} KV heads and reach channel {largest}; this attention "
            f"has {kv_heads} KV heads of {width} channels. Calibrate for this model with fxopt.tune."
        )
    return channels


def rewrite(site: AttentionSite, setting: SparseAttention, context: PassContext, shared: dict[Any, Any]) -> None:
    """Put selection by labels in the place of one attention."""
    made = selection.plan(site, setting, context, shared, block=1, newest=NEWEST)
    if made is None:
        return
    lists = channels_for(setting, site.kv_heads, value_of(site.key).shape[3])
    state = made.state(("channels", lists, setting.bits), labels(len(lists[0]), setting.bits, value_of(site.key).dtype))
    if site.device.type == "cpu":
        channels = made.call(torch.tensor, [list(listed) for listed in lists])
    else:
        # A tensor of a list would be copied from the host in every step.
        table = functools.partial(spelled_out, lists)
        channels = inline(table, (site.query,), context.rewriter, before=site.output, like=site.output)
    ops = torch.ops.fxopt
    options = {
        "extent": made.extent, "channels": channels, "scales": state.get("scales"), "least": made.least,
        "bits": setting.bits,
    }  # fmt: skip
    made.call(ops.update_features.default, state["features"], state["filled"], site.key, **options)
    scores = made.call(ops.feature_scores.default, site.query, state["features"], **options)
    kept = f" in {setting.bits} bits" if setting.bits else ""
    made.attend(scores, f"by {len(lists[0])} channels{kept}, {setting.sinks} sinks and the {NEWEST} newest")


WORD = 7
"""Channels, below 256, in one whole number of 64 bits with a sign."""


def spelled_out(lists: tuple[tuple[int, ...], ...], like: torch.Tensor) -> torch.Tensor:
    """Lists of channels as [Hkv, C] int64 on the device of `like`, made there out of a few numbers in the graph."""
    words = [
        sum(channel << (8 * place) for place, channel in enumerate(listed[at : at + WORD]))
        for listed in lists
        for at in range(0, len(listed), WORD)
    ]
    packed = torch.cat([like.new_full((1,), word, dtype=torch.int64) for word in words])
    shifts = like.new_full((WORD,), 8, dtype=torch.int64).cumsum(0) - 8
    return ((packed[:, None] >> shifts) & 255).reshape(len(lists), -1)[:, : len(lists[0])]


def labels(count: int, bits: int | None, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    """The tensors of a label cache of `count` channels, as ``fxopt.update_features`` keeps them."""
    if not bits:
        return {"features": (lambda b, h, s, d: (b, h, count, s), dtype)}

    def stretches(length: Any) -> Any:
        return (length + QUANTUM - 1) // QUANTUM

    positions = QUANTUM if bits == 8 else QUANTUM // 2
    return {
        "features": (
            lambda b, h, s, d: (b, h, count, stretches(s) * positions), torch.int8 if bits == 8 else torch.uint8
        ),
        "scales": (lambda b, h, s, d: (b, h, count, stretches(s)), torch.float32),
    }  # fmt: skip
