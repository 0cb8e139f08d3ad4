"""How one request ended, and the times that its client saw: definitions only, no clock and no connection.

Times are seconds from the start of the run. A chunk is one event of the stream that carries output; a server may put several
tokens into one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request.

    due_s: when it was to be sent: its time in the schedule, or when a place became free under a limit of concurrency. sent_s:
    when it was. They differ by what the load generator is late.
    input_tokens, output_tokens: as the server counts them.
    error: a short kind that equal failures share ("HTTP 429", "timeout"), "" for a whole answer; message: its words.
    """

    due_s: float
    sent_s: float
    chunks_s: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""
    message: str = ""

    @property
    def is_complete(self) -> bool:
        return not self.error

    @property
    def end_s(self) -> float:
        """When the last chunk came."""
        return self.chunks_s[-1]

    @property
    def ttft_s(self) -> float:
        """Time to the first token: from sending to the first chunk, a new connection included."""
        return self.chunks_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """End-to-end latency: from sending to the last chunk."""
        return self.chunks_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first: (E2EL - TTFT) / (output tokens - 1). 0 for a single token."""
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: from each chunk to the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunks_s)]
