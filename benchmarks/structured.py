"""What a JSON schema costs while decoding: the same server asked with and without one, in turns.

    .venv/bin/python benchmarks/structured.py [--clients 1 8] [--tokens 96] [--rounds 5] [--flags="..."]

A server (`afd serve`, 1 attention and 1 FFN worker unless --flags say otherwise) runs the default model. In each turn all
clients ask at once for the same number of tokens, freely (`ignore_eos`) or as an array of objects that is too long to end
before; who goes first changes from round to round. A prompt's time is taken off: tokens/s are from the first token on. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import sys
import time
from typing import Any

import httpx
from results import commit, machine
from servers import running, server

from afd_server.checkpoints.default_model import afd_home, default_model

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "address": {
                "type": "object",
                "properties": {"street": {"type": "string"}, "city": {"enum": ["Paris", "Rome", "Oslo"]}},
                "required": ["street", "city"],
            },
        },
        "required": ["name", "age", "address"],
    },
}
ASKED = {
    "free": {"ignore_eos": True},
    "schema": {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
}


async def ask(client: httpx.AsyncClient, url: str, number: int, tokens: int, more: dict[str, Any]) -> float:
    """Seconds from the first token to the last."""
    body = {
        "prompt": f"Here is list number {number} of people, as JSON:\n", "max_tokens": tokens, "temperature": 0.7,
        "seed": number, "stream": True, "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip
    first_at = last_at = 0.0
    count = 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if chunk["choices"]:
                    last_at = time.perf_counter()
                    first_at = first_at or last_at
                else:
                    count = chunk["usage"]["completion_tokens"]
    assert count == tokens, f"{count} tokens came where {tokens} were asked for"
    return last_at - first_at


async def turn(url: str, clients: int, tokens: int, kind: str) -> float:
    """Output tokens/s of all clients together, their first tokens aside."""
    async with httpx.AsyncClient(timeout=120) as client:
        times_s = await asyncio.gather(
            *(ask(client, url, each, tokens, ASKED[kind]) for each in range(clients))
        )
    return sum((tokens - 1) / seconds for seconds in times_s)


def measure(url: str, clients: int, tokens: int, rounds: int) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {kind: [] for kind in ASKED}
    for each in range(-1, rounds):
        order = list(ASKED) if each % 2 else list(reversed(ASKED))
        for kind in order:
            speed = asyncio.run(turn(url, clients, tokens, kind))
            if each >= 0:  # the first round warms up
                speeds[kind].append(speed)
    ratios = [bound / free for bound, free in zip(speeds["schema"], speeds["free"], strict=True)]
    return {
        "clients": clients, **{f"{kind}_tokens_per_s": statistics.median(all_) for kind, all_ in speeds.items()},
        "ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=96, help="of each output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flags", default="", help="of `afd serve`")
    arguments = parser.parse_args()
    model = default_model(afd_home())
    measured = []
    print(
        "| clients | free tok/s | with a schema tok/s | ratio, median (least to greatest) |\n| --- | --- | --- | --- |"
    )
    with running(server("afd", arguments.flags), model, "float32") as (url, _):
        for clients in arguments.clients:
            row = measure(url, clients, arguments.tokens, arguments.rounds)
            measured.append(row)
            print(
                f"| {clients} | {row['free_tokens_per_s']:.1f} | {row['schema_tokens_per_s']:.1f} | "
                f"{row['ratio']:.3f} ({row['least']:.3f} to {row['greatest']:.3f}) |",
                flush=True,
            )
    result = {
        "benchmark": "structured",
        "commit": commit(),
        "machine": machine(),
        "flags": shlex.split(arguments.flags),
    }
    print(json.dumps({**result, "tokens": arguments.tokens, "rows": measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
