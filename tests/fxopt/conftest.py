"""Fixtures of the inspection tests: a made-up report, and headless Chromium over its debugging pipe."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fxopt.passes.record import EffectiveSetting, GraphRecord, KernelRecord, Measured, NodeRow, Profile, Remark, Stage
from fxopt.reporting import Report

HF = "transformers/models/llama/modeling_llama.py"
BODY = (  # module, target, argument, line: one decoder layer, {x} is its input
    ("input_layernorm", "rsqrt", "{x}", 65),
    ("self_attn.q_proj", "linear", "rsqrt_{i}, {weight}", 243),
    ("self_attn", "scaled_dot_product_attention", "linear_{i}, linear_{i}, linear_{i}", 193),
    ("self_attn.o_proj", "linear", "scaled_dot_product_attention_{i}, {weight}", 269),
    ("", "add", "{x}, linear_{i}", 318),
    ("mlp.act_fn", "silu", "add_{i}", 164),
    ("mlp.down_proj", "linear", "silu_{i}, {weight}", 164),
    ("", "add", "add_{i}, linear_{i}", 324),
)


def llama_record(layers: int = 32, number: int = 0, wide: int = 1) -> GraphRecord:
    """A graph shaped like a Llama's, after three passes: layer 7 skipped, attention rewritten or not, nothing.

    `wide` repeats the body of each layer, for pages as large as those of real models.
    """
    rows = [NodeRow(0, "input_ids", "placeholder", "L_input_ids_", "", "1x16", "int64", "model", "", (0,))]
    before = "input_ids"
    for i in range(layers):
        weight = f"l_self_modules_model_modules_layers_modules_{i}_modules_mlp_modules_down_proj_parameters_weight_"
        place = f"model.layers.{i}"
        rows.append(_row(rows, weight, "placeholder", weight, "", f"{place}.mlp.down_proj", 164))
        for module, target, arguments, line in BODY * wide:
            at = f"{place}.{module}".rstrip(".")
            argument = arguments.format(x=before, i=i, weight=weight)
            rows.append(_row(rows, f"{target}_{i}", "call_function", target, argument, at, line))
        before = f"add_{i}"
    captured = Stage("captured", "torch", 0.01, 0, len(rows), added=rows, order=[r.id for r in rows])
    gone = [r.id for r in rows if r.module.startswith("model.layers.7") and r.op != "placeholder"]
    kept = [r for r in rows if r.id not in gone]
    changed = [dataclasses.replace(r, args=r.args.replace("add_7", "add_6")) for r in rows if "add_7" in r.args]
    changed = [r for r in changed if r.id not in gone]
    skip = Stage(
        "layer_skip", "torch", 0.02, len(rows), len(kept), [], changed, gone, [r.id for r in kept], exact=False
    )
    made = []
    for row in kept:
        if row.target == "scaled_dot_product_attention" and not row.module.startswith("model.layers.3."):
            new = dataclasses.replace(
                row, id=len(rows) + len(made), name=f"packed_{row.name}", target="fxopt.attention"
            )
            made.append(dataclasses.replace(new, origins=(row.id,)))
    replaced = {row.origins[0]: row for row in made}
    order = [replaced[r.id].id if r.id in replaced else r.id for r in kept]
    packed = Stage("async_softmax", "torch", 0.03, len(kept), len(kept), made, [], list(replaced), order)
    idle = Stage("flat_gemm", "torch", 0.001, len(kept), len(kept))
    remarks = [Remark("layer_skip", "applied", "model.layers.7", f"layer 7 of {layers} skipped")]
    for i in range(layers):
        if i == 3:
            message, line = "expected scale=0.125, found scale=0.2", f"{HF}:193, in forward"
            remarks.append(Remark("async_softmax", "missed", "model.layers.3.self_attn", message, "FX102", line))
        elif i != 7:
            remarks.append(Remark("async_softmax", "applied", f"model.layers.{i}.self_attn", "packed attention"))
    remarks.append(Remark("flat_gemm", "blocked", "lm_head", "no kernel for this device", "FX303"))
    kernel = KernelRecord(
        "attention_decode_ab12", "attention", tuple(r.id for r in made[:3]), ("model.layers.0.self_attn",),
        "@triton.jit\ndef attention_decode(q, k):\n    pass\n",
        {"block_n": 64, "num_warps": 4},
        {"registers": 96, "spills": 2, "shared": 32768, "ptx": ".version 8.0\n.target sm_90\n"},
    )  # fmt: skip
    return GraphRecord(
        number, f"0/{number}", "LlamaForCausalLM", "prefill", "1x16", [captured, skip, packed, idle], remarks,
        [EffectiveSetting("layer_skip", "LayerSkip(skip=(7,))", "options")], [], [kernel], 1.5, 1.2,
    )  # fmt: skip


def _row(rows: list[NodeRow], name: str, op: str, target: str, args: str, module: str, line: int) -> NodeRow:
    source = f"{HF}:{line}, in forward"
    return NodeRow(len(rows), name, op, target, args, "1x16x64", "float32", module, source, (len(rows),))


def profile_of(graph: GraphRecord) -> Profile:
    """As if each attention had taken 200 us, and each layer's other products one call of 100 us."""
    rows = graph.rows(len(graph.stages) - 1)
    kernels = [Measured("attention", (r.id,), (r.module,), 2e-4) for r in rows if r.target == "fxopt.attention"]
    kernels += [Measured("mm", (r.id,), (r.module,), 1e-4) for r in rows if r.target == "linear"]
    return Profile(8, 0.02, [*kernels, Measured("Memset", (), (), 1e-6)])


@pytest.fixture
def made_up() -> Callable[..., Report]:
    """``made_up(layers=32, graphs=1)``: a report that no compiler was run for."""
    return lambda layers=32, graphs=1, wide=1: Report(
        [llama_record(layers, n, wide) for n in range(graphs)], {"torch": "2.13.0", "python": "3.11", "device": "cpu"}
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium without network; the test is skipped where none is installed."""
    if find() is None:
        pytest.skip("no Chromium here; Debian: apt-get install chromium")
    opened = Browser()
    yield opened
    opened.close()


def find() -> str | None:
    """Path of an installed Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """One page of one headless browser, without network."""

    def __init__(self) -> None:
        executable = find()
        assert executable is not None
        self.profile = tempfile.mkdtemp()
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()

        def fds() -> None:
            first, second = os.dup(to_child), os.dup(from_child)  # out of the way of 3 and 4
            os.dup2(first, 3)
            os.dup2(second, 4)

        self.process = subprocess.Popen(
            [executable, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--hide-scrollbars", f"--user-data-dir={self.profile}", "--window-size=1400,1000"],
            preexec_fn=fds, pass_fds=(3, 4, to_child, from_child), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._buffer = b""
        self._number = 0
        self.session = ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.call("Network.emulateNetworkConditions", **offline)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise RuntimeError("the browser ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: pathlib.Path, fragment: str = "") -> float:
        """Load a file and wait until the page says it is ready; seconds it took."""
        self.call("Page.navigate", url="about:blank")
        started = time.perf_counter()
        self.call("Page.navigate", url=path.resolve().as_uri() + (f"#{fragment}" if fragment else ""))
        self.wait("document.body && document.body.dataset.ready === 'true'")
        return time.perf_counter() - started

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript condition holds."""
        end = time.monotonic() + seconds
        while not self.js(f"!!({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def metric(self, name: str) -> float:
        """A counter of the page's main thread, such as ``TaskDuration`` in seconds."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == name)

    def press(self, key: str) -> None:
        """One key, as a user presses it."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "ArrowDown": 40}.get(key, ord(key[0]))
        for kind in ("keyDown", "keyUp"):
            extra = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: pathlib.Path) -> None:
        """The visible part of the page as PNG."""
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def requests(self) -> list[str]:
        """Addresses asked for so far, the page itself included."""
        self.js("0")
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console."""
        self.js("0")
        found = [e["params"]["entry"]["text"] for e in self.events if e.get("method") == "Log.entryAdded"]
        return found + [str(e["params"]) for e in self.events if e.get("method") == "Runtime.exceptionThrown"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.profile, ignore_errors=True)
