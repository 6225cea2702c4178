"""What a dynamic model did with one input: how deep rows went, which tokens were routed, which positions were read.

:func:`counted` reads the counters that early exit keeps on the device anyway. :func:`pictures` runs the plain-PyTorch
references once and watches them: nothing of it is in the compiled model, so watching costs a step nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxopt.meaning import reference
from fxopt.passes.counters import DepthCounter, counters
from fxopt.passes.mod_counters import watching
from fxopt.passes.technique import Technique

if TYPE_CHECKING:
    from fxopt.reporting import Report

FINEST = 64
"""Most rows and columns of a map; longer sequences are averaged down to it."""


@dataclass(frozen=True)
class Picture:
    """``values[row][column]`` in [0, 1] for a map; one row of counts for a histogram."""

    kind: str
    """``histogram`` or ``map``."""
    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]

    def text(self) -> str:
        """Eight grades of shade a cell (a map), or a bar a column (a histogram)."""
        if self.kind == "histogram":
            most = max(self.values[0], default=0) or 1
            width = max(map(len, self.columns), default=0)
            bars = zip(self.columns, self.values[0], strict=True)
            return "\n".join([self.title, *(f"  {c:>{width}} {'#' * round(40 * v / most)} {v:g}" for c, v in bars)])
        width = max(map(len, self.rows), default=0)
        lines = zip(self.rows, self.values, strict=True)
        return "\n".join([self.title, *(f"  {r:>{width}} {''.join(map(_shade, row))}" for r, row in lines)])


def _shade(value: float) -> str:
    return " .:-=+*#"[min(7, max(0, int(8 * value)))]


def counted(report: Report) -> list[Picture]:
    """Histograms of the exits that the graphs of `report` took in this process so far; reads the device."""
    numbers = {graph.number: graph for graph in report.graphs}
    found = []
    for counter in counters(DepthCounter):
        histogram = counter.histogram
        graph = numbers.get(counter.graph)
        if graph is not None and graph.owner == counter.owner and any(histogram.values()):
            found.append(
                Picture(
                    "histogram", f"graph {graph.compile_id}: rows by the layers that ran", ["rows"],
                    [f"{n} layers" for n in histogram], [[float(v) for v in histogram.values()]],
                )
            )  # fmt: skip
    return found


def pictures(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], *techniques: Technique) -> list[Picture]:
    """Routing maps and mask densities of one forward of ``fxopt.reference(model, *techniques)``, in eager PyTorch.

    A routing map has a row for each routed layer and a column for each token: the share of sequences in the batch that
    computed it there. A density map has a row for each attention and a column for each cached position: the share of
    heads, sequences and new tokens that read it.
    """
    meant = reference(model, *techniques)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    attention = _Attention()
    with torch.no_grad(), watching(meant) as routed, attention:
        meant(*args, **kwargs)
        routes = routed()
    found = []
    if routes:
        rows = {path: taken.double().mean(0) for path, taken in routes.items()}
        found.append(_map("tokens computed by each routed layer", rows, "token"))
    if attention.read:
        share = sum(float(r.mean()) for r in attention.read.values()) / len(attention.read)
        found.append(_map(f"positions read by attention ({share:.0%} of all)", attention.read, "position"))
    return found


class _Attention(TorchFunctionMode):
    """Watches the masks that reach ``scaled_dot_product_attention``."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            self._see(**{**given, **kwargs})
        return func(*args, **kwargs)

    def _see(self, query: Tensor, key: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_: Any):  # type: ignore[no-untyped-def]
        length, seen = key.shape[-2], query.shape[-2]
        if attn_mask is not None:
            kept = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min
            kept = kept.expand(*kept.shape[:-2], seen, length)
        else:
            kept = torch.ones(seen, length, dtype=torch.bool)
            kept = kept.tril() if is_causal else kept
        self.read[f"attention {len(self.read)}"] = kept.double().reshape(-1, length).mean(0)


def _map(title: str, rows: Mapping[str, Tensor], unit: str) -> Picture:
    length = max(row.numel() for row in rows.values())
    columns = min(length, FINEST)
    edges = [i * length // columns for i in range(columns + 1)]
    names = [f"{unit} {a}" if b - a == 1 else f"{unit}s {a}-{b - 1}" for a, b in zip(edges, edges[1:], strict=False)]
    values = []
    for row in rows.values():
        whole = F.pad(row.detach().cpu(), (0, length - row.numel()))
        values.append([round(float(whole[a:b].mean()), 4) for a, b in zip(edges, edges[1:], strict=False)])
    return Picture("map", title, list(rows), names, values)
