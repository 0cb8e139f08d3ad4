"""The front-end's side of a Ray cluster of this host alone: started, found again, ended.

What lives here: which cluster a start uses. What does not: the process that holds it (keeper.py), how it is joined
(placement.py). Imports no ray, so that Ray starts while this process still imports it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from afd_server.cluster.attaching import differences, is_same_command, server_settings
from afd_server.cluster.run_directory import RunDirectory
from afd_server.config import ServeConfig
from afd_server.errors import StartError

logger = logging.getLogger(__name__)

# A thread that waits for work must sleep: spinning on a core that the other side needs costs a hundredfold.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}

RAY_START_TIMEOUT_S = 60.0
RAY_END_TIMEOUT_S = 20.0
LOOK_EVERY_S = 0.02


class OwnRay:
    """A cluster whose front-end is this process. attached: it was there already."""

    def __init__(self, directory: RunDirectory, keeper: subprocess.Popen[bytes] | None) -> None:
        self._directory = directory
        self._keeper = keeper  # None: somebody else's child

    @property
    def attached(self) -> bool:
        return self._keeper is None

    def address(self) -> str:
        """Where Ray listens, as soon as it does. Raises StartError."""
        deadline = time.monotonic() + RAY_START_TIMEOUT_S
        while not (told := self._directory.told()):
            if self._keeper is not None and self._keeper.poll() is not None:
                raise StartError(f"Ray on this host: its keeper ended (exit code {self._keeper.returncode})")
            if time.monotonic() >= deadline:
                raise StartError(f"Ray on this host: not started within {RAY_START_TIMEOUT_S:g} s")
            time.sleep(LOOK_EVERY_S)
        if told["problem"]:
            raise StartError(f"Ray on this host: cannot start: {told['problem']}")
        return str(told["address"])

    def end(self) -> None:
        """Ends Ray, and with it whatever runs there; returns when it is gone."""
        self._directory.end()
        deadline = time.monotonic() + RAY_END_TIMEOUT_S
        while self.is_running():
            if time.monotonic() >= deadline:
                logger.error("Ray has not ended within %g s", RAY_END_TIMEOUT_S)
                if self._keeper is not None:
                    self._keeper.kill()  # Ray's processes die with it
                    self._keeper.wait()
                break
            time.sleep(LOOK_EVERY_S)
        self._directory.give_back()
        self._directory.remove()

    def is_running(self) -> bool:
        """Whether its keeper lives: Ray's processes and the workers die with it."""
        return self._keeper.poll() is None if self._keeper is not None else self._directory.is_kept()


def own_ray(config: ServeConfig, home: Path) -> OwnRay:
    """The cluster of a server whose front-end is gone, if it was started by the same command; else a new one.

    Raises StartError when --attach demands what is not there.
    """
    found = None if config.attach is False else _find(config, home)
    if found is not None:
        return OwnRay(found, None)
    directory = RunDirectory.create(home, server_settings(config))
    command = [
        sys.executable,
        "-m",
        "afd_server.cluster.keeper",
        str(directory.path),
        str(config.orphan_timeout),
    ]
    with open(directory.path / "keeper.log", "wb") as log:
        # In a session of its own: a Ctrl-C in this terminal is for the front-end, which ends the rest in order.
        keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                  env={**os.environ, **WORKER_ENVIRONMENT})  # fmt: skip
    return OwnRay(directory, keeper)


def _find(config: ServeConfig, home: Path) -> RunDirectory | None:
    """A directory without a front-end, taken. Those that nobody uses are removed on the way."""
    contradictions = []
    for directory in RunDirectory.all_below(home):
        if not directory.take():
            continue
        settings = directory.settings()
        if not settings or not directory.is_kept():
            directory.give_back()
            if settings:  # else it is being made, or its keeper is about to remove it
                directory.remove()
            continue
        unlike = differences(config, settings)
        if not unlike and (config.attach or is_same_command(config, settings)):
            return directory
        if unlike and config.port and not config.attach and is_same_command(config, settings):
            logger.warning(
                "the workers of the server before, which was started otherwise, end: %s", ", ".join(unlike)
            )
            directory.end()
        directory.give_back()
        if settings.get("model") == config.model and unlike:
            contradictions.append(", ".join(unlike))
    if config.attach:
        if contradictions:
            raise StartError(
                f"--attach: the running workers were started otherwise: {'; or '.join(contradictions)}"
            )
        raise StartError(f"--attach: no workers of {config.model} without a front-end are running on this host")
    return None
