"""Queries and keys that are RMS-normalised and then rotated: their scores are bounded by the norms' weights alone.

    x -> x * rsqrt(mean(x^2) + eps) -> * weight -> n * cos + rotate_half(n) * sin -> query or key

The normalised vector has at most length sqrt(D), the weight stretches it by at most max|weight|, a rotation keeps its
length. So |score| <= scale * D * max|g_q| * max|g_k| (Qwen3, Gemma 3; found here by what the graph computes). The
weights are read where they are and as they are in each step, so that a changed weight changes the bound.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.passes.attention import AttentionSite
from fxopt.passes.nodes import argument, is_tensor, name_of, number_of, value_of
from fxopt.passes.rewriter import Rewriter

_SAME_VECTORS = frozenset("to float half bfloat16 double type type_as contiguous clone transpose permute".split())
_RESHAPES = frozenset("view reshape unflatten flatten".split())


@dataclass(frozen=True)
class Normalised:
    """Vectors of at most ``rotary_scale * sqrt(D) * max|factor|``."""

    factor: fx.Node
    """What the normalised channels are multiplied with, [D]."""
    rotary_scale: float = 1.0


def score_bound(site: AttentionSite, keys: fx.Node, rewriter: Rewriter) -> fx.Node | None:
    """Nodes before `site` for the largest |score| of its queries with such `keys`, [] float32; None if not bounded.

    It is what :func:`fxopt.codegen.kernels.phi.qk_norm_bound` computes.
    """
    width = value_of(site.query).shape[3]
    query, key = normalised(site.query), normalised(keys)
    if query is None or key is None or not isinstance(width, int):
        return None

    def largest(factor: fx.Node) -> fx.Node:
        absolute = rewriter.method("abs", (rewriter.method("float", (factor,), like=site.output),), like=site.output)
        return rewriter.method("amax", (absolute,), like=site.output)

    product = rewriter.call(operator.mul, (largest(query.factor), largest(key.factor)), like=site.output)
    known = abs(site.scale) * width * query.rotary_scale * key.rotary_scale
    return rewriter.call(operator.mul, (product, known), like=site.output)


def normalised(node: fx.Node) -> Normalised | None:
    """How the vectors along the last dimension of `node`, [..., D], were normalised; None if that cannot be seen."""
    width = value_of(node).shape[-1]
    node = _same_vectors(node, width)
    rotation = _unrotated(node)
    if rotation is not None:
        node, scale = _same_vectors(rotation[0], width), rotation[1]
    else:
        scale = 1.0
    if name_of(node) == "rms_norm":
        factor = argument(node, 2, "weight")
        fits = list(argument(node, 1, "normalized_shape") or ()) == [width]
        return Normalised(factor, scale) if fits and is_tensor(factor, 1) else None
    if name_of(node) != "mul":
        return None
    for factor, inner in (node.args[:2], node.args[1::-1]):
        if is_tensor(factor, 1) and isinstance(inner, fx.Node) and _is_unit(_same_vectors(inner, width), width):
            assert isinstance(factor, fx.Node)
            return Normalised(factor, scale)
    return None


def _same_vectors(node: fx.Node, width: Any) -> fx.Node:
    """`node` without casts and views that keep each vector of `width` channels together."""
    while True:
        name = name_of(node)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or name not in _SAME_VECTORS | _RESHAPES:
            return node
        if name in ("transpose", "permute"):
            last = value_of(node).ndim - 1
            moved = node.args[1:] if name == "transpose" else node.args[-1:]
            if name == "transpose" and any(a in (-1, last) for a in moved):
                return node
            order = node.args[1] if len(node.args) == 2 else node.args[1:]
            if name == "permute" and order[-1] not in (-1, last):  # type: ignore[index]
                return node
        if name in _RESHAPES and (value_of(node).shape[-1] != width or value_of(source).shape[-1] != width):
            return node
        node = source


def _is_unit(node: fx.Node, width: Any) -> bool:
    """Whether `node` is ``x * rsqrt(mean(x^2, -1) + eps)`` over `width` channels."""
    if name_of(node) != "mul" or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return False
    for x, factor in (node.args[:2], node.args[1::-1]):
        if name_of(factor) != "rsqrt" or value_of(x).shape[-1] != width:
            continue
        shifted = factor.args[0]  # type: ignore[union-attr]
        mean, eps = (*shifted.args[:2], None, None)[:2] if name_of(shifted) == "add" else (shifted, 0.0)  # type: ignore
        number = number_of(eps)
        if name_of(mean) != "mean" or number is None or number < 0:
            continue
        dim, keeps = argument(mean, 1, "dim"), argument(mean, 2, "keepdim", False)
        square = mean.args[0]
        squared = (name_of(square) == "pow" and argument(square, 1, "exponent") == 2) or (
            name_of(square) == "mul" and square.args[0] is square.args[1]
        )
        if squared and square.args[0] is x and dim in (-1, (-1,), [-1]) and keeps is True:
            return True
    return False


def _unrotated(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(n, |s|) of ``n * (s cos e) + rotate_half(n) * (s sin e)``, where both halves of e are the same."""
    if name_of(node) != "add" or not all(name_of(a) == "mul" for a in node.args[:2]):
        return None
    plain, turned = node.args[:2]
    if _half_turned(turned.args[0]) is None:  # type: ignore[union-attr]
        plain, turned = turned, plain
    source = _half_turned(turned.args[0])  # type: ignore[union-attr]
    if source is None or plain.args[0] is not source:  # type: ignore[union-attr]
        return None
    cosine, sine = _angle(plain.args[1], "cos"), _angle(turned.args[1], "sin")  # type: ignore[union-attr]
    if cosine is None or cosine != sine:
        return None
    return source, abs(cosine[1])


def _half_turned(node: Any) -> fx.Node | None:
    """n of ``cat((-n[..., D/2:], n[..., :D/2]), -1)``."""
    if name_of(node) != "cat" or argument(node, 1, "dim") not in (-1, value_of(node).ndim - 1):
        return None
    parts = argument(node, 0, "tensors")
    if len(parts) != 2 or name_of(parts[0]) != "neg":
        return None
    second, first = parts[0].args[0], parts[1]
    if name_of(second) != "getitem" or name_of(first) != "getitem" or second.args[0] is not first.args[0]:
        return None
    half = value_of(node).shape[-1] // 2
    cuts = [_last_slice(first), _last_slice(second)]
    fits = cuts == [slice(None, half), slice(half, None)] and value_of(first).shape == value_of(second).shape
    return first.args[0] if fits else None


def _last_slice(node: fx.Node) -> Any:
    index: Any = node.args[1]
    return index[1] if isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis else None


def _angle(node: Any, function: str) -> tuple[fx.Node, float] | None:
    """(e, s) of ``s * function(e)`` behind casts and inserted dimensions, where e is ``cat((f, f), -1)``."""
    scale = 1.0
    while isinstance(node, fx.Node) and (name := name_of(node)) != function:
        if name == "mul":
            number = number_of(node.args[1])
            if number is None:
                return None
            scale *= number
        elif name not in ("to", "float", "type_as", "unsqueeze", "contiguous"):
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    angles = node.args[0]
    if name_of(angles) != "cat" or argument(angles, 1, "dim") != -1:  # type: ignore[arg-type]
        return None
    halves = argument(angles, 0, "tensors")  # type: ignore[arg-type]
    return (angles, scale) if len(halves) == 2 and halves[0] is halves[1] else None  # type: ignore[return-value]
