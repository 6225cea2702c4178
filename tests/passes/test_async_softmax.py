"""AsyncSoftmax: its setting, that it says no on a CPU, and what it puts into the graph where kernels run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.codegen import lowering
from fxopt.codegen.kernels.phi import newest_key_phi, place, qk_norm_bound
from fxopt.passes.async_softmax import AsyncSoftmax
from fxopt.passes.cache_extent import CacheExtent
from fxopt.passes.context import PassContext
from fxopt.passes.gqa_packing import GqaPacking
from fxopt.passes.inputs import INPUT
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import GraphRecord
from fxopt.passes.rewriter import verify
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY, capture

transformers = pytest.importorskip("transformers")

B, H, HKV, T, S, D = 2, 4, 2, 2, 24, 16


@pytest.mark.parametrize("phi", ["automatic", float("nan"), float("inf"), True, None, [1.0]])
def test_a_phi_that_cannot_be_meant(phi):
    with pytest.raises(SettingError, match="phi is 'auto', 'online' or a finite number"):
        AsyncSoftmax(phi=phi)


def test_deterministic_is_a_choice():
    with pytest.raises(SettingError, match="allowed are True"):
        AsyncSoftmax(deterministic=1)


def test_it_means_the_model_itself():
    model = torch.nn.Linear(2, 2)
    assert AsyncSoftmax().reference(model) is model
    assert AsyncSoftmax.exact


def step(q, cache, new, at, mask):
    cache.index_copy_(2, at, new)
    return F.scaled_dot_product_attention(q, cache, cache, attn_mask=mask, enable_gqa=True, scale=0.3)


def capped(q, cache, new, at, mask):
    cache.index_copy_(2, at, new)
    keys = cache[:, :, None].expand(B, HKV, 2, S, D).reshape(B, H, S, D)
    scores = torch.tanh(q @ keys.transpose(-1, -2) / 50) * 50
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ keys


def inputs():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(S) <= 7 + torch.arange(T)[:, None]
    shapes = ((B, H, T, D), (B, HKV, S, D), (B, HKV, T, D))
    return *(torch.randn(*shape, generator=generator) for shape in shapes), torch.arange(7, 7 + T), mask[None, None]


def rewritten(function, technique):
    (graph_module,) = capture(function, *inputs())
    number_nodes(graph_module.graph)
    remarks = []
    for each in (GqaPacking(), CacheExtent(), technique):
        context = PassContext(graph_module.graph, each.name, GraphRecord(0, "-", "test"))
        each.rewrite(graph_module.graph, context)
        verify(graph_module.graph)
        remarks = context.remarks
    graph_module.recompile()
    return graph_module, remarks


def call(graph_module):
    named = dict(zip(("q", "cache", "new", "at", "mask"), inputs(), strict=True))
    given = [
        p.meta[INPUT].get() if INPUT in p.meta else named[str(p.target).removeprefix("L_").rstrip("_")]
        for p in graph_module.graph.find_nodes(op="placeholder")
    ]
    return graph_module(*given)[0]


def test_no_kernels_on_a_cpu():
    graph_module, remarks = rewritten(step, AsyncSoftmax())
    assert [(r.status, r.code) for r in remarks] == [("blocked", "FX207")]
    assert "decode_attention" not in graph_module.code
    torch.testing.assert_close(call(graph_module), step(*inputs()))


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Rewrite as on a GPU; with no kernel to launch the operator's PyTorch body computes the result."""
    monkeypatch.setattr(lowering, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(lowering, "launch", launch)
    launched.clear()


launched = []


def launch(query, key, value, mask, extent, sinks, phi, *, scale, soft_cap, split_size):
    launched.append((phi, extent, split_size, scale))
    out = lowering.attention(query, key, value, mask, extent, sinks, scale=scale, soft_cap=soft_cap).contiguous()
    return out, torch.tensor([3, out.shape[:3].numel()])


def test_phi_from_the_newest_key(kernels_everywhere):
    graph_module, remarks = rewritten(step, AsyncSoftmax())
    assert [r.status for r in remarks] == ["applied"]
    assert "newest key" in remarks[0].message
    torch.testing.assert_close(call(graph_module), step(*inputs()))
    phi, extent, split_size, _ = launched[-1]
    q, _, new, _, _ = inputs()
    torch.testing.assert_close(phi, newest_key_phi(q, new, scale=0.3))
    assert int(extent) == 9
    assert split_size == lowering.SPLIT_SIZE


def test_phi_that_was_given(kernels_everywhere):
    graph_module, remarks = rewritten(step, AsyncSoftmax(phi=2.5, deterministic=False))
    torch.testing.assert_close(call(graph_module), step(*inputs()))
    phi, _, split_size, _ = launched[-1]
    assert phi.tolist() == [2.5] * HKV
    assert split_size == lowering.fitted_split(S, B * HKV, torch.device("cpu"))
    assert "as given" in remarks[0].message


def test_phi_from_a_soft_cap(kernels_everywhere):
    graph_module, remarks = rewritten(capped, AsyncSoftmax())
    torch.testing.assert_close(call(graph_module), capped(*inputs()))
    assert "the soft-cap 50" in remarks[0].message
    assert launched[-1][0].tolist() == [0.0] * HKV


class NoHostReads(TorchDispatchMode):
    """Forbids what makes the host wait for a value of the device."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.removeprefix("aten::").lstrip("_") not in {w.lstrip("_") for w in self.WAITS}, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("technique", [AsyncSoftmax(), AsyncSoftmax(phi=1.0), AsyncSoftmax(phi="online"),
                                       AsyncSoftmax(ranges=((-2.0, 6.0), (3.0, 12.0)))])  # fmt: skip
@pytest.mark.parametrize("function", [step, capped])
def test_a_lowered_step_reads_nothing_on_the_host(function, technique, kernels_everywhere, monkeypatch):
    """Cache write, extent, phi and counts of the whole rewritten graph stay tensors; only the kernel is missing."""
    graph_module, remarks = rewritten(function, technique)
    assert [r.status for r in remarks] == ["applied"]
    seen = []

    def launch(query, *rest, **options):
        seen.append(rest)
        return torch.zeros(*query.shape[:3], rest[1].shape[3]), torch.zeros(2, dtype=torch.int64)

    monkeypatch.setattr(lowering, "launch", launch)
    with NoHostReads():
        call(graph_module)
    assert all(t is None or isinstance(t, torch.Tensor) for t in seen[-1])
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        int(torch.tensor(3))


def test_prompts_are_left_alone(kernels_everywhere):
    (graph_module,) = capture(lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m),
                              torch.randn(1, 2, 20, 16), torch.ones(20, 20, dtype=torch.bool))  # fmt: skip
    number_nodes(graph_module.graph)
    context = PassContext(graph_module.graph, "async_softmax", GraphRecord(0, "-", "test"))
    AsyncSoftmax().rewrite(graph_module.graph, context)
    assert [r.code for r in context.remarks] == ["FX503"]


# -- what phi is taken from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [((1.0,),), ((2.0, 1.0),), ((0.0, float("inf")),), 3, ("ab",)])
def test_ranges_that_cannot_be_meant(ranges):
    with pytest.raises(SettingError, match="fxopt.tune"):
        AsyncSoftmax(ranges=ranges)


def test_online_softmax_as_asked_for(kernels_everywhere):
    graph_module, remarks = rewritten(step, AsyncSoftmax(phi="online"))
    torch.testing.assert_close(call(graph_module), step(*inputs()))
    assert launched[-1][0] is None
    assert "online softmax as asked for" in remarks[0].message


def test_calibrated_ranges_give_each_head_its_phi(kernels_everywhere):
    technique = AsyncSoftmax(ranges=((-2.0, 6.0), (3.0, 12.0)))
    graph_module, remarks = rewritten(step, technique)
    torch.testing.assert_close(call(graph_module), step(*inputs()))
    expected = [place(low, high, torch.float32) for low, high in technique.ranges]
    torch.testing.assert_close(launched[-1][0], torch.tensor(expected))
    assert "calibrated" in remarks[0].message


def test_a_range_that_fits_no_phi_gets_online_softmax(kernels_everywhere):
    """The range published for OPT-6.7B (FlashDecoding++, section 3)."""
    graph_module, remarks = rewritten(step, AsyncSoftmax(ranges=((-2.0, 6.0), (-496.8, 363.5))))
    torch.testing.assert_close(call(graph_module), step(*inputs()))
    assert launched[-1][0] is None
    assert "-496.8 to 363.5 fit no unified maximum" in remarks[0].message


def test_ranges_of_another_number_of_heads(kernels_everywhere):
    with pytest.raises(SettingError, match="ranges for 3 KV heads; this attention has 2"):
        rewritten(step, AsyncSoftmax(ranges=((0.0, 1.0),) * 3))


def test_a_certificate_comes_before_a_calibration(kernels_everywhere):
    rewritten_module, remarks = rewritten(capped, AsyncSoftmax(ranges=((-2.0, 6.0), (3.0, 12.0))))
    call(rewritten_module)
    assert launched[-1][0].tolist() == [0.0] * HKV
    assert "soft-cap" in remarks[0].message


# -- whole models, as on a GPU ----------------------------------------------------------------------------------------


def generated(model, tokens=4):
    ids = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            cache_implementation="static",
        )  # fmt: skip


@pytest.mark.parametrize(("name", "steps"), [("qwen3", 3), ("gemma3_text", 4)])
def test_normalised_queries_and_keys_are_certified_by_their_weights(name, steps, kernels_everywhere, eager_lowering):
    model = TINY[name]()
    attention = model.model.layers[0].self_attn
    expected = generated(model)
    fxopt.compile(model, AsyncSoftmax())
    assert torch.equal(generated(model), expected)
    assert {phi.unique().tolist()[0] for phi, *_ in launched} == {0.0}
    report = fxopt.report(model)
    layers = model.config.num_hidden_layers
    assert report.graphs[-1].count("async_softmax") == layers
    said = [r.message for r in report.graphs[-1].remarks if r.technique == "async_softmax"]
    assert all("the norms of queries and keys" in message for message in said)

    bounds = [
        float(qk_norm_bound(a.q_norm.weight, a.k_norm.weight, head_dim=16, scale=a.scaling,
                            offset=1.0 if name == "gemma3_text" else 0.0))
        for a in (layer.self_attn for layer in model.model.layers)
    ]  # fmt: skip
    counted = report.graphs[-1].counted
    assert counted["async_softmax lowest score bound"] == pytest.approx(min(bounds))
    assert counted["async_softmax highest score bound"] == pytest.approx(max(bounds))
    assert "async_softmax highest score bound" in report.summary()

    # The bound follows the weights: one layer's norm grows out of what phi 0 can serve, without a new compilation.
    with torch.no_grad():
        attention.q_norm.weight.mul_(0.0).add_(4000.0)
    graphs, launched[:] = len(report.graphs), []
    assert torch.equal(generated(model), generated(copy.deepcopy(model)))
    assert sum(bool((phi != 0).all()) for phi, *_ in launched) == steps
    assert sum(bool((phi != 0).any()) for phi, *_ in launched) == steps
    assert len(fxopt.report(model).graphs) == graphs
    assert fxopt.report(model).graphs[-1].counted["async_softmax highest score bound"] > 1000


def test_recomputed_rows_are_in_the_report(kernels_everywhere, eager_lowering):
    model = TINY["llama"]()
    expected = generated(model)
    # flat_gemm hands its kernels to Inductor, which asks Triton for a device.
    fxopt.compile(model, AsyncSoftmax(), disable=("flat_gemm",))
    assert torch.equal(generated(model), expected)
    counted = fxopt.report(model).graphs[-1].counted
    calls, rows = 3 * 3, 2 * 4
    assert len(launched) in (calls, calls + 3)  # a prompt of transformers 5.17 reads the static cache too
    assert counted["async_softmax rows"] == calls * rows
    assert counted["async_softmax rows recomputed"] == 3 * calls
    assert counted["async_softmax recompute rate"] == pytest.approx(3 / rows)
    again = fxopt.Report.from_dict(fxopt.report(model).to_dict())
    assert again.graphs[-1].counted == counted


def test_a_recipe_reaches_its_layers(kernels_everywhere, eager_lowering, tmp_path):
    model = TINY["llama"]()
    tokens = torch.randint(2, 128, (64,), generator=torch.Generator().manual_seed(3)).tolist()
    recipe = fxopt.tune(model, tokens, context=32, show=False)
    recipe = fxopt.Recipe.load(recipe.save(tmp_path / "recipe.safetensors"))
    expected = generated(model)
    fxopt.compile(model, recipe)
    assert torch.equal(generated(model), expected)
    wanted = [
        torch.tensor([place(*pair, torch.float32) for pair in recipe.paths[f"model.layers.{i}.self_attn"].ranges])
        for i in range(3)
    ]
    for i, (phi, *_) in enumerate(launched):
        torch.testing.assert_close(phi, wanted[i % 3])


def test_through_inductor(kernels_everywhere):
    model = TINY["qwen3"]()
    expected = generated(model)
    # flat_gemm hands its kernels to Inductor, which asks Triton for a device.
    fxopt.compile(model, AsyncSoftmax(), disable=("flat_gemm",))
    assert torch.equal(generated(model), expected)
    counted = fxopt.report(model).graphs[-1].counted
    assert counted["async_softmax rows"] == 3 * 3 * 2 * 4


def test_a_head_dimension_without_a_kernel_stays_as_it_was(kernels_everywhere, eager_lowering):
    config = TINY["llama"]().config
    model = transformers.LlamaForCausalLM(type(config)(**config.to_dict() | {"head_dim": 8})).eval()
    expected = generated(model)
    fxopt.compile(model, AsyncSoftmax())
    assert torch.equal(generated(model), expected)
    last = fxopt.report(model).graphs[-1]
    assert (last.count("async_softmax"), last.count("cache_extent")) == (0, 3)
    assert {r.code for r in last.remarks if r.technique == "async_softmax"} == {"FX303"}
    assert not launched


def test_with_early_exits_nothing_is_counted(kernels_everywhere):
    (graph_module,) = capture(step, *inputs())
    number_nodes(graph_module.graph)
    in_use = frozenset({"async_softmax", "early_exit"})
    context = PassContext(graph_module.graph, "async_softmax", GraphRecord(0, "-", "test"), in_use=in_use)
    AsyncSoftmax().rewrite(graph_module.graph, context)
    verify(graph_module.graph)
    assert not [p for p in graph_module.graph.find_nodes(op="placeholder") if INPUT in p.meta]
    assert "not counted" in context.remarks[-1].message


def test_two_settings_on_one_graph_count_together(kernels_everywhere, eager_lowering):
    model = TINY["llama"]()
    expected = generated(model)
    paths = {f"model.layers.{i}.self_attn": AsyncSoftmax(phi=float(i)) for i in range(3)}
    fxopt.compile(model, paths)
    assert torch.equal(generated(model), expected)
    assert [phi.unique().item() for phi, *_ in launched[:3]] == [0.0, 1.0, 2.0]
    assert fxopt.report(model).graphs[-1].counted["async_softmax rows"] == 3 * 3 * 8
