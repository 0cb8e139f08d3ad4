"""Load on a running server, against a promise: how many tokens a second, and how many requests kept their TPOT.

    .venv/bin/python benchmarks/load.py --url http://127.0.0.1:8000 --concurrency 1 8 32 --tpot-ms 100

Each of the concurrent clients sends one request after the other, streams the answer, and notes when its pieces come.
TTFT is the time to the first token, TPOT the mean time between a request's later tokens. A request is within the
promise when its TPOT is. The last line is JSON. Speeds say something only beside another measurement of the same run:
versus.py takes its own with the functions of this file.
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import httpx

WORDS = (
    "stone", "river", "light", "seven", "market", "green", "paper", "window", "cloud", "engine", "north", "silver",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What each client does. rounds: requests of a client, one after the other. input_words: about as many tokens.

    tpot_ms: the promise. ignore_eos: ask for it by name; off for servers that refuse a field they do not know.
    """

    rounds: int = 2
    input_words: int = 64
    output_tokens: int = 64
    tpot_ms: float = 100.0
    timeout_s: float = 600.0
    seed: int = 0
    ignore_eos: bool = True


@dataclass(frozen=True)
class Sample:
    """One request: seconds, and tokens of the prompt and the output."""

    ttft_s: float
    tpot_s: float
    input_tokens: int
    tokens: int


@dataclass(frozen=True)
class Result:
    """One concurrency: rates per second, times in milliseconds, the share of requests within the promise."""

    concurrency: int
    requests: int
    input_tokens: int  # of all requests
    output_tokens: int  # of all requests
    output_tokens_per_s: float
    input_tokens_per_s: (
        float  # prompts read, over the same time: the speed of prefill where one token is asked for
    )
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    within_tpot: float


class RefusedError(RuntimeError):
    """The server's answer is not the one asked for. status: of HTTP."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body}")
        self.status = status


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the others do not exceed, without interpolation."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def one_request(client: httpx.AsyncClient, model: str, prompt: str, load: Load) -> Sample:
    """Streams one completion of exactly load.output_tokens tokens. Raises httpx.HTTPError or RuntimeError."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": load.output_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if load.ignore_eos:
        body["ignore_eos"] = True
    started = time.perf_counter()
    first = last = 0.0
    usage: dict[str, int] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RefusedError(response.status_code, (await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            last = time.perf_counter()
            first = first or last
            usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    if usage.get("completion_tokens") != load.output_tokens:
        raise RuntimeError(f"asked for {load.output_tokens} tokens, the server's last word is usage {usage}")
    tpot_s = (last - first) / max(1, load.output_tokens - 1)
    return Sample(first - started, tpot_s, usage["prompt_tokens"], load.output_tokens)


def make_prompt(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


async def measure(url: str, key: str | None, concurrency: int, load: Load) -> Result:
    """All requests of one concurrency, each with a prompt of its own. The same load and concurrency, the same prompts."""
    generator = random.Random(f"{load.seed} {concurrency}")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    samples: list[Sample] = []
    # A connection for each request: some servers close one after an answer just when the next request goes out on it.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=load.timeout_s, limits=limits
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one_client() -> None:
            for _ in range(load.rounds):
                prompt = make_prompt(generator, load.input_words)
                samples.append(await one_request(client, model, prompt, load))

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
        input_tokens=sum(sample.input_tokens for sample in samples),
        output_tokens=sum(sample.tokens for sample in samples),
        output_tokens_per_s=round(sum(sample.tokens for sample in samples) / elapsed_s, 1),
        input_tokens_per_s=round(sum(sample.input_tokens for sample in samples) / elapsed_s, 1),
        ttft_p50_ms=round(percentile(ttft_ms, 0.5), 1),
        ttft_p99_ms=round(percentile(ttft_ms, 0.99), 1),
        tpot_p50_ms=round(percentile(tpot_ms, 0.5), 1),
        tpot_p99_ms=round(percentile(tpot_ms, 0.99), 1),
        within_tpot=round(sum(tpot <= load.tpot_ms for tpot in tpot_ms) / len(samples), 3),
    )


async def warm_up(url: str, key: str | None, load: Load) -> None:
    """One request whose prompt is not measured again: the first one pays for first touches."""
    await measure(url, key, 1, replace(load, rounds=1, seed=load.seed + 1_000_000))


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
    parser.add_argument(
        "--rounds", type=int, default=Load.rounds, help="requests of each client, one after the other"
    )
    parser.add_argument(
        "--input-words", type=int, default=Load.input_words, help="words of a prompt, about as many tokens"
    )
    parser.add_argument("--output-tokens", type=int, default=Load.output_tokens)
    parser.add_argument(
        "--tpot-ms", type=float, default=Load.tpot_ms, help="the promise: time per output token"
    )
    parser.add_argument("--timeout-s", type=float, default=Load.timeout_s)
    parser.add_argument("--seed", type=int, default=Load.seed)
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=Load.ignore_eos)
    arguments = parser.parse_args()
    load = Load(**{field.name: getattr(arguments, field.name) for field in fields(Load)})
    print(
        f"{'clients':>7} {'tok/s':>8} {'TTFT p50':>9} {'p99':>8} {'TPOT p50':>9} {'p99':>8}   within {arguments.tpot_ms:g} ms"
    )
    asyncio.run(warm_up(arguments.url, arguments.api_key, load))
    results = []
    for concurrency in arguments.concurrency:
        result = asyncio.run(measure(arguments.url, arguments.api_key, concurrency, load))
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
