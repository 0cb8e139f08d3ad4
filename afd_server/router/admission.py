"""Who may start, who waits and who is refused, so that the promise to those who run is kept.

What lives here: the prediction of a request's times, its wait in the router, the refusals. What does not: which replica
serves it (router.py, the only caller), how replicas keep their pace and what they foresee (engine/pace.py), the order of
those who wait (fair_queue.py). Nothing here runs without a promise of time per token (`--tpot-sla-ms`).

A replica takes a request when one more keeps the pace, and when what it has still to read fits its next steps: so requests
wait here, where priority, fairness and deadlines hold, not in a replica. From each replica's forecast follow, for p prompt
and o output tokens, the seconds of its steps that they take: p * prompt_token_s + o * request_s, of the limit_s - base_s
that a step of limit_s has for them. The wait is the work of those ahead, at the speed of all replicas together. What first
tokens really took corrects it: forecasts know neither what else slows the machine down nor who will overtake.

A request whose first token is predicted after `--ttft-sla-ms` is refused at once, one that has waited so long that it would
be is refused then, and beyond `--max-queue-len` the last in order is. A replica that has nothing to do takes anything,
whatever is predicted: a prediction that became too high would else never be corrected. Who was admitted and lost its
replica is not asked again.
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
# Of the promise of the first token: for what the prediction does not know.
MARGIN = 0.1
# So much of what is known of earlier predictions is left after each further one, and the correction that follows is bounded.
MEMORY = 0.95
CORRECTIONS = (0.5, 4.0)
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
    """For a request that comes now: seconds to its first token, and per token after it if it ran at once."""

    ttft_s: float
    tpot_s: float


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
        self._queued: dict[Stream, tuple[Waiting, asyncio.TimerHandle]] = {}
        self._unanswered: dict[Stream, tuple[float, float]] = {}  # when it came, and the uncorrected prediction
        self._taken_s = self._predicted_s = 1.0
        self._output_tokens = OUTPUT_TOKENS

    def enter(self, stream: Stream, fleet: Fleet) -> None:
        """Places the request, or lets it wait: then it is placed later, or fails. Raises OverloadedError."""
        request, loads = stream.request, fleet.loads()
        now_s = self._clock()
        waiting = self._queue.add(stream, self._cost_tokens(request), now_s)
        prediction = self._predict(waiting, loads)
        late = self._ttft_sla_s is not None and prediction.ttft_s > (1 - MARGIN) * self._ttft_sla_s
        if late and all(load.num_requests for load in loads):
            self._queue.drop(waiting)
            raise self._refusal("ttft_predicted", prediction)
        wait_s = self._longest_wait_s(request, loads)
        self._unanswered[stream] = now_s, prediction.ttft_s / self._correction
        timer = asyncio.get_running_loop().call_later(wait_s, self._expire, stream, fleet)
        self._queued[stream] = waiting, timer
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
            num_tokens = len(waiting.stream.request.prompt_token_ids)
            free = [load.name for load in fleet.loads() if load.has_room(num_tokens)]
            if not free or not fleet.place(waiting.stream, free):
                break
            self._queue.serve(waiting)
            self._forget(waiting.stream)
            self._metrics.observe_queue_time(self._clock() - waiting.arrived_s)

    def leave(self, stream: Stream) -> None:
        """It does not wait any more, if it did."""
        self._unanswered.pop(stream, None)
        if stream in self._queued:
            self._queue.drop(self._queued[stream][0])
            self._forget(stream)

    def note_output(self, stream: Stream) -> None:
        """It has got tokens. Where they are the first, they tell how good the prediction was."""
        if stream in self._unanswered:
            came_s, predicted_s = self._unanswered.pop(stream)
            self._taken_s = MEMORY * self._taken_s + self._clock() - came_s
            self._predicted_s = MEMORY * self._predicted_s + predicted_s

    def note_end(self, num_output_tokens: int) -> None:
        """A request has ended with so many tokens."""
        self._output_tokens += SMOOTHING * (num_output_tokens - self._output_tokens)

    @property
    def _correction(self) -> float:
        least, most = CORRECTIONS
        return min(max(self._taken_s / max(self._predicted_s, 1e-9), least), most)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _forget(self, stream: Stream) -> None:
        self._queued.pop(stream)[1].cancel()
        self._metrics.set_queue_length(len(self._queue))

    def _expire(self, stream: Stream, fleet: Fleet) -> None:
        """It has waited as long as it may."""
        prediction = self._predict(self._queued[stream][0], fleet.loads())
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

    def _longest_wait_s(self, request: GenerationRequest, loads: Sequence[ReplicaLoad]) -> float:
        """After it the first token comes too late, if the prompt is read beside others."""
        if self._ttft_sla_s is None:
            return QUEUE_TIMEOUT_S
        own = len(request.prompt_token_ids), self._expected_output(request)
        own_s = [work_s(load.forecast, *own) + load.forecast.limit_s for load in loads if load.forecast]
        return max(0.0, self._ttft_sla_s - self._correction * min(own_s, default=0.0))

    def _predict(self, waiting: Waiting, loads: Sequence[ReplicaLoad]) -> Prediction:
        """What the forecasts say, as far as there are any."""
        known = [(load, load.forecast) for load in loads if load.forecast is not None]
        if not known:
            return Prediction(0.0, 0.0)
        ahead = self._queue.ahead(waiting)
        prompt_tokens = sum(len(other.stream.request.prompt_token_ids) for other in ahead)
        output_tokens = sum(self._expected_output(other.stream.request) for other in ahead)
        speeds = [1 / max(work_s(forecast, prompt_tokens, output_tokens), 1e-9) for _, forecast in known]
        request = waiting.stream.request
        own = len(request.prompt_token_ids), self._expected_output(request)
        wait_s = 1 / sum(speeds) if ahead else 0.0
        return Prediction(
            self._correction * (wait_s + min(_reading_s(load, *own) for load, _ in known)),
            min(forecast.base_s + (load.num_requests + 1) * forecast.request_s for load, forecast in known),
        )


def variable_s(forecast: StepForecast) -> float:
    """What a step has for requests, beyond what it takes in any case."""
    return max(forecast.limit_s - forecast.base_s, forecast.request_s, 1e-9)


def work_s(forecast: StepForecast, prompt_tokens: float, output_tokens: float) -> float:
    """Seconds for which so many tokens keep a busy replica."""
    work = prompt_tokens * forecast.prompt_token_s + output_tokens * forecast.request_s
    return work * forecast.limit_s / variable_s(forecast)


def _reading_s(load: ReplicaLoad, prompt_tokens: int, output_tokens: float) -> float:
    """From a request's start at this replica to its first token.

    Prompts get what decoding requests leave of a step; on a busy replica, where some end all the time, at least the share
    that prompts have of the work.
    """
    forecast = load.forecast
    assert forecast is not None
    own_s = prompt_tokens * forecast.prompt_token_s
    share = own_s / max(own_s + output_tokens * forecast.request_s, 1e-9)
    step_s = max(load.free_s, share * variable_s(forecast), 1e-9)
    reading_s = own_s + load.reading_tokens * forecast.prompt_token_s
    return max(1.0, reading_s / step_s) * (forecast.limit_s if load.num_requests else forecast.base_s + own_s)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
