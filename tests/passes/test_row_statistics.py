"""Row statistics before linears in FlatGemm: what must stay outside and why, and what goes into the kernel."""

from __future__ import annotations

import pytest
import torch
from flat_gemm_harness import Outcome, V, W, X, parameter, run
from torch import nn
from torch.nn import functional as F

from fxopt.codegen.kernels.row_statistic import REDUCTIONS

Y = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(6))


def before(outcome):
    """The steps before the products of the only group, and its row statistics."""
    (group,) = outcome.groups
    steps = [] if group.fused.prologue is None else [step.op for step in group.fused.prologue.steps]
    return steps, [op for op in steps if op in REDUCTIONS]


# -- what stays outside ---------------------------------------------------------------------------------------------


def handwritten_softmax(x):
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


TWICE = "reduces a row twice"
TWO = "2 row statistics"


@pytest.mark.parametrize(
    ("name", "reason", "function", "steps"),
    [
        ("softmax", TWICE, lambda x: x.softmax(-1) * 2.0, ["mul"]),
        ("log_softmax", TWICE, lambda x: F.log_softmax(x, -1), []),
        ("logsumexp", TWICE, lambda x: x - x.logsumexp(-1, keepdim=True), ["sub"]),
        ("var", TWICE, lambda x: x * x.var(-1, keepdim=True), ["mul"]),
        ("std", TWICE, lambda x: x / x.std(-1, keepdim=True), ["div"]),
        ("sum", TWO, handwritten_softmax, ["div"]),
        ("norm", TWO, lambda x: x / (x.norm(dim=-1, keepdim=True) * x.sum(-1, keepdim=True)), ["div"]),
        ("mean", TWO, lambda x: x * x.norm(dim=-1, keepdim=True).mean(-1, keepdim=True), ["mul"]),
        ("amax", TWO, lambda x: x / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)), ["div"]),
        ("layer_norm", "more than the last dimension", lambda x: F.layer_norm(x, (1, 16)), []),
        ("norm", "order 3", lambda x: x / x.norm(3, -1, True), ["div"]),
        ("amax", "not made by pointwise", lambda x: (x * (7.0 / x.abs().amax(-1, keepdim=True))).round(), []),
        ("amax", "dimensions 1;", lambda x: x / x.amax(1, keepdim=True), ["div"]),
        ("normalize", "dimensions 1;", lambda x: F.normalize(x), []),
        ("prod", "no kernel computes it", lambda x: x * x.prod(-1, keepdim=True), ["mul"]),
    ],
)
def test_a_statistic_that_no_kernel_computes_stays_outside_with_a_remark(name, reason, function, steps):
    outcome = run(lambda x: F.linear(function(x), W).relu(), X)
    assert outcome.codes == [("missed", "FX101")]
    assert f"the {name} before it stays outside" in outcome.remarks[0].message
    assert reason in outcome.remarks[0].message
    assert before(outcome) == (steps, []), "the pointwise nodes behind it go inside, as they would without it"
    assert outcome.count(name) == 1 and outcome.count("linear") == outcome.count("relu") == 0


def test_a_statistic_before_a_norm_and_one_of_a_norm():
    gamma = parameter(16)
    outcome = run(lambda x: F.linear(F.rms_norm(x / x.norm(dim=-1, keepdim=True), (16,), gamma), W), X)
    assert outcome.codes == [("missed", "FX101")]
    assert "the norm before it stays outside: a kernel computes one row statistic, and the norm" in str(outcome.remarks)
    assert before(outcome) == (["div"], []) and outcome.groups[0].fused.norm.kind == "rms"

    def behind(x):
        n = F.rms_norm(x, (16,), gamma)
        return F.linear(n / n.abs().amax(-1, keepdim=True), W)

    outcome = run(behind, X)
    assert outcome.codes == [("missed", "FX101")]
    assert "rms_norm that it reads is a row statistic too" in outcome.remarks[0].message
    assert before(outcome) == (["div"], []) and outcome.groups[0].fused.norm is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x / y.norm(dim=-1, keepdim=True),
        lambda x, y: y.sum(-1, keepdim=True).expand_as(x) * x,
    ],
)
def test_a_statistic_of_another_tensor(function):
    outcome = run(lambda x, y: F.linear(function(x, y), W), X, Y)
    assert outcome.codes == [("missed", "FX101")]
    assert "is of another tensor than the row" in outcome.remarks[0].message
    assert before(outcome)[1] == []
    assert outcome.groups[0].fused.prologue.extras[0].layout in ("row", "full")


def test_a_row_that_is_nothing_but_its_statistic():
    outcome = run(lambda x: F.linear(x.mean(-1, keepdim=True).expand_as(x), W), X)
    assert before(outcome) == ([], []) and outcome.count("mean") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / x.norm(dim=-1).unsqueeze(-1),
        lambda x: x / x.norm(dim=-1)[..., None],
        lambda x: x * x.sum(-1).mT,  # other rows' sums, [2, 2] over [2, 2, 2]
        lambda x: x * x.sum(),
        lambda x: x / x.norm(keepdim=True, dim=(0, 2)),
        lambda x: x - x.mean(),
    ],
)
def test_a_statistic_that_does_not_keep_its_dimension(function):
    w = parameter(24, 2)
    outcome = run(lambda x: F.linear(function(x), w), X.reshape(4, 2, 4)[..., :2].contiguous()[:2])
    assert before(outcome)[1] == []
    assert outcome.count("norm") + outcome.count("sum") + outcome.count("mean") == 1


def test_a_statistic_that_others_read():
    def read(x):
        length = x.norm(dim=-1, keepdim=True)
        return F.linear(x / length, W), length

    outcome = run(read, X)
    assert before(outcome) == (["div"], []) and outcome.count("norm") == 1

    def leads(x):
        size = x.abs()
        return F.linear(x / size.amax(-1, keepdim=True), W), size

    # What the statistic reduces is read elsewhere: it is written anyway, and the statistic is of another tensor.
    outcome = run(leads, X)
    assert before(outcome) == (["div"], []) and outcome.count("abs") == outcome.count("amax") == 1


def test_more_rows_than_a_prologue_takes():
    many = torch.randn(17, 16)
    outcome = run(lambda x: F.linear(F.normalize(x, dim=-1), W), many)
    assert outcome.codes == [("missed", "FX101")]
    assert "17 rows" in outcome.remarks[0].message
    assert before(outcome) == ([], [])
    assert before(run(lambda x: F.linear(F.normalize(x, dim=-1), W), many[:16]))[1] == ["row_sum"]


def test_a_sum_along_another_road_is_no_row_statistic_of_the_input():
    scale = parameter(16)
    outcome = run(lambda x: F.linear(x + F.linear(x, W[:16]).relu() * scale, V), X)
    assert not any("stays outside: " in r.message and "before it" in r.message for r in outcome.remarks)


def test_a_row_that_is_written_between_its_statistic_and_the_product():
    def function(x):
        state = x.clone()
        length = state.norm(dim=-1, keepdim=True)
        state.mul_(2.0)
        return F.linear(state / length, W), state

    outcome = run(function, X)
    assert outcome.codes == [("blocked", "FX106")]
    assert outcome.groups == []


def plus_one(x):
    x += 1
    return x


@pytest.mark.parametrize(
    "function",
    [
        lambda x: plus_one(x),
        lambda x: plus_one(x.detach()) / x.norm(dim=-1, keepdim=True),
        lambda x: (lambda t: t * plus_one(t.detach()))(torch.tanh(x)),
        lambda x: (lambda t: plus_one(t) / t.norm(dim=-1, keepdim=True))(torch.tanh(x)),
    ],
    ids=["input", "view", "view of an intermediate", "intermediate"],
)
def test_a_write_in_place_is_seen_where_it_would_be(function):
    mine, right = X.clone(), X.clone()
    outcome = Outcome()
    with torch.no_grad():
        found = torch.compile(lambda x: F.linear(function(x), W), backend=outcome)(mine)
        expected = F.linear(function(right), W)
    torch.testing.assert_close(found, expected)
    assert torch.equal(mine, right)
    assert outcome.count("iadd") == 1


@pytest.mark.parametrize("first", [torch.tanh, lambda x: x.norm(dim=-1, keepdim=True)], ids=["pointwise", "statistic"])
def test_what_others_read_is_not_computed_again_from_a_row_that_was_written_since(first):
    def function(x):
        state = x.clone()
        made = first(state)
        state.mul_(2.0)
        return F.linear(state * made, W), made

    outcome = run(function, X)
    assert before(outcome) == (["mul"], [])
    assert outcome.count("tanh") + outcome.count("norm") == 1


# -- what goes inside -----------------------------------------------------------------------------------------------

LENGTH = ["square", "row_sum", "sqrt"]
TAKEN = {
    "method norm": (lambda x: x / x.norm(dim=-1, keepdim=True), [*LENGTH, "div"]),
    "torch norm": (lambda x: x / torch.norm(x, 2, -1, True), [*LENGTH, "div"]),
    "vector norm": (lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True), [*LENGTH, "div"]),
    "linalg norm 1": (lambda x: x / torch.linalg.norm(x, 1, -1, True), ["abs", "row_sum", "div"]),
    "norm inf": (lambda x: x / x.norm(float("inf"), -1, True), ["abs", "row_amax", "div"]),
    "normalize": (lambda x: F.normalize(x, dim=-1, eps=1e-6), [*LENGTH, "clamp_min", "div"]),
    "normalize 1": (lambda x: F.normalize(x, 1.0, 2), ["abs", "row_sum", "clamp_min", "div"]),
    "amax": (
        lambda x: x / x.abs().amax(-1, keepdim=True).clamp(min=1e-5),
        ["abs", "row_amax", "clamp_min", "div"],
    ),
    "amin": (lambda x: x - torch.amin(x, [-1], keepdim=True), ["row_amin", "sub"]),
    "mean": (lambda x: x - x.mean(-1, keepdim=True), ["row_sum", "div", "sub"]),
    "sum": (lambda x: x * torch.sum(x, axis=2, keepdims=True), ["row_sum", "mul"]),
    "sum in double steps": (
        lambda x: x * (x * 0.5).sum(-1, True, dtype=torch.float32).expand(-1, -1, 16).sigmoid(),
        ["mul", "row_sum", "sigmoid", "mul"],
    ),
    "rms written out": (
        lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(),
        ["square", "row_sum", "div", "add", "sqrt", "div"],
    ),
    "the same twice": (
        lambda x: x / x.norm(dim=-1, keepdim=True) + x * torch.linalg.vector_norm(x, 2, -1, True),
        [*LENGTH, "div", "mul", "add"],
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_statistics_that_a_kernel_computes(name):
    function, steps = TAKEN[name]
    outcome = run(lambda x: F.linear(function(x), W).relu(), X)
    assert outcome.codes == []
    assert sorted(before(outcome)[0]) == sorted(steps)
    assert len(before(outcome)[1]) == 1
    (graph,) = outcome.graphs
    called = [node for node in graph.nodes if node.op.startswith("call")]
    assert len(called) == 2 and outcome.count("fused_linear") == 1, called


def test_what_the_plan_says_of_it():
    (group,) = run(lambda x: F.linear(x / x.norm(dim=-1, keepdim=True), W), X).groups
    assert group.describe() == "1 linear [24] of K 16, M 2: square, row_sum, sqrt, div before"
    assert group.x.op == "placeholder" and len(group.nodes) == 3


def test_extras_of_every_layout_around_a_statistic():
    column, gate = parameter(16), torch.randn(2, 1, 1)

    def function(x, y, gate):
        return F.linear((x + y) * column / (gate.exp() + (x * column).amax(-1, keepdim=True)).abs(), W)

    outcome = run(function, X, Y, gate)
    assert outcome.codes == [] and before(outcome)[1] == ["row_amax"]
    (group,) = outcome.groups
    assert sorted(e.layout for e in group.fused.prologue.extras) == ["column", "full", "row"]
    assert (outcome.count("exp"), outcome.count("amax")) == (1, 0)


def test_one_of_two_statistics_where_the_other_is_of_another_tensor():
    outcome = run(lambda x, y: F.linear(F.normalize(x, dim=-1) + F.normalize(y, dim=-1), W), X, Y)
    assert before(outcome)[1] == ["row_sum"]
    assert outcome.codes == [("missed", "FX101")]
    assert "has another" in outcome.remarks[0].message
    assert outcome.count("normalize") == 1


def test_linears_that_share_a_normalised_row():
    def function(x):
        n = F.normalize(x, dim=-1)
        return F.silu(F.linear(n, W)) * F.linear(n, V)

    outcome = run(function, torch.randn(3, 16))
    assert outcome.codes == [] and before(outcome)[1] == ["row_sum"]
    assert len(outcome.groups[0].linears) == 2 and outcome.count("normalize") == 0


def test_one_row_without_leading_dimensions_and_a_depth_of_one():
    assert before(run(lambda x: F.linear(F.normalize(x, dim=-1), W), X[0, 0]))[1] == ["row_sum"]
    w = parameter(24, 1)
    assert before(run(lambda x: F.linear(x / x.norm(dim=-1, keepdim=True), w), X[..., :1]))[1] == ["row_sum"]


class CosineClassifier(nn.Module):
    """Scaled cosines of features and classes, the classes normalised ahead (Gidaris and Komodakis, 1804.09458)."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(16, 32)
        self.weight = nn.Parameter(F.normalize(torch.randn(10, 32), dim=-1))
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        return self.scale * F.linear(F.normalize(F.relu(self.hidden(x)), dim=-1), self.weight)


def test_a_cosine_classifier():
    outcome = run(CosineClassifier().eval(), torch.randn(4, 16))
    hidden, classes = outcome.groups
    assert (hidden.steps, classes.steps) == (("add", "relu"), ("mul",))
    assert [step.op for step in classes.fused.prologue.steps] == [*LENGTH, "clamp_min", "div"]
    assert (outcome.codes, outcome.count("normalize")) == ([], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth(dtype):
    w = parameter(24, 16, dtype=dtype)
    for name, (function, _) in TAKEN.items():
        x = torch.randn(16, 1, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
        outcome = Outcome()
        torch._dynamo.reset()
        with torch.no_grad():
            truth = F.linear(function(x.double()), w.double())
            plain = F.linear(function(x).to(dtype), w)
            found = torch.compile(lambda x, f=function: F.linear(f(x).to(dtype), w), backend=outcome)(x)
        assert len(before(outcome)[1]) == 1, name
        assert found.dtype is dtype
        error = (found.double() - truth).abs().mean()
        assert error <= 1.2 * (plain.double() - truth).abs().mean(), name
