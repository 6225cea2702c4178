"""``fxopt bench decode --device cuda``: tokens per second of a Llama-3-8B-shaped model, over batch and context.

bfloat16, a static cache that is full, CUDA graphs. Every peer runs one model with weights that mean nothing, on one
cache. Before anything is timed, the tokens of every peer are compared with a float32 copy of the model: each must be
the reference's token, or one whose logit lies within the rounding of bfloat16 below it. The limit is the time to read
the weights and the filled cache once, at the bandwidth that a sum reaches on this machine.

Each case is written down when it is done, so that a call after an interruption goes on.

``--quick`` tries all of it on a small model; on a CPU (without CUDA graphs) it also lists the kernels of a decoder
layer for a GPU that is not here, see :mod:`fxopt.bench.pretend`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from fxopt import gemm_tuning
from fxopt.bench import pretend
from fxopt.bench.attention import read_bandwidth
from fxopt.bench.decode_step import Step, filled_cache
from fxopt.bench.harness import Peer, Result, Row, environment, measure, progress_bar
from fxopt.bench.models import weights_of_no_meaning
from fxopt.bench.unfinished import Unfinished
from fxopt.codegen.dataflow import Dataflow
from fxopt.codegen.kernels.gemm_launch import build, workspace
from fxopt.compiler import compile as fxopt_compile

FULL: dict[str, Any] = {
    "layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate_size": 14336,
    "vocab_size": 128256, "max_position_embeddings": 65536,
}  # fmt: skip
QUICK: dict[str, Any] = {
    **FULL, "layers": 2, "width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate_size": 512,
    "vocab_size": 1024,
}  # fmt: skip
CONTEXTS, BATCHES = (1024, 8192, 32768), (1, 8, 32)
CHECKED_TOKENS = 8
FIRST = "fxopt"


def run(*, device: str = "cpu", quick: bool = False, count: bool = True) -> Result:
    """Every batch and context that fits into memory; the first peer is the one the ratios refer to.

    `count` False leaves out the kernels of a GPU that is not here, which take a minute or two to compile.

    Raises:
        ValueError: for the full model on a CPU, or ``--device cuda`` where there is no GPU.
        AssertionError: when a peer's tokens are not the reference's.
    """
    command = f"fxopt bench decode{' --quick' if quick else ''} --device {device}"
    if device == "cpu" and not quick:
        raise ValueError("fxopt bench decode is for a GPU (--device cuda); --quick tries it on a CPU.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("fxopt bench decode --device cuda needs a GPU; --quick --device cpu tries the suite.")
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    result = Result("decode", command, environment(device))
    bandwidth = read_bandwidth(device, 1 << (29 if on_gpu else 22))
    result.remarks.append(f"read bandwidth of this machine, by a sum: {bandwidth / 1e9:.1f} GB/s")
    contexts, batches = ((64, 128), (1, 2)) if quick else (CONTEXTS, BATCHES)
    sizes = [(batch, context) for batch in batches for context in contexts]
    shape = QUICK if quick else FULL
    kept = Unfinished("decode", {**result.environment, "shape": shape, "sizes": sizes, "dtype": str(dtype)})
    model = weights_of_no_meaning(device=device, dtype=dtype, **shape)
    calls = peers_of(model, quick, on_gpu)
    rounds = 3 if quick else 20
    with progress_bar("decode", rounds * len(sizes)) as tick, torch.no_grad():
        if "tokens" not in kept:
            kept.keep("tokens", check_tokens(model, calls, contexts[0], device, dtype))
        result.remarks += kept.cases["tokens"]
        for batch, context in sizes:
            name = f"batch {batch}, context {context}"
            needed = cache_bytes(model, batch, context, dtype)
            if name not in kept and needed > free_bytes(on_gpu):
                result.remarks.append(f"{name}: left out, its cache is {needed / 1e9:.0f} GB")
                continue
            if name not in kept:
                bound = (weight_bytes(model) + needed) / bandwidth
                first = (context == contexts[0], (batch, context) == sizes[0])
                with one_case():
                    rows, said = measured(model, calls, batch, context, first, device, dtype, rounds, tick)
                for row in rows:
                    row.bound = bound
                    row.note = f"{batch / row.median:.1f} tokens/s, {bound / row.median:.0%} of the limit"
                kept.keep(name, {"rows": [asdict(row) for row in rows], "remarks": said})
            rows = [Row(**row) for row in kept.cases[name]["rows"]]
            result.rows += rows
            others = {row.peer: row.ratio for row in rows[1:] if row.ratio is not None}
            best = min(others, key=others.__getitem__)
            result.remarks += kept.cases[name]["remarks"]
            result.remarks.append(f"{name}: {others[best]:.2f}x the best peer ({best}), {rows[0].note}")
    kept.done()
    if not on_gpu and count:
        result.remarks += not_here()
    return result


def measured(
    model: nn.Module, calls: dict[str, tuple[Callable[..., Any], bool]], batch: int, context: int,
    first: tuple[bool, bool], device: str, dtype: torch.dtype, rounds: int, tick: Callable[[], None],
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Every peer on one cache; what is said beside the times: on a GPU memory, where `first` has the context's first
    case, and kernels, where it has the first of all."""
    cache = filled_cache(model.config, context, batch, dtype, device)
    steps = {
        name: Step(call, model, context, device, force_gqa=gqa, batch=batch, dtype=dtype, cache=cache)
        for name, (call, gqa) in calls.items()
    }
    peers = [Peer(name, functools.partial(step, context)) for name, step in steps.items()]
    said: list[str] = []
    # Memory first: compiling and capturing belong to it.
    if device == "cuda" and first[0]:
        said.append(peak_memory(model, steps, context, batch))
    if device == "cuda" and first[1]:
        config: Any = model.config
        said += counted(steps, context, config.num_hidden_layers)
    return measure(f"batch {batch}, context {context}", peers, rounds=rounds, device=device, progress=tick), said


def peers_of(model: nn.Module, quick: bool, on_gpu: bool) -> dict[str, tuple[Callable[..., Any], bool]]:
    """How each peer calls the model, and whether Hugging Face is told not to repeat KV heads."""
    graphs = "reduce-overhead" if on_gpu else None

    def inductor(mode: str | None) -> Callable[..., Any]:
        # A function of its own for each: Dynamo keeps what it compiled by code object.
        return torch.compile(_own(model.forward), mode=mode)

    found: dict[str, tuple[Callable[..., Any], bool]] = {
        FIRST: (fxopt_compile(model, mode=graphs), False),
        "eager": (model.forward, False),
        f"inductor {graphs or 'default'}": (inductor(graphs), False),
        "inductor, forced gqa": (inductor(graphs), True),
    }
    if not quick:
        found["inductor max-autotune"] = (inductor("max-autotune"), False)
    return found


def _own(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_firstlineno=call.__code__.co_firstlineno)
    return call


@contextlib.contextmanager
def one_case() -> Any:
    """Drops compiled code and caches at the end, so that the memory of one case is not that of the next."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- tokens ---------------------------------------------------------------------------------------------------------


def check_tokens(
    model: nn.Module, calls: dict[str, tuple[Callable[..., Any], bool]], context: int, device: str, dtype: torch.dtype
) -> list[str]:
    """Compare greedy tokens with a float32 reference, which all peers follow; raises AssertionError on a difference."""
    positions = range(context - CHECKED_TOKENS, context)
    with one_case():
        wide = weights_of_no_meaning(device=device, **_shape_of(model)) if dtype != torch.float32 else model
        wide.load_state_dict(model.state_dict())
        exact = Step(wide.forward, wide, context, device)
        exact.cache = _widened(filled_cache(model.config, context, 1, dtype, device), wide, context, device)
        expected = list(_followed(exact, positions))
        del wide, exact
    said = []
    slack = 0.0
    for name, (call, gqa) in {"eager": calls["eager"], **calls}.items():
        with one_case():
            step = Step(call, model, context, device, force_gqa=gqa, dtype=dtype)
            logits = list(_followed(step, positions, expected))
        if name == "eager":  # what rounding to dtype does to a logit, at most
            slack = max(float((own - right).abs().max()) for own, right in zip(logits, expected, strict=True))
        equal, tied = compared(logits, expected, 2 * slack)
        if equal + tied < len(expected):
            raise AssertionError(f"{name}: only {equal + tied} of {len(expected)} tokens are those of the reference")
        said.append(f"{name} {equal} equal{f', {tied} within rounding of a tie' if tied else ''}")
    return [f"tokens against float32, {len(expected)} each: " + "; ".join(dict.fromkeys(said))]


def compared(
    logits: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], slack: float
) -> tuple[int, int]:
    """How many tokens are the reference's, and how many others it gives a logit within `slack` of its best."""
    equal = tied = 0
    for own, right in zip(logits, expected, strict=True):
        token, best = int(own.argmax()), int(right.argmax())
        equal += token == best
        tied += token != best and float(right[best] - right[token]) <= slack
    return equal, tied


def _followed(step: Step, positions: Iterable[int], reference: list[torch.Tensor] | None = None) -> Any:
    """Logits [V] float32 at each position; the next token is the reference's (own, where it is the reference)."""
    for number, position in enumerate(positions):
        found = step(position + 1)[0, -1].float().clone()
        yield found
        step.token.fill_(int((found if reference is None else reference[number]).argmax()))


def _widened(cache: Any, model: nn.Module, context: int, device: str) -> Any:
    wide = filled_cache(model.config, context, 1, torch.float32, device)
    for own, other in zip(wide.layers, cache.layers, strict=True):
        own.keys.copy_(other.keys)
        own.values.copy_(other.values)
    return wide


def _shape_of(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    return {
        "layers": config.num_hidden_layers, "width": config.hidden_size, "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size, "max_position_embeddings": config.max_position_embeddings,
    }  # fmt: skip


# -- bytes and kernels ----------------------------------------------------------------------------------------------


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads: all but the embedding, unless the head is the embedding."""
    kept: Any = model
    table = kept.get_input_embeddings().weight
    tied = kept.get_output_embeddings().weight is table
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return total - (0 if tied else table.numel() * table.element_size())


def cache_bytes(model: nn.Module, batch: int, context: int, dtype: torch.dtype) -> int:
    """Bytes of a full cache."""
    config: Any = model.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return row * batch * context * dtype.itemsize


def free_bytes(on_gpu: bool) -> float:
    """Memory left on the GPU, less a tenth for what peers need beside; a CPU's is not asked."""
    return 0.9 * torch.cuda.mem_get_info()[0] if on_gpu else float("inf")


def counted(steps: dict[str, Step], context: int, layers: int) -> list[str]:
    """Kernels that one step launches, by the profiler, and how many that is a layer."""
    said, counts = [], {}
    for name, step in steps.items():
        for _ in range(3):  # compile, warm up, capture
            step(context)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(context)
            torch.cuda.synchronize()
        counts[name] = kernels_in(profile.events())
        said.append(f"{name} {counts[name]} ({counts[name] / layers:.1f} a layer)")
    stock = min(count for name, count in counts.items() if name.startswith("inductor"))
    share = f"fxopt has {counts[FIRST] / stock:.0%} of Inductor's (goals: at most 10 a layer, at most 60%)"
    return [f"kernels of a step: {'; '.join(said)}; {share}"]


def kernels_in(events: Iterable[Any]) -> int:
    """Kernels among profiler events; copies and fills that a graph holds as such are not kernels."""
    names = [event.name for event in events if event.device_type == DeviceType.CUDA]
    return sum(not re.match(r"(Memcpy|Memset|Activity Buffer|Context Sync)", name) for name in names)


def peak_memory(model: nn.Module, steps: dict[str, Step], context: int, batch: int) -> str:
    """Bytes beyond what lies there before, over compiling, capturing and running; with what split-K may add."""
    peaks = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            step(context)
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    stock = min(peak for name, peak in peaks.items() if name.startswith("inductor"))
    each = "; ".join(f"{name} {peak / 1e6:.1f} MB" for name, peak in peaks.items())
    return (
        f"batch {batch}: peak memory of a step {each}; fxopt {(peaks[FIRST] - stock) / 1e6:+.1f} MB against Inductor, "
        f"split-K workspace {workspace_bytes(model, batch) / 1e6:.1f} MB"
    )


def workspace_bytes(model: nn.Module, batch: int, flow: Dataflow | None = None) -> int:
    """The largest partial sums that one kernel of a step needs."""
    place = next(model.parameters())
    found = [0]
    for fused in gemm_tuning.groups_of(model):
        chosen = (flow or Dataflow(fused.dtype, place.device)).config(fused, batch)
        if chosen is not None:
            shapes = workspace(build(fused, chosen), batch).values()
            found.append(sum(4 * functools.reduce(lambda a, b: a * b, shape, 1) for shape in shapes))
    return max(found)


def not_here(target: str = "H200") -> list[str]:
    """Kernels that a decoder layer would launch on a GPU that is not here, by Inductor's code for it."""
    own, stock = (pretend.per_layer(backend, target=target) for backend in (FIRST, "inductor"))
    return [
        f"launches of one Llama-3-8B layer in the code for {target}, compiled and not run: fxopt {len(own)} "
        f"({', '.join(_short(own))}), Inductor {len(stock)} ({', '.join(_short(stock))})"
    ]


def _short(names: list[str]) -> list[str]:
    return [re.sub(r"^triton_(poi|red|per)_fused.*", r"\1", name) for name in names]


def picture(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Tokens per second against context at batch 1, from a kept result; the suffix of `path` says the format."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fxopt[inspect]'") from error
    rows = [row for row in result["rows"] if row["case"].startswith("batch 1,")]
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    for peer in dict.fromkeys(row["peer"] for row in rows):
        own = [row for row in rows if row["peer"] == peer]
        axes.plot([_context(r) for r in own], [1 / r["median"] for r in own], marker="o", label=peer)
    first = [row for row in rows if row["peer"] == rows[0]["peer"]]
    axes.plot([_context(r) for r in first], [1 / r["bound"] for r in first], "k--", linewidth=1, label="read bandwidth")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("filled positions of the cache")
    axes.set_ylabel("tokens per second, batch 1")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(pathlib.Path(path))


def _context(row: dict[str, Any]) -> int:
    return int(row["case"].rpartition(" ")[2])
