"""What every position of a text would read if it were decoded on a cache: sparse attention over a whole text at once.

A second form of the meaning in :mod:`.reference`, for measuring quality: one forward over a text instead of a step for
each token. Rows before `prompt` attend to everything before them, as a prompt does; each later row chooses as a decode
step on a cache of `capacity` positions would. Plain PyTorch, no FX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxopt.passes.modules import module_stacks
from fxopt.passes.sparse_attention.calibration import product_sums
from fxopt.passes.sparse_attention.double_sparsity import channels_for
from fxopt.passes.sparse_attention.pages import PAGE, kept_dtype
from fxopt.passes.sparse_attention.reference import raised, unrepeated
from fxopt.passes.sparse_attention.settings import block_counts, budgets, tokens_of
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

ROWS = 128
"""Rows whose scores exist at a time."""


def kept_rows(
    setting: SparseAttention, query: Tensor, key: Tensor, positions: Tensor, capacity: int, scale: float
) -> Tensor:
    """[B, Hkv, R, S] bool: what the rows at `positions` [R] read of the positions up to their own.

    ``query: [B, Hkv, G, R, D]``, ``key: [B, Hkv, S, D]``. Raises SettingError for settings that only steps can measure.
    """
    length, heads = key.shape[2], key.shape[1]
    place = torch.arange(length, device=key.device)
    visible = place <= positions[:, None]  # [R, S]
    short = positions + 1 < setting.dense_below
    if setting.select is not None or setting.bits or setting.rolling:
        raise SettingError(f"{setting}: select=, bits= and rolling= are measured step by step; use fxopt.evaluate.")
    if setting.method == "sink_window":
        rows = []
        for budget in budgets(setting, heads):
            tokens = length if budget is None else tokens_of(budget, capacity, setting.sinks + 1)
            window = place > positions[:, None] - (tokens - setting.sinks)
            rows.append((place < setting.sinks) | window | short[:, None])
        return (torch.stack(rows) & visible).expand(query.shape[0], -1, -1, -1)
    newest = setting.chosen_by.NEWEST
    scores = _page_rows(query, key, positions) if setting.method == "pages" else _channel_rows(setting, query, key)
    block = PAGE if setting.method == "pages" else 1
    number = place // block
    first = torch.arange(scores.shape[-1], device=key.device) * block
    hidden = first > positions[:, None]  # [R, N]
    always = (first < setting.sinks) | (first + block - 1 > positions[:, None] - newest)
    ranked = scores.masked_fill(always & ~hidden, math.inf).masked_fill(hidden, -math.inf)
    counts = block_counts(setting, heads, capacity, block, newest)
    most = max((c for c in counts if c is not None), default=0)
    keep = visible.expand(query.shape[0], heads, -1, -1).clone()
    order = ranked.topk(min(most, ranked.shape[-1]), -1).indices
    shares = (scores * scale).masked_fill(hidden, -math.inf).softmax(-1).gather(-1, order)
    before = shares.cumsum(-1) - shares
    chosen_rows = (positions + 1 > most * block) & ~short
    for head, count in enumerate(counts):
        if count is None:
            continue
        stay = torch.arange(order.shape[-1], device=key.device) < count
        if setting.tau is not None:
            stay = stay & ((before[:, head] < setting.tau) | (ranked[:, head].gather(-1, order[:, head]) == math.inf))
        taken = torch.zeros_like(ranked[:, head], dtype=torch.bool).scatter_(-1, order[:, head], stay.expand_as(
            order[:, head]))  # fmt: skip
        keep[:, head] &= taken[..., number] | ~chosen_rows[:, None]
    return keep


def _page_rows(query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
    """[B, Hkv, R, P]: bounds of the pages; that of each row's own page over the keys it can see."""
    length = key.shape[2]
    pages = -(-length // PAGE)
    pad = (0, 0, 0, pages * PAGE - length)
    most = F.pad(key, pad, value=-math.inf).unflatten(2, (pages, PAGE)).cummax(3).values
    least = F.pad(key, pad, value=math.inf).unflatten(2, (pages, PAGE)).cummin(3).values
    kept_in = kept_dtype(key.dtype, key.device)
    most, least = raised(most, kept_in), -raised(-least, kept_in)
    up, down = query.clamp(min=0), query.clamp(max=0)
    # A last page that is not full is nobody's but its own rows'.
    top, bottom = (t[:, :, :, -1].nan_to_num(0.0, 0.0, 0.0)[:, :, None] for t in (most, least))
    scores = (up @ top.mT + down @ bottom.mT).amax(2)
    own_top, own_bottom = (t.flatten(2, 3)[:, :, positions][:, :, None] for t in (most, least))
    own = (up * own_top + down * own_bottom).sum(-1).amax(2)  # [B, Hkv, R]
    return scores.scatter(-1, (positions // PAGE).expand_as(own)[..., None], own[..., None])


def _channel_rows(setting: SparseAttention, query: Tensor, key: Tensor) -> Tensor:
    """[B, Hkv, R, S]: scores on the calibrated channels."""
    lists = channels_for(setting, key.shape[1], key.shape[3])
    heads = [(query[:, h][..., c] @ key[:, h, None][..., c].mT).amax(1) for h, c in enumerate(map(list, lists))]
    return torch.stack(heads, 1)


@dataclass
class HeadSums:
    """Of one attention, by KV head, summed over rows: positions read and visible, attention mass of those read."""

    read: Tensor
    visible: Tensor
    mass: Tensor
    rows: int = 0

    @property
    def density(self) -> Tensor:
        """[Hkv]: share of the visible positions that is read."""
        return self.read / self.visible

    @property
    def kept_mass(self) -> Tensor:
        """[Hkv]: mean attention weight of what is read, under dense attention."""
        return self.mass / self.rows


@dataclass
class OneShot:
    """Runs forwards in which rows from `prompt` on choose by the settings of their layers.

    ``settings``: by layer index, one (it acts) or several (they are measured, and the attention stays dense).
    """

    settings: Mapping[int, SparseAttention | Sequence[SparseAttention]]
    prompt: int
    every: int = 1
    """Measure every so many rows; those that act are all."""
    sums: dict[tuple[int, int], HeadSums] = field(default_factory=dict)
    """(layer, number of the setting) to sums."""

    def attached(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, forwards of several tokens, on a cache or without one, are measured."""
        return attached(model, self.attend)

    def attend(self, layer: int, given: dict[str, Any], dense: Tensor) -> Tensor:
        """The dense result of an attention with the rows from `prompt` on replaced, where one setting acts."""
        if layer not in self.settings:
            return dense
        query, tokens, total = given["query"], given["query"].shape[2], given["key"].shape[2]
        key, value = unrepeated(given["key"], query.shape[1]), unrepeated(given["value"], query.shape[1])
        chosen = self.settings[layer]
        acts = not isinstance(chosen, Sequence)
        several: Sequence[SparseAttention] = [chosen] if acts else chosen  # type: ignore[list-item, assignment]
        begin = total - tokens  # positions that are on the cache already
        first = max(self.prompt, begin)
        if tokens == 1 or total <= first or not plain_causal(given, tokens, total):
            return dense
        scale = given.get("scale") or query.shape[-1] ** -0.5
        grouped = query.unflatten(1, (key.shape[1], -1))
        rows = torch.arange(first, total, 1 if acts else self.every, device=query.device)
        parts = []
        for some in rows.split(ROWS):
            part = grouped[:, :, :, some - begin]
            scores = part @ key[:, :, None].mT * scale  # [B, Hkv, G, R, S]
            hidden = torch.arange(total, device=key.device) > some[:, None]
            weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
            for number, setting in enumerate(several):
                keep = kept_rows(setting, part, key, some, total, scale)
                held = weights * keep[:, :, None]
                self._count((layer, number), keep, held, some)
                if acts:
                    out = (held / held.sum(-1, keepdim=True)) @ value[:, :, None]
                    parts.append(out.flatten(1, 2))
        return torch.cat((dense[:, :, : first - begin], *parts), 2) if acts else dense

    def _count(self, place: tuple[int, int], keep: Tensor, held: Tensor, rows: Tensor) -> None:
        read = keep.sum((0, 2, 3)).double().cpu()
        seen = torch.full_like(read, float((rows + 1).sum()) * keep.shape[0])
        mass = held.sum(-1).mean(2).sum((0, 2)).double().cpu()
        sums = self.sums.get(place)
        if sums is None:
            self.sums[place] = HeadSums(read, seen, mass, len(rows) * keep.shape[0])
        else:
            sums.read += read
            sums.visible += seen
            sums.mass += mass
            sums.rows += len(rows) * keep.shape[0]


@contextmanager
def attached(model: nn.Module, attend: Callable[[int, dict[str, Any], Tensor], Tensor]) -> Iterator[None]:
    """While open, ``attend(layer, arguments, result)`` answers each ``scaled_dot_product_attention`` of a layer."""
    mode = _Layers(attend)
    hooks = []
    for index, layer in enumerate(module_stacks(model)[0].layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, index=index: mode.enter_layer(index)))
        hooks.append(layer.register_forward_hook(lambda *_: mode.enter_layer(-1)))
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Layers(TorchFunctionMode):
    def __init__(self, attend: Callable[[int, dict[str, Any], Tensor], Tensor]) -> None:
        super().__init__()
        self.answer, self.layer = attend, -1

    def enter_layer(self, index: int) -> None:
        self.layer = index

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention or self.layer < 0:
            return result
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        return self.answer(self.layer, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, result)


@torch.no_grad()
def channel_sums(model: nn.Module, texts: Iterable[Tensor]) -> dict[int, Tensor]:
    """Importance of key channels by layer, [Hkv, D], over texts of token ids [S]; see :func:`.product_sums`.

    Of layers in which every row sees all before it: no other is measured or acts in :class:`OneShot`.
    """
    found: dict[int, Tensor] = {}

    def look(layer: int, given: dict[str, Any], result: Tensor) -> Tensor:
        query, key = given["query"], unrepeated(given["key"], given["query"].shape[1])
        tokens, total = query.shape[2], key.shape[2]
        if tokens == total and plain_causal(given, tokens, total):
            sums = product_sums(query, key).cpu()
            found[layer] = found[layer] + sums if layer in found else sums
        return result

    device = next(model.parameters()).device
    with attached(model, look):
        for ids in texts:
            model(ids[None].to(device), use_cache=False)
    return found


def plain_causal(given: Mapping[str, Any], tokens: int, total: int) -> bool:
    """Whether an attention lets every row see all positions up to its own; a window or padding is left alone."""
    mask = given.get("attn_mask")
    if mask is None:
        return bool(given.get("is_causal")) and tokens == total
    if mask.shape[-2:] != (tokens, total):
        return False
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    causal = torch.ones(tokens, total, dtype=torch.bool, device=mask.device).tril(total - tokens)
    return bool((seen == causal).all())
