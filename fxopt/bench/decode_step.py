"""``fxopt bench decode_step``: a whole decode step of a Llama on a static cache, against how full the cache is.

The shape is Llama-3.2-1B's (16 layers of width 2048, 32 query heads on 8 KV heads of 64 channels, MLP 8192, 128256
tokens) with weights of its size that mean nothing. All peers run one model, each on a cache of its own. Stock Inductor
repeats the KV heads in memory; it is shown and is no measure of anything else.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.bench.attention import read_bandwidth
from fxopt.bench.harness import Peer, Result, check_equal, environment, measure, progress_bar
from fxopt.bench.models import weights_of_no_meaning
from fxopt.compiler import compile as fxopt_compile

FULL: dict[str, Any] = {
    "layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "intermediate_size": 8192,
    "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
QUICK: dict[str, Any] = {
    **FULL, "layers": 2, "width": 512, "heads": 8, "kv_heads": 2, "intermediate_size": 1024, "vocab_size": 4096,
}  # fmt: skip
STOCK = "inductor"


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """One decode step at several filled lengths; the first peer is the one the ratios refer to."""
    length, rounds = (512, 5) if quick else (4096, 12)
    command = f"fxopt bench decode_step{' --quick' if quick else ''} --device {device}"
    result = Result("decode_step", command, environment(device))
    model = weights_of_no_meaning(device=device, **(QUICK if quick else FULL))
    # The output head is the embedding: its rows are read once, as the head.
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    steps = {
        "fxopt": Step(fxopt_compile(model), model, length, device),
        "HF eager": Step(model.forward, model, length, device),
        STOCK: Step(torch.compile(model.forward, backend=_inductor()), model, length, device),
        "inductor, forced gqa": Step(
            torch.compile(model.forward, backend=_inductor()), model, length, device, force_gqa=True
        ),
    }
    config: Any = model.config
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    filled_lengths = (length // 8, length // 4, length // 2, length)
    bandwidth, said = 0.0, []
    with progress_bar("decode_step", rounds * len(filled_lengths)) as tick, torch.no_grad():
        for filled in filled_lengths:
            bandwidth = max(bandwidth, read_bandwidth(device, 1 << (22 if quick else 28)))
            peers = [_peer(name, step, filled) for name, step in steps.items()]
            check_equal(peers, tolerance=1e-3)
            rows = measure(f"filled {filled} of {length}", peers, rounds=rounds, device=device, progress=tick)
            result.rows += rows
            others = {r.peer: r.ratio for r in rows[1:] if r.ratio is not None and r.peer != STOCK}
            best = min(others, key=others.__getitem__)
            said.append((rows, f"filled {filled}: {others[best]:.2f}x the best peer ({best})"))
    result.remarks.append(f"read bandwidth of this machine: {bandwidth / 1e9:.1f} GB/s")
    for (rows, remark), filled in zip(said, filled_lengths, strict=True):
        for row in rows:
            row.bound = (weights + cached * filled) / bandwidth
            row.note = f"{row.bound / row.median:.0%} of the read bandwidth"
        result.remarks.append(f"{remark}, {rows[0].note}")
    return result


class Step:
    """One decode step of `model` on a static cache of its own, as `call` runs it."""

    def __init__(
        self, call: Callable[..., Any], model: nn.Module, length: int, device: str, *, force_gqa: bool = False,
        batch: int = 1, dtype: torch.dtype = torch.float32, cache: Any = None,
    ) -> None:  # fmt: skip
        """`cache`: of another step, to share it; what lies beyond the position that a step writes stays the same."""

        self.call = call
        self.force_gqa = force_gqa
        config: Any = model.config
        self.cache: Any = cache if cache is not None else filled_cache(config, length, batch, dtype, device)
        self.token = torch.full((batch, 1), 17, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.mask = torch.zeros(batch, 1, 1, length, dtype=torch.bool, device=device)

    def __call__(self, filled: int) -> Tensor:
        """Logits [B, 1, V] of the token that fills position `filled` - 1."""
        self.position.fill_(filled - 1)
        self.mask.copy_((torch.arange(self.mask.shape[-1], device=self.mask.device) < filled)[None, None, None])
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(filled - 1)
        with _forced_gqa() if self.force_gqa else contextlib.nullcontext():
            return self.call(
                input_ids=self.token, position_ids=self.position, attention_mask=self.mask,
                past_key_values=self.cache, use_cache=True,
            ).logits  # fmt: skip


def filled_cache(config: Any, length: int, batch: int, dtype: torch.dtype, device: str) -> Any:
    """A static cache full of random keys and values, the same for the same sizes."""
    from transformers import StaticCache

    cache: Any = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, dtype, torch.device(device))
    generator = torch.Generator(device).manual_seed(1)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor.normal_(generator=generator)
    return cache


def picture(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Step time against filled length, from a kept result; the suffix of `path` says the format (.svg, .png)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fxopt[inspect]'") from error
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    rows = result["rows"]
    for peer in dict.fromkeys(r["peer"] for r in rows):
        own = [r for r in rows if r["peer"] == peer]
        axes.plot([_filled(r) for r in own], [r["median"] * 1e3 for r in own], marker="o", label=peer)
    first = [r for r in rows if r["peer"] == rows[0]["peer"]]
    bounds = [r["bound"] * 1e3 for r in first]
    axes.plot([_filled(r) for r in first], bounds, "k--", linewidth=1, label="read bandwidth")
    axes.set_xlabel("filled positions of the cache")
    axes.set_ylabel("one decode step, ms")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(pathlib.Path(path))


def _filled(row: dict[str, Any]) -> int:
    return int(row["case"].split()[1])


def _peer(name: str, step: Step, filled: int) -> Peer:
    return Peer(name, lambda: step(filled), lambda: step(filled).clone())


def _inductor() -> Callable[..., Any]:
    # A function of its own each time: Dynamo shares code between two compilations with the same backend.
    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs)  # type: ignore[return-value]

    return backend


@contextlib.contextmanager
def _forced_gqa() -> Iterator[None]:
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
