"""Headers, and frames in pieces."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.transport.base import CallTag
from afd_server.transport.frames import HEADER_BYTES, FrameError, FrameReader, Header, Kind, Outbox

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    tag=st.builds(CallTag, replica=U32, step=U64, layer=st.integers(0, 4095), micro_batch=st.integers(0, 3)),
    sequence=U64,
    rows=st.integers(1, 2**20),
    routed=st.booleans(),
    wire_dtype=st.sampled_from(["float32", "bfloat16", "fp8"]),
    payload_bytes=U64,
    ffn_us=U32,
    queue_us=U32,
    batch_rows=U32,
)
HEADER = Header(Kind.ANSWER, CallTag(1, 2, 3, 0), 4, rows=5, routed=False, wire_dtype="fp8", payload_bytes=6)


@given(HEADERS)
def test_a_header_comes_out_as_it_went_in(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES <= 64
    assert Header.unpack(packed) == header


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        Header.unpack(data)  # four random bytes are the magic once in 4 billion


@given(HEADERS, st.integers(0, HEADER_BYTES - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_stays_a_header_within_bounds(
    header: Header, place: int, value: int
) -> None:
    packed = bytearray(header.pack())
    packed[place] = value
    try:
        changed = Header.unpack(packed)
    except FrameError:
        return
    assert 1 <= changed.rows <= 2**20
    assert changed.tag.micro_batch < 4
    assert changed.tag.layer < 4096


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"HTTP"),
        (4, b"\x02"),  # version
        (5, b"\x00"),  # kind
        (6, b"\x04"),  # micro-batch
        (7, b"\x02"),  # routed
        (8, b"\x09"),  # dtype
        (16, struct.pack("<I", 4096)),  # layer
        (36, struct.pack("<I", 0)),  # rows
        (36, struct.pack("<I", 2**20 + 1)),
    ],
)
def test_each_field_out_of_range_is_refused(offset: int, data: bytes) -> None:
    packed = bytearray(HEADER.pack())
    packed[offset : offset + len(data)] = data
    with pytest.raises(FrameError):
        Header.unpack(packed)


def test_times_too_long_for_the_header_are_cut() -> None:
    header = Header(Kind.ANSWER, CallTag(0, 0, 0, 0), 1, 1, False, "fp8", 0, ffn_us=2**40)
    assert Header.unpack(header.pack()).ffn_us == 2**32 - 1


def test_frames_are_put_together_from_single_bytes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        body = bytearray(6)
        reader = FrameReader(theirs)

        def places(header: Header) -> list[memoryview]:
            return [memoryview(body)[:2], memoryview(bytearray()), memoryview(body)[2:]]

        for byte in HEADER.pack() + b"abcde":
            ours.send(bytes([byte]))
            assert reader.read(places) == []
        ours.send(b"f")
        assert reader.read(places) == [HEADER]
        assert body == b"abcdef"
        ours.close()
        with pytest.raises(EOFError):
            reader.read(places)


@given(
    st.lists(HEADERS, min_size=1, max_size=12), st.lists(st.integers(1, 300), max_size=40), st.integers(0, 400)
)
def test_frames_come_out_whole_however_the_bytes_arrive(
    headers: list[Header], cuts: list[int], payload_bytes: int
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        reader = FrameReader(theirs)
        stream = b"".join(
            header.pack() + bytes([index]) * payload_bytes for index, header in enumerate(headers)
        )
        found: list[Header] = []
        bodies: list[bytearray] = []

        def places(header: Header) -> list[memoryview]:
            bodies.append(bytearray(payload_bytes))
            return [memoryview(bodies[-1])]

        for cut in [*cuts, len(stream)]:
            ours.send(stream[:cut])
            stream = stream[cut:]
            while frames := reader.read(places):
                found += frames
        assert found == headers
        assert bodies == [bytes([index]) * payload_bytes for index in range(len(headers))]


def test_an_end_after_whole_frames_is_met_after_them() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        reader = FrameReader(theirs)
        ours.send(HEADER.pack() * 4)  # as many as are read at once: only the next look finds the end
        ours.close()
        assert reader.read(lambda header: []) == [HEADER] * 4
        with pytest.raises(EOFError):
            reader.read(lambda header: [])


def test_no_more_frames_at_once_than_a_link_has_slots() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        reader = FrameReader(theirs)
        ours.send(HEADER.pack() * 9)
        assert [len(reader.read(lambda header: [])) for _ in range(3)] == [4, 4, 1]


def test_a_single_piece_that_does_not_fit_is_kept_too() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        outbox = Outbox(ours)
        sent = [bytes([index % 251]) * 100_003 for index in range(20)]
        assert [outbox.send([piece]) for piece in sent][-1] is False
        received = bytearray()
        while not outbox.flush():
            received += theirs.recv(1 << 16)
        ours.close()
        while piece := theirs.recv(1 << 20):
            received += piece
        assert received == b"".join(sent)


def test_an_outbox_keeps_what_the_peer_does_not_take() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        outbox = Outbox(ours)
        pieces = [bytes([index % 251]) * 10_007 for index in range(200)]
        received = bytearray()
        left = not outbox.send([b"", *pieces])
        assert left
        while not outbox.flush():
            received += theirs.recv(1 << 16)
        assert len(outbox) == 0
        ours.close()
        while piece := theirs.recv(1 << 20):
            received += piece
        assert received == b"".join(pieces)
