"""Sparse attention: in decode steps each head reads a chosen part of the KV cache instead of all of it.

    attention(query, keys, values, mask)                          # one new token, S keys
becomes
    index = fxopt.window_positions(keys, mask, ...)               # once for all layers that share the mask
    fxopt.gathered_attention(query, keys, values, index, mask)    # reads K positions

Prompts, chunks and verification of several tokens stay dense. One file a method: :mod:`.sink_window`, :mod:`.pages`,
:mod:`.double_sparsity`; what those share that choose by a score is :mod:`.selection`; the meaning in plain PyTorch is
:mod:`.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from fxopt.passes import depth, kv_policy, state
from fxopt.passes.attention import AttentionSite, find_attentions
from fxopt.passes.attention_rewrite import earliest, in_turn, records_gradients
from fxopt.passes.context import PassContext
from fxopt.passes.kv import base_of, cache_of, writes_to, written_between
from fxopt.passes.modules import module_stacks
from fxopt.passes.nodes import same, value_of
from fxopt.passes.sparse_attention import double_sparsity, own, pages, settings, sink_window
from fxopt.passes.sparse_attention.reference import attach
from fxopt.passes.technique import SettingError, Technique, nearest

METHODS: dict[str, Any] = {"sink_window": sink_window, "pages": pages, "double_sparsity": double_sparsity}


@dataclass(frozen=True)
class SparseAttention(Technique):
    """Read a chosen part of the cache when decoding (approximate; ``fxopt.reference`` says what is computed).

    Args:
        method: ``"sink_window"``: the first `sinks` and the last `window` positions of each row (StreamingLLM, arXiv
            2309.17453, positions as in the cache). ``"pages"``: pages of 16 tokens by an upper bound of their scores
            (Quest, arXiv 2406.10774). ``"double_sparsity"``: tokens by their scores on a few calibrated channels (arXiv
            2408.07092). The last two keep state beside a static cache and choose one list for each KV head.
        budget: how much of the cache a head reads: an int in tokens, sinks and newest included, or a float in (0, 1],
            the share of the cache's length (its capacity, for a static cache).
        sinks: first positions that are always read.
        window: for ``"sink_window"``, the newest positions that are read, instead of `budget`.
        rolling: for ``"sink_window"``, a static cache of ``sinks + window`` rows holds a conversation of any length;
            positions count inside it, as in the paper, see :mod:`.rolling`.
        tau: of what `budget` allows, a head reads the fewest best tokens or pages that together hold this share of the
            softmax of their approximate scores (top-p, Twilight, arXiv 2502.02770); None reads all of the budget.
        min_length: caches filled with fewer positions are read in full; None is the method's own choice.
        layers: 0-based indices of the layers it acts on, negative from the end; None is all.
        heads: KV heads, negative from the end. A tuple of indices: it acts on these and the others read everything
            (retrieval heads, DuoAttention, arXiv 2410.10819). A mapping ``{index: budget}``: these have a budget of
            their own, 1.0 for everything, and the others that of the setting. None is all.
        select: instead of a method, a traced function ``(q, keys, state) -> scores or indices``, see :mod:`.own`.
        channels: for ``"double_sparsity"``, how many to calibrate (None: a sixteenth of a head's, at least 8), or one
            tuple of channels for each KV head, as a recipe of ``fxopt.tune`` holds them.
        bits: for ``"double_sparsity"``, 8 or 4: labels are quantised (int8, int4); None keeps the cache's dtype.

    Where the budget covers the filled cache the result is that of dense attention. Raises SettingError.
    """

    name: ClassVar[str] = "sparse_attention"
    exact: ClassVar[bool] = False

    method: str = "sink_window"
    budget: int | float | None = None
    sinks: int = 4
    window: int | None = None
    rolling: bool = False
    tau: float | None = None
    min_length: int | None = None
    layers: tuple[int, ...] | None = None
    heads: Any = None
    select: Any = None
    channels: int | tuple[tuple[int, ...], ...] | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingError(
                f"SparseAttention(method={self.method!r}): allowed are {', '.join(map(repr, METHODS))}."
                + nearest(self.method, METHODS)
            )
        settings.check_budget(self.budget)
        settings.check_count("sinks", self.sinks, 0)
        settings.check_count("window", self.window, 1, optional=True)
        settings.check_count("min_length", self.min_length, 0, optional=True)
        if self.layers is not None:
            if not isinstance(self.layers, (tuple, list)) or not all(
                isinstance(i, int) and not isinstance(i, bool) for i in self.layers
            ):
                raise SettingError(
                    f"SparseAttention(layers={self.layers!r}): a tuple of layer indices such as (2, 3, -1), or None."
                )
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers:
                raise SettingError("SparseAttention(layers=()): names no layer. Leave it out to act on all of them.")
        if isinstance(self.channels, (tuple, list)):
            nested = tuple(tuple(c) if isinstance(c, (tuple, list)) else c for c in self.channels)
            object.__setattr__(self, "channels", nested)
        object.__setattr__(self, "heads", settings.normal_heads(self.heads))
        settings.check_tau(self)
        for name in ("channels", "bits"):
            if getattr(self, name) is not None and (self.method != "double_sparsity" or self.select is not None):
                raise SettingError(f"SparseAttention(method={self.method!r}): {name} belongs to double_sparsity.")
        if self.bits not in (None, 4, 8):
            raise SettingError(
                f"SparseAttention(bits={self.bits!r}): allowed are 8, 4, and None for the cache's dtype."
            )
        if not isinstance(self.rolling, bool):
            raise SettingError(f"SparseAttention(rolling={self.rolling!r}): True or False.")
        if self.rolling and (self.method != "sink_window" or self.select is not None):
            raise SettingError(
                f"SparseAttention(method={self.method!r}, rolling=True): only method='sink_window' has a rolling cache."
            )
        self.chosen_by.check(self)

    @property
    def chosen_by(self) -> Any:
        """The module of the method that is used."""
        return METHODS[self.method] if self.select is None else own

    @property
    def dense_below(self) -> int:
        """Filled positions below which attention is dense."""
        return self.chosen_by.MIN_LENGTH if self.min_length is None else self.min_length

    def chosen(self, count: int) -> frozenset[int]:
        """Indices it acts on in a stack of `count` layers; raises SettingError for one that does not exist."""
        if self.layers is None:
            return frozenset(range(count))
        for index in self.layers:
            if not -count <= index < count:
                raise SettingError(
                    f"{self}: layer {index} does not exist; the stack has {count} layers, indices 0 to {count - 1} "
                    f"or {-count} to -1."
                )
        return frozenset(index % count for index in self.layers)

    # -- meaning ------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> Technique:
        if self.layers is not None:
            for stack in module_stacks(model):
                self.chosen(len(stack))
        return self

    def reference(self, model: nn.Module) -> nn.Module:
        """`model` with its decode steps attending to the chosen positions, by a mask: the meaning, at no gain.

        Needs attention that is a ``scaled_dot_product_attention`` call (``model.set_attn_implementation("sdpa")``).
        """
        if self.layers is None:
            attach(model, self)
            return model
        for stack in module_stacks(model):
            for index in self.chosen(len(stack)):
                attach(stack.layers[index], self)
        return model

    # -- rewrite ------------------------------------------------------------------------------------------------

    def rewrite(self, graph: fx.Graph, context: PassContext) -> None:
        """Replace the attention of every decode step on a cache."""
        sites, near = find_attentions(graph)
        for difference in near:
            if context.covers(difference.node):
                context.missed(difference.code, difference.node, difference.message)
        clash = kv_policy.conflict(self.name, context.in_use)
        if clash is not None:
            raise SettingError(f"{self} together with {clash[0]!r}: {clash[1]}. Remove one of the two.")
        if not sites and not near:
            for stack in context.structure.stacks:
                message = "no softmax attention over keys and values in these layers (linear attention, state space)"
                context.blocked("FX208", stack.path, f"{message}: nothing to choose from")
            if not context.structure.stacks:  # a model without attention, or what a graph break left beside it
                context.note("", "no attention in this graph")
        elif not any(context.covers(n) for n in (*(s.output for s in sites), *(d.node for d in near))):
            context.missed("FX505", "", "the setting covers no attention of this graph; name the modules that hold it")
        numbers = self._numbers(context) if self.layers is not None else {}
        shared: dict[Any, Any] = {}
        method = self.chosen_by
        for site in in_turn(sites, context.rewriter):
            if not context.covers(site.output):
                continue
            if self.layers is not None:
                chosen = numbers.get(site.output)
                if chosen is None:
                    message = "the number of this layer is not known; compile the whole model"
                    context.missed("FX505", site.output, message)
                    continue
                if not chosen:
                    context.note(site.output, "not one of the chosen layers: dense")
                    continue
            refusal = _refusal(site)
            if refusal is not None:
                _tell_state(site)
                status, code, message = refusal
                (context.blocked if status == "blocked" else context.missed)(code, site.output, message)
                continue
            method.rewrite(site, self, context, shared)

    def _numbers(self, context: PassContext) -> dict[fx.Node, bool]:
        """Whether each node's layer is one of those chosen; nodes of layers whose number is unknown are left out."""
        found: dict[fx.Node, bool] = {}
        assert self.layers is not None
        for stack in context.structure.stacks:
            if not depth.is_placed(stack):
                continue
            if depth.is_partial(stack, context.graph):
                if any(i < 0 for i in self.layers):
                    continue
                chosen = frozenset(self.layers)
            else:
                chosen = self.chosen(1 + max(layer.index for layer in stack.layers))
            found.update((node, layer.index in chosen) for layer in stack.layers for node in layer.nodes)
        return found


def _tell_state(site: AttentionSite) -> None:
    """A graph that writes a cache and does not keep the state beside it has to say so."""
    cache = cache_of(site)
    if cache.preallocated and cache.key.op == "placeholder":
        state.writes(cache.key)


def _refusal(site: AttentionSite) -> tuple[str, str, str] | None:
    if records_gradients(site):
        return "blocked", "FX205", "gradients are recorded; attention stays exact while training"
    if not (isinstance(site.tokens, int) and site.tokens == 1):
        return "missed", "FX503", f"{site.describe()}: dense, as everything but a step of one new token"
    cache = cache_of(site)
    if cache.kind in ("none", "fixed"):
        where = "computed in this step" if cache.kind == "none" else "inputs that the step does not extend"
        return "missed", "FX208", f"keys and values are {where}; sparse attention reads a KV cache"
    widths = value_of(site.key).shape[3], value_of(site.value).shape[3]
    if not same(*widths):
        what = "multi-head latent attention: only a part of a key's channels is rotated, and keys are expanded from one"
        return "blocked", "FX208", f"keys of {widths[0]} and values of {widths[1]} channels, as in {what}"
    if site.is_causal:
        return "missed", "FX203", "is_causal with one token lets it see the first key alone"
    write = written_between((site.query, site.key, site.value), earliest(site), site.output)
    if write is not None:
        return "blocked", "FX206", f"{write.name} writes the cache while it is being attended to"
    if not all(same(value_of(bias.node).shape[-1], site.length) for bias in site.biases):
        return "missed", "FX203", "the mask has another length than the keys"
    if writes_to(*(base_of(bias.node) for bias in site.biases)):
        return "blocked", "FX206", "the mask is written in place"
    return None
