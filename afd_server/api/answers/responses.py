"""The answer of /v1/responses, whole and as its events: an item for each part of the message."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from afd_server.api.admission import Job
from afd_server.api.answers.answer import Usage
from afd_server.api.answers.parts import Change, Part, Parts, Turn
from afd_server.api.answers.spelling import Spelling
from afd_server.api.errors import describe
from afd_server.api.gateways.responses import wants_logprobs
from afd_server.api.generation import Piece
from afd_server.api.protocol.responses import ResponsesRequest
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import FinishReason

# The events of a part's text: it grows, it is whole.
GROWING = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}


class ResponsesAnswer:
    """One response. An instance belongs to one job and remembers what it has written."""

    def __init__(self, body: ResponsesRequest, job: Job, model: str, tokenizer: Tokenizer) -> None:
        self._body, self._tokenizer, self._parser = body, tokenizer, job.message_format.parser()
        self._number = job.response_id.removeprefix("chatcmpl-")
        self._id = f"resp_{self._number}"
        self._created, self._model = job.created, model
        self._usage = Usage(job)
        self._reasoning_tokens = 0
        self._parts = Parts()
        self._logprobs: dict[int, list[dict[str, Any]]] = {}  # by part
        self._not_told: list[dict[str, Any]] = []  # of tokens whose text is held back
        self._numbers = itertools.count()
        self._has_begun = False
        self._status = "in_progress"

    def whole(self) -> dict[str, Any]:
        """The response as far as it has come; after the last piece, all of it."""
        body, ended = self._body, self._status != "in_progress"
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "model": self._model,
            "output": [self._item(part) for part in self._parts.all] if ended else [],
            "usage": self._counts() if ended else None,
            "error": None,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "tool_choice": _dumped(body.tool_choice) or "auto",
            "text": _dumped(body.text) or {"format": {"type": "text"}},
            "reasoning": _dumped(body.reasoning) or {"effort": None, "summary": None},
            "truncation": "disabled",
            "store": False,
            "background": False,
            "previous_response_id": None,
        }

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events of a piece, the response's first and last ones among them."""
        self._usage.add(piece)
        if not self._has_begun:
            self._has_begun = True
            for name in ("created", "in_progress"):
                yield self._event(f"response.{name}", response=self.whole())
        if wants_logprobs(self._body):
            self._not_told += self._entries(piece)
        for change in self._changes(piece):  # one at a time: an event shows the part as it is then
            logprobs: list[dict[str, Any]] = []
            if change.turn is Turn.GROWS:  # tokens are told of with the text that they end in
                logprobs, self._not_told = self._not_told, []
                if change.part.kind == "text":
                    self._logprobs.setdefault(change.part.index, []).extend(logprobs)
            yield from self._events(change, logprobs)
        if piece.finish_reason is not None:
            self._status = "incomplete" if piece.finish_reason == FinishReason.LENGTH else "completed"
            yield self._event(f"response.{self._status}", response=self.whole())

    def _changes(self, piece: Piece) -> Iterator[Change]:
        delta = self._parser.feed(piece.text)
        if delta.reasoning and not (delta.content or delta.calls):
            self._reasoning_tokens += len(piece.token_ids)
        yield from self._parts.take(delta)
        if piece.finish_reason is not None:
            yield from self._parts.take(self._parser.finish())
            yield from self._parts.end()

    def failure(self, error: Exception) -> dict[str, Any]:
        told = describe(error)[1]["error"]
        failed = {**self.whole(), "status": "failed",
                  "error": {"code": "server_error", "message": told["message"]}}  # fmt: skip
        return self._event("response.failed", response=failed)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        return {"type": name, "sequence_number": next(self._numbers), **fields}

    def _events(self, change: Change, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        part = change.part
        place: dict[str, Any] = {"item_id": self._item_id(part), "output_index": part.index}
        if part.kind != "call":
            place["content_index"] = 0
        growing = f"response.{GROWING[part.kind]}"
        has_logprobs = part.kind == "text"
        match change.turn:
            case Turn.BEGINS:
                yield self._event("response.output_item.added", output_index=part.index,
                                  item={**self._item(part, "in_progress"), **_emptied(part)})  # fmt: skip
                if part.kind != "call":
                    yield self._event("response.content_part.added", **place, part=self._content(part))
            case Turn.GROWS:
                words = {"delta": change.added, **({"logprobs": logprobs} if has_logprobs else {})}
                yield self._event(f"{growing}.delta", **place, **words)
            case Turn.ENDS:
                name = "arguments" if part.kind == "call" else "text"
                told = {"logprobs": self._logprobs.get(part.index, [])} if has_logprobs else {}
                yield self._event(f"{growing}.done", **place, **{name: part.text}, **told)
                if part.kind != "call":
                    yield self._event("response.content_part.done", **place, part=self._content(part))
                yield self._event("response.output_item.done", output_index=part.index, item=self._item(part))

    def _item_id(self, part: Part) -> str:
        prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[part.kind]
        return f"{prefix}_{self._number}_{part.index}"

    def _item(self, part: Part, status: str = "completed") -> dict[str, Any]:
        head = {"id": self._item_id(part), "status": status}
        match part.kind:
            case "call":
                return {
                    **head,
                    "type": "function_call",
                    "call_id": part.call_id,
                    "name": part.name,
                    "arguments": part.text,
                }
            case "reasoning":
                return {**head, "type": "reasoning", "summary": [], "content": [self._content(part)]}
        return {**head, "type": "message", "role": "assistant", "content": [self._content(part)]}

    def _content(self, part: Part) -> dict[str, Any]:
        if part.kind == "reasoning":
            return {"type": "reasoning_text", "text": part.text}
        logprobs = self._logprobs.get(part.index, [])
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": logprobs}

    def _entries(self, piece: Piece) -> list[dict[str, Any]]:
        spell = Spelling(self._tokenizer, as_ids=False)
        return [
            {**spell.entry(token_id, reported.logprob),
             "top_logprobs": [spell.entry(other, logprob) for other, logprob in reported.top]}
            for token_id, reported in zip(piece.token_ids, piece.logprobs, strict=True)
        ]  # fmt: skip

    def _counts(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _emptied(part: Part) -> dict[str, Any]:
    """An item that has only begun has no content yet."""
    return {} if part.kind == "call" else {"content": []}


def _dumped(options: Any) -> Any:
    return (
        options
        if options is None or isinstance(options, str)
        else options.model_dump(by_alias=True, exclude_none=True)
    )
