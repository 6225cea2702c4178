"""Graphs rewritten by FlatGemm's two halves, with what was found; shared by its tests."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.kernel_plan import record_kernels_here
from fxopt.passes.context import PassContext
from fxopt.passes.flat_gemm import apply_groups, plan_groups
from fxopt.passes.nodes import name_of
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import GraphRecord
from fxopt.passes.rewriter import verify


class Outcome:
    """A backend that rewrites every graph it is given, and keeps what it found."""

    def __init__(self, technique=None, max_m=64):
        self.technique, self.max_m = technique, max_m
        self.graphs, self.groups, self.remarks, self.records = [], [], [], []

    def __call__(self, gm, inputs, **_):
        number_nodes(gm.graph)
        record = GraphRecord(0, "-", "test")
        context = PassContext(gm.graph, "flat_gemm", record)
        before = [n.target for n in gm.graph.nodes]
        if self.technique is not None:
            self.technique.rewrite(gm.graph, context)
        else:
            groups = plan_groups(gm.graph, context, self.max_m)
            assert [n.target for n in gm.graph.nodes] == before, "planning changed the graph"
            apply_groups(groups, context)
            self.groups += groups
        verify(gm.graph)
        record_kernels_here(gm, record)
        gm.recompile()
        self.graphs.append(gm.graph)
        self.remarks += context.remarks
        self.records.append(record)
        return gm.forward

    @property
    def codes(self):
        return [(r.status, r.code) for r in self.remarks]

    def count(self, name):
        return sum(name_of(n) == name for graph in self.graphs for n in graph.nodes)


def run(function, *inputs, technique=None, max_m=64, dynamic=False, grad=False, **kwargs):
    outcome = Outcome(technique, max_m)
    with torch.set_grad_enabled(grad):
        result = torch.compile(function, backend=outcome, dynamic=dynamic)(*inputs, **kwargs)
        torch.testing.assert_close(result, function(*inputs, **kwargs))
    return outcome


def parameter(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return nn.Parameter(torch.randn(*shape, generator=generator).to(dtype) * 0.3)


X = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5))
W, V = parameter(24, 16), parameter(24, 16, seed=1)
