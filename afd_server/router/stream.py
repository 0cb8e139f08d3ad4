"""One request as the router holds it: what was sent to the client, and what waits to be.

What lives here: the state of a request across the replicas that serve it. What does not: which replicas those are
(router.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Sequence
from itertools import chain

from afd_server.errors import ServingError, UnavailableError
from afd_server.types import FinishReason, GenerationRequest, RequestOutput

# Ends without a token of their own. What came before them reaches the client first.
FAILURES = (FinishReason.ERROR, FinishReason.ABORT)


class Stream:
    """The outputs of one request, in order and each once, whoever produces them.

    Those that wait together leave as one: a reader that has fallen behind catches up at the price of a single output.
    The queue is unbounded but its content is not: each output holds at least one of the request's max_tokens tokens,
    or of its prompt's log-probabilities, so a client that reads slowly costs no more memory than its own answer.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._token_ids: list[int] = []
        self._num_prompt_logprobs = 0
        self._waiting: deque[RequestOutput | ServingError] = deque()
        self._news = asyncio.Event()
        self._give_up: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def has_output(self) -> bool:
        return bool(self._token_ids)

    @property
    def num_output_tokens(self) -> int:
        """All that replicas gave, those before a failover included."""
        return len(self._token_ids)

    def put(self, output: RequestOutput) -> None:
        """Takes in what a replica gave."""
        if self.has_output and (output.cached_tokens or output.prefill_s):
            # The first output of the replica, not of the request.
            output = dataclasses.replace(output, cached_tokens=0, prefill_s=0.0)
        self._token_ids += output.token_ids
        self._num_prompt_logprobs += len(output.prompt_logprobs)
        self._wake(output)

    def fail(self, error: ServingError) -> None:
        """Nobody will produce the rest."""
        self._wake(error)

    async def next(self) -> RequestOutput:
        """All that has come since the last call, at least one output. Raises the error after `fail`."""
        while not self._waiting:
            self._news.clear()
            await self._news.wait()
        first = self._waiting.popleft()
        if isinstance(first, ServingError):
            raise first
        outputs = [first]
        while self._waiting:
            following = self._waiting[0]
            if isinstance(following, ServingError) or following.finish_reason in FAILURES:
                break
            self._waiting.popleft()
            outputs.append(following)
        return joined(outputs)

    def resumed(self) -> GenerationRequest:
        """The request for a replica that is to go on from here."""
        known = (*self.request.resumed_output_token_ids, *self._token_ids)
        num_prompt_logprobs = self.request.resumed_prompt_logprobs + self._num_prompt_logprobs
        return dataclasses.replace(
            self.request, resumed_output_token_ids=known, resumed_prompt_logprobs=num_prompt_logprobs
        )

    def give_up_after(self, timeout_s: float, reason: str) -> None:
        """Fails unless `keep_on` comes first. A deadline that runs already stays."""
        if self._give_up is None:
            self._give_up = asyncio.get_running_loop().call_later(
                timeout_s, self.fail, UnavailableError(reason)
            )

    def keep_on(self) -> None:
        """A replica has taken it on, or nobody waits for it any more."""
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None

    def _wake(self, news: RequestOutput | ServingError) -> None:
        self._waiting.append(news)
        self._news.set()


def joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Successive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    return dataclasses.replace(
        outputs[-1],
        token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
        logprobs=tuple(chain.from_iterable(output.logprobs for output in outputs)),
        prompt_logprobs=tuple(chain.from_iterable(output.prompt_logprobs for output in outputs)),
        cached_tokens=sum(output.cached_tokens for output in outputs),
        prefill_s=sum(output.prefill_s for output in outputs),
    )
