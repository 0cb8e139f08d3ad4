"""Which steps are measured, as plans that an attention worker carries out.

What lives here: the grid over rows and context, and the plans. What does not: running them (measure.py). A plan names blocks of
the KV cache that hold no prompt: what is read from memory is as much, and what comes out is looked at by nobody.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass

from afd_server.types import SamplingParams, ScheduledRequest, StartedRequest, StepPlan

CONTEXTS = (16, 128, 512, 2048, 8192, 32768)
PROMPTS = (128, 512)
# Most steps after each other of the same requests.
VISIT_STEPS = 16


@dataclass(frozen=True, slots=True)
class Point:
    """A step of `requests` requests with `new_tokens` tokens each, after `context` tokens in the cache."""

    requests: int
    new_tokens: int
    context: int

    @property
    def rows(self) -> int:
        return self.requests * self.new_tokens

    @property
    def context_tokens(self) -> int:
        """Cache entries that decoding requests read, as StepWork counts them."""
        return self.requests * (self.context + 1) if self.new_tokens == 1 else 0

    @property
    def chunk_pairs(self) -> float:
        own = self.new_tokens * (self.new_tokens + 1) / 2
        return self.requests * (self.new_tokens * self.context + own) if self.new_tokens > 1 else 0.0


def points(
    max_requests: int, max_tokens: int, max_context: int, *, num_blocks: int, block_size: int
) -> list[Point]:
    """Decoding at powers of two of requests and several contexts, and a few prompts; what fits the cache and the model."""
    sizes = [2**power for power in range(max_requests.bit_length())]
    decoding = [Point(size, 1, context) for size, context in itertools.product(sizes, CONTEXTS)]
    prompts = [Point(1, tokens, context) for tokens, context in itertools.product(PROMPTS, (0, CONTEXTS[2]))]
    return [
        point
        for point in (*decoding, *prompts)
        if point.context + point.new_tokens + VISIT_STEPS <= max_context
        and point.rows <= max_tokens
        and point.requests * blocks_of(point, block_size) <= num_blocks
    ]


class Plans:
    """Plans of points. Requests start with random tokens: equal ones would all choose the same experts."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self._vocab_size, self._block_size = vocab_size, block_size
        self._random = random.Random(0)
        self._step = itertools.count(1)
        self._running: tuple[str, ...] = ()

    def first(self, point: Point) -> StepPlan:
        """The first step of a visit to a point; the requests of the visit before are given back."""
        step = next(self._step)
        names = tuple(f"profile-{step}-{index}" for index in range(point.requests))
        finished, self._running = self._running, names
        blocks = blocks_of(point, self._block_size)
        requests, started = [], []
        for index, name in enumerate(names):
            tokens = tuple(self._random.choices(range(self._vocab_size), k=point.new_tokens))
            table = tuple(range(index * blocks, (index + 1) * blocks))
            requests.append(ScheduledRequest(name, point.context, tokens, table, samples=True))
            started.append(StartedRequest(name, tokens, (), SamplingParams(VISIT_STEPS, temperature=0.0)))
        return StepPlan(step, (tuple(requests),), tuple(started), finished)

    def following(self, plan: StepPlan, tokens: Mapping[str, int]) -> StepPlan:
        """The step after `plan`: each request goes on with its token, as when it decodes."""
        (requests,) = plan.micro_batches
        moved_on = (
            dataclasses.replace(
                request,
                start_position=request.start_position + len(request.token_ids),
                token_ids=(tokens[request.request_id],),
            )
            for request in requests
        )
        return StepPlan(next(self._step), (tuple(moved_on),))


def blocks_of(point: Point, block_size: int) -> int:
    """Of one request, for all steps of a visit."""
    return -(-(point.context + point.new_tokens + VISIT_STEPS) // block_size)
