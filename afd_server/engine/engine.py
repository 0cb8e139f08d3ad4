"""The engine: one step from a plan to the tokens, with the account kept whatever happens on the way.

What lives here: the order of plan, execution and account, the time from one step to the next, and what an error in
between means. What does not: the thread that calls it (loop.py), the decisions (scheduler.py, micro_batches.py), what
follows from the time (step_time.py) and the execution (attention/worker.py).
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Protocol

from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel, StepWork
from afd_server.errors import RequestError, WorkerError
from afd_server.telemetry.logs import about
from afd_server.types import (
    FinishReason,
    GenerationRequest,
    ReplicaStats,
    ReplicaUpdate,
    RequestOutput,
    StepOutput,
    StepPlan,
)

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """What carries a plan out: the attention worker, or a toy in tests."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """The next token of every request of the plan that samples. Raises WorkerError."""


class Engine:
    """The requests of one replica, step by step. Used by one thread; no method raises for what a request can cause.

    model: learns from every step, for whoever plans with it.
    """

    def __init__(
        self, executor: Executor, scheduler: Scheduler, chooser: MicroBatchChooser, model: StepTimeModel
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._chooser = chooser
        self._model = model
        self._busy_since: float | None = None  # the end of the last step, while there is work
        self._reading: dict[str, float] = {}  # requests without output: since when they have been in steps

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def submit(self, request: GenerationRequest) -> list[RequestOutput]:
        """Queues a request. One that cannot be served ends at once, by an output that says why."""
        with about(request.request_id):
            logger.debug("the request has come: %d tokens of prompt", len(request.prompt_token_ids))
        try:
            self._scheduler.add(request)
        except RequestError as error:
            return [RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=str(error))]
        return []

    def abort(self, request_id: str) -> list[RequestOutput]:
        """Ends a request, frees its blocks and gives its last output; nothing when it is not here (any more)."""
        self._reading.pop(request_id, None)
        with about(request_id):
            logger.debug("nobody waits for the request any more")
        return self._scheduler.abort(request_id)

    def abort_all(self) -> list[RequestOutput]:
        return self._scheduler.abort_all()

    def step(self) -> ReplicaUpdate:
        """Runs the next step. When it fails, its requests end with the error's sentence and the others go on."""
        outputs: list[RequestOutput] = []
        timing = None
        began = self._busy_since or time.perf_counter()
        try:
            plan = self._scheduler.schedule(self._chooser.choose)
            if plan is None:
                return ReplicaUpdate((), self.stats())
            for started in plan.started:  # one that comes back from preemption has begun before
                self._reading.setdefault(started.request_id, began)
            work = StepWork.of(plan)
            predicted_s = self._model.predict_s(work)
            output = self._executor.execute(plan)
            outputs += self._with_prefill(self._scheduler.complete(output))
            period_s = time.perf_counter() - began
            timing = replace(output.timing, period_s=period_s, predicted_s=predicted_s)
            self._chooser.observe(timing)
            self._model.observe(work, period_s)
        except WorkerError as error:
            logger.error("a step failed: %s", error)
            outputs += self._fail_step(str(error))
        except Exception as error:  # whatever it is, the other requests must not wait for ever
            logger.exception("a step failed by a bug of this server")
            outputs += self._fail_step(f"internal error: {type(error).__name__}: {error}")
        self._busy_since = time.perf_counter() if self.has_work else None
        return ReplicaUpdate(tuple(outputs), self._scheduler.stats(timing))

    def _with_prefill(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """The same, first ones with how long the request took to get there."""
        if not self._reading:
            return outputs
        now = time.perf_counter()
        for at, output in enumerate(outputs):
            if output.request_id in self._reading and (output.token_ids or output.finish_reason):
                outputs[at] = replace(output, prefill_s=now - self._reading.pop(output.request_id))
        return outputs

    def _fail_step(self, error: str) -> list[RequestOutput]:
        outputs = self._scheduler.fail_step(error)
        for output in outputs:
            self._reading.pop(output.request_id, None)
            with about(output.request_id):
                logger.error("the request ends with its step: %s", error)
        return outputs

    def stats(self) -> ReplicaStats:
        """The state between two steps."""
        return self._scheduler.stats()

    def check(self) -> None:
        """Raises BlockAccountError when blocks have been lost."""
        self._scheduler.check()
