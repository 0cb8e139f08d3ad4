"""The answer of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afd_server.api.admission import Choice, Job
from afd_server.api.answers.answer import Usage
from afd_server.api.answers.spelling import Spelling, prompt_logprobs
from afd_server.api.generation import Piece
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.text.tokenizer import Tokenizer


class ChatAnswer:
    """/v1/chat/completions."""

    def __init__(self, body: ChatCompletionRequest, job: Job, model: str, tokenizer: Tokenizer) -> None:
        self._body, self._tokenizer = body, tokenizer
        self._head = {"id": job.response_id, "created": job.created, "model": model}
        self._prompt_token_ids = job.prompts[0].token_ids

    def whole(self, pieces: Mapping[int, Piece], usage: Usage) -> dict[str, Any]:
        choices = []
        for index in sorted(pieces):
            message = {"role": "assistant", "content": pieces[index].text}
            choices.append(self._choice(pieces[index], "message", message))
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

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk([self._choice(piece, "delta", {"content": piece.text} if piece.text else {})])

    def last(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage.body()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _choice(self, piece: Piece, name: str, words: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": piece.choice.index,
            name: words,
            "logprobs": {"content": self._logprobs(piece)} if self._body.logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

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
