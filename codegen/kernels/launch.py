"""Starting generated kernels: on the device of their tensors, or on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen import compat


@dataclass(frozen=True)
class Note:
    """A launch that was not started."""

    kernel: Any
    grid: tuple[int, ...]
    given: Mapping[str, Any]
    options: Mapping[str, int]


_notes: contextvars.ContextVar[list[Note] | None] = contextvars.ContextVar("launches to note", default=None)


@contextlib.contextmanager
def noting() -> Iterator[list[Note]]:
    """Launches inside are noted, not started: tensors may be fake, and no GPU is needed."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], given: Mapping[str, Any], on: Tensor, **options: int) -> None:
    """Start a ``@triton.jit`` function with what it names of `given`; an empty grid starts nothing.

    Raises RuntimeError for tensors that are not on a GPU, unless TRITON_INTERPRET=1 was set before Triton was imported.
    """
    notes = _notes.get()
    if notes is not None:
        notes.append(Note(kernel, grid, {name: given[name] for name in kernel.arg_names}, options))
        return
    if on.device.type == "cpu" and not compat.is_interpreted(kernel):
        raise RuntimeError(
            f"{kernel.__name__} needs a GPU, or TRITON_INTERPRET=1 set before Triton is imported; its tensors are on "
            f"{on.device}"
        )
    if 0 not in grid:
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(on):
            kernel[grid](**{name: given[name] for name in kernel.arg_names}, **options)
