"""More load than a server can take: what a promise of time per token costs, and what becomes of requests without one.

    .venv/bin/python benchmarks/checkpoints.py tiny /tmp/tiny
    .venv/bin/python benchmarks/overload.py /tmp/tiny --seconds 12 --rounds 3 --write

Two servers of this project run side by side, one with --tpot-sla-ms and --ttft-sla-ms, one without ("admission off"); load is
put on one at a time. First the capacity: as many good requests a second as the first one gives more clients than it has room
for, which always ask again; the better of two, since what else runs on the machine only takes away. Then, for each share of it, requests come at
random times (Poisson) for some seconds, on the one server, then the same requests at the same times on the other. All of it
is done in several rounds, so that whatever else changes in the meantime falls on all shares alike; a row of the table is a
share's rounds taken together. Prompts and outputs are of mixed lengths.

A request is good when its first token came within the TTFT promise and its mean time per later token is within the TPOT
promise. Goodput is the good requests that ended a second, after the first quarter of each turn's time. A request that has not
ended some time after the last came is given up and is not good. Predictions are compared with real steps by the server's own
metrics. The last line is JSON; --write puts the table in the place of OVERLOAD.md's first section.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from load import Load, check, client_of, percentile, warm_up
from results import commit, machine
from servers import running, server

from afd_server.bench.client import Client
from afd_server.bench.dataset import Prompt, words
from afd_server.bench.generator import Limits, run
from afd_server.bench.outcome import Outcome
from afd_server.bench.statistics import keeps
from afd_server.traffic import arrival_times

HERE = Path(__file__).parent
# Words of a prompt and tokens of an output: drawn evenly, from the least to the most.
PROMPT_WORDS, OUTPUT_TOKENS = (16, 112), (24, 72)
SETTLING_SHARE = 0.25
TIMEOUT_S = 120.0
LONGEST_PAUSE_S = 2.0  # of a client that was told to come back later, while the capacity is measured
GOALS = "goodput at 2x at least 90 % of the peak, TPOT promise kept for 99 % of the admitted"


@dataclass(frozen=True)
class Promise:
    tpot_ms: float
    ttft_ms: float

    def is_kept(self, outcome: Outcome) -> bool:
        return keeps(outcome, {"tpot": self.tpot_ms, "ttft": self.ttft_ms})


def random_prompt(generator: random.Random) -> Prompt:
    return Prompt(words(generator.randint(*PROMPT_WORDS), generator), generator.randint(*OUTPUT_TOKENS))


def arrivals(rate: float, seconds: float, seed: str) -> list[tuple[float, Prompt]]:
    """Poisson arrivals; the same seed gives the same requests."""
    generator = random.Random(seed)
    times = itertools.takewhile(lambda at_s: at_s < seconds, arrival_times(rate, 1.0, generator))
    return [(at_s, random_prompt(generator)) for at_s in times]


async def capacity(url: str, clients: int, seconds: float, promise: Promise) -> float:
    """Good requests a second of so many clients that always have another one, after the first quarter of the time."""
    ends: list[float] = []
    generator = random.Random()

    async def one_client(client: Client, clock: Callable[[], float]) -> None:
        while clock() < seconds:
            outcome = await client.send(random_prompt(generator), clock(), clock)
            if not outcome.is_complete:
                await asyncio.sleep(LONGEST_PAUSE_S * generator.random())
            elif promise.is_kept(outcome):
                ends.append(outcome.end_s)

    async with client_of(url, timeout_s=TIMEOUT_S) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one_client(client, lambda: time.perf_counter() - began) for _ in range(clients)))
    settled_s = SETTLING_SHARE * seconds
    return sum(settled_s <= end_s < seconds for end_s in ends) / (seconds - settled_s)


async def offer(url: str, requests: list[tuple[float, Prompt]], patience_s: float) -> list[Outcome]:
    """Every request at its time. Those that have not ended patience_s after the last came are given up."""
    async with client_of(url, timeout_s=TIMEOUT_S) as client:
        return list((await run(client, requests, Limits(patience_s=patience_s))).outcomes)


async def wait_until_idle(url: str) -> None:
    """Until nothing runs or waits there, so that one turn is no burden on the next."""
    names = ("num_requests_running", "num_requests_waiting", "num_requests_queued")
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client, asyncio.timeout(120):
        while any(value > 0 for value in [total(await scrape(client), name) for name in names]):
            await asyncio.sleep(0.2)


async def scrape(client: httpx.AsyncClient) -> str:
    return (await client.get("/metrics")).text


def total(exposition: str, name: str) -> float:
    """Sum over the labels."""
    return sum(float(value) for value in re.findall(rf"^afd:{name}(?:{{[^}}]*}})? (\S+)$", exposition, re.M))


def refusals(exposition: str) -> dict[str, float]:
    found = re.findall(r'^afd:requests_refused_total{.*reason="(\w+)"} (\S+)$', exposition, re.M)
    return {reason: float(value) for reason, value in found if float(value)}


def prediction_error(exposition: str) -> float | None:
    """Median of |predicted - actual| / actual over all steps, on the line within its bucket."""
    found = re.findall(r'^afd:step_prediction_error_bucket{.*le="([^"]+)".*} (\S+)$', exposition, re.M)
    cumulated = [(float(bound), float(count)) for bound, count in found]
    if not cumulated or not cumulated[-1][1]:
        return None
    half, low, below = cumulated[-1][1] / 2, 0.0, 0.0
    for bound, count in cumulated:
        if count >= half:
            return round(low + (bound - low) * (half - below) / max(1.0, count - below), 3)
        low, below = bound, count
    return None


@dataclass(frozen=True)
class Turn:
    """One share of the capacity on one server, all rounds. Times in milliseconds, of the requests that were served to their
    end. goodputs_per_s: of each round."""

    side: str
    share: float
    offered: int
    served: int
    goodput_per_s: float
    goodputs_per_s: list[float]
    good_tokens_per_s: float
    within_tpot: float
    within_ttft: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    not_served: dict[str, int]


def summed_up(side: str, share: float, seconds: float, promise: Promise, rounds: list[list[Outcome]]) -> Turn:
    outcomes = [outcome for turn in rounds for outcome in turn]
    served = [outcome for outcome in outcomes if outcome.is_complete]
    settled_s = SETTLING_SHARE * seconds
    counted_s = seconds - settled_s
    good = [
        [
            outcome.output_tokens
            for outcome in turn
            if promise.is_kept(outcome) and settled_s <= outcome.end_s < seconds
        ]
        for turn in rounds
    ]
    goodputs_per_s = [len(tokens) / counted_s for tokens in good]
    tpots_ms = [outcome.tpot_s * 1e3 for outcome in served] or [0.0]
    ttfts_ms = [outcome.ttft_s * 1e3 for outcome in served] or [0.0]
    return Turn(
        side, share, len(outcomes), len(served),
        goodput_per_s=round(statistics.mean(goodputs_per_s), 2),
        goodputs_per_s=[round(goodput, 2) for goodput in goodputs_per_s],
        good_tokens_per_s=round(sum(map(sum, good)) / counted_s / len(rounds), 1),
        within_tpot=round(sum(tpot <= promise.tpot_ms for tpot in tpots_ms) / len(tpots_ms), 4),
        within_ttft=round(sum(ttft <= promise.ttft_ms for ttft in ttfts_ms) / len(ttfts_ms), 4),
        tpot_p50_ms=round(percentile(tpots_ms, 0.5), 1),
        tpot_p99_ms=round(percentile(tpots_ms, 0.99), 1),
        ttft_p50_ms=round(percentile(ttfts_ms, 0.5)),
        ttft_p99_ms=round(percentile(ttfts_ms, 0.99)),
        not_served=dict(Counter(o.error.removeprefix("HTTP ") for o in outcomes if not o.is_complete)),
    )  # fmt: skip


def row(turn: Turn) -> tuple[str, ...]:
    return (
        turn.side, f"{turn.share:g}x", f"{turn.offered}", f"{turn.served}",
        f"{turn.goodput_per_s:.2f} ({min(turn.goodputs_per_s):.1f} to {max(turn.goodputs_per_s):.1f})",
        f"{turn.good_tokens_per_s:.0f}", f"{turn.tpot_p50_ms:.0f} / {turn.tpot_p99_ms:.0f}", f"{turn.within_tpot:.1%}",
        f"{turn.ttft_p50_ms:.0f} / {turn.ttft_p99_ms:.0f}", f"{turn.within_ttft:.1%}",
        ", ".join(f"{count} {why}" for why, count in turn.not_served.items()) or "-",
    )  # fmt: skip


HEADS = (
    "admission", "offered load", "requests", "served", "good/s", "good tokens/s", "TPOT p50 / p99 ms", "within",
    "TTFT p50 / p99 ms", "within", "not served",
)  # fmt: skip


def section(report: dict[str, Any], turns: list[Turn], command: str) -> str:
    lines = [f"| {' | '.join(HEADS)} |", "|" + " --- |" * len(HEADS)]
    lines += [f"| {' | '.join(row(turn))} |" for turn in turns]
    table = "\n".join(lines)
    of_peak = report["goodput_2x_of_peak_off"]
    off = f"; with admission off it is {of_peak:.0%} of the same" if any(t.side == "off" for t in turns) else ""
    return f"""# Overload

What `overload.py` measured last; its docstring says how, and what the words mean. Goals: {GOALS}.

`{command}` at commit {report["commit"]}, on {report["machine"]}. Promised: {report["tpot_sla_ms"]:g} ms per token,
{report["ttft_sla_ms"]:g} ms to the first. Capacity: {report["capacity_per_s"]} requests/s; one client alone has
{report["single_tpot_ms"]} ms a token. {report["rounds"]} rounds, of {report["seconds"]:g} s for each share; good/s: of all rounds (least to greatest).

{table}

Goodput at 2x is {report["goodput_2x_of_peak"]:.0%} of the peak, which is {report["peak_per_s"]} requests/s{off}. Of all requests served under
the promise {report["within_tpot"]:.2%} kept their TPOT, at 2x {report["within_tpot_2x"]:.2%}. The step-time model's median error over all
real steps is {report["prediction_error"]:.1%}. Refused, by the server's own count, the measurement of the capacity included:
{", ".join(f"{count:g} {reason}" for reason, count in report["refusals"].items()) or "none"}.
"""


def take_turns(
    urls: dict[str, str], shares: list[float], rate: float, promise: Promise, arguments: argparse.Namespace
) -> list[Turn]:
    """The same requests on one server and then on the other, for each share of the capacity, in so many rounds."""
    outcomes: dict[tuple[str, float], list[list[Outcome]]] = {
        (side, share): [] for share in shares for side in urls
    }
    patience_s = 2 * promise.ttft_ms / 1e3 + 2 * OUTPUT_TOKENS[1] * promise.tpot_ms / 1e3
    for number in range(arguments.rounds):
        for share in shares:
            requests = arrivals(share * rate, arguments.seconds, f"share {share} round {number}")
            for side, url in urls.items():
                outcomes[side, share].append(asyncio.run(offer(url, requests, patience_s)))
                turn = summed_up(side, share, arguments.seconds, promise, outcomes[side, share][-1:])
                print("  ".join(row(turn)), flush=True)
                asyncio.run(wait_until_idle(url))
    return [
        summed_up(side, share, arguments.seconds, promise, turns) for (side, share), turns in outcomes.items()
    ]


def report_of(turns: list[Turn]) -> dict[str, Any]:
    """What the goals are about."""

    def goodput(side: str, share: float) -> float:
        return next((turn.goodput_per_s for turn in turns if (turn.side, turn.share) == (side, share)), 0.0)

    kept = [turn for turn in turns if turn.side == "on"]
    peak = max(turn.goodput_per_s for turn in kept) or 1.0
    served = sum(turn.served for turn in kept)
    return {
        "peak_per_s": peak,
        "goodput_2x_of_peak": round(goodput("on", 2.0) / peak, 3),
        "goodput_3x_of_peak": round(goodput("on", 3.0) / peak, 3),
        "goodput_2x_of_peak_off": round(goodput("off", 2.0) / peak, 3),
        "within_tpot": round(sum(turn.within_tpot * turn.served for turn in kept) / max(1, served), 4),
        "within_tpot_2x": next((turn.within_tpot for turn in kept if turn.share == 2.0), 1.0),
    }


def single_tpot_ms(url: str) -> float:
    """Of one client, median of some requests."""

    async def measured() -> float:
        async with client_of(url) as client:
            generator = random.Random("single")
            outcomes = [
                await client.send(Prompt(words(64, generator), 32), 0.0, time.perf_counter) for _ in range(5)
            ]
            for outcome in outcomes:
                check(outcome, 32)
            return statistics.median(outcome.tpot_s for outcome in outcomes) * 1e3

    return asyncio.run(measured())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint; checkpoints.py writes some")
    parser.add_argument("--tpot-sla-ms", type=float, default=100.0)
    parser.add_argument("--ttft-sla-ms", type=float, default=2000.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for which requests come, of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=96, help="while the capacity is measured")
    parser.add_argument("--flags", default="", help="for both servers")
    parser.add_argument("--on-only", action="store_true", help="leave out the server without a promise")
    parser.add_argument("--write", action="store_true", help="write the table into OVERLOAD.md")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    promise = Promise(arguments.tpot_sla_ms, arguments.ttft_sla_ms)
    flags = {"on": f"--tpot-sla-ms {promise.tpot_ms:g} --ttft-sla-ms {promise.ttft_ms:g}", "off": ""}
    if arguments.on_only:
        del flags["off"]
    with contextlib.ExitStack() as stack:
        urls = {
            side: stack.enter_context(
                running(server("afd", f"{arguments.flags} {own}"), arguments.model, "float32")
            )[0]
            for side, own in flags.items()
        }
        for url in urls.values():
            warm_up(url, None, Load(output_tokens=16))
        single_ms = single_tpot_ms(urls["on"])
        measured = (capacity(urls["on"], arguments.clients, arguments.seconds, promise) for _ in range(2))
        rates = [round(asyncio.run(rate), 2) for rate in measured]
        rate = max(rates)
        print(
            f"one client: TPOT {single_ms:.1f} ms; capacity {rates} requests/s\n{'  '.join(HEADS)}",
            flush=True,
        )
        asyncio.run(wait_until_idle(urls["on"]))
        turns = take_turns(urls, arguments.shares, rate, promise, arguments)
        exposition = httpx.get(f"{urls['on']}/metrics", timeout=10).text
    report = {
        "commit": commit(), "machine": machine(), "tpot_sla_ms": promise.tpot_ms, "ttft_sla_ms": promise.ttft_ms,
        "single_tpot_ms": round(single_ms, 1), "capacity_per_s": round(rate, 2), "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        **report_of(turns), "prediction_error": prediction_error(exposition), "refusals": refusals(exposition),
        "turns": [asdict(turn) for turn in turns],
    }  # fmt: skip
    if arguments.write:
        command = f"benchmarks/overload.py {shlex.join(word for word in sys.argv[1:] if word != '--write')}"
        file = HERE / "OVERLOAD.md"
        _, heading, rest = file.read_text().partition("\n## ")
        file.write_text(section(report, turns, command) + heading + rest)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
