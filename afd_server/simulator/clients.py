"""The clients of a simulated deployment, and what became of each request.

What lives here: asking the router, and the account of every request. What does not: when they come (demand.py) and sums over
them (results.py).

A client is told of its tokens when its replica gives them; what the router passes on it reads now and then, since one wake-up a
token would cost more than all that is decided about it.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass

from afd_server.errors import OverloadedError, ServingError
from afd_server.router.router import Router
from afd_server.simulator.demand import Demand
from afd_server.traffic import Arrival
from afd_server.types import FinishReason, GenerationRequest, ReplicaUpdate, SamplingParams

READ_EVERY_S = 10.0
# Clients that ask again and again begin one by one over this share of a run: all at once, steps would begin together and stay so.
RAMP = 0.1
# Contents of prompts: the first tokens tell requests apart, so that no two share a prefix.
FILLING = (1,) * (1 << 20)
VOCABULARY = 1 << 16


@dataclass(slots=True)
class Outcome:
    """Of one request, in seconds since the beginning. ended_s: None while it runs. problem: why it has no whole answer."""

    came_s: float
    prompt_tokens: int
    num_tokens: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    ended_s: float | None = None
    problem: str = ""
    refused: bool = False

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.came_s

    @property
    def tpot_s(self) -> float | None:
        """Mean of a whole answer of several tokens."""
        if self.first_s is None or self.num_tokens < 2 or self.ended_s is None or self.problem:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


class Clients:
    """All of them. longest_tokens: of prompt and output; prompts that leave no room are cut. bin_s: of tokens_per_bin. front_end_s:
    what a request takes to the router and its first token back."""

    def __init__(self, router: Router, longest_tokens: int, bin_s: float, front_end_s: float = 0.0) -> None:
        self.outcomes: list[Outcome] = []
        self.tokens_per_bin: dict[int, int] = {}
        self._router = router
        self._longest_tokens = longest_tokens
        self._bin_s = bin_s
        self._front_end_s = front_end_s
        self._time = asyncio.get_running_loop().time
        self._running: dict[str, tuple[Outcome, asyncio.Future[None]]] = {}

    def note_update(self, update: ReplicaUpdate) -> None:
        """A replica has given this, now."""
        now_s = self._time()
        count = 0
        for output in update.outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue
            outcome, ended = running
            if output.token_ids:
                if outcome.first_s is None:
                    outcome.first_s = now_s
                outcome.last_s = now_s
                outcome.num_tokens += len(output.token_ids)
                count += len(output.token_ids)
            if output.finish_reason is not None and not ended.done():
                ended.set_result(None)
        if count:
            index = int(now_s / self._bin_s)
            self.tokens_per_bin[index] = self.tokens_per_bin.get(index, 0) + count

    async def come(self, demand: Demand, duration_s: float) -> None:
        """Lets them come for so long. Returns when the last has come; clients that ask again and again then stop asking."""
        async with asyncio.TaskGroup() as tasks:
            if demand.num_clients is not None:
                for number in range(demand.num_clients):
                    tasks.create_task(self._ask_again(number, demand, duration_s))
                return
            for arrival in demand.arrivals(duration_s):
                await asyncio.sleep(max(0.0, arrival.at_s - self._time()))
                tasks.create_task(self.ask(arrival))

    async def _ask_again(self, number: int, demand: Demand, duration_s: float) -> None:
        generator = random.Random(f"{demand.seed}-{number}")
        await asyncio.sleep(generator.random() * RAMP * duration_s)
        while self._time() < duration_s:
            outcome = await self.ask(demand.draw(self._time(), generator))
            if outcome.num_tokens == 0:  # whoever was refused does not hammer at the door
                await asyncio.sleep(1.0)

    async def ask(self, arrival: Arrival) -> Outcome:
        """One request, to its end."""
        number = len(self.outcomes)
        outcome = Outcome(self._time(), min(arrival.prompt_tokens, self._longest_tokens - 1))
        self.outcomes.append(outcome)
        name = str(number)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[name] = outcome, ended
        prompt = (number % VOCABULARY, number // VOCABULARY, *FILLING[: outcome.prompt_tokens])
        request = GenerationRequest(
            name,
            prompt[: outcome.prompt_tokens],
            SamplingParams(min(arrival.output_tokens, self._longest_tokens - outcome.prompt_tokens)),
        )
        try:
            await asyncio.sleep(self._front_end_s)
            await self._read(request, outcome, ended)
        except ServingError as error:
            outcome.problem, outcome.refused = str(error), isinstance(error, OverloadedError)
        del self._running[name]
        outcome.ended_s = self._time()
        return outcome

    async def _read(self, request: GenerationRequest, outcome: Outcome, ended: asyncio.Future[None]) -> None:
        async with aclosing(self._router.generate(request)) as outputs:
            async for output in outputs:
                if output.finish_reason is not None:
                    if output.finish_reason is FinishReason.ERROR:
                        outcome.problem = output.error or "it failed"
                    return
                if not ended.done():
                    await asyncio.wait((ended,), timeout=READ_EVERY_S)
