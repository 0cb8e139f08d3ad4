"""A server for the length of one turn: started on a checkpoint, asked until it answers, stopped with all its processes.

How each is started is in peers/. Called by versus.py. What load is put on a server is load.py's, what comes of it
versus.py's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from peers.setup import Peer, read_peer

from afd_server.checkpoints.default_model import afd_home

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
# One request of a user each, at the length that versus.py asks for and twice that.
SLOTS, SLOT_TOKENS = 32, 512


@dataclass(frozen=True)
class Server:
    """One contestant: a peer, and flags added to its start command."""

    peer: Peer
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return shlex.join([self.peer.name, *self.flags])


def server(name: str, flags: str = "") -> Server:
    """Raises RuntimeError when the peer has to be set up first."""
    peer = read_peer(name)
    assert peer.bin
    return Server(peer, tuple(shlex.split(flags)))


def gguf_file(model: Path, dtype: str) -> Path:
    """The checkpoint as a GGUF file under $AFD_HOME, written when there is none or the checkpoint is newer."""
    place = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:8]
    file = afd_home() / "peers" / "gguf" / f"{model.name}-{place}-{dtype}.gguf"
    newest = max(part.stat().st_mtime for part in model.iterdir())
    if not file.is_file() or file.stat().st_mtime < newest:
        script = Path(__file__).parent / "peers" / "to_gguf.py"
        subprocess.run([sys.executable, str(script), str(model), str(file), "--dtype", dtype], check=True)
    return file


def fill(server: Server, model: Path, dtype: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The command and the process environment with every {name} replaced."""
    peer, cores = server.peer, os.cpu_count() or 1
    values = {
        "bin": str(peer.bin), "model": str(model), "port": str(port), "dtype": dtype, "cores": str(cores),
        "last_core": str(cores - 1), "slots": str(SLOTS), "context_tokens": str(SLOTS * SLOT_TOKENS),
    }  # fmt: skip
    if peer.needs_gguf:
        values["gguf"] = str(gguf_file(model, dtype))
    command = [part.format(**values) for part in peer.start] + list(server.flags)
    return command, {**os.environ, **{key: text.format(**values) for key, text in peer.variables.items()}}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all below it."""
    return [process, *process.children(recursive=True)]


def cpu_s(process: psutil.Process) -> dict[psutil.Process, float]:
    """User and system seconds so far of each process of the family."""
    seconds = {}
    for member in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            seconds[member] = times.user + times.system
    return seconds


def complete(url: str, prompt: str, tokens: int, ignore_eos: bool) -> str:
    """The text of one greedy completion. Raises httpx.HTTPError, LookupError or ValueError."""
    model = httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    if ignore_eos:
        body["ignore_eos"] = True
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])


def wait_until_it_answers(url: str, server: psutil.Popen, log: Path) -> None:
    """Returns when one token comes back. Raises RuntimeError when the server ends first or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError, LookupError, ValueError):
            complete(url, "stone", 1, False)
            return
        time.sleep(0.25)
    raise RuntimeError(
        f"the server does not answer; the end of its log:\n{log.read_text(errors='replace')[-3000:]}"
    )


def end(processes: list[psutil.Process]) -> None:
    """Asks those that are left, which a wrapper may have left behind, then insists."""
    _, left = psutil.wait_procs(processes, timeout=1)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, left = psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


@contextlib.contextmanager
def running(server: Server, model: Path, dtype: str) -> Iterator[tuple[str, psutil.Process]]:
    """The server's URL and process, from its first answer on; at the end none of its processes is left."""
    port = free_port()
    command, environment = fill(server, model, dtype, port)
    with tempfile.TemporaryDirectory(prefix="versus-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as output:
            process = psutil.Popen(command, stdout=output, stderr=output, env=environment)
        members = {process}
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_it_answers(url, process, log)
            members |= set(family(process))  # what outlives a server that dies is no longer below it
            yield url, process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                members |= set(family(process))
                process.terminate()
            psutil.wait_procs([process], timeout=STOP_TIMEOUT_S)
            end(list(members))
