"""``fxopt demo``: a real model, a real prompt, text out, tokens per second, and what was rewritten."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from fxopt.compiler import compile as fxopt_compile
from fxopt.meaning import shared_copy
from fxopt.passes.layer_skip import LayerSkip
from fxopt.reporting import report

PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file.'


def run(
    model_name: str | None = None, *, new_tokens: int = 48, rounds: int = 3, page: str = "fxopt-report.html"
) -> None:
    """Print the demo. `model_name`: a Hugging Face folder or hub name; default: the model that ships with fxopt."""
    model, tokenizer, name = _load(model_name)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")  # fmt: skip
    ids = _encode(tokenizer, model)
    skip = LayerSkip(speedup=1.5, phase="decode")
    ways: dict[str, tuple[nn.Module, str]] = {
        "eager": (shared_copy(model), "the model as it is"),
        "inductor": (shared_copy(model), 'model.compile(backend="inductor")'),
        "fxopt exact": (shared_copy(model), "fxopt.compile(model)"),
        "fxopt layer_skip": (shared_copy(model), f"fxopt.compile(model, {skip})"),
    }
    ways["inductor"][0].compile(backend="inductor")
    fxopt_compile(ways["fxopt exact"][0])
    fxopt_compile(ways["fxopt layer_skip"][0], skip)
    outputs: dict[str, torch.Tensor] = {}
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for key, (chosen, _) in ways.items():
            print(f"  compiling and warming up: {key} ...", end="\r", flush=True)
            outputs[key] = _generate(chosen, ids, new_tokens)
        times: dict[str, list[float]] = {key: [] for key in ways}
        for _ in range(rounds):
            for key, (chosen, _) in ways.items():
                started = time.perf_counter()
                _generate(chosen, ids, new_tokens)
                times[key].append(time.perf_counter() - started)
    rates = {key: new_tokens / sorted(values)[len(values) // 2] for key, values in times.items()}
    best = max(rates["eager"], rates["inductor"])
    print(f"{'':<18} {'tokens/s':>9} {'vs best peer':>13}  {'tokens equal to eager':<22}" + " " * 12)
    for key in ways:
        equal = _agreement(outputs["eager"], outputs[key], ids.shape[1])
        print(f"{key:<18} {rates[key]:>9.1f} {rates[key] / best:>12.2f}x  {equal}")
    for key, (_, line) in ways.items():
        print(f"\n--- {key}: {line}\n{_decode(tokenizer, outputs[key][0])}")
    print()
    for key in ("fxopt exact", "fxopt layer_skip"):
        print(report(ways[key][0]).summary())
    try:
        path = report(ways["fxopt layer_skip"][0]).to_html(page)
        print(f"\nreport: {path}")
    except ImportError as error:
        print(f"\nno page: {error}")


def _load(name: str | None) -> tuple[Any, Any, str]:
    from fxopt import tinylm
    from fxopt.evaluation import load_model

    if name is not None:
        model, tokenizer = load_model(name)
        return model, tokenizer, name
    try:
        model, tokenizer = tinylm.load()
        return model, tokenizer, "tinylm (ships with fxopt)"
    except FileNotFoundError:
        from fxopt.bench.models import llama

        return llama(8, 256, 8, 2, vocab_size=256), None, "a Llama with random weights (bytes as tokens)"


def _encode(tokenizer: Any, model: Any) -> torch.Tensor:
    if tokenizer is None:
        return torch.tensor([list(PROMPT.encode())])
    return torch.tensor([tokenizer.encode(PROMPT)])


def _decode(tokenizer: Any, ids: torch.Tensor) -> str:
    if tokenizer is None:
        return bytes(ids.tolist()).decode("utf-8", "replace")
    return tokenizer.decode(ids, skip_special_tokens=True)


def _generate(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, cache_implementation="static", disable_compile=True, pad_token_id=0,
    )  # fmt: skip


def _agreement(expected: torch.Tensor, found: torch.Tensor, prompt: int) -> str:
    length = min(expected.shape[1], found.shape[1])
    same = (expected[:, prompt:length] == found[:, prompt:length]).sum().item()
    total = expected.shape[1] - prompt
    return "identical" if same == total else f"{same} of {total}"
