"""``fxopt bench attention``: one attention of a decode step on a static cache that is filled to a part.

Every peer writes the new key and value into a cache of its own and attends with one new token. The peers that read the
whole cache are shown at every filled length; the bound is the time to read the filled keys and values at the bandwidth
that a plain sum over a large tensor reaches on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxopt.bench.harness import Peer, Result, check_equal, environment, measure, progress_bar
from fxopt.compiler import compile as fxopt_compile

HEADS, KV_HEADS, WIDTH = 32, 8, 128


class Decode(nn.Module):
    """Writes k, v [1, Hkv, 1, D] at position `at` [1] and attends from q [1, Hq, 1, D]; ``form`` says how.

    ``"packed"`` is what Hugging Face runs in eager, ``"repeated"`` what it hands to a compiler, ``"grouped"`` the same
    with TRANSFORMERS_SDPA_FORCE_GQA=1.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, form: str, length: int, device: str) -> None:
        super().__init__()
        self.form = form
        for name in ("keys", "values"):
            generator = torch.Generator().manual_seed(len(name))
            self.register_buffer(name, torch.randn(1, KV_HEADS, length, WIDTH, generator=generator).to(device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        """[1, Hq * D]"""
        keys, values = self.keys, self.values
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        if self.form == "grouped":
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        elif self.form == "packed":
            packed = q.view(1, KV_HEADS, HEADS // KV_HEADS, WIDTH)
            out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask)
        else:  # as Hugging Face writes it for a compiler
            group = HEADS // KV_HEADS
            shape = (1, KV_HEADS, group, keys.shape[2], WIDTH)
            keys, values = (x[:, :, None].expand(shape).reshape(1, HEADS, -1, WIDTH) for x in (keys, values))
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.reshape(1, HEADS * WIDTH)


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """One attention at an eighth, a half and all of the cache; the first peer is the one the ratios refer to."""
    length, rounds = (1024, 10) if quick else (4096, 100)
    command = f"fxopt bench attention{' --quick' if quick else ''} --device {device}"
    result = Result("attention", command, environment(device))
    bandwidth = read_bandwidth(device, 1 << (22 if quick else 26))
    result.remarks.append(f"read bandwidth of this machine, by a sum: {bandwidth / 1e9:.1f} GB/s")
    forms: dict[str, Callable[..., Tensor]] = {
        "fxopt": fxopt_compile(Decode("repeated", length, device)),
        "HF eager": Decode("packed", length, device),
        "inductor": _inductor("repeated", length, device),
        "inductor, forced gqa": _inductor("grouped", length, device),
        "sdpa enable_gqa": Decode("grouped", length, device),
    }
    flex_cache = Decode("flex", length, device)
    filled_lengths = (length // 8, length // 2, length)
    generator = torch.Generator().manual_seed(0)
    with progress_bar("attention", rounds * len(filled_lengths)) as step, torch.no_grad():
        for filled in filled_lengths:
            q, k, v = (torch.randn(1, h, 1, WIDTH, generator=generator).to(device) for h in (HEADS, KV_HEADS, KV_HEADS))
            at = torch.tensor([filled - 1], device=device)
            mask = (torch.arange(length, device=device) < filled)[None, None, None]
            peers = [_peer(name, form, (q, k, v, at, mask)) for name, form in forms.items()]
            flex = _flex(flex_cache, filled)
            if flex is not None:
                peers.append(_peer("flex_attention", flex, (q, k, v, at, mask)))
            check_equal(peers, tolerance=1e-4)
            rows = measure(f"filled {filled} of {length}", peers, rounds=rounds, device=device, progress=step)
            for row in rows:
                row.bound = 2 * filled * KV_HEADS * WIDTH * 4 / bandwidth
            result.rows += rows
            readers = {
                r.peer: r.ratio for r in rows if r.peer not in ("fxopt", "flex_attention") and r.ratio is not None
            }
            best = min(readers, key=readers.__getitem__)
            said = f"filled {filled}: {readers[best]:.2f}x the best reader of the whole cache ({best})"
            flexible = next((r.ratio for r in rows if r.peer == "flex_attention"), None)
            result.remarks.append(said + (f", {flexible:.2f}x FlexAttention" if flexible is not None else ""))
    return result


def _peer(name: str, form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Peer:
    return Peer(name, lambda: form(*inputs), lambda: form(*inputs).clone())


def _inductor(form: str, length: int, device: str) -> nn.Module:
    module = Decode(form, length, device)
    module.compile(backend="inductor")
    return module


def _flex(module: Decode, filled: int) -> Callable[..., Tensor] | None:
    """FlexAttention with a block mask that fits the filled length; None where torch has no kernel for it here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, device = module.keys.shape[2], str(module.keys.device)
    block_mask = create_block_mask(lambda b, h, q, kv: kv < filled, None, None, 1, length, device=device)
    attend = torch.compile(flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        module.keys.index_copy_(2, at, k)
        module.values.index_copy_(2, at, v)
        out = attend(q, module.keys, module.values, block_mask=block_mask, enable_gqa=True)
        return out.reshape(1, HEADS * WIDTH)

    query, start = torch.zeros(1, HEADS, 1, WIDTH, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        call(query, module.keys[:, :, :1].clone(), module.values[:, :, :1].clone(), start, query)
    except (NotImplementedError, RuntimeError):
        return None
    return call


def read_bandwidth(device: str, elements: int) -> float:
    """Bytes per second of a sum over float32, best of eight."""
    data = torch.ones(elements, device=device)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - started)
    return data.numel() * data.element_size() / best
