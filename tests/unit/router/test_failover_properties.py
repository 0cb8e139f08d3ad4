"""Replicas die at any moment and in any order, clients leave, replacements come: every request still ends exactly once,
with its tokens in order, none twice and none missing.

The replicas are in memory and honest: they continue a request from where they are told that it is. What they say travels
through the router's own reader, stream and queue, with as much or as little of the event loop in between as is drawn.
"""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.errors import UnavailableError
from afd_server.router.router import Router
from afd_server.types import GenerationRequest, SamplingParams
from tests.unit.router.memory_client import MemoryClient

REPLICAS, REQUESTS = 2, 4
TURNS = 1000  # far more than all requests need to end
NEVER_S = 1000.0

replicas = st.integers(0, REPLICAS - 1)
requests = st.integers(0, REQUESTS - 1)
asking = st.tuples(st.just("ask"), requests, st.integers(1, 8))  # so many tokens are to come
turning = st.tuples(st.just("turn"), st.integers(0, 8))  # of the event loop
events = st.one_of(
    asking,
    st.tuples(st.just("leave"), requests),
    st.tuples(st.just("produce"), replicas, st.integers(1, 2)),  # so many tokens of each request
    st.tuples(st.just("die"), replicas),
    st.tuples(st.just("die unnoticed"), replicas),  # whoever submits finds out, or the one that replaces it
    st.tuples(st.just("speak from the grave"), replicas),
    st.tuples(st.just("replace"), replicas),
)
scripts = st.tuples(
    st.lists(asking, min_size=1, max_size=3),
    st.lists(st.tuples(turning, events), max_size=20).map(chain.from_iterable).map(list),
).map(lambda parts: parts[0] + parts[1])


def tokens_of(request_id, number):
    """The tokens that a request has, whoever computes them."""
    return tuple(int(request_id) * 100 + position for position in range(number))


class HonestReplica(MemoryClient):
    """Continues what it is given. It never gives a token that it was told is there already."""

    def __init__(self, worker):
        super().__init__(worker)
        self.violations = []  # of what a replica may expect
        self._known = {}  # tokens of each request that runs here

    def submit(self, request):
        super().submit(request)
        known = request.resumed_output_token_ids
        whole = tokens_of(request.request_id, request.sampling.max_tokens)
        if known != whole[: len(known)] or len(known) == len(whole) or request.request_id in self._known:
            self.violations.append(request)
        self._known[request.request_id] = (len(known), request.sampling.max_tokens)

    def abort(self, request_id):
        super().abort(request_id)
        self._known.pop(request_id, None)

    def produce(self, number):
        for _ in range(number):
            for request_id, (known, wanted) in list(self._known.items()):
                token = tokens_of(request_id, wanted)[known]
                ended = known + 1 == wanted
                self.give(request_id, token, end="length" if ended else None)
                self._known[request_id] = (known + 1, wanted)
                if ended:
                    del self._known[request_id]


@dataclass
class Reader:
    """A client. ends: reasons of its end, of which there must be one."""

    request: GenerationRequest
    token_ids: list = field(default_factory=list)
    ends: list = field(default_factory=list)
    task: asyncio.Task = None

    async def read(self, router):
        try:
            async with aclosing(router.generate(self.request)) as outputs:
                async for output in outputs:
                    assert not self.ends, "an output after the end"
                    self.token_ids += output.token_ids
                    if output.finish_reason is not None:
                        self.ends.append(output.finish_reason)
        except UnavailableError:
            self.ends.append("unavailable")


class World:
    """A router, its replicas and its clients, and what happens to them."""

    def __init__(self):
        self.replicas = [HonestReplica(f"attention-{index}") for index in range(REPLICAS)]
        self.graves = [[] for _ in range(REPLICAS)]
        self.readers = {}
        self.left = set()

    async def act(self, router, action, *drawn):
        match action, *drawn:
            case "ask", number, num_tokens if number not in self.readers:
                request = GenerationRequest(str(number), (1, 2), SamplingParams(max_tokens=num_tokens))
                reader = self.readers[number] = Reader(request)
                reader.task = asyncio.create_task(reader.read(router))
            case "leave", number if number in self.readers and not self.readers[number].task.done():
                self.left.add(number)
                self.readers[number].task.cancel()
            case "produce", index, num_tokens if not self.replicas[index]._dead:
                self.replicas[index].produce(num_tokens)
            case "die", index:
                self.replicas[index].die()
            case "die unnoticed", index:
                self.replicas[index]._dead = True
            case "speak from the grave", index:
                present = self.replicas[index]
                for replica in [*self.graves[index], *([present] if present._dead else [])]:
                    replica.produce(1)
            case "replace", index:
                self.replace(router, index)
            case "turn", number:
                for _ in range(number):
                    await asyncio.sleep(0)

    def replace(self, router, index):
        self.graves[index].append(self.replicas[index])
        self.replicas[index] = HonestReplica(f"attention-{index}")
        router.replace(f"attention-{index}", self.replicas[index])

    async def finish(self, router):
        """Whoever is dead is replaced, and everybody computes until all have ended."""
        for index in range(REPLICAS):
            if self.replicas[index]._dead:
                self.replace(router, index)
        for _ in range(TURNS):
            if all(reader.task.done() for reader in self.readers.values()):
                return
            for replica in self.replicas:
                replica.produce(1)
            await asyncio.sleep(0)
        raise AssertionError("a request does not end")


async def play(script, failover_timeout_s):
    world = World()
    async with Router(world.replicas, failover_timeout_s=failover_timeout_s) as router:
        for action in script:
            await world.act(router, *action)
        await world.finish(router)
        assert not router._streams
        assert not router._orphans
        assert not any(replica.streams for replica in router._replicas.values())
        everybody = [*world.replicas, *chain.from_iterable(world.graves)]
        assert not any(replica.violations for replica in everybody)
        assert not any(replica._known for replica in world.replicas), "a replica goes on for nobody"
    return world


@settings(max_examples=300, deadline=None)
@given(scripts)
def test_every_request_ends_once_with_all_its_tokens(script):
    world = asyncio.run(play(script, failover_timeout_s=NEVER_S))
    for number, reader in world.readers.items():
        wanted = tokens_of(reader.request.request_id, reader.request.sampling.max_tokens)
        if number in world.left:
            assert tuple(reader.token_ids) == wanted[: len(reader.token_ids)]
        else:
            assert (tuple(reader.token_ids), reader.ends) == (wanted, ["length"])


@settings(max_examples=100, deadline=None)
@given(scripts)
def test_without_time_for_a_replacement_a_request_still_ends_once(script):
    world = asyncio.run(play(script, failover_timeout_s=0.0))
    for number, reader in world.readers.items():
        wanted = tokens_of(reader.request.request_id, reader.request.sampling.max_tokens)
        given = tuple(reader.token_ids)
        assert given == wanted[: len(given)]
        if number not in world.left:
            assert len(reader.ends) == 1
            assert reader.ends == ["unavailable"] or given == wanted
