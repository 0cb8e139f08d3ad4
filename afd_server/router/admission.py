"""Who may start, who waits and who is refused, so that the promise to those who run is kept.

What lives here: the prediction of a request's times, its wait in the router, the refusals. What does not: which replica
serves it (router.py, the only caller), how replicas keep their pace and what they foresee (engine/pace.py), the order of
those who wait (fair_queue.py). Nothing here runs without a promise of time per token (`--tpot-sla-ms`).

A replica takes a request when one more keeps the pace, and when what it has still to read fits its next steps: so requests
wait here, where priority, fairness and deadlines hold, not in a replica. From each replica's forecast follow, for p prompt
and o output tokens, the seconds of its steps that they take: p * prompt_token_s + o * request_s, of the limit_s - base_s
that a step of limit_s has for them.

The time to the first token has two parts. The wait here is the work of those ahead, at the speed of all replicas together;
it is only an estimate, corrected by what waits really took on average. From its start a request needs the rest of the step
under way and the steps that read its prompt; this is known well, and is taken for as long as nearly all have really needed.
So a request must start by `--ttft-sla-ms` less the second part: it is refused at once when its wait is predicted to be longer,
and when the time has come and it still waits. Beyond `--max-queue-len` the last in order is refused. A replica that has
nothing to do takes anything, whatever is predicted: a prediction that became too high would else never be corrected. Who was
admitted and lost its replica is not asked again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from afd_server.errors import OverloadedError
from afd_server.router.fair_queue import FairQueue, Waiting
from afd_server.router.stream import Stream
from afd_server.telemetry.metrics import Metrics
from afd_server.types import GenerationRequest, StepForecast

# What a replica may have to read, in steps: one that runs, and the one that is planned when it ends.
READ_AHEAD_STEPS = 2
# Of the promise of the first token: for the way from and to the client.
MARGIN = 0.05
# Of the wait that is possible: who is predicted to need all of it would often wait in vain.
EARLY = 0.9
# So much of what is known of earlier waits is left after each further one; and the correction that follows is bounded, and
# starts from this many seconds that were as expected: short waits say little of long ones.
MEMORY = 0.95
AS_EXPECTED_S = 2.0
CORRECTIONS = (0.5, 4.0)
# So many of those that start need no longer to their first token than is assumed, and how fast the assumption follows.
CERTAINTY = 0.98
ADAPTION = 0.1
# The longest wait where no promise of the first token bounds it.
QUEUE_TIMEOUT_S = 600.0
# The length of outputs that is assumed before one has ended.
OUTPUT_TOKENS = 128.0
# The share of a request that ends in the mean length of outputs.
SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A live replica. num_requests: under way there; of these num_reading have no output yet, with reading_tokens of prompt."""

    name: str
    num_requests: int
    num_reading: int
    reading_tokens: int
    forecast: StepForecast | None

    def has_room(self, prompt_tokens: int) -> bool:
        """Whether a prompt of so many tokens can start here. Without a forecast the first request brings one."""
        if not self.num_requests:
            return True
        if self.forecast is None or self.num_requests >= self.forecast.max_requests:
            return False
        next_steps = READ_AHEAD_STEPS * self.free_s / max(self.forecast.prompt_token_s, 1e-9)
        return not self.num_reading or self.reading_tokens + prompt_tokens <= next_steps

    @property
    def free_s(self) -> float:
        """What a step has for prompts beside the requests that decode now."""
        assert self.forecast is not None
        decoding_s = (self.num_requests - self.num_reading) * self.forecast.request_s
        return max(0.0, variable_s(self.forecast) - decoding_s)


@dataclass(frozen=True, slots=True)
class Prediction:
    """For a request that comes now: seconds until it starts, from then to its first token, and per token after it if it ran at
    once."""

    wait_s: float
    reading_s: float
    tpot_s: float

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.reading_s


@dataclass(frozen=True, slots=True)
class Queued:
    """What belongs to a request while it waits. timer: of its deadline. expected_s: its wait, uncorrected."""

    waiting: Waiting
    timer: asyncio.TimerHandle
    expected_s: float


class Fleet(Protocol):
    """What admission needs of the router."""

    def loads(self) -> Sequence[ReplicaLoad]:
        """Of every replica that takes requests."""

    def place(self, stream: Stream, among: Collection[str]) -> bool:
        """Submits the request to the best of these replicas; False when none of them lives."""


class Admission:
    """The queue before a fleet. Used on one event loop. ttft_sla_s: None for no promise of the first token."""

    def __init__(
        self,
        tpot_sla_s: float,
        ttft_sla_s: float | None,
        max_queue_len: int,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tpot_sla_s = tpot_sla_s
        self._ttft_sla_s = ttft_sla_s
        self._max_queue_len = max_queue_len
        self._metrics = metrics
        self._clock = clock
        self._queue = FairQueue()
        self._queued: dict[Stream, Queued] = {}
        # Of those that have started beside others and have no output yet: when, and how soon it was expected, uncorrected.
        self._reading: dict[Stream, tuple[float, float]] = {}
        self._waited_s = self._expected_wait_s = AS_EXPECTED_S  # sums over the last requests
        self._slowness = 1.0  # nearly all need at most this multiple of what was expected, from their start to the first token
        self._output_tokens = OUTPUT_TOKENS

    def enter(self, stream: Stream, fleet: Fleet) -> None:
        """Places the request, or lets it wait: then it is placed later, or fails. Raises OverloadedError."""
        request, loads = stream.request, fleet.loads()
        waiting = self._queue.add(stream, self._cost_tokens(request), self._clock())
        prediction = self._predict(waiting, loads)
        longest_wait_s = QUEUE_TIMEOUT_S
        if self._ttft_sla_s is not None:
            longest_wait_s = (1 - MARGIN) * self._ttft_sla_s - prediction.reading_s
        if prediction.wait_s > EARLY * longest_wait_s and all(load.num_requests for load in loads):
            self._queue.drop(waiting)
            raise self._refusal("ttft_predicted", prediction)
        timer = asyncio.get_running_loop().call_later(longest_wait_s, self._expire, stream, fleet)
        self._queued[stream] = Queued(waiting, timer, prediction.wait_s / self._correction)
        self.advance(fleet)
        if stream not in self._queued:
            return
        self._metrics.observe_queued()
        self._metrics.set_queue_length(len(self._queue))
        if len(self._queue) > self._max_queue_len:
            last = self._queue.last()
            refusal = self._refusal("queue_full", self._predict(last, loads))
            self.leave(last.stream)
            if last is waiting:
                raise refusal
            last.stream.fail(refusal)

    def advance(self, fleet: Fleet) -> None:
        """Places those who may start now, in order. Called whenever a replica's load has changed."""
        while self._queue:
            waiting = self._queue.first()
            stream, now_s = waiting.stream, self._clock()
            num_tokens = len(stream.request.prompt_token_ids)
            free = [load for load in fleet.loads() if load.has_room(num_tokens)]
            if not free or not fleet.place(stream, [load.name for load in free]):
                break
            self._queue.serve(waiting)
            self._note_wait(stream, now_s)
            self._forget(stream)
            self._metrics.observe_queue_time(now_s - waiting.arrived_s)
            busy = [load for load in free if load.num_requests and load.forecast]
            if busy:
                self._reading[stream] = now_s, min(self._reading_s(load, stream.request) for load in busy)

    def leave(self, stream: Stream) -> None:
        """It does not wait any more, if it did."""
        self._reading.pop(stream, None)
        if stream in self._queued:
            self._queue.drop(self._queued[stream].waiting)
            self._forget(stream)

    def note_output(self, stream: Stream) -> None:
        """It has got tokens. Where they are the first, they tell how long it took from the start."""
        if stream in self._reading:
            began_s, expected_s = self._reading.pop(stream)
            late = self._clock() - began_s > self._slowness * expected_s
            self._slowness *= 1 + ADAPTION * (CERTAINTY if late else CERTAINTY - 1)
            self._slowness = min(max(self._slowness, 1.0), CORRECTIONS[1])

    def note_end(self, num_output_tokens: int) -> None:
        """A request has ended with so many tokens."""
        self._output_tokens += SMOOTHING * (num_output_tokens - self._output_tokens)

    # --- inside ----------------------------------------------------------------------------------------------------

    @property
    def _correction(self) -> float:
        """Of a wait: what waits have really taken, as a multiple of what was expected."""
        least, most = CORRECTIONS
        return min(max(self._waited_s / self._expected_wait_s, least), most)

    def _note_wait(self, stream: Stream, now_s: float) -> None:
        """Its wait has ended."""
        queued = self._queued[stream]
        kept_s = (1 - MEMORY) * AS_EXPECTED_S
        self._waited_s = MEMORY * self._waited_s + kept_s + now_s - queued.waiting.arrived_s
        self._expected_wait_s = MEMORY * self._expected_wait_s + kept_s + queued.expected_s

    def _forget(self, stream: Stream) -> None:
        self._queued.pop(stream).timer.cancel()
        self._metrics.set_queue_length(len(self._queue))

    def _expire(self, stream: Stream, fleet: Fleet) -> None:
        """It has waited as long as it may."""
        prediction = self._predict(self._queued[stream].waiting, fleet.loads())
        self._note_wait(stream, self._clock())
        self.leave(stream)
        stream.fail(self._refusal("ttft_deadline", prediction))

    def _refusal(self, reason: str, prediction: Prediction) -> OverloadedError:
        self._metrics.observe_refusal(reason)
        promised_s = prediction.ttft_s / 2 if self._ttft_sla_s is None else self._ttft_sla_s
        promised = "" if self._ttft_sla_s is None else f", at most {_ms(self._ttft_sla_s)} are promised"
        why = {
            "ttft_predicted": "",
            "ttft_deadline": "; it has waited in vain",
            "queue_full": f"; no more than {self._max_queue_len} may wait",
        }[reason]
        return OverloadedError(
            f"the server is overloaded: {len(self._queue)} requests wait{why}. The first token would come after "
            f"{_ms(prediction.ttft_s)}{promised}; run at once, it would get a token every {_ms(prediction.tpot_s)}, "
            f"{_ms(self._tpot_sla_s)} are promised",
            reason=reason,
            retry_after_s=max(1, math.ceil(prediction.ttft_s - promised_s)),
        )

    def _cost_tokens(self, request: GenerationRequest) -> float:
        return len(request.prompt_token_ids) + self._expected_output(request)

    def _expected_output(self, request: GenerationRequest) -> float:
        return min(request.sampling.max_tokens, self._output_tokens)

    def _predict(self, waiting: Waiting, loads: Sequence[ReplicaLoad]) -> Prediction:
        """What the forecasts say, as far as there are any."""
        known = [(load, load.forecast) for load in loads if load.forecast is not None]
        if not known:
            return Prediction(0.0, 0.0, 0.0)
        ahead = self._queue.ahead(waiting)
        prompt_tokens = sum(len(other.stream.request.prompt_token_ids) for other in ahead)
        output_tokens = sum(self._expected_output(other.stream.request) for other in ahead)
        speeds = [1 / max(work_s(forecast, prompt_tokens, output_tokens), 1e-9) for _, forecast in known]
        return Prediction(
            self._correction / sum(speeds) if ahead else 0.0,
            self._slowness * min(self._reading_s(load, waiting.stream.request) for load, _ in known),
            min(forecast.base_s + (load.num_requests + 1) * forecast.request_s for load, forecast in known),
        )

    def _reading_s(self, load: ReplicaLoad, request: GenerationRequest) -> float:
        """From the request's start at this replica to its first token, uncorrected.

        Prompts get what decoding requests leave of a step; on a busy replica, where some end all the time, at least the share
        that prompts have of the work. And there the step under way has to end first.
        """
        forecast = load.forecast
        assert forecast is not None
        own_s = len(request.prompt_token_ids) * forecast.prompt_token_s
        if not load.num_requests:
            return forecast.base_s + own_s
        share = own_s / max(own_s + self._expected_output(request) * forecast.request_s, 1e-9)
        step_s = max(load.free_s, share * variable_s(forecast), 1e-9)
        num_steps = max(1.0, (own_s + load.reading_tokens * forecast.prompt_token_s) / step_s)
        return (1 + num_steps) * forecast.limit_s


def variable_s(forecast: StepForecast) -> float:
    """What a step has for requests, beyond what it takes in any case."""
    return max(forecast.limit_s - forecast.base_s, forecast.request_s, 1e-9)


def work_s(forecast: StepForecast, prompt_tokens: float, output_tokens: float) -> float:
    """Seconds for which so many tokens keep a busy replica."""
    work = prompt_tokens * forecast.prompt_token_s + output_tokens * forecast.request_s
    return work * forecast.limit_s / variable_s(forecast)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
