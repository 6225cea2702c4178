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


def examine(model: nn.Module | None = None, *, run: bool = False) -> list[Finding]:
    """Look at the installation, and at `model` when given; `run` also lets it generate (:func:`generate_once`)."""
    findings = [*_versions(), *_registration(), *_tools()]
    if model is not None:
        found = examine_model(model)
        if run:
            # Of a model that was loaded to be examined, nobody has compiled anything: what compiling does is tried.
            found = [f for f in found if "is not compiled" not in f.what] + generate_once(model)
        findings += found
    return findings


TOKENS = 4
"""New tokens of :func:`generate_once`: the second step of a growing cache compiles once more than the first."""


def generate_once(model: nn.Module) -> list[Finding]:
    """Let `model` generate a few tokens with a backend that only counts: what reaches a backend, and what it is handed.

    Dynamo's caches are emptied before and after (``torch._dynamo.reset``); nothing is compiled, the model is left as
    it was.
    """
    from fxopt.testing import capture_generate

    config: Any = getattr(model, "generation_config", None)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if config is None or not callable(getattr(model, "generate", None)) or not vocabulary:
        return []
    kind = "dynamic" if getattr(config, "cache_implementation", None) is None else "static"
    device = next(model.parameters()).device
    ids = torch.arange(3, 11, device=device).remainder(vocabulary)[None]
    try:
        graphs = capture_generate(model, ids, cache=kind, new_tokens=TOKENS)  # type: ignore[arg-type]
    except Exception as error:
        first = (str(error).splitlines() or ["no message"])[0]
        return [Finding("problem", f"generate() fails under torch.compile: {type(error).__name__}: {first}",
                        "TORCH_LOGS=graph_breaks python your_script.py")]  # fmt: skip
    if not graphs:
        return [Finding("problem", "generate() reached no backend: every step runs eagerly", "fxopt.compile(model)")]
    findings = [
        Finding("ok", f"generate() reaches the backend when compiled in place: {len(graphs)} graphs for a prompt and "
                f"{TOKENS} tokens with a {kind} cache")
    ]  # fmt: skip
    expected = 2 if kind == "static" else 3
    if len(graphs) > expected:
        findings.append(
            Finding("note", f"{len(graphs)} graphs where {expected} are usual: graph breaks, or guards that fail",
                    "TORCH_LOGS=graph_breaks,recompiles python your_script.py")
        )  # fmt: skip
    copied = _cache_results(graphs[-1].graph)
    if copied:
        findings.append(
            Finding("note", f"each step returns {copied} cache tensors as new tensors: the whole cache is copied for "
                    "every token", "model.generation_config.cache_implementation = 'static'")
        )  # fmt: skip
    else:
        findings.append(Finding("ok", "each step writes its cache in place"))
    return findings


def _cache_results(graph: torch.fx.Graph) -> int:
    """How many results of a step are shaped like keys or values."""
    values = [n.meta.get("example_value") for n in graph.output_node().all_input_nodes]
    return sum(isinstance(v, torch.Tensor) and v.ndim == 4 and v.is_floating_point() for v in values)


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
        registers = f"{torch.backends.cpu.get_cpu_capability()} registers, {torch.get_num_threads()} threads"
        findings.append(Finding("note", "no GPU, so no Triton kernels: decode attention and linears of few rows run in "
                                f"generated C++ ({registers}), Inductor compiles the rest"))  # fmt: skip
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
