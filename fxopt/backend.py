"""The backend: validate the setting, record the graph, run the passes, let Inductor finish."""

from __future__ import annotations

import copy
import functools
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxopt import profiling, reporting
from fxopt.codegen import compat, post_grad
from fxopt.guards import GuardFilter
from fxopt.inductor_settings import beside_kernels
from fxopt.kernel_plan import record_kernels_here
from fxopt.options import Setting, Settings, parse_options
from fxopt.passes import inputs, order, state
from fxopt.passes.context import PassContext
from fxopt.passes.layers import NOTHING_REPEATED
from fxopt.passes.provenance import (
    inner_graphs,
    module_stack,
    name_modules,
    number_nodes,
    orphans,
    stamp,
    whole_place,
)
from fxopt.passes.record import GraphRecord, Recorder, Remark
from fxopt.passes.rewriter import Rewriter, verify
from fxopt.passes.technique import PassError, SettingError

log = logging.getLogger("fxopt")

Compiled = Callable[..., Any]
Wrapper = Callable[[Compiled], Compiled]
NO_PATHS: Mapping[str, tuple[str, type]] = {}


def fxopt(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The function behind ``torch.compile(model, backend="fxopt", mode=..., options={...})``.

    ``options``: a technique's name with a technique, a dict of its fields or a bool, and ``disable``, ``strict``,
    ``record``. Raises :class:`fxopt.SettingError` for anything misspelt or impossible.
    """
    return compile_graph(gm, example_inputs, parse_options(options, mode))


class Backend:
    """The backend with a setting bound to it, for ``model.compile(backend=...)``."""

    def __init__(self, settings: Settings, model: torch.nn.Module | None = None) -> None:
        self.settings = settings
        # ids, not modules: a backend outlives nothing. Used to name modules that a graph break left without a path.
        self.paths = {str(id(m)): (path, type(m)) for path, m in model.named_modules()} if model is not None else {}
        self.model_name = type(model).__name__ if model is not None else ""
        self.guards = GuardFilter()
        self.__name__ = "fxopt"

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Compiled:
        return compile_graph(gm, example_inputs, self.settings, self.paths, self.model_name, self.guards)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    settings: Settings,
    paths: Mapping[str, tuple[str, type]] = NO_PATHS,
    model_name: str = "",
    guards: GuardFilter | None = None,
) -> Compiled:
    """Record, rewrite and lower one captured graph."""
    started = time.perf_counter()
    record = reporting.new_record(compat.compile_id(), settings.owner)
    gm = own_module(gm)
    try:
        number_nodes(gm.graph)
        name_modules(gm.graph, paths)
        describe(record, gm, model_name)
        recorder = Recorder(record, settings.record)
        recorder.stage("captured", gm.graph, level="torch", seconds=time.perf_counter() - started)
        gm, wrappers, patches = run_passes(gm, record, recorder, settings)
        if guards is not None:
            guards.note(gm.graph)
        record_kernels_here(gm, record)
        slot = post_grad.patches(gm)
        if slot:  # a graph without operators of fxopt is compiled as Inductor alone would
            patches |= beside_kernels(gm) | slot
        lowering = time.perf_counter()
        examples = [*example_inputs, *inputs.examples(gm.graph)]
        if profiling.asked():
            compiled = profiling.compile_measured(gm, examples, settings.mode, patches, record)
        else:
            compiled = compat.compile_with_inductor(gm, examples, settings.mode, patches)
        record.inductor_seconds = time.perf_counter() - lowering
        for reason in (reason for own in slot.values() for reason in own.refused):
            message = f"an operator launches its kernel itself, Inductor does not: {reason}"
            record.remarks.append(Remark("kernels", "analysis", "", message))
    except BaseException as error:
        record.error = f"{type(error).__name__}: {error}"
        raise
    finally:
        record.seconds = time.perf_counter() - started
        reporting.finished(record)
    for wrap in wrappers:
        compiled = wrap(compiled)
    return compiled


def describe(record: GraphRecord, gm: fx.GraphModule, model_name: str = "") -> None:
    """Fill in what is known of a graph before any pass: its model, its role, its inputs."""
    ids: set[int] = set()
    roots: dict[str, None] = {}
    for node in gm.graph.nodes:
        for key, path, cls in module_stack(node):
            number = key.split("@")[0]
            if number.isdigit():
                ids.add(int(number))
            if "." not in path:
                roots.setdefault(cls.__name__)
    record.modules = frozenset(ids)
    record.model = model_name or next(iter(roots), "graph")
    inputs = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and value.dtype in (
            torch.int64, torch.int32,
        ) and value.ndim == 2:  # fmt: skip
            inputs.append("x".join(str(s) for s in value.shape))
    record.inputs = inputs[0] if inputs else ""
    if record.inputs.endswith("x1"):
        record.role = "decode"


def run_passes(
    gm: fx.GraphModule, record: GraphRecord, recorder: Recorder, settings: Settings
) -> tuple[fx.GraphModule, list[Wrapper], dict[str, Any]]:
    """Run every pass that has a setting on this graph; a failing pass leaves the graph as it was."""
    wrappers: list[Wrapper] = []
    patches: dict[str, Any] = {}
    used: list[Setting] = []
    acting: list[str] = []
    for name in order.names():
        reach = settings.reach(name, gm.graph)
        if reach and name in settings.disable:
            for setting, _ in reach:
                if setting.kind != "default":
                    settings.refuse_conflict(setting.technique, setting.origin)
            path, line = whole_place(gm.graph, reach[0][1])
            record.remarks.append(Remark(name, "blocked", path, f"disable={name!r}", "FX501", line))
        elif reach:
            acting.append(name)
    for name, late in order.turns(acting):
        # Asked again for each pass: the passes before it may have changed the nodes.
        for setting, covers in settings.reach(name, gm.graph):
            if setting.technique.late is not late:
                continue
            context = run_pass(gm, record, recorder, settings, setting, covers, frozenset(acting))
            wrappers += context.call_wrappers
            patches.update(context.config_patches)
            used.append(setting)
    record.settings = settings.effective(used)
    for setting in used:
        if "annotation lost" in setting.place:
            message = f"{setting.technique}: a graph break inside the decorated module took its annotation"
            record.remarks.append(Remark(setting.technique.name, "analysis", "", message, "FX602"))
    gm.recompile()
    keep = state.wrapper(gm.graph)
    # Innermost: it knows where each input of the graph stands.
    return gm, ([keep] if keep is not None else []) + wrappers, patches


def run_pass(
    gm: fx.GraphModule,
    record: GraphRecord,
    recorder: Recorder,
    settings: Settings,
    setting: Setting,
    covers: Callable[[fx.Node], bool] | None,
    in_use: frozenset[str],
) -> PassContext:
    """Run one technique with one setting; restore the graph and warn once when it fails."""
    technique = setting.technique
    kept_graph = _copy_graph(gm.graph)
    inner = inner_graphs(gm.graph) if technique.enters_branches else {}
    kept_branches = {name: _copy_graph(branch.graph) for name, branch in inner.items()}
    context = PassContext(
        gm.graph, technique.name, record,
        covers=covers, origin=setting.origin, strict=settings.strict, disabled=settings.disable, in_use=in_use,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        technique.rewrite(gm.graph, context)
        _adopt_plain_nodes(gm.graph, context.rewriter)
        verify(gm.graph)
        for name, branch in inner.items():
            within = context.inside(name, branch.graph)
            technique.rewrite(branch.graph, within)
            _adopt_plain_nodes(branch.graph, within.rewriter)
            verify(branch.graph)
            branch.recompile()
    except SettingError:
        raise
    except Exception as error:
        if settings.strict:
            raise PassError(
                f"pass {technique.name!r} ({technique}, set by {setting.origin}) failed: {error}"
            ) from error
        gm.graph = kept_graph
        for name, branch in inner.items():
            branch.graph = kept_branches[name]
        code = "FX902" if isinstance(error, PassError) else "FX901"
        where = next((r.path for r in context.remarks if r.path), "")
        path, line = (where, "") if where else whole_place(gm.graph, covers)
        message = f"{type(error).__name__}: {error}"
        record.remarks.append(Remark(technique.name, "blocked", path, message, code, line))
        warn_once(
            f"fxopt: pass {technique.name!r} failed{f' at {where}' if where else ''} and left the graph as it was "
            f"({message}). The model runs without it; disable=({technique.name!r},) silences this, strict=True raises."
        )
        recorder.stage(technique.name, gm.graph, level=technique.level, seconds=time.perf_counter() - started)
        context.call_wrappers.clear()
        context.config_patches.clear()
        return context
    record.remarks += context.remarks
    recorder.stage(
        technique.name, gm.graph, level=technique.level, seconds=time.perf_counter() - started, exact=technique.exact
    )
    applied = any(r.status == "applied" for r in context.remarks)
    asked = setting.kind != "default"
    refusals = [r for r in context.remarks if r.status in ("missed", "blocked") and r.code not in ("FX503",)]
    if asked and not applied and refusals:
        first = refusals[0]
        message = f"{technique} did not act at {first.path or 'the whole graph'}: {first.code} {first.message}"
        if settings.strict:
            raise PassError(f"strict: {message}")
        if technique.exact:  # the results are the same; the remark is enough
            return context
        # A model that breaks into several graphs has fragments without layers: one warning for all of them.
        fragment = first.code == NOTHING_REPEATED
        runs = "This graph runs without it, the report speaks of each" if fragment else "The model runs without it"
        warn_once(
            f"fxopt: {message}. {runs}; disable=({technique.name!r},) silences this, strict=True raises.",
            about=f"{record.owner} {technique.name} {first.code}" if fragment else "",
        )
    return context


def own_module(gm: fx.GraphModule) -> fx.GraphModule:
    """The module with a graph that passes may add inputs to: Dynamo goes by the inputs of its own afterwards."""
    copied = fx.GraphModule(gm, _copy_graph(gm.graph), gm.__class__.__name__)
    for name in [n for n in inner_graphs(gm.graph) if "." not in n]:
        setattr(copied, name, own_module(getattr(gm, name)))
    for name, value in vars(gm).items():
        if name not in vars(copied):
            setattr(copied, name, value)
    copied.meta = gm.meta
    return copied


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copied.node_copy(node, lambda n: mapping[n])
        mapping[node].name = node.name
        mapping[node].meta = copy.copy(node.meta)
        for name, value in vars(node).items():  # Dynamo keeps the source of an input beside the node's own fields
            if name.startswith("_dynamo"):
                setattr(mapping[node], name, value)
    copied._codegen = copy.deepcopy(graph._codegen)
    return copied


def _adopt_plain_nodes(graph: fx.Graph, rewriter: Rewriter) -> None:
    """Give nodes that a technique made with plain FX calls their value and descent, from their inputs or users."""
    lost = orphans(graph)
    if not lost:
        return
    for node in lost:
        sources = [n for n in (*node.all_input_nodes, *node.users) if n.op != "output" and n not in lost]
        if not sources or node.op not in ("call_function", "call_method"):
            continue
        if "example_value" not in node.meta:
            node.meta["example_value"] = rewriter._value(node)
        stamp(node, sorted(sources, key=lambda n: n.op == "placeholder"), rewriter.pass_name, next(rewriter.numbers))


_warned: set[str] = set()


def warn_once(message: str, about: str = "") -> None:
    """One warning per message and process, or per `about` where several messages say the same."""
    if (about or message) not in _warned:
        _warned.add(about or message)
        warnings.warn(message, UserWarning, stacklevel=2)


def _reset_warnings() -> None:
    _warned.clear()


@functools.cache
def _notice_versions() -> None:
    if compat.torch_version() > compat.NEWEST_TORCH:
        warn_once(
            f"fxopt is tested up to torch {'.'.join(map(str, compat.NEWEST_TORCH))}; this is {torch.__version__}. "
            "It should work; fxopt doctor says what was found."
        )


def _notice_generate(model: torch.nn.Module, backend: str) -> None:
    if backend == "fxopt":
        warn_once(
            "fxopt: generate() of a model wrapped by torch.compile(model, backend='fxopt') runs the original model; "
            "the backend is not reached. Write fxopt.compile(model) or model.compile(backend='fxopt') and call "
            f"{type(model).__name__}.generate on the model itself."
        )


compat.on_generate_of_wrapped_model(_notice_generate)
_notice_versions()
