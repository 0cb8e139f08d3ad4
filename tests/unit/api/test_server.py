"""The port, the signals and the end, with a real server in this process."""

import asyncio
import signal
import socket

import httpx
import pytest

from afd_server.api.server import bind_port
from afd_server.errors import ConfigError
from tests.unit.api.running_server import DEADLINE_S, Running
from tests.unit.api.scripted_service import ScriptedService, says


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_a_free_port(host):
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with bind_port(host, 0) as listening:
        address = listening.getsockname()[:2]
        with socket.create_connection(
            ("127.0.0.1" if host == "0.0.0.0" else address[0], address[1]), DEADLINE_S
        ):
            pass


def test_a_taken_port_is_named():
    with bind_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port: cannot listen on 127\.0\.0\.1 port {port}: .*in use"):
            bind_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_named():
    with pytest.raises(ConfigError, match=r"--host: 192\.0\.2\.1 is not an address of this machine"):
        bind_port("192.0.2.1", 0)


def test_an_unknown_host_is_named():
    with pytest.raises(ConfigError, match="--host"):
        bind_port("no such host", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_running_requests_finish_and_new_ones_are_refused(number):
    release = asyncio.Event()
    service = ScriptedService([*says("ab")[:1], release, *says("ab")[1:]])
    async with (
        Running(service) as running,
        running.client.stream("POST", "/v1/completions", json={"prompt": "hi", "stream": True}) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        running.signal(number)
        while True:  # the listener closes within the server's next tick
            try:
                async with httpx.AsyncClient(timeout=DEADLINE_S) as other:
                    await other.get(f"{running.url}/ping")
            except httpx.TransportError:
                break
        release.set()
        rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        await running.ended()


async def test_it_ends_at_once_when_idle():
    async with Running(ScriptedService()) as running:
        running.signal()
        await running.ended()


@pytest.mark.parametrize("signals", [1, 2])
async def test_a_request_that_does_not_end_is_cut_off(signals, caplog):
    """By the timeout, or by a second signal."""
    service = ScriptedService([*says("ab")[:1], asyncio.Event()])
    async with (
        Running(service, shutdown_timeout_s=0.2 if signals == 1 else 600) as running,
        running.client.stream("POST", "/v1/completions", json={"prompt": "hi", "stream": True}) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        for _ in range(signals):
            running.signal()
            await asyncio.sleep(0)  # one turn of the loop for each signal
        rest = [line async for line in lines if line]
        assert "shutting down" in rest[-1]
        await running.ended()
    assert len(service.closed) == 1
    assert not [record for record in caplog.records if record.exc_info]


async def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    async with Running(ScriptedService()) as running:
        running.signal()
        await running.ended()
    assert signal.getsignal(signal.SIGTERM) == before
