"""A start's wait for workers that are placed: first for their processes, then for what they load.

What lives here: the first cause, in a sentence, and the deadlines. What does not: where workers are placed (placement.py)
and how one is brought back later (supervisor.py). Called by ray_cluster.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from afd_server.cluster.placement import START_POLL_S, Deadline
from afd_server.cluster.watch import Member, first_line, is_final
from afd_server.errors import StartError

# For a process to come up. It imports torch, from a disk that may be slow; a process that cannot start is tried again and
# again by Ray, which says so in its log only.
PROCESS_TIMEOUT_S = 120.0


def wait_for_processes(members: Sequence[Member], cancelled: threading.Event) -> None:
    """Returns when every member's process answers. Raises StartError."""
    deadline = Deadline(PROCESS_TIMEOUT_S, cancelled)
    problem = f"no process after {PROCESS_TIMEOUT_S:g} s (see worker-*.err in /tmp/ray/session_latest/logs of its node)"
    for member, pulse in zip(members, _ask_all(members, "heartbeat", deadline, problem), strict=True):
        member.pulse = pulse


def load_all(
    members: Sequence[Member], deadline: Deadline, *arguments: Any, meanwhile: Sequence[Member]
) -> list[Any]:
    """Every member's answer to `load`. Raises StartError. meanwhile: who is not to take itself for an orphan until then."""
    problem = f"not loaded within {deadline.timeout_s:g} s (raise --start-timeout)"
    return _ask_all(members, "load", deadline, problem, *arguments, meanwhile=meanwhile)


def _ask_all(
    members: Sequence[Member],
    method: str,
    deadline: Deadline,
    problem: str,
    *arguments: Any,
    meanwhile: Sequence[Member] = (),
) -> list[Any]:
    """Every member's answer; the first failure ends the wait, and so does the deadline, with this problem."""
    waiting = {getattr(member.actor, method).remote(*arguments): member for member in members}
    results: dict[str, Any] = {}
    while len(results) < len(members):
        ready, _ = ray.wait(list(waiting), timeout=START_POLL_S)
        if not ready:
            for member in meanwhile:
                member.actor.heartbeat.remote()
            names = ", ".join(member.name for member in waiting.values())
            deadline.check(f"{names}: {problem}")
            continue
        member = waiting.pop(ready[0])
        try:
            results[member.name] = ray.get(ready[0])
        except RayTaskError as error:
            raise StartError(f"{member.name}: {first_line(error)}") from None
        except RayError as error:
            raise StartError(f"{member.name}: {_why_ended(error)}") from None
    return [results[member.name] for member in members]


def _why_ended(error: RayError) -> str:
    """Of a process that is gone. One that raised in its constructor has left a traceback, whose last line is the cause."""
    if is_final(error):
        return first_line(error)
    return (
        "its process ended while it loaded: killed, maybe for want of memory, or crashed (the log may say more)"
    )
