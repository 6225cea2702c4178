"""``fxopt bench context``: tokens per second of the small model that ships, against the length of its context.

Each peer decodes the same text on a static cache as long as the context and filled to its end, so no peer reads more
than it has to. The exact rewrites have to write the same tokens as eager PyTorch when they choose for themselves;
approximate settings are quoted with their KL divergence from the model on the same positions. The bound is what a
step has to read, weights and cache, at the speed that a plain sum reads as many bytes on this machine.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.bench.attention import read_bandwidth
from fxopt.bench.harness import Peer, Result, Row, check_equal, environment, measure, progress_bar
from fxopt.compiler import compile as fxopt_compile
from fxopt.meaning import shared_copy
from fxopt.passes.layer_skip import LayerSkip
from fxopt.passes.sparse_attention import SparseAttention

LENGTHS = (1024, 2048, 4096)
"""Up to the context that the model was trained on."""
STEPS = 32
"""Decode steps of one timed call, at the end of the context."""
WRITTEN = 48
"""Tokens that eager and exact write by themselves, to be compared."""
EXACT = "fxopt, exact"
WINDOW = 512


def approximate() -> dict[str, Any]:
    """The settings that are quoted with their divergence."""
    return {
        "fxopt, sink and window": SparseAttention(method="sink_window", sinks=4, window=WINDOW - 4),
        "fxopt, 8 of 12 layers": LayerSkip(skip=(8, 9, 10, 11), phase="decode"),
    }


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """One row a peer and length: seconds a token; the first peer, to which ratios refer, is eager PyTorch."""
    from fxopt import tinylm

    lengths, rounds, scored = ((256, 512), 3, WRITTEN) if quick else (LENGTHS, 12, 256)
    command = f"fxopt bench context{' --quick' if quick else ''} --device {device}"
    result = Result("context", command, environment(device))
    model, tokenizer = tinylm.load()
    model.to(device)
    ids = torch.tensor([tokenizer.encode(tinylm.heldout())[: max(lengths) + 1]], device=device)
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    settings = approximate()
    with progress_bar("context", rounds * len(lengths)) as tick, torch.no_grad():
        for length in lengths:
            torch._dynamo.reset()
            forms: dict[str, nn.Module] = {"HF eager": model, "inductor": shared_copy(model)}
            forms["inductor"].compile()
            forms[EXACT] = fxopt_compile(shared_copy(model))
            forms |= {name: fxopt_compile(shared_copy(model), setting) for name, setting in settings.items()}
            filled = prefilled(model, ids[:, : length - scored], length)
            texts = {name: Continued(form, filled, length) for name, form in forms.items()}
            places = slice(length - scored, length)
            # Every peer reads the same text up to the end of its own cache, which is then full.
            logits = {name: text.forced(ids[:, places]) for name, text in texts.items()}
            expected = logits["HF eager"]
            notes = {name: f"KL {divergence(logits[name], expected):.4f}" for name in settings}
            check_equal([_ready(name, logits[name]) for name in ("HF eager", "inductor", EXACT)], tolerance=1e-3)
            written = {name: texts[name].greedy(ids[:, -1:], WRITTEN) for name in ("HF eager", EXACT)}
            if not torch.equal(written["HF eager"], written[EXACT]):
                raise AssertionError(f"at {length} positions the exact rewrites write other tokens than eager PyTorch")
            notes[EXACT] = f"{WRITTEN} identical tokens"
            last = ids[:, length - STEPS : length]
            peers = [Peer(name, functools.partial(text.forced, last, keep=False)) for name, text in texts.items()]
            rows = measure(f"{length} positions", peers, rounds=rounds, device=device, progress=tick)
            read = weights + token * length
            bound = read / read_bandwidth(device, read // 4)
            for row in rows:
                row.median, row.low, row.high = (t / STEPS for t in (row.median, row.low, row.high))
                row.bound = bound
                row.note = notes.get(row.peer, "")
            result.rows += rows
            result.remarks.append(remark(length, rows))
    return result


def _ready(name: str, logits: Tensor) -> Peer:
    return Peer(name, lambda: None, lambda: logits)


def remark(length: int, rows: list[Row]) -> str:
    """Exact against the stronger of eager and Inductor, in words."""
    seconds = {row.peer: row.median for row in rows}
    peer = min(("HF eager", "inductor"), key=seconds.__getitem__)
    return f"{length} positions: exact {seconds[peer] / seconds[EXACT]:.2f}x {peer}"


def prefilled(model: nn.Module, ids: Tensor, length: int) -> Any:
    """A static cache of `length` positions, filled by eager PyTorch with ids [1, S]."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)  # type: ignore[arg-type]
    with torch.compiler.set_stance("force_eager"):
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


class Continued:
    """Decoding with `form` on a copy of a filled cache, always from a place that is set before."""

    def __init__(self, form: Callable[..., Any], filled: Any, length: int) -> None:
        from transformers import StaticCache

        self.form, self.length = form, length
        config: Any = form.config  # type: ignore[attr-defined]
        self.cache: Any = StaticCache(config=config, max_cache_len=length)
        like = filled.layers[0].keys
        self.cache.early_initialization(1, like.shape[1], like.shape[3], like.dtype, like.device)
        layers: Any = zip(self.cache.layers, filled.layers, strict=True)
        for own, other in layers:
            own.keys.copy_(other.keys)
            own.values.copy_(other.values)
        self.positions = torch.arange(length, device=like.device)

    def _step(self, token: Tensor, place: int) -> Tensor:
        position = self.positions[place].view(1, 1).clone()
        mask = (self.positions <= position)[None, None]
        logits: Tensor = self.form(
            input_ids=token, position_ids=position, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        return logits

    def _rewind(self, place: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(place)

    def forced(self, ids: Tensor, keep: bool = True) -> Tensor:
        """Logits [S, V] after each of ids [1, S], which become the last S of the context; empty without `keep`."""
        first = self.length - ids.shape[1]
        self._rewind(first)
        logits = [self._step(ids[:, i : i + 1], first + i) for i in range(ids.shape[1])]
        return torch.cat([x.clone() for x in logits]) if keep else ids.new_empty(0)

    def greedy(self, token: Tensor, count: int) -> Tensor:
        """`count` tokens [1, count] of the model's own choice at the end of the context, after `token` [1, 1]."""
        first = self.length - count
        self._rewind(first)
        written = []
        for i in range(count):
            token = self._step(token, first + i).argmax(-1, keepdim=True)
            written.append(token)
        return torch.cat(written, 1)


def divergence(logits: Tensor, expected: Tensor) -> float:
    """Nats a token, from the distribution of expected [S, V] to that of logits [S, V]."""
    log, base = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    return max(0.0, nn.functional.kl_div(log, base, reduction="batchmean", log_target=True).item())


def lines(result: dict[str, Any]) -> str:
    """A kept result as text: one line a peer, tokens per second at each length."""
    rows = result["rows"]
    lengths = list(dict.fromkeys(_positions(r) for r in rows))
    peers = list(dict.fromkeys(r["peer"] for r in rows))
    width = max(map(len, peers))
    text = [f"{'tokens per second, context':<{width}}" + "".join(f"{n:>9,}" for n in lengths)]
    width = len(text[0]) - 9 * len(lengths)
    for peer in peers:
        own = [r for r in rows if r["peer"] == peer]
        notes = ", ".join(dict.fromkeys(r["note"] for r in own if r["note"]))
        text.append(f"{peer:<{width}}" + "".join(f"{1 / r['median']:>9,.0f}" for r in own) + f"  {notes}".rstrip())
    bounds = [next(r["bound"] for r in rows if _positions(r) == n) for n in lengths]
    text.append(f"{'(read bandwidth)':<{width}}" + "".join(f"{1 / b:>9,.0f}" for b in bounds))
    machine = result["environment"]
    return "\n".join([*text, f"measured {machine['date']} on {machine['device']}, {machine['threads']} thread(s)"])


def picture(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Tokens per second against the length of the context, from a result as kept."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fxopt[inspect]'") from error
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = result["rows"]
    for peer in dict.fromkeys(r["peer"] for r in rows):
        own = [r for r in rows if r["peer"] == peer]
        notes = [r["note"] for r in own if r["note"]]
        said = ""
        if notes and notes[0].startswith("KL"):
            values = [float(note.split()[1]) for note in notes]
            said = f" (~ KL {min(values):.3f} to {max(values):.3f})"
        elif notes:
            said = f" (= {notes[0]})"
        spread = [[1 / r["median"] - 1 / r["high"] for r in own], [1 / r["low"] - 1 / r["median"] for r in own]]
        axes.errorbar(
            [_positions(r) for r in own], [1 / r["median"] for r in own], spread, capsize=2,
            marker="s" if said.startswith(" (~") else "o", label=peer + said,
        )  # fmt: skip
    first = [r for r in rows if r["peer"] == rows[0]["peer"]]
    lengths = [_positions(r) for r in first]
    axes.plot(lengths, [1 / r["bound"] for r in first], "k--", linewidth=1, label="read bandwidth")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.set_yscale("log")
    axes.set_xlabel("context, tokens (cache full)")
    axes.set_ylabel("decode, tokens per second")
    machine = result["environment"]
    axes.set_title(f"{machine['device']}, {machine['threads']} thread(s), {machine['date']}", fontsize=9)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(pathlib.Path(path))


def _positions(row: dict[str, Any]) -> int:
    return int(row["case"].split()[0])
