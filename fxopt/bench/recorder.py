"""``fxopt bench recorder``: what keeping a record costs, in compile time, per step and in memory.

The recorder's own time is taken around its calls while a model compiles, one process a turn, and divided by the whole
compile time: comparing two compilations would drown 2% in their noise. Each turn compiles with empty caches and then,
in another process, with the caches that the first one left, where Inductor's part is short and the recorder's the same.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch

from fxopt.bench.harness import Result, Row, environment, progress_bar, quartiles
from fxopt.reporting import CAPACITY

_CHILD = """
import gc, json, sys, time, weakref
import torch, fxopt
from fxopt import backend, reporting
from fxopt.bench.models import llama
from fxopt.passes.record import Recorder
torch.set_num_threads(int(sys.argv[2]))
spent = 0.0

def timed(owner, name):
    call = getattr(owner, name)
    def run(*args, **kwargs):
        global spent
        begun = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent += time.perf_counter() - begun
    setattr(owner, name, run)

timed(Recorder, "stage")
for name in ("number_nodes", "name_modules", "describe"):
    timed(backend, name)
timed(reporting, "new_record")
timed(reporting, "finished")
model = fxopt.compile(llama(int(sys.argv[1]), 128, 4, 1, vocab_size=256), fxopt.LayerSkip(skip=(1,)))
ids = torch.zeros(1, 16, dtype=torch.long)

def step():
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)

begun = time.perf_counter()
step()
whole, at_compile = time.perf_counter() - begun, spent
path = sys.argv[3]
fxopt.report(model).to_json(path, times=False)
before = open(path, "rb").read()
for _ in range(20):
    step()
fxopt.report(model).to_json(path, times=False)
same = open(path, "rb").read() == before
weight = weakref.ref(next(model.parameters()))
del model
torch._dynamo.reset()
gc.collect()
print(json.dumps({"whole": whole, "recorder": at_compile, "steps": spent - at_compile, "unchanged": same,
                  "released": weight() is None, "bytes": len(before), "graphs": len(fxopt.report().graphs)}))
"""


def run(*, device: str = "cpu", quick: bool = False) -> Result:
    """Compile time spent in the recorder; raises AssertionError where a step, memory or the bytes are not as promised.

    Raises:
        ValueError: on another device than the CPU, where the recorder does the same.
    """
    if device != "cpu":
        raise ValueError("the recorder is the same on every device; bench it with --device cpu.")
    layers, turns = (4, 2) if quick else (16, 5)
    result = Result("recorder", f"fxopt bench recorder{' --quick' if quick else ''}", environment(device))
    found: dict[str, list[dict[str, float]]] = {"empty": [], "filled": []}
    texts = set[bytes]()
    with progress_bar("recorder", 2 * turns) as step, tempfile.TemporaryDirectory() as folder:
        for turn in range(turns):
            for caches, measured in found.items():
                path = pathlib.Path(folder) / f"{turn}{caches}.json"
                cache = {"TORCHINDUCTOR_CACHE_DIR": str(pathlib.Path(folder) / f"cache{turn}")}
                output = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", _CHILD, str(layers), str(torch.get_num_threads()),
                     str(path)],
                    env={**os.environ, **cache}, capture_output=True, text=True, check=True,
                )  # fmt: skip
                measured.append(json.loads(output.stdout.splitlines()[-1]))
                texts.add(path.read_bytes())
                step()
    every = [f for measured in found.values() for f in measured]
    assert all(f["unchanged"] and f["steps"] == 0.0 for f in every), "a step reached the recorder"
    assert all(f["released"] for f in every), "a record keeps weights alive"
    assert len(texts) == 1, "equal input gave unequal reports"
    for caches, measured in found.items():
        case = f"compile time, {layers} layers, {caches} caches"
        whole = sorted(f["whole"] for f in measured)
        spent = sorted(f["recorder"] for f in measured)
        ratios = sorted(f["recorder"] / f["whole"] for f in measured)
        result.rows.append(Row(case, "whole", whole[len(whole) // 2], *quartiles(whole)))
        recorder = Row(case, "recorder", spent[len(spent) // 2], *quartiles(spent))
        recorder.ratio, (recorder.ratio_low, recorder.ratio_high) = ratios[len(ratios) // 2], quartiles(ratios)
        result.rows.append(recorder)
    size = every[0]["bytes"] / every[0]["graphs"]
    result.remarks.append(
        f"nothing per step; no weights kept; {2 * turns} processes wrote byte-identical reports; "
        f"{size / 1e3:.0f} kB of JSON a graph, at most {CAPACITY} graphs kept; goal: ratio at most 0.02"
    )
    return result
