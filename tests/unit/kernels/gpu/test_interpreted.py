"""The kernel tests of this folder in a process that interprets, wherever this one cannot: see conftest.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_pass_under_the_interpreter(interpreted):
    if interpreted:
        pytest.skip("this process interprets: the tests run in it")
    files = [
        Path(__file__).with_name(f"test_{name}.py")
        for name in ("attention", "experts", "rows", "operations", "graphs")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[4],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton compiles in this process" not in done.stdout
