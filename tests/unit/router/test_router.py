"""The router: who gets a request, and that a client of a dying replica sees a pause and no token twice."""

import asyncio

import pytest

from afd_server.errors import UnavailableError, WorkerDiedError
from afd_server.router.affinity import CHUNK_TOKENS, PrefixMemory
from afd_server.router.replica_client import LocalReplicaClient
from afd_server.router.router import AFFINITY_SLACK, Router
from afd_server.types import (
    FinishReason,
    GenerationRequest,
    ReplicaStats,
    ReplicaUpdate,
    RequestOutput,
    SamplingParams,
)

DEADLINE_S = 10.0


class Replica:
    """A client whose replica does what the test says. `tokens` gives request after request its next token."""

    def __init__(self, worker):
        self.worker = worker
        self.running = {}
        self.aborted = []
        self.closed = False
        self._updates = asyncio.Queue()
        self.gone = False

    def submit(self, request):
        if self.gone:
            raise WorkerDiedError(self.worker, "the control connection is closed")
        self.running[request.request_id] = request

    def abort(self, request_id):
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    async def updates(self):
        while True:
            update = await self._updates.get()
            if isinstance(update, Exception):
                raise update
            yield update

    def close(self):
        self.closed = True

    def give(self, request_id, *token_ids, finish_reason=None, **fields):
        output = RequestOutput(request_id, token_ids, finish_reason=finish_reason, **fields)
        self._updates.put_nowait(ReplicaUpdate((output,), ReplicaStats(num_running=len(self.running))))

    def die(self):
        self.gone = True
        self._updates.put_nowait(WorkerDiedError(self.worker, "the control connection ended"))


def request(name, prompt=(1, 2, 3), max_tokens=8):
    return GenerationRequest(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, seed=3))


class Reader:
    """A client that reads a request to its end."""

    def __init__(self, router, name, **fields):
        self.tokens = []
        self.outputs = []
        self.task = asyncio.create_task(self._read(router.generate(request(name, **fields))))

    async def _read(self, outputs):
        async for output in outputs:
            self.outputs.append(output)
            self.tokens += output.token_ids


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)


async def test_outputs_come_in_order_and_end():
    replica = Replica("attention-0")
    async with Router([replica]) as router:
        reader = Reader(router, "a")
        await until(lambda: "a" in replica.running)
        replica.give("a", 5, cached_tokens=2)
        replica.give("a", 6, 7, finish_reason=FinishReason.LENGTH)
        await asyncio.wait_for(reader.task, DEADLINE_S)
    assert reader.tokens == [5, 6, 7]
    assert reader.outputs[0].cached_tokens == 2
    assert replica.aborted == []
    assert replica.closed


async def test_requests_go_to_the_least_loaded_replica():
    replicas = [Replica("attention-0"), Replica("attention-1"), Replica("attention-2")]
    async with Router(replicas) as router:
        readers = [Reader(router, str(number)) for number in range(6)]
        await until(lambda: sum(len(replica.running) for replica in replicas) == 6)
        assert [len(replica.running) for replica in replicas] == [2, 2, 2]
        for reader in readers:
            reader.task.cancel()


async def test_a_known_prefix_goes_where_its_blocks_are_until_that_replica_is_too_busy():
    replicas = [Replica("attention-0"), Replica("attention-1")]
    prefix = tuple(range(CHUNK_TOKENS))
    async with Router(replicas) as router:
        readers = [Reader(router, "other"), Reader(router, "first", prompt=(*prefix, 1))]
        await until(lambda: "first" in replicas[1].running)
        # One each now; as many more as the slack allows go where the prefix is.
        readers += [
            Reader(router, f"again-{number}", prompt=(*prefix, number)) for number in range(AFFINITY_SLACK + 1)
        ]
        await until(lambda: len(replicas[1].running) == AFFINITY_SLACK + 2)
        readers.append(Reader(router, "spilled", prompt=(*prefix, 99)))
        await until(lambda: "spilled" in replicas[0].running)
        for reader in readers:
            reader.task.cancel()


async def test_a_reader_that_leaves_aborts_its_request():
    replica = Replica("attention-0")
    async with Router([replica]) as router:
        outputs = router.generate(request("a"))
        first = asyncio.create_task(anext(outputs))
        await until(lambda: "a" in replica.running)
        replica.give("a", 5)
        await asyncio.wait_for(first, DEADLINE_S)
        await outputs.aclose()
        assert replica.aborted == ["a"]
        replica.give("a", 6)  # was under way already; harmless
        reader = Reader(router, "b")
        await until(lambda: "b" in replica.running)
        replica.give("b", 9, finish_reason=FinishReason.STOP)
        await asyncio.wait_for(reader.task, DEADLINE_S)
    assert reader.tokens == [9]


async def test_requests_of_a_dead_replica_go_on_at_another_with_their_tokens_so_far():
    replicas = [Replica("attention-0"), Replica("attention-1")]
    async with Router(replicas) as router:
        reader = Reader(router, "a")
        await until(lambda: "a" in replicas[0].running)
        replicas[0].give("a", 5, 6)
        await until(lambda: reader.tokens == [5, 6])
        replicas[0].die()
        await until(lambda: "a" in replicas[1].running)
        moved = replicas[1].running["a"]
        assert (moved.prompt_token_ids, moved.resumed_output_token_ids) == ((1, 2, 3), (5, 6))
        assert moved.sampling == request("a").sampling
        assert router.health() == ["attention-0 is not connected"]
        replicas[1].give("a", 7, finish_reason=FinishReason.STOP, cached_tokens=3)
        await asyncio.wait_for(reader.task, DEADLINE_S)
    assert reader.tokens == [5, 6, 7]
    assert [output.cached_tokens for output in reader.outputs] == [0, 0]
    assert replicas[0].closed


async def test_a_replica_found_dead_at_submission_is_passed_over():
    replicas = [Replica("attention-0"), Replica("attention-1")]
    replicas[0].gone = True
    async with Router(replicas) as router:
        reader = Reader(router, "a")
        await until(lambda: "a" in replicas[1].running)
        reader.task.cancel()


async def test_the_only_replicas_requests_wait_for_its_restart():
    old, new = Replica("attention-0"), Replica("attention-0")
    async with Router([old]) as router:
        reader = Reader(router, "a")
        await until(lambda: "a" in old.running)
        old.give("a", 5)
        old.die()
        await until(lambda: router.health())
        late = Reader(router, "b")
        with pytest.raises(UnavailableError, match="no attention worker"):
            await asyncio.wait_for(late.task, DEADLINE_S)
        router.replace("attention-0", new)
        assert router.health() == []
        assert new.running["a"].resumed_output_token_ids == (5,)
        new.give("a", 6, finish_reason=FinishReason.LENGTH)
        await asyncio.wait_for(reader.task, DEADLINE_S)
    assert reader.tokens == [5, 6]


async def test_a_replacement_may_come_before_the_death_is_noticed():
    old, new = Replica("attention-0"), Replica("attention-0")
    async with Router([old]) as router:
        reader = Reader(router, "a")
        await until(lambda: "a" in old.running)
        router.replace("attention-0", new)
        assert "a" in new.running
        old.die()
        new.give("a", 4, finish_reason=FinishReason.LENGTH)
        await asyncio.wait_for(reader.task, DEADLINE_S)
        assert router.health() == []
    assert reader.tokens == [4]


async def test_a_request_without_a_replica_ends_at_its_deadline():
    replica = Replica("attention-0")
    async with Router([replica], failover_timeout_s=0.05) as router:
        reader = Reader(router, "a")
        await until(lambda: "a" in replica.running)
        replica.die()
        with pytest.raises(UnavailableError, match=r"attention-0: .* no other came within 0\.05 s"):
            await asyncio.wait_for(reader.task, DEADLINE_S)


async def test_leaving_ends_what_is_under_way():
    replica = Replica("attention-0")
    async with Router([replica]) as router:
        reader = Reader(router, "a")
        await until(lambda: "a" in replica.running)
    with pytest.raises(UnavailableError, match="shutting down"):
        await asyncio.wait_for(reader.task, DEADLINE_S)


async def test_statistics_are_handed_on_with_the_replicas_name():
    seen = []
    replica = Replica("attention-0")
    async with Router([replica], lambda name, stats: seen.append((name, stats.num_running))) as router:
        reader = Reader(router, "a")
        await until(lambda: "a" in replica.running)
        replica.give("a", 5, finish_reason=FinishReason.STOP)
        await asyncio.wait_for(reader.task, DEADLINE_S)
    assert seen == [("attention-0", 1)]


def test_a_local_client_serves_one_event_loop_after_the_other():
    client = LocalReplicaClient("attention-0")

    class Echo:
        def submit(self, request):
            output = RequestOutput(request.request_id, (1,), finish_reason=FinishReason.STOP)
            client.deliver(ReplicaUpdate((output,), ReplicaStats()))

        def abort(self, request_id):
            raise AssertionError("nothing is left to abort")

    client.attach(Echo())

    async def once():
        async with Router([client]) as router:
            return [output.token_ids async for output in router.generate(request("a"))]

    assert asyncio.run(once()) == [(1,)]
    client.deliver(ReplicaUpdate((), ReplicaStats()))  # nobody listens
    assert asyncio.run(once()) == [(1,)]


def test_prefixes_are_remembered_by_their_longest_match():
    memory = PrefixMemory()
    first = list(range(3 * CHUNK_TOKENS))
    memory.note(first, "a")
    memory.note([*first[:CHUNK_TOKENS], *[7] * CHUNK_TOKENS], "b")
    assert memory.find([*first, 99]) == "a"
    assert memory.find([*first[:CHUNK_TOKENS], 5]) == "b"
    assert memory.find(first[: CHUNK_TOKENS - 1]) is None
    assert memory.find([3] * CHUNK_TOKENS) is None
