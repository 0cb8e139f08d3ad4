"""The answer of /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from afd_server.api.admission import Choice, Job
from afd_server.api.answers.answer import Usage
from afd_server.api.answers.spelling import Spelling, finite, first_of, prompt_logprobs
from afd_server.api.generation import Piece
from afd_server.api.protocol.generation import CompletionRequest
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import TokenLogprobs


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
        for choice in choices:
            choice["prompt_logprobs"] = self._prompt_logprobs(pieces[choice["index"]])
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
            self._text_offsets[index] = 0 if self._echoes_logprobs else len(echoed)
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(piece, first) if self._body.logprobs is not None else None,
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

    @property
    def _echoes_logprobs(self) -> bool:
        return self._body.echo and self._body.logprobs is not None

    def _prompt_logprobs(self, piece: Piece) -> list[dict[str, Any] | None] | None:
        if self._body.prompt_logprobs is None:
            return None
        token_ids = piece.choice.prompt.token_ids
        return prompt_logprobs(self._tokenizer, token_ids, piece.prompt_logprobs, self._body.prompt_logprobs)

    def _logprobs(self, piece: Piece, first: bool) -> dict[str, Any]:
        """The legacy format. text_offset: where each token begins, if every token is as long as its own text."""
        spell = Spelling(self._tokenizer, self._body.return_tokens_as_token_ids)
        token_ids, entries = piece.token_ids, cast(tuple[TokenLogprobs | None, ...], piece.logprobs)
        if first and self._echoes_logprobs:  # nothing is known of the prompt's first token
            token_ids = piece.choice.prompt.token_ids + token_ids
            entries = (None, *piece.prompt_logprobs, *entries)
        tokens: list[str] = []
        values: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, reported in zip(token_ids, entries, strict=True):
            token = spell.text(token_id)
            tokens.append(token)
            if reported is None:
                values.append(None)
                top.append(None)
            else:
                values.append(finite(reported.logprob))
                shown = first_of(reported.top, self._body.logprobs)
                likeliest = {spell.text(other): finite(logprob) for other, logprob in shown}
                top.append({**likeliest, token: finite(reported.logprob)})
            offsets.append(self._text_offsets[piece.choice.index])
            self._text_offsets[piece.choice.index] += len(self._tokenizer.token_text(token_id))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
