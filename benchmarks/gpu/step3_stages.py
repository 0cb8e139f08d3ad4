"""One layer of Step-3 on one GPU at its real shapes: checked against plain torch, then timed as shares of the device's limits.

    .venv/bin/python benchmarks/gpu/step3_stages.py                # needs a CUDA device, takes minutes
    .venv/bin/python benchmarks/gpu/step3_stages.py --interpret    # the checks alone, at small shapes, on any machine

An attention worker has 128 requests of 4K and 8K tokens; an FFN worker is one of 16 with 3 experts of 48 each, and gets what
falls to it of 2048 tokens. Weights are random. Every stage is a CUDA graph, and its share is of the time that the device needs at
least: max(bytes / (bytes/s), operations / (FLOP/s)), both measured in this call. 272 us is what a stage may take per layer in the
paper (arXiv 2507.19427: 50 ms per token, 61 layers, 3 stages). The package need not be installed with its dependencies: torch,
Triton and NumPy are enough (pip install --no-deps). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from checks import LIMIT, run_checks
from overlap import two_processes_s, two_streams_s
from step3 import FFN_SEED, SMALL, STEP3, AttentionPart, FFNStep, random_on
from timing import Limits, captured_s, measure_limits

from afd_server.kernels.gpu.attention import AttentionTile, paged_decode_attention
from afd_server.kernels.gpu.experts import ProductTile
from afd_server.models.operations_gpu import GPUOperations

PAPER_STAGE_US = 272
Tile = TypeVar("Tile")


@dataclass(frozen=True, slots=True)
class Stage:
    """share: of the time that the limits leave; bound: which of them that is. how: the fastest of the tiles tried."""

    name: str
    us: float
    gb_per_s: float
    tflop_per_s: float
    share: float
    bound: str
    how: str = ""


class Report:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.stages: list[Stage] = []
        fp8 = "unknown" if limits.fp8_flop_per_s is None else f"{limits.fp8_flop_per_s / 1e12:.0f}"
        print(f"limits: read {limits.read_bytes_per_s / 1e9:.0f} GB/s, copy {limits.copy_bytes_per_s / 1e9:.0f} GB/s, "
              f"cuBLAS bfloat16 {limits.bf16_flop_per_s / 1e12:.0f} TFLOP/s, FP8 {fp8} TFLOP/s")  # fmt: skip
        print(f"{'stage':<42} {'us':>8} {'GB/s':>7} {'TFLOP/s':>8} {'share':>6} of bound by")

    def add(
        self,
        name: str,
        seconds: float,
        num_bytes: float,
        operations: float,
        *,
        fp8: bool = False,
        how: str = "",
    ) -> None:
        flop_per_s = (self.limits.fp8_flop_per_s if fp8 else None) or self.limits.bf16_flop_per_s
        least = {"bytes": num_bytes / self.limits.bytes_per_s, "FLOP": operations / flop_per_s}
        bound = max(least, key=least.__getitem__)
        stage = Stage(
            name, round(seconds * 1e6, 1), round(num_bytes / seconds / 1e9, 1),
            round(operations / seconds / 1e12, 1), round(least[bound] / seconds, 3), bound, how,
        )  # fmt: skip
        self.stages.append(stage)
        print(f"{name:<42} {stage.us:>8} {stage.gb_per_s:>7} {stage.tflop_per_s:>8} {stage.share:>6} {bound:<8} {how}",
              flush=True)  # fmt: skip


def fastest(call: Callable[[Tile | None], object], tiles: Sequence[Tile | None]) -> tuple[float, str]:
    """Seconds, and with which tile; None is the one that the kernels choose."""
    return min((captured_s(partial(call, tile)), "chosen" if tile is None else str(tile)) for tile in tiles)


def time_attention(report: Report, device: torch.device) -> None:

    tiles = (None, AttentionTile(64, 64, 8, 3), AttentionTile(64, 32, 4, 3), AttentionTile(64, 32, 8, 3))
    for context in STEP3.contexts:
        part = AttentionPart(STEP3, context, random_on(device), GPUOperations(torch.bfloat16))
        query = random_on(device)(STEP3.requests, STEP3.num_heads, STEP3.head_dim)

        def attend(
            tile: AttentionTile | None, part: AttentionPart = part, query: torch.Tensor = query
        ) -> object:
            tables, lengths = part.batch.block_tables, part.batch.lengths
            return paged_decode_attention(query, part.cache, tables, lengths, 1 / 16, tile=tile)

        cache_bytes = part.cache.numel() * part.cache.element_size()
        operations = 4 * STEP3.requests * context * STEP3.num_heads * STEP3.head_dim
        seconds, how = fastest(attend, tiles)
        report.add(f"decode attention, {STEP3.requests} x {context}", seconds, cache_bytes, operations, how=how)
        matrices = part.bytes_moved() - cache_bytes
        operations += STEP3.requests * matrices  # 2 bytes and 2 operations for each weight
        seconds = captured_s(part.forward)
        report.add(f"attention part, {STEP3.requests} x {context}", seconds, part.bytes_moved(), operations)


def time_ffn(report: Report, device: torch.device) -> None:

    wide = ProductTile(128, 64, 64, 8, 3, programs=2), ProductTile(128, 128, 64, 8, 3, programs=2)
    one_program = ProductTile(64, 128, 64, 8, 3), ProductTile(64, 128, 64, 8, 3)
    fp8_tiles = ProductTile(64, 128, 128, 8, 4), ProductTile(64, 128, 128, 8, 4)
    for fp8, tiles in ((False, (None, wide, one_program)), (True, (None, fp8_tiles))):
        step = FFNStep(STEP3, random_on(device, FFN_SEED), fp8=fp8)
        seconds, how = fastest(step.forward, tiles)
        name = f"FFN step, {'FP8' if fp8 else 'bfloat16'}, {len(step.x)} rows"
        report.add(name, seconds, step.bytes_moved(), step.operations(), fp8=fp8, how=how)
        del step


def time_both(device: torch.device) -> dict[str, Any]:
    """Two parts at once. A part of this that the machine does not allow is said, and leaves the rest."""

    operations = GPUOperations(torch.bfloat16)
    attention = [AttentionPart(STEP3, STEP3.contexts[0], random_on(device), operations) for _ in range(2)]
    ffn = FFNStep(STEP3, random_on(device, FFN_SEED), fp8=False)
    results: dict[str, Any] = {"two_streams": two_streams_s(attention, ffn)}
    try:
        results["two_processes"] = two_processes_s(attention, ffn, STEP3, fp8=False)
    except (RuntimeError, OSError) as error:
        results["two_processes_failed"] = str(error)
    print(f"per layer and micro-batch, {STEP3.contexts[0]} tokens, bfloat16:")
    for name, times in results.items():
        said = (
            times
            if isinstance(times, str)
            else ", ".join(f"{k[:-2].replace('_', ' ')} {v * 1e6:.0f} us" for k, v in times.items())
        )
        print(f"  {name.replace('_', ' ')}: {said}")
    return results


def check(device: torch.device, *, small: bool) -> list[dict[str, Any]]:
    checks = run_checks(SMALL if small else STEP3, device)
    for done in checks:
        print(f"{done.name:<42} {done.distance:.1e} from plain torch{'' if done.passes() else '  WRONG'}")
    if not all(done.passes() for done in checks):
        sys.exit(f"a kernel is more than {LIMIT} away from plain torch")
    return [asdict(done) for done in checks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--interpret", action="store_true", help="check small shapes under Triton's interpreter, without a GPU"
    )
    interpret = parser.parse_args().interpret
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is not imported yet
        checked = check(torch.device("cpu"), small=True)
        print(json.dumps({"device": "interpreter", "checks": checked}))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: step3_stages.py --interpret checks the kernels without one")

    device = torch.device("cuda", torch.cuda.current_device())
    checked = check(device, small=False)
    report = Report(measure_limits(device))
    time_attention(report, device)
    time_ffn(report, device)
    together = time_both(device)
    print(f"the paper's stage: {PAPER_STAGE_US} us per layer")
    print(json.dumps({
        "device": torch.cuda.get_device_name(device), "torch": torch.__version__, "checks": checked,
        "limits": asdict(report.limits), "stages": [asdict(stage) for stage in report.stages],
        "together": together, "paper_stage_us": PAPER_STAGE_US,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
