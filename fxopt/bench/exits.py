"""``fxopt bench depth --technique early_exit``: what an exit costs when it is not taken, and saves when it is.

Parts ``model`` and ``vocabulary``: a decode step of the shipped model, and of a Llama of width 768 with a vocabulary of
128,256; both of 12 layers. The first peer of each case is the model compiled without the technique. ``never`` exits
have a threshold below 1 that nothing reaches; their bound is that model plus the check, as ``fxopt.plan`` prints its
cost. The bound of an exit that is always taken is the model whose layers were deleted, plus the cache rows that the
policy still writes.

Part ``tuned``: the shipped model's steps through real text with the thresholds that ``fxopt bench exit_quality --keep``
left. What the layers that ran, the rows that were propagated and the checks cost by other measurements of the same run,
over the time taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt import tinylm
from fxopt.bench import exit_quality
from fxopt.bench.harness import Peer, Result, Row, check_equal, environment, measure, progress_bar
from fxopt.bench.kept import newest
from fxopt.bench.models import llama
from fxopt.compiler import compile as fxopt_compile
from fxopt.meaning import reference, shared_copy
from fxopt.passes import confidence as measures
from fxopt.passes.counters import DepthCounter, counters, depths
from fxopt.passes.early_exit import EarlyExit
from fxopt.reporting import owner_of, report

NEVER = math.nextafter(1.0, 0.0)
"""The largest threshold that is not folded away."""
GOALS = {"never, state": 1.03, "never, max": 1.03, "always, propagate": 1.05, "always, none": 1.05}
EFFICIENCY = 0.9
"""Asked of tuned exits: predicted over measured time, at least."""
STEPS = 24
PARTS = {"model": "tinylm", "vocabulary": "vocabulary", "tuned": "tinylm"}
"""Each is kept as a suite of its own; the model that it measures."""


class Propagation(nn.Module):
    """The rows that ``kv="propagate"`` writes for layers from `start` on: norm, projections, rotary, cache write."""

    def __init__(self, model: Any, start: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.model.layers[start:])
        self.rotary = model.model.rotary_emb
        self.start = start

    def forward(self, hidden: Tensor, position: Tensor, cache: Any) -> Tensor:
        """hidden: [B, 1, W], position: [B, 1]"""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin = self.rotary(hidden, position)
        for number, layer in enumerate(self.layers, start=self.start):
            normed = layer.input_layernorm(hidden)  # type: ignore[operator]
            shape = (*hidden.shape[:2], -1, layer.self_attn.head_dim)  # type: ignore[union-attr]
            key = layer.self_attn.k_proj(normed).view(shape).transpose(1, 2)  # type: ignore[union-attr, operator]
            value = layer.self_attn.v_proj(normed).view(shape).transpose(1, 2)  # type: ignore[union-attr, operator]
            _, key = apply_rotary_pos_emb(key, key, cos, sin)
            cache.layers[number].keys.index_copy_(2, position[0], key)
            cache.layers[number].values.index_copy_(2, position[0], value)
            cache.layers[number].cumulative_length.add_(1)
        return hidden


class Segment(nn.Module):
    """Layers `start` to `stop` as a graph of their own: what an exit is when Python, not ``torch.cond``, decides."""

    def __init__(self, model: Any, start: int, stop: int) -> None:
        super().__init__()
        self.embed = model.model.embed_tokens if start == 0 else None
        self.head = nn.Sequential(model.model.norm, model.lm_head) if stop == len(model.model.layers) else None
        self.layers = nn.ModuleList(model.model.layers[start:stop])
        self.rotary = model.model.rotary_emb

    def forward(self, hidden: Tensor, position: Tensor, mask: Tensor, cache: Any) -> Any:
        """hidden: token ids [B, 1] or states [B, 1, W], position: [B, 1], mask: bool [B, 1, 1, S]"""
        if self.embed is not None:
            hidden = self.embed(hidden)
        tables = self.rotary(hidden, position)
        before = hidden
        for layer in self.layers:
            before = hidden
            hidden = layer(hidden, attention_mask=mask, past_key_values=cache, position_embeddings=tables)
        if self.head is not None:
            return self.head(hidden)
        return hidden, measures.saturation(hidden[:, -1], before[:, -1])


class HeadCheck(nn.Module):
    """What one exit reads when it is not taken: the final norm, the head, and a confidence ``[B, V]`` to ``[B]``."""

    def __init__(self, model: Any, confidence: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.head, self.confidence = model.model.norm, model.lm_head, confidence

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, 1, W] to [B]"""
        return self.confidence(self.head(self.norm(hidden))[:, -1])


def run(
    *, device: str = "cpu", quick: bool = False, part: str | None = None, batches: Sequence[int] = (1, 8),
    rounds: int = 120,
) -> Result:  # fmt: skip
    """Batch 1 and 8; a part alone is kept as a suite of its own. Raises ValueError for a part that there is not.

    ``quick`` measures a small model in the place of the one of each part.
    """
    if part is not None and part not in PARTS:
        raise ValueError(f"early_exit has no part {part!r}; parts: {', '.join(PARTS)}.")
    if quick:
        batches, rounds = (1,), 5
    options = f"{f' --part {part}' if part else ''}{' --quick' if quick else ''} --device {device}"
    result = Result(
        f"exits_{part}" if part else "exits", f"fxopt bench depth --technique early_exit{options}", environment(device)
    )
    parts = {part: PARTS[part]} if part else {"model": PARTS["model"]} if quick else PARTS
    steps = len(parts) * len(batches)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=128), progress_bar("exits", steps) as step:
        for own, name in parts.items():
            model = _build("small" if quick and own != "tuned" else name).to(device)
            for batch in batches:
                # A step of the larger model takes twenty times as long, and scatters less.
                turns = rounds if own == "model" else max(5, rounds // 5)
                if own == "tuned":
                    rows = _tuned(model, batch, device, max(5, rounds // 6), result)
                else:
                    rows = _case("small" if quick else name, model, batch, device, turns, result)
                result.rows += rows
                step()
    return result


def _build(name: str) -> Any:
    if name == "tinylm":
        return tinylm.load()[0]
    return llama(4, 64, heads=4, kv_heads=2, vocab_size=512) if name == "small" else llama(12, 768, vocab_size=128256)


def _case(name: str, model: Any, batch: int, device: str, rounds: int, result: Result) -> list[Row]:
    layers = model.config.num_hidden_layers
    middle = layers // 2
    never = {kind: EarlyExit(layers=(middle,), confidence=kind, threshold=NEVER) for kind in ("state", "max")}
    always = {kv: EarlyExit(layers=(middle,), confidence="max", threshold=0.0, kv=kv) for kv in ("propagate", "none")}
    built: dict[str, Any] = {
        "plain": fxopt_compile(shared_copy(model)),
        **{f"never, {kind}": fxopt_compile(shared_copy(model), never[kind], strict=True) for kind in never},
        "truncated": fxopt_compile(reference(model, always["none"])),
        **{f"always, {kv}": fxopt_compile(shared_copy(model), always[kv], strict=True) for kv in always},
    }
    ids = _prompt(model, batch, device)
    peers = [_decode(peer, built[peer], ids) for peer in built]
    same = peers[:3]
    if name != "vocabulary":
        segments = _segments(model, middle, ids)
        check_equal([*same, segments], tolerance=1e-4)
        same.append(segments)
    check_equal(same, tolerance=1e-4)
    check_equal(peers[3:], tolerance=1e-4)
    peers = [*same, *peers[3:]]
    for part, call in _parts(model, middle, ids).items():
        peers.append(Peer(part, call))
    rows = measure(f"{name}, batch {batch}", peers, rounds=rounds, device=device)
    for peer, depth in {"never, state": layers, "never, max": layers, "always, propagate": middle}.items():
        ran = {n for n, count in depths(counters(DepthCounter, owner_of(built[peer]))).items() if count}
        assert ran == {depth}, f"{peer} ran {ran} layers of {layers}"
    remaining = (layers - middle) / _layers_of_check(built["never, max"])
    _judge(name, batch, rows, remaining, result.remarks)
    return rows


def _components(model: Any, ids: Tensor) -> list[Peer]:
    """What a tuned exit's time is made of, over the same tokens: the plain and the truncated model, and the truncated
    model with each step followed by the propagation or by one check, which by themselves would find their weights in
    the processor's caches."""
    middle = model.config.num_hidden_layers // 2
    whole = fxopt_compile(shared_copy(model))
    half = fxopt_compile(reference(model, EarlyExit((middle,), "max", 0.0, kv="none")))
    parts = _parts(model, middle, ids[:, : exit_quality.PROMPT], measures.margin)
    return [
        Peer("plain", _text(whole, ids)), Peer("truncated", _text(half, ids)),
        *(Peer(name, _text(half, ids, call)) for name, call in parts.items()),
    ]  # fmt: skip


def _prompt(model: Any, batch: int, device: str) -> Tensor:
    """``[B, 64]`` token ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (batch, 64), generator=generator).to(device)


def _layers_of_check(model: Any) -> float:
    """The cost of a check in layers, as the report of a compilation, and ``fxopt.plan``, print it."""
    told = [r.message for r in report(model).remarks if r.technique == "early_exit" and r.status == "applied"]
    found = re.search(r"\(([\d.]+) layers\), taking it", told[0])
    assert found is not None, told[0]
    return float(found[1])


def _judge(name: str, batch: int, rows: list[Row], remaining: float, remarks: list[str]) -> None:
    """Set each goal's bound, and say what became of it, by medians. `remaining`: layers after the exit over those that
    a check costs."""
    seconds = {row.peer: row.median for row in rows}
    bounds = {
        "never, state": seconds["plain"],
        "never, max": seconds["plain"] + (seconds["plain"] - seconds["truncated"]) / remaining,
        "always, propagate": seconds["truncated"] + seconds["propagation"],
        "always, none": seconds["truncated"],
    }
    for row in rows:
        if row.peer in bounds:
            row.bound = bounds[row.peer]
            remarks.append(
                f"{name}, batch {batch}: {row.peer} {row.median / row.bound:.3f} of its bound; "
                f"goal at most {GOALS[row.peer]}"
            )


def _tuned(model: Any, batch: int, device: str, rounds: int, result: Result) -> list[Row]:
    """Steps through the held-out text with the thresholds that were kept, against what their parts cost.

    The parts are measured again beside each, because a processor is not as fast a minute later, and on as many tokens
    in a row, because the second step finds its weights in the processor's caches.
    """
    try:
        kept = newest("exit_quality")
    except FileNotFoundError as error:
        result.remarks.append(f"no tuned thresholds: {error}")
        return []
    if exit_quality.weights(model) not in kept["remarks"][0]:
        result.remarks.append("the kept thresholds are of other weights: run fxopt bench exit_quality --keep first")
        return []
    cut = exit_quality.windows(tinylm.load()[1], False)[exit_quality.ROWS :][:batch]
    ids = torch.stack([window.inputs for window in cut]).to(device)
    parts = _components(model, ids)
    found: list[Row] = []
    for line in kept["figures"]:
        if not line["goal"]:
            continue
        technique = EarlyExit(
            layers=exit_quality.EXITS, confidence=line["confidence"], threshold=line["threshold"], rows="all"
        )
        compiled = fxopt_compile(shared_copy(model), technique, strict=True)
        call = _text(compiled, ids)
        call()
        for counter in counters(DepthCounter, owner_of(compiled)):
            counter.reset()
        call()
        histogram = depths(counters(DepthCounter, owner_of(compiled)))
        peer = Peer(f"tuned {line['confidence']} {line['goal']}", call)
        row, *rows = measure(f"{STEPS} tokens, batch {batch}", [peer, *parts], rounds=rounds, device=device)
        row.ratio = row.ratio_low = row.ratio_high = None
        row.bound = _predicted(histogram, line["confidence"], model.config.num_hidden_layers, rows)
        depth = sum(n * count for n, count in histogram.items()) / sum(histogram.values())
        result.figures.append({
            "tuned": f"{line['confidence']}, {line['goal']}", "batch": batch, "mean depth of these steps": depth,
            "predicted over measured": row.bound / row.median, "asked": EFFICIENCY,
        })  # fmt: skip
        found.append(row)
    return found


def _predicted(histogram: dict[int, int], confidence: str, layers: int, rows: list[Row]) -> float:
    """Seconds of all steps: the model without layers, the layers that ran, rows propagated for others, and checks."""
    seconds = {row.peer: row.median for row in rows}
    middle = layers // 2
    layer = (seconds["plain"] - seconds["truncated"]) / (layers - middle)
    rest = seconds["truncated"] - middle * layer
    passed = (seconds["propagation"] - seconds["truncated"]) / (layers - middle)
    check = seconds["one check"] - seconds["truncated"] if confidence != "state" else 0.0
    total = 0.0
    for depth, count in histogram.items():
        reached = sum(n <= depth for n in exit_quality.EXITS)
        # The head that an exit was scored with gives its result; the model's own does not run again.
        reused = check if depth < layers else 0.0
        total += count * (rest + depth * layer + (layers - depth) * passed + reached * check - reused)
    return total / sum(histogram.values())


def _text(model: Any, ids: Tensor, also: Callable[[], Any] = lambda: None) -> Callable[[], Tensor]:
    """The next tokens of a text, one by one, on a static cache that holds what comes before; rewound after it. Each
    step is followed by `also`."""
    from transformers import StaticCache

    prompt = exit_quality.PROMPT
    cache = StaticCache(config=model.config, max_cache_len=prompt + STEPS)
    with torch.compiler.set_stance("force_eager"):
        model(input_ids=ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    tokens = [ids[:, place : place + 1].clone() for place in range(prompt, prompt + STEPS)]

    def call() -> Tensor:
        for token in tokens:
            logits = model(input_ids=token, past_key_values=cache).logits
            also()
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)  # type: ignore[union-attr]
        return logits

    return call


def _decode(name: str, model: Any, ids: Tensor) -> Peer:
    """One token on a static cache of which the prompt fills a part, rewound after each step."""
    from transformers import StaticCache

    prompt = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=prompt * 2)
    with torch.compiler.set_stance("force_eager"):
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, -1:]
    return _rewound(name, lambda: model(input_ids=token, past_key_values=cache).logits, cache, prompt)


def _rewound(name: str, step: Callable[[], Tensor], cache: Any, filled: int) -> Peer:
    """A peer whose cache holds `filled` positions before each step; to count them back is no part of the step."""

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(filled)

    def output() -> Tensor:
        logits = step()
        rewind()
        return logits

    return Peer(name, step, output, rewind)


def _segments(model: Any, middle: int, ids: Tensor) -> Peer:
    """A decode step in two graphs with a host read between them."""
    from transformers import StaticCache

    prompt = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=prompt * 2)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    first, second = (
        fxopt_compile(Segment(model, *reach)) for reach in ((0, middle), (middle, model.config.num_hidden_layers))
    )
    position = torch.full((len(ids), 1), prompt, device=ids.device)
    mask = (torch.arange(prompt * 2, device=ids.device) <= prompt).expand(len(ids), 1, 1, -1)
    token = ids[:, -1:]

    def step() -> Tensor:
        hidden, sure = first(token, position, mask, cache)
        if bool((sure > NEVER).all()):
            raise AssertionError("the exit that is never taken was taken")
        return second(hidden, position, mask, cache)

    return _rewound("never, segments", step, cache, prompt)


def _parts(
    model: Any, start: int, ids: Tensor, confidence: Callable[[Tensor], Tensor] = measures.largest
) -> dict[str, Callable[[], Tensor]]:
    """The policy and the check, measured on their own."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] * 2)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    hidden = torch.randn(len(ids), 1, model.config.hidden_size, device=ids.device)
    position = torch.full((len(ids), 1), ids.shape[1], device=ids.device)
    propagation, check = Propagation(model, start), HeadCheck(model, confidence)
    propagation.compile(backend="inductor")
    check.compile(backend="inductor")
    return {"propagation": lambda: propagation(hidden, position, cache), "one check": lambda: check(hidden)}
