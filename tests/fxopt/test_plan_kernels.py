"""Kernels of sparse attention and of routed blocks in a plan: told by following the operator up to its launches."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.codegen import ahead, roofline
from fxopt.codegen.ahead_launched import signature
from fxopt.codegen.kernels import launch, select_scores
from fxopt.planning import decode_inputs

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")


def small_llama(device="meta"):
    config = transformers.LlamaConfig(hidden_size=1024, num_hidden_layers=2, num_attention_heads=8,
                                      num_key_value_heads=2, intermediate_size=2048, vocab_size=512)  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def stems(report):
    return {kernel.name.rpartition("_")[0]: kernel for kernel in report.kernels if not kernel.name.startswith("gemv")}


def test_sparse_attention_is_planned_with_its_kernels():
    model = small_llama()
    technique = fxopt.SparseAttention(method="pages", budget=512, min_length=1024)
    report = fxopt.plan(model, technique, inputs=decode_inputs(model, cache=8192), target="h200")
    assert report.count("sparse_attention") == 2
    found = stems(report)
    assert list(found) == ["update_page_bounds", "page_scores", "choose_blocks", "listed_attention_online"]
    for kernel in found.values():
        assert kernel.modules == ("model.layers.0.self_attn", "model.layers.1.self_attn")
        assert kernel.resources["target"] == "sm_90"
        assert "import triton" in kernel.source and "@triton.jit" in kernel.source
        assert any(k.endswith("registers") and v > 0 for k, v in kernel.resources.items()), kernel.resources
    assert {"update registers", "commit registers"} <= set(found["update_page_bounds"].resources)
    assert found["page_scores"].configuration == {"programs": 16, "launches": 1, "num_warps": 4}  # 512 pages, 2 heads
    assert {"online_split registers", "online_combine spills"} <= set(found["listed_attention_online"].resources)


@pytest.mark.filterwarnings("ignore:mixture of depths")
def test_routed_blocks_are_planned_with_their_kernels():
    model = fxopt.MixtureOfDepths(capacity=0.5, every=2)(small_llama())
    report = fxopt.plan(model, inputs={"input_ids": torch.zeros(1, 256, dtype=torch.long)}, target="h200")
    assert report.count("mixture_of_depths") == 1
    found = stems(report)
    (message,) = [r.message for r in report.remarks if r.technique == "mixture_of_depths"]
    assert "decides, on the device: room for 161 of 256 tokens" in message  # as on the target, where no host decides
    for name in ("gather_norm", "scatter_residual", "linear_if"):
        assert found[name].family == "routing" and found[name].resources["registers"] > 0
    assert found["gather_norm"].configuration["programs"] == 161  # one for each token that there is room for


def test_a_launch_is_typed_as_triton_would_find_it():
    query, bounds = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16), torch.zeros(1, 2, 512, 256, dtype=torch.bfloat16)
    with launch.noting() as notes:
        select_scores.page_scores(query, bounds, torch.tensor(7), page=16, least=100)
    (note,) = notes
    types, constants, aligned = signature(note)
    assert types["query"] == types["bounds"] == "*bf16" and types["out"] == "*fp32" and types["extent"] == "*i64"
    assert types["kv_heads"] == types["least"] == "i32" and constants["query_dim"] == 1
    assert {"query", "query_head"} <= set(aligned) and "least" not in aligned and "kv_heads" not in aligned
    with pytest.raises(RuntimeError, match="needs a GPU"):  # outside of the block it is started again
        select_scores.page_scores(query, bounds, page=16)


def test_sizes_that_are_symbols_are_left_to_each_call():
    from torch._dynamo.source import ConstantSource
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
    key = mode.from_tensor(torch.zeros(1, 2, 512, 256), symbolic_context=context, source=ConstantSource("key"))
    query = mode.from_tensor(torch.zeros(1, 8, 1, 128), static_shapes=True)
    target, device = torch.ops.fxopt.page_scores.default, roofline.DEVICES["H200"]
    assert ahead.kernel_of(target, (query, key), {"page": 16}, device) is None
    fixed = mode.from_tensor(torch.zeros(1, 2, 512, 256), static_shapes=True)
    assert ahead.kernel_of(target, (query, fixed), {"page": 16}, device).family == "select"
