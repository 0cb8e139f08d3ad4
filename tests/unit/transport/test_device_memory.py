"""Links between two GPU workers: when their memory is shared, what both do when it cannot be, and how it ends."""

import logging
import os
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest
import torch

from afd_server.errors import ProtocolError, WorkerDiedError, WorkerTimeoutError
from afd_server.transport import device_memory
from afd_server.transport.base import IncomingCall
from afd_server.transport.connect import connect, dial
from afd_server.transport.device_memory import DeviceMemoryError, map_device_memory, share_device_memory
from afd_server.transport.handshake import Hello, Reply, new_hello, shake_hands
from afd_server.transport.handshake import _pack as pack_body
from afd_server.transport.link import SocketLink
from afd_server.transport.server_side import ServedLink
from afd_server.transport.shared_memory import create_shared_memory
from afd_server.transport.wire import HOST, SlotLayout, Slots

from .fake_cuda import CUDA, NO_PEER_ACCESS, OUT_OF_MEMORY, FakeDriver, fake_cuda
from .wiring import (
    DEADLINE_S,
    SECRET,
    SHAPE,
    Wiring,
    assert_serves,
    connect_while_waiting,
    random_call,
    serve,
    tag,
    wired,
)

SIZE_BYTES = SlotLayout(SHAPE).total_bytes


@pytest.fixture
def wiring() -> Iterator[Wiring]:
    with wired("device") as wiring:
        yield wiring


@pytest.fixture
def driver(wiring: Wiring) -> FakeDriver:
    assert wiring.driver is not None
    return wiring.driver


def let_go(wiring: Wiring, driver: FakeDriver) -> None:
    """Closes all links; the listener drops them."""
    while wiring.links:
        wiring.links.pop().close()
    deadline = time.monotonic() + DEADLINE_S
    while (driver.num_allocated() or driver.pinned) and time.monotonic() < deadline:
        assert wiring.listener.wait(0.01) == []
        device_memory.free_dropped()


def assert_answered(wiring: Wiring, link: SocketLink) -> None:
    call = random_call(SHAPE, 3, routed=True)
    link.send(tag(), call)
    serve(wiring.calls(1)[0])
    assert torch.equal(link.receive(tag(), DEADLINE_S).y, call.x * 2)


# --- agreeing ----------------------------------------------------------------------------------------------------------


def test_two_gpu_workers_of_a_host_share_device_memory(
    wiring: Wiring, driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    link = wiring.link()
    assert (driver.num_allocated(), driver.num_mapped()) == (1, 1)
    assert not link._slots.on_host
    assert [record.message for record in caplog.records] == ["ffn-0: activations stay in the memory of cpu"]
    assert_answered(wiring, link)


REFUSALS = {
    "cuMemAlloc_v2": (OUT_OF_MEMORY, "bytes of device memory: out of memory"),
    "cuIpcGetMemHandle": (999, "a handle of device memory: error 999"),
    "cuIpcOpenMemHandle_v2": (NO_PEER_ACCESS, "mapping the caller's device memory: peer access is not supported"),
    "cuMemGetAddressRange_v2": (999, "the size of the caller's device memory: error 999"),
}  # fmt: skip


@pytest.mark.parametrize("function", REFUSALS)
def test_what_the_driver_refuses_goes_through_host_memory_and_says_why(
    wiring: Wiring, driver: FakeDriver, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    failure, reason = REFUSALS[function]
    driver.fails[function] = failure
    link = wiring.link()
    assert link._slots.on_host
    lines = [record.message for record in caplog.records if "attention-0" not in record.message]
    assert len(lines) == 1
    assert lines[0].startswith("ffn-0: activations go through host memory: ")
    assert reason in lines[0]
    assert_answered(wiring, link)
    assert (driver.num_allocated(), driver.num_mapped()) == (0, 0)
    assert [*driver.pinned.values()] == [SIZE_BYTES, SIZE_BYTES]  # each side's mapping of the same
    del link
    let_go(wiring, driver)
    assert driver.pinned == {}


@pytest.mark.parametrize("largest_bytes", [SIZE_BYTES, SIZE_BYTES - 1])
def test_host_memory_that_cannot_be_pinned_is_used_as_it_is(
    wiring: Wiring,
    driver: FakeDriver,
    largest_bytes: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(device_memory, "_MAX_PINNED_BYTES", largest_bytes)
    driver.fails.update(cuMemAlloc_v2=OUT_OF_MEMORY, cuMemHostRegister_v2=OUT_OF_MEMORY)
    link = wiring.link()
    assert driver.pinned == {}
    assert caplog.text.count("host memory of a link is not pinned: 32768 bytes") == 2
    assert_answered(wiring, link)


def test_a_worker_on_a_cpu_takes_no_device_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with wired("shm") as wiring, fake_cuda() as driver:
        link = wiring.link(device=CUDA)
        assert_answered(wiring, link)
        assert (driver.num_allocated(), driver.num_mapped()) == (0, 0)
    assert "ffn-0: activations go through host memory: the FFN worker computes on a CPU" in caplog.text


def test_a_worker_on_a_gpu_says_so_when_its_caller_is_not(
    wiring: Wiring, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert_answered(wiring, wiring.link(device=HOST))
    assert "attention-0: activations go through host memory: it offers no device memory" in caplog.text


def test_over_tcp_a_gpu_workers_activations_go_through_host_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with wired("tcp") as wiring:
        assert_answered(wiring, wiring.link(device=CUDA))
    assert "ffn-0: activations go through host memory: the transport is TCP" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_there_is_nothing_to_share_or_map() -> None:
    with pytest.raises(DeviceMemoryError, match="no CUDA device"):
        share_device_memory(SIZE_BYTES, CUDA)
    with pytest.raises(DeviceMemoryError, match="no CUDA device"):
        map_device_memory(bytes(64), SIZE_BYTES, CUDA)


# --- a hostile peer ----------------------------------------------------------------------------------------------------


def shake(wiring: Wiring, hello: Hello) -> Reply:
    """What the listener replies to a hello that comes with good host memory."""
    descriptor = create_shared_memory(SIZE_BYTES)
    try:
        with dial(wiring.listener.endpoint, DEADLINE_S, unix=True) as sock:
            deadline = time.monotonic() + DEADLINE_S
            return connect_while_waiting(
                wiring.listener,
                lambda: shake_hands(sock, "ffn-0", SECRET, hello, [descriptor], deadline),  # type: ignore[arg-type,return-value]
            )  # type: ignore[return-value]
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("handle", [b"x", bytes(63), bytes(65), bytes(1500), "text" * 16, -1, [1] * 64, None])
def test_what_is_no_handle_ends_the_connection(
    wiring: Wiring, driver: FakeDriver, handle: object, caplog: pytest.LogCaptureFixture
) -> None:
    hello = new_hello("shm", 0, SHAPE)
    msgspec.structs.force_setattr(hello, "device_handle", handle)
    with pytest.raises((ProtocolError, WorkerDiedError)):
        shake(wiring, hello)
    assert "a connection was dropped: its hello cannot be read" in caplog.text
    assert_serves(wiring)


@pytest.mark.parametrize("purpose", ["tcp", "control"])
def test_a_handle_belongs_to_a_link_of_shared_memory(
    wiring: Wiring, purpose: str, caplog: pytest.LogCaptureFixture
) -> None:
    hello = new_hello("shm", 0, SHAPE, bytes(64))
    msgspec.structs.force_setattr(hello, "purpose", purpose)
    with pytest.raises(ProtocolError):
        shake(wiring, hello)
    assert f"device memory for a link of kind {purpose}" in caplog.text
    assert_serves(wiring)


def test_a_handle_that_nobody_made_is_not_used(wiring: Wiring, driver: FakeDriver) -> None:
    reply = shake(wiring, new_hello("shm", 0, SHAPE, bytes(64)))
    assert reply.device_refusal == "mapping the caller's device memory: invalid argument"
    assert driver.num_mapped() == 0
    assert_serves(wiring)


def test_memory_that_is_too_small_for_the_link_is_refused(wiring: Wiring, driver: FakeDriver) -> None:
    driver.largest_bytes = SIZE_BYTES - 1
    with pytest.raises(ProtocolError, match=f"has {SIZE_BYTES - 1} bytes, the link needs {SIZE_BYTES}"):
        wiring.link()
    device_memory.free_dropped()
    assert (driver.num_allocated(), driver.num_mapped()) == (0, 0)
    driver.largest_bytes = 1 << 40
    assert_serves(wiring)


@pytest.mark.parametrize("body", [{"device_refusal": 1}, {"device_refusal": "x", "way": 1}, [], b"\xff"])
def test_a_reply_that_makes_no_sense_is_a_typed_error(body: object) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        challenge, hello = b"AFDh" + bytes(32), new_hello("shm", 0, SHAPE, bytes(64))
        reply = pack_body(SECRET, b"server", challenge + hello.nonce, msgspec.msgpack.encode(body))
        theirs.sendall(challenge + reply)
        with pytest.raises(ProtocolError, match="its reply cannot be read"):
            shake_hands(ours, "ffn-0", SECRET, hello, [], time.monotonic() + DEADLINE_S)


def test_a_reason_of_any_length_fits_the_reply(wiring: Wiring, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise DeviceMemoryError("ä" * 100_000)

    monkeypatch.setattr("afd_server.transport.server_side.map_device_memory", refuse)
    assert_answered(wiring, wiring.link())


# --- one call ----------------------------------------------------------------------------------------------------------


def test_the_header_leaves_when_the_device_has_written(wiring: Wiring, monkeypatch: pytest.MonkeyPatch) -> None:
    link = wiring.link()
    arrived_before: list[list[IncomingCall]] = []
    monkeypatch.setattr(Slots, "settle", lambda slots: arrived_before.append(wiring.listener.wait(0.0)))
    link.send(tag(), random_call(SHAPE, 1))
    assert arrived_before == [[]]
    (call,) = wiring.calls(1)
    answered_before: list[bool] = []
    monkeypatch.setattr(Slots, "settle", lambda slots: answered_before.append(call._answered))
    call.answer_buffer().zero_()
    call.finish()
    call.answer(1, 1)
    assert answered_before == [False]


def test_kernels_of_the_cpu_leave_device_memory_alone(wiring: Wiring) -> None:
    link = wiring.link()
    assert link.begin_run(tag(), 1) is None
    (served,) = wiring.listener._links.values()
    assert isinstance(served, ServedLink)
    assert served.place(SHAPE.hidden_size) is None
    with wired("shm") as other:
        usual = other.link()
        assert usual.begin_run(tag(), 1) is not None
        (served,) = other.listener._links.values()
        assert served.place(SHAPE.hidden_size) is not None


# --- the end -----------------------------------------------------------------------------------------------------------


def test_closed_links_leave_nothing_behind(wiring: Wiring, driver: FakeDriver) -> None:
    for replica in range(3):
        assert_serves(wiring, replica)
    assert (driver.num_allocated(), driver.num_mapped()) == (3, 3)
    let_go(wiring, driver)
    assert (driver.num_allocated(), driver.num_mapped()) == (0, 0)
    assert not device_memory._kept


def test_memory_outlives_the_call_that_a_peer_is_at(wiring: Wiring, driver: FakeDriver) -> None:
    link = wiring.link()
    link.send(tag(), random_call(SHAPE, 2))
    (call,) = wiring.calls(1)
    link.close()
    wiring.links.clear()
    del link
    device_memory.free_dropped()
    assert driver.num_allocated() == 1
    call.answer_buffer().fill_(1.0)  # it is late, and knows of nothing
    assert wiring.listener.wait(0.0) == []  # now it knows
    with pytest.raises(WorkerDiedError):
        call.answer(1, 2)
    assert driver.num_mapped() == 1  # the call may still be read
    del call
    assert driver.num_mapped() == 0
    let_go(wiring, driver)
    assert driver.num_allocated() == 0


def test_an_answer_may_be_read_after_its_link_is_closed(wiring: Wiring, driver: FakeDriver) -> None:
    link = wiring.link()
    call = random_call(SHAPE, 2)
    link.send(tag(), call)
    serve(wiring.calls(1)[0])
    answer = link.receive(tag(), DEADLINE_S)
    link.close()
    wiring.links.clear()
    del link
    assert wiring.listener.wait(0.05) == []
    device_memory.free_dropped()
    assert (driver.num_allocated(), driver.num_mapped()) == (1, 0)
    assert torch.equal(answer.y, call.x * 2)
    del answer
    assert driver.num_allocated() == 0


def test_the_memory_of_a_dead_peers_link_is_freed(wiring: Wiring, driver: FakeDriver) -> None:
    link = wiring.link()
    link.send(tag(), random_call(SHAPE, 1))
    wiring.listener.close()
    with pytest.raises(WorkerDiedError):
        link.receive(tag(), DEADLINE_S)
    wiring.links.clear()
    del link
    assert (driver.num_allocated(), driver.num_mapped()) == (0, 0)


def test_what_a_peer_still_says_does_not_keep_its_link() -> None:
    ours, theirs = socket.socketpair()
    kept = torch.zeros(1)
    device_memory.keep_until_dropped(ours, kept)
    theirs.sendall(bytes(200_000))
    device_memory.free_dropped()
    assert [*device_memory._kept.values()] == [kept]
    theirs.close()
    device_memory.free_dropped()
    assert device_memory._kept == {}


def test_a_peer_that_hangs_does_not_take_all_device_memory(wiring: Wiring, driver: FakeDriver) -> None:
    for _ in range(6):
        with pytest.raises(WorkerTimeoutError):  # nobody drives the listener
            connect(wiring.listener.endpoint, SHAPE, 0, SECRET, "shm", 0.01, CUDA)
    assert driver.num_allocated() == len(device_memory._kept) == 4
    let_go(wiring, driver)
    assert not device_memory._kept
    assert not wiring.link()._slots.on_host


def test_memory_that_cannot_be_freed_is_logged(
    wiring: Wiring, driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.fails["cuMemFree_v2"] = 999
    memory, handle = share_device_memory(SIZE_BYTES, CUDA)
    assert (len(memory), len(handle)) == (SIZE_BYTES, 64)
    del memory
    assert driver.num_allocated() == 1
    assert "letting go of device memory: error 999" in caplog.text


def test_a_link_opened_by_a_hello_alone_is_forgotten(wiring: Wiring, driver: FakeDriver) -> None:
    """A caller that dies right after its hello: its memory is mapped, and dropped with the connection."""
    memory, handle = share_device_memory(SIZE_BYTES, CUDA)
    assert shake(wiring, new_hello("shm", 0, SHAPE, handle)).device_refusal == ""
    deadline = time.monotonic() + DEADLINE_S
    while driver.num_mapped() and time.monotonic() < deadline:
        assert wiring.listener.wait(0.01) == []
    assert driver.num_mapped() == 0
    assert len(memory) == SIZE_BYTES
