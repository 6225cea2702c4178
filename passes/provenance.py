"""Where a node comes from: module path, source line, and the captured nodes it descends from.

Ids are given once, when the graph is captured, and live in ``node.meta["custom"]``, the one channel that
AOTAutograd carries down to the ATen graph.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import fx

ID = "fxopt.id"
ORIGINS = "fxopt.origins"
PASS = "fxopt.pass"

_WRAPPER = re.compile(r"\.forward\.args\[0\]")
_ROOT = re.compile(r"^[LG]\[['\"][^'\"]+['\"]\](?:\._orig_mod)?\.?")
_INDEX = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@functools.lru_cache(maxsize=8192)
def clean_path(name: str) -> str:
    """Dynamo's source expression of a module, as a dotted path in the model.

    >>> clean_path("L['self'].model.layers.0.self_attn")
    'model.layers.0.self_attn'
    """
    name = _WRAPPER.sub("", name)
    name = name.replace("._modules", "").replace("_fxopt_inner.", "")
    name = _ROOT.sub("", name)
    name = _INDEX.sub(r".\1", name)
    return name.strip(".")


def module_stack(node: fx.Node) -> list[tuple[str, str, type]]:
    """``[(key, path, class), ...]`` from the outermost module inwards; the root module is not on it."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return [(key, clean_path(entry[0]), entry[1]) for key, entry in stack.items()]


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module a node belongs to; empty in the root module."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


def source_line(node: fx.Node) -> str:
    """``file.py:123, in forward`` of the innermost frame; empty where Dynamo kept none."""
    trace = node.meta.get("stack_trace") or ""
    # Only what follows the last "File": a trace is long, and this is asked for every node after every pass.
    found = _FRAME.search(trace, trace.rfind('File "')) if trace else None
    return f"{shorten(found[1])}:{found[2]}, in {found[3]}" if found else ""


def shorten(path: str) -> str:
    """A file name without the part that differs between machines."""
    for marker in ("site-packages/", "dist-packages/", "/lib/python"):
        if marker in path:
            return path.rsplit(marker, 1)[1]
    return "/".join(path.split("/")[-2:])


def branches(node: fx.Node) -> list[tuple[str, fx.GraphModule]]:
    """Graphs that a call takes as arguments (``torch.cond``), with the attribute that holds each."""
    owner = node.graph.owning_module
    if owner is None or node.op != "call_function":
        return []
    taken = [a for a in node.all_input_nodes if a.op == "get_attr" and "." not in str(a.target)]
    found = [(str(a.target), getattr(owner, str(a.target), None)) for a in taken]
    return [(name, module) for name, module in found if isinstance(module, fx.GraphModule)]


def all_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph, then those of the branches of its conditionals."""
    yield from graph.nodes
    for node in graph.nodes:
        for _, module in branches(node):
            yield from all_nodes(module.graph)


def inner_graphs(graph: fx.Graph) -> dict[str, fx.GraphModule]:
    """The branches of a graph's conditionals and of those within them, by the attributes that lead there."""
    found: dict[str, fx.GraphModule] = {}
    for node in graph.nodes:
        for name, module in branches(node):
            found[name] = module
            found |= {f"{name}.{inner}": module for inner, module in inner_graphs(module.graph).items()}
    return found


def largest_id(graph: fx.Graph) -> int:
    """The largest id of a graph's nodes, branches included; -1 where none has one."""
    return max(map(node_id, all_nodes(graph)), default=-1)


def number_nodes(graph: fx.Graph) -> None:
    """Give every node of a freshly captured graph its id."""
    for number, node in enumerate(all_nodes(graph)):
        custom = dict(node.meta.get("custom") or {})
        custom[ID] = number
        node.meta["custom"] = custom


def name_modules(graph: fx.Graph, paths: Mapping[str, tuple[str, type]]) -> None:
    """Write the path in the model into the module stack of each node, where ``id`` and class of a module are known.

    Dynamo names a module by how the frame reaches it. After a graph break inside a loop over layers that is a local
    variable, which says nothing about the layer's place.
    """
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            continue
        for key, (name, cls) in list(stack.items()):
            known = paths.get(key.split("@")[0])
            if known is not None and known[1] is cls and known[0] and clean_path(name) != known[0]:
                stack = {**stack, key: (f"L['self'].{known[0]}", cls)}
        node.meta["nn_module_stack"] = stack


def node_id(node: fx.Node) -> int:
    """The id of a node; -1 for one that has none (an orphan)."""
    return int((node.meta.get("custom") or {}).get(ID, -1))


def origin_ids(node: fx.Node) -> tuple[int, ...]:
    """Ids of the captured nodes a node descends from (its own, for a captured node)."""
    custom = node.meta.get("custom") or {}
    return tuple(custom.get(ORIGINS) or ((custom[ID],) if ID in custom else ()))


def stamp(node: fx.Node, sources: Iterable[fx.Node], pass_name: str, number: int) -> None:
    """Write the descent of a new node; the first of `sources` gives its module and source line."""
    sources = list(sources)
    first = sources[0]
    for key in ("nn_module_stack", "stack_trace", "fwd_nn_module_stack", "source_fn_stack"):
        if key in first.meta and key not in node.meta:
            node.meta[key] = first.meta[key]
    custom = {k: v for k, v in (first.meta.get("custom") or {}).items() if k not in (ID, ORIGINS, PASS)}
    custom[ID] = number
    custom[ORIGINS] = tuple(sorted({i for source in sources for i in origin_ids(source)}))
    custom[PASS] = pass_name
    node.meta["custom"] = custom
    node.meta.setdefault("from_node", first.meta.get("from_node", []))


def whole_place(graph: fx.Graph, covers: Callable[[fx.Node], bool] | None = None) -> tuple[str, str]:
    """(module path, source line) of a remark about a whole graph: the module that holds all of it, its first line.

    Where only the root module does, whose path is empty, it is the first module right below the root.
    """
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    placed = [(path, n) for n in calls if (covers is None or covers(n)) and (path := module_path(n))]
    if not placed:
        return "", ""
    pieces = [path.split(".") for path, _ in placed]
    alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*pieces, strict=False))
    shared = [names[0] for names in alike] or pieces[0][:1]
    return ".".join(shared), next((line for _, n in placed if (line := source_line(n))), "")


def orphans(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that no pass has stamped: a rewrite lost their descent."""
    return [node for node in graph.nodes if node.op != "output" and node_id(node) < 0]
