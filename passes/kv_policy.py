"""What happens to the keys and values of a layer that did not run, and which technique may use which answer.

Later tokens attend to the positions a layer has seen. When a layer is skipped for a token, its cache still owes an
entry for that position, or a reason why none is needed. All depth techniques answer from this one table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """One answer. ``keeps_cache``: the cache of the layer advances in every step."""

    name: str
    meaning: str
    keeps_cache: bool
    available: bool = True


POLICIES: dict[str, Policy] = {
    p.name: p
    for p in (
        Policy(
            "propagate",
            "the state at the exit goes through each remaining layer's own norm, key and value projections and rotary "
            "embedding at the token's true position; no attention, no MLP",
            keeps_cache=True,
        ),
        Policy(
            "none", "the layer runs for no token of the sequence, so that nobody reads its cache", keeps_cache=False
        ),
        Policy(
            "recompute",
            "missing entries are computed later, together with the next token that runs the layer",
            keeps_cache=True,
            available=False,
        ),
        Policy(
            "project",
            "keys and values are computed at every layer from the running stream; the rest of the layer is skipped",
            keeps_cache=True,
            available=False,
        ),
    )
}

LEGAL: dict[tuple[str, str], str] = {
    ("layer_skip", "none"): "",
    ("layer_skip", "propagate"): "a skipped layer has no exit state: what follows it goes on from its input",
    ("early_exit", "propagate"): "",
    ("early_exit", "none"): "",
    ("mixture_of_depths", "none"): "",
    ("mixture_of_depths", "propagate"): "a token that is not routed to a layer is not attended to there by design",
}
"""(technique, policy) to the reason against it; empty when legal."""

PAIRS: dict[frozenset[str], str] = {
    frozenset(("early_exit", "mixture_of_depths")): (
        "mixture of depths keeps fewer cache rows in its layers than tokens were seen, and an exit that propagates "
        "writes one for every token"
    ),
    frozenset(("sparse_attention", "mixture_of_depths")): (
        "the cache of a routed layer holds fewer rows than tokens were seen and is attended to where no pass looks, so "
        "that sparse attention would act in some layers and not in others"
    ),
}
"""Two techniques whose caches cannot both be kept right in one graph."""


def refusal(technique: str, policy: str) -> str:
    """Why `technique` cannot use `policy`, as a sentence that ends with the next step; empty when it can."""
    usable = [p for p in POLICIES if POLICIES[p].available and LEGAL.get((technique, p)) == ""]
    advice = f"use kv={' or kv='.join(map(repr, usable))}"
    if policy not in POLICIES:
        return f"there is no such policy; {advice}."
    if not POLICIES[policy].available:
        return f"{policy!r} ({POLICIES[policy].meaning}) is not available in this version; {advice}."
    reason = LEGAL.get((technique, policy), f"it has no meaning for {technique}")
    return f"{reason}; {advice}." if reason else ""


def conflict(technique: str, others: Collection[str]) -> tuple[str, str] | None:
    """The first of `others` that cannot share a graph with `technique`, and why; None when all can."""
    for other in others:
        reason = PAIRS.get(frozenset((technique, other)))
        if other != technique and reason:
            return other, reason
    return None
