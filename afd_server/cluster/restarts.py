"""How often a worker may be restarted, and how soon: the account of one worker. Pure arithmetic over a given clock.

Every restart is counted, also one that fails. For each minute that the worker is up one of them is forgotten, so what is
limited is trouble that goes on. The pause before a restart doubles with the count: a first death costs none.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGOTTEN_AFTER_S = 60.0
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0


@dataclass(slots=True)
class Restarts:
    """limit: restarts that may be counted at a time. up_since: monotonic seconds, None while it is down."""

    limit: int
    count: int = 0
    up_since: float | None = 0.0

    @property
    def used_up(self) -> bool:
        return self.count >= self.limit

    @property
    def pause_s(self) -> float:
        """Before the next one."""
        return 0.0 if self.count <= 0 else min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self.count - 1))

    def begin(self) -> None:
        """The worker is being restarted."""
        self.count += 1

    def allow(self) -> None:
        """The next one is asked for, not trouble: it is neither counted nor paused for."""
        self.count = max(-1, self.count - 1)

    def take_back(self) -> None:
        """The last one failed by no fault of the worker."""
        self.count -= 1

    def up(self, now: float) -> None:
        self.up_since = now

    def down(self, now: float) -> None:
        if self.up_since is not None:
            self.count = max(0, self.count - int((now - self.up_since) / FORGOTTEN_AFTER_S))
        self.up_since = None
