"""Builders for transport tests: listeners and links of each kind, wired up within one test process."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import CallTag, IncomingCall, Link, LinkShape, Listener
from afd_server.transport.connect import connect, dial
from afd_server.transport.handshake import CHALLENGE_BYTES
from afd_server.transport.inproc import InprocListener
from afd_server.transport.listener import SocketListener
from afd_server.transport.wire import HOST

from .fake_cuda import CUDA, FakeDriver, fake_cuda

SECRET = b"the cluster's secret"
DEADLINE_S = 20.0
SHAPE = LinkShape(max_rows=8, hidden_size=16, top_k=2, wire_dtype="float32")


@dataclass
class Wiring:
    """A listener and ways to open links to it. kind: inproc, shm, tcp; or device, which is shm between two GPU workers."""

    kind: str
    listener: Listener
    device: torch.device
    driver: FakeDriver | None = None
    links: list[Link] = field(default_factory=list)

    def link(
        self,
        shape: LinkShape = SHAPE,
        replica: int = 0,
        secret: bytes = SECRET,
        device: torch.device | None = None,
    ) -> Link:
        transport = "shm" if self.kind == "device" else self.kind
        if isinstance(self.listener, InprocListener):
            link = self.listener.connect(shape, replica)
        else:
            link = connect_while_waiting(
                self.listener,
                lambda: connect(
                    self.listener.endpoint, shape, replica, secret, transport, DEADLINE_S, device or self.device
                ),
            )
        self.links.append(link)
        return link

    def calls(self, count: int) -> list[IncomingCall]:
        """Waits for that many calls."""
        return wait_for(self.listener, count)


def wait_for(listener: Listener, count: int) -> list[IncomingCall]:
    deadline = time.monotonic() + DEADLINE_S
    calls: list[IncomingCall] = []
    while len(calls) < count and time.monotonic() < deadline:
        calls += listener.wait(0.2)
    assert len(calls) == count
    return calls


def connect_while_waiting(listener: Listener, connect_link: Callable[[], Link]) -> Link:
    """Runs the client's side on another thread while this one drives the listener, which must see no call."""
    outcome: list[Link | BaseException] = []

    def run() -> None:
        try:
            outcome.append(connect_link())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        assert listener.wait(0.01) == []
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@contextmanager
def wired(kind: str) -> Iterator[Wiring]:
    with fake_cuda() if kind == "device" else nullcontext() as driver:
        device = CUDA if kind == "device" else HOST
        listener = (
            InprocListener("ffn-0")
            if kind == "inproc"
            else SocketListener("ffn-0", "node", SECRET, device=device)
        )
        wiring = Wiring(kind, listener, device, driver)
        try:
            yield wiring
        finally:
            for link in wiring.links:
                link.close()
            listener.close()


def random_call(shape: LinkShape, rows: int, layer: int = 0, routed: bool = False, seed: int = 0) -> FFNCall:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, shape.hidden_size, generator=generator)
    if not routed:
        return FFNCall(layer, x, None, None)
    ids = torch.randint(0, 60, (rows, shape.top_k), generator=generator, dtype=torch.int32)
    return FFNCall(layer, x, ids, torch.rand(rows, shape.top_k, generator=generator))


def serve(call: IncomingCall, factor: float = 2.0) -> None:
    """Answers a call with x * factor, written where the answer belongs."""
    torch.mul(call.call.x, factor, out=call.answer_buffer())
    call.answer(ffn_us=7, batch_rows=call.call.x.shape[0])


def tag(step: int = 1, layer: int = 0, micro_batch: int = 0, replica: int = 0) -> CallTag:
    return CallTag(replica, step, layer, micro_batch)


def stranger(wiring: Wiring) -> socket.socket:
    """A connection that has read the challenge and said nothing."""
    sock = dial(wiring.listener.endpoint, DEADLINE_S, unix=wiring.kind == "shm")
    while not _readable(sock):
        wiring.listener.wait(0.01)
    assert len(sock.recv(CHALLENGE_BYTES)) == CHALLENGE_BYTES
    return sock


def assert_dropped(wiring: Wiring, sock: socket.socket) -> None:
    """The listener ends the connection, perhaps after a last word."""
    sock.settimeout(0.01)
    deadline = time.monotonic() + DEADLINE_S
    with sock:
        while time.monotonic() < deadline:
            assert wiring.listener.wait(0.01) == []
            try:
                if sock.recv(4096) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionResetError:
                return
    pytest.fail("the connection was not dropped")


def assert_serves(wiring: Wiring, replica: int = 9) -> None:
    link = wiring.link(replica=replica)
    call = random_call(SHAPE, 2)
    link.send(tag(replica=replica), call)
    serve(wiring.calls(1)[0])
    link.receive(tag(replica=replica), DEADLINE_S)


def num_descriptors() -> int:
    """Open ones, when what earlier tests left to the garbage collector is gone. What follows must not need it."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _readable(sock: socket.socket) -> bool:
    sock.settimeout(0.01)
    try:
        return len(sock.recv(CHALLENGE_BYTES, socket.MSG_PEEK)) == CHALLENGE_BYTES
    except TimeoutError:
        return False
    finally:
        sock.settimeout(DEADLINE_S)
