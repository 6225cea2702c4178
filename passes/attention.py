"""Finds attention in Dynamo's graph by what is computed, not by how it was written.

Two anchors: a ``scaled_dot_product_attention`` call, and a softmax over the last dimension whose input is made of a
product of two matrices and whose result multiplies a third. Between them anything that keeps the meaning is read:

    matmul(q, k^T) -> * scale -> cap * tanh(. / cap) -> + bias, + mask, masked_fill, where -> [cat sinks]
        -> softmax -> [drop the sinks' column] -> cast -> dropout that does nothing -> matmul(., v)

in any order that is still ``scale``, ``soft_cap``, additive terms, softmax. What differs ends the match with a
:class:`Near`, which names the first thing that differed. The repetition of KV heads (``repeat_kv``,
``repeat_interleave``, broadcasting) is looked through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.passes.attention_scores import Bias, Differs, WrittenOut, read_written_out
from fxopt.passes.nodes import argument, is_tensor, name_of, number_of, same, value_of


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a graph.

    ``query``: [B, Hq, T, D]; ``key``, ``value``: [B, Hkv, S, D], as they are before any repetition of heads;
    ``form``: ``"sdpa"`` (the library's call), ``"eager"`` (written out) or ``"fxopt"`` (our own operator).
    """

    output: fx.Node
    form: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    biases: tuple[Bias, ...] = ()
    is_causal: bool = False
    soft_cap: float = 0.0
    sinks: fx.Node | None = None
    attended: tuple[fx.Node, ...] = ()
    """Key and value as the attention reads them, after any repetition of heads."""
    window: int = 0
    """Keys that a query sees at most, itself included, where `is_causal`; 0: all before it."""
    interior: tuple[fx.Node, ...] = field(default=(), repr=False)
    """Nodes that only this attention needs, the output included."""

    @property
    def repeated(self) -> bool:
        """Whether the graph repeats KV heads in memory before attending."""
        return bool(self.attended) and self.attended[0] is not self.key

    @property
    def mask(self) -> fx.Node | None:
        """The mask as one node, where there is exactly one and it is used as it is."""
        if len(self.biases) == 1 and self.biases[0].fill is None and self.biases[0].multiplier == 1.0:
            return self.biases[0].node
        return None

    @property
    def heads(self) -> int:
        return value_of(self.query).shape[1]

    @property
    def kv_heads(self) -> int:
        return value_of(self.key).shape[1]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def tokens(self) -> Any:
        """T, the new tokens; may be symbolic."""
        return value_of(self.query).shape[2]

    @property
    def length(self) -> Any:
        """S, the keys; may be symbolic."""
        return value_of(self.key).shape[2]

    @property
    def device(self) -> torch.device:
        return value_of(self.query).device

    @property
    def dtype(self) -> torch.dtype:
        return value_of(self.query).dtype

    def describe(self) -> str:
        """In one line, for remarks: ``32 query heads on 8 KV heads, 1 token on 4096 keys``."""
        heads = f"{self.heads} query heads on {self.kv_heads} KV heads"
        extras = [f"soft-cap {self.soft_cap:g}"] if self.soft_cap else []
        extras += ["sinks"] if self.sinks is not None else []
        extras += [f"window {self.window}"] if self.window else []
        tokens = "1 token" if str(self.tokens) == "1" else f"{self.tokens} tokens"
        return ", ".join([heads, f"{tokens} on {self.length} keys", *extras])


@dataclass(frozen=True)
class Near:
    """Something that nearly is attention; `code` (passes/reasons.py) and `message` name the first difference."""

    node: fx.Node
    code: str
    message: str


def find_attentions(graph: fx.Graph) -> tuple[list[AttentionSite], list[Near]]:
    """All attentions of a graph in the order they run, and what nearly matched."""
    sites: list[AttentionSite] = []
    near: list[Near] = []
    for node in graph.nodes:
        try:
            name = name_of(node)
            if name == "scaled_dot_product_attention":
                sites.append(_from_sdpa(node))
            elif node.target is torch.ops.fxopt.attention.default:
                sites.append(_from_semantic(node))
            elif name in ("softmax", "_softmax") and node.op in ("call_function", "call_method"):
                found = read_written_out(node)
                if found is not None:
                    sites.append(_from_written_out(found))
        except Differs as difference:
            near.append(Near(node, difference.code, difference.message))
    position = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(sites, key=lambda site: position[site.output]), near


# -- the library's call -----------------------------------------------------------------------------------------------


def _from_sdpa(node: fx.Node) -> AttentionSite:
    query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    if not all(is_tensor(t, 4) for t in (query, key, value)):
        raise Differs("FX102", "query, key and value have other than 4 dimensions")
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        raise Differs("FX205", "attention dropout is active")
    scale = argument(node, 6, "scale")
    width = value_of(query).shape[3]
    if scale is None:
        if not isinstance(width, int):
            raise Differs("FX204", "the head dimension is symbolic and no scale is given")
        scale = 1.0 / math.sqrt(width)
    if number_of(scale) is None:
        raise Differs("FX103", "the scale is not a number")
    is_causal = argument(node, 5, "is_causal", False)
    if not isinstance(is_causal, bool) or (is_causal and mask is not None):
        raise Differs("FX102", "is_causal is not a plain choice")
    biases = () if mask is None else (Bias(mask),)
    return _finish(node, "sdpa", query, key, value, float(scale), biases, (node,), is_causal=is_causal)


def _from_semantic(node: fx.Node) -> AttentionSite:
    query, key, value = node.args[:3]
    mask = node.kwargs.get("mask")
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    return AttentionSite(
        node, "fxopt", query, key, value, float(node.kwargs["scale"]),  # type: ignore[arg-type]
        (Bias(mask),) if isinstance(mask, fx.Node) else (), bool(node.kwargs.get("is_causal", False)),
        float(node.kwargs.get("soft_cap", 0.0)), node.kwargs.get("sinks"), (key, value),  # type: ignore[arg-type]
        int(node.kwargs.get("window", 0)), (node,),  # type: ignore[arg-type]
    )  # fmt: skip


def _from_written_out(found: WrittenOut) -> AttentionSite:
    return _finish(
        found.output, "eager", found.query, found.key, found.value, found.scale, found.biases, found.interior,
        soft_cap=found.soft_cap, sinks=found.sinks,
    )  # fmt: skip


# -- heads ------------------------------------------------------------------------------------------------------------


def _finish(
    output: fx.Node, form: str, query: fx.Node, key: fx.Node, value: fx.Node, scale: float, biases: tuple[Bias, ...],
    interior: tuple[fx.Node, ...], *, is_causal: bool = False, soft_cap: float = 0.0, sinks: fx.Node | None = None,
) -> AttentionSite:  # fmt: skip
    q, k, v = value_of(query), value_of(key), value_of(value)
    if value_of(output).dtype != q.dtype:  # autocast, or a softmax that is not cast back
        raise Differs("FX201", f"{q.dtype} queries give a {value_of(output).dtype} result")
    if not (q.dtype == k.dtype == v.dtype):
        raise Differs("FX201", f"query, key and value are {q.dtype}, {k.dtype} and {v.dtype}")
    bare_key, bare_value = unrepeated(key), unrepeated(value)
    if not same(value_of(bare_key).shape[1], value_of(bare_value).shape[1]):
        bare_key, bare_value = key, value
    heads, kv_heads = q.shape[1], value_of(bare_key).shape[1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int)):
        raise Differs("FX204", "the number of heads is symbolic")
    if heads % kv_heads or (heads != kv_heads and value_of(key).shape[1] not in (heads, kv_heads)):
        raise Differs("FX102", f"{heads} query heads do not divide into {kv_heads} KV heads")
    if not same(q.shape[0], value_of(bare_key).shape[0]):
        raise Differs("FX102", "query and key have different batch sizes")
    for bias in biases:
        if not isinstance(bias.node, fx.Node) or not isinstance(value_of(bias.node), torch.Tensor):
            raise Differs("FX203", "the mask is not a tensor")
        if value_of(bias.node).ndim > 4:
            raise Differs("FX203", f"the mask has {value_of(bias.node).ndim} dimensions")
    return AttentionSite(
        output, form, query, bare_key, bare_value, scale, biases, is_causal, soft_cap, sinks, (key, value),
        interior=interior,
    )


def unrepeated(node: fx.Node) -> fx.Node:
    """[B, Hkv, S, D] behind [B, Hkv * G, S, D] that repeats every head G times in a row; `node` itself otherwise."""
    full = value_of(node)
    inner = node
    while name_of(inner) == "contiguous":
        inner = inner.args[0]  # type: ignore[assignment]
    name = name_of(inner)
    if name == "repeat_interleave":
        source, dim = inner.args[0], argument(inner, 2, "dim")
        if isinstance(source, fx.Node) and dim in (1, -3) and isinstance(argument(inner, 1, "repeats"), int):
            return source
        return node
    if name == "expand" and isinstance(inner.args[0], fx.Node) and is_tensor(inner.args[0], 4):
        source = inner.args[0]
        shape = value_of(source).shape
        if shape[1] == 1 and all(same(a, b) for i, (a, b) in enumerate(zip(shape, full.shape, strict=True)) if i != 1):
            return source
        return node
    if name not in ("reshape", "view", "flatten"):
        return node
    expanded = inner.args[0]
    if name_of(expanded) != "expand" or not is_tensor(expanded, 5):
        return node
    inserted = expanded.args[0]  # type: ignore[union-attr]
    if name_of(inserted) == "unsqueeze":
        fits = argument(inserted, 1, "dim") in (2, -3)  # type: ignore[arg-type]
    else:
        everything = slice(None, None, None)
        index = inserted.args[1] if name_of(inserted) == "getitem" else ()  # type: ignore[union-attr]
        fits = (
            isinstance(index, tuple)
            and index[:3] == (everything, everything, None)
            and all(i == everything or i is Ellipsis for i in index[3:])
        )
    if not fits:
        return node
    source = inserted.args[0]  # type: ignore[union-attr]
    if not is_tensor(source, 4):
        return node
    small, wide = value_of(source).shape, value_of(expanded).shape
    repeats = all(same(a, b) for a, b in zip(small, (wide[0], wide[1], wide[3], wide[4]), strict=True))
    merged = all(same(a, b) for a, b in zip(full.shape, (wide[0], wide[1] * wide[2], wide[3], wide[4]), strict=True))
    return source if repeats and merged else node  # type: ignore[return-value]
