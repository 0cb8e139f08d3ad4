"""Running a job: every choice's tokens become pieces of text, whichever choice has news first.

What lives here: one choice from its request to its last piece, with stop strings and metrics, and the merging of
several choices. What does not: OpenAI's JSON (answers/). Whoever closes the iterator ends all choices at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from afd_server.api.admission import Choice
from afd_server.api.errors import GenerationFailedError
from afd_server.api.protocol.generation import GenerationFields
from afd_server.api.settings import Service
from afd_server.errors import OverloadedError, UnavailableError
from afd_server.telemetry.metrics import REFUSED, Metrics
from afd_server.text.detokenizer import Detokenizer, StopStrings
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import FinishReason, GenerationRequest, RequestOutput, RequestTimes, TokenLogprobs

logger = logging.getLogger(__name__)

# Of a request that has ended: itself, when, why, and with how many tokens of output.
Record = Callable[[GenerationRequest, RequestTimes, str, int], None]

# Pieces that wait for a client who reads slowly; beyond them, the choices' own streams wait.
MAX_WAITING_PIECES = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of a choice since its piece before.

    text may be shorter than token_ids say: what could become a stop string, or is half a character, comes later.
    finish_reason: "stop" or "length" in the last piece. stop_reason: the stop string or the id of stop_token_ids.
    logprobs: one entry for each of token_ids if they were asked for. prompt_logprobs: all of the prompt's, from its second
    token on, in the first piece with tokens, or the last one.
    """

    choice: Choice
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class OutputText:
    """The text of one choice, from its tokens. marks: see run_choice."""

    def __init__(
        self, choice: Choice, body: GenerationFields, tokenizer: Tokenizer, marks: Sequence[str] = ()
    ) -> None:
        self._choice = choice
        self._body = body
        self._eos_token_id = tokenizer.eos_token_id
        self._num_tokens = 0
        self._prompt_logprobs: list[TokenLogprobs] = []  # those that no piece has yet
        self._stop = StopStrings(body.stop, include=body.include_stop_str_in_output)
        self._detokenizer = Detokenizer(
            tokenizer,
            choice.prompt.token_ids,
            skip_special_tokens=body.skip_special_tokens,
            spaces_between_special_tokens=body.spaces_between_special_tokens,
            kept_special=tokenizer.special_ids(marks) if marks else (),
        )

    def take(self, output: RequestOutput) -> Piece:
        """The piece that `output` makes, the last one if it ends the request or completes a stop string."""
        text, taken = "", 0
        self._prompt_logprobs += output.prompt_logprobs
        for token_id in output.token_ids:
            taken += 1
            self._num_tokens += 1
            ends = taken == len(output.token_ids) and token_id == output.stop_token_id
            if ends and not self._body.include_stop_str_in_output:
                continue  # a token that ends the output is no part of its text
            text += self._feed(self._detokenizer.add(token_id))
            if self._stop.found is not None:
                break
        if output.finish_reason is not None and self._stop.found is None:
            text += self._feed(self._detokenizer.flush())
            text += self._stop.flush()
        finish_reason, stop_reason = self._reasons(output)
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if taken or finish_reason:
            prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        return Piece(
            self._choice,
            text,
            output.token_ids[:taken],
            output.logprobs[:taken],
            finish_reason,
            stop_reason,
            output.cached_tokens,
            prompt_logprobs,
        )

    def _feed(self, text: str) -> str:
        return self._stop.feed(text, may_stop=self._num_tokens > self._body.min_tokens) if text else ""

    def _reasons(self, output: RequestOutput) -> tuple[str | None, str | int | None]:
        if self._stop.found is not None:
            return FinishReason.STOP.value, self._stop.found
        if output.finish_reason is None:
            return None, None
        token_id = output.stop_token_id
        listed = token_id in self._choice.request.sampling.stop_token_ids
        is_eos = token_id == self._eos_token_id and not self._body.ignore_eos
        return output.finish_reason.value, token_id if listed and not is_eos else None


class Clock:
    """What metrics and traces are told of one choice."""

    def __init__(self, choice: Choice, metrics: Metrics, record: Record | None) -> None:
        self._request, self._metrics, self._record = choice.request, metrics, record
        self._prefill_s = 0.0
        self._started = self._last = self._first = time.monotonic()
        self._num_tokens = 0
        metrics.observe_prompt(len(choice.prompt.token_ids))

    def tokens(self, num_tokens: int, prefill_s: float) -> None:
        now = time.monotonic()
        self._prefill_s += prefill_s
        if num_tokens:
            self._metrics.observe_tokens(num_tokens, now - self._last, first=not self._num_tokens)
            self._first = self._first if self._num_tokens else now
            self._last = now
            self._num_tokens += num_tokens

    def finish(self, reason: str) -> None:
        now = time.monotonic()
        self._metrics.observe_finish(
            reason,
            now - self._started,
            self._last - self._first,
            self._num_tokens,
            ttft_s=self._first - self._started,
            prefill_s=self._prefill_s,
        )
        if self._record is not None:
            self._record(self._request, self._times(now), reason, self._num_tokens)

    def _times(self, now: float) -> RequestTimes:
        if not self._num_tokens:
            return RequestTimes(self._started, None, None, None, now)
        # On the worker's clock only its duration is known.
        scheduled = max(self._started, self._first - self._prefill_s)
        return RequestTimes(self._started, scheduled, self._first, self._last, now)


async def run_choice(
    service: Service,
    choice: Choice,
    body: GenerationFields,
    tokenizer: Tokenizer,
    metrics: Metrics,
    marks: Sequence[str] = (),
    record: Record | None = None,
) -> AsyncGenerator[Piece, None]:
    """All pieces of one choice. marks: special tokens that its text shows. record: told of its end. Raises ServingError when it
    cannot be finished."""
    sampling = choice.request.sampling
    if sampling.max_tokens == 0 and sampling.prompt_logprobs is None:  # an echo of the prompt alone
        yield Piece(choice, finish_reason=FinishReason.LENGTH.value)
        return
    output_text, clock = OutputText(choice, body, tokenizer, marks), Clock(choice, metrics, record)
    reason = FinishReason.ABORT.value  # unless one of the lines below is reached
    try:
        piece = Piece(choice)
        async with aclosing(service.generate(choice.request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                _raise_failure(output)
                piece = output_text.take(output)
                clock.tokens(len(piece.token_ids), output.prefill_s)
                if piece.finish_reason is not None:
                    break
                if (
                    piece.token_ids
                ):  # otherwise a part of the prompt has been reported, and is kept until all is
                    yield piece
        # The machine has let go of the request before the client gets its last words.
        if piece.finish_reason is None:
            raise GenerationFailedError("the request ended without a reason")
        reason = piece.finish_reason
        yield piece
    except OverloadedError:
        reason = REFUSED
        raise
    except Exception as error:
        reason = FinishReason.ERROR.value
        logger.warning("a request failed: %s", error)
        raise
    finally:
        clock.finish(reason)


def _raise_failure(output: RequestOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise GenerationFailedError(output.error or "the request failed")
    if output.finish_reason is FinishReason.ABORT:
        raise UnavailableError(output.error or "the server ended the request")


async def interleave(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of all sources as they come. The first failure ends them all, and so does closing this iterator."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as pieces:
            async for piece in pieces:
                yield piece
        return
    waiting: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(MAX_WAITING_PIECES)

    async def pump(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    await waiting.put(piece)
            await waiting.put(None)
        except Exception as error:
            await waiting.put(error)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(pumps)
        while running:
            news = await waiting.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                running -= 1
            else:
                yield news
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
