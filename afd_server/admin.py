"""`afd scale`, `afd restart` and `afd workers`: what an operator asks of a running server, from a terminal.

What lives here: the requests, and what the terminal shows while a change goes on. What does not: the change, which is the
server's. Called by cli.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from afd_server.config import separate_keys
from afd_server.errors import ServingError

# A change may load models and wait for requests; whether it still goes on is asked in between.
CHANGE_TIMEOUT = httpx.Timeout(None, connect=10.0)
LOOK_EVERY_S = 0.5


class AdminError(ServingError):
    """The server cannot be reached, or has refused. The message is the line to show."""


def show_workers(url: str, api_key: str | None) -> int:
    """Prints every worker; gives the exit code."""
    with operator_client(url, api_key) as client:
        answer = ask(client, "GET", "/admin/workers")
    for line in table(answer["workers"]):
        print(line)
    if answer["change"]:
        print(f"under way: {answer['change']}")
    return 0


def change(url: str, api_key: str | None, path: str, body: Mapping[str, Any] | None) -> int:
    """Asks for a change, tells of every worker whose state changes meanwhile, and prints what there is in the end.

    Gives the exit code. Raises AdminError when the server refuses, which has changed nothing then.
    """
    with operator_client(url, api_key) as client, operator_client(url, api_key) as observer:
        over = threading.Event()
        before = _states(ask(client, "GET", "/admin/workers"))
        watching = threading.Thread(target=_tell_progress, args=(observer, before, over), daemon=True)
        watching.start()
        try:
            answer = ask(client, "POST", path, body)
        finally:
            over.set()
            watching.join()
    for line in table(answer["workers"]):
        print(line)
    return 0


def table(workers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The workers as lines of text."""
    rows = [("WORKER", "STATE", "SINCE", "PID", "NODE", "RESTARTS")]
    for worker in workers:
        state = f"{worker['state']}: {worker['reason']}" if worker["reason"] else worker["state"]
        rows.append((worker["name"], state, f"{worker['since_s']:.0f} s", str(worker["pid"] or "-"),
                     (worker["node"] or "-")[:8], str(worker["restarts"])))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _tell_progress(client: httpx.Client, before: dict[str, str], over: threading.Event) -> None:
    while not over.wait(LOOK_EVERY_S):
        try:
            now = _states(ask(client, "GET", "/admin/workers"))
        except AdminError:
            continue  # whoever asked for the change is told
        for worker, state in now.items():
            if before.get(worker) != state:
                print(f"{worker}: {state}", file=sys.stderr)
        for worker in before.keys() - now.keys():
            print(f"{worker}: gone", file=sys.stderr)
        before = now


def _states(answer: Mapping[str, Any]) -> dict[str, str]:
    return {worker["name"]: worker["state"] for worker in answer["workers"]}


def operator_client(url: str, api_key: str | None, timeout: httpx.Timeout = CHANGE_TIMEOUT) -> httpx.Client:
    """With the first of several keys: it is the one that opens /admin."""
    if "://" not in url:
        url = f"http://{url}"
    headers = {"Authorization": f"Bearer {separate_keys(api_key)[0]}"} if api_key else {}
    return httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout)


def ask(client: httpx.Client, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The answer. Raises AdminError."""
    try:
        response = client.request(method, path, json=body)
        answer = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AdminError(f"{client.base_url}: {str(error) or type(error).__name__}") from None
    except ValueError:
        raise AdminError(f"{client.base_url}{path}: the answer is not an afd server's") from None
    if response.status_code != 200:
        raise AdminError(problem_of(response))
    return dict(answer)


def problem_of(response: httpx.Response) -> str:
    """Why the server refuses, in its own words where it has any."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"{response.url}: {response.status_code} {response.reason_phrase}"
