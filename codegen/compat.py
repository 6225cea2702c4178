"""Differences between versions of torch and Triton: the one place that knows them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

# --- Triton: compiling for a target that is not here ---------------------------------------------------------------


def is_interpreted(kernel_fn: Any) -> bool:
    """Whether a kernel was decorated under TRITON_INTERPRET=1."""
    return type(kernel_fn).__name__ == "InterpretedFunction"


def constexpr_names(kernel_fn: Any) -> list[str]:
    """Parameters of a jit function that are written ``tl.constexpr``."""
    return [parameter.name for parameter in kernel_fn.params if parameter.is_constexpr]


def file_of(kernel_fn: Any) -> str:
    """The source file of a jit function."""
    return str(kernel_fn.fn.__code__.co_filename)


def fake_mode_of(tensors: Sequence[Any]) -> Any:
    """The context in which fake `tensors` were made, entered once more; one that does nothing for real ones."""
    from torch._subclasses import FakeTensor

    modes = [tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)]
    return modes[0] if modes else contextlib.nullcontext()


def compile_kernel(
    kernel_fn: Any,
    types: dict[str, str],
    constexprs: dict[str, Any],
    aligned: list[str],
    target: tuple[str, int | str, int],
    num_warps: int,
    num_stages: int,
) -> Any:
    """Triton's CompiledKernel for `target` (backend, architecture, warp size); nothing is loaded onto a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(kernel_fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel_fn, types, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def sm_name(arch: int) -> str:
    """`--gpu-name` for ptxas; from Hopper on Triton emits the architecture-specific instructions of the `a` variant."""
    return f"sm_{arch}{'a' if arch >= 90 else ''}"


def ptxas_path(arch: int) -> str:
    """The ptxas that this Triton takes for an architecture; which one of the two it ships differs between versions."""
    from triton.backends.nvidia import compiler

    try:
        return str(compiler.get_ptxas(arch).path)
    except RuntimeError as error:
        raise FileNotFoundError(f"Triton has no ptxas for sm_{arch}: {error}") from error


# --- torch ---------------------------------------------------------------------------------------------------------

OLDEST_TORCH = (2, 11)
NEWEST_TORCH = (2, 15)


def torch_version() -> tuple[int, int]:
    """(major, minor) of the running torch."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def cond_may_write() -> bool:
    """Whether the branches of ``torch.cond`` may write their operands in place; torch 2.11 refuses that."""
    return torch_version() >= (2, 12)


@contextlib.contextmanager
def sizes_of_data(fake_mode: Any) -> Iterator[None]:
    """Let operators on fake tensors make sizes that are known when the graph runs (``nonzero``); from then on, so that
    the compiler, which traces the graph again in the same mode and binds them, may too."""
    import dataclasses

    shapes = fake_mode.shape_env
    shapes.settings = dataclasses.replace(shapes.settings, allow_dynamic_output_shape_ops=True)
    with shapes.ignore_fresh_unbacked_symbols():
        yield


def annotate(entries: dict[str, str]) -> Any:
    """Context manager that writes `entries` into ``node.meta["custom"]`` of every node traced inside."""
    from torch.fx.traceback import annotate as torch_annotate

    return torch_annotate(entries)


def inductor_modes() -> list[str]:
    """Names of the standard modes."""
    from torch._inductor import list_mode_options

    return list(list_mode_options())


def compile_with_inductor(graph_module: Any, example_inputs: Any, mode: str | None, patches: dict[str, Any]) -> Any:
    """Inductor on a Dynamo-level graph, as ``backend="inductor"`` with that mode calls it, plus `patches`.

    AOTAutograd, decompositions, lowering, its caches and training come with it (``compile_fx`` underneath).
    """
    import torch

    _hold_operands_of_conditionals()
    return torch._TorchCompileInductorWrapper(mode, patches or None, None)(graph_module, example_inputs)


@functools.cache
def _hold_operands_of_conditionals() -> None:
    """Inductor compiles the branches of ``torch.cond`` for the strides that its operands have in the graph, and leaves
    those of a tensor that it makes itself open (torch 2.11 to 2.15): another order of rotary factors failed in a branch
    when the model ran. From here on it keeps to them."""
    import torch
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    cond: Any = torch.ops.higher_order.cond
    lower = lowerings[cond]

    def held(predicate: Any, true_fn: Any, false_fn: Any, operands: Any) -> Any:
        exact = []
        nodes: Any = V.graph.current_node.args[-1]
        for operand, node in zip(operands, nodes, strict=True):
            value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
            if isinstance(value, torch.Tensor):
                operand = ir.ExternKernel.require_exact_strides(operand, value.stride(), allow_padding=False)
            exact.append(operand)
        return lower(predicate, true_fn, false_fn, exact)

    lowerings[cond] = held


def compile_with_provenance(
    graph_module: Any, example_inputs: Any, mode: str | None, patches: dict[str, Any], keep: Any
) -> Any:
    """:func:`compile_with_inductor` without its caches, C++ kernels visible to the profiler.

    Calls ``keep({"kernel:number": [node.meta["custom"], ...]})`` for each graph that is lowered: what it calls, in
    order, with the marks of the ATen nodes that each call computes.
    """
    import torch
    from torch._functorch import config as functorch_config
    from torch._inductor import debug
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(gm: Any, inputs: Any, **options: Any) -> Any:
        known = set(debug._inductor_triton_kernel_to_post_grad_node_info)
        compiled = compile_fx_inner(gm, inputs, **options)
        # Afterwards, when the passes on the ATen graph have run: kernels are told by the names of its nodes.
        marks = {node.name: node.meta.get("custom") or {} for node in gm.graph.nodes}
        calls = debug._inductor_triton_kernel_to_post_grad_node_info
        keep({label: [marks.get(n, {}) for n in nodes] for label, nodes in calls.items() if label not in known})
        return compiled

    _hold_operands_of_conditionals()
    watched = {"trace.provenance_tracking_level": 1, "cpp.enable_kernel_profile": True, "fx_graph_cache": False}
    config = torch._TorchCompileInductorWrapper(mode, {**patches, **watched}, None).config
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(graph_module, example_inputs, inner_compile=inner, config_patches=config)


def profiled(function: Any, inputs: Any) -> tuple[Any, float, list[tuple[str, float]]]:
    """(result, seconds of the whole call, [(operator or kernel, seconds), ...] in order) of one call.

    Seconds of what a GPU runs are the device's own. An operator that others call inside stands for them.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found, record_function("fxopt call"):
        result = function(*inputs)
        if on_gpu:
            torch.cuda.synchronize()
    whole, events = 0.0, []
    for event in found.events() or ():
        parent = event.cpu_parent
        if event.name == "fxopt call" and event.device_type.name == "CPU":
            whole = event.cpu_time_total / 1e6
        elif event.device_type.name == "CPU" and parent is not None and not _is_frame(event.name):
            while parent is not None and _is_frame(parent.name) and parent.name != "fxopt call":
                parent = parent.cpu_parent
            if parent is not None and parent.name == "fxopt call":
                events.append((event.time_range.start, event.name, (event.device_time_total or event.cpu_time_total)))
    return result, whole, [(name, microseconds / 1e6) for _, name, microseconds in sorted(events)]


def profiler_is_on() -> bool:
    """Whether somebody else's profiler runs: there can be one only."""
    from torch._C._autograd import _profiler_enabled

    return bool(_profiler_enabled())


def _is_frame(name: str) -> bool:
    """Whether the profiler's event of this name only holds others: what Inductor and AOTAutograd write around calls."""
    return name == "fxopt call" or name.startswith(("## Call", "AOTDispatcher", "Torch-Compiled", "CompiledFunction"))


def around_compiled_call(module: Any, around: Any) -> None:
    """Call ``around(module, compiled, *args, **kwargs)`` where `module`, compiled in place, would be entered.

    ``nn.Module.compile`` has no hook that runs outside of what it compiles: forward hooks are traced.
    """
    module._compiled_call_impl = functools.partial(around, module, module._compiled_call_impl)


def compile_id() -> str:
    """Dynamo's name of the compilation in progress, such as ``0/1``; ``-`` outside of one."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return str(current) if current is not None else "-"


def source_name(source: Any) -> str:
    """What Dynamo calls the place of a tensor in the caller's frame; empty where the source is None."""
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method in some releases, a property in others


def trace_artifact(name: str, payload: Any) -> None:
    """Attach a JSON artifact to TORCH_TRACE; tlparse lists it. Costs nothing when tracing is off."""
    import json

    from torch._logging import trace_structured  # type: ignore[attr-defined]

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: json.dumps(payload() if callable(payload) else payload),
    )


def on_generate_of_wrapped_model(notice: Any) -> None:
    """Call ``notice(model, backend_name)`` when ``.generate`` is taken from a ``torch.compile`` wrapper.

    ``OptimizedModule.__getattr__`` hands out the wrapped model's own bound ``generate``, which never enters Dynamo,
    and no code of a backend runs. There is no hook to learn of it, so this one lookup is extended.
    """
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    lookup = OptimizedModule.__getattr__
    if getattr(lookup, "_fxopt_notice", None) is not None:
        return

    def __getattr__(self: Any, name: str) -> Any:
        value = lookup(self, name)
        if name == "generate":
            backend = innermost_backend(self.dynamo_ctx.callback)
            notice(self._orig_mod, getattr(backend, "compiler_name", ""))
        return value

    __getattr__._fxopt_notice = notice  # type: ignore[attr-defined]
    OptimizedModule.__getattr__ = __getattr__  # type: ignore[method-assign]


def compile_alone(backend: Any) -> Any:
    """``f(model, args, kwargs)`` that runs `model` compiled by `backend`, with static shapes, apart from all else.

    Dynamo keeps compiled code, and counts recompilations, by code object. The function compiled here has a code
    object of its own, so neither the model's other compilations nor their limit are touched, and dropping the
    function drops what was compiled. ``_call_impl`` goes round a compilation that the model itself carries.
    """
    import torch

    def call(model: Any, args: Any, kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_firstlineno=call.__code__.co_firstlineno)
    return torch.compile(call, backend=backend, dynamic=False)


def triton_version() -> str:
    """Triton's version, or `"none"` where it is not installed."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


class KernelNotCompiled(Exception):
    """Triton's compiler gave up with an error that has no class of its own."""


def compile_ahead(
    kernel_fn: Any, arguments: Sequence[Any], grid: tuple[int, ...], options: dict[str, Any]
) -> dict[str, int]:
    """Compiles a jit function for the current device without launching it; a dtype stands for a tensor of it.

    Returns registers a thread, bytes spilled and bytes of shared memory, as far as the driver tells.
    """
    try:
        compiled = kernel_fn.warmup(*arguments, grid=grid, **options)
        # Whether the device has the shared memory and registers is asked when the binary is loaded.
        if hasattr(compiled, "_init_handles"):
            compiled._init_handles()
    except RuntimeError as problem:
        # MLIR pass failures are bare RuntimeErrors; nothing runs on the device here, so none is the device's.
        raise KernelNotCompiled(str(problem)) from problem
    found = {"registers": getattr(compiled, "n_regs", None), "spills": getattr(compiled, "n_spills", None)}
    found["shared bytes"] = getattr(getattr(compiled, "metadata", None), "shared", None)
    return {name: int(value) for name, value in found.items() if value is not None}


@functools.lru_cache(maxsize=4096)
def configured(kernel_fn: Any, constants: tuple[tuple[str, int], ...], num_warps: int, num_stages: int) -> Any:
    """A jit function together with one configuration, in the form in which Inductor takes it: nothing is tuned.

    The same object for the same arguments: Inductor compiles a kernel once for all nodes that launch it.
    """
    import triton

    config = triton.Config(dict(constants), num_warps=num_warps, num_stages=num_stages)
    return triton.autotune([config], key=[])(kernel_fn)


def kernel_node(
    graph: Any, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], written: list[str]
) -> Any:
    """A node that launches `kernel` (see :func:`configured`), functional: it yields `written` by name, filled."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    return graph.call_function(
        triton_kernel_wrapper_functional,
        (),
        {
            "kernel_idx": kernel_side_table.add_kernel(kernel),
            "constant_args_idx": kernel_side_table.add_constant_args({}),
            "grid": [grid],
            "tma_descriptor_metadata": {},
            "kwargs": arguments,
            "tensors_to_clone": written,
        },
    )


def compile_errors() -> tuple[type[Exception], ...]:
    """What compiling or loading a kernel may raise: Triton's own errors and `KernelNotCompiled`."""
    from triton.errors import TritonError

    return (TritonError, KernelNotCompiled)


def cpp_function(argument_types: Sequence[str], source: str) -> Any:
    """The C++ function ``kernel`` of `source` as a Python function, built and cached as Inductor's own CPU kernels are.

    ``argument_types``: ``"const float*"`` (the argument is a tensor of that dtype), ``"int64_t"`` or ``"float"``.
    Raises :class:`KernelNotCompiled` where there is no compiler or it refuses.
    """
    from inspect import signature

    from torch._inductor import config, exc
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Cache

    # Unfused, a multiply-add costs two instructions (Inductor wants to agree with eager bit for bit). The rest saves
    # looking for vector instructions by compiling torch's headers, which the source does not include.
    wanted = {"cpp.enable_floating_point_contract_flag": "fast", "cpp_cache_precompile_headers": False}
    takes_need = "needs_vec_isa" in signature(Cache.load_pybinding_async).parameters
    options = {"needs_vec_isa": False} if takes_need else {}
    try:
        with config.patch({name: value for name, value in wanted.items() if name in config._config}):  # type: ignore[attr-defined]
            return Cache.load_pybinding(list(argument_types), source, **options)
    except (exc.CppCompileError, exc.InvalidCxxCompiler, OSError, ImportError) as problem:
        raise KernelNotCompiled(str(problem)) from problem
