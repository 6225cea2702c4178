"""Sparse attention in graphs for a GPU: what the pass asks of the kernels, and what it puts there instead of lists."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import fx

from fxopt.codegen import lowering, lowering_sparse
from fxopt.passes.sparse_attention import SparseAttention, selection
from fxopt.passes.sparse_attention.double_sparsity import spelled_out


def site(device, width=64, heads=8, dtype=torch.float16):
    graph = fx.Graph()

    def node(*shape):
        made = graph.placeholder("tensor")
        made.meta["example_value"] = torch.empty(shape, dtype=dtype, device="meta")
        return made

    return SimpleNamespace(
        device=torch.device(device), query=node(1, heads, 1, width), key=node(1, 2, 100, width),
        value=node(1, 2, 100, width), soft_cap=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "block", "message"),
    [
        ({"device": "cpu", "dtype": torch.float64}, 16, None),
        ({"device": "cuda"}, 16, None),
        ({"device": "cuda"}, 1, None),
        ({"device": "mps"}, 16, "no kernels for mps"),
        ({"device": "cuda", "width": 512}, 16, "head_dim is 512"),
        ({"device": "cuda", "dtype": torch.float64}, 1, "float64"),
    ],
)
def test_where_there_are_kernels(given, block, message):
    setting = SparseAttention(method="pages", budget=1 / 16)
    found = selection.missing_kernels(site(**given), setting, block)
    assert (found is None) if message is None else (message in found)


def test_a_graph_for_a_gpu_copies_nothing_from_the_host():
    """The channels of double sparsity are made on the device."""
    for lists in (((3, 255), (0, 128)), (tuple(range(16)), tuple(range(240, 256))), ((9,),), ((1, 2, 3, 4, 5, 6, 7),)):
        made = spelled_out(lists, torch.empty(2, 3))
        assert made.dtype == torch.int64
        assert made.tolist() == [list(listed) for listed in lists]


def test_the_pass_on_a_device_with_kernels(monkeypatch, eager_lowering):
    """With the CPU counted among those devices the same graph comes out: operators, which choose by device."""
    import fxopt
    from fxopt.testing import TINY

    monkeypatch.setattr(lowering, "KERNEL_DEVICES", ("cpu", "cuda"))
    asked = []
    monkeypatch.setattr(lowering_sparse, "check", lambda *tensors, **options: asked.append(options))
    monkeypatch.setattr(selection, "missing_kernels", _as_on_a_gpu(selection.missing_kernels))
    model = TINY["llama"]()
    fxopt.compile(model, SparseAttention(method="pages", budget=64, min_length=0), strict=True)
    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, cache_implementation="static")
    assert fxopt.report(model).graphs[-1].count("sparse_attention") == model.config.num_hidden_layers
    assert asked == [{"soft_cap": 0.0, "block": 16, "dense_heads": ()}] * model.config.num_hidden_layers


def _as_on_a_gpu(question):
    def ask(place, setting, block):
        shown = SimpleNamespace(
            device=SimpleNamespace(type="cuda"), query=place.query, key=place.key, value=place.value,
            soft_cap=place.soft_cap,
        )  # fmt: skip
        return question(shown, setting, block)

    return ask
