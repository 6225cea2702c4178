"""Generators of Triton source, one family of kernels a file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class Unsupported(Exception):
    """A group that no generator can write; the message is the reason, ready for a remark. The graph stays as it is.

    ``argument``: the operation is the right one, and an argument of it is what differs.
    """

    def __init__(self, reason: str, *, argument: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.argument = argument


def row_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Distance between rows of ``[..., K]`` seen as ``[M, K]``; None where they lie at no one distance."""
    leading = [(size, step) for size, step in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    if any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(leading)):
        return None
    return leading[-1][1] if leading else shape[-1]
