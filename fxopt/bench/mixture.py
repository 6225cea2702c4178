"""``fxopt bench depth --technique mixture_of_depths``: a routed stack against the dense one, both compiled, in training
mode (top-C), forward alone and forward with backward.

The bound is the dense time times the share of floating-point operations that routing leaves, counted while both run.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxopt.bench.harness import Peer, Result, check_equal, environment, measure, progress_bar
from fxopt.bench.models import llama
from fxopt.compiler import compile as fxopt_compile
from fxopt.passes.mixture_of_depths import MixtureOfDepths

PEERS = ("dense, inductor", "fxopt mixture_of_depths")
GOAL = 1.5


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """12 layers of width 768 on 2048 tokens, an eighth of them in every second layer. The head is left out."""
    layers, width, tokens, rounds = (4, 256, 256, 3) if quick else (12, 768, 2048, 5)
    model: Any = llama(layers, width, heads=width // 64, kv_heads=width // 64 // 4 or 1, vocab_size=1000)
    dense = model.model.to(device).train()
    technique = MixtureOfDepths(capacity=0.125)
    routed = technique(copy.deepcopy(dense))
    ids = torch.randint(0, 1000, (1, tokens), device=device, generator=torch.Generator(device).manual_seed(0))
    share = _operations(routed, ids) / _operations(dense, ids)
    reference = Peer("eager", lambda: None, lambda: _forward(routed.forward, ids))
    dense.compile(backend="inductor")
    fxopt_compile(routed, strict=True)
    result = Result(
        "mixture_of_depths",
        f"fxopt bench depth --technique mixture_of_depths{' --quick' if quick else ''} --device {device}",
        environment(device),
    )
    with progress_bar("mixture of depths", 2 * rounds) as step:
        for case, call in (("forward", _forward), ("forward and backward", _step)):
            peers = [
                Peer(PEERS[0], lambda call=call: call(dense, ids)),
                Peer(PEERS[1], lambda call=call: call(routed, ids), lambda: _forward(routed, ids)),
            ]
            check_equal([reference, peers[1]], tolerance=1e-4)
            rows = measure(f"{case} {tokens}", peers, rounds=rounds, device=device, progress=step)
            ratio = rows[1].ratio
            assert ratio is not None
            rows[1].bound = rows[0].median * share
            rows[1].note = f"{1 / ratio:.2f} times dense"
            result.rows += rows
    result.remarks.append(
        f"{technique}: {len(technique.routed(layers))} of {layers} layers routed, width {width}, without the head; "
        f"goal: {GOAL} times dense; {1 / share:.2f} by the operations that are left"
    )
    return result


def _forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).last_hidden_state


def _step(model: nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
    model.zero_grad(set_to_none=True)


def _operations(model: nn.Module, ids: torch.Tensor) -> int:
    # Fused attention is not counted on a CPU, and the plain one counts what lies above the diagonal too.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _forward(model, ids)
    return int(counter.get_total_flops())
