"""What a client may do to its connection: bytes on a real socket, against the real server on the event loop it runs on."""

import asyncio
import gc
import json
import os
import re
import resource
import socket

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.api import connection
from afd_server.types import FinishReason, RequestOutput
from tests.unit.api.running_server import DEADLINE_S, Running
from tests.unit.api.scripted_service import TOKENIZER, ScriptedService, says

PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
SHORT_S = 0.2


@pytest.fixture(scope="module")
def event_loop_policy():
    return uvloop.EventLoopPolicy()


def completion(**fields):
    body = json.dumps({"prompt": "hi", **fields}).encode()
    return b"%s\r\n%s" % (head(f"Content-Length: {len(body)}"), body)


def head(*headers):
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode()


class Raw:
    """`async with Raw(running) as raw`: a bare connection."""

    def __init__(self, running):
        self._port = running.port

    async def __aenter__(self):
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_):
        self._writer.transport.abort()

    async def send(self, data):
        """As far as the server takes it: it may end the connection meanwhile."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (ConnectionError, RuntimeError):  # uvloop's word for a connection that has ended
            pass

    async def rest(self):
        """All that comes until the server ends the connection, which it must."""
        received = b""
        try:
            while piece := await asyncio.wait_for(self._reader.read(65536), DEADLINE_S):
                received += piece
        except ConnectionError:
            pass
        return received

    async def until(self, words):
        return await asyncio.wait_for(self._reader.readuntil(words), DEADLINE_S)


def status(received):
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    return int(found[1]) if found else None


def error(received):
    return json.loads(received.partition(b"\r\n\r\n")[2])["error"]


async def answers(running):
    """Others are served as ever."""
    assert (await running.client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200


def idle_service(*scripts):
    return ScriptedService(*scripts, says("ab"))


# --- heads -----------------------------------------------------------------------------------------------------------

LONG = b"x" * (connection.MAX_HEAD_BYTES + 1)


@pytest.mark.parametrize(
    ("data", "expected", "words"),
    [
        (head(*(f"X-{i}: 1" for i in range(connection.MAX_HEADERS))) + b"\r\n", 431, "more than 100 headers"),
        (head("X-Long: " + LONG.decode()) + b"\r\n", 431, "longer than 65536 bytes"),
        (head("X-" + LONG.decode() + ": 1") + b"\r\n", 431, "longer than 65536 bytes"),
        (b"GET /" + LONG + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "URL is longer"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "not an HTTP request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "not an HTTP request"),
        (head("Content-Length: 1", "Content-Length: 2") + b"\r\n{}", 400, "not an HTTP request"),
        (head("Content-Length: -1") + b"\r\n{}", 400, "not an HTTP request"),
        (head("Content-Length: 3", "Transfer-Encoding: chunked") + b"\r\n{}", 400, "not an HTTP request"),
        (head("Transfer-Encoding: chunked") + b"\r\nzz\r\n", 400, "not an HTTP request"),
        (b"CONNECT /\xff HTTP/1.1\r\n\r\n", 400, "not an HTTP request"),
        (b"GET /caf\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "not an HTTP request"),
    ],
)  # fmt: skip
async def test_a_head_that_is_refused(data, expected, words):
    async with Running(idle_service()) as running:
        async with Raw(running) as raw:
            await raw.send(data)
            received = await raw.rest()
        assert status(received) == expected
        assert words in error(received)["message"]
        await answers(running)


@pytest.mark.parametrize(
    ("start", "piece"),
    [(b"GET /", b"x" * 4096), (b"GET / HTTP/1.1\r\nX-", b"y" * 4096), (b"GET / HTTP/1.1\r\nX: ", b"z" * 4096)],
)
async def test_a_head_that_never_ends(start, piece):
    """In pieces, as one arrives that no single read holds: refused long before the time is up."""
    async with Running(idle_service(), client_timeout_s=600) as running:
        async with Raw(running) as raw:
            await raw.send(start)
            for _ in range(3 * connection.MAX_HEAD_BYTES // len(piece)):
                await raw.send(piece)
                await asyncio.sleep(0)
            assert status(await raw.rest()) in (431, None)  # None: reset, since more was on its way
        await answers(running)


async def test_a_protocol_upgrade_is_not_made():
    async with Running(idle_service()) as running:
        async with Raw(running) as raw:
            await raw.send(
                b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
                + bytes(99)
            )
            assert status(await raw.until(b"{}")) == 200
        await answers(running)


# --- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"POST /v1/comp",
        head(),
        head("Content-Length: 100") + b'\r\n{"prompt"',
        head("Transfer-Encoding: chunked") + b'\r\n5\r\n{"pro',
        head("Transfer-Encoding: chunked") + b"\r\n5;" + b"x" * 100,
    ],
)
async def test_half_a_request_and_then_silence(data):
    service = idle_service()
    async with Running(service, client_timeout_s=SHORT_S) as running:
        async with Raw(running) as raw:
            await raw.send(data)
            received = await raw.rest()
        assert status(received) == 408
        assert "not complete within 0.2 s" in error(received)["message"]
        assert not service.requests
        await answers(running)


@pytest.mark.parametrize("data", [b"", b"\r\n", PING, PING + b"\r\n" * 3])
async def test_nothing_and_then_silence(data, monkeypatch):
    async with Running(idle_service(), client_timeout_s=SHORT_S) as running:
        async with Raw(running) as raw:
            await raw.send(data)
            assert status(await raw.rest()) == (200 if PING in data else None)
        await answers(running)


async def test_a_body_that_never_ends():
    """Small chunks without end: too large in the end, and the client who goes on after that is not listened to forever."""
    async with Running(idle_service(), client_timeout_s=SHORT_S, max_body_bytes=10_000) as running:
        async with Raw(running) as raw:
            await raw.send(head("Transfer-Encoding: chunked") + b"\r\n")
            answer = asyncio.create_task(raw.rest())
            while not answer.done():
                await raw.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
                await asyncio.sleep(0.001)
            received = answer.result()
        assert status(received) == 413
        assert "10000 bytes" in error(received)["message"]
        await answers(running)


async def test_an_answer_that_takes_longer_than_the_client_may_take():
    """The deadline is for what the client owes, not for the server's own work; a second request may wait meanwhile."""
    release = asyncio.Event()
    service = ScriptedService([*says("ab")[:1], release, *says("ab")[1:]], says("xy"))
    async with Running(service, client_timeout_s=SHORT_S) as running, Raw(running) as raw:
        await raw.send(completion(stream=True) + completion()[:-3])
        await raw.until(b"data: ")
        await asyncio.sleep(3 * SHORT_S)  # what is shown is that nothing happens
        release.set()
        await raw.until(b"[DONE]\n\n")
        await raw.send(completion()[-3:])
        assert b'"text":"xy"' in await raw.until(b"}}")


# --- one after the other ---------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order():
    async with Running(ScriptedService(says("first"), says("second"))) as running, Raw(running) as raw:
        await raw.send(completion() + completion() + PING)
        assert b"first" in await raw.until(b"}}")
        assert b"second" in await raw.until(b"}}")
        assert status(b"HTTP" + (await raw.until(b"\r\n\r\n")).partition(b"HTTP")[2]) == 200


async def test_more_pipelined_requests_than_are_kept():
    service = ScriptedService([*says("ab")[:1], asyncio.Event()])
    async with Running(service) as running, Raw(running) as raw:
        await raw.send(completion(stream=True) + PING * 1000)
        await raw.rest()
        await ended(service, 1)  # what was under way on that connection has ended with it


@pytest.mark.parametrize("garbage", [b"\x00\x01garbage\r\n\r\n", b"{}" * 100, completion()[5:]])
async def test_garbage_after_a_request(garbage):
    """It ends the connection; never is an error written into the middle of a stream."""
    service = ScriptedService([*says("ab")[:1], asyncio.Event()])
    async with Running(service) as running, Raw(running) as raw:
        await raw.send(completion(stream=True))
        await raw.until(b"\n\n")
        await raw.send(garbage)
        assert b"HTTP/1.1" not in await raw.rest()
        await ended(service, 1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [completion(), completion(stream=True), PING, head(), b"\r\n", b"0\r\n\r\n", b"Transfer-Encoding: chunked\r\n",
             b"Content-Length: 5\r\n", b"{", b"Expect: 100-continue\r\n"]
        ) | st.binary(max_size=40),
        max_size=8,
    )
)  # fmt: skip
def test_no_bytes_stop_the_server(pieces):
    async def run():
        service = idle_service()
        async with Running(service) as running:
            async with Raw(running) as raw:
                for piece in pieces:
                    await raw.send(piece)
            await answers(running)
            while len(service.closed) < len(service.requests):
                await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(run(), DEADLINE_S))


# --- readers ---------------------------------------------------------------------------------------------------------


class Endless:
    """A service without an end, that says how far each of its requests has come."""

    def __init__(self):
        self.produced, self.closed = {}, []

    async def generate(self, request):
        part = tuple(TOKENIZER.encode("x" * 1000))
        self.produced[request.request_id] = 0
        try:
            while self.produced[request.request_id] < request.sampling.max_tokens:
                await asyncio.sleep(0)
                self.produced[request.request_id] += len(part)
                yield RequestOutput(request.request_id, part)
            yield RequestOutput(request.request_id, part, finish_reason=FinishReason.LENGTH)
        finally:
            self.closed.append(request.request_id)

    def health(self):
        return []

    def is_serving(self):
        return True


ENDLESS_TOKENS = 200_000_000


def small_socket(port):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    return sock


async def settled(value):
    """`value()` once it has not changed for some turns of the loop."""
    async with asyncio.timeout(DEADLINE_S):
        last, same = value(), 0
        while same < 20:
            await asyncio.sleep(0.002)
            last, same = value(), (same + 1 if value() == last else 0)
    return last


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_who_does_not_read_stands_still_alone(n):
    """What it asked for stops after what buffers hold, and others go on."""
    service = Endless()
    async with Running(service, max_model_len=ENDLESS_TOKENS) as running:
        with small_socket(running.port) as deaf:
            deaf.sendall(completion(stream=True, max_tokens=ENDLESS_TOKENS - 10, n=n))
            async with asyncio.timeout(DEADLINE_S):
                while len(service.produced) < n:
                    await asyncio.sleep(0)
            produced = await settled(lambda: sum(service.produced.values()))
            assert produced < 1_000_000  # of 200 million for each
            response = await running.client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 5000})
            assert response.json()["usage"]["completion_tokens"] >= 5000
            assert len(service.closed) == 1  # the other's
            assert sum(service.produced.values()) < produced + 10_000
        await ended(service, n + 1)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_who_does_not_read_is_dropped(n):
    service = Endless()
    async with Running(service, client_timeout_s=SHORT_S, max_model_len=ENDLESS_TOKENS) as running:
        with small_socket(running.port) as deaf:
            deaf.sendall(completion(stream=True, max_tokens=ENDLESS_TOKENS - 10, n=n))
            await ended(service, n)
            assert sum(service.produced.values()) < 1_000_000


async def ended(service, count):
    async with asyncio.timeout(DEADLINE_S):
        while len(service.closed) < count:
            await asyncio.sleep(0.01)


async def test_a_client_who_reads_slowly_is_served():
    """As long as it goes on reading, however many timeouts it takes."""
    service = Endless()
    async with Running(service, client_timeout_s=1.0, max_model_len=ENDLESS_TOKENS) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=4096)
        writer.write(completion(stream=True, max_tokens=300_000))
        received = 0
        while piece := await asyncio.wait_for(reader.read(1 << 12), DEADLINE_S):
            received += len(piece)
            if b"[DONE]" in piece:
                break
            await asyncio.sleep(0.02)  # 200 KB a second
        assert received > 300_000
        writer.close()


async def test_a_short_answer_that_is_never_read():
    """It fits the buffers, so nobody waits for it; the connection still ends."""
    service = Endless()
    async with Running(service, client_timeout_s=SHORT_S, max_model_len=ENDLESS_TOKENS) as running:
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        with small_socket(running.port) as deaf:
            deaf.sendall(completion(max_tokens=50_000))
            async with asyncio.timeout(DEADLINE_S):
                while len(os.listdir("/proc/self/fd")) > before + 1 or not service.closed:
                    await asyncio.sleep(0.01)


# --- numbers ---------------------------------------------------------------------------------------------------------


async def test_more_connections_than_descriptors():
    """Those that find none are closed or wait; when the others have gone, or were dropped as silent, all is as before."""
    async with Running(idle_service(), client_timeout_s=SHORT_S) as running:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        silent = [socket.socket() for _ in range(40)]
        # Room for about half of them at the server's end, which is this process too.
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        try:
            for sock in silent:
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", running.port))
            gone = 0
            async with asyncio.timeout(DEADLINE_S):
                while gone < len(silent):
                    await asyncio.sleep(0.01)
                    gone = sum(map(is_closed, silent))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for sock in silent:
                sock.close()
        await answers(running)


def is_closed(sock):
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
