"""``fxopt bench linear``: linears of few rows on a CPU, each with weights that no cache holds.

Shapes of Llama-3.2-1B, and of GPT-2 with its weights stored [K, N]. Peers: the library's product, as eager and Inductor
call it, and Inductor with ``freezing`` and ``max_autotune``, which packs a copy of every weight when it compiles,
no longer follows the weights, and takes the fastest of the kernels that it tries. Bound: the weights once, at the read
bandwidth measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from fxopt.bench.attention import read_bandwidth
from fxopt.bench.harness import Peer, Result, check_equal, environment, measure, progress_bar
from fxopt.codegen.kernels import cpu_linear

SHAPES = {
    "q, o": (2048, 2048), "gate, up": (8192, 2048), "down": (2048, 8192), "head": (128256, 2048),
    "GPT-2 up": (3072, 768), "GPT-2 down": (768, 3072),
}  # fmt: skip
"""[N, K] by name."""
TURNED = {"GPT-2 up", "GPT-2 down"}
"""Those whose weight is stored [K, N]."""
ROWS = (1, 2, 4, 8, 16, 24)
LIBRARY, PACKED, OWN = "library", "Inductor, packed", "cpu_linear"
COLD = 128 << 20
"""Bytes of weights of a round, at least: more than a last cache holds."""


def run(*, device: str = "cpu", quick: bool = False, shapes: dict[str, tuple[int, int]] | None = None) -> Result:
    """Every shape and number of rows in float32, and in bfloat16 as far as the kernel takes it."""
    if device != "cpu":
        raise ValueError("fxopt bench linear is about a CPU; on a GPU it is fxopt bench gemm.")
    result = Result("linear", f"fxopt bench linear{' --quick' if quick else ''}", environment(device))
    chosen = shapes or ({"small": (512, 256)} if quick else SHAPES)
    rounds, cold = (3, 1 << 20) if quick else (15, COLD)
    work = [
        (name, dtype, rows) for name in chosen for dtype, most in cpu_linear.MOST_ROWS.items()
        for rows in ((1, 3) if quick else ROWS) if rows <= (cpu_linear.MOST_ROWS_TURNED if name in TURNED else most)
    ]  # fmt: skip
    bandwidth = 0.0
    with progress_bar("linear", len(work)) as step, torch.no_grad():
        for name, dtype, rows in work:
            bandwidth = max(bandwidth, read_bandwidth(device, cold))
            result.figures.append(_measured(name, chosen[name], dtype, rows, cold, rounds, autotune=not quick))
            step()
    for line in result.figures:
        line["of the read bandwidth"] = f"{line['GB/s'] / bandwidth * 1e9:.0%}"
    result.remarks.append(f"read bandwidth of this machine: {bandwidth / 1e9:.1f} GB/s")
    return result


def _measured(
    name: str, shape: tuple[int, int], dtype: torch.dtype, rows: int, cold: int, rounds: int, *, autotune: bool
) -> dict[str, Any]:
    """Milliseconds of one linear by each peer; they take turns, each on weights of its own kind that are not cached."""
    width, depth = shape
    size = width * depth * dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    weights = [
        (torch.randn(width, depth, generator=generator) / depth**0.5).to(dtype) for _ in range(max(1, -(-cold // size)))
    ]
    if name in TURNED:
        weights = [weight.t().contiguous().t() for weight in weights]
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    own: list[Tensor | None] = []

    def ours() -> None:
        own[:] = [cpu_linear.run(x, weight, None) for weight in weights]

    def output() -> Tensor:
        ours()
        assert own[0] is not None, f"cpu_linear leaves {rows} rows of {dtype} to the library"
        return own[0]

    packed = _packed(weights, x, autotune)
    peers = [
        Peer(LIBRARY, lambda: [F.linear(x, weight) for weight in weights], lambda: F.linear(x, weights[0])),
        Peer(PACKED, packed, lambda: packed()[0]),
        Peer(OWN, ours, output),
    ]
    check_equal(peers, tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5)
    seconds = {row.peer: row.median / len(weights) for row in measure("", peers, rounds=rounds)}
    return {
        "linear": f"{name} {list(shape)}", "dtype": str(dtype).removeprefix("torch."), "rows": rows,
        **{f"{peer}, ms": seconds[peer] * 1e3 for peer in seconds},
        "library over it": seconds[LIBRARY] / seconds[OWN], "packed over it": seconds[PACKED] / seconds[OWN],
        "GB/s": size / seconds[OWN] / 1e9,
    }  # fmt: skip


def _packed(weights: Sequence[Tensor], x: Tensor, autotune: bool) -> Callable[[], list[Tensor]]:
    """The linears as Inductor compiles them when it may keep copies of the weights."""
    torch._dynamo.reset()

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [F.linear(x, weight) for weight in self.weights]

    compiled = torch.compile(Linears().eval(), backend="inductor")
    with inductor_config.patch(freezing=True, max_autotune=autotune):  # type: ignore[attr-defined]
        compiled(x)
    return lambda: compiled(x)
