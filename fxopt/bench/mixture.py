"""``fxopt bench depth --technique mixture_of_depths``: a routed stack against the dense one, all compiled, in training
mode (top-C), forward alone and forward with backward; and steps of decoding, where the predictor decides.

There are two dense peers: under Inductor, and under fxopt, whose exact rewrites act on dense layers of both models.
The bound is the faster one times the share of floating-point operations that routing leaves, attention counted below
the diagonal. Where the time goes, products, attention and the rest, is profiled in one more call of each peer.

For decoding the embeddings are scaled to unit variance, as they are beside what the layers of a trained model add: from
those of an initialisation, which the first attention drowns, no predictor can tell who is in the top C. The predictors
are trained on that membership, and then moved so that they take no token, what they learned, half of the tokens, or
every one: time over routed fraction.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
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

PEERS = ("dense, inductor", "dense, fxopt", "fxopt mixture_of_depths")
GOAL = 1.5
CAPACITY = 0.125
STEPS, UPDATES = 16, 200
PARTS = ("forward", "training", "decoding")


def run(*, device: str = "cpu", quick: bool = False, part: str | None = None) -> Result:
    """12 layers of width 768 on 2048 tokens, an eighth of them in every second layer. The head is left out.

    ``part``: one of :data:`PARTS`, kept as a suite of its own. Raises ValueError for another.
    """
    if part is not None and part not in PARTS:
        raise ValueError(f"mixture_of_depths has no part {part!r}; parts: {', '.join(PARTS)}.")
    parts = PARTS if part is None else (part,)
    layers, width, tokens, rounds = (4, 256, 256, 3) if quick else (12, 768, 2048, 5)
    model: Any = llama(layers, width, heads=width // 64, kv_heads=width // 64 // 4 or 1, vocab_size=1000)
    dense = model.model.to(device).train()
    ids = torch.randint(0, 1000, (1, tokens), device=device, generator=torch.Generator(device).manual_seed(0))
    result = Result(
        "mixture_of_depths" if part is None else f"mixture_of_depths_{part}",
        f"fxopt bench depth --technique mixture_of_depths{f' --part {part}' if part else ''}"
        f"{' --quick' if quick else ''} --device {device}",
        environment(device),
    )
    with progress_bar("mixture of depths", 4 * rounds) as step:
        plain = copy.deepcopy(dense).eval()
        both = (("forward", "forward", _forward), ("training", "forward and backward", _step))
        cases = [(case, call) for own, case, call in both if own in parts]
        if cases:
            _train(dense, ids, cases, rounds, device, step, result)
        if "decoding" in parts:
            result.rows += _decode(plain, ids[:, : tokens // 4], 2 * rounds, device, step, result)
    return result


def _train(
    dense: Any, ids: torch.Tensor, cases: Sequence[tuple[str, Callable[..., Any]]], rounds: int, device: str,
    progress: Callable[[], None], result: Result,
) -> None:  # fmt: skip
    technique = MixtureOfDepths(capacity=CAPACITY)
    exact, routed = copy.deepcopy(dense), technique(copy.deepcopy(dense))
    share = _operations(routed, ids) / _operations(dense, ids)
    references = [Peer("eager", lambda: None, functools.partial(_forward, m.forward, ids)) for m in (dense, routed)]
    dense.compile(backend="inductor")
    fxopt_compile(exact)
    fxopt_compile(routed, strict=True)
    result.remarks.append(
        f"{technique}: {len(routers(routed))} of {len(dense.layers)} layers routed, width {dense.config.hidden_size}, "
        f"without the head; goal: {GOAL} times dense under Inductor; {1 / share:.2f} by the operations that are left"
    )
    for case, call in cases:
        peers = [
            Peer(name, functools.partial(call, model, ids), functools.partial(_forward, model, ids))
            for name, model in zip(PEERS, (dense, exact, routed), strict=True)
        ]
        if call is _forward:
            check_equal([references[0], *peers[:2]], tolerance=1e-4)
            check_equal([references[1], peers[2]], tolerance=1e-4)
        times = rounds if call is _forward else min(rounds, 3)  # one of them takes seconds
        rows = measure(f"{case} {ids.shape[1]}", peers, rounds=times, device=device, progress=progress)
        best = min(rows[0].median, rows[1].median)
        rows[2].bound = best * share
        rows[2].note = (
            f"{rows[0].median / rows[2].median:.2f} times dense under Inductor, {best / rows[2].median:.2f} times "
            "the faster dense one"
        )
        result.rows += rows
        result.remarks += [f"{case}, {p.name}: {_shares(p.call, device)}" for p in peers]


def _forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).last_hidden_state


def _step(model: nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
    model.zero_grad(set_to_none=True)


def _operations(model: nn.Module, ids: torch.Tensor) -> float:
    """Floating-point operations of a forward: products, and attention below the diagonal."""
    # Fused attention is not counted on a CPU; the plain one multiplies what lies above the diagonal too.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _forward(model, ids)
    counts = counter.get_flop_counts()["Global"]
    batched = sum(n for op, n in counts.items() if "bmm" in str(op))
    return sum(counts.values()) - batched / 2


def _shares(call: Callable[[], Any], device: str) -> str:
    """Milliseconds of products, of attention, and of everything else, in one profiled call."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as recorded:
        call()
    own = [(e.key, e.self_device_time_total if device == "cuda" else e.self_cpu_time_total)
           for e in recorded.key_averages()]  # fmt: skip
    attention = sum(t for name, t in own if "attention" in name or "bmm" in name)
    products = sum(t for name, t in own if any(k in name for k in ("mm", "linear", "gemm")) and "bmm" not in name)
    rest = sum(t for _, t in own) - attention - products
    return f"products {products / 1e3:.0f} ms, attention {attention / 1e3:.0f}, the rest {rest / 1e3:.0f}"


# -- decoding -------------------------------------------------------------------------------------------------------


def _decode(
    dense: Any, ids: torch.Tensor, rounds: int, device: str, progress: Callable[[], None], result: Result
) -> list[Row]:
    """Steps of one token on a static cache; the first peer is dense under Inductor, the second dense under fxopt."""
    from transformers import StaticCache

    dense.embed_tokens.weight.data /= dense.embed_tokens.weight.std()
    routed = MixtureOfDepths(capacity=CAPACITY, predictor="auxiliary")(copy.deepcopy(dense))
    agreement = _train_predictors(routed, ids.shape[1])
    exact = copy.deepcopy(dense)
    prompt, steps = ids[:, :-STEPS], ids[:, -STEPS:]
    peers = []
    with torch.no_grad():
        for name, model in zip(PEERS, (dense, exact, routed), strict=True):
            cache = StaticCache(config=model.config, max_cache_len=2 * ids.shape[1])
            model(input_ids=prompt, past_key_values=cache)  # in eager: puts the layers of the cache in place
            model.compile(backend="inductor") if model is dense else fxopt_compile(model)
            peers.append(Peer(name, functools.partial(_steps, model, cache, steps, prompt.shape[1])))
        whole = routed.forward(input_ids=ids, use_cache=False).last_hidden_state[:, -STEPS:]
        once = Peer("all at once", whole.clone, whole.clone)
        check_equal([once, replace(peers[2], output=peers[2].call)], tolerance=1e-3)
        own = peers.pop()
        taken = {}
        for amount, biases in _biases(routed, prompt).items():
            call = functools.partial(_steps_with, routed, biases, own.call)
            with watching(routed):
                call()
                taken[amount] = sum(c["fraction"] for c in routing(routed).values()) / len(routers(routed))
            peers.append(Peer(f"{own.name}, {amount}", call))
        rows = measure(f"{STEPS} steps after {prompt.shape[1]}", peers, rounds=rounds, device=device, progress=progress)
    best = min(rows[0].median, rows[1].median)
    for row, fraction in zip(rows[2:], taken.values(), strict=True):
        left = 1 - len(routers(routed)) / len(routed.layers) * (1 - fraction)
        row.bound = best * left
        row.note = (
            f"{fraction:.1%} of the steps of a routed layer ran it; {1 - row.median / best:.1%} saved of {1 - left:.1%}"
        )
    result.remarks.append(f"decoding: the trained predictors agree with the top C for {agreement:.1%} of the tokens")
    return rows


def _steps(model: Any, cache: Any, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """The hidden states of tokens given one by one; the cache is wound back first, so that every round is the same."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(start)
    with torch.no_grad():
        given = (model(input_ids=token, past_key_values=cache) for token in tokens.split(1, 1))
        return torch.cat([output.last_hidden_state.clone() for output in given], 1)


def _train_predictors(model: Any, length: int) -> float:
    """Train the predictors, behind their stop-gradient, on random tokens; how often they then agree with the top C.

    Nothing before a predictor learns, so what it is given and asked for is collected once.
    """
    generator = torch.Generator(model.device).manual_seed(1)
    batches = [torch.randint(0, 1000, (4, length), device=model.device, generator=generator) for _ in range(8)]
    given: dict[str, list[torch.Tensor]] = {path: [] for path in routers(model)}
    asked: dict[str, list[torch.Tensor]] = {path: [] for path in routers(model)}
    hooks = []
    for path, router in routers(model).items():
        predictor: Any = router.predictor
        keep = given[path].append
        hooks.append(predictor.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0].flatten(0, 1))))
    model.train()
    with torch.no_grad(), watching(model) as routes:
        for ids in batches:
            model.forward(input_ids=ids, use_cache=False)
            for path, member in routes().items():
                asked[path].append(member.flatten().float())
    model.eval()
    for hook in hooks:
        hook.remove()
    agreements = []
    for path, router in routers(model).items():
        predictor = router.predictor
        x, wanted = torch.cat(given[path][:-1]), torch.cat(asked[path][:-1])
        predictor[0].weight.data /= x.std()  # a stream at its initialisation is small
        optimizer = torch.optim.Adam(predictor.parameters(), lr=3e-3)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
        with torch.enable_grad():
            for _ in range(UPDATES):
                few = torch.randint(0, len(x), (512,), device=x.device, generator=generator)
                logits = predictor(x[few]).squeeze(-1)
                optimizer.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(logits, wanted[few]).backward()
                optimizer.step()
                slower.step()
        chosen = predictor(given[path][-1]).squeeze(-1) > 0
        agreements.append((chosen == (asked[path][-1] > 0)).float().mean())
        router.trained = True
    return float(torch.stack(agreements).mean())


def _biases(model: Any, prompt: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Biases of the predictors that make them take no token, what they learned, half of the prompt, or every token."""
    predictors: list[Any] = [router.predictor for router in routers(model).values()]
    learned = [predictor[-1].bias.detach().clone() for predictor in predictors]
    half = []
    for predictor, bias in zip(predictors, learned, strict=True):  # the first layers first: the others see their choice
        seen: list[torch.Tensor] = []
        hook = predictor.register_forward_hook(lambda _, __, logits, seen=seen: seen.append(logits))
        _forward(model.forward, prompt)
        hook.remove()
        half.append(bias - seen[-1].median())
        predictor[-1].bias.copy_(half[-1])
    return {
        "no token": [bias - 1e4 for bias in learned], "as learned": learned, "half": half,
        "every token": [bias + 1e4 for bias in learned],
    }  # fmt: skip


def _steps_with(model: Any, biases: list[torch.Tensor], call: Callable[[], torch.Tensor]) -> torch.Tensor:
    for router, bias in zip(routers(model).values(), biases, strict=True):
        router.predictor[-1].bias.copy_(bias)  # type: ignore[index,union-attr,operator]
    return call()
