"""Steps on one attention and one FFN worker, each a process, and what they took.

What lives here: starting both, running the grid, and a few requests through the engine for what it adds to a step. What does not:
which steps (grid.py), and the fit (planner/fit.py). The memory of a shared machine changes its speed from one moment to the
next, so the grid is gone through several times, in a different order each, and medians count.
"""

from __future__ import annotations

import itertools
import queue
import random
import secrets
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from afd_server.attention.worker import AttentionWorker
from afd_server.cluster.layout import link_shape
from afd_server.cluster.workers import AttentionReplica
from afd_server.config import ServeConfig
from afd_server.errors import ServingError
from afd_server.models.spec import ModelSpec
from afd_server.planner.fit import StepSample
from afd_server.profiling.ffn_process import ffn_process
from afd_server.profiling.grid import VISIT_STEPS, Plans, Point, blocks_of, points
from afd_server.transport.connect import connect
from afd_server.types import GenerationRequest, ReplicaUpdate, SamplingParams, StepTiming

ROUNDS = 5
# So long each visit goes on with the same requests, for at least so many steps.
VISIT_S, VISIT_LEAST_STEPS = 0.3, 4
STEP_TIMEOUT_S = 300.0
# Requests that go through the engine, and the tokens of each.
ENGINE_SIZES = (1, 8, 32)
ENGINE_PROMPT, ENGINE_TOKENS = 16, 24

Progress = Callable[[int, int], None]


def measure(config: ServeConfig, spec: ModelSpec, progress: Progress) -> list[StepSample]:
    """`config` is a resolved one of one attention and one FFN worker. progress: called with how many of how many visits are done."""
    secret = secrets.token_hex(16)
    updates: queue.SimpleQueue[ReplicaUpdate] = queue.SimpleQueue()
    with ffn_process(config, secret) as endpoint:
        connector = partial(connect, endpoint, link_shape(config, spec), 0, secret.encode(), config.transport)
        replica = AttentionReplica(config, 0, {0: connector}, updates.put, workers_per_gpu=2)
        try:
            between = _engine_overhead(replica, spec, config, updates)
            return _grid_samples(replica, spec, config, between, progress)
        finally:
            replica.stop()


def _grid_samples(
    replica: AttentionReplica,
    spec: ModelSpec,
    config: ServeConfig,
    between: dict[int, float],
    progress: Progress,
) -> list[StepSample]:
    assert config.max_model_len is not None
    grid = points(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_model_len,
        num_blocks=replica.info.kv_cache_tokens // config.block_size,
        block_size=config.block_size,
    )
    plans, order = Plans(spec.vocab_size, config.block_size), random.Random(0)
    replica.worker.randomise_cache(max(point.requests * blocks_of(point, config.block_size) for point in grid))
    timings: dict[Point, list[StepTiming]] = {point: [] for point in grid}
    for round_number in range(ROUNDS + 1):
        for number, point in enumerate(order.sample(grid, len(grid))):
            taken = _visit(replica.worker, plans, point)
            if round_number:  # the first one touches memory for the first time
                # Nor is the first step like the others: the requests of a step that decodes were in the one before, too.
                timings[point] += taken[1:] or taken
            progress(round_number * len(grid) + number + 1, (ROUNDS + 1) * len(grid))
    return [_sample(point, taken, between) for point, taken in timings.items()]


def _visit(worker: AttentionWorker, plans: Plans, point: Point) -> list[StepTiming]:
    """The times of a few steps of the same requests, which go on with what they sampled; of prompts one step."""
    plan = plans.first(point)
    taken: list[StepTiming] = []
    for number in range(VISIT_STEPS if point.new_tokens == 1 else 1):
        if number >= VISIT_LEAST_STEPS and sum(timing.total_s for timing in taken) > VISIT_S:
            break
        output = worker.execute(plan)
        taken.append(output.timing)
        plan = plans.following(plan, {token.request_id: token.token_id for token in output.tokens})
    return taken


def _sample(point: Point, taken: Sequence[StepTiming], between: dict[int, float]) -> StepSample:
    """The medians of a point's steps. What the FFN did beside the wire is what the attention worker waited for."""
    in_step_s = statistics.median(t.total_s - t.attention_s - t.bubble_s for t in taken)
    ffn_s = statistics.median(t.ffn_s for t in taken)
    nearest = min(between, key=lambda size: abs(size - point.requests))
    return StepSample(
        rows=point.rows,
        context_tokens=point.context_tokens,
        chunk_pairs=point.chunk_pairs,
        samples=point.requests,
        attention_s=statistics.median(t.attention_s for t in taken),
        ffn_s=ffn_s,
        wire_s=max(0.0, statistics.median(t.bubble_s for t in taken) - ffn_s),
        overhead_s=in_step_s + between[nearest],
    )


def _engine_overhead(
    replica: AttentionReplica, spec: ModelSpec, config: ServeConfig, updates: queue.SimpleQueue[ReplicaUpdate]
) -> dict[int, float]:
    """Seconds between two executions of a step, by requests in it: scheduling, accounting, publishing."""
    found = {}
    for size in ENGINE_SIZES:
        if size <= config.max_num_seqs:
            steps = _run_requests(replica, spec, updates, size)
            full = [
                now.period_s - now.total_s
                for before, now in itertools.pairwise(steps)
                if before.num_tokens == now.num_tokens == size
            ]
            if full:
                found[size] = max(0.0, statistics.median(full))
    assert found, "no step held all requests"
    return found


def _run_requests(
    replica: AttentionReplica, spec: ModelSpec, updates: queue.SimpleQueue[ReplicaUpdate], size: int
) -> list[StepTiming]:
    draw = random.Random(size)
    sampling = SamplingParams(max_tokens=ENGINE_TOKENS, temperature=0.0, ignore_eos=True)
    for _ in range(size):
        prompt = tuple(draw.randrange(spec.vocab_size) for _ in range(ENGINE_PROMPT))
        replica.loop.submit(GenerationRequest(secrets.token_hex(8), prompt, sampling))
    running, steps = size, []
    while running:
        update = updates.get(timeout=STEP_TIMEOUT_S)
        for output in update.outputs:
            if output.error:
                raise ServingError(output.error)
            running -= output.finish_reason is not None
        if update.stats.timing is not None:
            steps.append(update.stats.timing)
    return steps
