"""``fxopt bench depth --technique mixture_of_depths``: a routed stack against the dense one, both compiled, in training
mode (top-C), forward alone and forward with backward; and steps of decoding, where the predictor decides.

The bound of training is the dense time times the share of floating-point operations that routing leaves, counted while
both run. For decoding the predictors are not trained but set to take an eighth of a prompt's tokens; what they took of
the steps is reported with the time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxopt.bench.harness import Peer, Result, Row, check_equal, environment, measure, progress_bar
from fxopt.bench.models import llama
from fxopt.compiler import compile as fxopt_compile
from fxopt.passes.mixture_of_depths import MixtureOfDepths
from fxopt.passes.mod_counters import routing, watching
from fxopt.passes.mod_reference import routers

PEERS = ("dense, inductor", "fxopt mixture_of_depths")
GOAL = 1.5


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """12 layers of width 768 on 2048 tokens, an eighth of them in every second layer. The head is left out."""
    layers, width, tokens, rounds = (4, 256, 256, 3) if quick else (12, 768, 2048, 5)
    model: Any = llama(layers, width, heads=width // 64, kv_heads=width // 64 // 4 or 1, vocab_size=1000)
    dense = model.model.to(device).train()
    plain = copy.deepcopy(dense).eval()
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
    with progress_bar("mixture of depths", 4 * rounds) as step:
        for case, call in (("forward", _forward), ("forward and backward", _step)):
            peers = [
                Peer(PEERS[0], functools.partial(call, dense, ids)),
                Peer(PEERS[1], functools.partial(call, routed, ids), lambda: _forward(routed, ids)),
            ]
            check_equal([reference, peers[1]], tolerance=1e-4)
            rows = measure(f"{case} {tokens}", peers, rounds=rounds, device=device, progress=step)
            ratio = rows[1].ratio
            assert ratio is not None
            rows[1].bound = rows[0].median * share
            rows[1].note = f"{1 / ratio:.2f} times dense"
            result.rows += rows
        result.rows += _decode(plain, ids[:, : tokens // 4], 2 * rounds, device, step, result)
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


STEPS = 16


def _decode(
    dense: Any, ids: torch.Tensor, rounds: int, device: str, progress: Callable[[], None], result: Result
) -> list[Row]:
    """Steps of one token on a static cache; the first peer is dense under Inductor, the second dense under fxopt."""
    from transformers import StaticCache

    routed = MixtureOfDepths(capacity=0.125, predictor="auxiliary")(copy.deepcopy(dense))
    exact = copy.deepcopy(dense)
    prompt, steps = ids[:, :-STEPS], ids[:, -STEPS:]
    peers = []
    with torch.no_grad():
        _set_predictors(routed, prompt, 0.125)
        for name, model in ((PEERS[0], dense), ("dense, fxopt", exact), (PEERS[1], routed)):
            cache = StaticCache(config=model.config, max_cache_len=2 * ids.shape[1])
            model(input_ids=prompt, past_key_values=cache)  # in eager: puts the layers of the cache in place
            model.compile(backend="inductor") if model is dense else fxopt_compile(model)
            peers.append(Peer(name, functools.partial(_steps, model, cache, steps, prompt.shape[1])))
        whole = routed.forward(input_ids=ids, use_cache=False).last_hidden_state[:, -STEPS:]
        once = Peer("all at once", whole.clone, whole.clone)
        check_equal([once, replace(peers[2], output=peers[2].call)], tolerance=1e-3)
        with watching(routed):
            peers[2].call()
        taken = [counted["fraction"] for counted in routing(routed).values()]
        rows = measure(f"{STEPS} steps after {prompt.shape[1]}", peers, rounds=rounds, device=device, progress=progress)
    fraction = sum(taken) / len(taken)
    left = 1 - len(taken) / len(routed.layers) * (1 - fraction)
    rows[2].note = f"{fraction:.1%} of the steps of a routed layer ran it"
    rows[2].bound = rows[1].median * left
    return rows


def _steps(model: Any, cache: Any, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """The hidden states of tokens given one by one; the cache is wound back first, so that every round is the same."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(start)
    with torch.no_grad():
        given = (model(input_ids=token, past_key_values=cache) for token in tokens.split(1, 1))
        return torch.cat([output.last_hidden_state.clone() for output in given], 1)


def _set_predictors(model: Any, prompt: torch.Tensor, fraction: float) -> None:
    """Shift every predictor, first layer first, so that it takes a fraction of the prompt's tokens."""
    for router in routers(model).values():
        router.trained = True
    for router in routers(model).values():
        seen: list[torch.Tensor] = []
        predictor: Any = router.predictor
        hook = predictor.register_forward_hook(lambda _, __, logits, seen=seen: seen.append(logits))
        _forward(model.forward, prompt)
        hook.remove()
        predictor[-1].bias -= seen[-1].flatten().quantile(1 - fraction)


def _operations(model: nn.Module, ids: torch.Tensor) -> int:
    # Fused attention is not counted on a CPU, and the plain one counts what lies above the diagonal too.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _forward(model, ids)
    return int(counter.get_total_flops())
