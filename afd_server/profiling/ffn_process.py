"""The FFN worker of a profile: a process of its own, as Ray gives the server's one, without Ray.

`python -m afd_server.profiling.ffn_process` reads one line of JSON, the configuration, says where it listens, and serves until
its input ends. What does not live here: who starts it (measure.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from afd_server.cluster.workers import FFNServer
from afd_server.config import ServeConfig
from afd_server.errors import StartError
from afd_server.transport.base import Endpoint
from afd_server.transport.listener import SocketListener

SECRET_VARIABLE = "AFD_PROFILE_SECRET"
NAME, NODE = "ffn-0", "here"
END_TIMEOUT_S = 10.0


@contextmanager
def ffn_process(config: ServeConfig, secret: str) -> Iterator[Endpoint]:
    """Starts the process and gives its address; ends it. Raises StartError when it does not come up: its own words are above."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], env={**os.environ, SECRET_VARIABLE: secret}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(dataclasses.asdict(config)) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise StartError("the FFN worker's process has ended while it loaded")
        unix_name, port = json.loads(line)
        yield Endpoint(NAME, NODE, unix_name, "127.0.0.1", port)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    config = ServeConfig(**json.loads(sys.stdin.readline()))
    listener = SocketListener(NAME, NODE, os.environ[SECRET_VARIABLE].encode())
    server = FFNServer(config, 0, listener)
    print(json.dumps([listener.endpoint.unix_name, listener.endpoint.port]), flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
