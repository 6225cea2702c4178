"""What the fields of a setting may hold, and what they mean for the heads of one attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

Budget = int | float


def check_budget(budget: Any, name: str = "budget") -> None:
    """An int from 1 on, or a float in (0, 1]; raises SettingError."""
    if budget is None:
        return
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    fits = number and (budget >= 1 if isinstance(budget, int) else math.isfinite(budget) and 0.0 < budget <= 1.0)
    if not fits:
        raise SettingError(
            f"SparseAttention({name}={budget!r}): allowed are an int from 1 on (tokens) and a float in (0, 1] (share "
            "of the cache), such as 256 or 1/16."
        )


def check_count(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """An int from `least` on; raises SettingError."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"SparseAttention({name}={value!r}): an int from {least} on, in tokens.")


def check_tau(setting: SparseAttention) -> None:
    """A share of the softmax, for a method that has scores; raises SettingError."""
    tau = setting.tau
    if tau is None:
        return
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0.0 < tau <= 1.0:
        raise SettingError(f"SparseAttention(tau={tau!r}): a share of the attention in (0, 1], such as 0.95.")
    if setting.select is None and setting.method == "sink_window":
        raise SettingError(
            f"SparseAttention(method='sink_window', tau={tau}): this method scores nothing that a share could be taken "
            "of; use method='pages' or 'double_sparsity'."
        )


def normal_heads(heads: Any) -> Any:
    """``heads=`` as a tuple of indices or of (index, budget) pairs; raises SettingError."""
    if heads is None:
        return None
    wrong = SettingError(
        f"SparseAttention(heads={heads!r}): a tuple of KV heads such as (0, 3, -1), or a mapping from a KV head to its "
        "budget such as {0: 1.0, 5: 1/16}."
    )
    if isinstance(heads, Mapping):
        heads = tuple(heads.items())
    if not isinstance(heads, (tuple, list)) or not heads:
        raise wrong
    heads = tuple(tuple(h) if isinstance(h, list) else h for h in heads)
    pairs = [h for h in heads if isinstance(h, tuple)]
    indices = [h[0] if isinstance(h, tuple) else h for h in heads]
    if len(pairs) not in (0, len(heads)) or any(len(p) != 2 for p in pairs):
        raise wrong
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        raise wrong
    if len(set(indices)) != len(indices):
        raise SettingError(f"SparseAttention(heads={heads!r}): a KV head is named twice.")
    for index, budget in pairs:
        if budget is None:
            raise wrong
        check_budget(budget, f"heads[{index}]")
    return heads


def budgets(setting: SparseAttention, kv_heads: int) -> list[Budget | None]:
    """For each KV head what it reads: tokens, a share of the cache, or None for everything.

    Raises SettingError for a head that does not exist.
    """
    general = setting.sinks + setting.window if setting.window is not None else setting.budget
    assert general is not None
    if setting.heads is None:
        return [_or_dense(general)] * kv_heads
    named: dict[int, Budget | None] = {}
    for item in setting.heads:
        index, budget = item if isinstance(item, tuple) else (item, general)
        if not -kv_heads <= index < kv_heads:
            raise SettingError(
                f"{setting}: KV head {index} does not exist; this attention has {kv_heads} KV heads, indices 0 to "
                f"{kv_heads - 1} or {-kv_heads} to -1."
            )
        named[index % kv_heads] = _or_dense(budget)
    others = general if isinstance(setting.heads[0], tuple) else None
    return [named.get(head, _or_dense(others)) for head in range(kv_heads)]


def _or_dense(budget: Budget | None) -> Budget | None:
    return None if isinstance(budget, float) and budget == 1.0 else budget


def tokens_of(budget: Budget, length: int, least: int) -> int:
    """What a budget pays for on a cache of that length, in tokens: a share is rounded up; at least `least`."""
    if isinstance(budget, int):
        return max(budget, least)
    return max(math.ceil(length * Fraction(budget).limit_denominator(1 << 16)), least)


def block_counts(setting: SparseAttention, kv_heads: int, length: int, block: int, newest: int) -> list[int | None]:
    """How many blocks each KV head reads of a cache of that length; None for a head that reads everything."""
    least = least_blocks(setting.sinks, block, newest)
    found: list[int | None] = []
    for budget in budgets(setting, kv_heads):
        count = None if budget is None else max(tokens_of(budget, length, least * block) // block, least)
        found.append(None if count is None or count * block >= length else count)
    return found


def least_blocks(sinks: int, block: int, newest: int) -> int:
    """Blocks that sinks and newest positions can touch, wherever padding ends, and one that is chosen."""
    return sum((n + block - 2) // block + 1 for n in (sinks, newest) if n) + 1
