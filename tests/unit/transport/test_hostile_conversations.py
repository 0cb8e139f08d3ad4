"""Conversations that are right at first: bytes changed, cut, repeated or put in another order, on real sockets.

Each ends in a dropped connection or a typed error; the other links are served; memory and descriptors are given back.
"""

import asyncio
import contextlib
import gc
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from afd_server.errors import ProtocolError, ServingError, WorkerError
from afd_server.transport import control as control_module
from afd_server.transport.connect import dial
from afd_server.transport.control import ControlClient, ControlServer, Submit
from afd_server.transport.frames import HEADER_BYTES, Header, Kind
from afd_server.transport.handshake import CHALLENGE_BYTES, new_hello, pack_hello, shake_hands
from afd_server.transport.link import SocketLink
from afd_server.transport.shared_memory import create_shared_memory
from afd_server.transport.wire import SlotLayout, Slots
from afd_server.types import GenerationRequest, ReplicaStats, ReplicaUpdate, RequestOutput, SamplingParams

from .wiring import (
    DEADLINE_S,
    SECRET,
    SHAPE,
    Wiring,
    assert_serves,
    random_call,
    serve,
    tag,
    wired,
)

# A failure is a wait that ends at its deadline; to look for a smaller example would be hundreds of such waits.
PHASES = (Phase.explicit, Phase.generate)
FUZZ = settings(
    max_examples=25, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["shm", "tcp"])
def wiring(request: pytest.FixtureRequest) -> Iterator[Wiring]:
    with wired(request.param) as wiring:
        yield wiring


@pytest.fixture(scope="module", autouse=True)
def small_collections() -> Iterator[None]:
    """Each example collects what it left. What was there before, torch and all, need not be looked through every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mutated(data: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    changed = bytearray(data)
    for kind, place, new in mutations:
        place %= len(changed) + 1
        if kind == "put":
            changed[place : place + len(new)] = new
        elif kind == "cut":
            del changed[place : place + len(new)]
        else:
            changed[place:place] = changed[:place][-len(new) :]
    return bytes(changed)


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "cut", "repeat"]), st.integers(0, 600), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3
)  # fmt: skip


def member(wiring: Wiring) -> socket.socket:
    """A connection that has the secret and a link. What others ask for meanwhile is served."""
    passed = [create_shared_memory(SlotLayout(SHAPE).total_bytes)] if wiring.kind == "shm" else []
    sock = dial(wiring.listener.endpoint, DEADLINE_S, unix=wiring.kind == "shm")
    hello, deadline = new_hello(wiring.kind, 0, SHAPE), time.monotonic() + DEADLINE_S
    with ThreadPoolExecutor(1) as other:
        shaken = other.submit(shake_hands, sock, "ffn-0", SECRET, hello, passed, deadline)
        while not shaken.done():
            serve_all(wiring)
    for descriptor in passed:
        os.close(descriptor)
    shaken.result()
    return sock


def call_frame(wiring: Wiring, sequence: int, micro_batch: int = 0, step: int = 1, rows: int = 2) -> bytes:
    payload_bytes = rows * 16 * 4
    call = Header(
        Kind.CALL, tag(step=step, micro_batch=micro_batch), sequence, rows, False, "float32", payload_bytes
    )
    return call.pack() + (bytes(payload_bytes) if wiring.kind == "tcp" else b"")


def serve_all(wiring: Wiring) -> None:
    """What a worker's loop does with whatever comes: a caller that is gone is a typed error."""
    for call in wiring.listener.wait(0.0):
        with contextlib.suppress(WorkerError):
            serve(call)


# --- what an FFN worker hears ----------------------------------------------------------------------------------------


@FUZZ
@given(MUTATIONS)
def test_a_hello_with_other_bytes(wiring: Wiring, mutations: list[tuple[str, int, bytes]]) -> None:
    before = descriptors()
    with dial(wiring.listener.endpoint, DEADLINE_S, unix=wiring.kind == "shm") as sock:
        sock.settimeout(0.01)
        challenge = b""
        while len(challenge) < CHALLENGE_BYTES:
            wiring.listener.wait(0.0)
            try:
                challenge += sock.recv(CHALLENGE_BYTES)
            except TimeoutError:
                continue
        sock.sendall(mutated(pack_hello(SECRET, challenge, new_hello("tcp", 0, SHAPE)), mutations))
        wiring.listener.wait(0.0)
    assert_serves(wiring)
    given_back(wiring, before)


@FUZZ
@given(st.integers(1, 3), MUTATIONS)
def test_calls_with_other_bytes(wiring: Wiring, count: int, mutations: list[tuple[str, int, bytes]]) -> None:
    before = descriptors()
    with member(wiring) as sock:
        calls = b"".join(
            call_frame(wiring, sequence, micro_batch=sequence % 4) for sequence in range(1, count + 1)
        )
        sock.sendall(mutated(calls, mutations))
        for _ in range(3):
            serve_all(wiring)
    for _ in range(3):  # what it left half said must not be in the way
        serve_all(wiring)
    assert_serves(wiring)
    given_back(wiring, before)


def given_back(wiring: Wiring, before: int) -> None:
    """All descriptors of what came and went since."""
    while wiring.links:
        wiring.links.pop().close()
    deadline = time.monotonic() + DEADLINE_S
    while descriptors() > before:
        assert time.monotonic() < deadline
        serve_all(wiring)
        gc.collect()


@FUZZ
@given(
    st.permutations(range(1, 7)),
    st.lists(st.integers(0, 5), max_size=3),
    st.lists(st.integers(1, 63), max_size=4),
)
def test_calls_replayed_reordered_and_in_pieces(
    wiring: Wiring, order: list[int], replayed: list[int], cuts: list[int]
) -> None:
    """A call is served if its number is above the last one's of its micro-batch, else the link ends; no call twice."""
    sequences = order + [order[place] for place in replayed]
    served, latest, alive = [], [0] * 4, True
    with member(wiring) as sock:
        for sequence in sequences:
            if sequence <= latest[sequence % 4]:
                alive = False
            latest[sequence % 4] = max(sequence, latest[sequence % 4])
            frame, start = call_frame(wiring, sequence, micro_batch=sequence % 4, step=sequence), 0
            try:
                for end in [*sorted(cuts), len(frame)]:
                    sock.sendall(frame[start:end])
                    start = max(start, end)
                    for call in wiring.listener.wait(0.0):
                        served.append(call.tag.step)
                        serve(call)
            except (BrokenPipeError, ConnectionResetError):
                assert not alive
            if alive:
                assert served[-1] == sequence
    assert len(served) == len(set(served))
    assert_serves(wiring)


class Conversations(RuleBasedStateMachine):
    """Good links and bad ones side by side: whatever the bad ones do, and when, every good call has its own answer."""

    kind = "tcp"

    def __init__(self) -> None:
        super().__init__()
        self.before = descriptors()
        self.context = wired(self.kind)
        self.wiring = self.context.__enter__()
        self.good = self.wiring.link(replica=1)
        self.bad: list[socket.socket] = []
        self.step = 0

    @rule()
    def a_bad_peer_comes(self) -> None:
        if len(self.bad) < 5:
            self.bad.append(member(self.wiring))

    @rule(unix=st.booleans())
    def a_stranger_comes(self, unix: bool) -> None:
        if len(self.bad) < 5:
            self.bad.append(dial(self.wiring.listener.endpoint, DEADLINE_S, unix=unix))

    @precondition(lambda self: self.bad)
    @rule(index=st.integers(0, 9), data=st.binary(max_size=200))
    def it_says_anything(self, index: int, data: bytes) -> None:
        self._say(index, data)

    @precondition(lambda self: self.bad)
    @rule(
        index=st.integers(0, 9),
        sequence=st.integers(0, 9),
        micro_batch=st.integers(0, 3),
        cut=st.integers(1, 300),
    )
    def it_says_a_call(self, index: int, sequence: int, micro_batch: int, cut: int) -> None:
        self._say(index, call_frame(self.wiring, sequence, micro_batch)[:cut])

    def _say(self, index: int, data: bytes) -> None:
        sock = self.bad[index % len(self.bad)]
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # dropped already, or full
            sock.send(data)

    @precondition(lambda self: self.bad)
    @rule(index=st.integers(0, 9))
    def it_leaves(self, index: int) -> None:
        self.bad.pop(index % len(self.bad)).close()

    @rule()
    def nothing_happens(self) -> None:
        serve_all(self.wiring)

    @rule(rows=st.integers(1, 8), micro_batch=st.integers(0, 3))
    def a_good_peer_is_served(self, rows: int, micro_batch: int) -> None:
        self.step += 1
        call, its_tag = (
            random_call(SHAPE, rows, seed=self.step),
            tag(self.step, micro_batch=micro_batch, replica=1),
        )
        self.good.send(its_tag, call)
        deadline = time.monotonic() + DEADLINE_S
        while True:
            serve_all(self.wiring)
            try:
                answer = self.good.receive(its_tag, 0.001)
                break
            except ServingError:
                assert time.monotonic() < deadline
        assert (answer.y == call.x * 2).all()

    def teardown(self) -> None:
        for sock in self.bad:
            sock.close()
        self.context.__exit__(None, None, None)
        del self.context, self.wiring, self.good
        gc.collect()
        assert descriptors() <= self.before


class SharedConversations(Conversations):
    kind = "shm"


@pytest.mark.parametrize("machine", [Conversations, SharedConversations])
def test_any_course_of_things(machine: type[Conversations]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=20, deadline=None, phases=PHASES)
    )


# --- what an attention worker hears ----------------------------------------------------------------------------------


@FUZZ
@given(st.sampled_from(["answer", "failure"]), MUTATIONS, st.booleans())
def test_an_answer_with_other_bytes(
    kind: str, mutations: list[tuple[str, int, bytes]], on_socket: bool
) -> None:
    """It is the answer, or a typed error within the deadline; never an array of another call."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = SocketLink("ffn-0", ours, Slots(SHAPE), 0, payload_on_socket=on_socket)
        link.send(tag(), random_call(SHAPE, 2))
        payload = b"why not" if kind == "failure" else bytes(2 * 16 * 4)
        head = Header(
            Kind.FAILURE if kind == "failure" else Kind.ANSWER, tag(), 1, 2, False, "float32", len(payload)
        )
        frame = head.pack() + (payload if on_socket or kind == "failure" else b"")
        theirs.sendall(mutated(frame, mutations))
        theirs.shutdown(socket.SHUT_WR)
        try:
            assert link.receive(tag(), DEADLINE_S).y.shape == (2, 16)
        except WorkerError as error:
            assert error.worker == "ffn-0"  # noqa: PT017
        link.close()


# --- the control channel ---------------------------------------------------------------------------------------------


class Replica:
    """A control server on an event loop of its own, which counts what it submits and aborts."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.aborted: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.server = ControlServer(
            SECRET, name="attention-0", node="node", on_submit=lambda request: self.submitted.append(request.request_id),
            on_abort=self.aborted.append,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> "Replica":
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(), self.loop).result(DEADLINE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE_S)
        self.loop.close()

    def member(self) -> socket.socket:
        endpoint = self.server.endpoint
        sock = socket.create_connection((endpoint.host, endpoint.port), DEADLINE_S)
        shake_hands(sock, "attention-0", SECRET, new_hello("control"), [], time.monotonic() + DEADLINE_S)
        return sock


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with Replica() as replica:
        yield replica


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def submission(request_id: str = "r1") -> bytes:
    request = GenerationRequest(request_id, (1, 2, 3), SamplingParams(max_tokens=5, logit_bias={7: -1.0}))
    return msgspec.msgpack.encode(Submit(request))


def still_serves(replica: Replica) -> None:
    with replica.member() as sock:
        count = len(replica.submitted)
        sock.sendall(framed(submission("good")))
        until(lambda: len(replica.submitted) > count)


def all_given_back(replica: Replica, before: int) -> None:
    """Every submission of a client that is gone is aborted, and so is its descriptor."""
    until(lambda: sorted(replica.aborted) == sorted(replica.submitted))
    gc.collect()
    until(lambda: descriptors() <= before)


@FUZZ
@given(MUTATIONS, st.booleans())
def test_commands_with_other_bytes(
    replica: Replica, mutations: list[tuple[str, int, bytes]], framing: bool
) -> None:
    before = descriptors()
    with replica.member() as sock:
        data = mutated(framed(submission()), mutations) if framing else framed(mutated(submission(), mutations))
        with contextlib.suppress(OSError):
            sock.sendall(data + framed(submission("r2")))
    still_serves(replica)
    all_given_back(replica, before)


@FUZZ
@given(st.binary(max_size=100))
def test_any_message(replica: Replica, body: bytes) -> None:
    before = descriptors()
    with replica.member() as sock:
        sock.sendall(framed(body))
        assert sock.recv(1) == b""  # dropped: a command does not come about by chance
    all_given_back(replica, before)


DEEP = b"\x91" * 100_000
BOMBS = {
    "depth": DEEP,
    "depth of maps": b"\x81\xa1x" * 100_000,
    "a list that claims to be large": b"\xdd\xff\xff\xff\xff",
    "a map that claims to be large": b"\xdf\xff\xff\xff\xff\xa1x",
    "a text that claims to be large": b"\xdb\xff\xff\xff\xff",
    "bytes that claim to be large": b"\xc6\xff\xff\xff\xff",
    "an extension": b"\xc9\xff\xff\xff\xff\x01",
    "depth within a field": submission().replace(msgspec.msgpack.encode((1, 2, 3)), DEEP),
    "a prompt that claims to be large": submission().replace(
        msgspec.msgpack.encode((1, 2, 3)), b"\xdd\xff\xff\xff\xff"
    ),
    "a float as an id": submission().replace(msgspec.msgpack.encode((1, 2, 3)), msgspec.msgpack.encode((1.5,))),
    "no text": submission().replace(b"\xa2r1", b"\xa2\xff\xff"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb(replica: Replica, name: str) -> None:
    assert name == "nothing" or BOMBS[name] != submission()
    before = descriptors()
    with replica.member() as sock:
        sock.sendall(framed(BOMBS[name]))
        assert sock.recv(1) == b""
    still_serves(replica)
    all_given_back(replica, before)


def test_a_length_that_lies_and_a_half_message(replica: Replica) -> None:
    before = descriptors()
    with replica.member() as lying, replica.member() as silent:
        lying.sendall(struct.pack("<I", control_module.MAX_FRAME_BYTES + 1))
        assert lying.recv(1) == b""
        silent.sendall(framed(submission())[:-1])
        still_serves(replica)
    all_given_back(replica, before)


@FUZZ
@given(MUTATIONS, st.booleans())
def test_updates_with_other_bytes(mutations: list[tuple[str, int, bytes]], framing: bool) -> None:
    """The router's end: an update, or a typed error."""
    body = msgspec.msgpack.encode(ReplicaUpdate((RequestOutput("r1", (4, 5)),), ReplicaStats(num_running=3)))
    data = mutated(framed(body), mutations) if framing else framed(mutated(body, mutations))

    async def run() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            client = ControlClient("attention-0", reader, writer)
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(WorkerError, match="attention-0"):
                assert all([isinstance(update, ReplicaUpdate) async for update in client.updates()])
            writer.transport.abort()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_an_update_of_another_kind_is_a_protocol_error() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            theirs.sendall(framed(DEEP))
            with pytest.raises(ProtocolError, match="cannot be read"):
                await anext(ControlClient("attention-0", reader, writer).updates())

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


assert HEADER_BYTES < 100  # so that mutations of 600 bytes reach beyond a header
