"""Which steps are measured, as plans that an attention worker carries out.

What lives here: the grid over rows and context, and the plans. What does not: running them (measure.py). A plan names blocks of
the KV cache that nobody has filled: what is read from memory is as much, and what comes out is looked at by nobody.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from afd_server.types import SamplingParams, ScheduledRequest, StartedRequest, StepPlan

CONTEXTS = (16, 128, 512, 2048, 8192, 32768)
PROMPTS = (128, 512)
# Of the cache that a point may take, since whole blocks are counted.
CACHE_SHARE = 0.9
VISIT_STEPS = 3


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


def points(max_requests: int, max_tokens: int, max_context: int, cache_tokens: int) -> list[Point]:
    """Decoding at powers of two of requests and several contexts, and a few prompts; what fits the cache and the model."""
    sizes = [2**power for power in range(max_requests.bit_length())]
    decoding = [Point(size, 1, context) for size, context in itertools.product(sizes, CONTEXTS)]
    prompts = [Point(1, tokens, context) for tokens, context in itertools.product(PROMPTS, (0, CONTEXTS[2]))]
    return [
        point
        for point in (*decoding, *prompts)
        if point.context + point.new_tokens + VISIT_STEPS <= max_context
        and point.rows <= max_tokens
        and point.requests * (point.context + point.new_tokens) <= CACHE_SHARE * cache_tokens
    ]


class Plans:
    """Plans of points, each request with fresh random tokens: equal ones would all choose the same experts."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self._vocab_size, self._block_size = vocab_size, block_size
        self._random = random.Random(0)
        self._step = itertools.count(1)
        self._running: tuple[str, ...] = ()

    def visit(self, point: Point) -> Iterator[StepPlan]:
        """VISIT_STEPS steps after each other of the same requests, as when they decode; one for prompts."""
        steps = VISIT_STEPS if point.new_tokens == 1 else 1
        first = next(self._step)
        names = tuple(f"profile-{first}-{index}" for index in range(point.requests))
        blocks = -(-(point.context + point.new_tokens + steps) // self._block_size)
        tables = [tuple(range(index * blocks, (index + 1) * blocks)) for index in range(point.requests)]
        finished, self._running = self._running, names
        for step in range(steps):
            tokens = [tuple(self._random.choices(range(self._vocab_size), k=point.new_tokens)) for _ in names]
            requests = tuple(
                ScheduledRequest(name, point.context + step, new, table, samples=True)
                for name, new, table in zip(names, tokens, tables, strict=True)
            )
            if step:
                yield StepPlan(next(self._step), (requests,))
            else:
                sampling = SamplingParams(steps, temperature=0.0)
                started = (
                    StartedRequest(name, new, (), sampling) for name, new in zip(names, tokens, strict=True)
                )
                yield StepPlan(first, (requests,), tuple(started), finished)
