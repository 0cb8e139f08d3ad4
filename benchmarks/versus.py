"""Two servers in turns on this machine, the same load on both: how much faster one is, and what the machine allows.

    .venv/bin/python benchmarks/versus.py /tmp/tiny --a="--micro-batches 1" --b="--micro-batches auto"
    .venv/bin/python benchmarks/versus.py /tmp/tiny --peer transformers

A is this project's server with the flags of --a. B is it too, with the flags of --b, or a server of peers/, one TOML file
each: its start command, its environment, and whether it knows ignore_eos. The order is A B A B: each turn starts its
server afresh, warms it up, puts load.py's load on it and stops it, so that only one is alive at a time. A and B of one
round get the same prompts, and every round others. Ratios are A / B of one round: output tokens/s, above 1 where A is
faster. CPU-seconds are those of the server's process and all below it that live to the end of the load, user and system,
Ray's own included. The share is of the output tokens/s that roofline.py, run first, calls the highest for this load. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx
import psutil
from load import Load, Result, commit, measure, warm_up

HERE = Path(__file__).parent
PEERS = sorted(file.stem for file in (HERE / "peers").glob("*.toml"))
OURS = "afd"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Server:
    """How one side is started. command: with {bin}, {model}, {port} to fill in."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    ignore_eos: bool


def read_server(name: str, flags: str = "") -> Server:
    """A file of peers/, with flags added to its start command."""
    peer = tomllib.loads((HERE / "peers" / f"{name}.toml").read_text())
    command = (*peer["start"], *shlex.split(flags))
    return Server(f"{name} {flags}".strip(), command, peer["environment"], peer["ignore_eos"])


# --- one server's turn -------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all below it."""
    return [process, *process.children(recursive=True)]


def cpu_s(process: psutil.Process) -> dict[psutil.Process, float]:
    """User and system seconds so far of each process of the family."""
    seconds = {}
    for member in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            seconds[member] = times.user + times.system
    return seconds


def wait_until_it_answers(url: str, server: psutil.Popen, log: Path) -> None:
    """Returns when one token comes back. Raises RuntimeError when the server ends first or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError, LookupError, ValueError):
            model = httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
            body = {"model": model, "prompt": "stone", "max_tokens": 1}
            if httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200:
                return
        time.sleep(0.25)
    raise RuntimeError(
        f"the server does not answer; the end of its log:\n{log.read_text(errors='replace')[-3000:]}"
    )


@contextlib.contextmanager
def running(server: Server, model: str) -> Iterator[tuple[str, psutil.Process]]:
    """The server's URL and process, from its first answer on; at the end none of its processes is left."""
    port = free_port()
    fill = {"bin": str(Path(sys.executable).parent), "model": model, "port": str(port)}
    command = [part.format(**fill) for part in server.command]
    with tempfile.TemporaryDirectory(prefix="versus-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as output:
            environment = {**os.environ, **server.environment}
            process = psutil.Popen(command, stdout=output, stderr=output, env=environment)
        members = {process}
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_it_answers(url, process, log)
            members |= set(family(process))  # what outlives a server that dies is no longer below it
            yield url, process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                members |= set(family(process))
                process.terminate()
            _, alive = psutil.wait_procs(list(members), timeout=STOP_TIMEOUT_S)
            for member in alive:
                member.kill()


@dataclass(frozen=True)
class Turn:
    """One server at one concurrency in one round."""

    server: str
    round: int
    result: Result
    cpu_s_per_token: float  # per output token


def take_turn(server: Server, model: str, round_: int, concurrencies: list[int], load: Load) -> list[Turn]:
    load = replace(load, seed=round_, ignore_eos=server.ignore_eos)
    turns = []
    with running(server, model) as (url, process):
        asyncio.run(warm_up(url, None, load))
        for concurrency in concurrencies:
            before = cpu_s(process)
            result = asyncio.run(measure(url, None, concurrency, load))
            used_s = sum(seconds - before.get(member, 0.0) for member, seconds in cpu_s(process).items())
            turns.append(Turn(server.name, round_, result, round(used_s / result.output_tokens, 5)))
            print(f"{round_:>5} {concurrency:>7} {result.output_tokens_per_s:>8} {result.ttft_p50_ms:>9} "
                  f"{result.ttft_p99_ms:>8} {result.tpot_p50_ms:>9} {result.tpot_p99_ms:>8} "
                  f"{1e3 * turns[-1].cpu_s_per_token:>10.1f}   {server.name}", flush=True)  # fmt: skip
    return turns


# --- all turns together --------------------------------------------------------------------------------------------


def roofline(model: str, dtype: str, concurrencies: list[int], load: Load) -> dict[str, object]:
    """roofline.py's last line for this load, a prompt's word counted as one token."""
    command = [
        sys.executable, str(HERE / "roofline.py"), model, "--dtype", dtype,
        "--input-tokens", str(load.input_words), "--output-tokens", str(load.output_tokens),
        "--concurrency", *map(str, concurrencies),
    ]  # fmt: skip
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    print(lines[-len(concurrencies) - 2], flush=True)
    return json.loads(lines[-1])


def compare(a: list[Turn], b: list[Turn], highest_tokens_per_s: float) -> dict[str, object]:
    """Both sides at one concurrency: turns in the order of the rounds."""
    ratios = [
        ours.result.output_tokens_per_s / theirs.result.output_tokens_per_s
        for ours, theirs in zip(a, b, strict=True)
    ]
    report: dict[str, object] = {
        "concurrency": a[0].result.concurrency,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "highest_tokens_per_s": highest_tokens_per_s,
    }
    for side, turns in (("a", a), ("b", b)):
        names = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")
        medians = {name: round(statistics.median(getattr(t.result, name) for t in turns), 1) for name in names}
        report[side] = {
            **medians,
            "cpu_s_per_token": round(statistics.median(turn.cpu_s_per_token for turn in turns), 5),
            "share_of_roofline": round(medians["output_tokens_per_s"] / highest_tokens_per_s, 3),
        }
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint; checkpoints.py writes some")
    parser.add_argument(
        "--a", default="", metavar="FLAGS", help='flags of `afd serve` for A: --a="--micro-batches 1"'
    )
    parser.add_argument("--b", default="", metavar="FLAGS", help="flags for B")
    parser.add_argument("--peer", choices=PEERS, default=OURS, help="what B is")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=1, help="of each client in a turn, one after the other")
    parser.add_argument("--input-words", type=int, default=128, help="words of a prompt, about as many tokens")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the roofline")
    arguments = parser.parse_args()
    load = Load(arguments.requests, arguments.input_words, arguments.output_tokens)
    servers = (read_server(OURS, arguments.a), read_server(arguments.peer, arguments.b))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the running server is stopped too
    measured_commit = commit()  # the tree may move on during a long run
    limits = roofline(arguments.model, arguments.dtype, arguments.concurrency, load)
    print(
        f"{'round':>5} {'clients':>7} {'tok/s':>8} {'TTFT p50':>9} {'p99':>8} {'TPOT p50':>9} {'p99':>8} CPU ms/tok"
    )
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    for round_ in range(arguments.rounds):
        for server, side in zip(servers, turns, strict=True):
            side += take_turn(server, arguments.model, round_, arguments.concurrency, load)
    reports = []
    for highest in limits["highest"]:
        a, b = ([t for t in side if t.result.concurrency == highest["concurrency"]] for side in turns)
        reports.append(compare(a, b, highest["output_tokens_per_s"]))
        print(f"{highest['concurrency']} clients: A / B {reports[-1]['ratio_median']} "
              f"({reports[-1]['ratio_min']} to {reports[-1]['ratio_max']}), of the roofline "
              f"A {reports[-1]['a']['share_of_roofline']:.1%}, B {reports[-1]['b']['share_of_roofline']:.1%}")  # fmt: skip
    print(json.dumps({
        "commit": measured_commit, "cores": os.cpu_count(), "model": arguments.model, "load": asdict(load),
        "a": servers[0].name, "b": servers[1].name, "results": reports,
        "turns": [asdict(turn) for side in turns for turn in side],
        "roofline": {name: limits[name] for name in ("bytes_per_s", "flop_per_s", "highest")},
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
