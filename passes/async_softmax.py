"""Asynchronous softmax: split-KV decode attention in generated kernels, with one maximum for all splits.

FlashDecoding (one program per KV head and split of the cache) needs each split's maximum before the splits can be
summed. FlashDecoding++ (arXiv 2311.01282) subtracts one number phi in all of them instead: softmax does not change, and
numerators and denominators of the splits are plain sums. A row for which phi does not fit (it says so itself, by its
maximum and its denominator) is computed again with online softmax, on the device, so that the result is always right.

    fxopt.attention(query, keys, values, mask=mask, extent=extent)
becomes, on CUDA and ROCm
    fxopt.decode_attention(query, keys, values, mask=mask, extent=extent, phi=phi)

phi comes from, in this order: the number that was given; a soft-cap, which bounds all scores (certified); the score of
each row's newest key, computed in this step. Where none is to be had (cross-attention) the kernel is the online one.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from fxopt.codegen import lowering
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.attention_variants import DecodeAttention
from fxopt.codegen.kernels.phi import certified_phi
from fxopt.passes.attention import AttentionSite, find_attentions
from fxopt.passes.attention_rewrite import earliest, mask_node, records_gradients, replace_output
from fxopt.passes.context import PassContext
from fxopt.passes.kv import cache_of, written_between
from fxopt.passes.nodes import name_of, same, value_of
from fxopt.passes.technique import SettingError, Technique


@dataclass(frozen=True)
class AsyncSoftmax(Technique):
    """Decode attention with a unified maximum (exact; its meaning is the model itself).

    Args:
        phi: the unified maximum in units of the scores, or ``"auto"``. A bad number costs time and no accuracy.
        deterministic: splits of a fixed size, so that a row's result depends, bit for bit, on no other row of the batch
            and on no total length. ``False`` fits the splits to the device.
    """

    name: ClassVar[str] = "async_softmax"
    exact: ClassVar[bool] = True

    phi: float | Literal["auto"] = "auto"
    deterministic: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.phi, (int, float)) and not isinstance(self.phi, bool)
        if self.phi != "auto" and not (number and math.isfinite(self.phi)):  # type: ignore[arg-type]
            raise SettingError(
                f"AsyncSoftmax(phi={self.phi!r}): phi is 'auto' or a finite number in units of the scores after "
                "scaling, such as 6.5. Leave it out to have it chosen."
            )
        if not isinstance(self.deterministic, bool):
            raise SettingError(
                f"AsyncSoftmax(deterministic={self.deterministic!r}): allowed are True (splits of a fixed size) and "
                "False (splits fitted to the device)."
            )

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Lower every decode attention on a device that has kernels."""
        for site in find_attentions(graph)[0]:
            if context.covers(site.output):
                self._lower(site, context)

    def _lower(self, site: AttentionSite, context: PassContext) -> None:
        refusal = self._refusal(site)
        if refusal is not None:
            status, code, message = refusal
            (context.blocked if status == "blocked" else context.missed)(code, site.output, message)
            return
        pairs = value_of(site.query).shape[0] * site.kv_heads
        fitted = not self.deterministic and isinstance(site.length, int) and isinstance(pairs, int)
        split = lowering.fitted_split(site.length, pairs, site.device) if fitted else lowering.SPLIT_SIZE
        mask = mask_node(site, context.rewriter)
        extent = site.output.kwargs.get("extent") if site.form == "fxopt" else None
        tensors = [value_of(t) for t in (site.query, site.key, site.value, mask, extent, site.sinks)]
        try:
            variant = lowering.describe(*tensors, unified=True, soft_cap=site.soft_cap, split_size=split)
        except Unsupported as reason:
            context.rewriter.erase([mask] if mask is not None and mask not in [b.node for b in site.biases] else [])
            context.missed("FX303", site.output, str(reason))
            return
        phi, origin = self._phi(site, variant, context)
        options = {
            "mask": mask, "extent": extent, "sinks": site.sinks, "phi": phi, "scale": site.scale,
            "soft_cap": site.soft_cap, "split_size": split,
        }  # fmt: skip
        new = context.rewriter.call(
            torch.ops.fxopt.decode_attention.default, (site.query, site.key, site.value),
            {name: value for name, value in options.items() if value is not None},
            like=site.output, before=site.output,
        )  # fmt: skip
        replace_output(site, new, context.rewriter)
        context.applied(new, f"{site.describe()}: {origin}, splits of {split} positions")

    def _refusal(self, site: AttentionSite) -> tuple[str, str, str] | None:
        if site.device.type not in lowering.KERNEL_DEVICES:
            return "blocked", "FX207", f"the kernels need CUDA or ROCm, this is {site.device.type}"
        if records_gradients(site):
            return "blocked", "FX205", "gradients are recorded; the kernels have none"
        if not isinstance(site.tokens, int) or site.tokens > lowering.DECODE_TOKENS:
            return "missed", "FX503", f"{site.tokens} new tokens; decode is at most {lowering.DECODE_TOKENS}"
        if site.is_causal:
            return "missed", "FX503", "a prompt from its first token on; the library's flash attention keeps it"
        write = written_between((site.query, site.key, site.value), earliest(site), site.output)
        if write is not None:
            return "blocked", "FX206", f"{write.name} writes the cache while it is being attended to"
        return None

    def _phi(self, site: AttentionSite, variant: DecodeAttention, context: PassContext) -> tuple[fx.Node | None, str]:
        """(a node [Hkv] or [B, Hq, T], or None for online softmax; where it comes from)."""

        def constant(number: float) -> fx.Node:
            options = {"dtype": torch.float32, "device": site.device}
            return context.rewriter.call(torch.full, ((site.kv_heads,), number), options, like=site.output)

        if self.phi != "auto":
            return constant(float(self.phi)), f"phi {float(self.phi):g} as given"
        if site.soft_cap:
            chosen = certified_phi(site.soft_cap, variant.weight_dtype)
            if chosen is not None:
                # A bool mask takes scores away; an additive one may also raise them, which the guard then sees.
                how = "from" if variant.mask == "additive" or site.sinks is not None else "certified by"
                return constant(chosen), f"phi {chosen:g}, {how} the soft-cap {site.soft_cap:g}"
        newest = newest_key(site)
        if newest is None:
            return None, "online softmax (nothing to take phi from)"
        return _newest_key_phi(site, newest, context), "phi from each row's newest key"


def newest_key(site: AttentionSite) -> fx.Node | None:
    """The keys [B, Hkv, T, D] of the new tokens on their way into the cache; None where they are not to be found."""
    cache = cache_of(site)
    found: object = None
    if name_of(cache.key) == "cat":
        parts = cache.key.args[0]
        found = parts[-1] if isinstance(parts, (list, tuple)) and len(parts) == 2 else None
    for write in cache.writes:
        if write.all_input_nodes[0] is cache.key and name_of(write) == "index_copy_" and write.args[1] in (2, -2):
            found = write.args[3]
    if not isinstance(found, fx.Node):
        return None
    shape, query = value_of(found).shape, value_of(site.query).shape
    wanted = (query[0], site.kv_heads, query[2], query[3])
    fits = len(shape) == 4 and all(same(a, b) for a, b in zip(shape, wanted, strict=True))
    return found if fits else None


def _newest_key_phi(site: AttentionSite, newest: fx.Node, context: PassContext) -> fx.Node:
    """Nodes for :func:`fxopt.codegen.kernels.phi.newest_key_phi`, which Inductor fuses with what makes q and k."""
    rewriter, like = context.rewriter, site.output
    grouped = rewriter.method(
        "unflatten", (rewriter.method("float", (site.query,), like=like), 1, (site.kv_heads, site.group)), like=like
    )
    keys = rewriter.method("unsqueeze", (rewriter.method("float", (newest,), like=like), 2), like=like)
    scores = rewriter.method("sum", (rewriter.call(operator.mul, (grouped, keys), like=like), -1), like=like)
    scores = rewriter.call(operator.mul, (rewriter.method("flatten", (scores, 1, 2), like=like), site.scale), like=like)
    if site.soft_cap:
        inner = rewriter.call(
            torch.tanh, (rewriter.call(operator.truediv, (scores, site.soft_cap), like=like),), like=like
        )
        scores = rewriter.call(operator.mul, (inner, site.soft_cap), like=like)
    return scores
