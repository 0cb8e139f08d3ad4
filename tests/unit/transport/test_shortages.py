"""A shortage, or a peer that causes one: whoever is concerned is refused or waits, and the other links are served."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest
import torch

from afd_server.errors import WorkerDiedError, WorkerTimeoutError
from afd_server.transport import link as link_module
from afd_server.transport import listener as listener_module
from afd_server.transport.base import LinkShape
from afd_server.transport.connect import dial
from afd_server.transport.link import SocketLink
from afd_server.transport.server_side import Candidate
from afd_server.transport.wire import Slots

from .wiring import (
    DEADLINE_S,
    SHAPE,
    Wiring,
    assert_dropped,
    assert_serves,
    num_descriptors,
    random_call,
    serve,
    stranger,
    tag,
    wired,
)


@pytest.fixture(params=["shm", "tcp"])
def wiring(request: pytest.FixtureRequest) -> Iterator[Wiring]:
    with wired(request.param) as wiring:
        yield wiring


def test_a_stranger_may_pass_one_descriptor_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    with wired("shm") as wiring, open(os.devnull) as passed:
        sock = stranger(wiring)
        before = num_descriptors()
        for piece in (b"AF", b"Dh"):
            socket.send_fds(sock, [piece], [passed.fileno()])
            wiring.listener.wait(0.0)
        assert_dropped(wiring, sock)
        assert "more than one descriptor" in caplog.text
        assert len(os.listdir("/proc/self/fd")) == before - 2  # both ends of the connection


def test_what_cannot_be_accepted_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def fail(door: socket.socket) -> None:
        attempts.append(door)
        raise OSError(errno.EMFILE, "too many open files")

    with wired("tcp") as wiring:
        monkeypatch.setattr(socket.socket, "accept", fail)
        monkeypatch.setattr(listener_module, "_ACCEPT_PAUSE_S", 1000.0)
        with dial(wiring.listener.endpoint, DEADLINE_S, unix=False):
            while not attempts:
                wiring.listener.wait(0.01)
            for _ in range(10):
                wiring.listener.wait(0.001)
            assert len(attempts) == 1


def test_a_connection_that_could_not_be_accepted_at_once_is_accepted_later(
    wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "too many open files")]

    def fail_at_first(door: socket.socket) -> object:
        if failures:
            raise failures.pop()
        return accept(door)

    monkeypatch.setattr(socket.socket, "accept", fail_at_first)
    monkeypatch.setattr(listener_module, "_ACCEPT_PAUSE_S", 0.01)
    assert_serves(wiring)
    assert not failures


def test_a_call_that_cannot_be_taken_in_ends_its_own_link_alone(
    wiring: Wiring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unlucky, other = wiring.link(replica=0), wiring.link(replica=1)

    def fail(*_: object) -> None:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "read_call", fail)
        unlucky.send(tag(replica=0), random_call(SHAPE, 1))
        while not caplog.records:
            assert wiring.listener.wait(0.01) == []
    assert "link of attention-0 dropped: it cannot be served: RuntimeError: not enough memory" in caplog.text
    with pytest.raises(WorkerDiedError):
        unlucky.receive(tag(replica=0), DEADLINE_S)
    call = random_call(SHAPE, 2)
    other.send(tag(replica=1), call)
    serve(wiring.calls(1)[0])
    assert torch.equal(other.receive(tag(replica=1), DEADLINE_S).y, call.x * 2)


def test_a_newcomer_whose_memory_cannot_be_had_ends_alone(
    wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "open_slots", fail)
        with pytest.raises(WorkerDiedError):
            wiring.link()
    assert_serves(wiring)


class TricklingPeer:
    """Takes a little whenever it is waited for, and every wait costs `seconds_each`. Stands for a link's poll and clock."""

    def __init__(self, sock: socket.socket, seconds_each: float) -> None:
        self.sock, self.seconds_each, self.now = sock, seconds_each, 0.0

    def register(self, sock: socket.socket, events: int) -> None:
        pass

    def poll(self, timeout_ms: float) -> list[int]:
        self.now += self.seconds_each
        self.sock.recv(10_000)
        return [1]

    def monotonic(self) -> float:
        return self.now


def test_a_peer_that_takes_a_call_in_trickles_does_not_hold_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LinkShape(4096, 1024, 0, "float32")  # 16 MB
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        peer = TricklingPeer(theirs, seconds_each=0.04)
        monkeypatch.setattr(link_module, "time", peer)
        link = SocketLink("ffn-0", ours, Slots(shape), 0, payload_on_socket=True)
        monkeypatch.setattr(link, "_poll", peer)
        link.send(tag(), random_call(shape, 4096))
        assert peer.now < 1.1
        sent_at = peer.now
        with pytest.raises(WorkerTimeoutError, match="no answer within 2 s"):
            link.receive(tag(), 2.0)
        assert peer.now < sent_at + 2.1
        link.close()
