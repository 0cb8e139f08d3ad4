"""Clocks for a CUDA device: the time of a captured call, and what the device can do at most, measured where it is used."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UPS, REPLAYS = 3, 20
WARM_UP_S = 0.05  # of replays before the first that counts: an idle device's clocks need it
SWEEP_BYTES = 1 << 31  # far beyond any cache
GEMM_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Limits:
    """bytes_per_s: the best of reading and of copying (counting both ways). fp8_flop_per_s: None where torch cannot."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    bf16_flop_per_s: float
    fp8_flop_per_s: float | None

    @property
    def bytes_per_s(self) -> float:
        return max(self.read_bytes_per_s, self.copy_bytes_per_s)


def capture(call: Callable[[], object], stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    """The call as a graph. It runs a few times before, so that everything it compiles and allocates is there."""
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    torch.cuda.synchronize()
    return graph


def replay_s(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds on the device of one replay, the median of some."""
    warm_at = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm_at:
        graph.replay()
        torch.cuda.synchronize()
    times_ms = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times_ms.append(start.elapsed_time(stop))
    return statistics.median(times_ms) / 1e3


def captured_s(call: Callable[[], object]) -> float:
    return replay_s(capture(call))


def measure_limits(device: torch.device) -> Limits:
    read_bytes_per_s, copy_bytes_per_s = _bytes_per_s(device)
    a, b = (torch.empty(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    bf16_flop_per_s = 2 * GEMM_SIZE**3 / captured_s(lambda: a @ b)
    return Limits(read_bytes_per_s, copy_bytes_per_s, bf16_flop_per_s, _fp8_flop_per_s(a, b))


def _bytes_per_s(device: torch.device) -> tuple[float, float]:
    """Of reading alone, and of copying, where each byte counts twice."""
    source = torch.empty(SWEEP_BYTES // 4, device=device).normal_()
    target = torch.empty_like(source)
    copy_s, read_s = captured_s(lambda: target.copy_(source)), captured_s(lambda: source.sum())
    return SWEEP_BYTES / read_s, 2 * SWEEP_BYTES / copy_s


def _fp8_flop_per_s(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Of cuBLAS with one scale a matrix; torch has no public name for it."""
    one = torch.ones((), device=a.device)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)

    def multiply() -> object:
        return torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    try:
        return 2 * GEMM_SIZE**3 / captured_s(multiply)
    except (RuntimeError, TypeError, AttributeError) as error:
        print(f"no FP8 product to compare with: {error}")
        return None
