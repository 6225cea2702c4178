"""The one list of passes, with the reason for each neighbour. A technique that is not in it runs last."""

from __future__ import annotations

from collections.abc import Collection

from fxopt.passes.technique import Technique

ORDER: tuple[str, ...] = (
    "layer_skip",  # first: what is skipped need not be recognised, routed or packed by anyone after
    "mixture_of_depths",  # reads marks on the captured nodes: before the passes that replace nodes of a routed layer
    "sparse_attention",  # before gqa_packing, which takes the same attentions: what is gathered needs no packing
    "mask_structure",  # before gqa_packing: a proven mask becomes is_causal while the attention is still the library's
    "gqa_packing",  # before cache_extent: only an unrepeated cache can be read up to a length
    "cache_extent",  # before async_softmax, whose kernels take the extent as an argument
    "async_softmax",
    "layer_skip:late",  # by routers: async_softmax does not look into the branch that a routed layer becomes
    "early_exit",  # after every pass that looks for layers, or for attention: not all of them look into a branch
    "flat_gemm",  # late: its operators hide the residual additions by which the others know a layer
    "cpu_linear",  # last: flat_gemm says of every linear on a CPU that it is not for it
)


def names() -> list[str]:
    """Every known pass, in the order they run; techniques from outside the package run after the package's own."""
    return [*[n for n in ORDER if n in Technique.registry], *[n for n in Technique.registry if n not in ORDER]]


def turns(acting: Collection[str]) -> list[tuple[str, bool]]:
    """Name, and whether it is the turn of settings that run late, of the passes that act on a graph."""
    placed = [(n.partition(":")[0], n.endswith(":late")) for n in ORDER]
    known = {name for name, _ in placed}
    return [*[turn for turn in placed if turn[0] in acting], *[(n, False) for n in acting if n not in known]]
