"""OpenAI's JSON of the two routes, whole and in chunks.

What lives here: the shape of an answer, with vLLM's additions (stop_reason, token_ids). What does not: when which part
is sent (streaming.py). A whole answer is the chunk of one piece that holds everything, under other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from afd_server.api.admission import Choice, Job
from afd_server.api.generation import Piece
from afd_server.api.protocol import ChatCompletionRequest, CompletionRequest
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Usage:
    """How many tokens a job took so far."""

    def __init__(self, job: Job) -> None:
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        self._num_choices = len(job.choices) // len(job.prompts)
        self._completion_tokens = 0
        self._cached_tokens = 0

    def add(self, piece: Piece) -> None:
        self._completion_tokens += len(piece.token_ids)
        if (
            piece.choice.index % self._num_choices == 0
        ):  # the others of a prompt find what the first one computed
            self._cached_tokens += piece.cached_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "completion_tokens": self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


class Answer(Protocol):
    """How one route writes its answer. An instance belongs to one job and remembers what it has written."""

    def whole(self, pieces: Mapping[int, Piece], usage: Usage) -> dict[str, Any]:
        """pieces: choice index -> everything that came of it."""
        ...

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk before a choice's first piece, if there is one."""
        ...

    def chunk(self, piece: Piece) -> dict[str, Any]: ...

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk that carries the usage and no choice."""
        ...


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


class Spelling:
    """How a token is written in log-probabilities: as text, or as `token_id:<id>`, which is never ambiguous."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = list(self._tokenizer.token_bytes(token_id))
        return {"token": self.text(token_id), "logprob": finite(logprob), "bytes": spelled}


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    last = pieces[-1]
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for piece in pieces:
        token_ids += piece.token_ids
        logprobs += piece.logprobs
    text = "".join(piece.text for piece in pieces)
    cached_tokens = sum(piece.cached_tokens for piece in pieces)
    return Piece(
        last.choice,
        text,
        tuple(token_ids),
        tuple(logprobs),
        last.finish_reason,
        last.stop_reason,
        cached_tokens,
    )
