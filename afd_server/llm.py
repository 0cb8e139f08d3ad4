"""The whole machine wired by hand in one process: READ FIRST.

    prompt -> Tokenizer -> Router -> AttentionReplica <== activations, twice per layer ==> FFNServer
                 text <- Tokenizer <- Router <-'

Every worker is a thread here; `--executor ray` runs the same classes as actors (cluster/ray_cluster.py). Use it to
learn how the parts fit, to try a model without a server, and in tests:

    with LLM(ServeConfig(model="path/to/checkpoint", executor="local")) as llm:
        print(llm.generate("The capital of France is", max_tokens=8))
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Self

from afd_server.attention.ffn_group import Connector
from afd_server.checkpoints.find import find_model
from afd_server.cluster.layout import link_shape, resolve
from afd_server.cluster.names import attention_name, ffn_name
from afd_server.cluster.recording import Recording, local_recorded
from afd_server.cluster.workers import AttentionReplica, FFNServer, Started
from afd_server.config import ServeConfig
from afd_server.errors import CannotScaleError, StartError
from afd_server.models.families import read_model_spec
from afd_server.router.replica_client import LocalReplicaClient, ReplicaClient
from afd_server.router.router import Router
from afd_server.telemetry.worker_metrics import WorkerMetrics
from afd_server.text.tokenizer import Tokenizer
from afd_server.transport.base import Listener
from afd_server.transport.connect import connect
from afd_server.transport.direct import DirectLink
from afd_server.transport.inproc import InprocListener
from afd_server.transport.listener import SocketListener
from afd_server.types import (
    GenerationRequest,
    RequestOutput,
    SamplingParams,
    WorkerState,
    WorkerTotals,
    WorkerTrace,
)

NOT_HERE = "the workers of --executor local are threads of one process: they are neither scaled nor restarted (use --executor ray)"


class LocalWorkers:
    """All workers of one server as threads of this process. `config` is a resolved one."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._started_at = time.monotonic()
        self._recording = Recording()
        self.ffn: list[FFNServer] = []
        self.attention: list[AttentionReplica] = []
        self.clients: list[LocalReplicaClient] = []

    def start(self, cancelled: threading.Event | None = None) -> Started:
        """Loads and connects every worker. Raises StartError. Stops between two workers once `cancelled` is set."""
        try:
            return self._start(cancelled or threading.Event())
        except BaseException:
            self.stop()
            raise

    def _start(self, cancelled: threading.Event) -> Started:
        config = self._config

        # 1. FFN workers first: each loads its shard of the MLP and expert weights and listens for calls.
        secret = secrets.token_bytes(32)
        listeners = []
        for index in range(config.ffn_workers):
            _check(cancelled)
            listeners.append(self._listen(index, secret))
            self.ffn.append(FFNServer(config, index, listeners[-1]))

        # 2. Attention replicas: each loads the attention weights, allocates its KV cache and connects to all of them.
        for index in range(config.attention_workers):
            _check(cancelled)
            connectors = {at: self._connector(server, listener, index, secret)
                          for at, (server, listener) in enumerate(zip(self.ffn, listeners, strict=True))}  # fmt: skip
            client = LocalReplicaClient(attention_name(index))
            everyone = config.attention_workers + config.ffn_workers
            replica = AttentionReplica(config, index, connectors, client.deliver, workers_per_gpu=everyone)
            client.attach(replica.loop)
            self.clients.append(client)
            self.attention.append(replica)
        return Started(
            attention=tuple(replica.info for replica in self.attention),
            ffn=tuple(server.info for server in self.ffn),
            transports=(config.transport,),
        )

    def _listen(self, index: int, secret: bytes) -> Listener:
        if self._config.transport in ("inproc", "direct"):
            return InprocListener(ffn_name(index))
        return SocketListener(ffn_name(index), "local", secret, host="127.0.0.1")

    def _connector(self, server: FFNServer, listener: Listener, replica: int, secret: bytes) -> Connector:
        if self._config.transport == "direct":  # the undivided engine: nobody calls the listener
            return lambda timeout_s: DirectLink(server.name, server.half.forward)
        shape = link_shape(self._config, read_model_spec(self._config.model))
        if isinstance(listener, InprocListener):
            return lambda timeout_s: listener.connect(shape, replica)
        assert isinstance(listener, SocketListener)
        return partial(connect, listener.endpoint, shape, replica, secret, self._config.transport)

    async def connect(self) -> Sequence[ReplicaClient]:
        """A client to each replica, for the router."""
        return self.clients

    async def supervise(self, router: Router, metrics: WorkerMetrics) -> None:
        """Nothing is restarted here: a thread that ended by itself did so by a bug. Returns when cancelled."""
        await asyncio.Event().wait()

    def worker_states(self) -> list[WorkerState]:
        workers: list[AttentionReplica | FFNServer] = [*self.attention, *self.ffn]
        return [
            WorkerState(worker.name, worker.name.rpartition("-")[0], "serving" if worker.is_alive() else "down",
                        time.monotonic() - self._started_at, "local", worker.info.pid, 0)
            for worker in workers
        ]  # fmt: skip

    def change_under_way(self) -> str:
        return ""

    async def scale(self, attention_workers: int | None, ffn_replicas: int | None) -> None:
        """Refused: these workers live and end with their process."""
        raise CannotScaleError(NOT_HERE)

    async def restart(self) -> None:
        raise CannotScaleError(NOT_HERE)

    async def trace(self, seconds: float) -> list[WorkerTrace]:
        """See OperatedWorkers.trace."""
        workers: list[AttentionReplica | FFNServer] = [*self.attention, *self.ffn]
        recorded = [local_recorded(worker.name, worker.recorder) for worker in workers]
        return await self._recording.run(recorded, seconds)

    async def totals(self) -> list[WorkerTotals]:
        """See OperatedWorkers.totals."""
        workers: list[AttentionReplica | FFNServer] = [*self.attention, *self.ffn]
        return [worker.totals() for worker in workers]

    def health(self) -> list[str]:
        """One sentence for each worker whose thread has ended."""
        workers: list[AttentionReplica | FFNServer] = [*self.attention, *self.ffn]
        return [f"{worker.name}: its thread has ended" for worker in workers if not worker.is_alive()]

    def is_serving(self) -> bool:
        return not self.health()

    def refusal(self) -> str:
        """Why no request can be served any more: nobody starts an ended thread again."""
        return "; ".join(self.health())

    def stop(self) -> None:
        """Ends every thread: attention first, so that no call is left without an answer."""
        for replica in self.attention:
            replica.stop()
        for server in self.ffn:
            server.stop()


def _check(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise StartError("the start was cancelled")


class LLM:
    """A model in this process, split as the configuration says. Not for serving: one caller at a time."""

    def __init__(self, config: ServeConfig) -> None:
        directory = find_model(config.model)
        self.spec = read_model_spec(directory)
        self.config = resolve(config, self.spec, directory)
        self.tokenizer = Tokenizer.load(directory)
        self.workers = LocalWorkers(self.config)
        self.workers.start()

    def generate(self, prompts: str | Sequence[str], **sampling: object) -> list[str]:
        """The continuation of each prompt, all run as one batch. Keywords: fields of SamplingParams."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        token_ids = [self.tokenizer.encode(text) for text in texts]
        outputs = self.generate_token_ids(token_ids, SamplingParams(**{"max_tokens": 16, **sampling}))  # type: ignore[arg-type]
        return [self.tokenizer.decode(ids) for ids in outputs]

    def generate_token_ids(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[int]]:
        """The output token ids of each prompt of token ids. Raises RuntimeError if a request ends in an error."""
        results = self.run(prompts, sampling)
        return [[token_id for output in outputs for token_id in output.token_ids] for outputs in results]

    def run(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[RequestOutput]]:
        """All that each request gave, step by step. Raises RuntimeError if one ends in an error."""
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        requests = [
            GenerationRequest(secrets.token_hex(8), tuple(prompt), each)
            for prompt, each in zip(prompts, params, strict=True)
        ]
        return asyncio.run(self._run(requests))

    async def _run(self, requests: Sequence[GenerationRequest]) -> list[list[RequestOutput]]:
        async with Router(self.workers.clients) as router:

            async def collect(request: GenerationRequest) -> list[RequestOutput]:
                outputs = [output async for output in router.generate(request)]
                if outputs[-1].error:
                    raise RuntimeError(outputs[-1].error)
                return outputs

            return list(await asyncio.gather(*map(collect, requests)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.stop()
