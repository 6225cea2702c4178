"""The backend on the road to Inductor: nothing changes where nothing is rewritten, caches hit, generate is reached."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import fxopt
from fxopt import LayerSkip
from fxopt.codegen import compat
from fxopt.testing import TINY, Handwritten

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])


def test_the_backend_is_listed_once():
    assert torch.compiler.list_backends().count("fxopt") == 1


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_untouched_graph_is_bit_equal_to_inductor(mode):
    model = TINY["handwritten"]()
    with torch.no_grad():
        expected = torch.compile(model, backend="inductor", mode=mode)(IDS)
        torch._dynamo.reset()
        found = torch.compile(model, backend="fxopt", mode=mode)(IDS)
    assert torch.equal(found, expected)


def test_training_through_inductor_gives_the_same_gradients():
    def gradients(backend):
        model = TINY["handwritten"]().train()
        torch._dynamo.reset()
        torch.compile(model, backend=backend)(IDS).square().mean().backward()
        return [p.grad for p in model.parameters()]

    for found, expected in zip(gradients("fxopt"), gradients("inductor"), strict=True):
        assert torch.equal(found, expected)


def test_skipping_through_inductor_equals_the_deleted_model():
    model = TINY["llama"]()
    technique = LayerSkip(skip=(1,))
    reference = fxopt.reference(model, technique)
    ids = torch.tensor([[5, 17, 3, 99, 42]])
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    with torch.no_grad():
        expected = reference.generate(ids, **settings)
        fxopt.compile(model, technique)
        assert torch.equal(model.generate(ids, **settings), expected)
        graphs = len(fxopt.report(model).graphs)
        for _ in range(2):
            assert torch.equal(model.generate(ids, **settings), expected)
    assert len(fxopt.report(model).graphs) == graphs, "a request of equal shapes recompiled"


@pytest.mark.skipif(
    compat.torch_version() < (2, 12),
    reason="Inductor of torch 2.11 alone writes C++ that does not compile for a growing cache, on some CPUs",
)
def test_stand_ins_of_a_growing_cache_go_through_inductor():
    model = TINY["llama"]()
    technique = LayerSkip(skip=(0,))
    reference = fxopt.reference(model, technique)
    ids = torch.tensor([[5, 17, 3, 99, 42]])
    with torch.no_grad():
        expected = reference.generate(ids, max_new_tokens=8, do_sample=False)
        fxopt.compile(model, technique)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


_SECOND = """
import torch
from torch._dynamo.utils import counters
import fxopt
from fxopt.testing import TINY
model = TINY["llama"]()
fxopt.compile(model, fxopt.{technique})
with torch.no_grad():
    model(input_ids=torch.tensor([[5, 17, 3, 99, 42]]), use_cache=False)
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_bypass"])
"""


@pytest.mark.parametrize(
    "technique",
    ["LayerSkip(skip=(1,))", pytest.param("EarlyExit(layers=(1,), threshold=0.5)", marks=pytest.mark.slow)],
)
def test_compile_caches_hit_in_a_second_process(tmp_path, technique):
    code = _SECOND.replace("{technique}", technique)
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    outputs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert outputs == [["0", "0"], ["1", "0"]]


def test_threads_share_compiled_code(eager_lowering):
    model = fxopt.compile(TINY["handwritten"](), LayerSkip(skip=(1,)))
    expected = model(IDS)
    results = []
    threads = [threading.Thread(target=lambda: results.append(model(IDS))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(r, expected) for r in results)
    assert len(fxopt.report(model).graphs) == 1


def test_generate_of_a_wrapped_model_warns_once(eager_lowering):
    model = torch.compile(TINY["llama"](), backend="fxopt")
    ids = torch.tensor([[5, 17, 3]])
    with pytest.warns(UserWarning, match=r"fxopt\.compile\(model\)") as caught:
        model.generate(ids, max_new_tokens=2)
        model.generate(ids, max_new_tokens=2)
    assert len([w for w in caught if "not reached" in str(w.message)]) == 1


def test_generate_of_a_model_wrapped_with_another_backend_is_not_our_business():
    model = torch.compile(TINY["llama"](), backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fxopt")
        model.generate(torch.tensor([[5, 17, 3]]), max_new_tokens=2)


def test_compiling_again_replaces_the_setting_and_going_back_finds_the_code(eager_lowering):
    model = TINY["handwritten"]()
    one, other = LayerSkip(skip=(0,)), LayerSkip(skip=(1,))
    expected = {t: fxopt.reference(model, t)(IDS) for t in (one, other)}
    for technique in (one, other, one):
        fxopt.compile(model, technique)
        assert torch.equal(model(IDS), expected[technique])
    assert sum(len(r.graphs) for r in fxopt.reports()) == 2


def test_a_bare_checkout_imports(tmp_path):
    root = str(__import__("pathlib").Path(__file__).parents[2])
    code = "import fxopt, fxopt.passes.layer_skip, fxopt.codegen.compat; print(fxopt.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip().startswith(root)


def test_plain_modules_without_layers_go_through():
    model = fxopt.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), torch.relu(model[0](x)))


def test_dynamic_shapes_without_a_technique(eager_lowering):
    model = fxopt.compile(Handwritten().eval(), dynamic=True)
    for length in (3, 8, 20):
        assert model(torch.arange(length)[None]).shape == (1, length, 128)
