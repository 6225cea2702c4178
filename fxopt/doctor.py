"""``fxopt doctor``: what keeps fxopt from being reached or from being fast, each finding with the line to write."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.codegen import compat
from fxopt.reporting import owner_of, report

KERNELS_NOT_YET_RUN_ON_A_GPU = (
    "attention (split-KV decode, dense and on lists)",
    "gemm (GEMV, flat GEMM)",
    "select (state beside a cache, scores, top-k)",
    "routing (gather with norm, scatter with residual, linear_if)",
)


@dataclass(frozen=True)
class Finding:
    """``level``: ok, note or problem; ``advice``: the line to write, empty where there is nothing to do."""

    level: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {"ok": " ok ", "note": "note", "problem": " !! "}[self.level]
        return f"[{mark}] {self.what}" + (f"\n       -> {self.advice}" if self.advice else "")


def examine(model: nn.Module | None = None) -> list[Finding]:
    """Look at the installation, and at `model` when given."""
    findings = [*_versions(), *_registration(), *_tools()]
    if model is not None:
        findings += examine_model(model)
    return findings


def _versions() -> list[Finding]:
    version = compat.torch_version()
    text = f"Python {platform.python_version()}, torch {torch.__version__}"
    if version < compat.OLDEST_TORCH:
        return [Finding("problem", f"{text}: fxopt needs torch 2.11 or newer", "pip install 'torch>=2.11'")]
    if version > compat.NEWEST_TORCH:
        newest = ".".join(map(str, compat.NEWEST_TORCH))
        return [Finding("note", f"{text}: newer than the newest tested ({newest})")]
    return [Finding("ok", text)]


def _registration() -> list[Finding]:
    points = list(importlib.metadata.entry_points(group="torch_dynamo_backends", name="fxopt"))
    if not points:
        return [
            Finding("problem", "backend='fxopt' is not registered: fxopt runs from a checkout that is not installed",
                    "pip install -e . (in the same environment as torch)")
        ]  # fmt: skip
    if len(points) > 1:
        places = ", ".join(str(p.dist.locate_file("")) if p.dist else "?" for p in points)
        what = f"backend='fxopt' is registered {len(points)} times: {places}"
        return [Finding("problem", what, "pip uninstall fxopt")]
    if "fxopt" not in torch.compiler.list_backends():
        return [Finding("problem", "torch does not list the backend 'fxopt'", "pip install --force-reinstall fxopt")]
    return [Finding("ok", "backend 'fxopt' is registered once")]


def _tools() -> list[Finding]:
    findings = []
    if torch.cuda.is_available():
        findings.append(Finding("ok", f"GPU: {torch.cuda.get_device_name()}"))
    else:
        findings.append(Finding("note", "no GPU: generated kernels are not used; Inductor compiles for the CPU"))
    if importlib.util.find_spec("triton") is None:
        findings.append(Finding("note", "no Triton: kernels can be neither generated nor cross-compiled",
                                "pip install triton (Linux)"))  # fmt: skip
    else:
        import triton

        findings.append(Finding("ok", f"Triton {triton.__version__}"))
    findings.append(
        Finding("note", "kernel families that have not yet passed their tests on a GPU: "
                + "; ".join(KERNELS_NOT_YET_RUN_ON_A_GPU))
    )  # fmt: skip
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        findings.append(Finding("problem", "no C++ compiler: Inductor needs one for the CPU", "apt-get install g++"))
    else:
        findings.append(Finding("ok", f"C++ compiler: {compiler}"))
    for extra, module in (("hf", "transformers"), ("inspect", "jinja2")):
        if importlib.util.find_spec(module) is None:
            findings.append(Finding("note", f"extra {extra!r} is missing ({module})", f"pip install 'fxopt[{extra}]'"))
    return findings


def examine_model(model: nn.Module) -> list[Finding]:
    """Is generate() really reaching fxopt, and what in this model's setting will cost speed."""
    wrapped = getattr(model, "_orig_mod", None)
    if isinstance(wrapped, nn.Module):
        return [
            Finding("problem", "the model is wrapped by torch.compile: its generate() runs the original model, the "
                    "backend is not reached", "fxopt.compile(model)    # in place, on the model itself")
        ]  # fmt: skip
    findings = []
    name = type(model).__name__
    reached = owner_of(model) > 0 and getattr(model, "_compiled_call_impl", None) is not None
    if reached:
        findings.append(Finding("ok", f"{name}: calls and generate() reach fxopt"))
    elif getattr(model, "_compiled_call_impl", None) is not None:
        findings.append(Finding("note", f"{name} is compiled in place by a backend, not through fxopt.compile",
                                "fxopt.compile(model)"))  # fmt: skip
    else:
        findings.append(Finding("problem", f"{name} is not compiled: generate() runs eagerly", "fxopt.compile(model)"))
    return [*findings, *_generation(model), *_masks(model), *_recompiles(model), *_hub_kernels(model)]


def _masks(model: nn.Module) -> list[Finding]:
    """An attention function without a mask function of the same name gets no mask at all: padding is attended to."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    masking = sys.modules.get("transformers.masking_utils")
    known = getattr(masking, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    if not isinstance(name, str) or known is None or name in known.valid_keys():
        return []
    return [
        Finding("problem", f"attn_implementation={name!r} has no mask function of its name: causal and padding masks "
                "are dropped without a word", f"AttentionMaskInterface.register({name!r}, sdpa_mask)")
    ]  # fmt: skip


def _recompiles(model: nn.Module) -> list[Finding]:
    """What was compiled more than once, and what will be."""
    findings = []
    graphs = report(model).graphs
    # Dynamo's compile id is frame/attempt: every attempt after 0 had a guard fail before it.
    again = sum(graph.compile_id.partition("/")[2].split("_")[0] not in ("", "0") for graph in graphs)
    if again:
        findings.append(Finding("note", f"{len(graphs)} graphs were compiled, {again} of them again for other shapes",
                                "TORCH_LOGS=recompiles python your_script.py"))  # fmt: skip
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return findings
    if getattr(config, "cache_implementation", None) is None:
        findings.append(
            Finding("note", "expected compilations: three with a DynamicCache (prompt, first step, growing lengths), "
                    "one more for another batch size", "model.generation_config.cache_implementation = 'static'")
        )  # fmt: skip
    elif getattr(config, "max_cache_len", None) is None:
        findings.append(
            Finding("note", "expected compilations: a longer prompt makes a longer static cache and compiles again; "
                    "a fixed length does not", "model.generation_config.max_cache_len = 4096    # prompt + new")
        )  # fmt: skip
    else:
        what = f"expected compilations: prompt and step once each (cache of {config.max_cache_len})"
        findings.append(Finding("ok", f"{what}, one more for another batch size"))
    return findings


def _hub_kernels(model: nn.Module) -> list[Finding]:
    """Modules whose forward comes from the kernels hub are opaque: their arithmetic is not in the graph."""
    opaque = [
        path for path, module in model.named_modules()
        if str(getattr(module.forward, "__module__", "")).split(".")[0] in ("kernels", "transformers_modules_kernels")
        or type(module).__module__.split(".")[0] == "kernels"
    ]  # fmt: skip
    if not opaque and not getattr(model, "use_kernels", False):
        return []
    where = f": {opaque[0]}{f' and {len(opaque) - 1} more' if len(opaque) > 1 else ''}" if opaque else ""
    return [
        Finding("note", f"kernels of the hub replace modules{where}; what they compute is hidden from passes",
                "from_pretrained(..., use_kernels=False)")
    ]  # fmt: skip


def _generation(model: nn.Module) -> list[Finding]:
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return []
    findings = []
    cache = getattr(config, "cache_implementation", None)
    if cache is None:
        findings.append(
            Finding("note", "generate() uses a growing DynamicCache: copied at each step, lengths are symbolic",
                    "model.generation_config.cache_implementation = 'static'")
        )  # fmt: skip
    else:
        findings.append(Finding("ok", f"cache_implementation={cache!r}"))
    compiled: Any = getattr(config, "compile_config", None)
    if compiled is not None and getattr(compiled, "options", None) and getattr(compiled, "mode", None):
        findings.append(
            Finding("problem", "generation_config.compile_config has both mode and options: torch.compile refuses it",
                    "CompileConfig(backend='fxopt', options={...}, mode=None)")
        )  # fmt: skip
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention == "eager":
        findings.append(Finding("note", "attn_implementation='eager' materialises scores",
                                "from_pretrained(..., attn_implementation='sdpa')"))  # fmt: skip
    elif attention not in (None, "sdpa"):
        findings.append(Finding("note", f"attn_implementation={attention!r}: fxopt recognises 'sdpa' and 'eager'",
                                "from_pretrained(..., attn_implementation='sdpa')"))  # fmt: skip
    if "flash" in str(attention):
        findings.append(Finding("note", "flash attention from a hub kernel is opaque to a compiler",
                                "from_pretrained(..., attn_implementation='sdpa')"))  # fmt: skip
    if getattr(model, "_can_compile_fullgraph", True) is False:
        findings.append(Finding("note", f"{type(model).__name__} does not promise a single graph: expect graph breaks",
                                "TORCH_LOGS=graph_breaks python your_script.py"))  # fmt: skip
    if model.training:
        findings.append(Finding("note", "the model is in training mode: inference rewrites are blocked (FX205)",
                                "model.eval()"))  # fmt: skip
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        findings.append(Finding("note", "forward takes no past_key_values: every step recomputes the prompt"))
    return findings
