"""Nothing that a server writes or shows holds a secret: its API key, the secret of its links, the token of its Ray cluster.

The server runs at the most verbose level, is provoked in every way at hand, and all that it wrote is searched: its
terminal, the bodies and headers of its answers, /metrics, the command lines of its processes, and all of Ray's session.
"""

import base64
import os
import signal
import socket
import tempfile
from pathlib import Path

import httpx
import psutil
import pytest

from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import Server

pytestmark = pytest.mark.integration

KEY = "key-0f3c9a7be1d24c5e"
LINK_SECRET = b"link-secret-of-32-bytes-8d1f5b7e"
RAY_TOKEN = "7a" * 32
WRONG_KEY = "wrong-51c0ffee7d"
DEADLINE_S = 60.0


def spellings(secret):
    """As anything may write it down."""
    raw = secret if isinstance(secret, bytes) else secret.encode()
    return [
        raw,
        raw.hex().encode(),
        raw.hex().upper().encode(),
        base64.b64encode(raw).rstrip(b"="),
        repr(raw)[2:-1].encode(),
    ]


SECRETS = {name: spellings(secret) for name, secret in
           {"API key": KEY, "link secret": LINK_SECRET, "Ray's token": RAY_TOKEN, "a client's key": WRONG_KEY}.items()}  # fmt: skip


def found_in(content, where):
    return [f"{name} in {where}" for name, forms in SECRETS.items() if any(form in content for form in forms)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")
    return write_tokenizer(directory)


PROGRAM = f"""
import sys, types
from afd_server.cluster.ray_environment import prepare_environment
prepare_environment(own_cluster=True)
from afd_server.cluster import ray_cluster
ray_cluster.secrets = types.SimpleNamespace(token_bytes=lambda size: {LINK_SECRET!r}[:size])
from afd_server.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def known(tmp_path):
    """The real command with the secret of the links made known, which is otherwise drawn at random."""
    script = tmp_path / "serve.py"
    script.write_text(PROGRAM)
    return type("Known", (Server,), {"program": (str(script),)})


def command_lines(pid):
    lines = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        lines.append(" ".join(line).encode())
    return lines


def provoke(server):
    """Answers to all that is wrong, as bytes."""
    url, ours, theirs = server.url, {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {WRONG_KEY}"}
    good = {"prompt": "hi", "max_tokens": 3}
    answers = [
        httpx.post(f"{url}/v1/completions", json=good, headers=theirs),
        httpx.post(f"{url}/v1/completions", json=good, headers={"Authorization": KEY}),
        httpx.post(f"{url}/v1/completions", json=good | {"temperature": "hot"}, headers=ours),
        httpx.post(f"{url}/v1/completions", json=good | {KEY: 1}, headers=theirs),
        httpx.post(f"{url}/v1/completions", content=b"{", headers=ours | {"Content-Type": "application/json"}),
        httpx.post(f"{url}/v1/completions", json=good | {"model": "another"}, headers=ours),
        httpx.post(f"{url}/v1/completions", json=good | {"max_tokens": 10**6}, headers=ours),
        httpx.get(f"{url}/v1/nowhere", headers=ours),
        httpx.get(f"{url}/v1/models", headers=ours),
        httpx.get(f"{url}/health", headers=ours),
        httpx.get(f"{url}/metrics", headers=ours),
        httpx.get(f"{url}/openapi.json", headers=ours),
    ]
    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n\x00\r\n\r\n".encode())
        raw.recv(1000)
    assert [answer.status_code for answer in answers[:3]] == [401, 401, 400]
    return [answer.content + repr(answer.headers).encode() for answer in answers]


def listening_ports(pid):
    return {
        connection.laddr.port
        for process in psutil.Process(pid).children(recursive=True)
        if "Actor" in " ".join(process.cmdline())
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_no_secret_is_written_or_shown(model, known, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="afd", dir="/tmp") as session:  # short: Ray's sockets lie below it
        token_file = Path(session) / "token"
        token_file.write_text(RAY_TOKEN)
        token_file.chmod(0o600)
        for name, value in {
            "AFD_API_KEY": KEY, "AFD_LOG_LEVEL": "DEBUG", "RAY_BACKEND_LOG_LEVEL": "debug", "RAY_TMPDIR": session,
            "RAY_AUTH_TOKEN_PATH": str(token_file), "RAY_AUTH_MODE": "token",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        leaks = []
        with known(model, "--max-restarts", "3") as server:
            for number, answer in enumerate(provoke(server)):
                leaks += found_in(answer, f"answer {number}")
            for port in listening_ports(server.process.pid):  # strangers at the doors of the workers
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            for pid in server.pids("FFN"):
                os.kill(pid, signal.SIGKILL)
            body = {"prompt": "hi", "max_tokens": 3}
            answer = httpx.post(
                f"{server.url}/v1/completions",
                json=body,
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=DEADLINE_S,
            )
            leaks += found_in(answer.content, "the answer after a death")
            for line in command_lines(server.process.pid):
                leaks += found_in(line, f"command line {line[:60]!r}")
            server.stop()
            leaks += found_in(server.log().encode(), "the terminal")
        files = [file for file in Path(session).rglob("*") if file.is_file() and file != token_file]
        assert len(files) > 10  # Ray's logs are there
        for file in files:
            leaks += found_in(file.read_bytes(), str(file.relative_to(session)))
    assert leaks == []
