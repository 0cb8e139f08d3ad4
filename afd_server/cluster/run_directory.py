"""What a server with a Ray cluster of its own leaves on disk while it runs: a directory under $AFD_HOME/run.

What lives here: who may use such a cluster, told by two locks. `front-end.lock` is held by the front-end that serves,
`keeper.lock` by the keeper of the cluster (keeper.py); the kernel lets go of a lock when its holder dies, so nobody looks
at process ids. What does not: Ray, which is not imported. The directory holds nothing secret, and other users cannot
enter it. Called by the front-end (own_ray.py) and by the keeper.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from afd_server.errors import StartError

SERVER, RAY = "server.json", "ray.json"
# Longer than the keeper's look at the lock lasts.
TAKE_TIMEOUT_S = 1.0


class RunDirectory:
    """One server's. Made by `create`, or found by `all_below`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._front_end = FileLock(path / "front-end.lock")
        self._keeper = FileLock(path / "keeper.lock")

    @classmethod
    def create(cls, home: Path, settings: dict[str, Any]) -> RunDirectory:
        """A new one, whose front-end is this process. Raises StartError."""
        directory = cls(home / "run" / secrets.token_hex(4))
        try:
            directory.path.parent.mkdir(parents=True, exist_ok=True)
            directory.path.mkdir(mode=0o700)
            directory._front_end.acquire(timeout=TAKE_TIMEOUT_S)
            directory._write(SERVER, settings)
        except (OSError, Timeout) as error:
            problem = f"{directory.path}: {getattr(error, 'strerror', None) or error}; set AFD_HOME to a writable directory"
            raise StartError(problem) from None
        return directory

    @classmethod
    def all_below(cls, home: Path) -> list[RunDirectory]:
        return [cls(path) for path in sorted((home / "run").glob("*/")) if path.is_dir()]

    # --- the front-end ---------------------------------------------------------------------------------------------

    def take(self) -> bool:
        """This process becomes the front-end, unless another is."""
        try:
            self._front_end.acquire(timeout=TAKE_TIMEOUT_S)
        except (Timeout, OSError):  # or the directory has just gone
            return False
        return True

    def give_back(self) -> None:
        """This process is the front-end no more."""
        self._front_end.release()

    def settings(self) -> dict[str, Any]:
        """As given to `create`; empty when they cannot be read, or the server has ended."""
        return self._read(SERVER)

    def end(self) -> None:
        """The server has ended, and so shall the keeper."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / SERVER).unlink()

    def remove(self) -> None:
        """Nobody uses it any more."""
        shutil.rmtree(self.path, ignore_errors=True)

    # --- the keeper ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While the block runs, this process is the keeper."""
        with self._keeper:
            yield

    def is_kept(self) -> bool:
        return _is_held(self._keeper)

    def has_front_end(self) -> bool:
        return _is_held(self._front_end)

    def has_ended(self) -> bool:
        """Whether `end` was called."""
        return not (self.path / SERVER).exists()

    def tell(self, *, address: str = "", problem: str = "") -> None:
        """The keeper's word: where Ray is, or why it is nowhere."""
        self._write(RAY, {"address": address, "problem": problem})

    def told(self) -> dict[str, Any]:
        """The keeper's word; empty before there is one."""
        return self._read(RAY)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        whole = self.path / f".{name}"
        whole.write_text(json.dumps(content))
        os.replace(whole, self.path / name)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _is_held(lock: FileLock) -> bool:
    """Whether somebody else holds it. Whoever wants it meanwhile tries for longer than this takes."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False
