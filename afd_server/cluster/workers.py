"""The two kinds of workers, whole: weights, loop and thread, without the process around them.

`llm.py` runs them as threads of one process, `actors.py` as Ray actors; they are the same classes. Imports no ray.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from afd_server.attention.constraints import Constraints
from afd_server.attention.ffn_group import Connector, FFNGroup
from afd_server.attention.hop_notes import HopNotes
from afd_server.attention.worker import AttentionWorker
from afd_server.cluster.layout import (
    ffn_shard,
    free_bytes,
    free_kv_cache_bytes,
    graph_capture,
    group_layout,
    operations,
    profiled_times,
    threads_per_worker,
    torch_device,
    torch_dtype,
    usable_cores,
)
from afd_server.cluster.names import attention_name, ffn_name
from afd_server.config import MAX_MICRO_BATCHES, ServeConfig
from afd_server.engine.engine import Engine
from afd_server.engine.loop import EngineLoop
from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.pace import Pace
from afd_server.engine.profiled import profiled_model, tell_chooser
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel, StepWork
from afd_server.ffn.worker import FFNWorker
from afd_server.kvcache.storage import allocate_cache, num_blocks_for
from afd_server.models.attention_graphs import AttentionGraphs
from afd_server.models.checkpoint import load_attention_half, load_ffn_half
from afd_server.models.families import read_model_spec
from afd_server.models.ffn_graphs import FFNGraphs
from afd_server.models.ffn_layer_cpu import call_account, kernel_ffn
from afd_server.models.graphs import CUDACapture
from afd_server.models.halves import AttentionHalf
from afd_server.models.spec import ModelSpec
from afd_server.telemetry.hop_recorder import HopRecorder
from afd_server.transport.base import Listener
from afd_server.types import ReplicaUpdate, WorkerTotals

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a started worker tells of itself. kv_cache_tokens is 0 for an FFN worker: it has no cache."""

    name: str
    pid: int
    device: str
    weight_bytes: int
    kv_cache_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """What a start gave, for the lines that a person reads. transports: each kind in use, once.
    attached: workers that were running already and have not been loaded again."""

    attention: tuple[WorkerInfo, ...]
    ffn: tuple[WorkerInfo, ...]
    transports: tuple[str, ...]
    attached: int = 0


class FFNServer:
    """One FFN worker: its shard's weights and the thread that serves them. `config` is a resolved one.

    The listener is this worker's from the start on: it is closed when the thread ends, or when the load fails.
    """

    def __init__(self, config: ServeConfig, index: int, listener: Listener) -> None:
        started = time.perf_counter()
        self.name = ffn_name(index)
        self._counts_experts = ffn_shard(config, index).tp_rank == 0  # the other slices are sent the same rows
        device, dtype = torch_device(config), torch_dtype(config)
        torch.set_num_threads(threads_per_worker(config, usable_cores()))
        directory = Path(config.model)
        try:
            computing = operations(config, device)
            half = load_ffn_half(
                directory,
                read_model_spec(directory),
                ffn_shard(config, index),
                device=device,
                dtype=dtype,
                gate_on=config.gate_on,
                operations=computing,
            )
        except BaseException:
            listener.close()
            raise
        self.half = half
        self.info = WorkerInfo(self.name, os.getpid(), device.type, half.weight_bytes())
        kernels = [kernel_ffn(layer) for layer in half.layers]
        capture = graph_capture(config, device, computing, self.name)
        computed_by = (
            half if capture is None else FFNGraphs(half, capture, max_rows=config.max_num_batched_tokens)
        )
        self._worker = FFNWorker(
            self.name,
            computed_by,
            listener,
            account=call_account(half.layers),
            kernels=kernels,
            end_at_failure=config.executor == "ray",
        )
        self._thread = threading.Thread(target=self._worker.serve, name=self.name, daemon=True)
        self._thread.start()
        logger.info("%s: %.1f MB of weights on %s in %.1f s", self.name, self.info.weight_bytes / 1e6, device.type,
                    time.perf_counter() - started)  # fmt: skip

    def is_alive(self) -> bool:
        """Whether calls are served."""
        return self._thread.is_alive()

    @property
    def failure(self) -> str:
        """Why calls are served no more, where an error is to blame."""
        return self._worker.failure

    @property
    def recorder(self) -> HopRecorder:
        """Of its hops."""
        return self._worker.recorder

    def totals(self) -> WorkerTotals:
        """What it has done since it was loaded. Callable from any thread."""
        account = self._worker.account
        tokens = account.tokens().tolist() if self._counts_experts else ()
        return WorkerTotals(
            self.name, "ffn", account.totals.read(), (), account.held.start, tuple(map(tuple, tokens))
        )

    def share_host(self, config: ServeConfig) -> None:
        """The numbers of workers are those of `config` now. Callable from any thread."""
        self._worker.threads = threads_per_worker(config, usable_cores())

    def stalled_s(self) -> float:
        """Since when the thread has been at one batch."""
        return time.monotonic() - self._worker.progressed_at

    def stop(self) -> None:
        """Ends the thread after the batch under way."""
        self._worker.stop()
        self._thread.join(STOP_TIMEOUT_S)


class AttentionReplica:
    """One attention worker: weights, KV cache, engine and the thread that runs it. `config` is a resolved one.

    connectors: how to reach each FFN worker, by its index. on_update is called on the engine's thread after each step.
    workers_per_gpu: how many workers of any kind may share this one's GPU. worker: is the engine's thread's, except for who
    measures it while there is no request.
    """

    def __init__(
        self,
        config: ServeConfig,
        index: int,
        connectors: Mapping[int, Connector],
        on_update: Callable[[ReplicaUpdate], None],
        *,
        workers_per_gpu: int,
    ) -> None:
        started = time.perf_counter()
        self.name = attention_name(index)
        device, dtype = torch_device(config), torch_dtype(config)
        torch.set_num_threads(threads_per_worker(config, usable_cores()))
        directory = Path(config.model)
        spec = read_model_spec(directory)
        computing = operations(config, device)
        half = load_attention_half(
            directory, spec, device=device, dtype=dtype, gate_on=config.gate_on, operations=computing
        )
        self._ffn_group = FFNGroup(
            connectors, group_layout(config, spec), replica=index, dtype=computing.activation_dtype,
            timeout_s=config.ffn_timeout, hops=HopNotes(spec.num_layers),
        )  # fmt: skip
        try:
            # Before the cache is sized: links between GPU workers take memory of this one's GPU.
            self._ffn_group.connect()
            share_bytes = free_kv_cache_bytes(config, device, workers_per_gpu)
            num_blocks = num_blocks_for(spec, config, share_bytes, free_bytes(device))
            capture = graph_capture(config, device, computing, self.name)
            # Graphs need a block more than requests are given: see AttentionGraphs.
            cache = allocate_cache(spec, num_blocks + (capture is not None), config.block_size, device, dtype)
            graphs = None if capture is None else _graphs(config, half, cache, capture)
            self._constraints = _constraints(config, spec)
            self.worker = worker = AttentionWorker(
                half, cache, self._ffn_group, block_size=config.block_size, device=device, graphs=graphs,
                constraints=self._constraints,
            )  # fmt: skip
            chooser, model = _models_of_time(config, spec)
            if graphs is not None:
                _record_graphs(worker, min(graphs.max_rows, _largest_step(config, num_blocks)), config)
            _warm_up(worker, config, num_blocks, chooser, model)
        except BaseException:
            self._ffn_group.close()
            raise
        promise_s = config.tpot_sla_ms and config.tpot_sla_ms / 1e3
        pace = Pace(promise_s, config.max_num_seqs, model)
        scheduler = Scheduler(config, num_blocks=num_blocks, eos_token_ids=spec.eos_token_ids, pace=pace)
        self.loop = EngineLoop(Engine(worker, scheduler, chooser, model), on_update, self._constraints.prepare)
        kv_cache_tokens = num_blocks * config.block_size
        self.info = WorkerInfo(self.name, os.getpid(), device.type, half.weight_bytes(), kv_cache_tokens)
        logger.info("%s: %.1f MB of weights and %d KV tokens on %s in %.1f s", self.name, self.info.weight_bytes / 1e6,
                    kv_cache_tokens, device.type, time.perf_counter() - started)  # fmt: skip

    @property
    def recorder(self) -> HopRecorder:
        """Of its hops."""
        return self._ffn_group.hops.recorder

    def totals(self) -> WorkerTotals:
        """What it has done since it was loaded, warm-up included. Callable from any thread."""
        hops = self._ffn_group.hops
        return WorkerTotals(self.name, "attention", hops.layers.read(), hops.waits())

    def replace_ffn(self, index: int, connector: Connector) -> None:
        """FFN worker `index` is new or was restarted, and is reached this way now. Callable from any thread."""
        self._ffn_group.replace(index, connector)

    def give_up_ffn(self, index: int, reason: str) -> None:
        """FFN worker `index` will not come back. Callable from any thread."""
        self._ffn_group.give_up(index, reason)

    def note_unplaced_ffn(self, missing: Mapping[int, str]) -> None:
        """What the cluster lacks for FFN workers to be placed, by index. Callable from any thread."""
        self._ffn_group.unplaced = missing

    def share_host(self, config: ServeConfig) -> None:
        """The numbers of workers are those of `config` now. Callable from any thread."""
        self.worker.threads = threads_per_worker(config, usable_cores())

    def retire_ffn(self, index: int, timeout_s: float) -> bool:
        """FFN worker `index` is to leave: whether no call to it is under way any more. Callable from any thread."""
        return self._ffn_group.retire(index, timeout_s)

    def is_alive(self) -> bool:
        """Whether requests are run."""
        return self.loop.is_alive()

    @property
    def failure(self) -> str:
        """Why requests are run no more. Only a bug ends the engine's thread; the log has it."""
        return "" if self.is_alive() else "the engine's thread has ended"

    def stalled_s(self) -> float:
        """Since when the engine has been at one step without an answer from any FFN worker; 0 while it is idle."""
        busy_since = self.loop.busy_since
        if busy_since is None:
            return 0.0
        return time.monotonic() - max(busy_since, self._ffn_group.progressed_at)

    def stop(self) -> None:
        """Ends the engine's thread after the step under way, then the links."""
        self.loop.stop()
        self._constraints.close()
        self._ffn_group.close()


def _largest_step(config: ServeConfig, num_blocks: int) -> int:
    """Requests that may be in decoding at once."""
    return min(config.max_num_seqs, config.max_num_batched_tokens, num_blocks)


def _constraints(config: ServeConfig, spec: ModelSpec) -> Constraints:
    threads = threads_per_worker(config, usable_cores())
    return Constraints.load(Path(config.model), spec.vocab_size, spec.eos_token_ids, threads=threads)


def _graphs(
    config: ServeConfig, half: AttentionHalf, cache: Sequence[Tensor], capture: CUDACapture
) -> AttentionGraphs:
    assert config.max_model_len is not None  # it is resolved
    return AttentionGraphs(
        half,
        cache,
        block_size=config.block_size,
        max_rows=config.max_num_seqs,
        max_model_len=config.max_model_len,
        capture=capture,
    )


def _record_graphs(worker: AttentionWorker, largest: int, config: ServeConfig) -> None:
    """All that steps with so many requests, or fewer, may need, so that none of them is slow, and none is measured so."""
    num_micro_batches = MAX_MICRO_BATCHES if config.micro_batches == "auto" else int(config.micro_batches)
    for power in range((largest - 1).bit_length() + 1):
        worker.record_graphs(min(2**power, largest), num_micro_batches)


def _warm_up(
    worker: AttentionWorker,
    config: ServeConfig,
    num_blocks: int,
    chooser: MicroBatchChooser,
    model: StepTimeModel,
) -> None:
    # The first step touches all memory for the first time: it is no measurement.
    for plan, timing in worker.warm_up([1, *_warm_up_sizes(config, num_blocks)])[1:]:
        chooser.observe(timing)
        model.observe(StepWork.of(plan), timing.total_s)


def _models_of_time(config: ServeConfig, spec: ModelSpec) -> tuple[MicroBatchChooser, StepTimeModel]:
    """What predicts the times of steps, as far as it is known before one has run."""
    chooser = MicroBatchChooser(config.micro_batches)
    if config.profile is None:
        return chooser, StepTimeModel()
    times = profiled_times(config, spec)
    tell_chooser(times, chooser, config.max_num_seqs)
    return chooser, profiled_model(times, config.max_num_seqs, config.max_num_batched_tokens)


def _warm_up_sizes(config: ServeConfig, num_blocks: int) -> list[int]:
    """Batch sizes to measure at start: powers of two up to a full step, when a choice depends on them and no profile has them."""
    largest = _largest_step(config, num_blocks)
    if config.profile is not None or (config.micro_batches != "auto" and config.tpot_sla_ms is None):
        return [largest]
    return [2**power for power in range(largest.bit_length())]
