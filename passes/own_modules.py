"""Small modules that a setting names by a path: routers, heads of their own, classifiers at an exit.

A path is dotted and names a module of the model, or names a .safetensors file of linear layers. What a file holds
becomes a child of the model (``fxopt_router``, ``fxopt_exit``), so that it is trained, saved and moved with it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxopt.passes import inputs
from fxopt.passes.rewriter import Rewriter
from fxopt.passes.technique import SettingError, nearest


def submodule(model: nn.Module, path: str, setting: str) -> nn.Module:
    """The module at a dotted path. Raises SettingError, which begins with `setting`, where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise SettingError(
            f"{setting}: {type(model).__name__} has no module {path!r}.{nearest(path, names)} Give the dotted path of "
            "a module of the model, or a .safetensors file."
        ) from None


def numbered(holder: nn.Module) -> dict[int, nn.Module] | None:
    """The children of a ModuleList or ModuleDict by number; None for any other module."""
    if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
        return None
    if not all(name.isdigit() for name, _ in holder.named_children()):
        return None
    return {int(name): child for name, child in holder.named_children()}


def linears_of(path: str, prefix: str, setting: str) -> nn.ModuleDict:
    """The linear layers in a file: ``"<number>.weight": [out, in]`` and ``"<number>.bias": [out]``, by number.

    A leading ``prefix.`` in the names, as the model's own ``state_dict`` writes it, is taken off.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("modules of a setting are read from safetensors files: pip install 'fxopt[hf]'") from error
    try:
        tensors = {name.removeprefix(f"{prefix}."): tensor for name, tensor in load_file(path).items()}
    except Exception as error:
        raise SettingError(
            f"{setting} cannot be read: {type(error).__name__}: {error}. Write it with "
            "safetensors.torch.save_file({'8.weight': [out, width], '8.bias': [out], ...})."
        ) from error
    holder = nn.ModuleDict()
    for name, weight in tensors.items():
        number, _, part = name.partition(".")
        if part == "bias" and f"{number}.weight" in tensors:
            continue
        if part != "weight" or not number.isdigit() or weight.ndim != 2:
            raise SettingError(
                f"{setting} holds {name!r} {list(weight.shape)}; expected are '<number>.weight' [out, width] and "
                "'<number>.bias' [out]."
            )
        bias = tensors.get(f"{number}.bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        holder[number] = layer
    return holder


def holder(model: nn.Module, path: str, child: str, setting: str) -> nn.Module:
    """What a path names: a module of the model, or a file, whose layers become the model's `child` (a dotted path).

    A file is read once for a model: what became its child belongs to the model from then on.
    """
    if not path.endswith(".safetensors"):
        return submodule(model, path, setting)
    parent_path, _, name = child.rpartition(".")
    parent = model
    if parent_path:
        if not hasattr(model, parent_path):
            model.add_module(parent_path, nn.Module())
        parent = model.get_submodule(parent_path)
    kept = getattr(parent, name, None)
    if kept is not None and getattr(kept, "source", None) == path:
        return kept
    made = linears_of(path, child, setting)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is not None and not like.is_meta:
        made = made.to(device=like.device, dtype=like.dtype)
    made.source = path  # type: ignore[assignment]
    parent.add_module(name, made)
    return made


# -- into a graph ---------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Traces through every module, down to functions of tensors and parameters."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def inline_module(
    module: nn.Module, state: fx.Node, rewriter: Rewriter, *, before: fx.Node, setting: str
) -> fx.Node:  # fmt: skip
    """Insert ``module(state)`` before a node, its weights as inputs of the graph; returns the node of the result.

    Raises SettingError for a module that cannot be traced, or that does not take the state.
    """
    graph = _traced(module, setting)
    mapping: dict[fx.Node, fx.Node] = {}
    result: Any = None
    for node in graph.nodes:
        if node.op == "placeholder":
            mapping[node] = state
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            mapping[node] = inputs.weight(module.get_submodule(owner), name, rewriter, like=state)
        elif node.op == "output":
            result = node.args[0]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: mapping[n])
            make = rewriter.call if node.op == "call_function" else rewriter.method
            try:
                mapping[node] = make(node.target, args, kwargs, like=state, before=before)
            except (RuntimeError, TypeError, ValueError) as error:
                shape = tuple(state.meta["example_value"].shape)
                reason = str(error).splitlines()[0]
                raise SettingError(
                    f"{setting}: {type(module).__name__} does not take the state [B, S, W] of an exit, here {shape}: "
                    f"{reason}. Its input has to be as wide as the model's hidden states."
                ) from error
    if not isinstance(result, fx.Node):
        raise SettingError(f"{setting}: {type(module).__name__} returns {type(result).__name__}; one tensor is needed.")
    return mapping[result]


def _traced(module: nn.Module, setting: str) -> fx.Graph:
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        raise SettingError(
            f"{setting}: {type(module).__name__} cannot be traced into the graph: {str(error).splitlines()[0]}. It "
            "takes one tensor and is plain PyTorch, without `if` on values."
        ) from error
    places = graph.find_nodes(op="placeholder")
    for extra in places[1:]:
        if extra.users:
            raise SettingError(
                f"{setting}: {type(module).__name__}.forward takes {len(places)} arguments; an exit hands it one, the "
                "state."
            )
        graph.erase_node(extra)
    return graph


def output_shape(module: nn.Module, width: int) -> Sequence[int]:
    """The shape of ``module(zeros[1, 1, width])``, computed without computing. Raises what the module raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fakes: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in weights.items()}
    like = next((t for t in weights.values() if t.is_floating_point()), torch.empty(0))
    with mode, torch.no_grad():
        state = torch.zeros(1, 1, width, dtype=like.dtype, device=like.device)
        result: Any = torch.func.functional_call(module, fakes, (state,))
    if not isinstance(result, Tensor):
        raise TypeError(f"it returns {type(result).__name__}")
    return tuple(map(operator.index, result.shape))
