"""What a hop costs: a call from an attention process to an FFN process on this host and back, over shared memory and TCP.

Both sides run the code of a server (FFNGroup, links, listener, FFNWorker); the FFN is an echo that writes each row
back, and the time it takes is taken off. So what is left is the hop's own cost: encode, push, wake, serve, wake, sum.
The last column is the same path driven by one thread, which wakes nobody: the part that is Python. Prints
microseconds as a table; the last line is the same as JSON.

    python benchmarks/transport_roundtrip.py [--count 1000]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from afd_server.attention.dispatch import GroupLayout
from afd_server.attention.ffn_group import FFNGroup
from afd_server.ffn.worker import FFNWorker
from afd_server.models.ffn_call import FFNCall
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


class Echo:
    """Stands for an FFN half: every row is its own answer."""

    def routed(self, call: FFNCall) -> FFNCall:
        return call

    def forward(self, call: FFNCall, out: Tensor | None = None) -> Tensor:
        return call.x.clone() if out is None else out.copy_(call.x)


def serve() -> None:
    """The FFN process, until it is killed."""
    torch.set_num_threads(1)
    worker, listener = echo_worker(os.environ[SECRET_VARIABLE].encode())
    print(json.dumps([listener.endpoint.unix_name, listener.endpoint.port]), flush=True)
    worker.serve()


def echo_worker(secret: bytes) -> tuple[FFNWorker, SocketListener]:
    listener = SocketListener("ffn-0", "here", secret)
    half: Any = Echo()
    return FFNWorker("ffn-0", half, listener), listener


def group_to(endpoint: Endpoint, transport: str, secret: bytes) -> FFNGroup:
    connector = partial(connect, endpoint, SHAPE, 0, secret, transport)
    layout = GroupLayout(1, 1, NUM_EXPERTS)
    return FFNGroup({0: connector}, layout, replica=0, dtype=torch.float32, timeout_s=DEADLINE_S)


def call_of(rows: int) -> FFNCall:
    ids = torch.randint(0, NUM_EXPERTS, (rows, TOP_K), dtype=torch.int32)
    return FFNCall(0, torch.randn(rows, HIDDEN_SIZE), ids, torch.rand(rows, TOP_K))


def one_at_a_time(group: FFNGroup, rows: int, count: int) -> dict[str, float]:
    """p50 and p99 of the round trip less the echo's own time; microseconds."""
    call, hops_us = call_of(rows), []
    for step in range(count + WARM_UP):
        group.begin_step(step)
        started = time.perf_counter()
        group.send(0, call)
        group.receive(0)
        hops_us.append((time.perf_counter() - started - group.timing.ffn_s) * 1e6)
    hops_us = sorted(hops_us[WARM_UP:])
    return {
        "p50_us": round(hops_us[len(hops_us) // 2], 1),
        "p99_us": round(hops_us[len(hops_us) * 99 // 100], 1),
    }


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
        print(
            f"{'path':6}{'payload':>10}{'p50 us':>10}{'p99 us':>10}{'us, 3 in flight':>18}{'us, one thread':>18}"
        )
        for transport in ("shm", "tcp"):
            alone_us = in_one_thread_us(transport, count)
            group = group_to(endpoint, transport, secret.encode())
            group.connect()
            for payload, rows in PAYLOADS.items():
                result = results[f"{transport} {payload}"] = {
                    **one_at_a_time(group, rows, count),
                    "in_flight_us": in_flight_us(group, rows, count),
                    "one_thread_us": alone_us.get(payload),
                }
                p50, p99, in_flight, alone = (value or "-" for value in result.values())
                print(f"{transport:6}{payload:>10}{p50:>10}{p99:>10}{in_flight:>18}{alone:>18}")
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
