"""Train a small mixture-of-depths transformer against a dense one of equal training FLOPs, and plot both.

    python examples/train_mod.py                   # three seeds of each, about half an hour of one core
    python examples/train_mod.py --quick           # a minute, to see that it works
    python examples/train_mod.py --time            # step times alone, in turn, on a quiet machine

The text is that of the shipped small model, the Python standard library (fxopt/tinylm/corpus.py), as bytes. Both models
have the same layers and width; every second block of the routed one computes an eighth of the tokens, so that a step
costs less and the same FLOPs buy more steps. FLOPs are counted, not estimated: matrix products of one forward and
backward, routers included. The held-out loss of the routed model is that of its causal predictor, as in decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fxopt
from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import auxiliary_loss, routers
from fxopt.tinylm import corpus

KINDS = ("dense", "mixture of depths")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the figures, besides the text. `steps` are those of the dense model."""

    layers: int = 6
    width: int = 96
    heads: int = 4
    context: int = 256
    batch: int = 16
    capacity: float = 0.125
    every: int = 2
    predictor: str = "bce"
    auxiliary: float = 0.01
    rate: float = 4e-3
    steps: int = 500
    seeds: int = 3
    held_out: int = 128
    """Held-out windows."""
    evaluations: int = 12


QUICK = replace(
    Recipe(), layers=4, width=32, heads=2, context=64, batch=8, steps=40, seeds=1, held_out=8, evaluations=2
)


def text(limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out bytes, whole files one after the other."""
    train, held = corpus.read_corpus()
    parts = [[files[name] for name in sorted(files)[:limit]] for files in (train, held)]
    first, second = (np.frombuffer("\0".join(part).encode(), dtype=np.uint8) for part in parts)
    return first, second


def windows(stream: np.ndarray, count: int, length: int, rng: np.random.Generator) -> torch.Tensor:
    """[count, length + 1], int64, from anywhere in the stream."""
    starts = rng.integers(0, len(stream) - length - 1, count)
    return torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64))


def build(recipe: Recipe, kind: str, seed: int) -> Any:
    """A LlamaForCausalLM over bytes; the same weights for both kinds, and routers for one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=recipe.width, intermediate_size=recipe.width * 8 // 3 // 32 * 32,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        initializer_range=recipe.width**-0.5, max_position_embeddings=recipe.context,
    ))  # fmt: skip
    if kind != "dense":
        fxopt.MixtureOfDepths(capacity=recipe.capacity, every=recipe.every, predictor=recipe.predictor)(model)
        for router in routers(model).values():
            torch.nn.init.normal_(router.weight, std=recipe.width**-0.5)
    return model.train()


def loss_of(forward: Any, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats per byte; ``ids: [B, S + 1]``."""
    logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def training_loss(model: Any, ids: torch.Tensor, weight: float) -> torch.Tensor:
    """The same, and what the predictors of a routed model have to learn."""
    loss = loss_of(model, ids)
    return loss + weight * auxiliary_loss(model) if routers(model) else loss


def step_flops(recipe: Recipe, kind: str) -> int:
    """Floating-point operations of the matrix products of one training step, counted while it runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build(recipe, kind, 0)
    ids = torch.zeros(recipe.batch, recipe.context + 1, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        training_loss(model, ids, recipe.auxiliary).backward()
    return int(counter.get_total_flops())


@torch.no_grad()
def held_out_loss(model: Any, held: torch.Tensor, training: bool = False) -> float:
    """Nats per byte. In eval() the predictor decides, causally; `training=True` is top-C, which sees what follows."""
    model.train(training)
    # forward in eager: as many tokens as the predictor takes.
    losses = [loss_of(model.forward, rows) for rows in held.split(32)]
    model.train()
    return float(torch.stack(losses).mean())


@torch.no_grad()
def routing(model: Any, held: torch.Tensor) -> dict[str, float]:
    """What the trained predictor does on held-out text: the share of tokens it takes, and how often top-C agrees."""
    found = {}
    for training in (True, False):
        model.train(training)
        with watching(model) as routes:
            model.forward(input_ids=held[:, :-1], use_cache=False)
            found[training] = torch.stack(list(routes().values()))
    model.train()
    return {
        "routed_fraction": float(found[False].float().mean()),
        "first_routed_layer_agreement": float((found[True][0] == found[False][0]).float().mean()),
    }


def train(
    recipe: Recipe, kind: str, seed: int, steps: int, data: tuple[np.ndarray, torch.Tensor], compiled: bool
) -> dict[str, Any]:
    """One run: held-out losses over the steps, and process seconds a step."""
    stream, held = data
    model = build(recipe, kind, seed)
    if compiled:
        fxopt.compile(model) if routers(model) else model.compile(backend="inductor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1)
    rng = np.random.default_rng(seed)
    curve, seconds = [], []
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / (0.05 * steps)) * (1 - 0.98 * done)
        ids = windows(stream, recipe.batch, recipe.context, rng)
        began = time.process_time()
        training_loss(model, ids, recipe.auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
        if (step + 1) * recipe.evaluations // steps > step * recipe.evaluations // steps:
            curve.append((step + 1, held_out_loss(model, held)))
            print(f"{kind}, seed {seed}: step {step + 1} of {steps}, held-out {curve[-1][1]:.4f}", flush=True)
    run = {"kind": kind, "seed": seed, "steps": steps, "curve": curve, "held_out": curve[-1][1],
           "process_seconds_a_step": statistics.median(seconds)}  # fmt: skip
    if routers(model):
        run |= {"held_out_top_c": held_out_loss(model, held, training=True), **routing(model, held)}
    return run


def step_times(recipe: Recipe, rounds: int = 15) -> dict[str, float]:
    """Median seconds of a compiled forward and backward, the two kinds in turn."""
    ids = torch.randint(0, 256, (recipe.batch, recipe.context + 1))
    models = {kind: build(recipe, kind, 0) for kind in KINDS}
    for model in models.values():
        fxopt.compile(model) if routers(model) else model.compile(backend="inductor")
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 2):
        for kind, model in models.items():
            began = time.perf_counter()
            training_loss(model, ids, recipe.auxiliary).backward()
            if turn >= 2:
                times[kind].append(time.perf_counter() - began)
    return {kind: statistics.median(found) for kind, found in times.items()}


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out loss over training FLOPs: every seed thin, the mean thick; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in zip(KINDS, ("tab:gray", "tab:blue"), strict=True):
        curves = [np.array(run["curve"]) for run in result["runs"] if run["kind"] == kind]
        for curve in curves:
            axes.plot(curve[:, 0] * result["flops_a_step"][kind], curve[:, 1], color=colour, alpha=0.3, linewidth=0.8)
        mean = np.mean(curves, axis=0)
        label = f"{kind}: {mean[-1, 1]:.3f} after {int(mean[-1, 0])} steps"
        axes.plot(mean[:, 0] * result["flops_a_step"][kind], mean[:, 1], color=colour, label=label)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(recipe: Recipe, out: Path, compiled: bool = True, limit: int | None = None) -> dict[str, Any]:
    """All runs; figures and plot are written to `out` after each, so that an interruption loses one run."""
    out.mkdir(parents=True, exist_ok=True)
    stream, rest = text(limit)
    held = windows(rest, recipe.held_out, recipe.context, np.random.default_rng(0))
    flops = {kind: step_flops(recipe, kind) for kind in KINDS}
    result: dict[str, Any] = {"recipe": asdict(recipe), "flops_a_step": flops, "runs": [], "torch": torch.__version__}
    for seed in range(recipe.seeds):
        for kind in KINDS:
            steps = recipe.steps * flops["dense"] // flops[kind]
            result["runs"].append(train(recipe, kind, seed, steps, (stream, held), compiled))
            (out / "figures.json").write_text(json.dumps(result, indent=1) + "\n")
    means = {k: statistics.mean(r["held_out"] for r in result["runs"] if r["kind"] == k) for k in KINDS}
    result["mean_held_out"] = means
    result["routed_over_dense"] = means[KINDS[1]] / means["dense"]
    (out / "figures.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out / "losses.png")
    print(f"held-out loss, mean of {recipe.seeds}: " + ", ".join(f"{k} {v:.4f}" for k, v in means.items()))
    print(f"a routed step has {flops[KINDS[1]] / flops['dense']:.3f} of the FLOPs of a dense one")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="very small models and texts, done in a minute")
    parser.add_argument("--time", action="store_true", help="measure step times and train nothing")
    parser.add_argument("--no-compile", action="store_true", help="train in eager PyTorch")
    parser.add_argument("--steps", type=int, help="steps of the dense model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "train_mod", help="folder of the figures")
    args = parser.parse_args()
    chosen = QUICK if args.quick else Recipe()
    chosen = replace(chosen, steps=args.steps or chosen.steps)
    if args.time:
        print(json.dumps({"seconds_a_step": step_times(chosen), "flops": {k: step_flops(chosen, k) for k in KINDS}}))
    else:
        main(chosen, args.out, not (args.no_compile or args.quick), 40 if args.quick else None)
