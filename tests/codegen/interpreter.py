"""Cases of kernels for Triton's interpreter, in one child process.

The interpreter must be chosen (TRITON_INTERPRET=1) before Triton is imported, hence a process of its own. A file of
cases is started as a script and calls :func:`serve`; a test module imports the same file as ``cases`` and takes the
fixture ``interpreted``. In the child, torch fills uninitialised memory with NaN (whole numbers: with the largest).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Run = Callable[..., None]


def serve(cases: Mapping[str, Any]) -> None:
    """Reads `[case, arguments]` lines, answers each with its traceback or null."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    np.seterr(all="ignore")  # the rows that overflow on purpose
    torch.utils.deterministic.fill_uninitialized_memory = True
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            torch.manual_seed(0)
            cases[name](**arguments)
            answer = None
        except Exception:
            answer = traceback.format_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@contextlib.contextmanager
def start(script: Path, cache: Path) -> Iterator[Run]:
    """A function that runs a `case_*` function of `script` in the child process; its failure is the test's failure."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "FXOPT_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=environment, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as child:  # fmt: skip
        stdin, stdout = child.stdin, child.stdout
        assert stdin is not None
        assert stdout is not None

        def run(case: Callable[..., None], **arguments: Any) -> None:
            stdin.write(json.dumps([case.__name__, arguments]) + "\n")
            stdin.flush()
            answer = stdout.readline()
            if not answer:
                pytest.fail(f"the interpreter process ended with code {child.wait()}")
            if failure := json.loads(answer):
                pytest.fail(failure)

        yield run
        stdin.close()
