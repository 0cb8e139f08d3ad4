"""Where the microseconds of a decode step go: one attention worker and one FFN worker, each a process, without HTTP.

    python benchmarks/step_profile.py /tmp/tiny [--concurrency 1 8 32] [--micro-batches 1] [--transport shm]

The workers are those of a server (AttentionReplica with its engine, FFNServer) with a worker's environment. All requests
of a concurrency start together; only steps that decode all of them count. Columns, microseconds of a median step:

    step       from the end of a step to the end of the next
    attention  computing on the attention worker, Python in between included
    FFN        computing on the FFN worker
    wire       the rest of the time that a call was away while the attention worker had nothing else to do
    waiting    the attention worker handed calls over or waited. With one micro-batch that is FFN and wire; with more, the
               FFN also computes while attention does
    sampling   the rest of the step's execution: tensors of the batch, sampling
    between    schedule, account

So step = attention + waiting + sampling + between. `--transport direct` runs both halves on one thread. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import random
import secrets
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from afd_server.cluster.layout import link_shape, resolve
from afd_server.cluster.placement import WORKER_ENVIRONMENT
from afd_server.cluster.workers import AttentionReplica, FFNServer
from afd_server.config import ServeConfig
from afd_server.models.families import read_model_spec
from afd_server.transport.base import Endpoint
from afd_server.transport.connect import connect
from afd_server.transport.direct import DirectLink
from afd_server.transport.inproc import InprocListener
from afd_server.transport.listener import SocketListener
from afd_server.types import GenerationRequest, ReplicaUpdate, SamplingParams, StepTiming

COLUMNS = ("step", "attention", "FFN", "wire", "waiting", "sampling", "between")
SECRET_VARIABLE = "PROFILE_SECRET"
STEP_TIMEOUT_S = 300.0


def configuration(arguments: argparse.Namespace) -> ServeConfig:
    spec = read_model_spec(arguments.model)
    config = ServeConfig(
        model=str(arguments.model), executor="local", transport=arguments.transport, device="cpu",
        micro_batches=arguments.micro_batches, max_model_len=arguments.input_tokens + arguments.output_tokens,
    )  # fmt: skip
    return resolve(config, spec, arguments.model)


def serve(config: ServeConfig) -> None:
    """The FFN process: says where it listens, then serves until its input ends."""
    listener = SocketListener("ffn-0", "here", os.environ[SECRET_VARIABLE].encode())
    server = FFNServer(config, 0, listener)
    print(json.dumps([listener.endpoint.unix_name, listener.endpoint.port]), flush=True)
    sys.stdin.read()
    server.stop()


class Run:
    """Requests on an attention replica, and the steps that they took."""

    def __init__(self, config: ServeConfig, connector: Any, vocab_size: int) -> None:
        self._updates: queue.SimpleQueue[ReplicaUpdate] = queue.SimpleQueue()
        self._vocab_size = vocab_size
        self.replica = AttentionReplica(config, 0, {0: connector}, self._updates.put, workers_per_gpu=2)

    def steps(self, concurrency: int, input_tokens: int, output_tokens: int) -> list[StepTiming]:
        """Every step until all requests have ended."""
        generator = random.Random(concurrency)
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        for _ in range(concurrency):
            prompt = tuple(generator.randrange(self._vocab_size) for _ in range(input_tokens))
            self.replica.loop.submit(GenerationRequest(secrets.token_hex(8), prompt, sampling))
        running, taken = concurrency, list[StepTiming]()
        while running:
            update = self._updates.get(timeout=STEP_TIMEOUT_S)
            errors = [output.error for output in update.outputs if output.error]
            if errors:
                raise RuntimeError(errors[0])
            running -= sum(output.finish_reason is not None for output in update.outputs)
            if update.stats.timing is not None:
                taken.append(update.stats.timing)
        return taken


def breakdown(steps: list[StepTiming], concurrency: int) -> dict[str, float]:
    """Medians in microseconds over the steps that decode everything and follow such a step."""
    rows = []
    for previous, timing in itertools.pairwise(steps):
        if previous.num_tokens == timing.num_tokens == concurrency:
            sampling_s = timing.total_s - timing.attention_s - timing.bubble_s
            rows.append((timing.period_s, timing.attention_s, timing.ffn_s, timing.wire_s, timing.bubble_s, sampling_s,
                         timing.period_s - timing.total_s))  # fmt: skip
    return {
        column: round(statistics.median(row[index] for row in rows) * 1e6)
        for index, column in enumerate(COLUMNS)
    }


def profile(config: ServeConfig, connector: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    spec = read_model_spec(config.model)
    run = Run(config, connector, spec.vocab_size)
    results = []
    try:
        run.steps(1, 8, 8)  # first touches
        print(f"{'clients':>7}" + "".join(f"{column:>11}" for column in COLUMNS) + f"{'wire/hop':>11}{'m':>5}")
        for concurrency in arguments.concurrency:
            steps = run.steps(concurrency, arguments.input_tokens, arguments.output_tokens)
            parts = breakdown(steps, concurrency)
            decoding = [timing for timing in steps if timing.num_tokens == concurrency]
            micro_batches = statistics.mean(timing.num_micro_batches for timing in decoding)
            per_hop = round(statistics.median(timing.wire_s / timing.num_hops for timing in decoding) * 1e6, 1)
            print(f"{concurrency:>7}" + "".join(f"{parts[column]:>11}" for column in COLUMNS)
                  + f"{per_hop:>11}{micro_batches:>5.1f}", flush=True)  # fmt: skip
            results.append({"concurrency": concurrency, **{f"{name.lower()}_us": value for name, value in parts.items()},
                            "wire_us_per_hop": per_hop, "mean_micro_batches": round(micro_batches, 2)})  # fmt: skip
    finally:
        run.replica.stop()
    return results


def in_two_processes(config: ServeConfig, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    secret = secrets.token_hex(16)
    server = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--serve"], env={**os.environ, SECRET_VARIABLE: secret},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        unix_name, port = json.loads(server.stdout.readline())
        endpoint = Endpoint("ffn-0", "here", unix_name, "127.0.0.1", port)
        shape = link_shape(config, read_model_spec(config.model))
        connector = partial(connect, endpoint, shape, 0, secret.encode(), config.transport)
        return profile(config, connector, arguments)
    finally:
        server.kill()
        server.wait()


def on_one_thread(config: ServeConfig, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    server = FFNServer(config, 0, InprocListener("ffn-0"))
    try:
        return profile(config, lambda timeout_s: DirectLink("ffn-0", server.half.forward), arguments)
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--micro-batches", default="1")
    parser.add_argument("--transport", choices=("shm", "tcp", "direct"), default="shm")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in WORKER_ENVIRONMENT.items()):
        # OpenMP has read its settings already: once more, as a worker that Ray starts finds them.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WORKER_ENVIRONMENT})
    config = configuration(arguments)
    if arguments.serve:
        serve(config)
        return
    run = on_one_thread if arguments.transport == "direct" else in_two_processes
    results = run(config, arguments)
    print(json.dumps({
        "benchmark": "step_profile", "model": arguments.model.name, "transport": arguments.transport,
        "micro_batches": arguments.micro_batches, "cores": os.cpu_count(), "results": results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
