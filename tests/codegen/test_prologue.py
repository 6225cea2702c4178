"""Norms read from FX graphs, as torch has them and as Hugging Face writes them out."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.gemm import Norm
from fxopt.codegen.kernels.pointwise import spelling
from fxopt.codegen.kernels.prologue import match_norm, match_pointwise
from fxopt.passes.linear_parts import POINTWISE

X = torch.randn(2, 3, 16)


def captured(module, *example):
    """The node that a module's output comes from, in the graph Dynamo makes of it."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(module, backend=keep)(*example)
    (end,) = [node for node in graphs[0].graph.nodes if node.op == "output"]
    return end.args[0][0]


def hugging_face(family):
    if family == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Kind
    elif family == "gemma2":
        from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm as Kind
    else:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm as Kind
    return Kind(16, eps=1e-5)


def check(module, x, expected):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        node = captured(module, x)
        found = match_norm(node)
        assert found.norm == expected
        assert found.x.op == "placeholder"
        assert all(n.op != "placeholder" for n in found.nodes)
        assert node in found.nodes
        parameters = dict(module.named_parameters())
        weight, bias = parameters.get("weight"), parameters.get("bias")
        assert (found.gamma is None, found.beta is None) == (weight is None, bias is None)
        torch.testing.assert_close(found.norm.evaluate(x, weight, bias), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_norms_of_hugging_face(family):
    pytest.importorskip("transformers")
    check(hugging_face(family), X, Norm("rms", 1e-5, unit_offset=family == "gemma2"))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(16, eps=1e-6), Norm("layer", 1e-6, beta=True)),
        (nn.LayerNorm(16, bias=False), Norm("layer", 1e-5)),
        (nn.LayerNorm(16, elementwise_affine=False), Norm("layer", 1e-5, gamma=False)),
        (nn.RMSNorm(16, eps=1e-6), Norm("rms", 1e-6)),
        (nn.RMSNorm(16), Norm("rms", torch.finfo(torch.float32).eps)),
    ],
    ids=["layer", "no-beta", "no-affine", "rms", "rms-default-eps"],
)
def test_norms_of_torch(module, expected):
    check(module, X, expected)


def written_out(x, w):
    wide = x.to(torch.float32)
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_aten_graph():
    module = make_fx(written_out)(X.bfloat16(), torch.ones(16))
    (end,) = [node for node in module.graph.nodes if node.op == "output"]
    found = match_norm(end.args[0])
    assert found.norm == Norm("rms", 1e-6)
    assert (found.x.name, found.gamma.name) == ("x_1", "w_1")


def test_without_gamma():
    node = end_of(lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))
    assert match_norm(node).norm == Norm("rms", 1e-6, gamma=False)


def end_of(function):
    class Keep(fx.Interpreter):
        def run_node(self, node):
            node.meta["example_value"] = value = super().run_node(node)
            return value

    module = fx.symbolic_trace(function)
    Keep(module).run(X, torch.ones(16))
    (end,) = [node for node in module.graph.nodes if node.op == "output"]
    return end.args[0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: x + w, "ends in add"),
        (lambda x, w: x * w, "no factor is"),
        (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)), "no factor is"),
        (lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)), "no factor is"),
        (lambda x, w: w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6)), "no factor is"),
        (lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)), "no factor is"),
        (lambda x, w: (2 + w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), "other than one"),
        (lambda x, w: x * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), "not a vector"),
        (lambda x, w: F.layer_norm(x, (3, 16)), "more than the last dimension"),
    ],
)
def test_what_is_no_norm(function, reason):
    with pytest.raises(Unsupported, match=reason):
        match_norm(end_of(function))


def pointwise(function, *example):
    """What :func:`match_pointwise` reads before the first linear of `function`."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep)(*example)
    linear = next(node for node in graphs[0].nodes if node.target is F.linear)

    def takes(node):
        value = node.meta["example_value"]
        return node.op.startswith("call") and spelling(node.target) in POINTWISE and value.shape == example[0].shape

    return match_pointwise(linear.args[0], takes)


def statistic(function, *example):
    """What :func:`match_pointwise` reads of the ATen graph of `function`, taking every node."""
    module = make_fx(function)(*example)
    (end,) = [node for node in module.graph.nodes if node.op == "output"]
    return match_pointwise(end.args[0], lambda node: node.op.startswith("call"))


W = torch.randn(8, 16)


def test_gating_before_a_linear():
    up, bias = torch.randn(2, 3, 16), torch.randn(16)
    found = pointwise(lambda x, up, b: F.linear(F.silu(x) * up + b, W), X, up, bias)
    assert [step.op for step in found.prologue.steps] == ["silu", "mul", "add"]
    assert [e.name for e in found.prologue.extras] == ["q0", "q1"]
    assert {e.layout for e in found.prologue.extras} == {"full", "column"}
    assert (found.x.op, [n.op for n in found.extras], len(found.nodes)) == ("placeholder", ["placeholder"] * 2, 3)
    given = {"full": up, "column": bias}
    (rows,) = found.prologue.evaluate([X], [given[e.layout] for e in found.prologue.extras])
    torch.testing.assert_close(rows, F.silu(X) * up + bias)


def test_x_is_the_tensor_that_most_depends_on():
    # The gate is computed from z; what x alone cannot reach is taken with it, and x is what it is multiplied with.
    z = torch.randn(2, 3, 16)
    found = pointwise(lambda x, z: F.linear(x * torch.sigmoid(z.float()).to(x.dtype), W), X, z)
    assert found.x.name.endswith("z_")
    assert "sigmoid" in [step.op for step in found.prologue.steps]
    (rows,) = found.prologue.evaluate([z], [X])
    torch.testing.assert_close(rows, X * torch.sigmoid(z))


def test_what_others_read_stays_outside():
    def function(x):
        gate = torch.tanh(x)
        return F.linear(gate * 2, W), gate.sum()

    found = pointwise(function, X)
    assert [step.op for step in found.prologue.steps] == ["mul"]
    assert found.x.name == "gate"


LENGTH = ["square", "row_sum", "sqrt"]


@pytest.mark.parametrize(
    ("function", "steps"),
    [
        (lambda x: x / x.norm(dim=-1, keepdim=True), [*LENGTH, "div"]),
        (lambda x: x / torch.linalg.vector_norm(x, float("-inf"), -1, True), ["abs", "row_amin", "div"]),
        (lambda x: F.normalize(x, dim=2), [*LENGTH, "clamp_min", "div"]),
        (lambda x: x - x.mean(2, True), ["row_sum", "div", "sub"]),
        (lambda x: x * x.sum([-1], keepdim=True), ["row_sum", "mul"]),
        (lambda x: x / x.abs().amax(-1, True), ["abs", "row_amax", "div"]),
        (lambda x: x * x.sum(-1, True, dtype=torch.float16), ["cast", "row_sum", "mul"]),
    ],
)
def test_row_statistics_of_an_aten_graph(function, steps):
    found = statistic(function, X)
    assert [step.op for step in found.prologue.steps] == steps
    (rows,) = found.prologue.evaluate([X.reshape(6, 16)], [])
    torch.testing.assert_close(rows.view_as(X), function(X), rtol=1e-3, atol=1e-3)


def test_equal_statistics_are_one():
    twice = statistic(lambda x: x / x.norm(dim=-1, keepdim=True) - x * x.norm(dim=-1, keepdim=True), X)
    assert sorted(step.op for step in twice.prologue.steps) == sorted([*LENGTH, "div", "mul", "sub"])
    with pytest.raises(Unsupported, match="2 row statistics, row_amax .* and row_amin"):
        statistic(lambda x: (x - x.amin(-1, keepdim=True)) / x.amax(-1, keepdim=True), X)
    with pytest.raises(Unsupported, match="2 row statistics, row_sum .* and row_sum"):
        statistic(lambda x: x * x.sum(-1, keepdim=True) * x.abs().sum(-1, keepdim=True), X)


def test_half_precision_is_reduced_in_float32():
    x = torch.full((2, 3, 16), 3e4, dtype=torch.float16)  # squares and lengths beyond 65504
    found = statistic(lambda x: F.normalize(x, dim=-1), x)
    assert [step.op for step in found.prologue.steps] == ["cast", *LENGTH, "clamp_min", "div"]
    (rows,) = found.prologue.evaluate([x.reshape(6, 16)], [])
    torch.testing.assert_close(rows, torch.full_like(rows, 0.25))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x / x.norm(dim=1, keepdim=True), "reduces dimensions 1;"),
        (lambda x: x / x.norm(dim=(1, 2), keepdim=True), "reduces dimensions 1, 2;"),
        (lambda x: x * x.norm(), "all dimensions"),
        (lambda x: x * x.norm(dim=-1).mean(), "drops the dimension"),
        (lambda x: x / x.norm(p=0.5, dim=-1, keepdim=True), "order 0.5"),
        (lambda x: x * (x > 0).amax(-1, keepdim=True), "mixes truth values"),
        (lambda x: x * (x > 0).sum(-1, keepdim=True), "computes in int64"),
        (lambda x: x.mean(-1, keepdim=True).expand_as(x) * 2.0, "of another tensor than the row"),
    ],
)
def test_reductions_that_are_no_statistic_of_the_row(function, reason):
    with pytest.raises(Unsupported, match=reason):
        statistic(function, X)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.linear(x.softmax(-1), W), "not made by pointwise nodes"),
        (lambda x: F.linear(x, W), "not made by pointwise nodes"),
        (lambda x: F.linear(x**1.3, W), "a power of 1.3"),
    ],
)
def test_what_no_prologue_holds(function, reason):
    with pytest.raises(Unsupported, match=reason):
        pointwise(function, X)
