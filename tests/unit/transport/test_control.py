"""The channel between router and attention replica, over real connections."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from afd_server.errors import ProtocolError, WorkerDiedError, WorkerTimeoutError
from afd_server.transport import control as control_module
from afd_server.transport.base import Endpoint
from afd_server.transport.control import ControlClient, ControlServer
from afd_server.transport.handshake import CHALLENGE_BYTES, new_hello, pack_hello
from afd_server.types import (
    FinishReason,
    GenerationRequest,
    ReplicaStats,
    ReplicaUpdate,
    RequestOutput,
    SamplingParams,
    StepTiming,
    TokenLogprobs,
)

SECRET = b"the cluster's secret"
DEADLINE_S = 20.0


@dataclass
class Replica:
    """Notes what comes in, so that a test can wait for it."""

    server: ControlServer
    events: asyncio.Queue[tuple[str, object]] = field(default_factory=asyncio.Queue)

    async def next_event(self) -> tuple[str, object]:
        return await asyncio.wait_for(self.events.get(), DEADLINE_S)

    async def next_submission(self, expected: GenerationRequest) -> str:
        """Waits for this request; what the engine calls it."""
        kind, request = await self.next_event()
        assert kind == "submit"
        assert isinstance(request, GenerationRequest)
        assert replace(request, request_id=expected.request_id) == expected
        return request.request_id

    async def client(self, secret: bytes = SECRET) -> ControlClient:
        return await ControlClient.connect(self.server.endpoint, secret, DEADLINE_S)


@asynccontextmanager
async def replica(**settings: int) -> AsyncIterator[Replica]:
    server = ControlServer(
        SECRET,
        name="attention-0",
        node="node",
        on_submit=lambda request: noted.events.put_nowait(("submit", request)),
        on_abort=lambda request_id: noted.events.put_nowait(("abort", request_id)),
        **settings,
    )
    noted = Replica(server)
    await server.start()
    try:
        yield noted
    finally:
        await server.close()


def a_request(request_id: str = "r1", prompt: tuple[int, ...] = (1, 2, 3)) -> GenerationRequest:
    return GenerationRequest(
        request_id, prompt, SamplingParams(max_tokens=5, seed=2**63, logit_bias={7: -100.0})
    )


def an_update(*request_ids: str, finish_reason: FinishReason | None = None) -> ReplicaUpdate:
    outputs = tuple(
        RequestOutput(name, (4, 5), (TokenLogprobs(-0.5, ((4, -0.5),)),), finish_reason) for name in request_ids
    )
    return ReplicaUpdate(outputs, ReplicaStats(num_running=3, timing=StepTiming(0.25, num_hops=8)))


async def next_update(client: ControlClient) -> ReplicaUpdate:
    return await asyncio.wait_for(anext(client.updates()), DEADLINE_S)


async def test_a_request_goes_in_and_its_outputs_come_out() -> None:
    async with replica() as served:
        client = await served.client()
        assert client.worker == "attention-0"
        client.submit(a_request())
        engine_id = await served.next_submission(a_request())
        update = an_update(engine_id, finish_reason=FinishReason.STOP)
        await asyncio.to_thread(served.server.publish, update)  # as the engine's thread does
        assert await next_update(client) == an_update("r1", finish_reason=FinishReason.STOP)
        client.close()


async def test_outputs_go_to_their_submitter_and_statistics_to_all() -> None:
    async with replica() as served:
        first, second = await served.client(), await served.client()
        first.submit(a_request("r1"))
        second.submit(a_request("r2"))
        engine_ids = {(await served.next_event())[1].request_id for _ in range(2)}
        served.server.publish(an_update(*sorted(engine_ids), "nobody's"))
        for client, request_id in ((first, "r1"), (second, "r2")):
            assert await next_update(client) == an_update(request_id)


async def test_updates_keep_their_order() -> None:
    async with replica() as served:
        client = await served.client()
        client.submit(a_request())
        engine_id = await served.next_submission(a_request())

        def publish() -> None:
            for token in range(200):
                served.server.publish(ReplicaUpdate((RequestOutput(engine_id, (token,)),), ReplicaStats()))

        thread = threading.Thread(target=publish)
        thread.start()
        tokens = [(await next_update(client)).outputs[0].token_ids[0] for _ in range(200)]
        thread.join()
        assert tokens == list(range(200))


async def test_an_abort_reaches_the_replica_only_from_the_requests_own_client() -> None:
    async with replica() as served:
        owner, other = await served.client(), await served.client()
        owner.submit(a_request("r1"))
        engine_id = await served.next_submission(a_request("r1"))
        other.abort("r1")
        other.submit(a_request("r2"))  # what comes after the abort shows that it was passed over
        await served.next_submission(a_request("r2"))
        owner.abort("r1")
        assert await served.next_event() == ("abort", engine_id)


async def test_a_client_that_leaves_has_its_unfinished_requests_aborted() -> None:
    async with replica() as served:
        client = await served.client()
        client.submit(a_request("finished"))
        client.submit(a_request("running"))
        finished = await served.next_submission(a_request("finished"))
        running = await served.next_submission(a_request("running"))
        served.server.publish(an_update(finished, finish_reason=FinishReason.LENGTH))
        await next_update(client)
        client.close()
        assert await served.next_event() == ("abort", running)
        assert served.events.empty()


async def test_the_death_of_a_replica_ends_the_updates() -> None:
    async with replica() as served:
        client = await served.client()
        waiting = asyncio.create_task(next_update(client))
        await served.server.close()
        with pytest.raises(WorkerDiedError, match="attention-0"):
            await waiting
        with pytest.raises(WorkerDiedError):
            client.submit(a_request())
        client.abort("r1")  # nothing left to abort, nothing to complain about


async def test_a_client_that_does_not_read_is_dropped_and_the_others_are_not() -> None:
    async with replica(max_unsent_bytes=100_000) as served:
        deaf, reading = await served.client(), await served.client()
        deaf.submit(a_request("deaf's"))
        deafs = await served.next_submission(a_request("deaf's"))
        reading.submit(a_request("r1"))
        engine_id = await served.next_submission(a_request("r1"))
        flood = ReplicaUpdate((RequestOutput(deafs, tuple(range(10_000))),), ReplicaStats())
        for _ in range(5000):
            served.server.publish(flood)
            assert (await next_update(reading)).outputs == ()
            if not served.events.empty():
                break
        assert await served.next_event() == ("abort", deafs)
        served.server.publish(an_update(engine_id))
        assert await next_update(reading) == an_update("r1")


async def test_more_than_a_replica_reads_at_once_waits_and_does_not_end_it() -> None:
    requests = [a_request(f"r{number}", (70_000,) * 8000) for number in range(1000)]  # 40 KB each
    async with replica() as served:
        client = await served.client()
        for request in requests:
            client.submit(request)
        left = [request.request_id for request in requests[900:950]]
        for request_id in left:
            client.abort(request_id)
        came = []
        while len(came) < len(requests) - len(left):
            kind, request = await served.next_event()
            assert kind == "submit"
            came.append(request.request_id.partition(":")[2])
        assert came == [request.request_id for request in requests if request.request_id not in left]
        client.submit(a_request("one more"))
        await served.next_submission(a_request("one more"))
        client.close()


async def test_a_replica_that_dies_takes_with_it_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "MAX_BACKLOG_BYTES", 50_000)
    async with replica() as served:
        client = await served.client()
        for number in range(400):
            client.submit(a_request(f"r{number}", (70_000,) * 8000))
        await served.server.close()
        with pytest.raises(WorkerDiedError):
            await next_update(client)
        with pytest.raises(WorkerDiedError):
            client.submit(a_request("one more"))


async def test_what_nobody_hears_is_dropped() -> None:
    server = ControlServer(SECRET, name="a", node="n", on_submit=print, on_abort=print)
    server.publish(an_update("r1"))
    await server.start()
    server.publish(an_update("r1"))
    await server.close()
    server.publish(an_update("r1"))


async def test_another_secret_is_refused() -> None:
    async with replica() as served:
        with pytest.raises(ProtocolError, match="secret"):
            await served.client(b"another")
        await served.client()


async def test_a_replica_that_is_not_there_or_does_not_answer() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    endpoint = Endpoint("attention-0", "node", None, "127.0.0.1", silent.sockets[0].getsockname()[1])
    with pytest.raises(WorkerTimeoutError):
        await ControlClient.connect(endpoint, SECRET, 0.02)
    silent.close()
    with pytest.raises(WorkerDiedError, match="cannot be reached"):
        await ControlClient.connect(endpoint, SECRET, DEADLINE_S)


async def raw_member(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection with the secret that may say anything."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    challenge = await reader.readexactly(CHALLENGE_BYTES)
    writer.write(pack_hello(SECRET, challenge, new_hello("control")))
    return reader, writer


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 1 << 31),
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
        struct.pack("<I", 0),
        struct.pack("<I", 13) + b"\x81\xa4type\xa6Delete",  # no such command
    ],
)
async def test_a_member_that_talks_nonsense_is_dropped(data: bytes) -> None:
    async with replica() as served:
        reader, writer = await raw_member(served.server.endpoint)
        writer.write(data)
        await asyncio.wait_for(_until_end(reader), DEADLINE_S)
        client = await served.client()
        client.submit(a_request())
        await served.next_submission(a_request())
        writer.close()


async def test_strangers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async with replica() as served:
        endpoint = served.server.endpoint
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await asyncio.wait_for(_until_end(reader), DEADLINE_S)
        monkeypatch.setattr(control_module, "HANDSHAKE_TIMEOUT_S", 0.01)
        reader, silent = await asyncio.open_connection(endpoint.host, endpoint.port)
        await asyncio.wait_for(_until_end(reader), DEADLINE_S)
        for each in (writer, silent):
            each.close()


async def test_more_strangers_than_it_keeps_push_out_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "MAX_CANDIDATES", 2)
    async with replica() as served:
        endpoint = served.server.endpoint
        strangers = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            await reader.readexactly(CHALLENGE_BYTES)
            strangers.append((reader, writer))
        assert await asyncio.wait_for(_until_end(strangers[0][0]), DEADLINE_S) == b""
        assert not any(reader.at_eof() for reader, _ in strangers[1:])
        member = await served.client()
        for _ in range(2):
            strangers.append(await asyncio.open_connection(endpoint.host, endpoint.port))
            await strangers[-1][0].readexactly(CHALLENGE_BYTES)
        member.submit(a_request())  # whoever has introduced itself is not pushed out
        await served.next_submission(a_request())
        for _, writer in strangers:
            writer.close()


@pytest.mark.parametrize("half_open", [False, True], ids=["old connection ended", "old connection half open"])
async def test_a_request_submitted_again_hears_nothing_of_its_first_submission(half_open: bool) -> None:
    async with replica() as served:
        old = await served.client()
        old.submit(a_request("r1"))
        first = await served.next_submission(a_request("r1"))
        if not half_open:
            old.close()
            assert await served.next_event() == ("abort", first)
        new = await served.client()
        new.submit(a_request("r1"))
        second = await served.next_submission(a_request("r1"))
        served.server.publish(an_update(first))  # of the step that was under way
        assert (await next_update(new)).outputs == ()
        served.server.publish(an_update(first, finish_reason=FinishReason.ABORT))
        assert (await next_update(new)).outputs == ()
        served.server.publish(an_update(second))
        assert await next_update(new) == an_update("r1")
        new.abort("r1")
        assert await served.next_event() == ("abort", second)


async def test_an_aborted_requests_id_is_free_at_once() -> None:
    async with replica() as served:
        client = await served.client()
        client.submit(a_request("r1"))
        first = await served.next_submission(a_request("r1"))
        client.abort("r1")
        assert await served.next_event() == ("abort", first)
        client.submit(a_request("r1"))
        second = await served.next_submission(a_request("r1"))
        served.server.publish(an_update(first, finish_reason=FinishReason.ABORT))
        assert (await next_update(client)).outputs == ()
        served.server.publish(an_update(second))
        assert await next_update(client) == an_update("r1")


async def test_an_id_that_is_under_way_is_not_submitted_twice() -> None:
    async with replica() as served:
        confused, other = await served.client(), await served.client()
        other.submit(a_request("r1"))
        engine_id = await served.next_submission(a_request("r1"))
        for _ in range(2):
            confused.submit(a_request("r1"))
        with pytest.raises(WorkerDiedError):
            await next_update(confused)
        served.server.publish(an_update(engine_id))
        assert await next_update(other) == an_update("r1")


async def test_an_activation_link_is_not_opened_on_the_control_channel() -> None:
    async with replica() as served:
        endpoint = served.server.endpoint
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        challenge = await reader.readexactly(CHALLENGE_BYTES)
        writer.write(pack_hello(SECRET, challenge, new_hello("tcp")))
        assert b"carries no activations" in await asyncio.wait_for(_until_end(reader), DEADLINE_S)
        writer.close()


async def _until_end(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
