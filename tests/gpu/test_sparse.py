"""Sparse attention on a real device: kernels, state, poisoned memory, no host synchronisation, CUDA graphs, models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxopt.codegen import lowering_sparse  # noqa: F401  (attaches the kernels)
from fxopt.codegen.kernels.select_top import choose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPS = torch.ops.fxopt
METHODS = ("pages", "features", "8 bits", "4 bits")
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fills every torch.empty with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class Cache:
    """Keys and values of one layer with the state of one method; positions from `filled` on are NaN."""

    def __init__(
        self, method: str, length: int, filled: int, *, batch: int = 2, group: int = 4, width: int = 128,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.method, self.page = method, 16 if method == "pages" else 1
        self.bits = {"8 bits": 8, "4 bits": 4}.get(method, 0)
        kv_heads = 2

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda").to(dtype)

        self.source = [normal(batch, kv_heads, length, width) for _ in range(2)]
        self.key, self.value = (torch.full_like(x, torch.nan) for x in self.source)
        self.query, self.sinks = normal(batch, kv_heads * group, 1, width), normal(kv_heads * group)
        self.filled = torch.tensor(-1, device="cuda")
        columns = -(-length // 128) * 128
        if method == "pages":
            self.kept = torch.full((batch, kv_heads, -(-length // 16), 2 * width), torch.nan, device="cuda").to(dtype)
        else:
            self.channels = torch.stack([torch.randperm(width, device="cuda")[:8] for _ in range(kv_heads)])
            kind = {0: dtype, 8: torch.int8, 4: torch.uint8}[self.bits]
            shape = (batch, kv_heads, 8, columns // 2 if self.bits == 4 else columns)
            self.kept = torch.zeros(shape, device="cuda", dtype=kind)
            self.scales = torch.zeros(*shape[:3], columns // 128, device="cuda") if self.bits else None
        self.extent = torch.tensor(0, device="cuda")
        self.mask = torch.zeros(batch, 1, 1, length, dtype=torch.bool, device="cuda")
        self.fill(filled)

    def fill(self, filled: int) -> None:
        """The first `filled` positions, on the host's account; not a part of a step."""
        for cache, source in zip((self.key, self.value), self.source, strict=True):
            cache[:, :, :filled] = source[:, :, :filled]
        self.extent.fill_(filled)
        self.mask.copy_((torch.arange(self.mask.shape[-1], device="cuda") < filled).expand_as(self.mask))

    def scores(self, least: int) -> torch.Tensor:
        """State brought up to date, and scores."""
        if self.method == "pages":
            given = {"page": 16, "least": least}
            OPS.update_page_bounds(self.kept, self.filled, self.key, self.extent, **given)
            return OPS.page_scores(self.query, self.kept, self.extent, **given)
        state = (self.channels, self.scales)
        OPS.update_features(self.kept, self.filled, self.key, self.extent, *state, least=least, bits=self.bits)
        return OPS.feature_scores(self.query, self.kept, self.extent, *state, least=least, bits=self.bits)

    def step(self, count: int, min_length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists and output of one step."""
        least = max(count * self.page, min_length - 1)
        bias = OPS.block_bias(self.key, self.mask, sinks=2, newest=3, block=self.page)
        given = {"count": count, "block": self.page, "least": least}
        index, valid = OPS.choose(self.scores(least), bias, self.extent, **given)
        out = OPS.gathered_attention(
            self.query, self.key, self.value, index, valid, self.mask, self.extent, self.sinks, scale=0.09,
            min_length=min_length, block=self.page,
        )  # fmt: skip
        return index, out

    def attended(self, index: torch.Tensor | None) -> torch.Tensor:
        """Attention on lists (None: on everything) in float64, by a mask."""
        visible = self.mask.expand(-1, self.key.shape[1], -1, -1).clone()
        if index is not None:
            positions = (index[..., None] * self.page + torch.arange(self.page, device="cuda")).flatten(2)
            listed = torch.zeros(*index.shape[:2], self.key.shape[2] + self.page, dtype=torch.bool, device="cuda")
            listed.scatter_(2, positions.where(positions >= 0, listed.shape[2] - 1), True)
            visible &= listed[:, :, None, : self.key.shape[2]]
        group = self.query.shape[1] // self.key.shape[1]
        visible = visible.repeat_interleave(group, 1)
        key, value = (x.double().nan_to_num().repeat_interleave(group, 1) for x in (self.key, self.value))
        scores = (self.query.double() @ key.mT * 0.09).masked_fill(~visible, -torch.inf)
        logits = torch.cat((scores, self.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
        return logits.softmax(-1)[..., :-1] @ value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("group", "width"), [(1, 64), (4, 128), (7, 96), (8, 80)])
def test_steps_against_float64(method: str, dtype: torch.dtype, group: int, width: int) -> None:
    cache = Cache(method, 1100, 1000, group=group, width=width, dtype=dtype)
    count = 100 // cache.page
    for filled in (1000, 1001, 1027, 999):
        cache.fill(filled)
        index, out = cache.step(count)
        assert int(cache.filled) == filled
        assert int(index.max()) * cache.page < filled
        assert (index >= 0).sum(-1).min() == count
        torch.testing.assert_close(out.double(), cache.attended(index), atol=TOLERANCE[dtype], rtol=2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_short_caches_are_read_whole(method: str) -> None:
    cache = Cache(method, 1100, 63)
    _, out = cache.step(100 // cache.page)
    torch.testing.assert_close(out.double(), cache.attended(None), atol=1.6e-2, rtol=2e-2)
    cache.fill(1000)
    _, out = cache.step(100 // cache.page, min_length=1001)
    torch.testing.assert_close(out.double(), cache.attended(None), atol=1.6e-2, rtol=2e-2)
    assert int(cache.filled) == -1


@pytest.mark.parametrize("chunks", [1, 2, 16])
@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
def test_choose_is_exact(kind: str, chunks: int) -> None:
    scores = torch.randn(3, 2, 40000, device="cuda")
    scores = scores.mul(4).round() if kind == "ties" else scores * (kind == "random")
    bias = torch.zeros(1, 40000, device="cuda")
    bias[:, -2000:] = -torch.inf
    bias[:, :5] = torch.inf
    index, valid = choose(scores, bias, count=2500, chunks=chunks)
    order = (scores + bias).argsort(-1, descending=True, stable=True)[..., :2500]
    assert torch.equal(index, order.sort(-1).values)
    assert (valid == 2500).all()


@pytest.mark.parametrize("method", METHODS)
def test_repeated_steps_agree_bit_for_bit(method: str) -> None:
    """Races would show here."""
    cache = Cache(method, 8192, 8000)
    first = cache.step(512 // cache.page)
    for _ in range(30):
        cache.filled.fill_(-1)
        again = cache.step(512 // cache.page)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_no_host_synchronisation_and_cuda_graph(method: str) -> None:
    cache = Cache(method, 4096, 2000)
    count = 256 // cache.page
    cache.step(count)  # compiles
    torch.utils.deterministic.fill_uninitialized_memory = False  # its fills are no part of the step
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.step(count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index, out = cache.step(count)
    # The graph follows what the device holds: a step, a step taken back, a cache that is short again.
    for filled in (2001, 2002, 3500, 2000, 200):
        cache.fill(filled)
        graph.replay()
        lists = index if filled > 256 else None
        torch.testing.assert_close(out.double(), cache.attended(lists), atol=1.6e-2, rtol=2e-2)
        assert filled <= 256 or int(cache.filled) == filled


def channels_of(model: Any) -> tuple[tuple[int, ...], ...]:
    width = model.config.hidden_size // model.config.num_attention_heads
    return ((0, 1, width // 2, width // 2 + 1),) * model.config.num_key_value_heads


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("method", ["sink_window", "pages", "double_sparsity"])
def test_a_model_decodes_as_its_reference(method: str, mode: str | None) -> None:
    """The whole decode step, under CUDA graphs too (mode "reduce-overhead")."""
    import fxopt
    from fxopt.testing import TINY

    torch.use_deterministic_algorithms(False)
    model = TINY["llama"]().cuda()
    own: dict[str, Any] = {"channels": channels_of(model)} if method == "double_sparsity" else {}
    own["min_length"] = 0
    setting = fxopt.SparseAttention(method=method, budget=64 if method == "pages" else 32, **own)
    ids = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(5)).cuda()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found = model.generate(
                ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation="static",
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        return torch.stack(found.logits)

    reference = fxopt.reference(model, setting)
    with torch.no_grad():
        meant = torch.stack(
            reference.generate(
                ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation="static",
                output_logits=True, return_dict_in_generate=True,
            ).logits
        )  # fmt: skip
    fxopt.compile(model, setting, strict=True, mode=mode)
    torch.testing.assert_close(logits(), meant, rtol=1e-3, atol=1e-3)
    assert fxopt.report(model).graphs[-1].count("sparse_attention") == model.config.num_hidden_layers
