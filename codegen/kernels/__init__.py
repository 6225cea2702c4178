"""Generators of Triton source, one family of kernels a file."""

from __future__ import annotations


class Unsupported(Exception):
    """A group that no generator can write; the message is the reason, ready for a remark. The graph stays as it is.

    ``argument``: the operation is the right one, and an argument of it is what differs.
    """

    def __init__(self, reason: str, *, argument: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.argument = argument
