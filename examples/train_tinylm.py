"""Train the small language model that ships with fxopt, on the source of the Python standard library.

    python examples/train_tinylm.py --minutes 110 --out build/tinylm    # the first training; go on with --resume
    python examples/train_tinylm.py --minutes 90 --start build/tinylm --out build/long      # the second, long contexts
    python examples/train_tinylm.py --steps 2000 --out build/tinylm     # repeatable: the same weights for the same seed
    python examples/train_tinylm.py --quick --out build/quick           # a minute, to see that it works
    python examples/train_tinylm.py --evaluate                          # the metrics of the model card

The model is a 12-layer Llama with grouped-query attention 4:1. It is trained for adaptive depth after LayerSkip
(arXiv 2404.16710): layer dropout that rises with depth, and an early-exit loss on the shared norm and head at one
rotating depth a step. The stack grows while it trains (3, 6, 9, 12 layers; a new layer starts as the identity),
contexts grow from 256 to 4096 tokens, and a tenth of the sequences carries planted copies (fxopt/tinylm/needle.py).
Matrices are trained with Muon, embeddings and norms with AdamW.

On Linux, MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=8000000000 in the environment saves a tenth of the
time: the allocator then keeps the large buffers instead of mapping them anew in every step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fxopt.codegen.files import whole_file, write_whole
from fxopt.tinylm import corpus
from fxopt.tinylm.feeder import Feeder, at
from fxopt.tinylm.training import (
    LONG,
    QUICK,
    HeadLoss,
    Muon,
    Recipe,
    Trunk,
    build,
    rate_multiple,
)

# --- the text --------------------------------------------------------------------------------------------------------


def prepare(recipe: Recipe, out: Path, limit: int | None = None, start: Path | None = None) -> tuple[Any, np.ndarray]:
    """The tokenizer and the training stream (uint16 ids, shuffled files, END between them), made once in `out`.

    The tokenizer is trained on the same files, or is that of the model in `start`.
    """
    from tokenizers import Tokenizer

    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    if (work / "stream.npy").is_file():
        return Tokenizer.from_file(str(out / "tokenizer.json")), np.load(work / "stream.npy")
    train, held = corpus.read_corpus()
    names = sorted(train)
    random.Random(recipe.seed).shuffle(names)
    names = names[:limit]
    if start is None:
        tokenizer = corpus.train_tokenizer({n: train[n] for n in names}, recipe.vocab)
    else:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    corpus.save_tokenizer(tokenizer, out, 8192)
    end = tokenizer.token_to_id(corpus.END)
    ids: list[int] = [end]
    for name in names:
        ids += [*tokenizer.encode(train[name]).ids, end]
    listing = {"python": sys.version.split()[0], "train": {}, "heldout": {}}
    for part, texts in (("train", {n: train[n] for n in sorted(names)}), ("heldout", held)):
        listing[part] = {n: hashlib.sha256(t.encode()).hexdigest()[:16] for n, t in sorted(texts.items())}
    write_whole(out / "data.json", json.dumps(listing, indent=0))
    write_whole(out / "heldout.txt", corpus.heldout_text(held))
    stream = np.array(ids, dtype=np.uint16)
    with whole_file(work / "stream.npy") as part:
        np.save(part, stream)
    return tokenizer, stream


# --- the training ----------------------------------------------------------------------------------------------------


def choose_exit(depth: int, layers: int, rng: random.Random) -> int:
    """The exit trained in this step: a quarter and half of the stack half of the time, any other depth else."""
    favoured = [n for n in (layers // 4, layers // 2) if 0 < n < depth]
    if favoured and rng.random() < 0.5:
        return rng.choice(favoured)
    return rng.randrange(1, depth)


class State:
    """What a training is made of, and its checkpoint."""

    def __init__(self, recipe: Recipe, out: Path, limit: int | None, start: Path | None = None) -> None:
        self.recipe, self.path = recipe, out / "work" / "checkpoint.pt"
        self.tokenizer, stream = prepare(recipe, out, limit, start)
        self.model = build(recipe)
        if start is not None:
            from safetensors.torch import load_model

            try:
                load_model(self.model, start / "model.safetensors")
            except RuntimeError as error:
                raise ValueError(f"the weights in {start} are not of the shape of this recipe ({error})") from error
        named = dict(self.model.named_parameters())
        matrices = [n for n, p in named.items() if p.dim() == 2 and "layers" in n]
        self.rest = [p for n, p in named.items() if n not in matrices]
        multiples = [rate_multiple(recipe, n) for n in matrices]
        kind = torch.bfloat16 if recipe.half else torch.float32
        self.muon = Muon([named[n] for n in matrices], multiples, dtype=kind)
        self.adam = torch.optim.AdamW(self.rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.feeder = Feeder(recipe, self.tokenizer, stream)
        self.step, self.elapsed, self.tokens = 0, 0.0, 0
        self.history: list[tuple[Any, ...]] = []

    def save(self) -> None:
        """An interruption leaves the earlier checkpoint whole."""
        with whole_file(self.path) as part:
            torch.save({
                "model": self.model.state_dict(), "muon": self.muon.buffers, "adam": self.adam.state_dict(),
                "cursor": self.feeder.cursor, "step": self.step, "elapsed": self.elapsed, "tokens": self.tokens,
                "history": self.history, "recipe": asdict(self.recipe),
            }, part)  # fmt: skip
        write_whole(self.path.parents[1] / "curve.json", json.dumps(self.history))

    def resume(self) -> None:
        """Go on from the checkpoint. Raises FileNotFoundError without one, ValueError when it is of another recipe."""
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no checkpoint {self.path}; start without --resume")
        state = torch.load(self.path, weights_only=True)
        if json.dumps(state["recipe"]) != json.dumps(asdict(self.recipe)):
            raise ValueError(f"{self.path} is of another recipe; train into another folder, or without --resume")
        self.model.load_state_dict(state["model"])
        for buffer, saved in zip(self.muon.buffers, state["muon"], strict=True):
            buffer.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.feeder.cursor, self.step, self.elapsed = state["cursor"], state["step"], state["elapsed"]
        self.tokens, self.history = state["tokens"], state["history"]
        print(f"resumed at step {self.step}, {self.elapsed / 60:.1f} minutes, {self.tokens} tokens", flush=True)


def train_step(state: State, trunk: Trunk, progress: float) -> None:
    """One step at a fraction of the training; the learning rates fall linearly to a fiftieth."""
    recipe, model = state.recipe, state.model
    rng = random.Random(f"{recipe.seed}/{state.step}")
    batch = state.feeder.batch(state.step, progress)
    depth = at(recipe.growth, progress)
    exit_at = choose_exit(depth, recipe.layers, rng)
    rise = math.log(2) / (recipe.layers - 1)
    chances = [recipe.dropout * (math.exp(i * rise) - 1) for i in range(depth)]
    dropped = {i for i, chance in enumerate(chances) if rng.random() < chance and i + 1 != exit_at}
    last, early = trunk(batch, depth, dropped, exit_at)
    targets, weights = batch.targets.flatten(), batch.weights.flatten()
    loss, full, exit_loss = HeadLoss.apply(
        last.flatten(0, 1), early.flatten(0, 1), model.model.embed_tokens.weight, targets, weights,
        min(recipe.exit_rows, len(targets)), recipe.exit_weight,
    )  # fmt: skip
    loss.backward()
    rate = min(1.0, (state.step + 1) / recipe.warmup) * float(np.interp(progress, *zip(*recipe.rates, strict=True)))
    torch.nn.utils.clip_grad_norm_(state.rest, 1.0)
    for group in state.adam.param_groups:
        group["lr"] = recipe.adam_lr * rate
    state.adam.step()
    state.muon.step(recipe.muon_lr * rate)
    for p in model.parameters():
        p.grad = None
    state.step += 1
    state.tokens += len(targets)
    state.history.append((state.step, round(state.elapsed, 1), state.tokens, batch.length, depth, round(full.item(), 4),
                          exit_at, round(exit_loss.item(), 4)))  # fmt: skip


def train(
    recipe: Recipe,
    out: Path,
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = False,
    compiled: bool = True,
    limit: int | None = None,
    stop_after: int | None = None,
    start: Path | None = None,
) -> Any:
    """Train for a wall-clock time or a number of steps, and write the model, its tokenizer and texts to `out`.

    `limit` takes only so many files; `start` is a folder whose weights and tokenizer the training starts from. An
    interruption (SIGINT, SIGTERM, or `stop_after` steps) finishes the step and saves a checkpoint.
    """
    check_writable(out)
    if start is not None:
        check_start(start)
    state = State(recipe, out, limit, start)
    if resume:
        state.resume()
    stopped: list[int] = []
    earlier = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    trunk = Trunk(state.model, recipe, compiled)
    show, saved = progress_bar(), state.elapsed
    while True:
        progress = state.step / steps if steps else state.elapsed / 60 / (minutes or 1.0)
        if progress >= 1 or stopped or (stop_after is not None and state.step >= stop_after):
            break
        began = time.perf_counter()
        train_step(state, trunk, progress)
        state.elapsed += time.perf_counter() - began
        show(progress, state.history, state.tokens / state.elapsed)
        if state.elapsed - saved > 120:
            state.save()
            saved = state.elapsed
    for number, handler in earlier.items():
        signal.signal(number, handler)
    state.save()
    if progress >= 1:
        ship(state.model, out)
        plot_curve(state.history, out / "curve.png")
    elif stopped:
        print(f"interrupted at step {state.step}; go on with --resume", flush=True)
    return state.model


def progress_bar() -> Callable[[float, list[Any], float], None]:
    """A tqdm bar on a terminal, a line every twenty steps elsewhere."""
    bar = None
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm

            bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")
        except ImportError:
            pass

    def show(progress: float, history: list[Any], speed: float) -> None:
        step, _, _, length, depth, _, _, exit_loss = history[-1]
        recent = [h[5] for h in history[-20:]]
        text = f"step {step} context {length} depth {depth} loss {sum(recent) / len(recent):.3f} exit {exit_loss:.3f}"
        if bar is not None:
            bar.n = round(100 * progress, 1)
            bar.set_postfix_str(f"{text} {speed:.0f} tok/s")
        elif step % 20 == 0:
            print(f"{100 * progress:5.1f}% {text} {speed:.0f} tok/s", flush=True)

    return show


def check_writable(out: Path) -> None:
    """Raises PermissionError when `out` cannot be written, before anything is computed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"cannot write to {out}: {error}. Give another folder with --out") from error


def check_start(start: Path) -> None:
    """Raises FileNotFoundError when there is no model in `start` to go on from."""
    missing = [name for name in ("model.safetensors", "tokenizer.json") if not (start / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{start} has no {' and no '.join(missing)}; give --start the folder of a trained model"
        )


def ship(model: Any, out: Path) -> None:
    """Write the model in 16 bits beside its tokenizer: into a folder of its own first, then renamed.

    The config asks for float32, in which the few megabytes are best computed on a CPU.
    """
    part = out / "work" / "ship"
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(part)
    config = json.loads((part / "config.json").read_text())
    write_whole(part / "config.json", json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        os.replace(part / file, out / file)


def plot_curve(history: list[tuple[Any, ...]], path: Path) -> None:
    """The training loss over tokens, one line per context length; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for length in sorted({row[3] for row in history}):
        rows = [row for row in history if row[3] == length]
        width = max(1, len(rows) // 60)
        groups = [rows[i : i + width] for i in range(0, len(rows), width)]
        axes.plot(
            [g[-1][2] / 1e6 for g in groups],
            [sum(r[5] for r in g) / len(g) for g in groups],
            label=f"context {length}",
        )
    axes.set_xlabel("tokens, millions")
    axes.set_ylabel("loss, nats per token (planted copies included)")
    axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, dpi=110)


def evaluate(folder: Path | None) -> None:
    """Print the metrics of the shipped model or of one in `folder`, and keep those of a folder beside its weights."""
    from fxopt import tinylm
    from fxopt.tinylm.metrics import measure

    model, tokenizer = tinylm.load(folder=folder)
    metrics = measure(model, tokenizer, ((folder or tinylm.FOLDER) / tinylm.HELDOUT.name).read_text(encoding="utf-8"))
    print(json.dumps(metrics, indent=1))
    if folder:
        write_whole(folder / tinylm.METRICS.name, json.dumps(metrics, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="train for this wall-clock time; the schedule follows the clock")
    parser.add_argument("--steps", type=int, help="train for this many steps; repeatable")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--evaluate", action="store_true", help="measure the shipped model, or the one in --out")
    parser.add_argument("--quick", action="store_true", help="a very small model and text, done in a minute")
    parser.add_argument("--out", type=Path, help="folder for the weights and the checkpoint")
    parser.add_argument("--start", type=Path, help="start from the model in this folder, on long contexts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="train in eager PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(args.out)
        return
    if args.out is None:
        parser.error("--out is needed to train")
    steps = args.steps or (60 if args.quick and args.minutes is None else None)
    if (steps or args.minutes or 0) <= 0:
        parser.error("give --minutes or --steps, above zero")
    recipe = QUICK if args.quick else Recipe() if args.start is None else LONG
    compiled = not (args.no_compile or args.quick)
    limit = 60 if args.quick else None
    train(recipe, args.out, args.minutes, steps, args.resume, compiled, limit=limit, start=args.start)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, PermissionError, ValueError) as problem:
        sys.exit(f"error: {problem}")
