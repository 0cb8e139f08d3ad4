"""How many micro-batches a step gets, and which request goes into which.

What lives here: the division, the prediction of a step's time, and the choice. What does not: which requests are in
the step (scheduler.py) and the pipeline itself (pipeline.py, whose hop order the prediction uses).

More micro-batches overlap attention with the FFN, and read the weights of both sides more often. So with few tokens 1
is the right answer, with many 2 to 4, and where the change comes is measured:

    a(t), f(t), w(t)   attention, FFN and wire time of one hop with a micro-batch of t tokens, from steps that ran as one
                       micro-batch (with more, the wire time contains overlap, and both sides may share a processor)
    predicted(m)       a simulation of the pipeline: the attention side works in `hop_order`, one hop after the other;
                       a call arrives w/2 later, is served in order of arrival for f, and is back after another w/2
    corrected(m)       predicted(m) * measured / predicted of the last steps of this size that ran with m

The least corrected time wins, a larger m only by a margin. Times are smoothed per power of two of tokens, interpolated
between, and not guessed beyond what was measured: a step of a larger size runs as one micro-batch and is the measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from afd_server.config import MAX_MICRO_BATCHES
from afd_server.pipeline import hop_order
from afd_server.types import StepTiming

# Weight of a new measurement in a running mean.
SMOOTHING = 0.2
# How much faster each further micro-batch must make a step, since noise also has its minimum somewhere.
MARGIN = 0.03
# Fewer measured sizes than this say nothing about the slope.
MIN_MEASURED_SIZES = 2
# A choice is remembered for this many steps; and each so often a step is run as one micro-batch to measure it anew.
STEPS_PER_DECISION = 16
STEPS_PER_REFRESH = 256


def divide(num_tokens: Sequence[int], num_micro_batches: int) -> list[list[int]]:
    """The indices of the requests of each micro-batch, balanced by tokens and none of them empty.

    num_tokens: of each request; no request is cut. The largest goes first, each into the lightest micro-batch so far.
    """
    assert 1 <= num_micro_batches <= len(num_tokens)
    micro_batches: list[list[int]] = [[] for _ in range(num_micro_batches)]
    loads = [0] * num_micro_batches
    for index in sorted(range(len(num_tokens)), key=lambda index: -num_tokens[index]):
        lightest = loads.index(min(loads))
        micro_batches[lightest].append(index)
        loads[lightest] += num_tokens[index]
    return [sorted(micro_batch) for micro_batch in micro_batches]


@dataclass(frozen=True, slots=True)
class HopTimes:
    """Seconds of one hop of a micro-batch of `tokens` tokens, or their running mean."""

    tokens: float
    attention_s: float
    ffn_s: float
    wire_s: float

    def mixed(self, other: HopTimes, share: float) -> HopTimes:
        """`share` of the other, the rest of this one, in every field."""
        return HopTimes(*(
            (1 - share) * mine + share * theirs
            for mine, theirs in zip(self._values(), other._values(), strict=True)
        ))  # fmt: skip

    def scaled(self, factor: float) -> HopTimes:
        return HopTimes(*(factor * value for value in self._values()))

    def _values(self) -> tuple[float, float, float, float]:
        return self.tokens, self.attention_s, self.ffn_s, self.wire_s


def predict_step_s(hops: Sequence[HopTimes], num_layers: int) -> float:
    """Seconds of a step with one micro-batch per entry of `hops`, each making one hop per layer.

    A pass has num_layers calls and num_layers + 1 pieces of attention work around them, taken as equally long.
    """
    clock_s = ffn_free_s = 0.0
    answered_s = [0.0] * len(hops)
    for micro_batch, hop in hop_order(len(hops), num_layers):
        times = hops[micro_batch]
        clock_s = max(clock_s, answered_s[micro_batch]) + times.attention_s * num_layers / (num_layers + 1)
        if hop < num_layers:
            ffn_free_s = max(ffn_free_s, clock_s + times.wire_s / 2) + times.ffn_s
            answered_s[micro_batch] = ffn_free_s + times.wire_s / 2
    return clock_s


@dataclass(frozen=True, slots=True)
class Expectation:
    """What was predicted for the step that is being run: to be compared with what it took."""

    size: int
    num_micro_batches: int
    predicted_s: float


class MicroBatchChooser:
    """The number of micro-batches of each step. setting: "auto", or "1" to "4". Used by one thread.

    `choose` comes before a step and `observe` after it; steps that nobody chose for (the warm-up) are observed too.
    """

    def __init__(self, setting: str) -> None:
        self._fixed = None if setting == "auto" else int(setting)
        self._num_layers = 0
        self._measured: dict[int, HopTimes] = {}
        self._corrections: dict[tuple[int, int], float] = {}
        self._decisions: dict[tuple[int, ...], Expectation] = {}
        self._num_observed = 0
        self._measured_at: dict[int, int] = {}
        self._expected: Expectation | None = None

    def choose(self, num_tokens: Sequence[int]) -> int:
        """For a step with these numbers of tokens, one entry per request. Never more than there are requests."""
        most = min(MAX_MICRO_BATCHES, len(num_tokens))
        if self._fixed is not None:
            return min(self._fixed, most)
        key = tuple(sorted(num_tokens))
        if key not in self._decisions:
            self._decisions[key] = self._decide(key, most)
        self._expected = self._decisions[key]
        return self._expected.num_micro_batches

    def observe(self, timing: StepTiming) -> None:
        """Takes in what a step took."""
        expected, self._expected = self._expected, None
        if self._fixed is not None or not timing.num_hops or not timing.num_tokens:
            return
        self._num_observed += 1
        if self._num_observed % STEPS_PER_DECISION == 0:
            self._decisions.clear()
        if timing.num_micro_batches == 1:
            self._measure(timing)
        if expected is not None and expected.predicted_s > 0:
            place = (expected.size, expected.num_micro_batches)
            ratio = (timing.attention_s + timing.bubble_s) / expected.predicted_s
            self._corrections[place] = _smoothed(self._corrections.get(place, 1.0), ratio)

    def _measure(self, timing: StepTiming) -> None:
        if not self._measured:
            self._decisions.clear()
        self._num_layers = timing.num_hops
        size = _size(timing.num_tokens)
        times = HopTimes(timing.num_tokens, *(
            seconds / timing.num_hops for seconds in (timing.attention_s, timing.ffn_s, timing.wire_s)
        ))  # fmt: skip
        known = self._measured.get(size)
        self._measured[size] = times if known is None else known.mixed(times, SMOOTHING)
        self._measured_at[size] = self._num_observed

    def _decide(self, num_tokens: Sequence[int], most: int) -> Expectation:
        total = sum(num_tokens)
        size = _size(total)
        whole = Expectation(size, 1, self._predict([total]) if self._measured else 0.0)
        known = len(self._measured) >= MIN_MEASURED_SIZES and size <= max(self._measured)
        measured_ago = self._num_observed - self._measured_at.get(size, self._num_observed)
        if not known or measured_ago >= STEPS_PER_REFRESH:
            return whole
        best, best_s = whole, self._corrected_s(whole)
        for count in range(2, most + 1):
            loads = [sum(num_tokens[index] for index in part) for part in divide(num_tokens, count)]
            split = Expectation(size, count, self._predict(loads))
            split_s = self._corrected_s(split) * (1 + MARGIN * (count - 1))
            if split_s < best_s:
                best, best_s = split, split_s
        return best

    def _corrected_s(self, expectation: Expectation) -> float:
        place = (expectation.size, expectation.num_micro_batches)
        return expectation.predicted_s * self._corrections.get(place, 1.0)

    def _predict(self, loads: Iterable[int]) -> float:
        return predict_step_s([self._times(load) for load in loads], self._num_layers)

    def _times(self, tokens: int) -> HopTimes:
        """Of a micro-batch of this size: on the line between the measured sizes around it.

        Below the smallest it is the smallest's: reading the weights takes its time even for one token. Above the
        largest, which is within a factor of two, it is in proportion.
        """
        points = sorted(self._measured.values(), key=lambda times: times.tokens)
        if tokens <= points[0].tokens:
            return points[0]
        if tokens >= points[-1].tokens:
            return points[-1].scaled(tokens / points[-1].tokens)
        above = next(index for index, point in enumerate(points) if point.tokens >= tokens)
        low, high = points[above - 1], points[above]
        return low.mixed(high, (tokens - low.tokens) / (high.tokens - low.tokens))


def _smoothed(old: float, new: float) -> float:
    return (1 - SMOOTHING) * old + SMOOTHING * new


def _size(num_tokens: int) -> int:
    """The power-of-two bucket of a number of tokens: 1, 2, 3-4, 5-8, ..."""
    return (num_tokens - 1).bit_length()
