"""How tokens and their log-probabilities are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afd_server.text.tokenizer import Tokenizer
from afd_server.types import TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no infinity


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


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], reported: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token of the prompt, by ids, itself and the most likely ones; nothing is known of the first.

    reported: of the tokens from the second on. num_top: of the most likely ones; -1: all.
    """

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": finite(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }

    entries: list[dict[str, Any] | None] = [None]
    for token_id, each in zip(token_ids[1:], reported, strict=True):
        likeliest = {
            str(other): entry(other, logprob, rank)
            for rank, (other, logprob) in enumerate(first_of(each.top, num_top), 1)
        }
        entries.append({str(token_id): entry(token_id, each.logprob, each.rank), **likeliest})
    return entries


def first_of(top: Sequence[tuple[int, float]], number: int | None) -> Sequence[tuple[int, float]]:
    """So many of the most likely tokens: another field of the same body may have asked for more. -1: all."""
    return top if number == -1 else top[:number]


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
