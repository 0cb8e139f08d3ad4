"""A client that leaves: what it asked for ends at once. The application is driven as a server drives it."""

import asyncio
import json

import pytest

from afd_server.api import streaming
from tests.unit.api.scripted_service import ScriptedService, app_for, says

DEADLINE_S = 10


class Connection:
    """One request on the application's own interface, which can be hung up."""

    def __init__(self, app, **body):
        content = json.dumps(body).encode()
        self._scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
            "scheme": "http", "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        self._incoming = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": content, "more_body": False})
        self.sent = asyncio.Queue()
        self.blocked, self.is_sending = None, False
        self.task = asyncio.create_task(app(self._scope, self._incoming.get, self._send))

    async def _send(self, message):
        self.is_sending = True
        if self.blocked is not None:
            await self.blocked.wait()
        self.sent.put_nowait(message)

    async def first_event(self):
        message = {"body": b""}
        while not message.get("body"):
            message = await asyncio.wait_for(self.sent.get(), DEADLINE_S)
        return message["body"]

    async def hang_up(self):
        self._incoming.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(self.task, DEADLINE_S)


def endless():
    """A request that says one letter and then nothing more."""
    return [*says("ab")[:1], asyncio.Event()]


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("n", [1, 3])
async def test_in_a_stream(n):
    service = ScriptedService(endless())
    connection = Connection(app_for(service), prompt="hi", stream=True, n=n)
    await connection.first_event()
    await until(lambda: len(service.requests) == n)
    await connection.hang_up()
    assert len(service.closed) == n


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token(n, stream):
    service = ScriptedService([asyncio.Event()])
    connection = Connection(app_for(service), prompt="hi", stream=stream, n=n)
    await until(lambda: len(service.requests) == n)
    await connection.hang_up()
    assert len(service.closed) == n


async def test_while_the_answer_waits_for_a_client_who_does_not_read():
    service = ScriptedService(endless())
    connection = Connection(app_for(service), prompt="hi", stream=True)
    connection.blocked = asyncio.Event()
    await until(lambda: connection.is_sending)
    await connection.hang_up()
    assert len(service.closed) == 1
    assert connection.sent.empty()


async def test_the_server_that_waits_no_longer_says_so():
    """It cancels the request's task; client and machine both hear of it."""
    service = ScriptedService(endless())
    app = app_for(service)
    whole, stream = Connection(app, prompt="hi"), Connection(app, prompt="hi", stream=True)
    await stream.first_event()
    await until(lambda: len(service.requests) == 2)
    for connection in (whole, stream):
        connection.task.cancel()
        await asyncio.wait_for(connection.task, DEADLINE_S)
    assert len(service.closed) == 2
    assert whole.sent.get_nowait()["status"] == 503
    assert b"shutting down" in stream.sent.get_nowait()["body"]
    assert stream.sent.get_nowait() == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_client_who_does_not_read_cannot_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(streaming, "FAREWELL_TIMEOUT_S", 0.01)
    service = ScriptedService(endless())
    connection = Connection(app_for(service), prompt="hi", stream=True)
    await connection.first_event()
    connection.blocked = asyncio.Event()
    connection.task.cancel()
    await asyncio.wait_for(connection.task, DEADLINE_S)
    assert len(service.closed) == 1


async def test_it_counts_as_aborted():
    service = ScriptedService(endless())
    app = app_for(service)
    connection = Connection(app, prompt="hi", stream=True)
    await connection.first_event()
    await connection.hang_up()
    metrics = Connection(app)
    metrics._scope |= {"method": "GET", "path": "/metrics"}
    text = (await metrics.first_event()).decode()
    assert 'afd:request_success_total{finished_reason="abort",model_name="tiny"} 1.0' in text


async def test_who_leaves_as_the_answer_comes_has_left():
    """A server may tell of the end only once: it must not be lost between the first event and the others."""

    async def receive():
        return {"type": "http.disconnect"}

    async def work():
        return "the answer"

    with pytest.raises(streaming.ClientLeftError):
        await streaming.unless_client_leaves(receive, work())
