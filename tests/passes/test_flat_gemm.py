"""FlatGemm: what it must leave alone, what it groups on real models, and that the rewritten graph computes the same.

On a CPU the technique is blocked, so recognition and rewriting are tried through ``plan_groups`` and ``apply_groups``,
and the technique itself with a CPU that counts as a device with kernels; the operator's PyTorch body then computes.
"""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from flat_gemm_harness import Outcome, V, W, X, parameter, run
from torch import nn
from torch.nn import functional as F

import fxopt
import fxopt.passes.flat_gemm as flat_gemm
from fxopt.codegen import lowering, roofline
from fxopt.codegen.dataflow import Dataflow
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.ops import fused_linear
from fxopt.passes.flat_gemm import FlatGemm
from fxopt.passes.linear_groups import linears_of
from fxopt.passes.nodes import name_of
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY, inputs_for

# -- what is left alone ---------------------------------------------------------------------------------------------


def untouched(outcome, *codes):
    assert outcome.groups == []
    assert outcome.codes == list(codes)
    assert outcome.count("fused_linear") == 0


def test_a_tied_weight():
    table = parameter(24, 16)
    ids = torch.tensor([[3], [5]])
    untouched(run(lambda ids: F.linear(F.embedding(ids, table), table), ids), ("missed", "FX104"))


@pytest.mark.parametrize("make", [lambda w: w * 2.0, lambda w: w + V, lambda w: w[:8], lambda w: w.double().float()])
def test_a_computed_weight(make):
    untouched(run(lambda x: F.linear(x, make(W)), X), ("missed", "FX101"))


def test_a_quantised_weight():
    packed, scale = torch.randint(-8, 8, (24, 16), dtype=torch.int8), parameter(24, 1)
    untouched(run(lambda x: F.linear(x, packed.to(x.dtype) * scale), X), ("missed", "FX101"))


def test_a_product_with_a_packed_weight():
    packed, scale = torch.randint(-8, 8, (24, 16), dtype=torch.int8), torch.ones(24, dtype=torch.bfloat16)
    x = X.bfloat16().reshape(2, 16)
    outcome = run(lambda x: torch.ops.aten._weight_int8pack_mm(x, packed, scale) * 2, x)
    untouched(outcome, ("missed", "FX201"))
    assert "packed for _weight_int8pack_mm" in outcome.remarks[0].message


def test_low_rank_adapters():
    a, b, c, d = parameter(4, 16), parameter(24, 4), parameter(2, 16), parameter(24, 2)

    def one(x):
        return F.linear(x, W) + F.linear(F.linear(F.dropout(x, 0.1, False), a), b) * 0.5

    def two(x):
        return one(x) + 2.0 * F.linear(F.linear(x, c), d)

    untouched(run(one, X), *[("missed", "FX101")] * 3)
    outcome = run(two, X)
    untouched(outcome, *[("missed", "FX101")] * 5)
    assert "low-rank adapter" in outcome.remarks[0].message


def test_a_bottleneck_is_no_adapter():
    a, b = parameter(4, 16), parameter(24, 4)
    outcome = run(lambda x: F.linear(x, W) + F.linear(F.relu(F.linear(x, a)), b), X)
    assert sum(len(g.linears) for g in outcome.groups) == 3


def test_too_many_rows():
    x = torch.randn(5, 13, 16)
    outcome = run(lambda x: F.linear(x, W) + F.linear(x, V), x)
    untouched(outcome, *[("missed", "FX301")] * 2)
    assert "65 rows" in outcome.remarks[0].message
    assert run(lambda x: F.linear(x, W), x[:4]).codes == []
    assert run(lambda x: F.linear(x, W), x[:1, :9], max_m=8).codes == [("missed", "FX301")]


def test_no_rows():
    untouched(run(lambda x: F.linear(x, W), X[:0]), ("missed", "FX302"))


def test_an_unknown_number_of_rows():
    untouched(run(lambda x: F.linear(x, W), torch.randn(5, 16), dynamic=True), ("missed", "FX204"))


def test_a_bounded_number_of_rows():
    x = torch.randn(5, 16)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=16)
    outcome = run(lambda x: F.silu(F.linear(x, W)) * F.linear(x, V), x, dynamic=None)
    assert outcome.codes == []
    assert len(outcome.groups) == 1
    assert not isinstance(outcome.groups[0].rows, int)


def test_other_dtypes():
    w = parameter(24, 16, dtype=torch.float64)
    untouched(run(lambda x: F.linear(x, w), X.double()), ("missed", "FX201"))


def test_autocast():
    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, W)

    untouched(run(function, X), ("missed", "FX201"))


def test_a_weight_whose_rows_do_not_lie_together():
    w = nn.Parameter(torch.randn(16, 24).t())
    untouched(run(lambda x: F.linear(x, w), X), ("missed", "FX202"))


def test_weights_of_conv1d():
    b, w = parameter(24), parameter(16, 24)
    untouched(run(lambda x: torch.addmm(b, x.view(-1, 16), w), X), ("missed", "FX202"))


def test_an_input_that_is_written_meanwhile():
    def function(x):
        state = x.clone()
        product = F.linear(state, W)
        state.add_(1.0)
        return F.relu(product), state

    untouched(run(function, X), ("blocked", "FX106"))


def test_gradients(kernels_everywhere):
    outcome = run(lambda x: F.linear(x, W) + F.linear(x, V), X, technique=FlatGemm(), grad=True)
    assert outcome.codes == [("blocked", "FX205")] * 2
    assert outcome.count("fused_linear") == 0


# -- neighbours that stay outside -----------------------------------------------------------------------------------


def test_a_product_that_is_read_elsewhere():
    def function(x):
        gate = F.linear(x, W)
        return F.silu(gate) * F.linear(x, V), gate.sum(-1)

    outcome = run(function, X)
    assert outcome.codes == [("missed", "FX104")] * 2  # silu cannot join the gate, so the product comes too late for up
    (group,) = outcome.groups
    assert (len(group.outputs), group.steps) == (2, ())
    assert (outcome.count("silu"), outcome.count("mul")) == (1, 1)


def test_a_norm_that_is_read_elsewhere():
    gamma = parameter(16)

    def function(x):
        n = F.rms_norm(x, (16,), gamma, 1e-6)
        return F.linear(n, W), n

    outcome = run(function, X)
    assert outcome.codes == [("missed", "FX104")]
    assert [g.fused.norm for g in outcome.groups] == [None]
    assert outcome.count("rms_norm") == 1


def test_a_norm_with_a_weight_of_another_dtype():
    gamma, w = parameter(16), parameter(24, 16, dtype=torch.bfloat16)

    def function(x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.linear((gamma * wide).to(torch.bfloat16), w)

    # Up to 16 rows its nodes go inside one by one, rounding where they round.
    outcome = run(function, X.bfloat16())
    assert outcome.codes == []
    (group,) = outcome.groups
    assert group.fused.norm is None
    assert [step.op for step in group.fused.prologue.steps if step.op.startswith("row")] == ["row_sum"]
    torch._dynamo.reset()
    outcome = run(function, X.bfloat16().expand(2, 9, 16).contiguous())
    assert outcome.codes == [("missed", "FX201")]
    assert [(g.fused.norm, g.fused.prologue) for g in outcome.groups] == [(None, None)]
    torch._dynamo.reset()
    outcome = run(lambda x: F.linear(F.rms_norm(x.float(), (16,), gamma, 1e-6).to(w.dtype), w), X.bfloat16())
    assert outcome.codes == [("missed", "FX201")]


def test_an_operand_that_comes_too_late():
    def function(x):
        q = F.linear(x, W)
        return q + F.linear(x, V) * torch.softmax(q, -1)  # needs q whole before the second product ends

    outcome = run(function, X)
    assert outcome.codes == [("missed", "FX104")] * 2
    (group,) = outcome.groups
    assert (len(group.linears), group.steps) == (2, ())


def test_products_of_different_widths():
    w = parameter(1, 16)
    outcome = run(lambda x: F.silu(F.linear(x, W)) * F.linear(x, w), X)
    (group,) = outcome.groups
    assert group.fused.widths == (24, 1)
    assert outcome.count("mul") == 1


# -- what is grouped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["gate first", "up first", "up last"])
def test_gating_in_every_order(order):
    b = parameter(24)

    def function(x):
        if order == "gate first":
            gate = F.silu(F.linear(x, W, b))
            return gate * F.linear(x, V)
        up = F.linear(x, V)
        gate = F.silu(F.linear(x, W, b))
        return up * gate if order == "up first" else gate * up

    outcome = run(function, X)
    (group,) = outcome.groups
    assert sorted(group.steps) == ["add", "mul", "silu"]
    assert len(group.outputs) == 1
    assert [outcome.count(n) for n in ("linear", "silu", "mul")] == [0, 0, 0]


def test_outputs_that_need_different_numbers_of_products():
    q, gamma = parameter(8, 16), parameter(16)

    def function(x):
        n = F.layer_norm(x, (16,), gamma, None, 1e-5)
        return F.linear(n, q), F.gelu(F.linear(n, W)) * F.linear(n, V)

    outcome = run(function, X)
    assert sorted(len(g.linears) for g in outcome.groups) == [1, 2]
    assert all(g.fused.norm is not None for g in outcome.groups)
    assert outcome.count("layer_norm") == 0


def test_a_part_does_not_end_on_a_wider_type():
    w = parameter(24, 16, dtype=torch.bfloat16)

    def function(x, r):
        wide = (r + F.linear(x, w)).float()
        return wide.pow(2).mean(-1) * wide.sum(-1)

    outcome = run(function, X.bfloat16(), torch.ones(2, 1, 24).bfloat16())
    assert [(g.steps, g.fused.epilogue.outputs[0].dtype) for g in outcome.groups] == [(("add",), "bfloat16")]


def test_activations_written_out_and_tails():
    def gelu_new(x):
        y = F.linear(x, W)
        return 0.5 * y * (1.0 + torch.tanh(0.7978845608028654 * (y + 0.044715 * torch.pow(y, 3.0))))

    assert len(run(gelu_new, X).groups[0].steps) == 8

    def capped(x):
        return (torch.tanh(F.linear(x, W) / 30.0) * 30.0).to(torch.bfloat16)

    outcome = run(capped, X)
    assert outcome.groups[0].steps == ("div", "tanh", "mul", "cast")
    assert outcome.groups[0].fused.epilogue.outputs[0].dtype == "bfloat16"


def test_at_most_eight_weights_a_group():
    weights = [parameter(8, 16, seed=i) for i in range(11)]
    outcome = run(lambda x: [F.linear(x, w) for w in weights], X)
    assert [len(g.linears) for g in outcome.groups] == [8, 3]


def test_pointwise_nodes_before_a_linear():
    gamma, gates = parameter(16), torch.randn(2, 1, 32)

    def function(gates, r):
        gate, up = gates.chunk(2, -1)  # halves of a joint projection: rows that lie a row of both apart
        return F.linear(F.silu(gate) * up, W) + r, F.linear(F.rms_norm(gate * 0.5 + up, (16,), gamma, 1e-6), V)

    outcome = run(function, gates, torch.randn(2, 1, 24))
    first, second = outcome.groups
    assert [step.op for step in first.fused.prologue.steps] == ["silu", "mul"]
    assert first.describe() == "1 linear [24] of K 16, M 2: silu, mul before; add after"
    assert [step.op for step in second.fused.prologue.steps] == ["mul", "add"]
    assert second.fused.norm.kind == "rms"
    assert [outcome.count(name) for name in ("silu", "mul", "rms_norm", "linear")] == [0, 0, 0, 0]


def test_pointwise_nodes_stay_with_inductor_where_rows_are_many_or_others_read():
    many = torch.randn(17, 16)
    assert run(lambda x: F.linear(torch.tanh(x), W), many).groups[0].fused.prologue is None
    (group,) = run(lambda x: (F.linear(torch.tanh(x), W), torch.tanh(x).sum()), many[:4]).groups
    assert [step.op for step in group.fused.prologue.steps] == ["tanh"]

    def shared(x):
        t = torch.tanh(x)
        return F.linear(t, W), t.sum()

    assert run(shared, many[:4]).groups[0].fused.prologue is None


def test_what_follows_a_product_goes_with_it_and_not_with_the_next():
    w = parameter(8, 24)
    first, second = run(lambda x: F.linear(F.relu(F.linear(x, W)), w), X).groups
    assert (first.steps, first.fused.prologue) == (("relu",), None)
    assert (second.steps, second.fused.prologue) == ((), None)


EXPECTED = {
    # How many groups of how many linears, norms before, operations after; three layers each.
    "llama": ({3: 3, 2: 3, 1: 7}, {"rms": 6}, {"add": 6, "silu": 3, "mul": 3}),
    "qwen3": ({3: 3, 2: 3, 1: 7}, {"rms": 6}, {"add": 6, "silu": 3, "mul": 3}),
    # The head is tied to the embedding, and norms stand between products and residual additions.
    "gemma2": ({3: 3, 2: 3, 1: 6}, {"rms": 6}, {"gelu_tanh": 3, "mul": 3}),
    "gpt_neox": ({1: 13}, {"layer": 6}, {"add": 12 + 6, "gelu": 3}),
    "phi3": ({1: 13}, {"rms": 6}, {"add": 6}),
    "handwritten": ({1: 13}, {"layer": 7}, {"add": 12 + 6, "gelu": 3}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_models(name):
    sizes, norms, steps = EXPECTED[name]
    codes = [("missed", "FX104")] if name == "gemma2" else []
    model = TINY[name]()
    inputs = inputs_for(name, model, length=1)
    outcome = Outcome()
    with torch.no_grad():
        found = torch.compile(model, backend=outcome)(**inputs)
        expected = model(**inputs)
    torch.testing.assert_close(getattr(found, "logits", found), getattr(expected, "logits", expected))
    assert Counter(len(g.linears) for g in outcome.groups) == sizes
    assert Counter(g.fused.norm.kind for g in outcome.groups if g.fused.norm) == norms
    assert outcome.codes == codes
    assert outcome.count("fused_linear") == len(outcome.groups)
    assert outcome.count("linear") == len(codes)
    weights = [w for g in outcome.groups for w in g.weights]
    assert all(w.op == "placeholder" for w in weights)
    assert len(set(weights)) == len(weights)
    assert Counter(step for g in outcome.groups for step in g.steps) == steps


def test_generating_with_a_cache():
    model = TINY["llama"]()
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **settings, disable_compile=True)
    outcome = Outcome()
    model.compile(backend=outcome)
    assert torch.equal(model.generate(ids, **settings), expected)
    prompt, decode = ([name_of(n) for n in graph.nodes] for graph in outcome.graphs)
    assert (prompt.count("fused_linear"), decode.count("fused_linear")) == (1, 13)  # the head reads one row
    assert outcome.codes == [("missed", "FX301")] * 21
    assert decode.count("index_copy_") == 6
    assert decode.count("add_") == 3


def test_half_precision_is_no_further_from_the_truth():
    model = TINY["handwritten"]()
    inputs = inputs_for("handwritten", model, length=1, batch=8)
    with torch.no_grad():
        truth = model.double()(**inputs)
        model.bfloat16()
        plain = (model(**inputs).double() - truth).abs().mean()
        found = (torch.compile(model, backend=Outcome())(**inputs).double() - truth).abs().mean()
    assert found < 1.1 * plain


def test_weights_changed_after_compiling():
    layer = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()
    outcome = Outcome()
    compiled = torch.compile(layer, backend=outcome)
    with torch.no_grad():
        compiled(X)
        layer[0].weight.mul_(-2.0)
        torch.testing.assert_close(compiled(X), layer(X))
        layer[0].weight = nn.Parameter(torch.randn(16, 16))
        torch.testing.assert_close(compiled(X), layer(X))
    assert outcome.count("fused_linear") >= 1


# -- the technique --------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """A CPU that counts as an H200 for decisions; the operator itself still runs its PyTorch body."""
    monkeypatch.setattr(lowering, "KERNEL_DEVICES", ("cpu",))

    def decisions(dtype, device, tables, max_m):
        return Dataflow(dtype, device, tables or None, max_m, roofline.DEVICES["H200"])

    monkeypatch.setattr(fused_linear, "dataflow", decisions)
    monkeypatch.setattr(roofline, "current_device", lambda device=None: roofline.DEVICES["H200"])


def mlp(x):
    return F.silu(F.linear(x, W)) * F.linear(x, V)


def test_rewriting_records_the_kernel(kernels_everywhere):
    outcome = run(mlp, X, technique=FlatGemm())
    assert outcome.codes == [("applied", "")]
    assert outcome.remarks[0].count == 2
    assert outcome.remarks[0].message == "2 linears [24, 24] of K 16, M 2: silu, mul after"
    (kernel,) = outcome.records[0].kernels
    assert "tl.sigmoid" in kernel.source
    assert kernel.resources == {"decided by": "roofline model"}
    assert kernel.configuration["block_m"] >= 2


def test_where_the_library_is_faster_it_stays(kernels_everywhere, monkeypatch):
    monkeypatch.setattr(Dataflow, "choose", lambda self, m, n, k: "library")
    outcome = run(mlp, X, technique=FlatGemm())
    assert outcome.codes == [("missed", "FX301")]
    assert outcome.count("fused_linear") == 0


def test_a_kernel_that_does_not_compile_here_leaves_the_library(kernels_everywhere, monkeypatch):
    def refuse(kernel, rows, device):
        raise Unsupported(f"{kernel.main.__name__} of {rows} rows does not compile for {device}")

    monkeypatch.setattr(flat_gemm, "compile_here", refuse)
    outcome = run(mlp, X, technique=FlatGemm())
    assert outcome.codes == [("missed", "FX303")]
    assert "does not compile for cpu" in outcome.remarks[0].message
    assert (outcome.count("fused_linear"), outcome.count("linear")) == (0, 2)
    assert outcome.records[0].kernels == []


def test_its_limit_of_rows(kernels_everywhere):
    assert run(mlp, X, technique=FlatGemm(max_m=1)).codes == [("missed", "FX301")] * 2


def test_layers_share_one_kernel(kernels_everywhere):
    model = TINY["handwritten"]()
    outcome = Outcome(FlatGemm())
    with torch.no_grad():
        torch.compile(model, backend=outcome)(**inputs_for("handwritten", model, length=1))
    assert outcome.count("fused_linear") == 13
    kernels = outcome.records[0].kernels  # one record a kernel, with every place that shares it
    assert len({kernel.name for kernel in kernels}) == 5
    assert sorted(len(kernel.modules) for kernel in kernels) == [1, 3, 3, 3, 3], [k.modules for k in kernels]
    assert ("layers.0.up", "layers.1.up", "layers.2.up") in [kernel.modules for kernel in kernels]


def test_on_a_cpu_nothing_is_planned_and_every_linear_has_its_remark(eager_lowering, monkeypatch):
    monkeypatch.setattr(flat_gemm, "plan_groups", lambda *_: pytest.fail("a CPU's graph was planned"))
    model = TINY["handwritten"]()
    inputs = inputs_for("handwritten", model, length=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = model(**inputs)
        found = torch.compile(model, backend="fxopt")(**inputs)
    assert torch.equal(found, expected)
    (record,) = fxopt.report().graphs
    remarks = [r for r in record.remarks if r.technique == "flat_gemm"]
    assert [(r.status, r.code) for r in remarks] == [("blocked", "FX207")] * 13
    assert {r.path for r in remarks} >= {"layers.0.up", "layers.2.down"} and all(r.source for r in remarks)
    assert [s for s in record.stages if s.name == "flat_gemm" and not s.is_noop] == []


def test_a_graph_without_linears_is_no_place():
    assert run(lambda x: x * 2, X, technique=FlatGemm()).remarks == []


@pytest.mark.parametrize("value", [0, -1, 65, 2.0, True, "8", None])
def test_a_max_m_that_cannot_be_meant(value):
    with pytest.raises(SettingError, match="a number of rows from 1 to 64"):
        FlatGemm(max_m=value)


def test_tables(tmp_path):
    assert FlatGemm(tables=tmp_path).tables == str(tmp_path)
    assert linears_of(torch.fx.Graph()) == []
    with pytest.raises(SettingError, match="no such file or folder"):
        FlatGemm(tables=tmp_path / "missing.json")
    with pytest.raises(SettingError, match="the path of a table"):
        FlatGemm(tables=3)


def test_it_means_the_model_itself():
    model = nn.Linear(2, 2)
    assert FlatGemm().reference(model) is model
    assert (FlatGemm.exact, FlatGemm.on_by_default, FlatGemm.level) == (True, True, "torch")
