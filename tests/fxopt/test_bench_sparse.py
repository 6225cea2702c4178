"""``fxopt bench sparse --device cuda`` without a GPU: its shapes, its steps by the operators' bodies, its verdicts."""

from __future__ import annotations

import pytest
import torch

from fxopt.bench import sparse, sparse_gpu
from fxopt.bench.harness import Row
from fxopt.bench.sparse_gpu import Caches, Case


def test_what_each_peer_has_to_read():
    bounds = {name: round(1 / sparse_gpu.parts_read(name), 1) for name in sparse_gpu.KEPT}
    assert bounds == {"pages": 8.0, "double_sparsity": 10.7, "double_sparsity, 4 bits": 14.2}
    assert sparse_gpu.parts_read("dense kernel") == sparse_gpu.parts_read("sdpa") == 1.0
    assert Case(8, 131072).bytes == 2 * 8 * 8 * 131072 * 128 * 2
    assert [Case(1, length).copies for length in (8192, 32768, 131072)] == [8, 2, 1]


@pytest.fixture(scope="module")
def caches():
    return Caches(Case(1, 512), "cpu", torch.float32)


def test_everything_listed_is_dense_attention(caches, monkeypatch):
    monkeypatch.setattr(caches.case.__class__, "copies", 1)
    # Scores and state are those of the steps that are timed; the last step sees the whole cache.
    sparse_gpu.check(caches, tolerance=1e-4)


def test_steps_are_steps(caches):
    """In a graph every step adds one key to state that is there: the last of them, without deriving it anew."""
    for name, step in sparse_gpu.steps_of(caches, flex=False):
        caches.reset(name)
        for number in range(3):
            assert step(0, number).shape == (1, sparse_gpu.HEADS, 1, sparse_gpu.WIDTH)
        for state in caches.states.get(name, [])[:1]:
            assert int(state["filled"]) == 512 - sparse_gpu.STEPS + 3


def test_prebuilt_lists_of_flex_attention(caches):
    mask = caches.prebuilt()
    assert mask.kv_num_blocks.tolist() == [[[1]]]
    assert mask.shape[-2:] == (1, 512)


def test_verdicts():
    case = Case(1, 131072)
    number = sparse_gpu.STEPS * case.copies
    bound = case.bytes / 4e12

    def row(peer, seconds):
        return Row(case.name, peer, seconds * number, seconds * number, seconds * number, seconds / bound)

    rows = [row("dense kernel", bound), row("pages", bound / 6), row("double_sparsity", bound / 2)]
    missed = sparse_gpu.annotate(rows, case, 4e12)
    assert len(missed) == 1
    assert "double_sparsity: 0.19 of its bound, 0.6 asked" in missed[0]
    assert rows[1].median == pytest.approx(bound / 6)
    assert rows[1].note == "6.00x dense, bound 8.0x, 0.75 of it"


def test_the_suite_goes_there(monkeypatch):
    monkeypatch.setattr(sparse_gpu, "run", lambda **options: options)
    assert sparse.run(device="cuda", quick=True) == {"device": "cuda", "quick": True}
