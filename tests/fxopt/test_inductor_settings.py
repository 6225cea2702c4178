"""What Inductor is told beside fxopt's kernels, and when it is told nothing."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.codegen import compat
from fxopt.inductor_settings import COMBINED, beside_kernels
from fxopt.testing import TINY

IDS = torch.tensor([[5, 17, 3, 99, 42]])


@torch.library.custom_op("fxopt_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Grouped(nn.Module):
    """An attention that is packed into an operator of fxopt, and whatever stands behind it."""

    def __init__(self, after=None) -> None:
        super().__init__()
        self.after = after

    def forward(self, q, k):
        repeated = k.repeat_interleave(4, 1)
        found = nn.functional.scaled_dot_product_attention(q, repeated, repeated)
        return self.after(found) if self.after is not None else found


def settings_of(module, monkeypatch):
    """The settings that Inductor is given for a module."""
    seen = []

    def note(gm, inputs, mode, patches):
        seen.append(dict(patches))
        return gm.forward

    monkeypatch.setattr(compat, "compile_with_inductor", note)
    q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 40, 16)
    torch.testing.assert_close(torch.compile(module, backend="fxopt")(q, k), module(q, k))
    return seen[0]


@torch.no_grad()
def test_a_graph_of_known_operators_goes_without_asserts(monkeypatch):
    assert settings_of(Grouped(), monkeypatch)["size_asserts"] is False


@torch.no_grad()
def test_somebody_elses_operator_keeps_them(monkeypatch):
    assert "size_asserts" not in settings_of(Grouped(double), monkeypatch)


@torch.no_grad()
def test_the_variable_of_inductor_keeps_them(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_SIZE_ASSERTS", "1")
    assert "size_asserts" not in settings_of(Grouped(), monkeypatch)


def test_a_graph_that_records_gradients_keeps_them(monkeypatch):
    assert "size_asserts" not in settings_of(Grouped(), monkeypatch)


@torch.no_grad()
def test_a_graph_without_operators_of_fxopt_is_inductors_own(monkeypatch):
    model = TINY["handwritten"]()
    seen = []
    monkeypatch.setattr(
        compat, "compile_with_inductor", lambda gm, inputs, mode, patches: seen.append(patches) or gm.forward
    )
    torch.compile(model, backend="fxopt")(IDS)
    assert seen == [{}]


@torch.no_grad()
@pytest.mark.parametrize(("device", "combined"), [("cuda", COMBINED), ("cpu", {})])
def test_independent_kernels_are_combined_on_a_gpu(device, combined):
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["example_value"] = torch.empty(4, device=device)
    graph.output(graph.call_function(torch.sin, (x,)))
    found = beside_kernels(fx.GraphModule(nn.Module(), graph))
    assert found == {"size_asserts": False} | combined
