"""How many tokens the routed layers compute, by layer and place: counted on the device, while watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.passes.mod_reference import Router, routers

BEGINS = (0, *(1 << n for n in range(20)))
"""Where the counted ranges of places begin: 0, 1, 2, 4, 8, ..."""


def observe(router: Router, member: Tensor, real: Tensor | None, start: Any = 0) -> None:
    """Keep and count which tokens are computed; ``member, real: [B, S]`` (bool), the first at place `start`.

    Nothing waits for the device here.
    """
    router.routes = member
    if router.counts is None or router.counts.device != member.device:
        router.counts = torch.zeros(2, len(BEGINS), dtype=torch.int64, device=member.device)
    places = torch.arange(member.shape[1], device=member.device) + start
    bounds = torch.tensor(BEGINS[1:], device=member.device)
    seen = torch.ones_like(member) if real is None else real.expand_as(member)
    router.counts.index_add_(1, torch.bucketize(places, bounds, right=True), torch.stack([seen.sum(0), member.sum(0)]))


def routing(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What was counted while the model was last watched, by the path of the layer; reads the device.

    ``tokens`` and ``routed``: how many were seen and computed; ``fraction`` of them; ``by_place``: pairs of the
    place in the sequence where a range begins (0, 1, 2, 4, 8, ...) and the fraction in it.
    """
    found = {}
    for path, router in routers(model).items():
        if router.counts is None:
            continue
        seen, taken = router.counts.tolist()
        by_place = [[begin, t / s] for begin, s, t in zip(BEGINS, seen, taken, strict=True) if s]
        total = sum(seen)
        found[path] = {"tokens": total, "routed": sum(taken), "fraction": sum(taken) / total if total else 0.0,
                       "by_place": by_place}  # fmt: skip
    return found


def routing_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each layer of :func:`routing`, for the report."""
    width = max(map(len, found), default=0)
    lines = []
    for path, counted in found.items():
        places = "  ".join(f"{begin}: {share:.0%}" for begin, share in counted["by_place"][-6:])
        lines.append(f"  {path:<{width}}  {counted['fraction']:.1%} of {counted['tokens']} tokens; from place {places}")
    return lines


@contextmanager
def watching(model: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Record which tokens are computed: yields a function to ``{layer path: [B, S] bool}`` of the last forward.

    All forwards are counted, from zero, and stay in ``fxopt.report(model)`` until the model is watched again.
    """
    found = routers(model)
    for router in found.values():
        router.watched = True
        router.counts = None
    try:
        yield lambda: {path: router.routes for path, router in found.items() if router.routes is not None}
    finally:
        for router in found.values():
            router.watched = False
            router.routes = None
