"""One server, harmed while 16 clients stream; `python -m tests.chaos.run --minutes 30` does it for long (`make chaos`).

First the same requests run undisturbed, on the same server: what they give then is what they must give later. At the end
everything has to be as before: no request left, every KV block free, no process, descriptor or shared memory more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from pathlib import Path

import httpx

from tests.chaos.census import Family, Holdings, abandoned_shared_memory, holdings
from tests.chaos.clients import (
    LOST_AFTER_S,
    Answer,
    Client,
    Job,
    Told,
    ask_all,
    difference,
    keep_asking,
    make_jobs,
)
from tests.chaos.faults import POLL_S, Machine, NotRecoveredError
from tests.chaos.report import Report
from tests.chaos.schedule import Fault, Kind, Layout, Role, schedule
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import Server

MODEL_NAME = "chaos"
CLIENTS = 16
# A stream of this model runs for about two seconds: most faults hit every client in the middle of one.
MAX_TOKENS = 400
FLAGS = ("--served-model-name", MODEL_NAME, "--device", "cpu", "--max-model-len", 1024,
         "--kv-cache-memory-bytes", 8 << 20, "--ffn-timeout", LOST_AFTER_S,
         "--heartbeat-timeout", 3, "--drain-timeout", 3, "--max-restarts", 1000)  # fmt: skip

LAYOUTS = {
    "2A1F": (Layout(2, 1), ("--attention-workers", 2)),
    "1A2F": (Layout(1, 2), ("--ffn-workers", 2, "--ffn-replicas", 2)),
    "2A2F": (Layout(2, 2, ffn_shards=2), ("--attention-workers", 2, "--ffn-workers", 2)),
}

SETTLE_TIMEOUT_S = 60.0
# Ray opens and closes connections of its own; a leak would grow with every fault.
SLACK_DESCRIPTORS = 6


def write_model(directory: Path) -> Path:
    """A small mixture of experts with a tokenizer."""
    write_tokenizer(write_checkpoint("mixtral", directory, max_position_embeddings=2048))
    return directory


def run(model: Path, layout_name: str, seed: int, faults: Iterable[Fault]) -> Report:
    """Starts a server, does the faults to it, stops it. seed: of the requests."""
    layout, flags = LAYOUTS[layout_name]
    began = time.time()
    with Server(model, *FLAGS, "--port", _free_port(), *flags) as server:
        family = Family(server.process.pid)
        report = asyncio.run(_disturb(server, layout, seed, faults, family))
        code = server.stop()
        if code != 0:
            report.wrong.append(f"the server ended with exit code {code}")
        report.wrong += [
            f"a process outlived the server: {process}" for process in family.survivors(SETTLE_TIMEOUT_S)
        ]
        report.wrong += [f"/dev/shm/{name} was left behind" for name in abandoned_shared_memory(began)]
        if report.wrong:
            report.wrong.append(f"the server's log: {_keep(server.log(), layout_name, seed)}")
    return report


async def _disturb(
    server: Server, layout: Layout, seed: int, faults: Iterable[Fault], family: Family
) -> Report:
    jobs = make_jobs(seed, CLIENTS, MAX_TOKENS)
    async with _http(server) as http:
        undisturbed = await ask_all(http, MODEL_NAME, jobs)
    assert not any(told.failure for told in undisturbed), [told.failure for told in undisturbed]
    expected = {told.job.name: told.answer for told in undisturbed if told.answer is not None}
    report = Report()
    async with _http(server) as http:
        machine = Machine(server, layout, http)
        before = await _settled(server, machine)
        await _stream_while_harmed(machine, jobs, faults, family, report)
    report.wrong += _wrong_answers(report.requests, expected)
    try:
        async with _http(server) as http:
            report.wrong += _kept(before, await _settled(server, Machine(server, layout, http)))
    except AssertionError as error:
        report.wrong.append(str(error))
    family.look()
    report.wrong += [f"a zombie is left: {process}" for process in family.zombies()]
    return report


async def _stream_while_harmed(
    machine: Machine, jobs: list[Job], faults: Iterable[Fault], family: Family, report: Report
) -> None:
    enough = asyncio.Event()
    async with _http(machine.server) as http, asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            client = Client(http, MODEL_NAME, machine.front_end)
            clients.create_task(keep_asking(client, jobs, number, enough, report.requests))
        try:
            for fault in faults:
                family.look()
                report.faults.append(await machine.harm(fault))
                family.add(machine.server.process.pid)
        except NotRecoveredError as error:
            report.wrong.append(f"{fault.kind}: {error}")
        finally:
            enough.set()


def _free_port() -> int:
    """A server that is started again is to be found where it was: not a port that the kernel may give to others meanwhile."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            return int(free.getsockname()[1])


def _http(server: Server) -> httpx.AsyncClient:
    """A new connection for each request: the server may close one that is kept just when it is to be used again."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=LOST_AFTER_S, limits=limits)


async def _settled(server: Server, machine: Machine) -> dict[str, Holdings]:
    """What every process holds once no request is left and every block is free. By role; the front-end is one, too."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while (left := await machine.work_left()) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    assert not left, f"after {SETTLE_TIMEOUT_S:g} s there is still {left}"
    found = {"front-end": holdings(server.process.pid)}
    for role in Role:
        for number, pid in enumerate(machine.pids(role)):
            found[f"{role}-{number}"] = holdings(pid)
    return found


def _wrong_answers(requests: Iterable[Told], expected: dict[str, Answer]) -> list[str]:
    found = ((told.job.name, difference(expected[told.job.name], told)) for told in requests)
    return [f"{name}: {what}" for name, what in found if what]


def _kept(before: dict[str, Holdings], after: dict[str, Holdings]) -> list[str]:
    """What is held now and was not before. Every process is measured by the largest of its role."""
    assert before.keys() == after.keys(), (before.keys(), after.keys())
    wrong = []
    for name, held in after.items():
        role = name.rpartition("-")[0]
        once = [holding for other, holding in before.items() if other.rpartition("-")[0] == role]
        links = max(
            holding.link_memories for holding in once
        )  # fewer: a replica that came back is dialled when needed
        if held.link_memories > links:
            wrong.append(f"{name} maps {held.link_memories} link memories instead of {links}")
        most = max(holding.descriptors.total() for holding in once)
        if held.descriptors.total() > most + SLACK_DESCRIPTORS:
            wrong.append(f"{name} has {held.descriptors} open instead of {once[0].descriptors}")
    return wrong


def _keep(log: str, layout_name: str, seed: int) -> Path:
    path = Path(tempfile.gettempdir()) / f"afd-chaos-{layout_name}-{seed}.log"
    path.write_text(log)
    return path


def long_run(model: Path, layouts: Sequence[str], seed: int, minutes: float) -> Report:
    """One round of faults after the other, each on a new server: a worker's restarts are counted and slowed down."""
    end = time.monotonic() + 60 * minutes
    report = Report()
    for number in itertools.count():
        name = layouts[number % len(layouts)]
        faults = islice(schedule(seed + number, LAYOUTS[name][0]), len(Kind))
        part = run(model, name, seed + number, takewhile(lambda _: time.monotonic() < end, faults))
        print(f"{name}, seed {seed + number}: {part.line()}", flush=True)
        report.add(part)
        if time.monotonic() >= end:
            return report
    raise AssertionError("numbers do not end")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first server; default: a new one")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="default: all, in turns")
    arguments = parser.parse_args()
    seed = random.randrange(1_000_000) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="afd-chaos-") as directory:
        model = write_model(Path(directory) / "model")
        report = long_run(model, arguments.layout or list(LAYOUTS), seed, arguments.minutes)
    print(report.table())
    print(report.line())
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
