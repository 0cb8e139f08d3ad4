"""Round trips between an attention process and an FFN process, over shared memory and TCP on this host.

One call of float32 rows goes out and comes back as often as asked, one at a time, then with three in flight. Prints
microseconds a round trip as a table; the last line is the same as JSON.

    python benchmarks/transport_roundtrip.py [--count 1000]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time

import torch

from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import CallTag, Endpoint, Link, LinkShape
from afd_server.transport.connect import connect
from afd_server.transport.listener import SocketListener

HIDDEN_SIZE = 1024
PAYLOADS = {"4 KB": 1, "64 KB": 16, "1 MB": 256}  # rows of 1024 float32
IN_FLIGHT = 3
DEADLINE_S = 30.0
SECRET_VARIABLE = "ROUNDTRIP_SECRET"


def serve() -> None:
    """The FFN process: answers each call with its own rows, copied to where a matmul would write. Until it is killed."""
    torch.set_num_threads(1)
    listener = SocketListener("ffn-0", "here", os.environ[SECRET_VARIABLE].encode())
    print(json.dumps([listener.endpoint.unix_name, listener.endpoint.port]), flush=True)
    while True:
        for call in listener.wait(1.0):
            call.answer_buffer().copy_(call.call.x)
            call.answer(0, call.call.x.shape[0])


def measure(link: Link, rows: int, count: int) -> dict[str, float]:
    """p50 and p99 of one call at a time, and the mean with three in flight; microseconds."""
    call = FFNCall(0, torch.randn(rows, HIDDEN_SIZE), None, None)
    times_us = []
    for step in range(count + 50):
        tag = CallTag(0, step, 0, 0)
        started = time.perf_counter()
        link.send(tag, call)
        link.receive(tag, DEADLINE_S)
        times_us.append((time.perf_counter() - started) * 1e6)
    times_us = sorted(times_us[50:])  # the first ones touch the memory for the first time
    started = time.perf_counter()
    for step in range(count + IN_FLIGHT):
        if step >= IN_FLIGHT:
            link.receive(CallTag(0, step - IN_FLIGHT, 0, step % IN_FLIGHT), DEADLINE_S)
        if step < count:
            link.send(CallTag(0, step, 0, step % IN_FLIGHT), call)
    in_flight_us = (time.perf_counter() - started) * 1e6 / count
    return {
        "p50_us": round(times_us[len(times_us) // 2], 1),
        "p99_us": round(times_us[len(times_us) * 99 // 100], 1),
        "in_flight_us": round(in_flight_us, 1),
    }


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
        shape = LinkShape(max(PAYLOADS.values()), HIDDEN_SIZE, 0, "float32")
        results = {}
        print(f"{'path':6}{'payload':>10}{'p50 us':>10}{'p99 us':>10}{'us, 3 in flight':>18}")
        for transport in ("shm", "tcp"):
            link = connect(endpoint, shape, 0, secret.encode(), transport, DEADLINE_S)
            for payload, rows in PAYLOADS.items():
                result = results[f"{transport} {payload}"] = measure(link, rows, count)
                print(
                    f"{transport:6}{payload:>10}{result['p50_us']:>10}{result['p99_us']:>10}{result['in_flight_us']:>18}"
                )
            link.close()
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
