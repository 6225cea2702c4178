"""``fxopt tune MODEL --only flat_gemm``: times the linears of a model, and keeps M1, M2 and configurations in a table.

The groups are those that :class:`fxopt.FlatGemm` finds in one forward of the model, which may lie on the meta device:
weights are not read, operands are drawn anew for each shape. The table goes into the cache, where it is found by GPU,
versions and dtype; ``FlatGemm(tables=path)`` names one that lies elsewhere.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxopt.bench.harness import progress_bar
from fxopt.codegen import compat, measuring, roofline
from fxopt.codegen.dataflow import Table, TableKey
from fxopt.codegen.kernels.gemm import FusedLinear
from fxopt.codegen.source import cache_folder
from fxopt.passes.context import PassContext
from fxopt.passes.flat_gemm import FlatGemm, plan_groups
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import GraphRecord
from fxopt.passes.technique import SettingError
from fxopt.planning import default_inputs, zeros_for
from fxopt.recipe import Recipe, fingerprint


def groups_of(model: nn.Module, inputs: dict[str, Any] | None = None) -> list[FusedLinear]:
    """What FlatGemm would compute in one kernel each, in the order of the model; nothing is computed.

    Args:
        inputs: keyword arguments of one forward of few tokens; without them those that ``fxopt.plan`` takes.

    Raises:
        SettingError: when there is none: all linears are quantised, tied, or of another dtype.
    """
    found: list[FusedLinear] = []
    remarks: Counter[str] = Counter()

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        number_nodes(gm.graph)
        context = PassContext(gm.graph, FlatGemm.name, GraphRecord(-1, "-", ""))
        found.extend(group.fused for group in plan_groups(gm.graph, context))
        remarks.update(f"{remark.code} {remark.message}" for remark in context.remarks)
        return zeros_for(gm.graph)

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = default_inputs(model, device) if inputs is None else inputs
    if device.type == "meta":
        given = {"use_cache": False, **given}
    with torch.no_grad():
        compat.compile_alone(backend)(model, (), given)
    if not found:
        why = "; ".join(message for message, _ in remarks.most_common(3)) or "its graph holds no linear"
        raise SettingError(f"{type(model).__name__} has no linear that kernels are generated for: {why}.")
    return found


def measure(
    groups: Sequence[FusedLinear],
    path: str | os.PathLike[str] | None = None,
    *,
    show: bool = True,
    seed: int = 0,
    timer: measuring.Timer | None = None,
    **injected: Any,
) -> list[tuple[Path, Table]]:
    """Measure `groups` on the GPU of this process: a table for each dtype among them, and where it lies.

    Goes on with a table that an earlier run left unfinished. ``timer`` and `injected` (``check``, ``library``,
    ``rows``, ``target``, ``device``) stand in for a GPU in tests.

    Args:
        path: a file, when the groups have one dtype, or a folder; None: the cache.

    Raises:
        SettingError: without a CUDA or ROCm device.
    """
    device = injected.pop("device", None)
    if timer is None:
        if not torch.cuda.is_available():
            raise SettingError(
                "tune --only flat_gemm times kernels on a CUDA or ROCm GPU and finds none; without a table the "
                "roofline model decides."
            )
        device = torch.device("cuda", torch.cuda.current_device())
    place = device or torch.device("cpu")
    model = injected.pop("target", None) or roofline.current_device(place)
    clock = timer or measuring.cold_timer(place, model.cache_bytes)
    rows = injected.pop("rows", measuring.MEASURED_ROWS)
    kinds = list(dict.fromkeys(fused.dtype for fused in groups))
    folder = cache_folder() / "tables" if path is None else Path(path)
    if folder.suffix == ".json" and len(kinds) > 1:
        raise SettingError(f"the model holds {' and '.join(kinds)}: a table is of one dtype, so give a folder.")
    tables = []
    shapes = {(fused.dtype, sum(fused.widths), fused.depth) for fused in groups}
    with progress_bar("flat_gemm", len(shapes) * len(rows)) as tick:
        for kind in kinds:
            key = TableKey.current(kind, place)
            where = folder if folder.suffix == ".json" else folder / key.file_name
            table = measuring.measure_table(
                groups, key, where, device=place, model=model, timer=clock, rows=rows, seed=seed,
                progress=print if show else lambda _: None, tick=tick, **injected,
            )  # fmt: skip
            tables.append((where, table))
    return tables


def tune(
    model: nn.Module, technique: FlatGemm, path: str | os.PathLike[str] | None = None, *, show: bool = True, **more: Any
) -> Recipe:
    """Measure a model's linears; the recipe holds `technique` and says in its notes where the tables lie."""
    groups = groups_of(model)
    tables = measure(groups, path or technique.tables, show=show, **more)
    notes = {"tables": [str(where) for where, _ in tables], "gpu": tables[0][1].key.gpu}
    return Recipe(techniques=(technique,), fingerprint=fingerprint(model), notes=notes)
