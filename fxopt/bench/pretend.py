"""What Inductor makes of a decode step for a GPU that is not here: all of the compilation, nothing loaded.

    python -m fxopt.bench.pretend --backend fxopt --layers 2 --target H200
    python -m fxopt.bench.pretend --technique async_softmax --capture

Dynamo, the passes, AOTAutograd and Inductor run as they would on that GPU, on tensors that have a device and no memory;
what comes out is the list of kernels that one step launches, in order, and how they lie in CUDA graphs. Nothing is
measured and nothing is loaded. The process pretends to have a driver, so it is one of its own, which :func:`launched`
starts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

CAPABILITIES = {"A100": (8, 0), "H100": (9, 0), "H200": (9, 0), "B200": (10, 0), "L4": (8, 9), "RTX 4090": (8, 9)}
"""Compute capability of the devices that can be pretended."""

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
"""A build of torch without CUDA refuses to slice even a fake tensor there, for want of a way to switch devices."""


class _Compiled(Exception):
    """Carries the generated code out of the compilation, and the inputs that a CUDA graph could not write in place."""


@dataclass(frozen=True)
class Captured:
    """What ``mode="reduce-overhead"`` makes of a decode step."""

    graphs: list[list[str]]
    """Launches of each CUDA graph."""
    outside: list[str]
    """Launches between the graphs: the host waits there, or a kernel cannot be captured."""
    moving: list[str]
    """Inputs that the step writes and whose address Inductor does not know to be fixed: it would not capture them."""


def launched(backend: str, **settings: Any) -> list[str]:
    """Kernels and operators that a decode step of a Llama-3-8B-shaped model launches, in order.

    Args:
        backend: ``"fxopt"`` or ``"inductor"``.
        settings: ``layers`` (2), ``batch`` (1), ``target`` (``"H200"``), ``length`` of the static cache in positions
            (1024), ``technique``, the name of one that is asked for with its defaults.

    Raises:
        RuntimeError: when the compilation fails; its last words are in the message.
    """
    return _compiled_apart(backend, **settings)["launches"]  # type: ignore[no-any-return]


def captured(backend: str, **settings: Any) -> Captured:
    """How Inductor would cut the decode step of :func:`launched` into CUDA graphs; nothing is captured."""
    found = _compiled_apart(backend, capture=True, **settings)
    return Captured(found["graphs"], found["launches"], found["moving"])


def _compiled_apart(backend: str, **settings: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "fxopt.bench.pretend", "--backend", backend]
    for name, value in settings.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def per_layer(backend: str, **settings: Any) -> list[str]:
    """The launches that one more layer adds: those of two layers beyond those of one."""
    rest = launched(backend, layers=1, **settings)
    more = []
    for name in launched(backend, layers=2, **settings):
        plain = _unnumbered(name)
        same = next((other for other in rest if _unnumbered(other) == plain), None)
        if same is None:
            more.append(name)
        else:
            rest.remove(same)
    return more


def _unnumbered(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def launches_in(code: str, function: str = "call") -> list[str]:
    """Names in a function of Inductor's generated module, in order: kernels, library calls, operators."""
    body = code[code.index(f"def {function}(") :]
    end = re.search(r"^(?:def|class|\w+ =) ", body[1:], re.MULTILINE)
    body = body if end is None else body[: end.start()]
    found = re.findall(r"^\s+(?:(\w+)\.run\(|extern_kernels\.(\w+)\(|\w+ = torch\.ops\.([\w.]+)\()", body, re.MULTILINE)
    return ["".join(groups) for groups in found]


@contextlib.contextmanager
def pretended(target: str) -> Iterator[None]:
    """Makes torch, Triton and fxopt believe in one GPU of the roofline's table, for compiling only."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    from fxopt import inductor_settings
    from fxopt.codegen import post_grad, roofline
    from fxopt.passes import flat_gemm

    device, (major, minor) = roofline.DEVICES[target], CAPABILITIES[target]
    limits = {"multi_processor_count": device.units, "regs_per_multiprocessor": 65536, "warp_size": 32}
    threads = {"max_threads_per_multi_processor": 2048 if minor != 9 else 1536}
    properties = types.SimpleNamespace(
        name=f"NVIDIA {target}", major=major, minor=minor, total_memory=80 << 30, gcnArchName="",
        shared_memory_per_block_optin=device.shared_bytes, **limits, **threads,
    )  # fmt: skip
    hints = DeviceProperties(type="cuda", index=0, cc=10 * major + minor, major=major, **limits, **threads)
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
        get_device_interface=lambda: torch.cuda, get_current_device=lambda: 0, get_current_stream=lambda _=0: 0,
    )  # fmt: skip
    register_guard()
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (runtime.driver, "_active", driver),
            (torch.cuda, "get_device_properties", lambda _=None: properties),
            (torch.cuda, "get_device_capability", lambda _=None: (major, minor)),
            (torch.cuda, "current_device", lambda: 0),
            (CudaInterface, "get_device_properties", staticmethod(lambda _=None: properties)),
            (CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
            (CudaInterface, "current_device", staticmethod(lambda: 0)),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch._inductor.scheduler, "has_triton", lambda *_: True),
            (DeviceProperties, "create", lambda _: hints),
            (roofline, "current_device", lambda _=None: device),
            (post_grad, "compile_here", lambda *_: None),
            (flat_gemm, "compile_here", lambda *_: None),
            (inductor_settings, "COMBINED", {"combo_kernels": True}),  # what pays is measured on the device
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield


@functools.cache
def register_guard() -> None:
    """Let a build of torch without CUDA handle fake tensors that say they lie there, for good."""
    if torch.backends.cuda.is_built():
        return  # fake tensors bring one of their own where no GPU is found
    home = pathlib.Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = pathlib.Path(folder, "guard.cpp"), pathlib.Path(folder, "guard.so")
        source.write_text(GUARD, encoding="utf-8")
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source), "-o", str(library)]
        subprocess.run([*command, f"-L{home / 'lib'}", "-lc10"], check=True, capture_output=True)
        ctypes.CDLL(str(library))
    # Nor does that build know the attentions of a GPU. With a mask CUDA takes the memory-efficient one, one kernel.
    key: Any = torch._C.DispatchKey.CompositeImplicitAutograd  # type: ignore[attr-defined]
    torch.ops.aten.scaled_dot_product_attention.default.py_impl(key)(_efficient_attention)


def _efficient_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    bias = attn_mask
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(*query.shape[:3], key.shape[2])  # type: ignore[union-attr]
    found = torch.ops.aten._scaled_dot_product_efficient_attention.default(
        query, key, value, bias, False, dropout_p, is_causal, scale=scale
    )
    return found[0]


def code_for(
    backend: str, layers: int = 2, batch: int = 1, target: str = "H200", length: int = 1024, technique: str = "",
    capture: bool = False,
) -> tuple[str, list[str]]:  # fmt: skip
    """Inductor's module for one decode step and `Captured.moving`; call it in a process of its own."""
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import StaticCache

    from fxopt.backend import Backend
    from fxopt.bench.models import llama
    from fxopt.options import parse_options

    def stop(code: str) -> None:
        context = torch._guards.TracingContext.try_get()
        fixed = context.fw_metadata.static_input_indices if context and context.fw_metadata else []
        inputs = [name for i, name in enumerate(V.graph.graph_input_names) if i not in fixed]
        raise _Compiled(code, [name for name in inputs if name in V.graph.mutated_inputs])

    with torch.device("meta"):
        model = llama(layers, 4096, 32, 8, intermediate_size=14336, vocab_size=1024).to(torch.bfloat16)
    config: Any = model.config
    place = torch.device("cuda", 0)
    # Caches hold code for devices that exist; here nothing may be taken from them or left in them. Folding constants
    # would compute them on the device.
    settings = {"force_disable_caches": True, "joint_graph_constant_folding": False}
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended(target))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", stop))
        stack.enter_context(torch._inductor.config.patch(settings))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(place)
        _without_memory(model, place)
        cache = StaticCache(config=config, max_cache_len=length)
        cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, torch.bfloat16, place)
        token = torch.zeros(batch, 1, dtype=torch.int64)
        mask = torch.zeros(batch, 1, 1, length, dtype=torch.bool)
        mode = "reduce-overhead" if capture else None
        if technique:
            step = torch.compile(model, backend=Backend(parse_options({technique: True}, mode)))
        else:
            step = torch.compile(model, backend=backend, mode=mode)
        try:
            step(input_ids=token, position_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
        except Exception as error:
            return _code_of(error)
    raise RuntimeError("nothing was compiled: a graph break, or Dynamo ran the model as it stands")


def _code_of(error: BaseException) -> tuple[str, list[str]]:
    found: BaseException | None = error
    while found is not None and not isinstance(found, _Compiled):  # Inductor wraps what its compilation raises
        found = found.__cause__ or found.__context__
    if found is None:
        raise error
    code, moving = found.args
    return code, moving


def _without_memory(model: nn.Module, place: torch.device) -> None:
    for module in model.modules():
        stored: list[tuple[dict[str, Any], Any]] = [
            (module._parameters, lambda own: nn.Parameter(own, requires_grad=False)),
            (module._buffers, lambda own: own),
        ]
        for kept, wrap in stored:
            for name, value in kept.items():
                if value is not None:
                    like = {"dtype": value.dtype, "device": place}
                    kept[name] = wrap(torch.empty_strided(value.shape, value.stride(), **like))


def main() -> None:
    """Print what was found as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="fxopt")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--target", default="H200", choices=sorted(CAPABILITIES))
    parser.add_argument("--technique", default="")
    parser.add_argument("--capture", action="store_true")
    given = vars(parser.parse_args())
    import fxopt  # noqa: F401  (registers the backend in a checkout)

    code, moving = code_for(**given)
    graphs = [launches_in(code, name) for name in re.findall(r"^def (partition_\d+)\(", code, re.MULTILINE)]
    print(json.dumps({"launches": launches_in(code), "graphs": graphs, "moving": moving}))


if __name__ == "__main__":
    main()
