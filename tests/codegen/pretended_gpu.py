"""Operators never wait for the device: followed on fake tensors of a GPU, which have no values that a host could read.

What ``.item()``, ``nonzero`` or a comparison in Python would ask of the device is an error there. That no launch waits
either, only a GPU can show (``tests/gpu``). Run by ``test_no_host.py`` in a process of its own, in which a GPU is
pretended.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxopt.bench.pretend import register_guard
from fxopt.codegen import lowering, roofline
from fxopt.codegen.kernels.launch import noting
from fxopt.codegen.ops.attention import attention, read_extent, sample_inputs

H200 = roofline.DEVICES["H200"]


class OnDevice(TorchDispatchMode):
    """Notes every operator that takes tensors of a GPU and gives one of the CPU: a copy to the host."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), result)
        )
        if "cuda" in given and "cpu" in made:
            self.copies.append(str(func))
        return result


@contextlib.contextmanager
def on_a_gpu():
    """Fake tensors on ``cuda``, launches that are noted, and the host copies that were made."""
    register_guard()
    card = SimpleNamespace(multi_processor_count=132)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=card),
        mock.patch.object(torch.cuda, "device_of", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        FakeTensorMode(allow_non_fake_inputs=True), roofline.planning(H200), noting() as notes, OnDevice() as host,
    ):  # fmt: skip
        yield notes, host.copies


def moved(inputs, dtype=torch.bfloat16):
    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        made = torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device="cuda")
        return made.as_strided(value.shape, value.stride())

    return {name: move(value) for name, value in inputs.items()}


CASES = {
    "step": {"kind": "bool"}, "additive": {"kind": "min"}, "four new tokens": {"kind": "-inf", "tokens": 4},
    "no mask": {"kind": "none"},
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_the_exact_attention(case):
    inputs = sample_inputs(length=1024, filled=300, width=64, **CASES[case])
    with on_a_gpu() as (_, copies):
        out = attention(**moved(inputs))
    assert out.device.type == "cuda"
    assert copies == []


@pytest.mark.parametrize("unified", [True, False], ids=["async", "online"])
@pytest.mark.parametrize("case", list(CASES))
def test_the_generated_attention(case, unified):
    inputs = {"sinks": None, "soft_cap": 0.0} | sample_inputs(length=1024, filled=300, width=64, **CASES[case])
    with on_a_gpu() as (notes, copies):
        phi = torch.empty(2, device="cuda") if unified else None
        out, counts = lowering.launch(phi=phi, split_size=256, **moved(inputs))
    assert {out.device.type, counts.device.type} == {"cuda"}
    # Splits and their sum, and the same for rows that the sum flags: launched always, since nobody asks whether any is.
    assert len(notes) == (4 if unified else 2)
    assert copies == []


def test_the_extent_of_a_mask():
    with on_a_gpu() as (_, copies):
        extent = read_extent(torch.ones(2, 1, 1, 1024, dtype=torch.bool, device="cuda"))
    assert extent.device.type == "cuda"
    assert copies == []


READS = {
    "item": lambda x: x.sum().item(), "bool": lambda x: bool((x > 0).any()), "list": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(), "select": lambda x: x[x > 0], "copy": lambda x: x.cpu(),
}  # fmt: skip


@pytest.mark.parametrize("name", list(READS))
def test_what_would_wait_is_noticed(name):
    noticed = pytest.raises((DataDependentOutputException, DynamicOutputShapeException))
    with noticed if name != "copy" else contextlib.nullcontext(), on_a_gpu() as (_, copies):
        READS[name](torch.ones(4, device="cuda"))
    assert bool(copies) == (name == "copy")
