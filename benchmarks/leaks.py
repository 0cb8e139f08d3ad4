"""Does anything grow? Short requests by the thousand, a part of them left in mid-stream, and what every process holds.

    .venv/bin/python benchmarks/checkpoints.py micro /tmp/micro
    .venv/bin/python benchmarks/leaks.py /tmp/micro --requests 20000 --concurrency 16

Starts the server, asks it in all the ways that clients have (whole answers, streams, several choices, log-probabilities, bodies
that are refused, streams that the client leaves), and every so often lets it come to rest and looks at each of its
processes, Ray's too: its own memory (what no file backs), descriptors, threads, and the entries of /dev/shm. The first
--warm-up requests are not fitted: caches fill, allocators settle. Of the rest the slope is fitted (least squares), in
kilobytes for a thousand requests. It ends with 1 when a slope is above its bound or descriptors, threads or shared memory have
grown. The last line is JSON.

Two bounds. A request that is lost keeps kilobytes in each of the server's own processes, which --bound-kb finds. What they may grow
by all the same has an end: the views of 64 call sizes for each link, the names of cached blocks until every block has one,
pages of the KV cache that are written for the first time, and memory that allocators keep free for each thread (with as
many objects and the heap in use equal to 0.3 MB, glibc had 1.5 MB more of it after 6,000 requests). Ray's own processes hear
of no request; they grow with time, idle too (their connections' buffers; 15 to 50 kilobytes a second at first, and ever less),
so --ray-bound-kb is wide.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil
from memory import status
from results import commit, machine
from servers import family, running, server

from afd_server.bench.dataset import WORDS

REST_TIMEOUT_S = 60.0
OWN = ("afd serve", "ray::AttentionActor", "ray::FFNActor")
# Between two looks whether everything that was asked for has ended.
POLL_S = 0.05
# The KV cache's pages are taken when they are first written, until all of it is in use: here within the warm-up.
SMALL_CACHE = "--kv-cache-memory-bytes 16000000"


@dataclass(frozen=True)
class Look:
    """What one process holds after so many requests."""

    requests: int
    own_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Trend:
    """One process from the end of the warm-up to the last look: fitted, first and last values, and its memory at each."""

    process: str
    pid: int
    own_mb: tuple[float, float]
    kb_per_1000: float
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    series_mb: list[float]


def looks_at(process: psutil.Process, requests: int) -> dict[tuple[int, str], Look]:
    """Of each process of the server, by its id and name."""
    found = {}
    for member in family(process):
        with contextlib.suppress(psutil.Error, OSError):
            held = status(member.pid)
            own = held["RssAnon"] + held["RssShmem"]
            found[member.pid, _name(member)] = Look(requests, own, member.num_fds(), member.num_threads())
    return found


def _name(process: psutil.Process) -> str:
    command = process.cmdline()
    if not command:
        return process.name()
    if command[0].startswith("ray::"):
        return command[0].split(".")[0].split("(")[0].strip()
    script = next((part for part in command[1:] if part.endswith(".py")), command[0])
    return "afd serve" if "serve" in command else Path(script).name


async def ask(client: httpx.AsyncClient, rng: random.Random, leave_share: float) -> str:
    """One request of any kind; gives its kind. Raises httpx.HTTPError, and AssertionError for an answer that is none."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 24)))
    body = {"prompt": prompt, "max_tokens": rng.randint(1, 6), "ignore_eos": True, "seed": rng.randrange(100)}
    if rng.random() < leave_share:
        body |= {"stream": True, "max_tokens": 400, "n": rng.choice((1, 1, 1, 3))}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            for _ in range(rng.randint(1, 3)):
                await anext(lines)
        return "left"
    kind = rng.choice(("whole", "stream", "choices", "logprobs", "chat", "refused"))
    path = "/v1/completions"
    if kind == "stream":
        body["stream"] = True
    elif kind == "choices":
        body |= {"n": 2, "stop": ["stone"]}
    elif kind == "logprobs":
        body["logprobs"] = 5
    elif kind == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": body.pop("prompt")}]
    elif kind == "refused":
        body["temperature"] = "hot"
    response = await client.post(path, json=body)
    assert response.status_code == (400 if kind == "refused" else 200), response.text
    return kind


async def churn(url: str, requests: int, concurrency: int, leave_share: float, seed: int) -> dict[str, int]:
    """So many requests, then waits until the server has nothing left to do. Gives their number by kind."""
    rng, kinds = random.Random(seed), dict[str, int]()
    left = iter(range(requests))
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def work() -> None:
            for _ in left:
                kind = await ask(client, rng, leave_share)
                kinds[kind] = kinds.get(kind, 0) + 1

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        await at_rest(client)
    return kinds


async def at_rest(client: httpx.AsyncClient) -> None:
    """Returns when no request runs or waits and no block is held. Raises TimeoutError."""
    async with asyncio.timeout(REST_TIMEOUT_S):
        while True:
            # The workers report after a step, so a step is asked for.
            await client.post("/v1/completions", json={"prompt": "stone", "max_tokens": 1})
            text = (await client.get("/metrics")).text
            busy = [
                line
                for line in text.splitlines()
                if line.startswith(("afd:num_requests_running", "afd:num_requests_waiting"))
                and float(line.split()[-1]) > 0
            ]
            if not busy:
                return
            await asyncio.sleep(POLL_S)


def trend(process: str, pid: int, looks: Sequence[Look], warm_up: int) -> Trend:
    """Of the looks after so many requests."""
    rest = [look for look in looks if look.requests >= warm_up]
    slope = statistics.linear_regression(
        *zip(*[(look.requests, look.own_bytes) for look in rest], strict=True)
    ).slope
    first, last = rest[0], rest[-1]
    return Trend(
        process, pid, (first.own_bytes / 1e6, last.own_bytes / 1e6), slope,
        (first.descriptors, last.descriptors), (first.threads, last.threads),
        [round(look.own_bytes / 1e6, 1) for look in looks],
    )  # fmt: skip


def grows(trend: Trend, bound_kb: float, ray_bound_kb: float) -> bool:
    """A few descriptors and threads come and go: connections that end, pools that reach their size."""
    if trend.process not in OWN:
        bound_kb = ray_bound_kb
    more = max(trend.descriptors[1] - trend.descriptors[0], trend.threads[1] - trend.threads[0])
    return trend.kb_per_1000 > bound_kb or more > 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=1000, help="requests between two looks")
    parser.add_argument("--warm-up", type=int, default=5000, help="requests; not fitted")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument(
        "--leave-share", type=float, default=0.2, help="of requests whose client leaves in mid-stream"
    )
    parser.add_argument(
        "--bound-kb", type=float, default=200.0, help="for a thousand requests, in each own process"
    )
    parser.add_argument(
        "--ray-bound-kb", type=float, default=500.0, help="the same, in each of Ray's processes"
    )
    parser.add_argument("--flags", default=SMALL_CACHE, help="for afd serve. Default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    looks: dict[tuple[int, str], list[Look]] = {}
    kinds: dict[str, int] = {}
    shared = []
    with running(server("afd", arguments.flags), arguments.model, "float32") as (url, process):
        began = time.monotonic()
        for done in range(arguments.every, arguments.requests + 1, arguments.every):
            came = asyncio.run(
                churn(url, arguments.every, arguments.concurrency, arguments.leave_share, arguments.seed + done)
            )
            kinds = {kind: kinds.get(kind, 0) + came.get(kind, 0) for kind in {*kinds, *came}}
            for key, look in looks_at(process, done).items():
                looks.setdefault(key, []).append(look)
            shared.append(len(list(Path("/dev/shm").iterdir())))
            own = sum(its[-1].own_bytes for its in looks.values() if its[-1].requests == done)
            print(
                f"{done:>7} requests, {time.monotonic() - began:5.0f} s, {own / 1e6:8.1f} MB in all", flush=True
            )
    last = max(look.requests for its in looks.values() for look in its)
    whole = {key: its for key, its in looks.items() if len(its) == last // arguments.every}
    trends = [trend(name, pid, its, arguments.warm_up) for (pid, name), its in whole.items()]
    others = sorted(name for _, name in looks.keys() - whole.keys())  # a restarted worker is another process
    print(f"\n{'process':<28} {'own MB':>15} {'KB / 1000 requests':>19} {'descriptors':>12} {'threads':>9}")
    for each in sorted(trends, key=lambda each: -each.kb_per_1000):
        print(
            f"{each.process:<28} {each.own_mb[0]:7.1f} {each.own_mb[1]:7.1f} {each.kb_per_1000:19.1f} "
            f"{each.descriptors[0]:6}{each.descriptors[1]:6} {each.threads[0]:5}{each.threads[1]:4}"
        )
    if others:
        print(f"came or went meanwhile: {', '.join(others)}")
    growing = [each.process for each in trends if grows(each, arguments.bound_kb, arguments.ray_bound_kb)]
    shared = shared[arguments.warm_up // arguments.every - 1 :]
    print(json.dumps({
        "commit": commit(), "machine": machine(), "requests": last, "concurrency": arguments.concurrency, "kinds": kinds,
        "bound_kb": arguments.bound_kb, "ray_bound_kb": arguments.ray_bound_kb, "growing": growing, "came_or_went": others, "dev_shm_entries": [shared[0], shared[-1]],
        "processes": [asdict(each) for each in trends],
    }))  # fmt: skip
    return 1 if growing else 0


if __name__ == "__main__":
    sys.exit(main())
