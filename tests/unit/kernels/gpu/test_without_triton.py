"""Where Triton is not installed, all but the kernels themselves can be imported, and a call says what is missing."""

import subprocess
import sys
import textwrap


def test_only_a_call_needs_triton():
    script = """
        import sys
        sys.modules["triton"] = None
        import torch
        from afd_server.kernels.gpu import attention, experts, fp8, rows
        from afd_server.kernels.gpu.device import what_is_missing
        print(what_is_missing(torch.device("cuda")))
        try:
            rows.add_rms_norm(torch.ones(1, 4), None, torch.ones(4), 1e-5)
        except ModuleNotFoundError as error:
            print(error.name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["Triton is not installed", "triton", ""]
