"""What the way through HTTP costs: on the first token of a lone client, and of the processor under many open streams.

    python benchmarks/http_overhead.py [MODEL] [--streams 256] [--tokens-per-s 1000] [--seconds 20] [--requests 200]

The front-end is the product's, in a process of its own: connections, bodies, tokenizer, router, control channel, detokenizer,
events. Behind the channel the engine and its scheduler run in a second process, on an executor that replays: it computes
nothing, waits for a step's time and answers with tokens that make words. This process is the client.

    overhead  the client's time to the first token, less the engine's own: from the request's arrival at the replica until the
              token is handed to the channel. One request at a time, 100 words each
    share     processor time of the front-end over the wall's, of one core, while all streams are open: 100 % is one core

MODEL: a directory with a tokenizer; default: the default model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from afd_server.api.app import create_app
from afd_server.api.server import bind_port, serve
from afd_server.api.settings import ApiSettings
from afd_server.bench import generator
from afd_server.bench.client import Client, Target
from afd_server.bench.dataset import Prompt, words
from afd_server.bench.outcome import Outcome
from afd_server.bench.session import run_to_end
from afd_server.checkpoints.default_model import afd_home, default_model
from afd_server.config import ServeConfig
from afd_server.engine.engine import Engine
from afd_server.engine.loop import EngineLoop
from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel
from afd_server.llm import LocalWorkers
from afd_server.router.router import Router
from afd_server.serving import Service
from afd_server.telemetry.metrics import Metrics
from afd_server.text.tokenizer import Tokenizer
from afd_server.transport.base import Endpoint
from afd_server.transport.control import ControlClient, ControlServer
from afd_server.types import GenerationRequest, ReplicaUpdate, SampledToken, StepOutput, StepPlan, StepTiming
from benchmarks.results import commit, machine

SECRET_VARIABLE = "HTTP_OVERHEAD_SECRET"
MAX_MODEL_LEN = 2048
PROMPT_WORDS = 100
LONE_STEP_S = 0.01
CONNECT_TIMEOUT_S = 10.0
PERCENTILES = (0.5, 0.99)


class Replay:
    """An executor whose every step takes `step_s` and whose every token is a word."""

    def __init__(self, step_s: float, token_ids: Sequence[int]) -> None:
        self._step_s = step_s
        self._token_ids = token_ids
        self._random = random.Random(0)
        self._due_s = 0.0

    def execute(self, plan: StepPlan) -> StepOutput:
        now = time.perf_counter()
        # A step that begins at once after the last one ends in its rhythm: what lies between them is no delay.
        self._due_s = max(self._due_s + self._step_s, now + self._step_s / 2)
        time.sleep(self._due_s - now)
        tokens = tuple(
            SampledToken(part.request_id, self._random.choice(self._token_ids))
            for batch in plan.micro_batches for part in batch if part.samples
        )  # fmt: skip
        return StepOutput(plan.step, tokens, StepTiming(self._step_s, num_tokens=plan.num_tokens))


class Replica:
    """Engine and channel, and how long each request waited for its first token here."""

    def __init__(self, model: Path, streams: int, step_s: float) -> None:
        tokenizer = Tokenizer.load(model)
        token_ids = sorted({token_id for word in words(1000, random.Random(0)).split()
                            for token_id in tokenizer.encode(f" {word}", False)})  # fmt: skip
        config = ServeConfig(model=str(model), max_model_len=MAX_MODEL_LEN, max_num_seqs=streams)
        scheduler = Scheduler(
            config, num_blocks=(streams + 1) * MAX_MODEL_LEN // config.block_size, eos_token_ids=()
        )
        engine = Engine(Replay(step_s, token_ids), scheduler, MicroBatchChooser("1"), StepTimeModel())
        self._arrived: dict[str, float] = {}
        self.control = ControlServer(
            os.environ[SECRET_VARIABLE].encode(), name="attention-0", node="here",
            on_submit=self._submit, on_abort=lambda request_id: self.loop.abort(request_id),
        )  # fmt: skip
        self.loop = EngineLoop(engine, self._publish)

    def _submit(self, request: GenerationRequest) -> None:
        self._arrived[request.request_id] = time.perf_counter()
        self.loop.submit(request)

    def _publish(self, update: ReplicaUpdate) -> None:
        now = time.perf_counter()
        for output in update.outputs:
            arrived = self._arrived.pop(output.request_id, None)
            if arrived is not None:
                print(json.dumps({"first_token_s": now - arrived}), flush=True)
        self.control.publish(update)

    async def run(self) -> None:
        await self.control.start()
        print(json.dumps({"port": self.control.endpoint.port}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def front_end(model: Path, port: int) -> None:
    """The product's, until SIGTERM."""
    listening = bind_port("127.0.0.1", 0)
    secret = os.environ[SECRET_VARIABLE].encode()
    endpoint = Endpoint("attention-0", "here", None, "127.0.0.1", port)
    client = await ControlClient.connect(endpoint, secret, CONNECT_TIMEOUT_S)
    tokenizer, metrics = Tokenizer.load(model), Metrics("replay")
    settings = ApiSettings(model_name="replay", max_model_len=MAX_MODEL_LEN, vocab_size=2**20, version="replay")
    service = Service(LocalWorkers(ServeConfig(model=str(model))), metrics)  # workers that are never started
    async with Router([client], metrics.observe_step, metrics.observe_lost) as router:
        service.open(router)
        app = create_app(settings, service, tokenizer, metrics)
        print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
        await serve(app, "", 0, 5.0, [listening])


class Child:
    """One of the two processes: its lines, and its processor time."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "benchmarks.http_overhead", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.line()["port"])

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line: dict[str, Any] = json.loads(self.process.stdout.readline())
        return line

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


@contextmanager
def machine_of(model: Path, streams: int, step_s: float) -> Iterator[tuple[Child, Child]]:
    """(replica, front-end), running."""
    children: list[Child] = []
    try:
        children.append(Child("--role", "replica", model, "--streams", streams, "--step-s", step_s))
        children.append(Child("--role", "front-end", model, "--port", children[0].port))
        yield children[0], children[1]
    finally:
        for child in reversed(children):
            child.process.terminate()
            child.process.wait(CONNECT_TIMEOUT_S)


def target(front: Child) -> Target:
    fields = {"ignore_eos": True, "temperature": 0.0}
    return Target(f"http://127.0.0.1:{front.port}", model="replay", fields=fields)


def quantiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    return {
        f"p{100 * share:g}": round(1e3 * ordered[int(share * (len(ordered) - 1))], 3) for share in PERCENTILES
    }


def lone_client(model: Path, num_requests: int) -> dict[str, Any]:
    """Times to the first token of one request after the other."""
    generate = random.Random(0)
    prompts = [Prompt(words(PROMPT_WORDS, generate), 2) for _ in range(num_requests)]

    async def ask(front: Child) -> Sequence[Outcome]:
        async with Client(target(front)) as client:
            timed = [(0.0, prompt) for prompt in prompts]
            return (await generator.run(client, timed, generator.Limits(max_concurrency=1))).outcomes

    with machine_of(model, 1, LONE_STEP_S) as (replica, front):
        outcomes = run_to_end(lambda: ask(front))
        ttft_s = [checked(outcome).ttft_s for outcome in outcomes]
        engine_s = [replica.line()["first_token_s"] for _ in outcomes]
    warm = slice(num_requests // 10, None)  # the first ones pay for first touches
    overhead_s = [whole - own for whole, own in zip(ttft_s, engine_s, strict=True)][warm]
    return {"ttft_ms": quantiles_ms(ttft_s[warm]), "engine_ms": quantiles_ms(engine_s[warm]),
            "overhead_ms": quantiles_ms(overhead_s)}  # fmt: skip


def many_streams(model: Path, streams: int, tokens_per_s: float, seconds: float) -> dict[str, Any]:
    """The front-end's processor time while all streams are open."""
    step_s = streams / tokens_per_s
    output_tokens = round((seconds + 10) / step_s)  # no stream ends before the measurement does
    generate = random.Random(0)
    prompts = [Prompt(words(PROMPT_WORDS, generate), output_tokens) for _ in range(streams)]

    async def measure(front: Child) -> tuple[float, float, Sequence[Outcome]]:
        async with Client(target(front)) as client:
            load = asyncio.create_task(generator.run(client, [(0.0, prompt) for prompt in prompts]))
            await asyncio.sleep(5.0)  # every prompt has been read
            before, began = front.cpu_s(), time.perf_counter()
            await asyncio.sleep(seconds)
            used, took = front.cpu_s() - before, time.perf_counter() - began
            return used, took, (await load).outcomes

    with machine_of(model, streams, step_s) as (_, front):
        used_s, took_s, outcomes = run_to_end(lambda: measure(front))
    tpot_s = statistics.median(checked(outcome).tpot_s for outcome in outcomes)
    return {"streams": len(outcomes), "tokens_per_s": round(streams / tpot_s, 1), "share": round(used_s / took_s, 4),
            "cpu_us_per_token": round(1e6 * used_s / took_s * tpot_s / streams, 1)}  # fmt: skip


def checked(outcome: Outcome) -> Outcome:
    if not outcome.is_complete:
        raise RuntimeError(f"{outcome.error}: {outcome.message}")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens-per-s", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--role", choices=("client", "replica", "front-end"), default="client", help=argparse.SUPPRESS
    )
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step-s", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = arguments.model or default_model(afd_home())
    if arguments.role == "replica":
        asyncio.run(Replica(model, arguments.streams, arguments.step_s).run())
    elif arguments.role == "front-end":
        run_to_end(lambda: front_end(model, arguments.port))
    else:
        os.environ[SECRET_VARIABLE] = secrets.token_hex(16)
        rounds = []
        for number in range(arguments.rounds):
            lone = lone_client(model, arguments.requests)
            many = many_streams(model, arguments.streams, arguments.tokens_per_s, arguments.seconds)
            print(
                f"round {number + 1}: overhead {lone['overhead_ms']['p50']:.2f} ms (p99 {lone['overhead_ms']['p99']:.2f}) "
                f"on the engine's {lone['engine_ms']['p50']:.2f}; {many['streams']} streams at "
                f"{many['tokens_per_s']:.0f} tokens/s: {many['share']:.1%} of a core, "
                f"{many['cpu_us_per_token']:.0f} us a token",
                flush=True,
            )
            rounds.append({"lone": lone, "many": many})
        print(json.dumps({"commit": commit(), "machine": machine(), "rounds": rounds}))


if __name__ == "__main__":
    main()
