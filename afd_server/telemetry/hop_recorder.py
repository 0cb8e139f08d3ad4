"""Recording what a worker does, hop by hop, for a window of time that somebody asks for.

What lives here: the windows and their bounds. What does not: the moments, which the worker's thread takes (attention/hop_notes.py,
ffn/worker.py), and what is made of the recordings of several workers (hop_trace.py).

While no window is open `windows` is empty, and looking at it is all that a hop pays.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field

from afd_server.types import HopSpan

# Of one window: some tens of megabytes, and more hops than a worker makes in a few seconds.
MAX_SPANS = 100_000
# One more takes the place of the oldest.
MAX_WINDOWS = 8
# How long after its end a window waits for whoever opened it. He may have died.
KEPT_S = 10.0


@dataclass(slots=True)
class Window:
    """Spans that begin from began_s up to ends_s, monotonic seconds. num_missing: for which there was no room."""

    began_s: float
    ends_s: float
    spans: list[HopSpan] = field(default_factory=list)
    num_missing: int = 0


class HopRecorder:
    """Of one worker. `begin` and `end` may come from any thread, `note` from the worker's."""

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self.windows: dict[int, Window] = {}  # never changed in place
        self._max_spans = max_spans
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def begin(self, seconds: float) -> int:
        """Opens a window that lasts so long, and gives its number for `end`."""
        now = time.monotonic()
        with self._lock:
            number = next(self._numbers)
            others = {each: w for each, w in self.windows.items() if now < w.ends_s + KEPT_S}
            kept = list(others)[-(MAX_WINDOWS - 1) :]
            self.windows = {**{each: others[each] for each in kept}, number: Window(now, now + seconds)}
        return number

    def end(self, number: int) -> tuple[list[HopSpan], int]:
        """The window's spans, and how many are missing. Nothing of a window that is not there any more."""
        with self._lock:
            window = self.windows.get(number)
            self._forget(number)
        return (window.spans, window.num_missing) if window is not None else ([], 0)

    def note(self, span: HopSpan) -> None:
        """To be called while `windows` is not empty."""
        for number, window in self.windows.items():
            if window.began_s <= span.began_s < window.ends_s:
                if len(window.spans) < self._max_spans:
                    window.spans.append(span)
                else:
                    window.num_missing += 1
            elif span.began_s > window.ends_s + KEPT_S:
                with self._lock:
                    self._forget(number)

    def _forget(self, number: int) -> None:
        self.windows = {each: window for each, window in self.windows.items() if each != number}
