"""The answer of Anthropic's /v1/messages, whole and as its events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from afd_server.api.admission import Job
from afd_server.api.answers.answer import Usage
from afd_server.api.answers.parts import Change, Part, Parts, Turn
from afd_server.api.errors import anthropic_error
from afd_server.api.generation import Piece
from afd_server.types import FinishReason


class MessagesAnswer:
    """One message. An instance belongs to one job and remembers what it has written."""

    def __init__(self, job: Job, model: str) -> None:
        self._usage, self._parser = Usage(job), job.message_format.parser()
        number = job.response_id.removeprefix("chatcmpl-")
        self._head = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": model}
        self._parts = Parts()
        self._has_begun = False
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def whole(self) -> dict[str, Any]:
        """After the last piece."""
        content = [_block(part) for part in self._parts.all]
        return {**self._head, "content": content, **self._stop, "usage": self._counts()}

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events of a piece, the message's first and last ones among them."""
        self._usage.add(piece)
        if not self._has_begun:
            self._has_begun = True
            yield {
                "type": "message_start",
                "message": {**self._head, "content": [], **self._stop, "usage": self._counts()},
            }
        for change in self._changes(piece):  # one at a time: an event shows the part as it is then
            yield _event(change)
        if piece.finish_reason is not None:
            self._stop = _stop(piece, self._parts.has_calls)
            yield {"type": "message_delta", "delta": self._stop, "usage": self._counts()}
            yield {"type": "message_stop"}

    def _changes(self, piece: Piece) -> Iterator[Change]:
        yield from self._parts.take(self._parser.feed(piece.text))
        if piece.finish_reason is not None:
            yield from self._parts.take(self._parser.finish())
            yield from self._parts.end()

    def failure(self, error: Exception) -> dict[str, Any]:
        return anthropic_error(error)[1]

    def _counts(self) -> dict[str, int]:
        return {
            "input_tokens": self._usage.prompt_tokens - self._usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._usage.cached_tokens,
            "output_tokens": self._usage.completion_tokens,
        }


def _stop(piece: Piece, has_calls: bool) -> dict[str, Any]:
    if piece.finish_reason == FinishReason.LENGTH:
        reason = "max_tokens"
    elif isinstance(piece.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": piece.stop_reason}
    else:
        reason = "tool_use" if has_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _block(part: Part) -> dict[str, Any]:
    match part.kind:
        case "text":
            return {"type": "text", "text": part.text}
        case "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": _arguments(part.text)}


def _arguments(text: str) -> Any:
    """An object, as the format asks for one: an empty one where max_tokens cut the arguments off."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _event(change: Change) -> dict[str, Any]:
    index = change.part.index
    match change.turn:
        case Turn.BEGINS:
            return {"type": "content_block_start", "index": index, "content_block": _block(change.part)}
        case Turn.ENDS:
            return {"type": "content_block_stop", "index": index}
    name, field = {
        "text": ("text_delta", "text"),
        "reasoning": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[change.part.kind]
    return {"type": "content_block_delta", "index": index, "delta": {"type": name, field: change.added}}
