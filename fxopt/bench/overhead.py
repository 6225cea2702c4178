"""``fxopt bench overhead``: what fxopt costs where it rewrites nothing, against ``backend="inductor"``.

Run time is measured in one process, in interleaved pairs; compile time in separate processes with empty caches.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile

import torch

from fxopt.bench.harness import Peer, Result, Row, check_equal, environment, measure, progress_bar, quartiles
from fxopt.bench.models import llama
from fxopt.compiler import compile as fxopt_compile
from fxopt.passes import order

_COMPILE = """
import sys, time, torch
from fxopt.bench.models import llama
import fxopt
from fxopt.passes import order
torch.set_num_threads(int(sys.argv[3]))
model = llama(int(sys.argv[2]), 128, 4, 1, vocab_size=256)
if sys.argv[1] == "fxopt":
    fxopt.compile(model, disable=tuple(order.names()))
else:
    model.compile(backend="inductor")
ids = torch.zeros(1, 16, dtype=torch.long)
started = time.perf_counter()
with torch.no_grad():
    model(input_ids=ids, use_cache=False)
print(time.perf_counter() - started)
"""


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """Run time and compile time of an untouched graph; outputs have to be bit-equal."""
    layers, width, length, rounds, processes = (2, 128, 32, 20, 1) if quick else (6, 512, 256, 40, 5)
    result = Result(
        "overhead", f"fxopt bench overhead{' --quick' if quick else ''} --device {device}", environment(device)
    )
    peer = llama(layers, width, heads=width // 64, kv_heads=1, vocab_size=1024).to(device)
    ours = copy.deepcopy(peer)
    peer.compile(backend="inductor")
    fxopt_compile(ours, disable=tuple(order.names()))
    ids = torch.randint(0, 1000, (1, length), device=device, generator=torch.Generator(device).manual_seed(0))

    def forward(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    peers = [
        Peer("inductor", lambda: forward(peer), lambda: forward(peer)),
        Peer("fxopt, untouched", lambda: forward(ours), lambda: forward(ours)),
    ]
    check_equal(peers, tolerance=0.0)
    with progress_bar("overhead", rounds + 2 * processes) as step:
        result.rows += measure(f"run time, {layers} layers", peers, rounds=rounds, device=device, progress=step)
        times: dict[str, list[float]] = {"inductor": [], "fxopt": []}
        for turn in range(processes):
            for name in ("inductor", "fxopt") if turn % 2 == 0 else ("fxopt", "inductor"):
                times[name].append(_compile_seconds(name, layers))
                step()
    ratios = [a / b for a, b in zip(times["fxopt"], times["inductor"], strict=True)]
    for name, values in times.items():
        low, high = quartiles(values)
        median = sorted(values)[len(values) // 2]
        peer_name = name if name == "inductor" else "fxopt, untouched"
        row = Row(f"compile time, {layers} layers", peer_name, median, low, high)
        if name == "fxopt":
            row.ratio, (row.ratio_low, row.ratio_high) = sorted(ratios)[len(ratios) // 2], quartiles(ratios)
        result.rows.append(row)
    result.remarks.append("outputs bit-equal; goals: run time ratio at most 1.02, compile time at most 1.05")
    return result


def _compile_seconds(name: str, layers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        output = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _COMPILE, name, str(layers), str(torch.get_num_threads())],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
    return float(output.stdout.split()[-1])
