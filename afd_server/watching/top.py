"""`afd top`: asks the server once a second and draws what it says, until it is interrupted.

What lives here: the asking. What does not: the picture (frame.py).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

import httpx
from rich.console import Console
from rich.live import Live

from afd_server.admin import AdminError, ask, operator_client
from afd_server.watching.frame import View, frame
from afd_server.watching.samples import Samples

EVERY_S = 1.0
# Rates and quantiles are of so many seconds.
RECENT_S = 10.0


def top(url: str, api_key: str | None, *, once: bool, console: Console | None = None) -> int:
    """Gives the exit code. Raises AdminError when the server cannot be asked at first; later it is shown, and asked again."""
    console = console or Console()
    with operator_client(url, api_key, timeout=httpx.Timeout(10.0)) as client:
        glance = _Glance(client)
        view = glance.look()
        if once:
            console.print(frame(view))
            return 0
        try:
            with Live(frame(view), console=console, screen=True, auto_refresh=False) as live:
                while True:
                    time.sleep(EVERY_S)
                    try:
                        view = glance.look()
                    except AdminError as error:
                        view = replace(view, problem=str(error))
                    live.update(frame(view), refresh=True)
        except KeyboardInterrupt:
            return 0


class _Glance:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._seen: deque[tuple[float, Samples]] = deque(maxlen=round(RECENT_S / EVERY_S) + 1)

    def look(self) -> View:
        """Raises AdminError."""
        workers = ask(self._client, "GET", "/admin/workers")
        report = ask(self._client, "GET", "/admin/stragglers")
        now, at = self._samples(), time.monotonic()
        self._seen.append((at, now))
        first_at, first = self._seen[0]
        recent, seconds = (now.since(first), at - first_at) if len(self._seen) > 1 else (now, None)
        url = str(self._client.base_url).rstrip("/")
        clock = time.strftime("%H:%M:%S")
        return View(url, clock, now, recent, seconds, workers["workers"], workers["change"], report)

    def _samples(self) -> Samples:
        try:
            response = self._client.get("/metrics")
            response.raise_for_status()
            return Samples.parse(response.text)
        except (httpx.HTTPError, ValueError) as error:
            raise AdminError(f"{self._client.base_url}/metrics: {error}") from None
