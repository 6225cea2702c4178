"""``fxopt bench sparse --device cuda``: one attention of a decode step by the generated kernels, selection included.

Llama-3-8B's heads in bfloat16, one new token a row, caches of 8k to 256k that are full. A sparse step brings its state
up to date, scores, chooses and attends; what a model does once for all layers (the mask's extent and what is always
read) is not in it. Peers: the dense kernel of this project, FlexAttention with block lists that were built before, one
for all heads (it chooses nothing), and ``scaled_dot_product_attention``. Every peer is a CUDA graph of many steps, on
several caches in turn where one would stay in the second-level cache; times are for one step. The bound of a method is
the time to read its own bytes at the bandwidth that a plain sum reaches on this device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.bench.attention import HEADS, KV_HEADS, WIDTH, read_bandwidth
from fxopt.bench.harness import Peer, Result, Row, check_equal, environment, measure, progress_bar
from fxopt.codegen import lowering, lowering_sparse  # noqa: F401  (attaches the kernels)

LENGTHS, BATCHES = (8192, 32768, 131072, 262144), (1, 4, 8)
PAGE, LABELS, FLEX_BLOCK, SINKS, NEWEST = 16, 8, 128, 4, 8
SHARE = 16
"""One in so many positions is read."""
STEPS = 16
"""Steps on one cache in a graph: its last positions one after the other."""
COLD = 256 << 20
"""Bytes of keys and values that a graph goes through: several times the second-level cache of any device so far."""
GOAL = 0.6
"""Share of its own bound that a method should reach."""
KEPT = {"pages": 1 / 16, "double_sparsity": LABELS / WIDTH / 2, "double_sparsity, 4 bits": LABELS / WIDTH / 8}
"""Bytes of state that are read in a step, as a share of all keys and values in 16 bits."""


@dataclass(frozen=True)
class Case:
    """One measurement: rows of a batch, and positions of their caches."""

    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.length // 1024}k"

    @property
    def bytes(self) -> int:
        """Of all keys and values."""
        return 2 * self.batch * KV_HEADS * self.length * WIDTH * 2

    @property
    def copies(self) -> int:
        """Caches that take turns."""
        return max(1, min(16, -(-COLD // self.bytes)))


def parts_read(peer: str) -> float:
    """Bytes that a peer has to read, as a share of all keys and values; labels' scales are not counted."""
    if peer in KEPT:
        return 1 / SHARE + KEPT[peer]
    return 1 / SHARE if peer.startswith("flex") else 1.0


class Caches:
    """Tensors of one case, on any device: queries, `copies` caches, and the state of each method beside each."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.case, self.device = case, device
        self.query = normal(case.batch, HEADS, 1, WIDTH)
        self.caches = [
            (normal(case.batch, KV_HEADS, case.length, WIDTH), normal(case.batch, KV_HEADS, case.length, WIDTH))
            for _ in range(case.copies)
        ]
        self.extents = [torch.tensor(case.length - STEPS + 1 + i, device=device) for i in range(STEPS)]
        self.biases = {
            block: [lowering_bias(self.caches[0][0], extent, block) for extent in self.extents] for block in (1, PAGE)
        }
        self.channels = torch.arange(LABELS, device=device).expand(KV_HEADS, -1).contiguous()
        self.states: dict[str, list[dict[str, Tensor | None]]] = {name: [] for name in KEPT}
        for name in KEPT:
            for key, _ in self.caches:
                self.states[name].append(self._state(name, key))

    def _state(self, name: str, key: Tensor) -> dict[str, Tensor | None]:
        lead, length = key.shape[:2], key.shape[2]
        made: dict[str, Tensor | None] = {"filled": torch.tensor(-1, device=self.device)}
        if name == "pages":
            return made | {"kept": key.new_zeros(*lead, -(-length // PAGE), 2 * WIDTH)}
        if name == "double_sparsity":
            return made | {"kept": key.new_zeros(*lead, LABELS, length), "scales": None}
        scales = torch.zeros(*lead, LABELS, -(-length // 128), device=self.device)
        return made | {
            "kept": torch.zeros(*lead, LABELS, scales.shape[-1] * 64, dtype=torch.uint8, device=self.device),
            "scales": scales,
        }

    def sparse(self, name: str, copy: int, step: int, share: int = SHARE) -> Tensor:
        """One step of a method: state, scores, choice, attention; [B, Hq, 1, D]."""
        ops, (key, value), state = torch.ops.fxopt, self.caches[copy], self.states[name][copy]
        block = PAGE if name == "pages" else 1
        count = -(-self.case.length // (share * block))
        # With a share of one everything is listed, and chosen all the same.
        least = count * block if share > 1 else 0
        extent = self.extents[step]
        if name == "pages":
            ops.update_page_bounds(state["kept"], state["filled"], key, extent, page=PAGE, least=least)
            scores = ops.page_scores(self.query, state["kept"], extent, page=PAGE, least=least)
        else:
            options = {"least": least, "bits": 4 if name.endswith("4 bits") else 0}
            labels = (extent, self.channels, state["scales"])
            ops.update_features(state["kept"], state["filled"], key, *labels, **options)
            scores = ops.feature_scores(self.query, state["kept"], *labels, **options)
        index, valid = ops.choose(scores, self.biases[block][step], extent, count=count, block=block, least=least)
        return ops.gathered_attention(
            self.query, key, value, index, valid, None, extent, scale=WIDTH**-0.5, block=block
        )

    def dense(self, copy: int, step: int) -> Tensor:
        """The dense kernel of this project, with splits fitted to the device."""
        key, value = self.caches[copy]
        split = lowering.fitted_split(self.case.length, self.case.batch * KV_HEADS, key.device)
        given: dict[str, Any] = {"scale": WIDTH**-0.5, "soft_cap": 0.0, "split_size": split}
        return lowering.lowered(self.query, key, value, None, self.extents[step], None, None, **given)[0]

    def sdpa(self, copy: int, step: int) -> Tensor:
        """The library's attention, on the whole cache."""
        return F.scaled_dot_product_attention(self.query, *self.caches[copy], enable_gqa=True)

    def prebuilt(self) -> Any:
        """FlexAttention's block mask: one list of blocks for all heads, as its decode kernel wants it."""
        from torch.nn.attention.flex_attention import BlockMask

        blocks = self.case.length // FLEX_BLOCK
        count = max(1, blocks // SHARE)
        order = torch.arange(0, blocks, max(1, blocks // count), device=self.device, dtype=torch.int32)[:count]
        index = torch.zeros(self.case.batch, 1, 1, blocks, dtype=torch.int32, device=self.device)
        index[..., :count] = order
        number = torch.full((self.case.batch, 1, 1), count, dtype=torch.int32, device=self.device)
        return BlockMask.from_kv_blocks(number, index, BLOCK_SIZE=FLEX_BLOCK, seq_lengths=(1, self.case.length))

    def reset(self, name: str) -> None:
        """Before the first step of a graph: state one position short of it."""
        for state in self.states.get(name, ()):
            filled = state["filled"]
            assert filled is not None
            filled.fill_(self.case.length - STEPS)


def lowering_bias(key: Tensor, extent: Tensor, block: int) -> Tensor:
    """What is read in any case: sinks and newest positions, nothing beyond the extent; [1, blocks]."""
    visible = (torch.arange(key.shape[2], device=key.device) < extent)[None, None, None]
    return torch.ops.fxopt.block_bias(key[:1], visible, sinks=SINKS, newest=NEWEST if block == 1 else 1, block=block)


def steps_of(caches: Caches, flex: bool = True) -> Iterator[tuple[str, Callable[[int, int], Tensor]]]:
    """Every peer by name, as a function of cache and step; the first is the one that ratios refer to."""
    yield "dense kernel", caches.dense
    for name in KEPT:
        yield name, lambda copy, step, name=name: caches.sparse(name, copy, step)  # type: ignore[misc]
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        mask, compiled = caches.prebuilt(), torch.compile(flex_attention, dynamic=False)
        yield "flex, lists prebuilt", lambda copy, step: compiled(  # type: ignore[misc]
            caches.query, *caches.caches[copy], block_mask=mask, enable_gqa=True
        )
    yield "sdpa", caches.sdpa


def captured(caches: Caches, name: str, step: Callable[[int, int], Tensor]) -> Callable[[], Any]:
    """A CUDA graph of STEPS steps on each cache in turn; a call replays it."""

    def all_steps() -> None:
        caches.reset(name)
        for number in range(STEPS):
            for copy in range(caches.case.copies):
                step(copy, number)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Once for compilation; state is derived from all keys in the first step ever.
        all_steps()
        all_steps()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_steps()
    return graph.replay


def annotate(rows: list[Row], case: Case, bandwidth: float) -> list[str]:
    """Times of one step, bounds and notes for the rows of a case; returns the methods that miss the goal."""
    number, missed = STEPS * case.copies, []
    for row in rows:
        row.median, row.low, row.high = (t / number for t in (row.median, row.low, row.high))
        row.bound = parts_read(row.peer) * case.bytes / bandwidth
        reached = row.bound / row.median
        faster = 1 / row.ratio if row.ratio else float("nan")
        row.note = f"{faster:.2f}x dense, bound {1 / parts_read(row.peer):.1f}x, {reached:.2f} of it"
        if row.peer in KEPT and reached < GOAL:
            missed.append(f"{case.name}, {row.peer}: {reached:.2f} of its bound, {GOAL} asked")
    return missed


def check(caches: Caches, tolerance: float = 3e-2) -> None:
    """Raise where a method that lists everything does not give what the library gives on the whole cache."""
    last = STEPS - 1
    peers = [Peer("sdpa", lambda: None, lambda: caches.sdpa(0, last))]
    peers.append(Peer("dense kernel", lambda: None, lambda: caches.dense(0, last)))
    for name in KEPT:
        peers.append(Peer(name, lambda: None, lambda name=name: caches.sparse(name, 0, last, share=1)))  # type: ignore[misc]
    check_equal(peers, tolerance=tolerance)


def run(*, device: str = "cuda", quick: bool = False) -> Result:
    """All lengths and batches; with `quick` the shortest alone."""
    cases = [Case(batch, length) for length in LENGTHS for batch in BATCHES][: 1 if quick else None]
    rounds = 5 if quick else 20
    result = Result("sparse", f"fxopt bench sparse{' --quick' if quick else ''} --device {device}", environment(device))
    bandwidth = read_bandwidth(device, 1 << 30)
    result.remarks.append(f"read bandwidth of this device, by a sum: {bandwidth / 1e9:.0f} GB/s")
    with progress_bar("sparse attention", rounds * len(cases)) as progress, torch.no_grad():
        for case in cases:
            caches = Caches(case, device)
            check(caches)
            peers = [Peer(name, captured(caches, name, step)) for name, step in steps_of(caches)]
            rows = measure(f"{case.name}, 1/{SHARE}", peers, rounds=rounds, device=device, progress=progress)
            result.remarks += annotate(rows, case, bandwidth)
            result.rows += rows
            del caches, peers
            torch.cuda.empty_cache()
    return result
