"""The answer of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from afd_server.api.admission import Choice, Job
from afd_server.api.answers.answer import Usage
from afd_server.api.answers.spelling import Spelling, prompt_logprobs
from afd_server.api.generation import Piece
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.text.message import CallDelta, MessageDelta, WholeMessage
from afd_server.text.message_parser import MessageParser
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import FinishReason

TOOL_CALLS = "tool_calls"  # OpenAI's word for why an answer ends


class ChatAnswer:
    """/v1/chat/completions."""

    def __init__(self, body: ChatCompletionRequest, job: Job, model: str, tokenizer: Tokenizer) -> None:
        self._body, self._tokenizer = body, tokenizer
        self._head = {"id": job.response_id, "created": job.created, "model": model}
        self._prompt_token_ids = job.prompts[0].token_ids
        self._format = job.message_format
        self._parsers: dict[int, MessageParser] = {}
        self._calling: set[int] = set()  # the choices that have called a tool

    def whole(self, pieces: Mapping[int, Piece], usage: Usage) -> dict[str, Any]:
        choices = []
        for index in sorted(pieces):
            message = WholeMessage.of(self._deltas(pieces[index]))
            choices.append(self._choice(pieces[index], "message", _message(message)))
        answer = {**self._head, "object": "chat.completion", "choices": choices, "usage": usage.body()}
        answer["prompt_logprobs"] = None
        if self._body.prompt_logprobs is not None:
            reported = pieces[min(pieces)].prompt_logprobs
            answer["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, self._prompt_token_ids, reported, self._body.prompt_logprobs
            )
        return self._with_prompt(answer)

    def opening(self, choice: Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        first = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._with_prompt(self._chunk([first]))

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        deltas = [delta for delta in self._deltas(piece) if delta]
        if not (deltas or piece.finish_reason or piece.logprobs or self._body.return_token_ids):
            return None  # the text is held back: it may become a mark
        words: dict[str, Any] = {}
        if content := "".join(delta.content for delta in deltas):
            words["content"] = content
        words |= _reasoning("".join(delta.reasoning for delta in deltas))
        if calls := [_call_delta(call) for delta in deltas for call in delta.calls]:
            words[TOOL_CALLS] = calls
        return self._chunk([self._choice(piece, "delta", words)])

    def last(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage.body()}

    def _deltas(self, piece: Piece) -> Sequence[MessageDelta]:
        index = piece.choice.index
        if index not in self._parsers:
            self._parsers[index] = self._format.parser()
        parser = self._parsers[index]
        deltas = [parser.feed(piece.text)] if piece.text else []
        if piece.finish_reason is not None:
            deltas.append(parser.finish())
        if any(delta.calls for delta in deltas):
            self._calling.add(index)
        return deltas

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _choice(self, piece: Piece, name: str, words: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": piece.choice.index,
            name: words,
            "logprobs": {"content": self._logprobs(piece)} if self._body.logprobs else None,
            "finish_reason": self._finish_reason(piece),
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _finish_reason(self, piece: Piece) -> str | None:
        """A function that the client named does not count as the model's choice, for OpenAI as for vLLM."""
        if piece.finish_reason == FinishReason.STOP and self._format.reads_calls != "named":
            return TOOL_CALLS if piece.choice.index in self._calling else piece.finish_reason
        return piece.finish_reason

    def _with_prompt(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "prompt_token_ids": self._prompt_token_ids} if self._body.return_token_ids else answer

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        spell = Spelling(self._tokenizer, self._body.return_tokens_as_token_ids)
        entries = []
        for token_id, reported in zip(piece.token_ids, piece.logprobs, strict=True):
            entry = spell.entry(token_id, reported.logprob)
            entry["top_logprobs"] = [spell.entry(other, logprob) for other, logprob in reported.top]
            entries.append(entry)
        return entries


def _message(message: WholeMessage) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.calls
    ]
    has_other = bool(calls or message.reasoning)
    return {
        "role": "assistant",
        "content": None if has_other and not message.content else message.content,
        "refusal": None,
        **_reasoning(message.reasoning),
        **({TOOL_CALLS: calls} if calls else {}),
    }


def _reasoning(text: str) -> dict[str, str]:
    """vLLM's newer name for it beside the older one, which other servers have, too."""
    return {"reasoning": text, "reasoning_content": text} if text else {}


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
