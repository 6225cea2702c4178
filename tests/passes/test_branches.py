"""Exact passes in the branches of a conditional: each branch is a graph of its own, and told of as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.codegen import compat
from fxopt.passes.provenance import ID, ORIGINS, PASS, all_nodes, inner_graphs, node_id, number_nodes
from fxopt.passes.technique import Technique
from fxopt.testing import capture

pytestmark = pytest.mark.branches_write

B, H, KV, S, D = 2, 4, 2, 32, 16


class Branching(nn.Module):
    """A step on a preallocated cache in one branch, a causal prompt in the other; `nested`: the step is within two."""

    def __init__(self, nested=False):
        super().__init__()
        self.nested = nested
        self.register_buffer("keys", torch.zeros(B, KV, S, D))
        self.register_buffer("values", torch.zeros(B, KV, S, D))

    def step(self, query, new, mask, place):
        self.keys.index_copy_(2, place, new)
        self.values.index_copy_(2, place, 2 * new)
        cache = (self.keys, self.values)
        keys, values = (t[:, :, None].expand(B, KV, H // KV, S, D).reshape(B, H, S, D) for t in cache)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).clone()

    def forward(self, query, new, mask, place):
        def some():
            return self.step(query, new, mask, place)

        def inner():
            return torch.cond(place.sum() > 100, lambda: query * 2.0, some, ())

        return torch.cond(query.sum() > 0, inner if self.nested else some, lambda: query * 1.0, ())


@pytest.fixture
def step():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(S) <= 5)[None, None, None].expand(B, 1, 1, S).contiguous()
    query = torch.randn(B, H, 1, D, generator=generator)
    query[0, 0, 0, 0] += 1000.0
    return query, torch.randn(B, KV, 1, D, generator=generator), mask, torch.tensor([5])


@pytest.fixture
def lowered(monkeypatch):
    """The rewritten graphs, run as they stand."""
    graphs = []
    monkeypatch.setattr(compat, "compile_with_inductor", lambda gm, *_: graphs.append(gm) or gm.forward)
    return graphs


def operators(graph):
    return [str(n.target) for n in graph.nodes if n.op == "call_function" and "fxopt." in str(n.target)]


def test_each_exact_pass_rewrites_the_attention_in_its_branch(lowered, step):
    model, twin = Branching().eval(), Branching().eval()
    with torch.no_grad():
        expected, kept = twin(*step), twin.keys
        fxopt.compile(model, strict=True)
        torch.testing.assert_close(model(*step), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.keys, kept) and kept[:, :, 5].any()
        declined = (-step[0].abs(), *step[1:])
        assert torch.equal(model(*declined), declined[0])
    (graph,) = lowered
    report = fxopt.report(model)
    assert {name: report.count(name) for name in ("gqa_packing", "cache_extent", "mask_structure")} == {
        "gqa_packing": 1, "cache_extent": 1, "mask_structure": 0,
    }  # fmt: skip
    assert not operators(graph.graph)
    inner = inner_graphs(graph.graph)
    taken = [name for name, branch in inner.items() if operators(branch.graph)]
    assert len(inner) == 2 and len(taken) == 1 and taken[0].startswith("cond_true")
    assert operators(inner[taken[0]].graph) == ["fxopt.attention.default"]
    told = [r for r in report.remarks if r.technique in ("gqa_packing", "cache_extent")]
    assert all(r.message.endswith(f"(in the branch {taken[0]})") and r.source for r in told), told


def test_a_branch_within_a_branch(lowered, step):
    model = Branching(nested=True).eval()
    with torch.no_grad():
        expected = Branching(nested=True).eval()(*step)
        fxopt.compile(model, strict=True)
        torch.testing.assert_close(model(*step), expected, rtol=1e-5, atol=1e-5)
    assert fxopt.report(model).count("gqa_packing") == fxopt.report(model).count("cache_extent") == 1
    (name,) = [n for n, branch in inner_graphs(lowered[0].graph).items() if operators(branch.graph)]
    assert name.count(".") == 1 and "cond_true" in name.split(".")[0] and "cond_false" in name.split(".")[1]


def test_descent_and_ids_of_what_a_pass_makes_in_a_branch(lowered, step):
    model = Branching().eval()
    fxopt.compile(model, strict=True)
    with torch.no_grad():
        model(*step)
    nodes = [n for n in all_nodes(lowered[0].graph) if n.op != "output"]
    ids = [node_id(n) for n in nodes]
    assert -1 not in ids and len(set(ids)) == len(ids)
    made = [n for n in nodes if PASS in n.meta["custom"] and n.graph is not lowered[0].graph]
    assert {n.meta["custom"][PASS] for n in made} >= {"cache_extent"}
    known = set(ids) | {n.meta["custom"][ID] for n in nodes}
    assert all(n.meta["custom"][ORIGINS] and "example_value" in n.meta for n in made)
    assert all(min(n.meta["custom"][ORIGINS]) < min(n.meta["custom"][ID] for n in made) for n in made), known


@pytest.mark.parametrize("name", ["gqa_packing", "cache_extent"])
def test_what_is_disabled_stays_out_of_branches(lowered, step, name):
    model = Branching().eval()
    fxopt.compile(model, disable=(name,))
    with torch.no_grad():
        torch.testing.assert_close(model(*step), Branching().eval()(*step), rtol=1e-5, atol=1e-5)
    assert fxopt.report(model).count(name) == 0


def test_a_pass_that_fails_in_a_branch_leaves_every_graph_as_it_was(lowered, step, monkeypatch):
    @dataclass(frozen=True)
    class Failing(Technique):
        name: ClassVar[str] = "failing_in_branches"
        exact: ClassVar[bool] = True
        enters_branches: ClassVar[bool] = True

        def reference(self, model):
            return model

        def rewrite(self, graph, context):
            for node in graph.nodes:
                if getattr(node.target, "__name__", "") in ("mul", "scaled_dot_product_attention"):
                    context.rewriter.replace(node, context.rewriter.call(torch.neg, (node,), like=node, after=node))
            if context.branch:
                raise RuntimeError("not here")

    try:
        model = Branching().eval()
        fxopt.compile(model, Failing(), disable=("gqa_packing", "cache_extent", "mask_structure"))
        with torch.no_grad(), pytest.warns(UserWarning, match="left the graph as it was"):
            torch.testing.assert_close(model(*step), Branching().eval()(*step), rtol=1e-5, atol=1e-5)
        targets = {getattr(n.target, "__name__", "") for n in all_nodes(lowered[0].graph)}
        assert "neg" not in targets and "scaled_dot_product_attention" in targets
        with torch.no_grad(), pytest.raises(Exception, match="not here"):
            fxopt.compile(model, Failing(), strict=True)(*step)
    finally:
        del Technique.registry["failing_in_branches"]


def test_a_graph_that_is_captured_keeps_its_own_branches(lowered, step):
    """Dynamo's graph is not ours to change: what a pass rewrites is a copy, branches included."""
    from fxopt.backend import own_module

    (captured,) = capture(Branching().eval(), *step)
    number_nodes(captured.graph)
    copied = own_module(captured)
    before, after = inner_graphs(captured.graph), inner_graphs(copied.graph)
    assert before.keys() == after.keys() and before
    assert not any(before[name] is after[name] or before[name].graph is after[name].graph for name in before)
    values = [n.meta["example_value"] for n in captured.graph.find_nodes(op="placeholder")]
    given = [torch.ones(v.shape).to(v.dtype) for v in values]
    torch.testing.assert_close(copied(*map(torch.clone, given)), captured(*map(torch.clone, given)))
