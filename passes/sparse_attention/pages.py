"""``method="pages"``: pages of 16 tokens by an upper bound of their scores (Quest, Tang et al., arXiv 2406.10774).

Beside the cache: for every page, KV head and channel the largest and the smallest key. A page's score for a query is
the largest that q . k can be in it, ``sum_c max(q_c max_c, q_c min_c)``; one list a KV head, by the maximum over its
query heads. The page of each row's newest token and those of its sinks are always read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxopt.passes.attention import AttentionSite
from fxopt.passes.context import PassContext
from fxopt.passes.nodes import value_of
from fxopt.passes.sparse_attention import selection

if TYPE_CHECKING:
    from fxopt.passes.sparse_attention import SparseAttention

PAGE = 16
"""Positions of a page, as in the paper: bounds are an eighth of the keys, and rows of 16 x D are read whole."""
NEWEST = 1
MIN_LENGTH = 2048
"""Filled positions from which choosing is faster than reading everything; see docs/decisions.md."""


def check(setting: SparseAttention) -> None:
    """A budget that pays for more than the pages that are always read."""
    selection.check(setting, PAGE, NEWEST)


def kept_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of bounds: beside a float32 cache on a CPU bfloat16, rounded outwards; they stay bounds at half the bytes."""
    return torch.bfloat16 if dtype == torch.float32 and device.type == "cpu" else dtype


def state_elements(setting: SparseAttention, width: int) -> float:
    """Elements of the cache's dtype that a step reads a position and KV head to choose."""
    return 2 * width / PAGE


def rewrite(site: AttentionSite, setting: SparseAttention, context: PassContext, shared: dict[Any, Any]) -> None:
    """Put selection by page bounds in the place of one attention."""
    made = selection.plan(site, setting, context, shared, block=PAGE, newest=NEWEST)
    if made is None:
        return
    dtype = kept_dtype(value_of(site.key).dtype, site.device)
    state = made.state(("pages", PAGE), {"bounds": (lambda b, h, s, d: (b, h, (s + PAGE - 1) // PAGE, 2 * d), dtype)})
    ops, options = torch.ops.fxopt, {"extent": made.extent, "page": PAGE, "least": made.least}
    made.call(ops.update_page_bounds.default, state["bounds"], state["filled"], site.key, **options)
    scores = made.call(ops.page_scores.default, site.query, state["bounds"], **options)
    made.attend(scores, f"in pages of {PAGE} by their bounds, {setting.sinks} sinks and the newest page")
