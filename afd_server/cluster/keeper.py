"""The keeper of a Ray cluster of this host alone: a process that outlives a front-end which is killed.

    python -m afd_server.cluster.keeper DIRECTORY ORPHAN_TIMEOUT_S

It starts Ray, and ends it when the server has ended, or when no front-end has been there for the timeout. Ray's processes
end with it whatever ends it: the kernel sees to that. Started by own_ray.py, which sets its environment.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import ray
from ray.exceptions import RayError

from afd_server.cluster.run_directory import RunDirectory
from afd_server.telemetry.logs import configure_logging

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
ESSENTIAL = ("gcs_server", "raylet")
# Niceness of the workers' session towards others; see let_others_go_first.
SESSION_NICENESS = 4


def let_others_go_first() -> None:
    """Makes the session of this process, which is its own and the workers', yield to those of the front-end and of clients on
    this host, which need little of the processors but need it at once.

    Linux shares the processors between sessions first and only then between their processes (sched(7), autogroups). With
    equal shares, a front-end has waited for more than a second beside busy workers. Niceness of processes does not count between sessions.
    """
    file = Path("/proc/self/autogroup")
    if not file.exists():  # another system, or a kernel without them
        return
    try:
        file.write_text(str(SESSION_NICENESS))
    except OSError as error:
        logger.warning("the workers' session does not yield to the front-end: %s", error)


def essential_processes() -> dict[int, str]:
    """Those of Ray that this process has started and without which there is no cluster: process id -> name."""
    children = " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children")).split()
    named = {int(pid): Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
    return {pid: name for pid, name in named.items() if name in ESSENTIAL}


def has_died(pid: int) -> bool:
    """Of a child: nobody else may have taken its number."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in ("Z", "X")


def keep(directory: RunDirectory, orphan_timeout_s: float) -> bool:
    """Returns when Ray is to end: whether it is whole still. Ray itself would go on with what is left of it."""
    alone_since, essential = None, essential_processes()
    while not directory.has_ended():
        if dead := [name for pid, name in essential.items() if has_died(pid)]:
            logger.error("%s has died: the rest of Ray ends, and every worker", " and ".join(dead))
            return False
        now = time.monotonic()
        if directory.has_front_end():
            alone_since = None
        elif alone_since is None:
            alone_since = now
            logger.warning("the front-end is gone; the workers are kept for %g s", orphan_timeout_s)
        elif now - alone_since >= orphan_timeout_s:
            logger.warning("no front-end has come for %g s: the workers are ended", orphan_timeout_s)
            return True
        time.sleep(LOOK_EVERY_S)
    return True


def main() -> int:
    configure_logging("keeper")
    let_others_go_first()
    directory, orphan_timeout_s = RunDirectory(Path(sys.argv[1])), float(sys.argv[2])
    with directory.kept():
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError, RayError) as error:
            directory.tell(problem=" ".join(str(error).split()) or type(error).__name__)
            return 1
        directory.tell(address=ray.get_runtime_context().gcs_address)
        whole = True
        try:
            whole = keep(directory, orphan_timeout_s)
        finally:
            directory.end()
            if whole:
                ray.shutdown()
            directory.remove()
        if not whole:
            os._exit(1)  # at the end of an interpreter Ray would ask those that are dead
    return 0


if __name__ == "__main__":
    sys.exit(main())
