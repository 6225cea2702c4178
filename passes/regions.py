"""Re-derive the call of a layer for C of its S tokens: which of its arguments follow the tokens, and how.

A layer is called with the residual stream and with things made once for all layers: rotary tables, position ids, a
mask. When only some tokens are computed, each of them has to be cut to those tokens, at their *original* places:

    stream            [B, S, W]          -> [B, C, W]         rows
    rotary tables     [1 | B, S, D]      -> [B, C, D]         rows: the original positions
    position ids      [1 | B, S]         -> [B, C]            rows
    mask              [1 | B, H, S, S]   -> [B, H, C, C]      rows and columns
    padding mask      [B, S]             -> [B, C]            rows

Tokens come in ascending order, so that where no mask is given the causal rule of the block itself (``is_causal``) is
exact on the ``C x C`` problem. Everything here is plain PyTorch on the arguments of a Python call. The shapes inside
the block then follow by themselves, whatever symbols the lengths are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.passes.technique import SettingError

CACHES = ("past_key_values", "past_key_value", "layer_past")
"""Names of the argument that is the KV cache."""
_MASK_NAMES = ("mask", "bias", "alibi")
_ROW_NAMES = ("position", "rotary", "cos", "sin", "freq", "per_layer_input")


class Selection(NamedTuple):
    """C of S tokens for each sequence: the selected ones in ascending order, then fillers."""

    places: Tensor
    """[B, C], int64: where in the sequence; no place twice in a row of the batch."""
    valid: Tensor | None
    """[B, C], bool: which entries are selected tokens and no fillers; None when all are."""
    length: int
    """S, the number of tokens to choose from."""

    def first(self, count: int) -> Selection:
        """The first `count` of them."""
        valid = None if self.valid is None else self.valid[:, :count]
        return Selection(self.places[:, :count], valid, self.length)


class Keys(NamedTuple):
    """The keys a block attends to where it has a cache: what was written before, then this call's tokens."""

    positions: Tensor
    """[B, K], int64: place of each cached row since the beginning of the sequence; -1 for rows of no token."""
    start: Any
    """Tokens before this call, a number, or a tensor without dimensions."""
    window: int | None
    """Sliding window in tokens, or None."""
    first: Tensor | None = None
    """[B, 1], int64: the cell of the first selected token; the others follow. None: a token's cell is its place."""
    cache: Any = None
    """What the block is given in place of the cache, or None for the cache itself."""

    def own(self, selection: Selection) -> Tensor:
        """[B, C], int64: the cell of each selected token."""
        if self.first is None:
            return selection.places + self.start
        return self.first + torch.arange(selection.places.shape[1], device=self.first.device)


class Writer:
    """Stands for the cache of a layer in one call of its block: writes rows to given cells, ``cells: [B, C]``.

    ``needed``: a 0-d bool, or None for yes; where it is False the cells stay what they are.
    """

    def __init__(self, layer: Any, cells: Tensor, needed: Tensor | None = None) -> None:
        self.layer, self.cells, self.needed = layer, cells, needed

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``keys, values: [B, H, C, D]``; rows of fillers are written as well, to cells of no token."""
        layer: Any = self.layer
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        rows, heads = (torch.arange(size, device=keys.device) for size in keys.shape[:2])
        # Inductor writes this in place; of a scatter_ it makes two copies of the whole cache.
        places = (rows[:, None, None], heads[:, None], self.cells[:, None])
        for kept, new in ((layer.keys, keys), (layer.values, values)):
            if self.needed is not None:
                new = torch.where(self.needed, new, kept[places])
            kept.index_put_(places, new)
        return layer.keys, layer.values


def ascending(member: Tensor, count: int) -> Selection:
    """The tokens with ``member: [B, S]`` (bool), ascending, filled up to `count` with tokens that are not members.

    The order is by place alone: it does not depend on how the members were found. With more than `count` members in a
    sequence, the first `count` are taken.
    """
    length = member.shape[1]
    places = torch.arange(length, device=member.device)
    keys = torch.where(member, places, places + length).sort(dim=1).values[:, :count]
    valid = keys < length
    return Selection(torch.where(valid, keys, keys - length), valid, length)


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor: [1 | B, S, ...]`` at ``index: [B, C]``: [B, C, ...]."""
    batch, count = index.shape
    rest = tensor.shape[2:]
    wide = index.reshape(batch, count, *[1] * len(rest)).expand(batch, count, *rest)
    return tensor.expand(batch, *tensor.shape[1:]).gather(1, wide)


def padding(mask: Tensor | None, length: int, first: Any = None) -> Tensor | None:
    """[B, S], bool: which tokens are real, read from a layer's mask; None where no mask says otherwise.

    A token that may not attend to itself is padding. ``mask``: bool (True: visible) or additive,
    ``[1 | B, 1 | H, S, K]`` with the newest tokens last, or ``[B, S]``. ``first``: the column of the first of the S
    tokens (a number or a tensor), where the newest are not last.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, -length:] != 0
    if first is None:
        # Cut first: the offset of a diagonal would become a constant of the graph.
        diagonal = mask[..., -length:].diagonal(dim1=-2, dim2=-1)  # [B, H, S]
    else:
        own = (torch.arange(length, device=mask.device) + first)[None, None, :, None]
        diagonal = mask.gather(3, own.expand(*mask.shape[:3], 1)).squeeze(3)
    visible = diagonal if mask.dtype == torch.bool else diagonal > torch.finfo(mask.dtype).min / 2
    return visible.any(dim=1)


class Call:
    """The arguments of one call of a layer: the stream, and what goes with it. ``names``: its parameters, in order."""

    def __init__(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.names = [names[i] if i < len(names) else "" for i in range(len(args))]
        self.args = list(args)
        self.kwargs = dict(kwargs)
        self.stream_name = "" if args else names[0]
        stream = args[0] if args else kwargs.get(self.stream_name)
        if not isinstance(stream, Tensor) or stream.ndim != 3:
            raise SettingError(
                "mixture of depths routes tokens of a stream [batch, sequence, width] that is the first argument of "
                f"the layer; the first argument here is {_describe(stream)}."
            )
        self.stream: Tensor = stream

    def get(self, *wanted: str) -> Any:
        """The argument of that name, or None."""
        for name in wanted:
            if self.kwargs.get(name) is not None:
                return self.kwargs[name]
            if name in self.names:
                return self.args[self.names.index(name)]
        return None

    def set(self, name: str, value: Any) -> None:
        """Give the argument of that name another value."""
        if name in self.names:
            self.args[self.names.index(name)] = value
        else:
            self.kwargs[name] = value

    @property
    def mask(self) -> Tensor | None:
        """The attention mask, where the layer is given one as a tensor."""
        mask = self.get("attention_mask", "mask", "attn_mask", "causal_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise SettingError(
                f"mixture of depths cannot cut a {type(mask).__name__} to the selected tokens; load the model with "
                "attn_implementation='sdpa'."
            )
        if mask is not None and not _is_mask(mask, self.stream):
            raise SettingError(
                f"mixture of depths reads padding from a mask [batch or 1, heads or 1, sequence, sequence] (True: "
                f"visible, or numbers that are added) or [batch, sequence]; this layer is given {_describe(mask)} for "
                f"a stream {list(self.stream.shape)}."
            )
        return mask

    def at(self, selection: Selection, keys: Keys | None = None) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """The stream, args and kwargs for the selected tokens, ``[B, C, W]`` first.

        With `keys` the mask is built over the cached rows as well. Raises SettingError for an argument that depends
        on the sequence in a way that is not understood.
        """
        given = self.mask
        stream = rows(self.stream, selection.places)
        args = [_cut(self.names[i], self.args[i], selection, keys) for i in range(1, len(self.args))]
        kwargs = {n: _cut(n, v, selection, keys) for n, v in self.kwargs.items() if n != self.stream_name}
        if keys is not None and given is None:
            kwargs["attention_mask"] = _own_mask(selection, keys)
            if "attention_mask" in self.names:
                args[self.names.index("attention_mask") - 1] = kwargs.pop("attention_mask")
        if keys is not None and keys.cache is not None:
            for name in CACHES:
                if kwargs.get(name) is not None:
                    kwargs[name] = keys.cache
                elif name in self.names and args[self.names.index(name) - 1] is not None:
                    args[self.names.index(name) - 1] = keys.cache
        if self.stream_name:
            kwargs[self.stream_name] = stream
            return stream, tuple(args), kwargs
        return stream, (stream, *args), kwargs


def _is_mask(mask: Tensor, stream: Tensor) -> bool:
    batch, length = stream.shape[:2]
    if mask.ndim == 2:
        return mask.shape[0] == batch
    numbers = mask.dtype == torch.bool or mask.is_floating_point()
    return mask.ndim == 4 and numbers and mask.shape[2] == length and mask.shape[3] >= length


def _cut(name: str, value: Any, selection: Selection, keys: Keys | None) -> Any:
    if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
        cut = [_cut(name, v, selection, keys) for v in value]
        return cut if isinstance(value, list) else tuple(cut)
    if not isinstance(value, Tensor) or value.ndim == 0 or "encoder" in name:
        return value
    batch, length = selection.places.shape[0], selection.length
    if any(part in name for part in _MASK_NAMES) or (value.dtype == torch.bool and value.ndim == 4):
        return _cut_mask(name, value, selection, keys)
    along = value.ndim >= 2 and value.shape[1] == length and (value.shape[0] == 1 or value.shape[0] == batch)
    if any(part in name for part in _ROW_NAMES) and "cache" not in name:
        if along:
            return rows(value, selection.places)
        if value.ndim == 4 and value.shape[2] == length:  # [1 | B, 1, S, D]
            return rows(value.transpose(1, 2), selection.places).transpose(1, 2)
    elif along:
        return rows(value, selection.places)
    if any(size == length for size in value.shape) and "cache" not in name and length != 1:
        raise SettingError(
            f"mixture of depths does not know how the argument {name or 'without a name'} "
            f"({_describe(value)}) follows the {length} tokens. Give it as [batch or 1, sequence, ...], or name a "
            "mask [batch, heads, sequence, sequence] 'attention_mask'."
        )
    return value


def _cut_mask(name: str, mask: Tensor, selection: Selection, keys: Keys | None) -> Tensor:
    index, valid = selection.places, selection.valid
    if mask.ndim == 2:
        mask = rows(mask, index)
        return mask if valid is None else mask * valid
    if mask.ndim != 4 or mask.shape[2] != selection.length:
        raise SettingError(
            "mixture of depths cuts masks and position biases [batch or 1, heads or 1, sequence, sequence] to the "
            f"selected tokens; the argument {name or 'without a name'} of this layer is {_describe(mask)}, for "
            f"{selection.length} tokens. ALiBi models give it in this form; route one with rotary or learned positions."
        )
    batch, count = index.shape
    heads, width = mask.shape[1], mask.shape[3]
    fixed = keys is not None and keys.first is None
    if keys is not None and fixed and (width != keys.positions.shape[1] or keys.window is not None):
        # The mask of a sliding window that was moved along: what it says of padding, the written cells say too.
        own_mask = _own_mask(selection, keys)
        if mask.dtype == torch.bool:
            return own_mask
        return torch.zeros_like(own_mask, dtype=mask.dtype).masked_fill(~own_mask, torch.finfo(mask.dtype).min)
    mask = mask.expand(batch, heads, mask.shape[2], width)
    mask = mask.gather(2, index[:, None, :, None].expand(batch, heads, count, width))
    if keys is None:
        columns, visible = index, valid
        own: Tensor | None = None if valid is None else torch.eye(count, dtype=torch.bool, device=mask.device)[None]
    elif fixed:
        columns, visible = None, keys.positions >= 0
        own = _own_rows(selection, keys)
    else:
        # The mask's last column is this call's last token; a sliding layer's mask does not begin at zero.
        columns = keys.positions - (keys.start + selection.length - width)
        visible = (columns >= 0) & (keys.positions >= 0)
        columns = columns.clamp(min=0)
        own = _own_rows(selection, keys)
    if columns is not None:
        mask = mask.gather(3, columns[:, None, None, :].expand(batch, heads, count, columns.shape[1]))
    if visible is None:
        return mask
    hidden = ~visible[:, None, None, :]
    if own is not None and valid is not None:  # a filler attends to itself, so that its row is never empty
        hidden = torch.where(valid[:, None, :, None], hidden, ~own[:, None])
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _own_rows(selection: Selection, keys: Keys) -> Tensor:
    """[B, C, K], bool: the row of each selected entry itself among the keys."""
    cells = torch.arange(keys.positions.shape[1], device=keys.positions.device)
    return cells == keys.own(selection)[:, :, None]


def _own_mask(selection: Selection, keys: Keys) -> Tensor:
    """[B, 1, C, K], bool: causal by original place, within the window, nothing but written rows."""
    queries = (selection.places + keys.start)[:, :, None]  # [B, C, 1]
    columns = keys.positions[:, None, :]  # [B, 1, K]
    visible = (columns >= 0) & (columns <= queries)
    if keys.window is not None:
        visible = visible & (queries - columns < keys.window)
    if selection.valid is not None:
        visible = torch.where(selection.valid[:, :, None], visible, _own_rows(selection, keys))
    return visible[:, None]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor [{', '.join(map(str, value.shape))}] of {value.dtype}"
    return f"a {type(value).__name__}"
