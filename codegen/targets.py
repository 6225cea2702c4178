"""Compiles kernels for GPUs that are not here, and reads registers, spills and shared memory from the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.codegen import compat

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Target name to backend, architecture and threads per warp."""


@dataclass(frozen=True)
class CompiledInfo:
    """What a compiler made of one kernel for one target."""

    target: str
    asm: str
    """PTX for NVIDIA, AMDGCN assembly for AMD."""
    ttgir: str
    """Triton's GPU IR after pipelining: shared-memory buffers are visible here."""
    registers: int
    """32-bit vector registers per thread."""
    spills: int
    """Bytes of spill stores plus loads (NVIDIA), or spilled registers (AMD)."""
    shared_bytes: int
    """Bytes of shared memory (LDS) per block."""

    def count(self, pattern: str) -> int:
        """How often the regular expression `pattern` occurs in the assembly."""
        return len(re.findall(pattern, self.asm))

    def shared_buffers(self) -> list[tuple[int, ...]]:
        """Shapes of the pipelined shared-memory allocations, number of buffers first: `[(2, 16, 64), (2, 64, 32)]`."""
        allocations = re.findall(r"ttg\.local_alloc\s*(?:\{[^}]*\})?\s*: \(\) -> !ttg\.memdesc<((?:\d+x)+)", self.ttgir)
        shapes = [tuple(int(size) for size in found.strip("x").split("x")) for found in allocations]
        # Rank one are the barriers of asynchronous copies, not data.
        return [shape for shape in shapes if len(shape) > 1 and shape[1:] != (1,)]

    def summary(self) -> str:
        """One line for a report."""
        buffers = ", ".join("x".join(map(str, shape)) for shape in self.shared_buffers()) or "none"
        return (
            f"{self.target}: {self.registers} registers, {self.spills} spilled, "
            f"{self.shared_bytes} bytes shared, buffers {buffers}"
        )


def _ptxas_report(ptx: str, arch: int) -> tuple[int, int]:
    name = compat.sm_name(arch)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [compat.ptxas_path(arch), "-v", f"--gpu-name={name}", str(source), "-o", str(source) + ".cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas refused the kernel for {name}: {done.stderr.strip()}")
    log = done.stderr + done.stdout
    used = re.search(r"Used (\d+) registers", log)
    if used is None:
        raise RuntimeError(f"ptxas -v printed no register count for {name}: {log.strip()}")
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return int(used.group(1)), spills


def _amd_report(asm: str) -> tuple[int, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", asm)
        if found is None:
            raise RuntimeError(f"the AMDGCN text has no .{name} in its metadata")
        return int(found.group(1))

    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count")


def cross_compile(
    kernel_fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Collection[str] | None = None,
) -> CompiledInfo:
    """Compiles a `@triton.jit` function for `target`; no GPU and no driver is needed, about a second each.

    Args:
        kernel_fn: the jit function, imported without `TRITON_INTERPRET` (an interpreted one cannot be compiled).
        signature: argument name to type, such as `{"x": "*fp16", "M": "i32"}`; constexprs may be left out.
        constexprs: value of each `tl.constexpr` argument; any argument named here becomes one.
        target: one of `TARGETS`.
        aligned: arguments that are multiples of 16 (bytes for pointers), as the launcher would find them; None means
            every pointer, which is what torch's allocator gives.

    Raises:
        ValueError: an unknown target, or an argument without a type. Whatever Triton raises when it does not compile.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}")
    if not hasattr(kernel_fn, "arg_names") or compat.is_interpreted(kernel_fn):
        raise ValueError(f"{kernel_fn!r} is not a compiled-mode jit function; import it without TRITON_INTERPRET")
    missing = [name for name in kernel_fn.arg_names if name not in signature and name not in constexprs]
    if missing:
        raise ValueError(f"no type for arguments {missing} of {kernel_fn.__name__}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel_fn.arg_names}
    if aligned is None:
        aligned = [name for name, kind in types.items() if kind.startswith("*")]
    backend, arch, warp_size = TARGETS[target]
    compiled = compat.compile_kernel(
        kernel_fn, types, dict(constexprs), list(aligned), (backend, arch, warp_size), num_warps, num_stages
    )
    if backend == "cuda":
        asm = compiled.asm["ptx"]
        registers, spills = _ptxas_report(asm, int(arch))
    else:
        asm = compiled.asm["amdgcn"]
        registers, spills = _amd_report(asm)
    return CompiledInfo(target, asm, compiled.asm["ttgir"], registers, spills, int(compiled.metadata.shared))
