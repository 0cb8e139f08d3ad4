"""The sampler alone: microseconds from a step's logits to its tokens, by rows, vocabulary and kind of request.

    .venv/bin/python benchmarks/sampling.py

The logits are language-like: most tokens around nothing, some tens of them far above. "flat" has no such tokens, as the
random checkpoints of checkpoints.py may be: the worst case for a sampler that looks at the likely tokens first. It
computes on one thread. The best and the median of the calls are shown, since others may use the machine. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from afd_server.attention.sampler import Sampler
from afd_server.types import SamplingParams, StartedRequest

KINDS = {
    "greedy": SamplingParams(1, temperature=0.0),
    "default model": SamplingParams(1, temperature=0.2, top_p=0.9),
    "top_p": SamplingParams(1, temperature=1.0, top_p=0.9),
    "top_k, top_p": SamplingParams(1, temperature=0.7, top_k=20, top_p=0.8),
    "min_p": SamplingParams(1, temperature=1.0, min_p=0.05),
    "whole": SamplingParams(1, temperature=1.0),
    "flat, top_p": SamplingParams(1, temperature=1.0, top_p=0.9),
}


def make_logits(num_rows: int, vocab_size: int, flat: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    logits_NV = torch.randn(num_rows, vocab_size, generator=generator)
    if not flat:
        logits_NV *= 2
        likely = torch.randint(0, vocab_size, (num_rows, 40), generator=generator)
        logits_NV.scatter_add_(1, likely, torch.linspace(2, 14, 40).expand(num_rows, -1))
    return logits_NV


def call_times_s(kind: str, num_rows: int, vocab_size: int, seconds: float) -> list[float]:
    """The times of as many calls as fit into `seconds`, three at least, after one that does not count."""
    logits_NV = make_logits(num_rows, vocab_size, flat=kind.startswith("flat"))
    sampler = Sampler(vocab_size, [0], torch.device("cpu"))
    names = [str(row) for row in range(num_rows)]
    for name in names:
        sampler.start(StartedRequest(name, (1,), (), KINDS[kind]))
    sampler.sample(names, logits_NV)
    times_s: list[float] = []
    until = time.perf_counter() + seconds
    while len(times_s) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        sampler.sample(names, logits_NV)
        times_s.append(time.perf_counter() - started)
    return times_s


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each line")
    arguments = parser.parse_args()
    print(f"{'kind':<14} {'vocabulary':>10} {'rows':>5} {'best us':>9} {'median us':>10}")
    results = []
    for kind in KINDS:
        for vocab_size in arguments.vocabulary:
            for num_rows in arguments.rows:
                times_s = call_times_s(kind, num_rows, vocab_size, arguments.seconds)
                best_us, median_us = min(times_s) * 1e6, statistics.median(times_s) * 1e6
                print(
                    f"{kind:<14} {vocab_size:>10} {num_rows:>5} {best_us:>9.0f} {median_us:>10.0f}", flush=True
                )
                results.append({
                    "kind": kind, "vocabulary": vocab_size, "rows": num_rows,
                    "best_us": round(best_us, 1), "median_us": round(median_us, 1),
                })  # fmt: skip
    print(json.dumps({"results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
