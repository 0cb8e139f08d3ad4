"""`afd profile`: flags, the measurement with its progress, and the file.

What lives here: that. What does not: measuring (measure.py) and fitting (planner/fit.py).
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afd_server.checkpoints.find import find_model
from afd_server.command_line import Parser
from afd_server.config import DTYPES, KERNELS, QUANTIZATIONS, WIRE_DTYPES, ServeConfig
from afd_server.planner.fit import fit_times, mean_error
from afd_server.planner.model_config import read_counted_model
from afd_server.planner.profile_file import Profile, write_profile

CONTEXT = 8192


def parser() -> Parser:
    parser = Parser(
        prog="afd profile",
        description="Measure attention over requests and context, the FFN over rows and the wire between them, on one worker of each\n"
        "kind on this machine, and write what `afd plan`, `afd simulate` and `afd serve` take as --profile.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a Hugging Face directory, or what else `afd serve` takes")
    add("--out", type=Path, default=Path("profile.yaml"), metavar="FILE", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="auto", help="as of `afd serve`. Default: %(default)s")
    add("--quantization", choices=QUANTIZATIONS, help="as of `afd serve`")
    add("--kernels", choices=KERNELS, default="auto", help="as of `afd serve`. Default: %(default)s")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="as of `afd serve`. Default: %(default)s",
    )
    add("--transport", choices=("shm", "tcp"), default="shm", help="of the activations. Default: %(default)s")
    add("--wire-dtype", choices=WIRE_DTYPES, default="auto", help="as of `afd serve`. Default: %(default)s")
    add(
        "--max-num-seqs",
        type=int,
        default=64,
        metavar="N",
        help="measure up to so many requests. Default: %(default)s",
    )
    add(
        "--max-model-len",
        type=int,
        metavar="N",
        help=f"and up to so much context. Default: {CONTEXT}, or the model's",
    )
    return parser


def profile(argv: Sequence[str]) -> int:
    given = parser().parse_args(list(argv))
    from afd_server.cluster.own_ray import WORKER_ENVIRONMENT

    if any(os.environ.get(name) != value for name, value in WORKER_ENVIRONMENT.items()):
        # OpenMP reads its settings when it is loaded: once more, as a worker that Ray starts finds them.
        environment = {**os.environ, **WORKER_ENVIRONMENT}
        os.execve(sys.executable, [sys.executable, "-m", "afd_server", "profile", *argv], environment)
    return _measure_and_write(given)


def _measure_and_write(given: Any) -> int:
    from afd_server.cluster.layout import resolve
    from afd_server.models.families import read_model_spec
    from afd_server.profiling.measure import measure

    directory = find_model(given.model)
    spec = read_model_spec(directory)
    config = resolve(
        ServeConfig(
            model=given.model, dtype=given.dtype, quantization=given.quantization, kernels=given.kernels, device=given.device,
            transport=given.transport, wire_dtype=given.wire_dtype, max_num_seqs=given.max_num_seqs, micro_batches="1",
            max_model_len=given.max_model_len or min(CONTEXT, spec.max_position_embeddings),
        ), spec, directory,
    )  # fmt: skip
    samples = measure(config, spec, _show_progress)
    times = fit_times(samples, read_counted_model(directory))
    error = mean_error(times, samples)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_profile(Profile(given.model, machine(config.device), now, error, times), given.out)
    print(f"{given.out}: {len(samples)} kinds of steps, fitted to {error:.1%} on average")
    return 0


def _show_progress(done: int, total: int) -> None:
    end = "\n" if done == total else "\r"
    if sys.stderr.isatty() or done == total:
        print(f"measuring, {done} of {total}", end=end, file=sys.stderr, flush=True)


def machine(device: str) -> str:
    """The processor, or the GPU where the workers run on one."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores"
