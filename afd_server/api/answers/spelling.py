"""How tokens and their log-probabilities are written."""

from __future__ import annotations

from typing import Any

from afd_server.text.tokenizer import Tokenizer

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


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
