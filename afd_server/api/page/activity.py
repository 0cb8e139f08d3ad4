"""What requests and steps did while somebody looked: rates, times per token, shares of a step.

What lives here: the sums of a short past, fed by `telemetry.metrics.Metrics` through its `listener`. What does not: when
they are sent (live.py). Times are the monotonic clock's seconds.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from afd_server.types import ReplicaStats, StepTiming

# Of the distribution of times: how far it looks back, and its buckets to a factor of two.
WINDOW_S = 60.0
BUCKETS_PER_OCTAVE = 6
# Over how long a rate is a mean: shorter, and the bursts of a step show; longer, and it lags.
RATE_WINDOW_S = 2.0
MAX_REQUESTS_SHOWN = 200


class Latencies:
    """How often which time came within the last WINDOW_S, in buckets of equal ratio, counted in slices of a second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slices: deque[tuple[float, Counter[int]]] = deque()

    def add(self, seconds: float, count: int = 1) -> None:
        now = self._clock()
        if not self._slices or now - self._slices[-1][0] >= 1:
            self._slices.append((now, Counter()))
        self._slices[-1][1][bucket_of(seconds)] += count

    def counts(self) -> list[tuple[int, int]]:
        """(bucket, count), rising."""
        oldest = self._clock() - WINDOW_S
        while self._slices and self._slices[0][0] < oldest:
            self._slices.popleft()
        total: Counter[int] = Counter()
        for _, counts in self._slices:
            total.update(counts)
        return sorted(total.items())


def bucket_of(seconds: float) -> int:
    """Bucket b holds the times from lower_edge_s(b) up to lower_edge_s(b + 1)."""
    return math.floor(math.log2(max(seconds, 1e-6)) * BUCKETS_PER_OCTAVE)


def lower_edge_s(bucket: int) -> float:
    edge: float = 2.0 ** (bucket / BUCKETS_PER_OCTAVE)
    return edge


def quantile_s(counts: Iterable[tuple[int, int]], share: float) -> float | None:
    """The time below which this share of all counts lies, by the place within its bucket; None without counts."""
    counts = list(counts)
    left = share * sum(count for _, count in counts)
    for bucket, count in counts:
        if left <= count:
            return lower_edge_s(bucket) * 2 ** (left / count / BUCKETS_PER_OCTAVE)
        left -= count
    return None


@dataclass(slots=True)
class StepSums:
    """Steps of one replica since they were last asked for."""

    num_steps: int = 0
    num_tokens: int = 0
    total_s: float = 0.0
    bubble_s: float = 0.0

    def add(self, timing: StepTiming) -> None:
        self.num_steps += 1
        self.num_tokens += timing.num_tokens
        self.total_s += timing.total_s
        self.bubble_s += timing.bubble_s


class Activity:
    """A `telemetry.metrics.Listener`, on the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.between_tokens = Latencies(clock)
        # Of requests that ended: (when, mean seconds a token after the first).
        self._requests: deque[tuple[float, float]] = deque(maxlen=MAX_REQUESTS_SHOWN)
        self._steps: dict[str, StepSums] = {}
        self._totals = Totals()
        self._before: deque[tuple[float, Totals]] = deque([(clock(), Totals())])

    def prompt(self, num_tokens: int) -> None:
        self._totals.prompt_tokens += num_tokens

    def tokens(self, num_tokens: int, since_last_s: float, *, first: bool) -> None:
        self._totals.output_tokens += num_tokens
        if not first:
            self.between_tokens.add(since_last_s / num_tokens, num_tokens)

    def finished(self, time_per_output_token_s: float | None) -> None:
        self._totals.requests += 1
        if time_per_output_token_s is not None:
            self._requests.append((self._clock(), time_per_output_token_s))

    def stepped(self, replica: str, stats: ReplicaStats) -> None:
        if stats.timing is not None:
            self._steps.setdefault(replica, StepSums()).add(stats.timing)

    def rates(self) -> Totals:
        """What came per second, of late. Counts the time since it was last asked."""
        now = self._clock()
        while len(self._before) > 1 and now - self._before[1][0] >= RATE_WINDOW_S:
            self._before.popleft()
        began, before = self._before[0]
        self._before.append((now, Totals(*self._totals.values())))
        elapsed_s = max(now - began, RATE_WINDOW_S / 4)  # the first ones have no past
        pairs = zip(self._totals.values(), before.values(), strict=True)
        return Totals(*((mine - theirs) / elapsed_s for mine, theirs in pairs))

    def recent_requests_s(self) -> list[float]:
        """The mean time per token of requests that ended within WINDOW_S."""
        oldest = self._clock() - WINDOW_S
        return [seconds for when, seconds in self._requests if when >= oldest]

    def take_steps(self) -> dict[str, StepSums]:
        """Of each replica that has made any since this was last asked."""
        taken, self._steps = self._steps, {}
        return taken


@dataclass(slots=True)
class Totals:
    """Also what came of each per second."""

    output_tokens: float = 0.0
    prompt_tokens: float = 0.0
    requests: float = 0.0

    def values(self) -> tuple[float, float, float]:
        return self.output_tokens, self.prompt_tokens, self.requests
