"""From an admitted job to the HTTP answer: as one JSON body or as events, until the client leaves.

What lives here: what all routes that generate share. What does not: who may ask (gate.py), what may be asked (admission.py),
and what an answer looks like (answers/).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import Request, Response

from afd_server.api.admission import Job
from afd_server.api.answers.answer import Answer, Usage
from afd_server.api.gate import allowance_of, tenant_of
from afd_server.api.generation import Piece, interleave, run_choice
from afd_server.api.protocol.generation import GenerationFields
from afd_server.api.rate_limits import counted
from afd_server.api.request_ids import name_by_body
from afd_server.api.settings import Service
from afd_server.api.streaming import (
    ClientLeftError,
    EventStream,
    InParts,
    collect,
    collect_parts,
    events,
    events_of_parts,
    unless_client_leaves,
)
from afd_server.telemetry.metrics import Metrics
from afd_server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from afd_server.telemetry.traces import Traces

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is what access logs call the case


def identity_of(request: Request, named_by_body: str | None = None) -> tuple[str, str]:
    """Who asks, and what the request is called."""
    return tenant_of(request.scope), name_by_body(request.scope, named_by_body)


class Responder:
    """Runs jobs on a service and sends what comes of them."""

    def __init__(self, service: Service, tokenizer: Tokenizer, metrics: Metrics, traces: Traces | None) -> None:
        self._service, self._tokenizer, self._metrics, self._traces = service, tokenizer, metrics, traces

    async def respond(self, request: Request, body: GenerationFields, job: Job, answer: Answer) -> Response:
        """OpenAI's way: chunks of one form. Raises ServingError before the first of them."""
        pieces, usage = self._pieces(request, body, job), Usage(job)
        if body.stream:
            return await streamed(request, events(pieces, answer, usage, body))
        return await _whole(request, collect(pieces, answer, usage))

    async def respond_in_parts(
        self, request: Request, body: GenerationFields, job: Job, answer: InParts
    ) -> Response:
        """The newer way: named events of parts that begin, grow and end. Raises ServingError before the first of them."""
        pieces = self._pieces(request, body, job)
        if body.stream:
            return await streamed(request, events_of_parts(pieces, answer))
        return await _whole(request, collect_parts(pieces, answer))

    def _pieces(self, request: Request, body: GenerationFields, job: Job) -> AsyncGenerator[Piece, None]:
        """Raises RateLimitError when the prompt is beyond what its key may use."""
        record = None if self._traces is None else self._traces.recorder(request.headers)
        marks = job.message_format.marks
        pieces = interleave(
            [
                run_choice(self._service, choice, body, self._tokenizer, self._metrics, marks, record)
                for choice in job.choices
            ]
        )
        allowance = allowance_of(request.scope)
        if allowance is None:
            return pieces
        allowance.admit_prompt(sum(len(prompt.token_ids) for prompt in job.prompts))
        return counted(pieces, allowance)


async def _whole(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    try:
        answered = await unless_client_leaves(request.receive, work)
    except ClientLeftError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(msgspec.json.encode(answered), media_type="application/json")


async def streamed(request: Request, stream: AsyncGenerator[bytes, None]) -> Response:
    """An answer of events. Raises what the stream raises before the first of them."""
    try:
        first = await unless_client_leaves(request.receive, anext(stream))
    except ClientLeftError:
        await stream.aclose()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        await stream.aclose()
        raise
    return EventStream(first, stream)
