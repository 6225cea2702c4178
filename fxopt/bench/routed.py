"""``fxopt bench depth --technique router``: layers that a prompt asks for, batch 8, a quarter of the decisions against.

Rows differ in the layers they pass by, so that hardly any layer is unwanted by all. The ideal is the time without any
layer plus, of what the layers take for all rows, the share that is wanted. On prompts rows are gathered; in decode
steps all are computed, for the reason that the report gives together with what it costs.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt.bench.harness import Peer, Result, environment, measure, progress_bar
from fxopt.bench.models import llama
from fxopt.compiler import compile as fxopt_compile
from fxopt.meaning import shared_copy
from fxopt.passes.layer_skip import LayerSkip
from fxopt.passes.skip_router import RandomPolicy
from fxopt.reporting import report

RATE, BATCH, GOAL = 0.75, 8, 0.8


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """A prompt of 64 tokens a row and a decode step on it: every layer, none, and three quarters of the decisions."""
    from transformers import StaticCache

    layers, width, prompt, rounds = (4, 128, 16, 3) if quick else (12, 768, 64, 15)
    model: Any = llama(layers, width, heads=width // 64, kv_heads=1 if quick else 4).to(device)
    command = f"fxopt bench depth --technique router{' --quick' if quick else ''} --device {device}"
    result = Result("routed", command, environment(device))
    ids = torch.randint(0, 1000, (BATCH, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    quarter = _quarter(layers)
    wanted = _wanted(quarter, layers)
    policies = {"every layer": RandomPolicy(1.0), "no layer": RandomPolicy(0.0), "a quarter passes by": quarter}
    calls: dict[str, list[Peer]] = {"prompt": [], "decode": []}
    with torch.no_grad(), progress_bar("routed", 2 * rounds) as step:
        for name, policy in policies.items():
            built = fxopt_compile(shared_copy(model), LayerSkip(router=policy), strict=True)
            cache = StaticCache(config=model.config, max_cache_len=prompt + 8)

            def from_prompt(built: Any = built, cache: Any = cache) -> None:
                cache.reset()
                built(input_ids=ids, past_key_values=cache, logits_to_keep=1)

            def next_token(built: Any = built, cache: Any = cache) -> None:
                built(input_ids=ids[:, -1:], past_key_values=cache)
                for layer in cache.layers:
                    layer.cumulative_length.fill_(prompt)

            from_prompt()
            calls["prompt"].append(Peer(name, from_prompt))
            calls["decode"].append(Peer(name, next_token))
        for case, peers in calls.items():
            rows = measure(f"{case}, {BATCH} rows", peers, rounds=rounds, device=device, progress=step)
            every, none, some = (row.median for row in rows)
            rows[2].bound = none + wanted * (every - none)
            result.rows += rows
            result.remarks.append(
                f"{case}: {wanted:.0%} of the decisions want their layer; ideal over measured "
                f"{rows[2].bound / some:.3f}, goal {GOAL} or the remark"
            )
    told = [r.message for r in report(built).remarks if "weights are read whatever" in r.message]
    result.remarks.append(f"decode remark: {told[0]}")
    return result


def _quarter(layers: int) -> RandomPolicy:
    """The seed whose decisions, over all layers and rows, come closest to a quarter against."""
    return min((RandomPolicy(RATE, seed) for seed in range(16)), key=lambda p: abs(_wanted(p, layers) - RATE))


def _wanted(policy: RandomPolicy, layers: int) -> float:
    """Share of the decisions that want their layer."""
    state = torch.zeros(BATCH, 1)
    return float(torch.stack([policy(state, layer) for layer in range(layers)]).float().mean())
