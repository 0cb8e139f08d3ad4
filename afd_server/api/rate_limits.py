"""How much of the server a key may use within any minute, by the library `limits`: a moving window in this process's memory.

What lives here: counting and the refusals. What does not: which key it is (keys.py) and who asks (gate.py for requests,
respond.py for tokens). A request counts when it comes, a prompt's tokens when it is admitted, output tokens as they are
generated. So what runs is never cut off: a key that has gone beyond its tokens waits until enough of them are a minute old.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from afd_server.api.generation import Piece
from afd_server.api.keys import ApiKey
from afd_server.errors import RateLimitError
from afd_server.telemetry.key_metrics import KeyMetrics

# The window remembers every unit of use by itself. A larger limit is counted in larger units: this many make it up, or twice.
UNITS = 10_000
BEYOND = 2**62  # as a limit: none
WINDOW_S = 60
LIMIT_HEADERS = [
    f"x-ratelimit-{each}-{what}" for what in ("requests", "tokens") for each in ("limit", "remaining", "reset")
]


class Window:
    """One limit of one key. what: requests or tokens."""

    def __init__(self, storage: MemoryStorage, name: str, what: str, per_minute: int) -> None:
        self._storage, self._name, self._what, self._per_minute = storage, name, what, per_minute
        self._unit = max(1, per_minute // UNITS)
        self._item = RateLimitItemPerMinute(per_minute // self._unit, namespace=what)
        self._limiter = MovingWindowRateLimiter(storage)
        self._part = 0  # used, and less than a unit

    def check(self, amount: int) -> None:
        """Raises RateLimitError unless so much more fits."""
        remaining, reset_s = self._state()
        if amount <= remaining:
            return
        limit = f"the limit of API key {self._name!r} is {self._per_minute} {self._what} a minute"
        if amount > self._per_minute:
            raise RateLimitError(f"{limit}: {amount} never fit", self._what, retry_after_s=WINDOW_S)
        raise RateLimitError(
            f"{limit}: {remaining} are left, {amount} more are asked for; try again in {reset_s:.1f} s",
            self._what,
            retry_after_s=max(1, math.ceil(reset_s)),
        )

    def count(self, amount: int) -> None:
        """So much has been used, beyond the limit too."""
        units, self._part = divmod(self._part + amount, self._unit)
        if units:
            key = self._item.key_for(self._name)
            self._storage.acquire_entry(key, BEYOND, self._item.get_expiry(), units)

    def headers(self) -> dict[str, str]:
        """OpenAI's three. reset: until something of what was used is a minute old, and no longer counts."""
        remaining, reset_s = self._state()
        return {
            f"x-ratelimit-limit-{self._what}": str(self._per_minute),
            f"x-ratelimit-remaining-{self._what}": str(remaining),
            f"x-ratelimit-reset-{self._what}": f"{reset_s:.3f}s",
        }

    def _state(self) -> tuple[int, float]:
        """What is left, and in how many seconds it grows."""
        reset_at, units = self._limiter.get_window_stats(self._item, self._name)
        if units == self._item.amount:
            return self._per_minute - self._part, 0.0
        return max(0, units * self._unit - self._part), max(0.0, reset_at - time.time())


class Allowance:
    """What one key may use."""

    def __init__(self, key: ApiKey, storage: MemoryStorage, metrics: KeyMetrics) -> None:
        self.key = key
        self._metrics = metrics
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        self._windows = {
            what: Window(storage, key.name, what, limit) for what, limit in limits.items() if limit is not None
        }

    def admit_request(self) -> None:
        """Raises RateLimitError."""
        self._take("requests", 1)
        self._metrics.observe_request(self.key.name)

    def admit_prompt(self, num_tokens: int) -> None:
        """Raises RateLimitError."""
        self._take("tokens", num_tokens)
        self._metrics.observe_tokens(self.key.name, "prompt", num_tokens)

    def note_output(self, num_tokens: int) -> None:
        """So many tokens have been generated."""
        if "tokens" in self._windows:
            self._windows["tokens"].count(num_tokens)
        self._metrics.observe_tokens(self.key.name, "generation", num_tokens)

    def headers(self) -> dict[str, str]:
        return {name: value for window in self._windows.values() for name, value in window.headers().items()}

    def _take(self, what: str, amount: int) -> None:
        """Counts it, or raises RateLimitError and counts nothing."""
        if what not in self._windows:
            return
        try:
            self._windows[what].check(amount)
        except RateLimitError:
            self._metrics.observe_refusal(self.key.name, what)
            raise
        self._windows[what].count(amount)


async def counted(pieces: AsyncGenerator[Piece, None], allowance: Allowance) -> AsyncGenerator[Piece, None]:
    """The same pieces; their tokens are noted as they come."""
    async with aclosing(pieces):
        async for piece in pieces:
            allowance.note_output(len(piece.token_ids))
            yield piece


class Allowances:
    """Those of all keys."""

    def __init__(self, metrics: KeyMetrics) -> None:
        self._metrics = metrics
        self._storage = MemoryStorage()
        self._of: dict[ApiKey, Allowance] = {}

    def of(self, key: ApiKey) -> Allowance:
        if key not in self._of:
            self._of[key] = Allowance(key, self._storage, self._metrics)
        return self._of[key]
