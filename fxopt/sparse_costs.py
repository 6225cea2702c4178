"""Seconds of one attention of a decode step by setting: timed on a CPU, by the roofline on a GPU.

A roofline knows bytes, not calls. Where a layer's keys and values are few, choosing among them takes longer than
reading them; on a CPU that is timed in a quarter of a minute.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxopt import scoring
from fxopt.codegen import roofline
from fxopt.compiler import compile as fxopt_compile
from fxopt.passes.sparse_attention import SparseAttention

LAYERS = 4
"""Attentions of a step, each on a cache of its own, so that none finds its keys where the last step left them."""
ROUNDS = 32
SPAN = 32
"""Last positions of the cache that are written in turn, so that state is kept and not made anew."""


TIMED, BY_ROOFLINE = "timed here", "by the roofline"


def costs(
    model: Any, options: Mapping[int, Sequence[SparseAttention]], length: int, show: bool
) -> tuple[dict[int, list[float]], str]:
    """For each layer seconds of its candidates, and of exact attention last; and how they are known.

    Batch 1, a cache of `length` positions that is full. Where timing finds nothing that is faster than exact attention,
    the roofline decides, with a warning.
    """
    config, parameter = model.config.get_text_config(), next(model.parameters())
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if parameter.device.type == "cpu" and options:
        settings = next(iter(options.values()))  # what differs between layers, the channels, takes no time
        found = timed(settings, heads, kv_heads, width, length, parameter.dtype, show)
        if min(found) < found[-1]:
            return dict.fromkeys(options, found), TIMED
        fastest = settings[min(range(len(settings)), key=found.__getitem__)]
        warnings.warn(
            f"tune(): at {length} positions nothing is faster here than exact attention ({found[-1] * 1e6:.0f} "
            f"microseconds a layer; {fastest.method} {min(found[:-1]) * 1e6:.0f}). The choice is made by bytes: "
            "it pays on longer caches (context=), larger heads or a GPU.",
            stacklevel=4,
        )
    device, dtype = roofline.current_device(parameter.device), str(parameter.dtype).removeprefix("torch.")
    sizes = {"B": 1, "L": length, "H": heads, "G": kv_heads, "D": width}
    size = parameter.element_size()

    def seconds(cost: roofline.Cost) -> float:
        flops, moved = cost.at(**sizes)
        return roofline.estimate(flops, moved, device, dtype if dtype in device.flops else "float32")

    def of(setting: SparseAttention) -> float:
        assert setting.budget is not None
        elements = setting.chosen_by.state_elements(setting, width)
        return seconds(roofline.attention_chosen(size, setting.budget * length, elements))

    exact = seconds(roofline.attention_decode(size))
    return {layer: [*map(of, settings), exact] for layer, settings in options.items()}, BY_ROOFLINE


class Attentions(nn.Module):
    """Decode attentions as Hugging Face hands them to a compiler; the result of each is the query of the next."""

    def __init__(self, heads: int, kv_heads: int, width: int, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.group = heads // kv_heads
        generator = torch.Generator().manual_seed(0)
        for number in range(LAYERS):
            for name in ("keys", "values"):
                cache = torch.randn(1, kv_heads, length, width, generator=generator).to(dtype)
                self.register_buffer(f"{name}_{number}", cache)

    def forward(self, query: Tensor, new: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        """query: [1, Hq, 1, D], new: [1, Hkv, 1, D], place: [1], mask: [1, 1, 1, S]"""
        for number in range(LAYERS):
            keys, values = (getattr(self, f"{name}_{number}") for name in ("keys", "values"))
            keys.index_copy_(2, place, new)
            values.index_copy_(2, place, new)
            if self.group > 1:
                keys, values = (own.repeat_interleave(self.group, 1) for own in (keys, values))
            query = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return query


def timed(
    settings: Sequence[SparseAttention], heads: int, kv_heads: int, width: int, length: int, dtype: torch.dtype,
    show: bool,
) -> list[float]:  # fmt: skip
    """Of each setting, and of exact attention last; batch 1, a cache of `length` positions that is full.

    Of each method the smallest and the largest budget are timed, compiled and in turn; budgets between lie on a line.
    """
    budgets: dict[str, list[float]] = {}
    for setting in settings:
        budgets.setdefault(str(setting.method), []).append(float(setting.budget or 0))
    ends = {(method, end(own)): None for method, own in budgets.items() for end in (min, max)}
    chosen = [next(s for s in settings if (s.method, s.budget) == (method, budget)) for method, budget in ends]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):  # type: ignore[attr-defined]
        forms = [
            fxopt_compile(Attentions(heads, kv_heads, width, length, dtype), *own)
            for own in (*([setting] for setting in chosen), [])
        ]
        steps = [_steps(form, heads, kv_heads, width, length, dtype) for form in forms]
        for step in scoring.progress(steps, len(steps), "compiling attention", show):
            with (
                warnings.catch_warnings()
            ):  # a setting that cannot act on so short a cache is no faster, and that is all
                warnings.simplefilter("ignore")
                step()
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(ROUNDS):
            for step, own_times in zip(steps, times, strict=True):
                began = time.perf_counter()
                step()
                own_times.append((time.perf_counter() - began) / LAYERS)
    *of_ends, exact = map(min, times)  # other work on the machine only adds
    known = dict(zip(ends, of_ends, strict=True))
    found = []
    for setting in settings:
        method, budget = str(setting.method), float(setting.budget or 0)
        low, high = min(budgets[method]), max(budgets[method])
        share = (budget - low) / (high - low) if high > low else 0.0
        found.append((1 - share) * known[method, low] + share * known[method, high])
    return [*found, exact]


def _steps(
    form: nn.Module, heads: int, kv_heads: int, width: int, length: int, dtype: torch.dtype
) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, new = (torch.randn(1, count, 1, width, generator=generator).to(dtype) for count in (heads, kv_heads))
    span = min(SPAN, length)
    places = [torch.tensor([length - span + number]) for number in range(span)]
    masks = [(torch.arange(length) <= place)[None, None, None] for place in places]
    number = 0

    def step() -> Tensor:
        nonlocal number
        number = (number + 1) % span
        result: Tensor = form(query, new, places[number], masks[number])
        return result

    return step
