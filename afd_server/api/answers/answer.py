"""What every route's answer has in common: how it is asked for its parts, and the count of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from afd_server.api.admission import Choice, Job
from afd_server.api.generation import Piece
from afd_server.types import TokenLogprobs


class Usage:
    """How many tokens a job took so far."""

    def __init__(self, job: Job) -> None:
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        self._num_choices = len(job.choices) // len(job.prompts)
        self.completion_tokens = 0
        self.cached_tokens = 0

    def add(self, piece: Piece) -> None:
        self.completion_tokens += len(piece.token_ids)
        if (
            piece.choice.index % self._num_choices == 0
        ):  # the others of a prompt find what the first one computed
            self.cached_tokens += piece.cached_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer(Protocol):
    """How one route writes its answer. An instance belongs to one job and remembers what it has written."""

    def whole(self, pieces: Mapping[int, Piece], usage: Usage) -> dict[str, Any]:
        """pieces: choice index -> everything that came of it."""
        ...

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk before a choice's first piece, if there is one."""
        ...

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """None: there is nothing to say yet."""
        ...

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk that carries the usage and no choice."""
        ...


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    last = pieces[-1]
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    for piece in pieces:
        token_ids += piece.token_ids
        logprobs += piece.logprobs
        prompt_logprobs += piece.prompt_logprobs
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
        tuple(prompt_logprobs),
    )
