"""One load put on a server for some seconds: what the search and the sweep are made of.

closed: so many clients that always ask again. open: so many requests a second, whatever becomes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from afd_server.bench import dataset, generator, report, statistics
from afd_server.bench.client import BenchError
from afd_server.bench.outcome import Outcome
from afd_server.bench.session import Session, failure

PAUSE_S = (
    1.0  # of a client whose request failed: whoever asks again at once only measures how fast it is refused
)

Progress = Callable[[str], AbstractContextManager[Callable[[Outcome], None]]]


@dataclass
class Prober:
    """Each load gets prompts of its own, so that none is in the server's cache from the one before.

    patience_s: requests that have not ended so long after the last was sent are given up, and count as failed.
    """

    session: Session
    seconds: float
    seed: int
    progress: Progress
    patience_s: float | None = None
    percentiles: tuple[float, ...] = (50, 90, 99)
    _taken: int = field(default=0, init=False)

    async def closed(self, clients: int) -> dict[str, Any]:
        """The summary of a run of so many clients. Raises BenchError when every request fails."""
        session = self.session
        prompts = dataset.endless(session.settings, self._next_seed(), session.texts, session.tokenizer)
        limits = generator.Limits(clients, self.seconds, self.patience_s, PAUSE_S)
        with self.progress(f"{clients} clients") as on_outcome:
            run = await generator.run(session.client, ((0.0, prompt) for prompt in prompts), limits, on_outcome)
        return {"max_concurrency": clients, **self._summary(run)}

    async def open(self, rate: float) -> dict[str, Any]:
        """The summary of a run at so many requests a second, at least two. Raises BenchError when every request fails."""
        seed = self._next_seed()
        prompts = self.session.prompts(max(2, round(rate * self.seconds)), seed)
        timed = generator.schedule(prompts, rate, seed=seed)
        with self.progress(f"{rate:.3g} requests/s") as on_outcome:
            run = await generator.run(
                self.session.client, timed, generator.Limits(patience_s=self.patience_s), on_outcome
            )
        return {"request_rate": rate, **self._summary(run)}

    def _next_seed(self) -> str:
        self._taken += 1
        return f"{self.seed} {self._taken}"

    def _summary(self, run: generator.Run) -> dict[str, Any]:
        if not run.outcomes:
            raise BenchError("the dataset has no prompt left")
        if not any(outcome.is_complete for outcome in run.outcomes):
            raise failure(self.session.client.target, run.outcomes[0])
        summary = statistics.summary(run, percentiles=self.percentiles)
        for line in report.complaints(summary):
            print(line, file=sys.stderr)
        return summary
