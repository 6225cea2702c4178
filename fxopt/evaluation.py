"""`fxopt.evaluate`: what each technique costs in quality and brings in speed, on one model and one text.

    table = fxopt.evaluate(model, "heldout.txt", fxopt.LayerSkip(skip=(9, 10)), fxopt.EarlyExit(layers=(6,),
    threshold=0.9)) print(table); table.to_json("table.json"); table.plot("frontier.png")

Quality is measured on the compiled model against the unmodified one: bits per byte, perplexity per token, KL
divergence and top-1 agreement. A setting that acts in decode is scored token by token through `generate`, teacher-
forced on a cache, because one forward over the text would take the path of a prompt; then every row of the table is
scored on the same positions in the same way.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxopt import decoding, scoring
from fxopt.codegen.files import whole_file, write_whole

SCHEMA_VERSION = 1
DECODE_TECHNIQUES = {"early_exit", "sparse_attention"}
"""Techniques that act in decode whatever their `phase`."""


@dataclass
class Row:
    """One candidate. Speeds are tokens per second for one sequence; a value that was not measured is None."""

    name: str
    exact: bool
    bits_per_byte: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    """Nats per token, from the unmodified model to this one."""
    agreement: float | None = None
    prefill: float | None = None
    decode: float | None = None
    ideal: float | None = None
    """FLOPs of a decode step of the model over those of the reference of the technique."""
    speedup: float | None = None
    """Decode, against the faster of eager and Inductor."""
    settings: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Table:
    """The result of `evaluate`: `rows`, the baselines first, and `info` about how they were measured."""

    rows: list[Row]
    info: dict[str, Any]
    models: dict[str, nn.Module] = field(default_factory=dict)
    """The compiled model of each candidate's row, ready for use; all share the weights of the one that was given."""

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; rows are {[row.name for row in self.rows]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data with `schema_version`, `info` and `rows`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "info": self.info,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict()`; the file appears whole or not at all."""
        return write_whole(path, json.dumps(self.to_dict(), indent=1))

    def __str__(self) -> str:
        columns = [
            ("", lambda r: f"{'=' if r.exact else '~'} {r.name}"),
            ("bits/byte", lambda r: _number(r.bits_per_byte, ".4f")),
            ("ppl", lambda r: _number(r.perplexity, ".3f")),
            ("KL", lambda r: _number(r.kl, ".5f")),
            ("top-1", lambda r: _number(r.agreement, ".1%")),
            ("prefill tok/s", lambda r: _number(r.prefill, ",.0f")),
            ("decode tok/s", lambda r: _number(r.decode, ",.1f")),
            ("ideal", lambda r: _number(r.ideal, ".2f", "x")),
            ("speed-up", lambda r: _number(r.speedup, ".2f", "x")),
        ]
        cells = [[title for title, _ in columns]] + [[show(row) for _, show in columns] for row in self.rows]
        filled = [i for i in range(len(columns)) if i == 0 or any(line[i] for line in cells[1:])]
        widths = {i: max(len(line[i]) for line in cells) for i in filled}
        lines = [
            "  ".join(line[i].ljust(widths[i]) if i == 0 else line[i].rjust(widths[i]) for i in filled)
            for line in cells
        ]
        i = self.info
        note = f"{i['scored_tokens']} tokens scored in {i['score']}, context {i['context']}, {i['device']}"
        return "\n".join([*lines, f"= exact  ~ approximate   {note}"])

    def frontier(self) -> list[Row]:
        """Rows that no other row beats in both speed and quality, fastest last."""
        measured = [r for r in self.rows if r.decode is not None and _quality(r) is not None]
        best: list[Row] = []
        for row in sorted(measured, key=lambda r: -(r.decode or 0)):
            if not best or _quality(row) < _quality(best[-1]):  # type: ignore[operator]
                best.append(row)
        return best[::-1]

    def plot(self, path: str | Path) -> Path:
        """The speed-quality frontier: decode tokens per second against bits per byte (or log perplexity), lower and
        further right is better.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for row in self.rows:
            quality = _quality(row)
            if row.decode is None or quality is None:
                continue
            axes.plot(row.decode, quality, "o" if row.exact else "s", label=f"{'=' if row.exact else '~'} {row.name}")
        edge = self.frontier()
        points = [(r.decode or 0.0, _quality(r) or 0.0) for r in edge]
        axes.plot([x for x, _ in points], [y for _, y in points], "--", color="0.6", zorder=0)
        axes.set_xlabel("decode, tokens per second")
        axes.set_ylabel("bits per byte" if any(r.bits_per_byte for r in self.rows) else "bits per token")
        if axes.lines:
            axes.legend(fontsize="small")
        target = Path(path)
        with whole_file(target) as part:
            figure.savefig(part, dpi=150)
        return target


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def _quality(row: Row) -> float | None:
    """Bits per byte, or bits per token when there are no bytes."""
    if row.bits_per_byte is not None or row.perplexity is None:
        return row.bits_per_byte
    return torch.tensor(row.perplexity).log2().item()


def load_model(name_or_path: str | Path = "tinylm", dtype: Any = None) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer: `tinylm` for the shipped one, a folder, or a name on
    the hub.

    Raises FileNotFoundError, TypeError or ValueError that say what is wrong with the name or the checkpoint.
    """
    if str(name_or_path) == "tinylm":
        from fxopt import tinylm

        return tinylm.load(dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype or "auto")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except RuntimeError as error:
        raise ValueError(f"the weights of {name_or_path} do not fit its config: {error}") from error
    except ValueError as error:
        raise TypeError(f"{name_or_path} is not a causal language model: {error}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"cannot load {name_or_path}: it is neither the folder of a checkpoint nor a reachable name on the hub "
            f"({error})"
        ) from error
    return model.eval(), tokenizer


def read_data(data: str | Path | Tensor | Sequence[int]) -> str | Tensor:
    """The text or the token ids that `data` stands for: a path, a text, or ids. A one-line str that looks like a path
    is one.
    """
    if isinstance(data, Path):
        return scoring.read_text(data)
    if isinstance(data, str):
        single = len(data) < 1024 and "\n" not in data
        if single and (
            Path(data).is_file() or (data.strip() and not data.count(" ") and ("/" in data or Path(data).suffix))
        ):
            return scoring.read_text(data)
        return data
    return torch.as_tensor(data).flatten()


def acts_in_decode(technique: Any) -> bool:
    """Whether one forward over a text would not show what this setting does."""
    return technique.name in DECODE_TECHNIQUES or getattr(technique, "phase", None) == "decode"


def evaluate(
    model: nn.Module,
    data: str | Path | Tensor | Sequence[int],
    *candidates: Any,
    tokenizer: Any = None,
    context: int = 512,
    limit: int | None = None,
    score: str = "auto",
    speed: bool = True,
    decode_steps: int = 32,
    rounds: int = 3,
    cache: str = "static",
    compile_prompt: bool = True,
    show: bool = True,
) -> Table:
    """Quality and speed of `model` as it is and under each candidate.

    Args:
        data: a text, a path to one, or token ids (then there are no bytes, and quality is perplexity per token).
        candidates: techniques, recipes or path mappings; a list or tuple of them is one candidate.
        tokenizer: found by the model's name or path when not given.
        context: tokens of a window.
        limit: tokens to score; 8192, or 1024 token by token.
        score: "prompt" (one forward per window), "decode" (token by token after half a window), or "auto": "decode"
            as soon as one
            candidate acts in decode.
        speed: measure tokens per second too, against eager and Inductor, with a prompt of half a window.
        decode_steps, rounds: tokens written per round, and rounds after the warm-up.
        cache: cache implementation of `generate`.
        compile_prompt: without it prompts are read in eager PyTorch, by every row, and only decode is compiled and
            timed: half of the compilation.

    The model is left as it is: every candidate is compiled on a copy that shares its weights.

    Raises TypeError for a model that is not a causal language model, FileNotFoundError and ValueError for a text that
    is missing, empty, binary, or shorter than one context.
    """
    from fxopt.compiler import compile as compile_model
    from fxopt.meaning import shared_copy

    scoring.require_causal(model)
    if score not in ("auto", "prompt", "decode"):
        raise ValueError(f"score={score!r}; allowed are 'auto', 'prompt' and 'decode'")
    text = read_data(data)
    if isinstance(text, str) and tokenizer is None:
        tokenizer = find_tokenizer(model)
    named: dict[str, tuple[Any, ...]] = {}
    for name, techniques in map(_named, candidates):
        named[name if name not in named else f"{name} #{len(named) + 1}"] = techniques
    flat = {name: _techniques(model, techniques) for name, techniques in named.items()}
    if score == "auto":
        score = "decode" if any(acts_in_decode(t) for found in flat.values() for t in found) else "prompt"
    prompt = context // 2 if score == "decode" else 0
    cut = _choose(
        scoring.windows(tokenizer, text, context, whole=True), limit or (8192 if score == "prompt" else 1024), prompt
    )
    original = shared_copy(model).eval()
    ready = {name: compile_model(shared_copy(model).eval(), *techniques) for name, techniques in named.items()}
    rows = {"eager": Row("eager", True)}
    rows |= {n: Row(n, all(t.exact for t in flat[n]), settings=[t.to_dict() for t in flat[n]]) for n in named}
    # Every copy shares the code of the same forward, so all candidates count against Dynamo's one limit.
    with torch._dynamo.config.patch(recompile_limit=128), torch.no_grad():
        for name, row in rows.items():
            quality = _quality_of(ready.get(name, original), original, cut, prompt, cache, name, compile_prompt, show)
            for key, value in quality.items():
                setattr(row, key, value)
        if speed:
            inductor = shared_copy(model).eval()
            inductor.compile()
            length = len(cut[0].inputs) // 2
            contest = {"eager": original, "inductor": inductor} | ready
            rows = {"eager": rows.pop("eager"), "inductor": Row("inductor", True)} | rows
            room = len(cut[0].inputs) - length + 1  # the cache that the scores were made with
            measured = decoding.speeds(
                contest, cut[0].inputs[:length], decode_steps, rounds, cache, compile_prompt, room
            )
            strongest = max((measured["eager"], measured["inductor"]), key=lambda speed: speed.decode)
            for name, speed_of in measured.items():
                rows[name].decode, rows[name].speedup = speed_of.decode, speed_of.over(strongest)
                if compile_prompt:
                    rows[name].prefill = speed_of.prefill
            for name, techniques in named.items():
                if not rows[name].exact:
                    rows[name].ideal = _ideal(original, techniques, cut[0].inputs[:length], cache)
    scored = sum(len(w.targets) - max(0, prompt - 1) for w in cut)
    info = {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__, "context": context, "score": score,
        "scored_tokens": scored, "windows": len(cut), "device": str(next(model.parameters()).device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    return Table(list(rows.values()), info, ready)


def _quality_of(
    model: Any,
    original: Any,
    cut: list[scoring.Window],
    prompt: int,
    cache: str,
    name: str,
    compile_prompt: bool,
    show: bool,
) -> dict[str, float | None]:
    """The scores of one model on the chosen windows; the unmodified one is run beside it, since its logits are too
    large to keep.
    """
    device = next(original.parameters()).device
    sums = scoring.Divergence()
    for window in scoring.progress(cut, len(cut), name, show):
        inputs = window.inputs[None].to(device)
        first = max(0, prompt - 1)
        base = original(inputs, use_cache=False).logits[0, first:]
        if model is original:
            logits = base
        elif prompt:
            logits = decoding.decode_logits(model, window, prompt, cache, compile_prompt)
        else:
            logits = model(inputs, use_cache=False).logits[0]
        sums.add(logits, base, window.targets[first:].to(device), int(window.sizes[first:].sum()))
    return sums.result()


def _ideal(original: nn.Module, techniques: tuple[Any, ...], prompt: Tensor, cache: str) -> float | None:
    """How many times fewer FLOPs a decode step of the reference takes; None when the reference saves none or has
    data-dependent work.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from fxopt.meaning import reference

    def flops(model: nn.Module) -> int:
        counted = []
        for steps in (1, 3):
            with FlopCounterMode(display=False) as counter:
                decoding.force(model, prompt, [int(prompt[0])] * steps, cache, keep_logits=False)
            counted.append(counter.get_total_flops())
        return counted[1] - counted[0]

    try:
        saved = flops(original) / max(1, flops(reference(original, *techniques)))
    except (NotImplementedError, TypeError):
        return None
    return saved if saved > 1.001 else None


def _named(candidate: Any) -> tuple[str, tuple[Any, ...]]:
    """A candidate's name in the table, and its parts."""
    parts = tuple(candidate) if isinstance(candidate, (list, tuple)) else (candidate,)
    return " + ".join(_name(part) for part in parts) or "fxopt", parts


def _name(part: Any) -> str:
    if isinstance(part, Mapping):
        return "{" + ", ".join(f"{path}: {technique}" for path, technique in part.items()) + "}"
    return str(getattr(part, "name", None) or "recipe") if type(part).__name__ == "Recipe" else str(part)


def _techniques(model: nn.Module, parts: tuple[Any, ...]) -> list[Any]:
    from fxopt.compiler import flatten

    return [t for part in flatten(model, parts) for t in (part.values() if isinstance(part, Mapping) else (part,))]


def _choose(cut: list[scoring.Window], limit: int, prompt: int) -> list[scoring.Window]:
    """Windows spread evenly over the text, as many as `limit` scored tokens take."""
    count = min(len(cut), max(1, limit // (len(cut[0].targets) - max(0, prompt - 1))))
    return [cut[i * len(cut) // count] for i in range(count)]


def find_tokenizer(model: Any) -> Any:
    """The tokenizer of a model that knows its name or path; raises ValueError for one that does not."""
    from transformers import AutoTokenizer

    name = getattr(model.config, "name_or_path", "")
    if not name:
        raise ValueError(
            "the model has no name or path to find its tokenizer by; give tokenizer=..., or token ids as data"
        )
    return AutoTokenizer.from_pretrained(name)
