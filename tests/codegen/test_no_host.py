"""No operator of a decode step waits for the device: ``pretended_gpu.py``, in a process of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that a GPU is there")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_operators_of_a_decode_step_do_not_wait_for_the_device():
    command = [sys.executable, "-m", "pytest", str(HERE / "pretended_gpu.py"), "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 19, done.stdout
    assert "skipped" not in done.stdout
