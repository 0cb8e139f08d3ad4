"""The answer of /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afd_server.api.admission import Choice, Job
from afd_server.api.answers.answer import Usage
from afd_server.api.answers.spelling import Spelling, finite
from afd_server.api.generation import Piece
from afd_server.api.protocol.generation import CompletionRequest
from afd_server.text.tokenizer import Tokenizer


class CompletionAnswer:
    """/v1/completions."""

    def __init__(self, body: CompletionRequest, job: Job, model: str, tokenizer: Tokenizer) -> None:
        self._body, self._tokenizer = body, tokenizer
        self._head = {
            "id": job.response_id,
            "object": "text_completion",
            "created": job.created,
            "model": model,
        }
        self._text_offsets: dict[int, int] = {}

    def whole(self, pieces: Mapping[int, Piece], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(pieces[index]) for index in sorted(pieces)]
        return {**self._head, "choices": choices, "usage": usage.body()}

    def opening(self, choice: Choice) -> None:
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(piece)]}

    def last(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.body()}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        index, text, first = piece.choice.index, piece.text, piece.choice.index not in self._text_offsets
        if first:
            echoed = self._prompt_text(piece.choice) if self._body.echo else ""
            text = echoed + text
            self._text_offsets[index] = len(echoed)
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(piece) if self._body.logprobs is not None else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
            choice["prompt_token_ids"] = piece.choice.prompt.token_ids if first else None
        return choice

    def _prompt_text(self, choice: Choice) -> str:
        prompt = choice.prompt
        return self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        """The legacy format. text_offset: where each token begins, if every token is as long as its own text."""
        spell = Spelling(self._tokenizer, self._body.return_tokens_as_token_ids)
        tokens, values, top, offsets = [], [], [], []
        for token_id, reported in zip(piece.token_ids, piece.logprobs, strict=True):
            token = spell.text(token_id)
            tokens.append(token)
            values.append(finite(reported.logprob))
            likeliest = {spell.text(other): finite(logprob) for other, logprob in reported.top}
            top.append({**likeliest, token: finite(reported.logprob)})
            offsets.append(self._text_offsets[piece.choice.index])
            self._text_offsets[piece.choice.index] += len(self._tokenizer.token_text(token_id))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
