"""The pace of a replica: how much a step may hold so that every running request gets its tokens in the time promised.

What lives here: the promise (`--tpot-sla-ms`) turned into a step's budget, into room for one more request, and into the
forecast that the router admits by. What does not: the prediction itself (step_time.py), and which request gets what of the
budget (scheduler.py, the caller).

The promise is about a request's mean time per token. A step therefore aims at the promise less MARGIN, and may be longer
or must be shorter by a part of what the request that is furthest behind has saved or lost so far; while somebody is behind,
newcomers wait. A prompt gets LEAST_TOKENS of every step all the same, and a request whose promise cannot be kept any more
holds nobody up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from afd_server.engine.request_state import RequestState
from afd_server.engine.step_time import StepTimeModel, StepWork
from afd_server.types import StepForecast

# Of the promise: for the way to the client, and for what a model does not know.
MARGIN = 0.15
# What was saved or lost is spent or made good over this many steps.
HORIZON_STEPS = 8
# The shortest and the longest step that is aimed at, in steps of the promised pace.
SHORTEST, LONGEST = 0.5, 2.0
# Tokens of a prompt that go into a step in any case, so that nobody who was admitted waits for long.
LEAST_TOKENS = 16
# The share of a request that ends in the mean length of outputs.
SMOOTHING = 0.05
# The price of a prompt's token is taken from no fewer of them together: over a few, a noisy model may be flat.
LEAST_CHUNK = 64
# What a step reports of prompts, in log-probabilities: they go to the router in one message.
MAX_ENTRIES = 2**18
# Steps between two forecasts.
FORECAST_STEPS = 4


class StepBudget:
    """What is left of one step while it is being filled. limit_s: what the step may take; math.inf for no limit.

    entries: what is reported with each prompt token that is read; the whole step reports MAX_ENTRIES of them, or one token's.
    """

    def __init__(self, max_tokens: int, model: StepTimeModel, limit_s: float) -> None:
        self.tokens = max_tokens
        self._model = model
        self._limit_s = limit_s
        self._work = StepWork()
        self._has_prompts = False
        self._entries_left = MAX_ENTRIES

    def take(self, start: int, tokens: int, samples: bool, entries: int = 0) -> None:
        """A request's part goes into the step."""
        self.tokens -= tokens
        self._entries_left -= tokens * entries
        self._has_prompts |= tokens > 1
        if not math.isinf(self._limit_s):
            self._work += StepWork.part(start, tokens, tokens if entries else samples)

    def close(self) -> None:
        """Nothing more goes into the step: what comes later must not overtake."""
        self.tokens = 0

    def fitting(self, start: int, wanted: int, entries: int = 0) -> int:
        """How many of `wanted` prompt tokens after `start` still fit. Where nobody decodes there is no hurry."""
        most = min(wanted, self.tokens)
        if entries:
            nothing_yet = self._entries_left == MAX_ENTRIES
            most = min(most, max(self._entries_left // entries, int(nothing_yet)))
        if math.isinf(self._limit_s) or not self._work.tokens or self._fits(start, most, wanted, entries):
            return most
        fitting = largest(lambda tokens: self._fits(start, tokens, wanted, entries), most)
        return fitting if self._has_prompts else min(most, max(fitting, LEAST_TOKENS))

    def _fits(self, start: int, tokens: int, wanted: int, entries: int) -> bool:
        work = self._work + StepWork.part(start, tokens, tokens if entries else tokens == wanted)
        return self._model.predict_s(work) <= self._limit_s


class Pace:
    """The promise of one replica; without one (None), nothing is limited. Used by one thread.

    clock: monotonic seconds.
    """

    def __init__(
        self,
        tpot_sla_s: float | None,
        max_requests: int,
        model: StepTimeModel,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target_s = math.inf if tpot_sla_s is None else (1 - MARGIN) * tpot_sla_s
        self._max_requests = max_requests
        self._model = model
        self._clock = clock
        self._mean_output_tokens = 0.0
        self._mean_context_tokens = 0.0
        self._num_ended = 0
        self._room_s = self._target_s  # for newcomers: less while somebody is behind
        self._forecast: StepForecast | None = None
        self._forecast_in_steps = 0

    @property
    def promises(self) -> bool:
        return not math.isinf(self._target_s)

    def begin_step(self, max_tokens: int, decoding: Sequence[RequestState]) -> StepBudget:
        """The budget of a step in which these requests get a token each."""
        limit_s = self._limit_s(decoding) if self.promises and decoding else math.inf
        self._room_s = min(limit_s, self._target_s)
        return StepBudget(max_tokens, self._model, limit_s)

    def has_room(self, running: Sequence[RequestState], state: RequestState) -> bool:
        """Whether `state` may run with these until they end: their steps, when all of them decode, keep the promise."""
        if not self.promises or not running or state.was_admitted:
            return True
        known = len(state.token_ids) + sum(len(other.token_ids) for other in running)
        count = len(running) + 1
        return self._decode_s(count, known / count + self._mean_output_tokens / 2) <= self._room_s

    def note_tokens(self, states: Iterable[RequestState]) -> None:
        """These have just got a token."""
        now = self._clock()
        for state in states:
            if state.first_token_at is None:
                state.first_token_at = now

    def note_end(self, state: RequestState) -> None:
        """It has ended with all of its output."""
        self._num_ended += 1
        share = max(1 / self._num_ended, SMOOTHING)
        self._mean_output_tokens += share * (state.num_output - self._mean_output_tokens)
        self._mean_context_tokens += share * (len(state.token_ids) - self._mean_context_tokens)

    def forecast(self) -> StepForecast | None:
        """What the router needs to know, renewed every FORECAST_STEPS calls."""
        self._forecast_in_steps -= 1
        if self.promises and self._model.is_fitted and self._forecast_in_steps <= 0:
            self._forecast_in_steps = FORECAST_STEPS
            self._forecast = self._new_forecast()
        return self._forecast

    # --- inside ----------------------------------------------------------------------------------------------------

    def _limit_s(self, decoding: Sequence[RequestState]) -> float:
        now = self._clock()
        savings_s = []
        for state in decoding:
            if state.first_token_at is None:
                continue  # resumed: its first token here is still to come
            num_later = state.num_output - len(state.request.resumed_output_token_ids) - 1
            saved_s = num_later * self._target_s - (now - state.first_token_at)
            num_left = state.request.sampling.max_tokens - state.num_output
            if saved_s + num_left * (1 - SHORTEST) * self._target_s >= 0:
                savings_s.append(saved_s)
        limit_s = self._target_s + min(savings_s, default=0.0) / HORIZON_STEPS
        return min(max(limit_s, SHORTEST * self._target_s), LONGEST * self._target_s)

    def _decode_s(self, count: int, context_tokens: float) -> float:
        return self._model.predict_s(StepWork(count, count * context_tokens, 0, count))

    def _new_forecast(self) -> StepForecast:
        """The model along two lines: decoding requests of the usual context, and prompt tokens beside half of them."""
        context = max(1.0, self._mean_context_tokens - self._mean_output_tokens / 2)
        most = largest(lambda count: self._decode_s(count, context) <= self._room_s, self._max_requests)
        one_s = self._decode_s(1, context)
        if most <= 1:  # one at a time, however long it takes
            base_s, request_s = 0.0, one_s
        else:
            request_s = (self._decode_s(most, context) - one_s) / (most - 1)
            base_s = max(0.0, one_s - request_s)
        half = max(1, most // 2)
        beside = StepWork(half, half * context, 0, half)
        beside_s = self._model.predict_s(beside)
        fitting = largest(
            lambda tokens: self._model.predict_s(beside + StepWork.part(0, tokens, False)) <= self._room_s,
            int(context),
        )
        chunk = max(fitting, LEAST_CHUNK)
        chunk_s = self._model.predict_s(beside + StepWork.part(0, chunk, False)) - beside_s
        return StepForecast(
            limit_s=max(self._target_s, one_s),
            base_s=base_s,
            request_s=request_s,
            prompt_token_s=chunk_s / chunk,
            max_requests=max(1, most),
        )


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which a condition holds that holds for all below it; 0 when for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
