"""CpuLinear: what it must leave alone, what it takes on real models, and that the model says the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.codegen.kernels import cpu_linear

WIDTH = 256


class Steps(nn.Module):
    """Three linears: of a weight large enough, of one that is not, and of one without a bias."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype)
        self.small = nn.Linear(2 * WIDTH, 16, dtype=dtype)
        self.head = nn.Linear(16, 8192, bias=False, dtype=dtype)

    def forward(self, x):
        return self.head(self.small(F.silu(self.up(x))))


def remarks(model):
    return [r for r in fxopt.report(model).remarks if r.technique == "cpu_linear"]


def applied(model):
    return sorted(r.path for r in remarks(model) if r.status == "applied")


def compiled(model, x, **options):
    own = fxopt.compile(model, strict=True, **options)
    with torch.no_grad():
        torch.testing.assert_close(own(x), type(model).forward(model, x), atol=2e-5, rtol=2e-5)
    return own


def test_large_weights_of_few_rows_and_no_others():
    model = compiled(Steps(), torch.randn(2, 1, WIDTH))
    assert applied(model) == ["head", "up"]
    (left,) = [r for r in remarks(model) if r.status == "missed"]
    assert (left.path, left.code) == ("small", "FX302")
    assert "32 kB" in left.message
    assert "2 rows by [512, 256]" in next(r.message for r in remarks(model) if r.path == "up")
    answer = str(fxopt.report(model).why("cpu_linear", "small"))
    assert "32 kB of weights are too few" in answer


def test_many_rows():
    model = compiled(Steps(), torch.randn(1, 25, WIDTH))
    assert applied(model) == []
    assert {r.code for r in remarks(model)} == {"FX301"}  # before the size is looked at
    assert any("25 rows" in r.message for r in remarks(model))


def test_disabled():
    model = compiled(Steps(), torch.randn(1, WIDTH), disable=("cpu_linear",))
    assert {r.code for r in remarks(model)} == {"FX501"}


def test_training_is_left_alone():
    model = fxopt.compile(Steps(), strict=True)
    model(torch.randn(1, WIDTH)).sum().backward()
    assert model.up.weight.grad is not None
    assert {(r.status, r.code) for r in remarks(model)} == {("blocked", "FX205")}


def test_autocast_is_left_alone():
    model, x = fxopt.compile(Steps(), strict=True), torch.randn(1, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, Steps.forward(model, x), atol=2e-2, rtol=2e-2)
    assert applied(model) == []
    assert any("autocast" in r.message for r in remarks(model))


def test_other_dtypes():
    double = fxopt.compile(Steps(torch.float64), strict=True)
    half = fxopt.compile(Steps(torch.bfloat16), strict=True)
    with torch.no_grad():
        double(torch.randn(1, WIDTH, dtype=torch.float64))
        x = torch.randn(3, WIDTH).bfloat16()
        torch.testing.assert_close(half(x), Steps.forward(half, x), atol=2e-2, rtol=2e-2)
    assert applied(double) == []
    assert {r.code for r in remarks(double)} == {"FX201"} and "float64" in remarks(double)[0].message
    assert applied(half) == ["head", "up"]  # 256 kB in bfloat16 too: 512 x 256 and 8192 x 16


def test_a_number_of_rows_that_varies():
    model = fxopt.compile(Steps(), dynamic=True, strict=True)
    with torch.no_grad():
        for rows in (3, 7, 24, 25, 60):
            x = torch.randn(rows, WIDTH)
            torch.testing.assert_close(model(x), Steps.forward(model, x), atol=2e-5, rtol=2e-5)
    assert applied(model) == ["head", "up"]


def test_weights_that_change_are_followed():
    model, x = Steps(), torch.randn(1, WIDTH)
    compiled(model, x)
    with torch.no_grad():
        model.up.weight.mul_(2.0)
        torch.testing.assert_close(model(x), Steps.forward(model, x))
        model.head = nn.Linear(16, 8192, bias=False)
        torch.testing.assert_close(model(x), Steps.forward(model, x))


def test_tied_and_sliced_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(2048, WIDTH)

        def forward(self, ids):
            x = self.embed(ids)
            return (
                F.linear(x, self.embed.weight),
                F.linear(x, self.embed.weight[::2]),
                F.linear(x, self.embed.weight.T[:, :WIDTH]),
                F.linear(x, self.embed.weight.view(WIDTH, -1)[:, : 2 * WIDTH : 2]),
            )

    model = fxopt.compile(Tied(), strict=True)
    ids = torch.tensor([[3], [5]])
    with torch.no_grad():
        for own, eager in zip(model(ids), Tied.forward(model, ids), strict=True):
            torch.testing.assert_close(own, eager, atol=1e-4, rtol=1e-4)
    status = [(r.status, r.code) for r in remarks(model)]
    assert status.count(("applied", "")) == 3
    assert [r.code for r in remarks(model) if "strides" in r.message] == ["FX202"]


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_gives_the_same_tokens(cache, batch, eager_lowering):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=512, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 512, (batch, 30))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {
        "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache,
        "disable_compile": True,
    }  # fmt: skip
    expected = model.generate(ids, **settings)
    fxopt.compile(model, strict=True)
    assert torch.equal(model.generate(ids, **settings), expected)
    step = fxopt.reports()[-1]
    taken = [r for r in step.remarks if r.technique == "cpu_linear" and r.status == "applied"]
    assert len({r.path for r in taken}) == 2 * 7 + 1
    assert all(" by [" in r.message for r in taken)


def conv1d(*, beta=1, rows=2):
    """GPT-2's Conv1D: a bias and ``x @ weight``, the weight [K, N]."""

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / WIDTH**0.5)
            self.bias = nn.Parameter(torch.randn(3 * WIDTH))

        def forward(self, x):
            options = {} if beta == 1 else {"beta": beta}
            return torch.addmm(self.bias, x.view(-1, WIDTH), self.weight, **options)

    model = fxopt.compile(Conv1D(), strict=True)
    x = torch.randn(rows, 1, WIDTH)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), type(model).forward(model, x), atol=2e-5, rtol=2e-5)
            model.weight.mul_(0.5)
    return model


def test_a_weight_stored_by_columns():
    (remark,) = remarks(conv1d())
    assert remark.status == "applied"
    assert "2 rows by [768, 256], stored [K, N]" in remark.message


def test_a_weight_stored_by_columns_that_stays():
    assert remarks(conv1d(beta=2)) == []
    (remark,) = remarks(conv1d(rows=9))
    assert (remark.status, remark.code) == ("missed", "FX301")


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_gpt2_gives_the_same_tokens(cache, eager_lowering):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=512, eos_token_id=None, bos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 512, (2, 20))
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(ids, **settings)
    fxopt.compile(model, strict=True)
    assert torch.equal(model.generate(ids, **settings), expected)
    taken = [r for r in fxopt.reports()[-1].remarks if r.technique == "cpu_linear" and r.status == "applied"]
    assert len({r.path for r in taken}) == 2 * 4 + 1


@pytest.mark.branches_write
def test_linears_in_a_branch():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.other(x), (x,))

    model = fxopt.compile(Either(), strict=True)
    with torch.no_grad():
        for x in (torch.ones(1, WIDTH), -torch.ones(1, WIDTH)):
            torch.testing.assert_close(model(x), Either.forward(model, x), atol=2e-5, rtol=2e-5)
    assert len(applied(model)) == 2


def test_nothing_on_another_device():
    from fxopt.elsewhere import move_graph
    from fxopt.passes.context import PassContext
    from fxopt.passes.record import GraphRecord
    from fxopt.testing import capture

    with torch.no_grad():
        (gm,) = capture(Steps(), torch.randn(1, WIDTH))
    move_graph(gm.graph)
    context = PassContext(gm.graph, "cpu_linear", GraphRecord(0, "-", "test"))
    fxopt.CpuLinear().rewrite(gm.graph, context)
    assert context.remarks == []


def test_the_limit_is_where_the_kernel_ends():
    for dtype, most in cpu_linear.MOST_ROWS.items():
        weight = torch.zeros(1024, 1024, dtype=dtype)
        assert not cpu_linear.refused(torch.zeros(most, 1024, dtype=dtype), weight, None)
        assert cpu_linear.refused(torch.zeros(most + 1, 1024, dtype=dtype), weight, None)
