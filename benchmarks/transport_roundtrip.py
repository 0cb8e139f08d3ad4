"""What a hop costs: a call from an attention process to an FFN process on this host and back, over shared memory and TCP.

Both sides run the code of a server (FFNGroup, links, listener, FFNWorker); the FFN is an echo that writes each row
back, and the time it takes is taken off. So what is left is the hop's own cost: encode, push, wake, serve, wake, sum.
"no Python" is the way that most steps on a CPU take: both sides' loops in C++ (kernels/hop.py), a layer with one small head
and small experts around them, whose time is taken off too.

Columns, microseconds: one call at a time, where the other side's core has gone to sleep meanwhile; the same with a process
of the lowest priority on each core, so that none sleeps, as in a step that computes; 3 calls under way; and the path driven
by one thread, which wakes nobody: the part that is Python. The last line is JSON.

    python benchmarks/transport_roundtrip.py [--count 1000]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from afd_server.attention.dispatch import GroupLayout
from afd_server.attention.ffn_group import FFNGroup
from afd_server.attention.hop_notes import HopNotes
from afd_server.ffn.worker import FFNWorker
from afd_server.kernels.call_account import CallAccount
from afd_server.kernels.experts import PackedExperts
from afd_server.kernels.hop import KernelFFN, LayerLoop
from afd_server.kernels.layer import AttentionKernel, AttentionNumbers, Routing
from afd_server.kernels.matmul import PackedMatrix
from afd_server.models.ffn_call import FFNCall
from afd_server.telemetry.layer_totals import LayerTotals
from afd_server.transport.base import Endpoint, LinkShape
from afd_server.transport.connect import connect
from afd_server.transport.listener import SocketListener

HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 1024, 4, 32
PAYLOADS = {"4 KB": 1, "64 KB": 16, "1 MB": 256}  # rows of 1024 float32
SHAPE = LinkShape(max(PAYLOADS.values()), HIDDEN_SIZE, TOP_K, "float32")
IN_FLIGHT = 3
DEADLINE_S = 30.0
WARM_UP = 50  # the first ones touch the memory for the first time
SECRET_VARIABLE = "ROUNDTRIP_SECRET"
# Of the layer without Python: as little computing as there can be.
HEAD_DIM, EXPERT_WIDTH, BLOCK_SIZE = 16, 16, 16
ECHO_LAYER = 1
# Takes whatever time nobody else wants on one core, which so never sleeps.
KEEP_AWAKE = "import os, sys; os.sched_setaffinity(0, {{{core}}}); os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"

COLUMNS = ("p50", "p99", "awake p50", "awake p99", "3 under way", "one thread")

Hop = Callable[[int], float]  # number of the step -> seconds


class Echo:
    """Stands for an FFN half: every row is its own answer."""

    def routed(self, call: FFNCall) -> FFNCall:
        return call

    def forward(self, call: FFNCall, out: Tensor | None = None) -> Tensor:
        return call.x.clone() if out is None else out.copy_(call.x)


def serve() -> None:
    """The FFN process, until it is killed."""
    torch.set_num_threads(1)
    experts = PackedExperts.pack(
        list(torch.randn(NUM_EXPERTS, 2 * EXPERT_WIDTH, HIDDEN_SIZE)),
        list(torch.randn(NUM_EXPERTS, HIDDEN_SIZE, EXPERT_WIDTH)),
        "float32",
    )
    # A layer that the loop in C++ serves, and one that it leaves to the echo.
    kernels = [KernelFFN(experts, 0, NUM_EXPERTS, routed=True), None]
    worker, listener = echo_worker(os.environ[SECRET_VARIABLE].encode(), kernels)
    print(json.dumps([listener.endpoint.unix_name, listener.endpoint.port]), flush=True)
    worker.serve()


def echo_worker(secret: bytes, kernels: Sequence[KernelFFN | None] = ()) -> tuple[FFNWorker, SocketListener]:
    listener = SocketListener("ffn-0", "here", secret)
    half: Any = Echo()
    return FFNWorker(
        "ffn-0", half, listener, account=CallAccount(2, range(NUM_EXPERTS)), kernels=kernels
    ), listener


def group_to(endpoint: Endpoint, transport: str, secret: bytes) -> FFNGroup:
    connector = partial(connect, endpoint, SHAPE, 0, secret, transport)
    layout = GroupLayout(1, 1, NUM_EXPERTS)
    return FFNGroup(
        {0: connector}, layout, replica=0, dtype=torch.float32, timeout_s=DEADLINE_S, hops=HopNotes(2)
    )


def call_of(rows: int) -> FFNCall:
    ids = torch.randint(0, NUM_EXPERTS, (rows, TOP_K), dtype=torch.int32)
    return FFNCall(ECHO_LAYER, torch.randn(rows, HIDDEN_SIZE), ids, torch.rand(rows, TOP_K))


def long_hop(group: FFNGroup, rows: int) -> Hop:
    """The round trip less the echo's own time."""
    call = call_of(rows)

    def hop(step: int) -> float:
        group.begin_step(step)
        started = time.perf_counter()
        group.send(0, call)
        group.receive(0)
        return time.perf_counter() - started - group.timing.ffn_s

    return hop


def hop_without_python(group: FFNGroup, rows: int) -> Hop:
    """The time between a call and its answer in the loop in C++, less the FFN's own; rows of as many requests."""
    loop = LayerLoop([small_layer()], LayerTotals(1))
    x_TH, angles = torch.randn(rows, HIDDEN_SIZE), torch.ones(rows, HEAD_DIM // 2)
    blocks = torch.arange(rows, dtype=torch.int32)
    batch = {
        "cos": angles, "sin": angles, "interleaved": False, "slots": blocks.long() * BLOCK_SIZE,
        "row_starts": torch.arange(rows + 1, dtype=torch.int32), "lengths": torch.ones_like(blocks),
        "block_tables": blocks[:, None].contiguous(), "caches": [torch.zeros(rows, BLOCK_SIZE, 2, 1, HEAD_DIM)],
    }  # fmt: skip

    def hop(step: int) -> float:
        group.begin_step(step)
        begun = group.begin_run(rows)
        assert begun is not None
        run = loop(x_TH.clone(), *begun, **batch)
        group.end_run(run, rows)
        assert run.answered == 1
        return run.wire_s

    return hop


def small_layer() -> AttentionKernel:
    def matrix(n: int, k: int) -> PackedMatrix:
        return PackedMatrix.pack([torch.randn(n, k) / k**0.5], "float32")

    return AttentionKernel(
        AttentionNumbers(1, 1, HEAD_DIM, HEAD_DIM**-0.5, 1e-6),
        (matrix(3 * HEAD_DIM, HIDDEN_SIZE), None),
        (matrix(HIDDEN_SIZE, HEAD_DIM), None),
        (torch.ones(HIDDEN_SIZE), torch.ones(HIDDEN_SIZE)),
        None,
        Routing(matrix(NUM_EXPERTS, HIDDEN_SIZE), None, TOP_K, softmax=True, renormalise=True, scaling=1.0, correction=None),
    )  # fmt: skip


def one_at_a_time(hop: Hop, count: int) -> tuple[float, float]:
    """p50 and p99; microseconds."""
    hops_us = sorted([hop(step) * 1e6 for step in range(count + WARM_UP)][WARM_UP:])
    return round(hops_us[len(hops_us) // 2], 1), round(hops_us[len(hops_us) * 99 // 100], 1)


@contextlib.contextmanager
def cores_kept_awake() -> Iterator[None]:
    programs = [KEEP_AWAKE.format(core=core) for core in os.sched_getaffinity(0)]
    spinning = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def in_flight_us(group: FFNGroup, rows: int, count: int) -> float:
    """Microseconds a call, echo included, with IN_FLIGHT micro-batches under way."""
    call = call_of(rows)
    group.begin_step(count)
    started = time.perf_counter()
    for turn in range(count + IN_FLIGHT):
        if turn >= IN_FLIGHT:
            group.receive(turn % IN_FLIGHT)
        if turn < count:
            group.send(turn % IN_FLIGHT, call)
    return round((time.perf_counter() - started) * 1e6 / count, 1)


def in_one_thread_us(transport: str, count: int) -> dict[str, float]:
    """Microseconds a call, the echo's time taken off, by payload; one thread does the work of both sides in turn."""
    secret = secrets.token_bytes(16)
    worker, listener = echo_worker(secret)
    group = group_to(listener.endpoint, transport, secret)
    connecting = threading.Thread(target=group.connect)
    connecting.start()
    while connecting.is_alive():
        worker.serve_once(0.01)
    results = {}
    for payload, rows in PAYLOADS.items():
        if transport == "tcp" and rows == max(PAYLOADS.values()):
            continue  # more than the sockets take: it needs somebody who reads meanwhile
        call, times_us = call_of(rows), []
        for step in range(count + WARM_UP):
            group.begin_step(step)
            started = time.perf_counter()
            group.send(0, call)
            while not worker.serve_once(1.0):
                pass
            group.receive(0)
            times_us.append((time.perf_counter() - started - group.timing.ffn_s) * 1e6)
        results[payload] = round(sorted(times_us[WARM_UP:])[count // 2], 1)
    group.close()
    listener.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="round trips of each size")
    count = parser.parse_args().count
    torch.set_num_threads(1)
    secret = secrets.token_hex(16)
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        env={**os.environ, SECRET_VARIABLE: secret},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        unix_name, port = json.loads(server.stdout.readline())
        endpoint = Endpoint("ffn-0", "here", unix_name, "127.0.0.1", port)
        results: dict[str, dict[str, float | None]] = {}
        print("path".ljust(10) + "payload".rjust(8) + "".join(name.rjust(15) for name in COLUMNS))
        for path, transport, way in (
            ("no Python", "shm", hop_without_python),
            ("shm", "shm", long_hop),
            ("tcp", "tcp", long_hop),
        ):
            is_long = way is long_hop
            alone_us = in_one_thread_us(transport, count) if is_long else {}
            group = group_to(endpoint, transport, secret.encode())
            group.connect()
            for payload, rows in PAYLOADS.items():
                hop = way(group, rows)
                asleep = one_at_a_time(hop, count)
                with cores_kept_awake():
                    awake = one_at_a_time(hop, count)
                under_way = in_flight_us(group, rows, count) if is_long else None
                values = (*asleep, *awake, under_way, alone_us.get(payload))
                results[f"{path} {payload}"] = dict(zip(COLUMNS, values, strict=True))
                print(
                    path.ljust(10)
                    + payload.rjust(8)
                    + "".join(str(value or "-").rjust(15) for value in values),
                    flush=True,
                )
            group.close()
    finally:
        server.kill()
        server.wait()
    print(
        json.dumps(
            {"benchmark": "transport_roundtrip", "count": count, "cores": os.cpu_count(), "results": results}
        )
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
