"""Sparse attention as a GPU runs it, for Triton's interpreter: cases that `test_lowering_sparse.py` starts."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.codegen import lowering_sparse
from fxopt.codegen.kernels import select_scores, select_state

BODY = torch.ops.fxopt


def same_lists(one: torch.Tensor, other: torch.Tensor) -> None:
    assert torch.equal(one.sort(-1).values, other.sort(-1).values)


def masked(filled: int, length: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask in which row 0 begins with padding, and the extent."""
    mask = (torch.arange(length) < filled).expand(2, 1, 1, -1).clone()
    mask[0, ..., :5] = False
    return mask, torch.tensor(filled)


class Steps:
    """One method as kernels and as PyTorch bodies, on the same cache, with state of their own."""

    def __init__(self, method: str) -> None:
        self.method, self.block = method, 16 if method == "pages" else 1
        self.bits = {"8 bits": 8, "4 bits": 4}.get(method, 0)
        self.key, self.value = torch.randn(2, 2, 2, 256, 64)
        self.channels = torch.stack([torch.randperm(64)[:8] for _ in range(2)])
        self.own, self.bodies = self.state(), self.state()

    def state(self) -> dict[str, Any]:
        filled = torch.tensor(-1)
        if self.method == "pages":
            return {"filled": filled, "bounds": torch.zeros(2, 2, 17, 128)}
        dtype = {0: torch.float32, 8: torch.int8, 4: torch.uint8}[self.bits]
        made = {"filled": filled, "features": torch.zeros(2, 2, 8, 256 // (2 if self.bits == 4 else 1), dtype=dtype)}
        return made | {"scales": torch.zeros(2, 2, 8, 2) if self.bits else None}

    def scored(self, kernels: bool, query: torch.Tensor, extent: torch.Tensor, least: int) -> torch.Tensor:
        state = self.own if kernels else self.bodies
        keeps, scores = (select_state, select_scores) if kernels else (BODY, BODY)
        if self.method == "pages":
            keeps.update_page_bounds(state["bounds"], state["filled"], self.key, extent, page=16, least=least)
            return scores.page_scores(query, state["bounds"], extent, page=16, least=least)
        options = {"least": least, "bits": self.bits}
        keeps.update_features(
            state["features"], state["filled"], self.key, extent, self.channels, state["scales"], **options
        )
        return scores.feature_scores(query, state["features"], extent, self.channels, state["scales"], **options)

    def step(self, filled: int, count: int, min_length: int = 0) -> None:
        mask, extent = masked(filled)
        query = torch.randn(2, 8, 1, 64)
        least = max(count * self.block, min_length - 1)
        scores = [self.scored(kernels, query, extent, least) for kernels in (True, False)]
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-4)
        bias = BODY.block_bias(self.key, mask, sinks=2, newest=3, block=self.block)
        given = {"count": count, "block": self.block, "least": least}
        # The same scores to both: a rounding may order two of them otherwise.
        index, valid = lowering_sparse.choose(scores[1], bias, extent, **given)
        expected, lengths = BODY.choose(scores[1], bias, extent, **given)
        same_lists(index, expected)
        assert torch.equal(valid, lengths)
        options = {"scale": 0.125, "min_length": min_length, "block": self.block, "soft_cap": 30.0}
        inputs = (query, self.key, self.value, index, valid, mask, extent, torch.randn(8))
        found = lowering_sparse.gathered_attention(*inputs, **options)
        dense = BODY.gathered_attention(*inputs, **options)
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
        assert found.stride() == (8 * 64, 64, 8 * 64, 1)


def case_conversation(method: str) -> None:
    """Steps, a step taken back, and a cache that is still short: read whole, and nothing kept."""
    steps = Steps(method)
    count = 6 if method == "pages" else 40
    for filled in (150, 151, 161, 150):
        steps.step(filled, count)
    assert int(steps.own["filled"]) == 150
    steps.step(151, count, min_length=152)
    assert int(steps.own["filled"]) == 150


def case_heads() -> None:
    """A dense head, and one with a shorter list."""
    query, scores = torch.randn(1, 12, 1, 64), torch.randn(1, 3, 200)
    key, value = torch.randn(2, 1, 3, 200, 64)
    bias = BODY.block_bias(key, None, sinks=2, newest=3, block=1)
    counts = [40, 0, 13]
    index, valid = lowering_sparse.choose(scores, bias, count=40, counts=counts)
    expected, lengths = BODY.choose(scores, bias, count=40, counts=counts)
    same_lists(index, expected)
    assert valid.tolist() == lengths.tolist() == [[40, 0, 13]]
    given = {"scale": 0.125, "dense_heads": [1]}
    found = lowering_sparse.gathered_attention(query, key, value, index, valid, **given)
    torch.testing.assert_close(
        found, BODY.gathered_attention(query, key, value, index, valid, **given), rtol=1e-5, atol=1e-5
    )


def case_tau() -> None:
    scores, bias = torch.randn(2, 2, 100) * 3, torch.zeros(2, 100)
    bias[:, :2], bias[0, 50:] = torch.inf, -torch.inf
    for tau in (0.3, 0.9, 1.0):
        given = {"count": 30, "tau": tau, "scale": 0.7}
        index, valid = lowering_sparse.choose(scores, bias, **given)
        expected, lengths = BODY.choose(scores, bias, **given)
        same_lists(index, expected)
        assert torch.equal(valid, lengths)
        assert ((index >= 0) == (torch.arange(30) < valid[..., None])).all()
    assert valid.min() < 30 or tau == 1.0


def case_windows() -> None:
    """Lists for all heads, padding within them: sinks and newest tokens, without counts."""
    query = torch.randn(2, 8, 1, 64)
    key, value = torch.randn(2, 2, 2, 256, 64)
    mask, extent = masked(200)
    index = BODY.window_positions(key, mask, sinks=2, tokens=50)
    found = lowering_sparse.gathered_attention(query, key, value, index, None, mask, extent, scale=0.125)
    expected = BODY.gathered_attention(query, key, value, index, None, mask, extent, scale=0.125)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Filled less than the list is long: dense.
    mask, extent = masked(40)
    found = lowering_sparse.gathered_attention(query, key, value, index, None, mask, extent, scale=0.125)
    expected = BODY.attention(query, key, value, mask, extent, scale=0.125)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    from interpreter import serve  # type: ignore[import-not-found]

    serve(globals())
