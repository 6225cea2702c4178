"""Sizes of lists, from the length of a cache: numbers where that is fixed, nodes of the graph where it grows."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from fxopt.passes.attention import AttentionSite
from fxopt.passes.rewriter import Rewriter
from fxopt.passes.sparse_attention.settings import Budget

Size = Any
"""An int, or a node whose value is a symbolic one."""


class Sizes:
    """Arithmetic on ints and size nodes; what can be computed now is."""

    def __init__(self, rewriter: Rewriter, like: fx.Node) -> None:
        self.rewriter, self.like = rewriter, like

    def length(self, site: AttentionSite) -> Size:
        """Positions of the cache."""
        if isinstance(site.length, int):
            return site.length
        return self.rewriter.method("size", (site.key, 2), like=self.like)

    def tokens(self, budget: Budget, length: Size, least: int) -> Size:
        """What a budget pays for: as many tokens as it says, or that share of `length` rounded up; at least `least`."""
        if isinstance(budget, int):
            return max(budget, least)
        exact = Fraction(budget).limit_denominator(1 << 16)
        below = self._call(operator.floordiv, self._call(operator.mul, length, -exact.numerator), exact.denominator)
        return self.most((self._call(operator.neg, below), least))

    def blocks(self, tokens: Size, block: int, least: int) -> Size:
        """Whole blocks of so many tokens, at least `least`."""
        return self.most((self._call(operator.floordiv, tokens, block), least))

    def times(self, size: Size, factor: int) -> Size:
        """A product."""
        return size if factor == 1 else self._call(operator.mul, size, factor)

    def most(self, sizes: Iterable[Size]) -> Size:
        """The largest."""
        known, found = list(dict.fromkeys(sizes)), None
        for size in known:
            found = size if found is None else self._call(torch.sym_max, found, size)
        return found

    def _call(self, function: Any, *args: Size) -> Size:
        if not any(isinstance(a, fx.Node) for a in args):
            return function(*args)
        return self.rewriter.call(function, args, like=self.like)
