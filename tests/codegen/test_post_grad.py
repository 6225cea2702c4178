"""The post-grad pass: what it is to Inductor's caches; the kernels it puts in compute what the operator does."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen import dataflow, post_grad, source
from fxopt.codegen.kernels.epilogue import Epilogue, Output, Step
from fxopt.codegen.kernels.gemm import Config
from fxopt.codegen.kernels.gemm_launch import build, launches, workspace
from fxopt.codegen.ops.fused_linear import sample_inputs

HERE = pathlib.Path(__file__).parent
OP = torch.ops.fxopt.fused_linear.default


def graph_module(**how):
    fused, x, weights, extras = sample_inputs(**how)
    return make_fx(lambda x: OP(x, weights, extras, group=fused.encode())[0])(x)


def compiled_once(x):
    """Compiles a function with an operator of fxopt afresh; whether Inductor's caches hit, whether they missed."""
    fused, _, weights, extras = sample_inputs()
    group = fused.encode()

    def backend(gm, inputs):
        from fxopt.codegen import compat

        return compat.compile_with_inductor(gm, inputs, None, post_grad.patches(gm))

    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        # Nothing beside the operator, so that no C++ has to be compiled.
        found = torch.compile(lambda x: OP(x, weights, extras, group=group)[0], backend=backend)(x)
    torch.testing.assert_close(found, OP(x, weights, extras, group=group)[0])
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    misses = counters["aot_autograd"]["autograd_cache_miss"] + counters["inductor"]["fxgraph_cache_miss"]
    return hits > 0, misses > 0


def test_compiled_code_does_not_outlive_the_operators(monkeypatch):
    _, x, _, _ = sample_inputs()
    with torch._inductor.utils.fresh_cache():
        assert compiled_once(x) == (False, True)
        assert compiled_once(x) == (True, False)
        monkeypatch.setattr(post_grad, "digest", lambda: "another fxopt")
        assert compiled_once(x) == (False, True), "code of another fxopt was used"


def test_digest_covers_every_source_of_codegen(monkeypatch, tmp_path):
    before = post_grad.digest.__wrapped__()
    folder = tmp_path / "codegen"
    (folder / "ops").mkdir(parents=True)
    (folder / "post_grad.py").write_text("")
    (folder / "ops" / "attention.py").write_text('SCHEMA = "attention(Tensor query) -> Tensor"')
    monkeypatch.setattr(post_grad, "__file__", str(folder / "post_grad.py"))
    first = post_grad.digest.__wrapped__()
    (folder / "ops" / "attention.py").write_text('SCHEMA = "attention(Tensor query, int more) -> Tensor"')
    assert len({before, first, post_grad.digest.__wrapped__()}) == 3


def test_a_measured_table_is_part_of_the_key(monkeypatch, tmp_path):
    monkeypatch.setenv(source.CACHE_VARIABLE, str(tmp_path))
    given = frozenset({""})
    before = post_grad.Lowering(given).uuid()
    assert post_grad.Lowering(given).uuid() == before
    key = dataflow.TableKey.current("bfloat16")
    dataflow.Table(key).save(tmp_path / "tables" / key.file_name)
    after = post_grad.Lowering(given).uuid()
    assert after != before
    assert post_grad.Lowering(frozenset({str(tmp_path / "tables")})).uuid() != before
    assert post_grad.Lowering().uuid() not in (before, after)


def test_a_graph_without_operators_of_fxopt_is_left_to_the_shared_cache():
    assert post_grad.patches(make_fx(lambda x: x + 1)(torch.ones(2))) == {}
    (slot,) = post_grad.patches(graph_module())
    assert slot == "post_grad_custom_post_pass"


class Named(CustomGraphPass):
    def __init__(self, name="theirs"):
        self.name, self.seen = name, 0

    def __call__(self, graph):
        self.seen += 1

    def uuid(self):
        return self.name


def test_passes_that_a_user_registered_keep_their_place():
    theirs, unnamed = Named(), Named(None)
    with torch._inductor.config.patch(post_grad_custom_post_pass=theirs):
        assert list(post_grad.patches(graph_module())) == ["post_grad_custom_pre_pass"]
        with torch._inductor.config.patch(post_grad_custom_pre_pass=unnamed):
            ((slot, lowering),) = post_grad.patches(graph_module()).items()
    assert slot == "post_grad_custom_post_pass"
    lowering(graph_module().graph)
    assert theirs.seen == 1
    assert "theirs" in lowering.uuid()
    assert post_grad.Lowering(others=[unnamed]).uuid() is None, "a pass without a name switches the caches off"


def with_statistic(fused):
    """The same group whose row is divided by its largest entry, in place of a norm."""
    steps = (Step("t0", "abs", ("p0",), "abs"), Step("t1", "row_amax", ("t0",), "amax"),
             Step("t2", "div", ("p0", "t1"), "div"))  # fmt: skip
    return replace(fused, prologue=Epilogue(1, (Output("t2", fused.dtype),), steps))


KERNELS = """
import torch
from test_post_grad import with_statistic
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional as launched
from torch.fx.experimental.proxy_tensor import make_fx
from fxopt.codegen import lowering, post_grad, roofline
from fxopt.codegen.dataflow import Dataflow
from fxopt.codegen.ops import fused_linear

lowering.KERNEL_DEVICES = ("cpu",)
Dataflow.choose = lambda self, m, n, k: "library" if m > self.max_m else "gemv" if m <= 2 else "flat"
H200 = roofline.DEVICES["H200"]
fused_linear.dataflow = lambda dtype, device, tables, max_m: Dataflow(dtype, device, None, max_m, H200)
OP = torch.ops.fxopt.fused_linear.default
kernels = {}
for rows, how in (
    ((1, 1), {}),
    ((2, 1), {"norm": "layer", "gated": False, "widths": (24, 9, 16)}),
    ((5,), {"norm": "", "widths": (40,), "gated": False, "depth": 1100}),
    ((3, 2), {"depth": 1100}),
    ((2,), {"norm": ""}),
    ((7,), {"norm": "", "depth": 1100}),
):
    fused, x, weights, extras = fused_linear.sample_inputs(rows=rows, **how)
    fused = with_statistic(fused) if rows in ((2,), (7,)) else fused
    both = torch.cat(weights)  # slices: rows of a weight at a distance, an offset into its storage
    weights = list(both.split(fused.widths))
    def function(x, weights, extras):
        return [y + 1 for y in OP(x, weights, extras, group=fused.encode(), origin="mlp")]
    gm = make_fx(function, tracing_mode="fake")(x, weights, extras)
    refused = []
    post_grad.lower(gm.graph, refused)
    gm.recompile()
    assert not refused, refused
    nodes = [n for n in gm.graph.nodes if n.target is launched]
    assert not [n for n in gm.graph.nodes if n.target is OP]
    kernels[str(rows)] = [len(nodes), sorted(name for n in nodes for name in n.kwargs["tensors_to_clone"])]
    for got, right in zip(gm(x, weights, extras), function(x, weights, extras), strict=True):
        assert got.shape == right.shape and got.is_contiguous()
        torch.testing.assert_close(got, right, rtol=2e-5, atol=2e-5)
assert kernels["(1, 1)"] == [1, ["out0"]], kernels
assert kernels["(2, 1)"] == [1, ["out0", "out1", "out2"]], kernels
assert kernels["(5,)"] == [2, ["out0", "partials"]], kernels
assert kernels["(2,)"] == [1, ["out0"]], kernels
assert kernels["(7,)"] == [2, ["out0", "partials"]], kernels
assert kernels["(3, 2)"] == [2, ["out0", "partials", "squares"]], kernels

# Rows that are known at each call only, rows at no one distance, and a limit: the operator stays and chooses then.
fused, x, weights, extras = fused_linear.sample_inputs(rows=(2, 3))
def function(x, **more):
    return OP(x, weights, extras, group=fused.encode(), **more)
for x, mode, more, reasons in (
    (x, "symbolic", {}, 0),
    (x.transpose(0, 1).contiguous().transpose(0, 1), "fake", {}, 1),
    (x, "fake", {"max_m": 4}, 0),
):
    gm = make_fx(lambda x: function(x, **more), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    refused = []
    post_grad.lower(gm.graph, refused)
    assert len(refused) == reasons, refused
    assert [n for n in gm.graph.nodes if n.target is OP]
print("agreed")
"""


def test_lowered_graphs_compute_what_the_operator_does(tmp_path):
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "FXOPT_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", KERNELS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("agreed"), done.stderr[-3000:]


def test_inductor_sees_what_the_kernels_write(monkeypatch):
    """Inductor reads the intermediate code of a kernel for what it writes; a weight that it took for written would be
    copied. It needs to know a target and no device."""
    pytest.importorskip("triton")
    import triton
    from torch._higher_order_ops import triton_kernel_wrap
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_device_interface(self):
            return torch.cuda

    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(), raising=False)
    written = []
    for how, config in (
        ({}, Config("gemv", 1, 8, 64)),
        ({"depth": 1100}, Config("flat", 16, 32, 32, splits=2)),
        ({"norm": "layer", "gated": False, "widths": (24, 9, 16)}, Config("flat", 16, 16, 16)),
        ({"norm": ""}, Config("flat", 16, 16, 16)),
    ):
        fused, x, weights, extras = sample_inputs(**how)
        fused = fused if fused.norm is not None else with_statistic(fused)
        kernel = build(fused, config)
        values = {"x": x, "x_stride": x.shape[-1], "M": 2}
        for index, weight in enumerate(weights):
            values |= {f"w{index}": weight, f"w{index}_stride": weight.stride(0)}
        for kind, extra in zip(fused.extras, extras, strict=True):
            values |= {kind.name: extra, f"{kind.name}_stride": extra.shape[-1]}
        values |= {name: torch.empty(shape) for name, shape in workspace(kernel, 2).items()}
        values |= {f"out{i}": torch.empty(2, width) for i, width in enumerate(fused.output_widths)}
        for launch in launches(kernel, 2):
            given = {name: values[name] for name in launch.parameters} | dict(launch.constants)
            if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
                accesses = triton_kernel_wrap.identify_accessed_tensors(launch.jit, given, {})
                written.append(sorted(d.name for d in accesses.read_writes.writes))
            else:  # torch 2.11
                written.append(sorted(triton_kernel_wrap.identify_mutated_tensors(launch.jit, given, {})))
    assert written == [["out0"], ["partials", "squares"], ["out0"], ["out0", "out1", "out2"], ["out0"]]
