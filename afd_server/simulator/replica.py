"""An attention replica in simulated time: this server's scheduler and pace, around steps that only take their time.

What lives here: what engine/loop.py and engine/engine.py do for a replica that serves, in the same order: requests are taken in
between two steps, a plan is made, executed and accounted for. It is a `ReplicaClient`, so the router has it as any other.
What does not: how long a step takes (an `Execution`), and who kills it (fleet.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from afd_server.config import ServeConfig
from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.pace import Pace
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel, StepWork
from afd_server.errors import RequestError, WorkerDiedError, WorkerError
from afd_server.simulator.virtual_time import current_events
from afd_server.simulator.work import Execution, Step, StepModel
from afd_server.types import (
    FinishReason,
    GenerationRequest,
    ReplicaUpdate,
    RequestOutput,
    SampledToken,
    ScheduledRequest,
    StepOutput,
    StepPlan,
    StepTiming,
)

logger = logging.getLogger(__name__)

# What every request gets: nobody reads it.
TOKEN = 1


@dataclass
class ReplicaAccount:
    """What a replica has done, over all its lives. Seconds."""

    num_steps: int = 0
    num_tokens: int = 0
    attention_s: float = 0.0
    bubble_s: float = 0.0
    steps_s: float = 0.0

    def note(self, timing: StepTiming) -> None:
        self.num_steps += 1
        self.num_tokens += timing.num_tokens
        self.attention_s += timing.attention_s
        self.bubble_s += timing.bubble_s
        self.steps_s += timing.total_s


class SimulatedReplica:
    """One life of a replica. kv_blocks: of its cache. on_update: sees every update when the router does.

    account: goes on where the life before it ended.
    """

    def __init__(
        self,
        name: str,
        index: int,
        config: ServeConfig,
        kv_blocks: int,
        steps: StepModel,
        execution: Execution,
        *,
        account: ReplicaAccount | None = None,
        on_update: Callable[[ReplicaUpdate], None] | None = None,
    ) -> None:
        self.worker = name
        self.index = index
        self.account = account or ReplicaAccount()
        self._steps = steps
        self._execution = execution
        self._events = current_events()
        self._on_update = on_update
        self._chooser, self._model = MicroBatchChooser(config.micro_batches), StepTimeModel()
        promise_s = config.tpot_sla_ms and config.tpot_sla_ms / 1e3
        pace = Pace(promise_s, config.max_num_seqs, self._model, clock=lambda: self._events.now_s)
        self._learns = pace.promises
        self._scheduler = Scheduler(config, num_blocks=kv_blocks, eos_token_ids=(), pace=pace)
        self._commands: list[GenerationRequest | str] = []
        self._wakes: asyncio.Future[None] | None = None
        self._step: Step | None = None
        self._ended: StepTiming | WorkerError | None = None
        self._is_dead = False
        self._warm_up(config.max_num_seqs)

    # --- for the router ---------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> None:
        if self._is_dead:
            raise WorkerDiedError(self.worker, "it has failed")
        self._commands.append(request)
        self._wake_if_idle()

    def abort(self, request_id: str) -> None:
        self._commands.append(request_id)
        self._wake_if_idle()

    def close(self) -> None:
        """The router has left; whatever runs is of no use."""

    async def updates(self) -> AsyncIterator[ReplicaUpdate]:
        while True:
            outputs = [output for command in self._take_commands() for output in self._carry_out(command)]
            if outputs:
                yield self._update(outputs, None)
            plan = self._scheduler.schedule(self._chooser.choose)
            if plan is None:
                await self._sleep()
                continue
            yield await self._run(plan)

    # --- for whoever disturbs it ------------------------------------------------------------------------------------

    def kill(self) -> None:
        """Its process is gone, with all of its requests."""
        self._is_dead = True
        if self._step is not None:
            self._step.cancel()
        self._wake()

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _run(self, plan: StepPlan) -> ReplicaUpdate:
        hops = self._steps.hops(plan)
        asked = [part for parts in plan.micro_batches for part in parts if part.samples]
        overhead_s = self._steps.overhead_s(len(asked))
        self._ended = None
        self._step = self._execution.begin(self.index, hops, overhead_s, self._note_end)
        ended = await self._end_of_step()
        self._step = None
        if isinstance(ended, WorkerError):
            return self._update(self._scheduler.fail_step(str(ended)), None)
        return self._complete(plan, asked, ended)

    async def _end_of_step(self) -> StepTiming | WorkerError:
        await self._sleep()
        assert self._ended is not None
        return self._ended

    def _complete(self, plan: StepPlan, asked: list[ScheduledRequest], timing: StepTiming) -> ReplicaUpdate:
        tokens = tuple([SampledToken(part.request_id, TOKEN) for part in asked])
        outputs = self._scheduler.complete(StepOutput(plan.step, tokens, timing))
        self._chooser.observe(timing)
        if self._learns:
            self._model.observe(StepWork.of(plan), timing.total_s)
        self.account.note(timing)
        return self._update(outputs, timing)

    def _update(self, outputs: list[RequestOutput], timing: StepTiming | None) -> ReplicaUpdate:
        update = ReplicaUpdate(tuple(outputs), self._scheduler.stats(timing))
        if self._on_update is not None:
            self._on_update(update)
        return update

    def _take_commands(self) -> list[GenerationRequest | str]:
        commands, self._commands = self._commands, []
        return commands

    def _carry_out(self, command: GenerationRequest | str) -> list[RequestOutput]:
        if isinstance(command, str):
            return self._scheduler.abort(command)
        try:
            self._scheduler.add(command)
        except RequestError as error:
            return [RequestOutput(command.request_id, finish_reason=FinishReason.ERROR, error=str(error))]
        return []

    def _note_end(self, ended: StepTiming | WorkerError) -> None:
        self._ended = ended
        self._wake()

    def _wake_if_idle(self) -> None:
        if self._step is None:
            self._wake()

    def _wake(self) -> None:
        if self._wakes is not None and not self._wakes.done():
            self._wakes.set_result(None)
            self._events.woke = True

    async def _sleep(self) -> None:
        """Until the step has ended, a command has come, or the replica has died."""
        if not self._is_dead and (self._step is None or self._ended is None):
            self._wakes = asyncio.get_running_loop().create_future()
            await self._wakes
            self._wakes = None
        if self._is_dead:
            raise WorkerDiedError(self.worker, "it has failed")

    def _warm_up(self, max_num_seqs: int) -> None:
        """The first measurements, as a starting replica makes them: decode steps of each power of two of requests."""
        count = 1
        while count <= max_num_seqs:
            work = StepWork(count, count, 0, count)
            hop, num_layers = self._steps.hop(work), self._steps.times.num_layers
            total_s = num_layers * (hop.attention_s + hop.ffn_s + hop.wire_s) + self._steps.overhead_s(count)
            timing = StepTiming(total_s, num_layers * hop.attention_s, num_layers * hop.ffn_s, num_layers * hop.wire_s,
                                num_layers * (hop.ffn_s + hop.wire_s), num_layers, 1, count)  # fmt: skip
            self._chooser.observe(timing)
            self._model.observe(work, total_s)
            count *= 2
