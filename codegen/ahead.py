"""Which generated kernels a call of an operator launches, said before anything runs, and compiled for any target.

An operator with kernels registers one function that answers from the shapes and types of its operands alone. So a plan
can say what a device that is not here would get, and a report which kernels a graph holds, without running either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen import compat, roofline
from fxopt.codegen.dataflow import Dataflow
from fxopt.codegen.kernels import Unsupported, attention_variants, gemm_launch
from fxopt.codegen.kernels.attention_variants import DecodeAttention
from fxopt.codegen.kernels.gemm import MAX_ROWS, FusedLinear
from fxopt.codegen.lowering import SPLIT_SIZE, describe
from fxopt.codegen.source import content_hash
from fxopt.codegen.targets import TARGETS, CompiledInfo, cross_compile


@dataclass(frozen=True)
class Ahead:
    """A kernel that will be launched: the stem of its file, its source without the file's header, how it was chosen."""

    name: str
    family: str
    source: str
    configuration: Mapping[str, Any]
    compile: Callable[[str], Mapping[str, CompiledInfo]] = field(compare=False)
    """Compiles it for one of ``targets.TARGETS``, by the name of each function; a second or two."""
    known: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What is known without compiling: who decided for it, and resources where it was compiled for the device here."""


Teller = Callable[[tuple[Any, ...], Mapping[str, Any], roofline.Device], "Ahead | None"]

TELLERS: dict[str, Teller] = {}
"""Schema name of an operator (``fxopt::fused_linear``) to the function that tells its kernel."""


def tells(operator: str) -> Callable[[Teller], Teller]:
    """Register ``f(args, kwargs, device)`` for an operator; args are tensors (fake ones do) as in a call.

    It returns None where the call goes to the library, and raises :class:`Unsupported` where no kernel can be written.
    """

    def register(teller: Teller) -> Teller:
        TELLERS[operator] = teller
        return teller

    return register


def kernel_of(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: roofline.Device) -> Ahead | None:
    """The kernel that calling `target` launches on `device`; None where it launches none of ours."""
    teller = TELLERS.get(target._schema.name) if isinstance(target, torch._ops.OpOverload) else None
    if teller is None:
        return None
    try:
        return teller(args, kwargs, device)
    except Unsupported:
        return None


def failures() -> tuple[type[Exception], ...]:
    """What compiling ahead may raise for a kernel that the target cannot have."""
    return (Unsupported, *compat.compile_errors())


@tells("fxopt::fused_linear")
def _fused_linear(args: tuple[Any, ...], kwargs: Mapping[str, Any], device: roofline.Device) -> Ahead | None:
    x, fused = args[0], FusedLinear.decode(kwargs["group"])
    rows: Any = 1
    for size in x.shape[:-1]:
        rows = rows * size
    if not isinstance(rows, int):
        return None  # chosen at each call
    flow = Dataflow(fused.dtype, x.device, kwargs.get("tables") or None, kwargs.get("max_m", MAX_ROWS), device)
    config = flow.config(fused, rows)
    if config is None:
        return None
    kernel = gemm_launch.build(fused, config, kwargs.get("origin", ""))
    return Ahead(
        kernel.path.stem, config.family, kernel.writer.module(), vars(config).copy(),
        lambda target: gemm_launch.compile_for(fused, config, target),
        {"decided by": flow.decided_by(sum(fused.widths), fused.depth), **kernel.resources},
    )  # fmt: skip


@tells("fxopt::decode_attention")
def _decode_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], device: roofline.Device) -> Ahead | None:
    names = ("query", "key", "value", "mask", "extent", "sinks", "phi")
    given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    unified = given["phi"] is not None
    variant = describe(
        *(given[name] for name in names[:-1]),
        unified=unified, soft_cap=given.get("soft_cap", 0.0), split_size=given.get("split_size", SPLIT_SIZE),
    )  # fmt: skip
    return attention_ahead(variant, given["query"], given["key"], given["mask"], device, "decode_attention")


def attention_ahead(
    variant: DecodeAttention, query: Tensor, key: Tensor, mask: Tensor | None, device: roofline.Device, stem: str
) -> Ahead:
    """The kernels of a variant of decode attention, for these operands (fake ones do)."""
    if mask is not None:  # as the launch finds it out
        _, by_head, by_token, _ = mask.expand(*query.shape[:3], key.shape[2]).stride()
        alone = query.shape[1] == 1, variant.q_len == 1
        variant = replace(variant, mask_shared=(by_head == 0 or alone[0]) and (by_token == 0 or alone[1]))
    backend = TARGETS[device.target][0] if device.target else None
    source, tiles = attention_variants.source(variant, backend), attention_variants.config(variant, backend)

    def compile_for(target: str) -> dict[str, CompiledInfo]:
        built, found = attention_variants.kernels(variant, TARGETS[target][0]), {}
        for symbol in attention_variants.kernel_names(variant):
            types, constants, aligned = attention_variants.signature(variant, symbol)
            found[symbol] = cross_compile(
                built[symbol], types, constants, target, tiles.num_warps, tiles.num_stages, aligned
            )
        return found

    configuration = {**tiles._asdict(), "split_size": variant.split_size, "softmax": variant.softmax}
    name = f"{stem}_{variant.softmax}_{content_hash(source)}"
    return Ahead(name, "attention", source, configuration, compile_for)
