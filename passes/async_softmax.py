"""Asynchronous softmax: split-KV decode attention in generated kernels, with one maximum for all splits.

FlashDecoding (one program per KV head and split of the cache) needs each split's maximum before the splits can be
summed. FlashDecoding++ (arXiv 2311.01282) subtracts one number phi in all of them instead: softmax does not change, and
numerators and denominators of the splits are plain sums. A row for which phi does not fit (it says so itself, by its
maximum and its denominator) is computed again with online softmax, on the device, so that the result is always right.

    fxopt.attention(query, keys, values, mask=mask, extent=extent)
becomes, on CUDA and ROCm
    fxopt.decode_attention(query, keys, values, mask=mask, extent=extent, phi=phi)

phi comes from, in this order:

- the number that was given;
- a certificate: a soft-cap bounds all scores, and so do normalised queries and keys (``passes/qk_norm.py``; that bound
  is computed on the device from the norms' weights as they are in this step, and is in the report, since trained
  weights may make it loose: where it leaves no room the next source is taken, on the device too);
- the calibrated range of the row maxima of each KV head (``fxopt.tune``); a range that no phi fits gets online softmax;
- the score of each row's newest key, computed in this step.

Where none is to be had (cross-attention) the kernel is the online one.
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
from fxopt.codegen.kernels.phi import certified_phi, fits, largest_certified, place
from fxopt.passes.attention import AttentionSite, find_attentions
from fxopt.passes.attention_rewrite import earliest, in_turn, mask_node, records_gradients, replace_output
from fxopt.passes.context import PassContext
from fxopt.passes.counters import RecomputeCounter
from fxopt.passes.kv import cache_of, written_between
from fxopt.passes.nodes import name_of, same, value_of
from fxopt.passes.qk_norm import score_bound
from fxopt.passes.technique import SettingError, Technique


@dataclass(frozen=True)
class AsyncSoftmax(Technique):
    """Decode attention with a unified maximum (exact; its meaning is the model itself).

    Args:
        phi: the unified maximum in units of the scores, ``"auto"``, or ``"online"`` for kernels with online softmax. A
            bad number costs time and no accuracy.
        deterministic: splits of a fixed size, so that a row's result depends, bit for bit, on no other row of the batch
            and on no total length. ``False`` fits the splits to the device.
        ranges: calibrated (lowest, highest) row maximum of each KV head, as ``fxopt.tune`` writes them into a recipe.
    """

    name: ClassVar[str] = "async_softmax"
    exact: ClassVar[bool] = True

    phi: float | Literal["auto", "online"] = "auto"
    deterministic: bool = True
    ranges: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        number = isinstance(self.phi, (int, float)) and not isinstance(self.phi, bool)
        if self.phi not in ("auto", "online") and not (number and math.isfinite(self.phi)):  # type: ignore[arg-type]
            raise SettingError(
                f"AsyncSoftmax(phi={self.phi!r}): phi is 'auto', 'online' or a finite number in units of the scores "
                "after scaling, such as 6.5. Leave it out to have it chosen."
            )
        if not isinstance(self.deterministic, bool):
            raise SettingError(
                f"AsyncSoftmax(deterministic={self.deterministic!r}): allowed are True (splits of a fixed size) and "
                "False (splits fitted to the device)."
            )
        try:
            ranges = tuple((float(low), float(high)) for low, high in self.ranges)
            sound = all(math.isfinite(low) and math.isfinite(high) and low <= high for low, high in ranges)
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise SettingError(
                f"AsyncSoftmax(ranges={self.ranges!r}): one (lowest, highest) pair of finite row maxima for each KV "
                "head. Make them with fxopt.tune(model, data)."
            )
        object.__setattr__(self, "ranges", ranges)

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Lower every decode attention on a device that has kernels."""
        counts: list[fx.Node] = []
        bounds: list[fx.Node] = []
        for site in in_turn(find_attentions(graph)[0], context.rewriter):
            if context.covers(site.output):
                counts += self._lower(site, bounds, context)
        if not counts:
            return
        if "early_exit" in context.in_use:
            context.note("", "recomputed rows are not counted: with early exits not every layer runs in each step")
            return
        end = graph.output_node()
        total = context.rewriter.method(
            "sum", (context.rewriter.call(torch.stack, (counts,), like=counts, before=end), 0), like=counts, before=end
        )
        parts = [context.rewriter.method("double", (total,), like=counts, before=end)]
        if bounds:
            stacked = context.rewriter.call(torch.stack, (bounds,), like=bounds, before=end)
            parts.append(context.rewriter.method("double", (stacked,), like=bounds, before=end))
        result = context.rewriter.call(torch.cat, (parts,), like=counts, before=end)
        size = int(value_of(result).shape[0])
        RecomputeCounter(context.record.number).attach(result, size, torch.float64, context.rewriter)

    def _lower(self, site: AttentionSite, bounds: list[fx.Node], context: PassContext) -> list[fx.Node]:
        """Put the lowered operator in the place of a site; the node of its row counts, and its bound into `bounds`."""
        refusal = self._refusal(site)
        if refusal is not None:
            status, code, message = refusal
            (context.blocked if status == "blocked" else context.missed)(code, site.output, message)
            return []
        pairs = value_of(site.query).shape[0] * site.kv_heads
        fitted = not self.deterministic and isinstance(site.length, int) and isinstance(pairs, int)
        split = lowering.fitted_split(site.length, pairs, site.device) if fitted else lowering.SPLIT_SIZE
        mask = mask_node(site, context.rewriter)
        extent = site.output.kwargs.get("extent") if site.form == "fxopt" else None
        tensors = [value_of(t) for t in (site.query, site.key, site.value, mask, extent, site.sinks)]
        try:
            unified = self.phi != "online"
            variant = lowering.describe(*tensors, unified=unified, soft_cap=site.soft_cap, split_size=split)
        except Unsupported as reason:
            context.rewriter.erase([mask] if mask is not None and mask not in [b.node for b in site.biases] else [])
            context.missed("FX303", site.output, str(reason))
            return []
        phi, origin = self._phi(site, variant, bounds, context)
        options = {
            "mask": mask, "extent": extent, "sinks": site.sinks, "phi": phi, "scale": site.scale,
            "soft_cap": site.soft_cap, "split_size": split,
        }  # fmt: skip
        both = context.rewriter.call(
            torch.ops.fxopt.decode_attention.default, (site.query, site.key, site.value),
            {name: value for name, value in options.items() if value is not None},
            like=site.output, before=site.output,
        )  # fmt: skip
        new = context.rewriter.call(operator.getitem, (both, 0), like=site.output, before=site.output)
        counts = context.rewriter.call(operator.getitem, (both, 1), like=site.output, before=site.output)
        replace_output(site, new, context.rewriter)
        context.applied(new, f"{site.describe()}: {origin}, {self._splits(site, split)}")
        return [counts]

    def _splits(self, site: AttentionSite, split: int) -> str:
        """How the cache is split, and what the fixed size costs in parallelism."""
        said = f"splits of {split} positions"
        if self.deterministic and isinstance(site.length, int):
            pairs = value_of(site.query).shape[0] * site.kv_heads
            programs = -(-site.length // split) * pairs
            said += f" whatever the batch and the length ({programs} programs for a full cache)"
        return said

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

    def _phi(
        self, site: AttentionSite, variant: DecodeAttention, bounds: list[fx.Node], context: PassContext
    ) -> tuple[fx.Node | None, str]:
        """(a node [Hkv] or [B, Hq, T], or None for online softmax; where it comes from)."""
        if self.phi == "online":
            return None, "online softmax as asked for"
        if self.phi != "auto":
            return _per_head([float(self.phi)] * site.kv_heads, site, context), f"phi {float(self.phi):g} as given"
        # A bool mask takes scores away; an additive one may also raise them, which the guard then sees.
        how = "from" if variant.mask == "additive" or site.sinks is not None else "certified by"
        if site.soft_cap:
            chosen = certified_phi(site.soft_cap, variant.weight_dtype)
            if chosen is not None:
                return _per_head([chosen] * site.kv_heads, site, context), (
                    f"phi {chosen:g}, {how} the soft-cap {site.soft_cap:g}"
                )
        newest = newest_key(site)
        estimate, origin = self._estimate(site, variant, newest, context)
        bound = None if newest is None or estimate is None else score_bound(site, newest, context.rewriter)
        if bound is None or estimate is None:
            return estimate, origin
        bounds.append(bound)
        room = largest_certified(variant.weight_dtype)
        fitting = context.rewriter.call(operator.le, (bound, room), like=site.output)
        # Where-not before where: the choice is the device's, from the weights of this step.
        phi = context.rewriter.method(
            "masked_fill", (estimate, fitting, 0.0), like=site.output, before=site.output
        )
        return phi, f"phi 0, {how} the norms of queries and keys while their bound is at most {room:.3g}, else {origin}"

    def _estimate(
        self, site: AttentionSite, variant: DecodeAttention, newest: fx.Node | None, context: PassContext
    ) -> tuple[fx.Node | None, str]:
        """What is taken where nothing is certified."""
        if self.ranges:
            if len(self.ranges) != site.kv_heads:
                raise SettingError(
                    f"{self} has ranges for {len(self.ranges)} KV heads; this attention has {site.kv_heads}. "
                    "Make a recipe for this model with fxopt.tune(model, data)."
                )
            dtype = variant.weight_dtype
            worst = max(self.ranges, key=lambda r: r[1] - r[0])
            if not all(fits(low, high, dtype) for low, high in self.ranges):
                return None, (
                    f"online softmax: calibrated row maxima of {worst[0]:.4g} to {worst[1]:.4g} fit no unified maximum "
                    f"for {dtype}"
                )
            chosen = [place(low, high, dtype) for low, high in self.ranges]
            return _per_head(chosen, site, context), (
                f"phi {min(chosen):.4g} to {max(chosen):.4g} by KV head, calibrated"
            )
        if newest is None:
            return None, "online softmax (nothing to take phi from)"
        return _newest_key_phi(site, newest, context), "phi from each row's newest key"


def _per_head(numbers: list[float], site: AttentionSite, context: PassContext) -> fx.Node:
    """A tensor [Hkv] of these numbers."""
    options = {"dtype": torch.float32, "device": site.device}
    if len(set(numbers)) == 1:
        return context.rewriter.call(torch.full, ((len(numbers),), numbers[0]), options, like=site.output)
    # Made on the device: a tensor of a list would be copied there from the host in every step.
    parts = [context.rewriter.call(torch.full, ((1,), n), options, like=site.output) for n in numbers]
    return context.rewriter.call(torch.cat, (parts,), like=site.output)


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
