"""The kernels compile for a Hopper GPU at the shapes of real models, without one: benchmarks/gpu/resources.py in a process of
its own, since this one interprets them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[4] / "benchmarks" / "gpu" / "resources.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_no_kernel_spills_and_all_fit_a_multiprocessor():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads(done.stdout.splitlines()[-1])["kernels"]
    of_step3 = {row["kernel"]: row["tensor_core"] for row in kernels if row["case"].startswith("Step-3")}
    assert {"partial_attention", "combine", "gate_up", "down", "quantize_rows", "add_rms_norm"} <= set(of_step3)
    large = [
        row
        for row in kernels
        if row["case"] in ("Step-3 attention, 128 requests", "Step-3 experts FP8, 2048 rows")
    ]
    assert {
        row["tensor_core"] for row in large if row["kernel"] in ("partial_attention", "gate_up", "down")
    } == {"wgmma"}
