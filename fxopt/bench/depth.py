"""``fxopt bench depth``: a depth technique against the model whose layers were really deleted.

The bound of layer skipping is the deleted model itself: what is left has to cost what a smaller model costs.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxopt.bench.harness import Peer, Result, check_equal, environment, measure, progress_bar
from fxopt.bench.models import llama
from fxopt.compiler import compile as fxopt_compile
from fxopt.meaning import reference
from fxopt.passes.layer_skip import LayerSkip

SUITES = {"early_exit": "exits", "router": "routed", "mixture_of_depths": "mixture"}
"""Modules of the other depth techniques' suites."""
IN_PARTS = ("early_exit", "mixture_of_depths")
PEERS = ("deleted, inductor", "fxopt layer_skip", "full, inductor")


def run(*, device: str = "cpu", quick: bool = False, technique: str = "layer_skip", part: str | None = None) -> Result:
    """Prefill of 512 tokens and a decode step, every second layer skipped, against the deleted model under Inductor."""
    if part is not None and technique not in IN_PARTS:
        raise ValueError(f"the suite of {technique!r} has no parts; those of {' and '.join(IN_PARTS)} have.")
    if technique in SUITES:
        parts = {} if part is None else {"part": part}
        suite = importlib.import_module(f"fxopt.bench.{SUITES[technique]}")
        measured: Result = suite.run(device=device, quick=quick, **parts)
        return measured
    if technique != "layer_skip":
        raise ValueError(f"no suite for technique {technique!r}; there are 'layer_skip', {', '.join(SUITES)}.")
    layers, width, prompt, rounds = (4, 256, 64, 5) if quick else (12, 768, 512, 15)
    model = llama(layers, width, heads=width // 64, kv_heads=width // 64 // 4 or 1).to(device)
    skip = LayerSkip(speedup=2)
    result = Result("depth", f"fxopt bench depth{' --quick' if quick else ''} --device {device}", environment(device))
    deleted = reference(model, skip)
    full = copy.deepcopy(model)
    fxopt_compile(model, skip)
    deleted.compile(backend="inductor")
    full.compile(backend="inductor")
    ids = torch.randint(0, 1000, (1, prompt), device=device, generator=torch.Generator(device).manual_seed(0))
    with torch.no_grad(), progress_bar("depth", 2 * rounds) as step:
        for case, prepare in (("prefill", _prefill), ("decode", _decode)):
            peers = [
                Peer(name, *prepare(chosen, ids, prompt))
                for name, chosen in zip(PEERS, (deleted, model, full), strict=True)
            ]
            check_equal(peers[:2], tolerance=1e-4)
            result.rows += measure(f"{case} {prompt}", peers, rounds=rounds, device=device, progress=step)
    kept = len(skip.kept(layers))
    result.remarks.append(f"{skip}: {kept} of {layers} layers run, width {width}; goal: ratio at most {1 / 0.98:.3f}")
    return result


Prepared = tuple[Callable[[], Any], Callable[[], torch.Tensor]]


def _prefill(model: nn.Module, ids: torch.Tensor, _prompt: int) -> Prepared:
    def call() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return call, call


def _decode(model: nn.Module, ids: torch.Tensor, prompt: int) -> Prepared:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt + 256)  # type: ignore[arg-type]
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, -1:]

    def call() -> torch.Tensor:
        # Rewound after each step, so that every round does the same work.
        logits = model(input_ids=token, past_key_values=cache).logits
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)  # type: ignore[union-attr]
        return logits

    return call, call
