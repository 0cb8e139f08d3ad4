"""The attention worker: one step at a time, from a StepPlan to tokens.

What lives here: a step's course (tensors of each micro-batch, the pipeline over them, the sampler) and the warm-up.
What does not: which requests run and which blocks they own (engine/), the model (models/), the wire (transport/).
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from afd_server.attention.constraints import Constraints
from afd_server.attention.ffn_group import FFNGroup
from afd_server.attention.prompt_logprobs import prompt_logprobs
from afd_server.attention.sampler import Sampler
from afd_server.attention.shortcut import Shortcut, shortcut_for
from afd_server.models.attention_graphs import AttentionGraphs
from afd_server.models.batch import AttentionBatch
from afd_server.models.ffn_call import FFNCall
from afd_server.models.halves import AttentionHalf
from afd_server.pipeline import run_pipeline
from afd_server.types import (
    PromptLogprobs,
    SampledToken,
    SamplingParams,
    ScheduledRequest,
    StartedRequest,
    StepOutput,
    StepPlan,
    StepTiming,
)


class AttentionWorker:
    """Carries out plans on the thread that calls it. `cache` holds one tensor per layer (kvcache/storage.py).

    graphs: of the half's layers on this cache, for the micro-batches that they take.
    threads: how many of the processor's it uses from the next step on, set by any thread; None: as torch is set.
    """

    def __init__(
        self,
        half: AttentionHalf,
        cache: Sequence[Tensor],
        ffn_group: FFNGroup,
        *,
        block_size: int,
        device: torch.device,
        graphs: AttentionGraphs | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        self.threads: int | None = None
        self._half = half
        self._cache = cache
        self._ffn_group = ffn_group
        self._block_size = block_size
        self._device = device
        self._graphs = graphs
        self._last: dict[str, AttentionBatch] = {}  # the last step's batches, each by its first request
        self._batches: dict[str, AttentionBatch] = {}  # of the step under way
        self._sampling_s = 0.0  # of the step under way
        self._prompt_logprobs: list[PromptLogprobs] = []  # of the step under way
        self._shortcut = shortcut_for(half, ffn_group)
        self._sampler = Sampler(half.spec.vocab_size, half.spec.eos_token_ids, device, constraints)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        """Runs the plan's tokens through all layers and samples. Raises WorkerError when an FFN shard stays away.

        After an error the KV entries of this step's tokens and the sampling state of its requests are undefined: the same tokens
        may be planned again, of requests that are started again.
        """
        started_at = time.perf_counter()
        if self.threads is not None and self.threads != torch.get_num_threads():
            torch.set_num_threads(self.threads)  # counts for the thread that calls it
        for request_id in plan.finished:
            self._sampler.forget(request_id)
        for request in plan.started:
            self._sampler.start(request)
        self._ffn_group.begin_step(plan.step)
        # Micro-batches that overlap are driven from here, one hop of each in turn.
        shortcut = self._shortcut if len(plan.micro_batches) == 1 else None
        self._last, self._batches, self._sampling_s, self._prompt_logprobs = self._batches, {}, 0.0, []
        passes = [
            self._pass(plan.step, micro_batch, requests, shortcut)
            for micro_batch, requests in enumerate(plan.micro_batches)
        ]
        run = run_pipeline(passes, self._ffn_group, num_hops=self._half.spec.num_layers)
        in_shortcut_s = shortcut.waiting_s if shortcut is not None else 0.0
        wire = self._ffn_group.timing
        return StepOutput(
            step=plan.step,
            tokens=tuple(itertools.chain.from_iterable(run.results)),
            timing=StepTiming(
                total_s=time.perf_counter() - started_at,
                attention_s=run.computing_s - in_shortcut_s - self._sampling_s,
                ffn_s=wire.ffn_s,
                wire_s=wire.wire_s,
                bubble_s=run.waiting_s + in_shortcut_s,
                num_hops=wire.num_hops,
                num_micro_batches=len(passes),
                num_tokens=plan.num_tokens,
                ffn_rows=wire.ffn_rows,
                num_resent=wire.num_resent,
            ),
            prompt_logprobs=tuple(self._prompt_logprobs),
        )

    def _pass(
        self, step: int, micro_batch: int, requests: Sequence[ScheduledRequest], shortcut: Shortcut | None
    ) -> Generator[FFNCall, Tensor, list[SampledToken]]:
        """One micro-batch from its plan to its tokens. It begins and ends while the others' calls are away."""
        x_NH = yield from self._forward(micro_batch, requests, shortcut)
        sampled = [request.request_id for request in requests if request.samples]
        logits_NV = self._half.logits(x_NH[: len(sampled)]) if sampled else None
        started_at = time.perf_counter()
        tokens = [] if logits_NV is None else self._sampler.sample(sampled, logits_NV)
        self._report(requests, x_NH[len(sampled) :])
        self._sampling_s += time.perf_counter() - started_at
        self._ffn_group.hops.sampled(step, micro_batch, len(sampled))
        return tokens

    def _report(self, requests: Sequence[ScheduledRequest], x_MH: Tensor) -> None:
        """Notes what was asked for of prompts, from the rows before their tokens."""
        for request in requests:
            if request.report is not None:
                rows_H, x_MH = x_MH.tensor_split([len(request.report.token_ids)])
                logprobs = prompt_logprobs(request.report, rows_H, self._half)
                self._prompt_logprobs.append(PromptLogprobs(request.request_id, logprobs))

    def _forward(
        self, micro_batch: int, requests: Sequence[ScheduledRequest], shortcut: Shortcut | None
    ) -> Generator[FFNCall, Tensor, Tensor]:
        """The pass of one micro-batch: see AttentionHalf.forward."""
        hops = self._ffn_group.hops
        if self._graphs is not None and self._graphs.take(requests):
            hops.computing_since = time.monotonic()
            return self._graphs.forward(micro_batch, requests)
        batch = self._batch(requests)
        hops.computing_since = time.monotonic()  # of the first layer, not of the batch's tensors
        return self._half.forward(batch, self._cache, shortcut)

    def _batch(self, requests: Sequence[ScheduledRequest]) -> AttentionBatch:
        name = requests[0].request_id
        moved_on = self._last[name].moved_on(requests) if name in self._last else None
        batch = self._batches[name] = moved_on or AttentionBatch.build(requests, self._block_size, self._device)
        return batch

    def record_graphs(self, size: int, num_micro_batches: int) -> None:
        """Runs so many micro-batches of so many requests, which records their graphs on both sides. Writes into KV blocks 0 to
        size - 1, so it must come before the first request."""
        vocab_size = self._half.spec.vocab_size
        parts = tuple(
            ScheduledRequest(f"graph-{row}", 0, (row % vocab_size,), (row,), samples=False)
            for row in range(size)
        )
        self.execute(StepPlan(0, (parts,) * num_micro_batches))

    def randomise_cache(self, num_blocks: int) -> None:
        """Random entries in the first blocks, for measurements without prompts: requests differ from one another, as real ones do,
        and so do the experts that they choose. Nothing may be in these blocks that is still needed."""
        for layer in self._cache:
            layer[:num_blocks].uniform_(-1.0, 1.0)

    def warm_up(self, sizes: Sequence[int]) -> list[tuple[StepPlan, StepTiming]]:
        """Runs one decode-like step per batch size and gives its times: first-touch costs and a first measurement.

        Tokens are drawn: equal ones would all choose the same experts, and a step would be far too fast. Writes into KV
        blocks 0 to max(sizes) - 1, so it must come before the first request.
        """
        measured = []
        generator = random.Random(0)
        for size in sizes:
            names = tuple(f"warm-up-{row}" for row in range(size))
            tokens = [(generator.randrange(self._half.spec.vocab_size),) for _ in names]
            parts = tuple(
                ScheduledRequest(name, 0, token, (row,), True)
                for row, (name, token) in enumerate(zip(names, tokens, strict=True))
            )
            started = tuple(
                StartedRequest(name, token, (), SamplingParams(1, temperature=0.0))
                for name, token in zip(names, tokens, strict=True)
            )
            plan = StepPlan(0, (parts,), started)
            measured.append((plan, self.execute(plan).timing))
            for name in names:
                self._sampler.forget(name)
        return measured
