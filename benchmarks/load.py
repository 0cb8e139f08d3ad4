"""Load on a running server, against a promise: how many tokens a second, and how many requests kept their TPOT.

    .venv/bin/python benchmarks/load.py --url http://127.0.0.1:8000 --concurrency 1 8 32 --tpot-ms 100

Each of the concurrent clients sends one request after the other, streams the answer, and notes when its pieces come.
TTFT is the time to the first token, TPOT the mean time between a request's later tokens. A request is within the
promise when its TPOT is. The last line is JSON. Speeds say something only beside another measurement of the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

WORDS = (
    "stone", "river", "light", "seven", "market", "green", "paper", "window", "cloud", "engine", "north", "silver",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One request: seconds, and output tokens."""

    ttft_s: float
    tpot_s: float
    tokens: int


@dataclass(frozen=True)
class Result:
    """One concurrency: rates per second, times in milliseconds, the share of requests within the promise."""

    concurrency: int
    requests: int
    output_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    within_tpot: float


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the others do not exceed, without interpolation."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def one_request(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Sample:
    """Streams one completion of exactly max_tokens tokens. Raises httpx.HTTPError or RuntimeError."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started = time.perf_counter()
    first = last = 0.0
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            last = time.perf_counter()
            first = first or last
            usage = json.loads(line.removeprefix("data: ")).get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
    return Sample(first - started, (last - first) / max(1, tokens - 1), tokens)


def make_prompt(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


async def measure(url: str, key: str | None, concurrency: int, arguments: argparse.Namespace) -> Result:
    """All requests of one concurrency, each with a prompt of its own."""
    generator = random.Random(arguments.seed + concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    samples: list[Sample] = []
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=arguments.timeout_s) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one_client() -> None:
            for _ in range(arguments.rounds):
                prompt = make_prompt(generator, arguments.input_words)
                samples.append(await one_request(client, model, prompt, arguments.output_tokens))

        started = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(one_client())
        elapsed_s = time.perf_counter() - started
    ttft_ms = [sample.ttft_s * 1e3 for sample in samples]
    tpot_ms = [sample.tpot_s * 1e3 for sample in samples]
    return Result(
        concurrency=concurrency,
        requests=len(samples),
        output_tokens_per_s=round(sum(sample.tokens for sample in samples) / elapsed_s, 1),
        ttft_p50_ms=round(percentile(ttft_ms, 0.5), 1),
        ttft_p99_ms=round(percentile(ttft_ms, 0.99), 1),
        tpot_p50_ms=round(percentile(tpot_ms, 0.5), 1),
        tpot_p99_ms=round(percentile(tpot_ms, 0.99), 1),
        within_tpot=round(sum(tpot <= arguments.tpot_ms for tpot in tpot_ms) / len(samples), 3),
    )


def commit() -> str:
    """The commit that is measured, with a + when the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return (name.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client, one after the other")
    parser.add_argument("--input-words", type=int, default=64, help="words of a prompt, about as many tokens")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--tpot-ms", type=float, default=100.0, help="the promise: time per output token")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        f"{'clients':>7} {'tok/s':>8} {'TTFT p50':>9} {'p99':>8} {'TPOT p50':>9} {'p99':>8}   within {arguments.tpot_ms:g} ms"
    )
    asyncio.run(
        measure(arguments.url, arguments.api_key, 1, arguments)
    )  # the first request pays for first touches
    results = []
    for concurrency in arguments.concurrency:
        result = asyncio.run(measure(arguments.url, arguments.api_key, concurrency, arguments))
        results.append(asdict(result))
        print(f"{result.concurrency:>7} {result.output_tokens_per_s:>8} {result.ttft_p50_ms:>9} {result.ttft_p99_ms:>8} "
              f"{result.tpot_p50_ms:>9} {result.tpot_p99_ms:>8}   {result.within_tpot:.0%}", flush=True)  # fmt: skip
    print(json.dumps({
        "commit": commit(), "cores": os.cpu_count(), "machine": platform.machine(), "tpot_ms": arguments.tpot_ms,
        "input_words": arguments.input_words, "output_tokens": arguments.output_tokens, "results": results,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
