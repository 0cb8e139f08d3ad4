"""Whatever a socket peer does, or stops doing, the listener lives and the other links are served."""

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afd_server.errors import ProtocolError, WorkerDiedError, WorkerTimeoutError
from afd_server.transport import listener as listener_module
from afd_server.transport.base import Endpoint, LinkShape
from afd_server.transport.connect import choose_transport, connect, dial
from afd_server.transport.frames import Header, Kind
from afd_server.transport.handshake import new_hello, pack_hello, shake_hands
from afd_server.transport.listener import SocketListener
from afd_server.transport.shared_memory import create_shared_memory, map_shared_memory
from afd_server.transport.wire import SlotLayout

from .wiring import (
    DEADLINE_S,
    SECRET,
    SHAPE,
    Wiring,
    assert_dropped,
    assert_serves,
    connect_while_waiting,
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


def member(wiring: Wiring, shape: LinkShape = SHAPE, descriptors: list[int] | None = None) -> socket.socket:
    """A connection that has the secret and a link, over which it may now say anything."""
    if descriptors is None:
        descriptors = [create_shared_memory(SlotLayout(shape).total_bytes)] if wiring.kind == "shm" else []
    sock = dial(wiring.listener.endpoint, DEADLINE_S, unix=wiring.kind == "shm")
    deadline = time.monotonic() + DEADLINE_S
    hello = new_hello(wiring.kind, 0, shape)
    try:
        connect_while_waiting(
            wiring.listener, lambda: shake_hands(sock, "ffn-0", SECRET, hello, descriptors, deadline)
        )
    except BaseException:
        sock.close()
        raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return sock


# --- strangers -------------------------------------------------------------------------------------------------------


def test_another_secret_is_refused_and_said_so(wiring: Wiring) -> None:
    with pytest.raises(ProtocolError, match="secret"):
        wiring.link(secret=b"another")
    assert_serves(wiring)


def test_a_server_without_the_secret_is_not_believed() -> None:
    impostor, sock = socket.socketpair()
    with impostor, sock:
        impostor.sendall(b"AFDh" + bytes(32))
        hello = new_hello("tcp", 0, SHAPE)
        reply = pack_hello(b"guessed", bytes(36), hello)  # well-formed, signed with something else
        impostor.sendall(reply)
        with pytest.raises(ProtocolError, match="secret"):
            shake_hands(sock, "ffn-0", SECRET, hello, [], time.monotonic() + DEADLINE_S)


def test_a_recorded_hello_is_worthless(wiring: Wiring) -> None:
    sock = stranger(wiring)
    sock.sendall(pack_hello(SECRET, b"AFDh" + bytes(32), new_hello(wiring.kind, 0, SHAPE)))
    assert_dropped(wiring, sock)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"AFDh" + struct.pack("<I", 1 << 31),
        b"AFDh" + struct.pack("<I", 0) + bytes(32),
    ],
)
def test_garbage_instead_of_a_hello_is_dropped(wiring: Wiring, data: bytes) -> None:
    sock = stranger(wiring)
    sock.sendall(data)
    assert_dropped(wiring, sock)
    assert_serves(wiring)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_bytes_of_a_stranger_stop_the_listener(wiring: Wiring, data: bytes) -> None:
    with stranger(wiring) as sock:
        sock.sendall(data)
        assert wiring.listener.wait(0.0) == []
    assert_serves(wiring)


def test_silent_strangers_are_dropped_and_delay_nobody(wiring: Wiring, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = stranger(wiring)
    halfway = stranger(wiring)
    halfway.sendall(b"AFDh\x10")
    assert_serves(wiring)
    monkeypatch.setattr(listener_module, "HANDSHAKE_TIMEOUT_S", 0.0)
    assert_dropped(wiring, silent)
    assert_dropped(wiring, halfway)
    monkeypatch.undo()
    assert_serves(wiring)


def test_more_strangers_than_it_keeps_push_out_the_oldest(
    wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "MAX_CANDIDATES", 2)
    oldest, *others = [stranger(wiring) for _ in range(3)]
    assert_dropped(wiring, oldest)
    for sock in others:
        sock.close()
    assert_serves(wiring)


# --- members that misbehave ------------------------------------------------------------------------------------------


def header(**changes: object) -> Header:
    values: dict[str, object] = {
        "kind": Kind.CALL, "tag": tag(), "sequence": 1, "rows": 2, "routed": False, "wire_dtype": "float32",
        "payload_bytes": 2 * 16 * 4,
    }  # fmt: skip
    return Header(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "frame",
    [
        bytes(64),
        b"HTTP" + header().pack()[4:],
        header(kind=Kind.ANSWER).pack(),
        header(tag=tag(replica=1)).pack(),
        header(rows=9, payload_bytes=9 * 16 * 4).pack(),
        header(rows=3).pack(),
        header(routed=True).pack(),
        header(wire_dtype="fp8").pack(),
        header(payload_bytes=1 << 60).pack(),
        header(sequence=0).pack(),
    ],
)
def test_a_frame_that_does_not_fit_the_link_drops_it_alone(wiring: Wiring, frame: bytes) -> None:
    sock = member(wiring)
    sock.sendall(frame)
    assert_dropped(wiring, sock)
    assert_serves(wiring)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_of_a_member_stop_the_listener(wiring: Wiring, data: bytes, after_a_call: bool) -> None:
    with member(wiring) as sock:
        if after_a_call:
            sock.sendall(header().pack())
        sock.sendall(data)
        wiring.listener.wait(0.0)
    assert_serves(wiring)


def test_half_a_message_and_then_silence_delays_nobody(wiring: Wiring) -> None:
    with member(wiring) as sock:
        sock.sendall(header().pack()[:30])
        assert_serves(wiring)
        sock.sendall(header().pack()[30:] + bytes(100 if wiring.kind == "tcp" else 0))
        assert_serves_around(wiring)


def assert_serves_around(wiring: Wiring) -> None:
    """As assert_serves, where the misbehaving member may have a call of its own waiting."""
    wiring.listener.wait(0.0)
    assert_serves(wiring)


def test_a_caller_that_never_reads_its_answers_delays_nobody() -> None:
    shape = LinkShape(1024, 1024, 0, "bfloat16")
    with wired("tcp") as wiring:
        frozen = wiring.link(shape, replica=1)
        for step in range(3):  # 2 MB each: more than the sockets take
            for micro_batch in range(4):
                frozen.send(tag(step, micro_batch=micro_batch, replica=1), random_call(shape, 1024))
                for call in wiring.calls(1):
                    serve(call)
            assert_serves(wiring, replica=step + 2)


def test_a_link_for_expert_ids_only_where_it_was_shaped_for_them(wiring: Wiring) -> None:
    sock = member(wiring, LinkShape(8, 16, 0, "float32"))
    sock.sendall(header(routed=True).pack())
    assert_dropped(wiring, sock)


def memfd(size: int, seals: bool) -> int:
    descriptor = create_shared_memory(size) if seals else os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    if not seals:
        os.ftruncate(descriptor, size)
    return descriptor


NEEDED = SlotLayout(SHAPE).total_bytes


@pytest.mark.parametrize(
    ("descriptors", "problem"),
    [
        (list, "one descriptor"),
        (lambda: [memfd(NEEDED, seals=False)], "not sealed"),
        (lambda: [memfd(NEEDED - 4096, seals=True)], "bytes, the link needs"),
        (lambda: [os.open("/dev/null", os.O_RDWR)], "not a memfd"),
    ],
)
def test_memory_that_could_kill_the_worker_is_refused(
    descriptors: Callable[[], list[int]], problem: str
) -> None:
    with wired("shm") as wiring:
        before = num_descriptors()
        with pytest.raises(ProtocolError, match=problem):
            member(wiring, descriptors=descriptors())
        assert len(os.listdir("/proc/self/fd")) == before
        assert_serves(wiring)


def test_shared_memory_leaves_nothing_behind() -> None:
    with wired("shm") as wiring:
        before = num_descriptors()
        for replica in range(3):
            assert_serves(wiring, replica)
            wiring.links.pop().close()
            wiring.listener.wait(0.0)
        assert len(os.listdir("/proc/self/fd")) == before
    assert not [name for name in os.listdir("/dev/shm") if "afd" in name]


def test_mapped_memory_is_the_same_on_both_sides() -> None:
    descriptor = create_shared_memory(4096)
    first, second = map_shared_memory(descriptor, 4096), map_shared_memory(descriptor, 4096)
    os.close(descriptor)
    first[100] = 7
    assert second[100] == 7


# --- deaths ----------------------------------------------------------------------------------------------------------

CHILD_LISTENER = """
import sys
from afd_server.transport.listener import SocketListener
listener = SocketListener("ffn-0", "node", b"the cluster's secret")
print(listener.endpoint.unix_name, listener.endpoint.port, flush=True)
while True:
    for call in listener.wait(1.0):
        print("call", flush=True)
"""

CHILD_LINK = """
import sys, time, torch
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import CallTag, Endpoint, LinkShape
from afd_server.transport.connect import connect
for transport in ("shm", "tcp"):
    endpoint = Endpoint("ffn-0", "node", sys.argv[1], "127.0.0.1", int(sys.argv[2]))
    link = connect(endpoint, LinkShape(8, 16, 2, "float32"), 0, b"the cluster's secret", transport, 20.0)
    link.send(CallTag(0, 1, 0, 0), FFNCall(0, torch.ones(2, 16), None, None))
    globals()[transport] = link
time.sleep(60)
"""


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_killed_ffn_worker_is_noticed_at_once() -> None:
    with child(CHILD_LISTENER) as process:
        try:
            assert process.stdout is not None
            unix_name, port = process.stdout.readline().split()
            endpoint = Endpoint("ffn-0", "node", unix_name, "127.0.0.1", int(port))
            links = [connect(endpoint, SHAPE, 0, SECRET, transport, DEADLINE_S) for transport in ("shm", "tcp")]
            for link in links:
                link.send(tag(step=3, layer=2), random_call(SHAPE, 1, layer=2))
                assert process.stdout.readline() == "call\n"
        finally:
            process.kill()
        for link in links:
            with pytest.raises(WorkerDiedError, match="worker ffn-0, layer 2, step 3"):
                link.receive(tag(step=3, layer=2), DEADLINE_S)
        process.wait(DEADLINE_S)  # the links end a moment before the door
        with pytest.raises(WorkerDiedError, match="cannot be reached"):
            connect(endpoint, SHAPE, 0, SECRET, "shm", DEADLINE_S)


def test_a_killed_attention_worker_leaves_the_others_served() -> None:
    with wired("shm") as wiring:
        endpoint = wiring.listener.endpoint
        with child(CHILD_LINK, str(endpoint.unix_name), str(endpoint.port)) as process:
            try:
                orphans = wiring.calls(2)
            finally:
                process.kill()
        deadline = time.monotonic() + DEADLINE_S
        while any(call.wanted for call in orphans):  # until both ends of file are read
            assert wiring.listener.wait(0.01) == []
            assert time.monotonic() < deadline
        for call in orphans:
            with pytest.raises(WorkerDiedError):
                serve(call)
        assert_serves(wiring)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_nobody_there_and_nobody_answering_are_told_apart() -> None:
    with wired("tcp") as wiring:
        endpoint = wiring.listener.endpoint
        with pytest.raises(WorkerTimeoutError, match="handshake"):
            connect(endpoint, SHAPE, 0, SECRET, "tcp", 0.02)  # nobody drives the listener
    with pytest.raises(WorkerDiedError, match="cannot be reached"):
        connect(endpoint, SHAPE, 0, SECRET, "tcp", DEADLINE_S)


def test_a_listener_offers_only_the_doors_it_was_asked_for() -> None:
    listener = SocketListener("ffn-0", "node", SECRET, unix=False)
    assert listener.endpoint.unix_name is None
    assert choose_transport("auto", "node", listener.endpoint) == "tcp"
    listener.close()
    listener = SocketListener("ffn-0", "node", SECRET, tcp=False)
    assert listener.endpoint.port is None
    assert choose_transport("auto", "node", listener.endpoint) == "shm"
    assert choose_transport("auto", "other", listener.endpoint) == "tcp"
    listener.close()
    listener.close()
