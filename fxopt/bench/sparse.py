"""``fxopt bench sparse``: one attention of a decode step on a long static cache, read in part, selection included.

A graph holds several, and its time is divided by them. Every peer writes the new key and value into a cache of its
own and attends with one new token; the sparse ones also keep their state, score and choose. The baseline is the exact
rewrite of this project (grouped queries, filled part of the cache). A bound is the bytes that the method has to read,
at the bandwidth that a plain sum reaches here: pages, the bounds (in bfloat16 beside a float32 cache) and what is
chosen; double sparsity, the label cache and what is chosen; exact, all keys and values.
On a GPU :mod:`.sparse_gpu` runs instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.bench import sparse_gpu
from fxopt.bench.attention import HEADS, KV_HEADS, LAYERS, WIDTH, Decode, read_bandwidth
from fxopt.bench.harness import Peer, Result, check_equal, environment, measure, progress_bar
from fxopt.compiler import compile as fxopt_compile
from fxopt.passes.sparse_attention import SparseAttention

SHARE = 1 / 16
CHANNELS = tuple(tuple(sorted([*range(h, h + 4), *range(h + WIDTH // 2, h + 4 + WIDTH // 2)])) for h in range(KV_HEADS))
"""Eight of 128 channels, in rotated pairs; which ones does not matter to time."""


def methods() -> dict[str, SparseAttention]:
    """The settings that are measured, at one sixteenth of the cache."""
    return {
        "pages": SparseAttention(method="pages", budget=SHARE),
        "double_sparsity": SparseAttention(method="double_sparsity", budget=SHARE, channels=CHANNELS),
        "sink_window": SparseAttention(method="sink_window", budget=SHARE),
    }


def parts_read(name: str) -> float:
    """Bytes a method has to read, as a share of all keys and values."""
    kept = {"exact": 0.0, "pages": 1 / 32, "double_sparsity": len(CHANNELS[0]) / WIDTH / 2, "sink_window": 0.0}
    return 1.0 if name == "exact" else SHARE + kept[name]


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """Caches of 256 to 32768 positions, all but filled; the first peer, to which ratios refer, is the exact rewrite.

    A method is measured from its own `min_length` on: 2304 is where `pages` and `double_sparsity` have just begun to
    choose, `sink_window` always does.
    """
    if device != "cpu":
        return sparse_gpu.run(device=device, quick=quick)
    lengths, rounds = ((8192,), 5) if quick else ((256, 2304, 4096, 8192, 32768), 24)
    command = f"fxopt bench sparse{' --quick' if quick else ''} --device {device}"
    result = Result("sparse", command, environment(device))
    bandwidth = read_bandwidth(device, 1 << (22 if quick else 26))
    result.remarks.append(f"read bandwidth of this machine, by a sum: {bandwidth / 1e9:.1f} GB/s")
    with progress_bar("sparse attention", rounds * len(lengths)) as step, torch.no_grad():
        for length in lengths:
            torch._dynamo.reset()
            forms = {"exact": fxopt_compile(Decode("repeated", length, device))}
            acting = {name: setting for name, setting in methods().items() if length > setting.dense_below}
            forms |= {n: fxopt_compile(Decode("repeated", length, device), s) for n, s in acting.items()}
            if length == lengths[-1 if quick else 1]:
                check_full_budget(forms["exact"], length, device)
            peers = [Peer(name, _Steps(form, length, device)) for name, form in forms.items()]
            rows = measure(f"{length} positions, 1/16", peers, rounds=rounds, device=device, progress=step)
            for row in rows:
                row.median, row.low, row.high = (t / LAYERS for t in (row.median, row.low, row.high))
                row.bound = parts_read(row.peer) * 2 * length * KV_HEADS * WIDTH * 4 / bandwidth
                if row.peer != "exact":
                    faster = 1 / row.ratio if row.ratio else float("nan")
                    row.note = f"{faster:.2f}x exact, bound {1 / parts_read(row.peer):.1f}x"
            result.rows += rows
    return result


class _Steps:
    """Decode steps on a cache that is nearly full: the last positions one after the other, so that state is kept."""

    SPAN = 64

    def __init__(self, form: torch.nn.Module, length: int, device: str) -> None:
        self.form, self.length, self.number = form, length, 0
        generator = torch.Generator().manual_seed(0)
        self.inputs = [
            torch.randn(1, heads, 1, WIDTH, generator=generator).to(device) for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        self.places = [torch.tensor([length - self.SPAN + i], device=device) for i in range(self.SPAN)]
        positions = torch.arange(length, device=device)
        self.masks = [(positions <= place)[None, None, None] for place in self.places]

    def __call__(self) -> Tensor:
        place, mask = self.places[self.number], self.masks[self.number]
        self.number = (self.number + 1) % self.SPAN
        return self.form(*self.inputs, place, mask)


def check_full_budget(exact: torch.nn.Module, length: int, device: str) -> None:
    """Raise where a sparse form that may read everything does not give what the exact one gives."""
    peers = [Peer("exact", lambda: None, lambda: _Steps(exact, length, device)().clone())]
    for name in ("pages", "double_sparsity"):
        # Everything but one block, on a cache that is not filled so far: selection runs and leaves nothing out.
        setting = SparseAttention(
            method=name, budget=length - 16, min_length=0, channels=CHANNELS if name == "double_sparsity" else None
        )
        form = fxopt_compile(Decode("repeated", length, device), setting)
        peers.append(Peer(name, lambda: None, lambda form=form: _Steps(form, length, device)().clone()))  # type: ignore[misc]
    check_equal(peers, tolerance=1e-4)
