"""What the split costs on one host: the split server and the same engine undivided, in turns, through HTTP.

    .venv/bin/python benchmarks/split_cost.py /tmp/small [--rounds 5] [--split="--micro-batches auto"]

Split is one attention and one FFN worker as Ray actors, joined by shared memory. Undivided is one process whose engine
thread runs both halves (`--executor local --transport direct`). Both servers live through the whole run, for one without
requests takes no processor time; the load goes A B, B A, A B ..., the same prompts to both in a round. So what slows the
machine down for a while slows both, and a ratio is of two turns that follow one another. Above 1 the split is faster. The
undivided server's front-end shares its process, and so Python's lock, with the engine; the split one's does not.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from comparison import agreement, ratio
from load import Load, Result, measure, warm_up
from results import commit
from servers import complete, running, server

UNDIVIDED = "--executor local --transport direct --micro-batches 1"
DTYPE = "float32"
PROMPT, TEXT_TOKENS = "stone river light seven market green paper window", 16


def take_turns(urls: dict[str, str], concurrencies: list[int], rounds: int, load: Load) -> dict[int, Any]:
    """Concurrency -> server -> its results, round by round."""
    results: dict[int, dict[str, list[Result]]] = {
        concurrency: {name: [] for name in urls} for concurrency in concurrencies
    }
    print(f"{'round':>5} {'clients':>7} {'tok/s':>8} {'TTFT p50':>9} {'TPOT p50':>9}")
    for round_ in range(rounds):
        seeded = Load(load.rounds, load.input_words, load.output_tokens, seed=round_)
        for concurrency in concurrencies:
            for name in list(urls) if round_ % 2 == 0 else reversed(urls):
                result = measure(urls[name], None, concurrency, seeded)
                results[concurrency][name].append(result)
                print(f"{round_:>5} {concurrency:>7} {result.output_tokens_per_s:>8} {result.ttft_p50_ms:>9} "
                      f"{result.tpot_p50_ms:>9}   {name}", flush=True)  # fmt: skip
    return results


def report(results: dict[str, list[Result]]) -> dict[str, Any]:
    """Throughput and time per token: each server's own by round, and split over undivided."""
    split, undivided = results["split"], results["undivided"]
    return {
        "tokens_per_s": {
            name: [result.output_tokens_per_s for result in taken] for name, taken in results.items()
        },
        "throughput_ratio": ratio(
            [result.output_tokens_per_s for result in split],
            [result.output_tokens_per_s for result in undivided],
        ),
        # Undivided over split here, so that above 1 is again the faster split.
        "tpot_ratio": ratio(
            [result.tpot_p50_ms for result in undivided], [result.tpot_p50_ms for result in split]
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint; checkpoints.py writes some")
    parser.add_argument("--split", default="", metavar="FLAGS", help="further flags of the split server")
    parser.add_argument(
        "--undivided", default="", metavar="FLAGS", help="further flags of the undivided server"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-words", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped too
    load = Load(1, arguments.input_words, arguments.output_tokens)
    flags = {
        "split": f"--transport shm {arguments.split}",
        "undivided": f"{UNDIVIDED} {arguments.undivided}",
    }
    with (
        running(server("afd", flags["split"]), arguments.model, DTYPE) as (split_url, _),
        running(server("afd", flags["undivided"]), arguments.model, DTYPE) as (undivided_url, _),
    ):
        urls = {"split": split_url, "undivided": undivided_url}
        texts = [complete(url, PROMPT, TEXT_TOKENS, True) for url in urls.values()]
        if agreement(*texts) == 0.0:
            raise RuntimeError(f"not the same model: {texts[0]!r} and {texts[1]!r}")
        for url in urls.values():
            warm_up(url, None, load)
        results = take_turns(urls, arguments.concurrency, arguments.rounds, load)
    reports = {concurrency: report(taken) for concurrency, taken in results.items()}
    print(f"\n{'clients':>7}{'throughput, split / undivided':>40}{'time per token, undivided / split':>42}")
    for concurrency, each in reports.items():
        columns = [f"{ratios['median']:.3f} ({ratios['min']:.3f} to {ratios['max']:.3f})"
                   for ratios in (each["throughput_ratio"], each["tpot_ratio"])]  # fmt: skip
        print(f"{concurrency:>7}{columns[0]:>40}{columns[1]:>42}")
    print(json.dumps({
        "benchmark": "split_cost", "commit": commit(), "cores": os.cpu_count(), "model": arguments.model.name,
        "flags": flags, "rounds": arguments.rounds, "input_words": arguments.input_words,
        "output_tokens": arguments.output_tokens, "results": reports,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
