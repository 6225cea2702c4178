"""``fxopt bench attention``: the attentions of a decode step, on static caches that are filled to a part.

Four attentions run one after another in one graph, as in a model, each on a cache of its own; times are for one. (One
alone, called between other work, mostly measures how cold Python is.) Every peer writes the new key and value and
attends with one new token. The peers that read the whole cache are shown at every filled length; the bound is the time
to read the filled keys and values at the best bandwidth that a sum or a matrix-vector product over a large tensor
reached on this machine, measured anew at each filled length. On a GPU :mod:`.attention_gpu` runs instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxopt.bench.harness import Peer, Result, check_equal, environment, measure, progress_bar
from fxopt.compiler import compile as fxopt_compile

HEADS, KV_HEADS, WIDTH, LAYERS = 32, 8, 128, 4
FLEX = "flex_attention"


class Decode(nn.Module):
    """Writes k, v [1, Hkv, 1, D] at position `at` [1] of each cache and attends from q [1, Hq, 1, D].

    ``form``: ``"packed"`` is what Hugging Face runs in eager, ``"repeated"`` what it hands to a compiler, ``"grouped"``
    the same with TRANSFORMERS_SDPA_FORCE_GQA=1, ``"flex"`` FlexAttention with a block mask in the mask's place.
    """

    def __init__(self, form: str, length: int, device: str) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(0)
        for name in _buffers():
            self.register_buffer(name, torch.randn(1, KV_HEADS, length, WIDTH, generator=generator).to(device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Any) -> Tensor:
        """[1, Hq * D]; the result of one attention is the query of the next."""
        names = _buffers()
        for keys, values in zip(names[::2], names[1::2], strict=True):
            q = self.attend(q, k, v, at, mask, getattr(self, keys), getattr(self, values))
        return q.reshape(1, HEADS * WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Any, keys: Tensor, values: Tensor) -> Tensor:
        """One attention."""
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        group = HEADS // KV_HEADS
        if self.form == "flex":
            from torch.nn.attention.flex_attention import flex_attention

            return flex_attention(q, keys, values, block_mask=mask, enable_gqa=True)  # type: ignore[return-value]
        if self.form == "grouped":
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        if self.form == "packed":
            packed = q.reshape(1, KV_HEADS, group, WIDTH)
            return F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask).reshape(q.shape)
        shape = (1, KV_HEADS, group, keys.shape[2], WIDTH)
        keys, values = (x[:, :, None].expand(shape).reshape(1, HEADS, -1, WIDTH) for x in (keys, values))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """At an eighth, a half and all of the cache; the first peer is the one the ratios refer to."""
    if device != "cpu":
        from fxopt.bench import attention_gpu

        return attention_gpu.run(device=device, quick=quick)
    length, rounds = (1024, 5) if quick else (4096, 16)
    command = f"fxopt bench attention{' --quick' if quick else ''} --device {device}"
    result = Result("attention", command, environment(device))
    bandwidth = 0.0
    forms: dict[str, Callable[..., Tensor]] = {
        "fxopt": fxopt_compile(Decode("repeated", length, device)),
        "HF eager": Decode("packed", length, device),
        "inductor": _inductor("repeated", length, device),
        "inductor, forced gqa": _inductor("grouped", length, device),
        "sdpa enable_gqa": Decode("grouped", length, device),
        FLEX: _inductor("flex", length, device),
    }
    filled_lengths = (length // 8, length // 2, length)
    generator = torch.Generator().manual_seed(0)
    with progress_bar("attention", rounds * len(filled_lengths)) as step, torch.no_grad():
        for filled in filled_lengths:
            q, k, v = (torch.randn(1, h, 1, WIDTH, generator=generator).to(device) for h in (HEADS, KV_HEADS, KV_HEADS))
            at = torch.tensor([filled - 1], device=device)
            mask = (torch.arange(length, device=device) < filled)[None, None, None]
            masks = {name: _block_mask(filled, length, device) if name == FLEX else mask for name in forms}
            bandwidth = max(bandwidth, read_bandwidth(device, 1 << (22 if quick else 26)))
            peers = [_peer(name, form, (q, k, v, at, masks[name])) for name, form in forms.items()]
            peers = [peer for peer in peers if peer.name != FLEX or _works(peer)]
            check_equal(peers, tolerance=1e-4)
            rows = measure(f"filled {filled} of {length}", peers, rounds=rounds, device=device, progress=step)
            for row in rows:
                row.median, row.low, row.high = (t / LAYERS for t in (row.median, row.low, row.high))
                row.bound = 2 * filled * KV_HEADS * WIDTH * 4.0  # bytes, until the bandwidth is known
            result.rows += rows
            readers = {r.peer: r.ratio for r in rows if r.peer not in ("fxopt", FLEX) and r.ratio is not None}
            best = min(readers, key=readers.__getitem__)
            said = f"filled {filled}: {readers[best]:.2f}x the best reader of the whole cache ({best})"
            flexible = next((r.ratio for r in rows if r.peer == FLEX), None)
            result.remarks.append(said + (f", {flexible:.2f}x FlexAttention" if flexible is not None else ""))
    for row in result.rows:
        row.bound = None if row.bound is None else row.bound / bandwidth
    result.remarks.append(f"read bandwidth of this machine: {bandwidth / 1e9:.1f} GB/s")
    return result


def _buffers() -> list[str]:
    return [f"{name}{layer}" for layer in range(LAYERS) for name in ("keys", "values")]


def _peer(name: str, form: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Peer:
    return Peer(name, lambda: form(*inputs), lambda: form(*inputs).clone())


def _inductor(form: str, length: int, device: str) -> nn.Module:
    module = Decode(form, length, device)
    module.compile(backend="inductor")
    return module


def _block_mask(filled: int, length: int, device: str) -> Any:
    """FlexAttention's mask, made for this filled length before anything is timed."""
    from torch.nn.attention.flex_attention import create_block_mask

    end = torch.tensor(filled, device=device)
    return create_block_mask(lambda b, h, q, kv: kv < end, None, None, 1, length, device=device)


def _works(peer: Peer) -> bool:
    """Whether torch has a FlexAttention kernel for this device."""
    try:
        peer.call()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def read_bandwidth(device: str, elements: int) -> float:
    """Bytes per second of the faster of a sum and a matrix-vector product over float32, best of six each."""
    data = torch.ones(elements // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    best = float("inf")
    readers: tuple[Callable[[], Tensor], ...] = (data.sum, lambda: torch.mv(data, vector)[-1])
    for read in readers * 6:
        started = time.perf_counter()
        float(read())
        best = min(best, time.perf_counter() - started)
    return data.numel() * data.element_size() / best
