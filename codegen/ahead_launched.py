"""Kernels of sparse attention and of routed blocks, told before anything runs: the operator's own code is followed on
fake tensors up to its launches, which are noted instead of started. What is compiled is so what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxopt.codegen import compat, lowering_sparse, roofline
from fxopt.codegen.ahead import Ahead, attention_ahead, tells
from fxopt.codegen.kernels import launch, routing, select_scores, select_state
from fxopt.codegen.targets import CompiledInfo, cross_compile

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
"""What Triton calls a tensor of each type."""


def signature(note: launch.Note) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Argument types, constants and arguments that are multiples of 16, as Triton's launcher would find them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {name: note.given[name] for name in compat.constexpr_names(note.kernel)}
    aligned: list[str] = []
    for name in note.kernel.arg_names:
        value = note.given[name]
        if name in constants:
            continue
        if isinstance(value, Tensor):
            types[name] = TYPES[value.dtype]
            aligned.append(name)  # storage of torch's allocator; an offset within it is not looked into
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1:
            constants[name] = 1
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned += [name] * (value % 16 == 0)
    return types, constants, aligned


def followed(
    function: Callable[..., Any], family: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: roofline.Device
) -> Ahead | None:
    """The kernels that ``function(*args, **kwargs)`` would launch on `device`; None with sizes that are symbols."""
    tensors: Sequence[Tensor] = [v for v in pytree.tree_leaves((args, dict(kwargs))) if isinstance(v, Tensor)]
    if any(not isinstance(number, int) for tensor in tensors for number in (*tensor.shape, *tensor.stride())):
        return None  # chosen at each call
    with compat.fake_mode_of(tensors), roofline.planning(device), launch.noting() as notes:
        function(*args, **kwargs)
    if not notes:
        return None
    kernels = {note.kernel.__name__: note for note in notes}
    path = Path(compat.file_of(notes[0].kernel))
    # Without the header, which names whoever came first.
    source = path.read_text(encoding="utf-8").split("\n\n", 1)[1]
    first = notes[0]
    configuration = {"programs": prod(first.grid), "launches": len(notes), **first.options}

    def compile_for(target: str) -> dict[str, CompiledInfo]:
        found = {}
        for name, note in kernels.items():
            types, constants, aligned = signature(note)
            found[name] = cross_compile(
                note.kernel, types, constants, target, note.options.get("num_warps", 4), aligned=aligned
            )
        return found

    return Ahead(path.stem, family, source, configuration, compile_for)


for _name, _function, _family in (
    ("update_page_bounds", select_state.update_page_bounds, "select"),
    ("update_features", select_state.update_features, "select"),
    ("page_scores", select_scores.page_scores, "select"),
    ("feature_scores", select_scores.feature_scores, "select"),
    ("choose", lowering_sparse.choose_blocks, "select"),
    ("gather_norm", routing.gather_norm, "routing"),
    ("scatter_residual", routing.scatter_residual, "routing"),
    ("linear_if", routing.linear_if, "routing"),
):

    @tells(f"fxopt::{_name}")
    def _launched(
        args: tuple[Any, ...], kwargs: Mapping[str, Any], device: roofline.Device,
        function: Any = _function, family: str = _family,
    ) -> Ahead | None:  # fmt: skip
        return followed(function, family, args, kwargs, device)


@tells("fxopt::gathered_attention")
def _gathered_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], device: roofline.Device) -> Ahead | None:
    names = ("query", "key", "value", "index", "valid", "mask", "extent", "sinks")
    given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    query, key, value, index, valid, mask, extent, sinks = (given[name] for name in names)
    if not isinstance(index.shape[-1], int):
        return None
    variant = lowering_sparse.describe(
        query, key, value, valid, mask, extent, sinks, soft_cap=given.get("soft_cap", 0.0),
        block=given.get("block", 1), count=index.shape[-1], some_whole=bool(given.get("dense_heads", ())),
    )  # fmt: skip
    return attention_ahead(variant, query, key, mask, device, "listed_attention")
