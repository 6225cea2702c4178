"""The KV cache of one layer in a captured graph, and rows of it that a skipped layer did not write.

A layer that is skipped in some steps leaves an all-zero key in its cache for each of them. No computed key is all
zero over every head, so the mark needs no state of its own: it lives exactly as long as the cache, moves with
``reorder_cache``, goes with ``crop`` and ``reset``, and two conversations cannot mix it up. When the layer runs
again, on a second prompt, it attends to the rows that carry a key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.passes import depth
from fxopt.passes.context import PassContext
from fxopt.passes.layers import Layer
from fxopt.passes.rewriter import Rewriter, writes_in_place
from fxopt.passes.streams import op_name


def cache_inputs(layer: Layer) -> list[fx.Node]:
    """The placeholders that are the key and value cache of `layer`: written in place, or grown by ``cat``.

    The state of a recurrence is handed in as well, and may have four dimensions. It is written as a whole, of which
    only a window that moves along, joined from old and new rows, is a cache.
    """
    found: dict[fx.Node, None] = {}
    joining = (node for node in layer.nodes if op_name(node) in ("cat", "concat", "roll"))
    joined = {depth.base(n) for node in joining for n in node.all_input_nodes}
    for node in layer.nodes:
        name = getattr(node.target, "__name__", node.target)
        if writes_in_place(node) and node.args and isinstance(node.args[0], fx.Node):
            candidates: list[Any] = [n for n in (depth.base(node),) if name != "copy_" or n in joined]
        elif name in ("cat", "concat"):
            candidates = [depth.base(n) for n in node.all_input_nodes]
        else:
            continue
        for candidate in candidates:
            tensor = depth.value(candidate)
            if (
                candidate.op == "placeholder"
                and isinstance(tensor, torch.Tensor)
                and tensor.is_floating_point()
                and tensor.ndim == 4
                and not isinstance(tensor, torch.nn.Parameter)
                and 0 not in [s for s in tensor.shape if isinstance(s, int)]
            ):
                found.setdefault(candidate)
    return list(found)


def is_static(layer: Layer) -> bool:
    """Whether the layer's cache is written in place."""
    caches = set(cache_inputs(layer))
    return any(
        writes_in_place(n) and n.args and isinstance(n.args[0], fx.Node) and depth.base(n) in caches
        for n in layer.nodes
    )


def length_counter(layer: Layer) -> fx.Node | None:
    """The placeholder that counts the filled rows of a static cache: a 0-d integer that the layer advances."""
    for node in layer.nodes:
        if writes_in_place(node) and str(getattr(node.target, "__name__", node.target)) in ("add_", "iadd"):
            target = depth.base(node)
            tensor = depth.value(target)
            if (
                target.op == "placeholder"
                and isinstance(tensor, torch.Tensor)
                and tensor.ndim == 0
                and not tensor.is_floating_point()
            ):
                return target
    return None


def is_rolled(layer: Layer) -> bool:
    """Whether the layer's static cache is a full sliding window: its rows move up by one and the new one goes last."""
    caches = set(cache_inputs(layer))
    return any(op_name(n) == "roll" and n.all_input_nodes and depth.base(n.all_input_nodes[0]) in caches
               for n in layer.nodes)  # fmt: skip


def grows_whole(layer: Layer) -> bool:
    """Whether the layer's growing cache leaves the graph with every row; a sliding window leaves without the oldest."""
    caches = set(cache_inputs(layer))
    return any(
        op_name(n) in ("cat", "concat")
        and any(depth.base(a) in caches for a in n.all_input_nodes)
        and any(user.op == "output" for user in n.users)
        for n in layer.nodes
    )


def new_rows(layer: Layer) -> list[tuple[fx.Node, list[fx.Node]]]:
    """The keys and values of this step, with the nodes that put them into the layer's cache (or out of the graph)."""
    inside = set(layer.nodes)
    caches = cache_inputs(layer)
    from_cache = depth.forward_slice(caches, inside)
    from_stream = depth.forward_slice([layer.input], inside)
    writes = {n for n in inside if writes_in_place(n) and n.args and depth.base(n) in caches}
    leaving = {n for n in from_cache if any(user.op == "output" for user in n.users)}
    updating = depth.backward_slice(writes | leaving, inside)
    found = []
    for node in layer.nodes:
        if node not in from_stream or node in from_cache:
            continue
        readers = [u for u in node.users if u in updating and (u in from_cache or u in writes)]
        if not caches:  # the prompt, whose cache is made here
            readers = [u for u in node.users if _puts_into_new_cache(node, u, layer)]
        if readers:
            found.append((node, readers))
    return found


def _puts_into_new_cache(node: fx.Node, user: fx.Node, layer: Layer) -> bool:
    tensor = depth.value(node)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
        return False
    if op_name(user) == "index_copy_":
        return user.args[0] is not node
    return user.op == "output" and not writes_in_place(node)


def write_empty_rows(layer: Layer, rewriter: Rewriter) -> None:
    """Let the cache of `layer` advance by all-zero keys and values instead of computed ones."""
    for node, readers in new_rows(layer) if cache_inputs(layer) else ():
        sizes = depth.size_nodes(node, layer, rewriter)
        assert sizes is not None, f"{node.name} has a size that is not in the residual stream"
        tensor = depth.value(node)
        zeros = rewriter.call(
            torch.zeros, (tuple(sizes),), {"dtype": tensor.dtype, "device": tensor.device}, like=node, after=node
        )
        rewriter.replace(node, zeros, only=lambda user, readers=readers: user in readers)  # type: ignore[misc]


def attend_to_written_rows(layer: Layer, context: PassContext) -> int:
    """Hide rows with an all-zero key from the attention of `layer`; returns how many attentions were changed."""
    inside = set(layer.nodes)
    from_cache = depth.forward_slice(cache_inputs(layer), inside) | set(cache_inputs(layer))
    changed = 0
    for node in layer.nodes:
        name = getattr(node.target, "__name__", node.target)
        if name == "scaled_dot_product_attention":
            key = node.args[1] if len(node.args) > 1 else node.kwargs["key"]
            if key in from_cache:
                _mask_sdpa(node, key, context.rewriter)  # type: ignore[arg-type]
                changed += 1
        elif name == "softmax":
            product = _scores_product(node)
            if product is not None and product.args[1] in from_cache:
                _mask_scores(node, product.args[1], context.rewriter)  # type: ignore[arg-type]
                changed += 1
    return changed


def _written(key: fx.Node, feature_dim: int, rewriter: Rewriter, before: fx.Node) -> fx.Node:
    """``[B, 1, 1, S]`` bool: some head has a key there. `key`: ``[B, H, S, D]``, or transposed with feature_dim -2."""
    nonzero = rewriter.call(torch.ne, (key, 0), like=before)
    some = rewriter.call(torch.any, (nonzero, feature_dim), like=before)
    some = rewriter.call(torch.any, (some, 1), {"keepdim": True}, like=before)
    return rewriter.call(torch.unsqueeze, (some, 2), like=before)


def _mask_sdpa(node: fx.Node, key: fx.Node, rewriter: Rewriter) -> None:
    written = _written(key, -1, rewriter, node)
    args, kwargs = list(node.args), dict(node.kwargs)
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
    if mask is None and causal:
        query = args[0] if args else kwargs["query"]
        rows = rewriter.call(torch.ops.aten.sym_size.int, (query, -2), like=node)
        columns = rewriter.call(torch.ops.aten.sym_size.int, (key, -2), like=node)
        ones = rewriter.call(
            torch.ones, ((rows, columns),), {"dtype": torch.bool, "device": depth.value(key).device}, like=node
        )
        mask = rewriter.call(torch.tril, (ones,), like=node)
    if mask is None:
        combined = written
    elif depth.value(mask).dtype == torch.bool:  # type: ignore[arg-type]
        combined = rewriter.call(torch.logical_and, (mask, written), like=node)
    else:
        low = torch.finfo(depth.value(mask).dtype).min  # type: ignore[arg-type]
        combined = rewriter.call(torch.where, (written, mask, low), like=node)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    values = {**dict(zip(names, args, strict=False)), **kwargs, "attn_mask": combined, "is_causal": False}
    node.args = tuple(values.pop(n) for n in names[:3])
    node.kwargs = values
    rewriter.changed = True


def _mask_scores(softmax: fx.Node, key: fx.Node, rewriter: Rewriter) -> None:
    scores = softmax.args[0]
    written = _written(key, -2, rewriter, softmax)
    low = torch.finfo(depth.value(scores).dtype).min  # type: ignore[arg-type]
    hidden = rewriter.call(torch.where, (written, scores, low), like=softmax)
    softmax.args = (hidden, *softmax.args[1:])


def _scores_product(softmax: fx.Node) -> fx.Node | None:
    """The ``matmul(q, k^T)`` whose scaled and masked result `softmax` normalises."""
    node: Any = softmax.args[0] if softmax.args else softmax.kwargs.get("input")
    for _ in range(12):
        if not isinstance(node, fx.Node):
            return None
        name = getattr(node.target, "__name__", node.target)
        if name in ("matmul", "bmm", "__matmul__"):
            return node
        if name not in (
            "mul",
            "add",
            "to",
            "float",
            "div",
            "truediv",
            "masked_fill",
            "where",
            "tanh",
            "cat",
            "sub",
            "half",
        ):
            return None
        following = [a for a in node.all_input_nodes if _is_scores(a, softmax)]
        node = following[0] if following else None
    return None


def _is_scores(node: fx.Node, softmax: fx.Node) -> bool:
    tensor = depth.value(node)
    return (
        node.op != "placeholder"
        and isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.ndim == 4
    )
