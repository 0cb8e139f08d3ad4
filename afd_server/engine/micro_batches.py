"""How many micro-batches a step gets, and which request goes into which.

What lives here: the division, the prediction of a step's time, and the choice. What does not: which requests are in
the step (scheduler.py) and the pipeline itself (pipeline.py, whose hop order the prediction uses).

More micro-batches overlap attention with the FFN, and read the weights of both sides more often. So with few tokens 1
is the right answer, with many 2 to 4, and where the change comes is measured:

    a(t), f(t), w(t)   attention, FFN and wire time of one hop with a micro-batch of t tokens, from steps that ran as one
                       micro-batch (with more, the wire time contains overlap, and both sides may share a processor)
    predicted(m)       a simulation of the pipeline: the attention side works in `hop_order`, one hop after the other;
                       a call arrives w/2 later, is served in order of arrival for f, and is back after another w/2

The prediction takes the two sides as independent, which they are not where they share cores or memory: it says what may
pay, and a trial says what does. Each power of two of tokens has a number in use, 1 at first. Now and then a few steps
run with another number that may pay, which takes its place if it was faster by a margin. Trials become rarer by and by,
and one that goes badly ends after its first step: what they can lose is bounded by their number, not by the machine.
Times are smoothed per power of two of tokens, interpolated between (size_means.py), and not guessed beyond what was
measured: a step of a larger size runs as one micro-batch and is the measurement.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from afd_server.config import MAX_MICRO_BATCHES
from afd_server.engine.size_means import SizeMeans, at, size_of
from afd_server.pipeline import hop_order
from afd_server.types import StepTiming

# Weight of a new measurement in a running mean.
SMOOTHING = 0.2
# How much faster another number must make a step, since noise also has its minimum somewhere.
MARGIN = 0.03
# Fewer measured sizes than this say nothing about the slope.
MIN_MEASURED_SIZES = 2
# A prediction is remembered for this many steps.
STEPS_PER_PREDICTION = 16

# A trial takes this many steps, or one that takes longer than usual by more than TRIAL_LOSS.
TRIAL_STEPS = 3
TRIAL_LOSS = 0.15
# The steps between two trials of a size: so many at first, then each time TRIAL_GROWTH times as many, up to the last.
FIRST_TRIAL_AFTER = 8
TRIAL_GROWTH = 3
LAST_TRIAL_AFTER = 2000


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


class SizeRecord:
    """The number of micro-batches in use for steps of one size, and the trials of others.

    whole_s: seconds of a step with one micro-batch, by its tokens, as far as is known when it is called. What steps took
    is compared in shares of it, since their tokens differ somewhat, and only when it is compared, since it is learnt.
    """

    def __init__(self, whole_s: Callable[[int], float]) -> None:
        self._whole_s = whole_s
        self._best = 1
        self._steps: deque[tuple[int, float]] = deque(
            maxlen=FIRST_TRIAL_AFTER
        )  # (tokens, s): the last with the best
        self._trial: int | None = None
        self._trial_steps: list[tuple[int, float]] = []
        self._num_trials: dict[int, int] = {}  # by micro-batches
        self._pause_steps = self._steps_left = FIRST_TRIAL_AFTER

    def choose(self, predicted_s: Sequence[float]) -> int:
        """For a step whose seconds with 1, 2, ... micro-batches are predicted."""
        if self._trial is None and self._steps_left <= 0:
            self._trial = self._challenger(predicted_s)
        wanted = self._trial or self._best
        return wanted if wanted == 1 or wanted in _promising(predicted_s) else 1

    def note(self, num_micro_batches: int, num_tokens: int, seconds: float) -> None:
        """Takes in what a step took that ran with the number chosen."""
        step = num_tokens, seconds
        if num_micro_batches == self._trial:
            self._trial_steps.append(step)
            bad = self._cost([step]) > (1 + TRIAL_LOSS) * self._cost(self._steps)
            if bad or len(self._trial_steps) == TRIAL_STEPS:
                self._end_trial()
        elif num_micro_batches == self._best:
            self._steps.append(step)
            self._steps_left -= 1

    def _challenger(self, predicted_s: Sequence[float]) -> int | None:
        """What was tried least, of that the fastest by prediction."""
        others = [count for count in (1, *_promising(predicted_s)) if count != self._best]
        return min(
            others, key=lambda count: (self._num_trials.get(count, 0), predicted_s[count - 1]), default=None
        )

    def _end_trial(self) -> None:
        assert self._trial is not None
        self._num_trials[self._trial] = self._num_trials.get(self._trial, 0) + 1
        complete = len(self._trial_steps) == TRIAL_STEPS
        if complete and self._cost(self._trial_steps) < (1 - MARGIN) * self._cost(self._steps):
            self._best = self._trial
            self._steps.clear()
            self._steps.extend(self._trial_steps)
        self._trial = None
        self._trial_steps.clear()
        self._pause_steps = min(TRIAL_GROWTH * self._pause_steps, LAST_TRIAL_AFTER)
        self._steps_left = self._pause_steps

    def _cost(self, steps: Iterable[tuple[int, float]]) -> float:
        return statistics.median(seconds / self._whole_s(tokens) for tokens, seconds in steps)


def _promising(predicted_s: Sequence[float]) -> list[int]:
    """The numbers above 1 that may pay; each further micro-batch must."""
    return [
        count
        for count in range(2, len(predicted_s) + 1)
        if predicted_s[count - 1] < (1 - MARGIN) ** (count - 1) * predicted_s[0]
    ]


class MicroBatchChooser:
    """The number of micro-batches of each step. setting: "auto", or "1" to "4". Used by one thread.

    `choose` comes before a step and `observe` after it; steps that nobody chose for (the warm-up) are observed too.
    """

    def __init__(self, setting: str) -> None:
        self._fixed = None if setting == "auto" else int(setting)
        self._num_layers = 0
        self._measured = SizeMeans(SMOOTHING)  # of HopTimes
        self._records: dict[int, SizeRecord] = {}  # by size
        self._predictions: dict[tuple[int, ...], list[float]] = {}  # by the step's numbers of tokens, sorted
        self._num_observed = 0
        self._chosen: SizeRecord | None = None  # where the next step is noted

    def choose(self, num_tokens: Sequence[int]) -> int:
        """For a step with these numbers of tokens, one entry per request. Never more than there are requests."""
        most = min(MAX_MICRO_BATCHES, len(num_tokens))
        if self._fixed is not None:
            return min(self._fixed, most)
        self._chosen = None
        total = sum(num_tokens)
        if len(self._measured) < MIN_MEASURED_SIZES or not self._measured.covers(total):
            return 1
        key = tuple(sorted(num_tokens))
        predicted_s = self._predictions.get(key)
        if predicted_s is None:
            predicted_s = self._predictions[key] = [self._predict(key, count) for count in range(1, most + 1)]
        self._chosen = self._records.setdefault(size_of(total), SizeRecord(self._whole_s))
        return self._chosen.choose(predicted_s)

    def observe(self, timing: StepTiming) -> None:
        """Takes in what a step took."""
        chosen, self._chosen = self._chosen, None
        if self._fixed is not None or not timing.num_hops or not timing.num_tokens:
            return
        self._num_observed += 1
        if self._num_observed % STEPS_PER_PREDICTION == 0 or not len(self._measured):
            self._predictions.clear()
        if timing.num_micro_batches == 1:
            self._measure(timing)
        if chosen is not None:
            chosen.note(timing.num_micro_batches, timing.num_tokens, timing.attention_s + timing.bubble_s)

    def _measure(self, timing: StepTiming) -> None:
        self._num_layers = timing.num_hops
        seconds = timing.attention_s, timing.ffn_s, timing.wire_s
        self._measured.observe((timing.num_tokens, *(each / timing.num_hops for each in seconds)))

    def _whole_s(self, num_tokens: int) -> float:
        _, *seconds = at(self._measured.points(), num_tokens)
        return self._num_layers * sum(seconds)

    def _predict(self, num_tokens: Sequence[int], num_micro_batches: int) -> float:
        parts = divide(num_tokens, num_micro_batches)
        loads = [sum(num_tokens[index] for index in part) for part in parts]
        points = self._measured.points()
        return predict_step_s([HopTimes(*at(points, load)) for load in loads], self._num_layers)
