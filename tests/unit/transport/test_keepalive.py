"""Connections between hosts ask after a silent peer, soon enough."""

import socket
import sys

import pytest

from afd_server.transport.control import ControlClient, ControlServer

from .wiring import DEADLINE_S, SECRET, wired

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the options are Linux's")


def noticed_within_s(sock: socket.socket) -> int:
    """How long an idle connection to a dead host lasts."""
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    idle_s, interval_s, probes = (
        sock.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    return idle_s + interval_s * probes


def unread_for_ms(sock: socket.socket) -> int:
    """How long bytes may wait for a reader before the connection ends; 0: minutes."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_both_ends_of_a_tcp_link() -> None:
    with wired("tcp") as wiring:
        caller = wiring.link()._socket
        (server,) = wiring.listener._links
        assert noticed_within_s(caller) == noticed_within_s(server) == 20
        assert unread_for_ms(caller) == 0  # a worker that computes does not read
        assert unread_for_ms(server) == 20_000


async def test_both_ends_of_a_control_connection() -> None:
    server = ControlServer(SECRET, name="a", node="n", on_submit=print, on_abort=print)
    await server.start()
    try:
        client = await ControlClient.connect(server.endpoint, SECRET, DEADLINE_S)
        (served,) = server._clients
        for writer in (client._writer, served._writer):
            sock = writer.get_extra_info("socket")
            assert noticed_within_s(sock) == 20
            assert unread_for_ms(sock) == 20_000
    finally:
        await server.close()
