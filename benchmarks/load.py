"""The load that the scripts of this folder put on a server, and the numbers they report of it. What puts it on is `afd bench`'s
generator (afd_server/bench); a person measures a running server with `afd bench serve`.

Each of the concurrent clients sends one request after the other, every one with a prompt of its own. A request that fails, or
whose answer is shorter than asked for, ends the measurement: speeds are compared, so all servers have to do the same work.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from afd_server.bench.client import Client, Target
from afd_server.bench.dataset import Prompt, words
from afd_server.bench.generator import Limits, run, schedule
from afd_server.bench.outcome import Outcome
from afd_server.bench.session import run_to_end
from afd_server.bench.statistics import times_ms


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
class Result:
    """One concurrency: rates per second, times in milliseconds, the share of requests within the promise."""

    concurrency: int
    requests: int
    input_tokens: int  # of all requests
    output_tokens: int  # of all requests
    output_tokens_per_s: float
    # Prompts read, over the same time: the speed of prefill where one token is asked for.
    input_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    within_tpot: float


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the others do not exceed, without interpolation."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@asynccontextmanager
async def client_of(
    url: str, key: str | None = None, *, timeout_s: float = 600.0, ignore_eos: bool = True
) -> AsyncIterator[Client]:
    """A client that asks the server's first model for greedy answers. Raises BenchError."""
    fields = {"temperature": 0, **({"ignore_eos": True} if ignore_eos else {})}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A connection for each request: some servers close one after an answer just when the next request goes out on it.
    target = Target(url, headers=headers, fields=fields, timeout_s=timeout_s, keep_alive=False)
    async with Client(target) as client:
        client.target = replace(target, model=await client.first_model())
        yield client


async def measured(url: str, key: str | None, concurrency: int, load: Load) -> Result:
    generator = random.Random(f"{load.seed} {concurrency}")
    prompts = [
        Prompt(words(load.input_words, generator), load.output_tokens) for _ in range(concurrency * load.rounds)
    ]
    async with client_of(url, key, timeout_s=load.timeout_s, ignore_eos=load.ignore_eos) as client:
        done = await run(client, schedule(prompts, float("inf")), Limits(concurrency))
    for outcome in done.outcomes:
        check(outcome, load.output_tokens)
    times = times_ms(done.outcomes)
    tpots_ms = [1e3 * outcome.tpot_s for outcome in done.outcomes]
    input_tokens = sum(outcome.input_tokens for outcome in done.outcomes)
    output_tokens = sum(outcome.output_tokens for outcome in done.outcomes)
    return Result(
        concurrency=concurrency,
        requests=len(done.outcomes),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        output_tokens_per_s=round(output_tokens / done.duration_s, 1),
        input_tokens_per_s=round(input_tokens / done.duration_s, 1),
        ttft_p50_ms=round(percentile(times["ttft"], 0.5), 1),
        ttft_p99_ms=round(percentile(times["ttft"], 0.99), 1),
        tpot_p50_ms=round(percentile(tpots_ms, 0.5), 1),
        tpot_p99_ms=round(percentile(tpots_ms, 0.99), 1),
        within_tpot=round(sum(tpot_ms <= load.tpot_ms for tpot_ms in tpots_ms) / len(tpots_ms), 3),
    )


def check(outcome: Outcome, output_tokens: int) -> None:
    """Raises RuntimeError."""
    if not outcome.is_complete:
        raise RuntimeError(f"a request failed: {outcome.error}: {outcome.message}")
    if outcome.output_tokens != output_tokens:
        raise RuntimeError(f"asked for {output_tokens} tokens, the server counts {outcome.output_tokens}")


def measure(url: str, key: str | None, concurrency: int, load: Load) -> Result:
    """All requests of one concurrency. The same load and concurrency, the same prompts. Raises RuntimeError, BenchError."""
    return run_to_end(lambda: measured(url, key, concurrency, load))


def warm_up(url: str, key: str | None, load: Load) -> None:
    """One request whose prompt is not measured again: the first one pays for first touches."""
    measure(url, key, 1, replace(load, rounds=1, seed=load.seed + 1_000_000))
