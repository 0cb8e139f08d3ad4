"""What this machine can do at most: bytes/s of reading memory and FLOP/s in float32, by threads. No kernel is faster.

    .venv/bin/python benchmarks/machine.py

Reading: the sum of a gigabyte, all threads together. Multiplying: independent multiply-adds that never leave the registers.
Both are machine.cpp, compiled for this CPU's widest vectors. Every other benchmark gives its speeds as a share of these,
measured in the same run, since they move with what else a shared machine does. The last line is JSON.
"""

from __future__ import annotations

import ctypes
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from afd_server.kernels.library import best_instruction_set, build
from afd_server.kernels.memory import allocate

READ_BYTES = 1 << 30
ROUNDS = 20_000_000 // 16
REPEATS = 5


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(best_instruction_set(), Path(__file__).with_suffix(".cpp"))))
    library.machine_read.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    library.machine_read.restype = ctypes.c_float
    library.machine_multiply.argtypes = (ctypes.c_long, ctypes.c_float, ctypes.c_long, ctypes.c_void_p)
    library.machine_multiply.restype = ctypes.c_double
    return library


def fastest_s(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some calls, after one that does not count: others may use the machine."""
    call()
    times_s = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started)
    return min(times_s)


@functools.cache
def _memory() -> torch.Tensor:
    return allocate(READ_BYTES).fill_(0)


def read_bytes_per_s(threads: int) -> float:
    memory = _memory()
    return READ_BYTES / fastest_s(lambda: _library().machine_read(memory.data_ptr(), READ_BYTES // 4, threads))


def flop_per_s(threads: int) -> float:
    sink = torch.zeros(threads)
    operations = threads * _library().machine_multiply(1, 0.5, threads, sink.data_ptr()) * ROUNDS
    return operations / fastest_s(lambda: _library().machine_multiply(ROUNDS, 0.5, threads, sink.data_ptr()))


def main() -> None:
    limits = {
        threads: {"bytes_per_s": read_bytes_per_s(threads), "flop_per_s": flop_per_s(threads)}
        for threads in sorted({1, torch.get_num_threads()})
    }
    for threads, limit in limits.items():
        print(
            f"{threads} threads: {limit['bytes_per_s'] / 1e9:.1f} GB/s, {limit['flop_per_s'] / 1e9:.0f} GFLOP/s"
        )
    print(json.dumps({"instruction_set": best_instruction_set(), "limits": limits}))


if __name__ == "__main__":
    main()
