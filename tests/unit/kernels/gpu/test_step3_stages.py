"""benchmarks/gpu/step3_stages.py as far as it goes without a GPU: its checks, interpreted, and what it says else."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[4] / "benchmarks" / "gpu" / "step3_stages.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_its_checks_pass_under_the_interpreter():
    done = run("--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["device"] == "interpreter"
    names = [check["name"] for check in report["checks"]]
    assert len(names) == len(set(names)) == 7
    assert all(0 <= check["distance"] < 1e-2 for check in report["checks"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do():
    done = run()
    assert done.returncode == 1
    assert (
        done.stderr.strip() == "no CUDA device here: step3_stages.py --interpret checks the kernels without one"
    )
