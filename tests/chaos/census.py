"""What a server holds of the machine: processes, file descriptors, shared memory. Taken before and after, and compared."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
LINK_MEMORY = "memfd:afd-link"


@dataclass(frozen=True, slots=True)
class Holdings:
    """One process: open descriptors by kind (socket, pipe, file, ...) and mapped link memories."""

    descriptors: Counter[str]
    link_memories: int


def holdings(pid: int) -> Holdings:
    """Raises OSError when the process is gone."""
    kinds: Counter[str] = Counter()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            kinds[_kind(os.readlink(f"/proc/{pid}/fd/{entry}"))] += 1
    maps = Path(f"/proc/{pid}/maps").read_text()
    return Holdings(kinds, sum(LINK_MEMORY in line for line in maps.splitlines()))


def _kind(target: str) -> str:
    """`socket:[123]` is a socket, `anon_inode:[eventpoll]` is itself, a path is a file."""
    if target.startswith("anon_inode:"):
        return target
    return target.split(":")[0] if ":[" in target else LINK_MEMORY if LINK_MEMORY in target else "file"


class Family:
    """Every process that was ever seen below a server, so that none of them outlives it unseen."""

    def __init__(self, pid: int) -> None:
        self._front_ends: set[psutil.Process] = set()
        self._roots: set[psutil.Process] = set()  # a front-end that is killed leaves its children behind
        self._seen: set[psutil.Process] = set()  # by process id and time of creation
        self.add(pid)

    def add(self, pid: int) -> None:
        """The server's front-end is this process now. Harmless when it was before."""
        self._front_ends.add(psutil.Process(pid))
        self.look()

    def look(self) -> None:
        """Notes who is there now."""
        for front_end in self._front_ends:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._roots.update([front_end, *front_end.children()])
        for root in self._roots:
            self._seen.add(root)
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen.update(root.children(recursive=True))

    def zombies(self) -> list[str]:
        """Those that have ended and that nobody has taken note of."""
        return [str(process) for process in self._seen if _is_zombie(process)]

    def survivors(self, timeout_s: float) -> list[str]:
        """Those that still live after `timeout_s` at the latest."""
        _, alive = psutil.wait_procs(list(self._seen), timeout=timeout_s)
        return [
            f"{process.pid} {' '.join(process.cmdline())[:100]}" for process in alive if process.is_running()
        ]


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def abandoned_shared_memory(since: float) -> list[str]:
    """Names in /dev/shm that were made after `since` (seconds of the epoch) and that no living process has open."""
    held = _names_in_use()
    return sorted(
        path.name
        for path in SHARED_MEMORY.iterdir()
        if path.name not in held and _modified_at(path) > since and path.owner() == Path("/proc/self").owner()
    )


def _names_in_use() -> set[str]:
    names = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for line in (process / "maps").read_text().splitlines():
                if str(SHARED_MEMORY) in line:
                    names.add(Path(line.split(maxsplit=5)[5].removesuffix(" (deleted)")).name)
            for entry in os.listdir(process / "fd"):
                target = os.readlink(process / "fd" / entry)
                if target.startswith(str(SHARED_MEMORY)):
                    names.add(Path(target.removesuffix(" (deleted)")).name)
    return names


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
