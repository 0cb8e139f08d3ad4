"""The watch over the actors: whatever dies, and whenever, is brought back, and the others are told.

The actors are stand-ins that live on the test's event loop: their calls are awaited as Ray's are. What Ray does itself is
tested by the integration tests, which kill real processes.
"""

import asyncio
import contextlib

from ray.exceptions import OutOfMemoryError, RayActorError

from afd_server.cluster.supervisor import Member, Supervisor
from afd_server.errors import WorkerDiedError
from afd_server.transport.base import Endpoint

DEADLINE_S = 10.0


class Method:
    def __init__(self, function):
        self.remote = function


class Actor:
    """A process that dies when told. `failures` are raised by the next loads, one after the other."""

    def __init__(self, name, attention):
        self.name = name
        self.loads = []
        self.told = []
        self.failures = []
        self.deaf = False
        self._attention = attention
        self._alive = asyncio.get_running_loop().create_future()

    def die(self):
        if not self._alive.cancelled():  # by a watch that has ended
            self._alive.set_exception(RayActorError())
        self._alive = asyncio.get_running_loop().create_future()

    def __getattr__(self, name):
        return Method(getattr(self, f"_{name}"))

    def _sentinel(self):
        return self._alive

    async def _ping(self):
        pass

    async def _load(self, *arguments):
        self.loads.append(arguments)
        if self.failures:
            raise self.failures.pop(0)
        endpoint = Endpoint(self.name, "node", None, "127.0.0.1", len(self.loads))
        return (endpoint, None, []) if self._attention else (endpoint, None)

    async def _use_ffn(self, version, endpoints):
        if self.deaf:
            await asyncio.Event().wait()
        self.told.append(ports(endpoints))


def ports(endpoints):
    return [endpoint.port for _, endpoint in sorted(endpoints.items())]


class Cluster:
    """2 attention and 2 FFN members, loaded once (port 0), and a router that notes the clients it is given."""

    def __init__(self):
        self.ffn = [self.member("ffn", index) for index in range(2)]
        self.attention = [self.member("attention", index) for index in range(2)]
        self.replaced = []
        self.lost_names = []
        self.connect_failures = []
        self.supervisor = Supervisor(self._connect)
        for member in (*self.ffn, *self.attention):
            self.supervisor.add(member)

    def member(self, role, index):
        name = f"{role}-{index}"
        actor = Actor(name, role == "attention")
        endpoint = Endpoint(name, "node", None, "127.0.0.1", 0)
        return Member(role, index, name, actor, actor.sentinel.remote(), endpoint)

    async def _connect(self, member):
        if self.connect_failures:
            raise self.connect_failures.pop(0)
        return f"client of {member.name}"

    def replace(self, name, client):
        self.replaced.append((name, client))
        self.lost_names = [other for other in self.lost_names if other != name]

    def lost(self):
        return self.lost_names


@contextlib.asynccontextmanager
async def supervised():
    cluster = Cluster()
    task = asyncio.create_task(cluster.supervisor.run(cluster))
    await asyncio.sleep(0)
    yield cluster
    assert not task.done(), task
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_dead_ffn_worker_is_loaded_again_and_every_attention_worker_is_told():
    async with supervised() as cluster:
        cluster.ffn[1].actor.die()
        await until(lambda: all(member.actor.told for member in cluster.attention))
        await until(lambda: cluster.supervisor.health() == [])
        assert [member.actor.told for member in cluster.attention] == [[[0, 1]], [[0, 1]]]
        cluster.ffn[1].actor.die()  # it is watched again
        await until(lambda: cluster.attention[0].actor.told == [[0, 1], [0, 2]])


async def test_a_dead_attention_worker_is_loaded_with_the_present_endpoints_and_connected():
    async with supervised() as cluster:
        cluster.attention[0].actor.die()
        await until(lambda: cluster.replaced)
        assert cluster.replaced == [("attention-0", "client of attention-0")]
        assert ports(cluster.attention[0].actor.loads[0][1]) == [0, 0]


async def test_both_kinds_at_once_and_the_later_endpoint_wins():
    async with supervised() as cluster:
        cluster.attention[0].actor.failures = [RayActorError()] * 2
        cluster.attention[0].actor.die()
        cluster.ffn[0].actor.die()
        await until(lambda: cluster.replaced)
        loads, told = cluster.attention[0].actor.loads, cluster.attention[0].actor.told
        assert ports(loads[-1][1]) == [1, 0] or told[-1] == [1, 0]
        assert cluster.supervisor.health() == []


async def test_failures_on_the_way_back_are_retried_and_harm_nobody_else():
    async with supervised() as cluster:
        cluster.attention[0].actor.failures = [OutOfMemoryError("the node is full"), RayActorError()]
        cluster.connect_failures = [WorkerDiedError("attention-0", "it crashed again")]
        cluster.attention[0].actor.die()
        await until(lambda: "the node is full" in " ".join(cluster.supervisor.health()))
        await until(lambda: cluster.replaced)
        assert len(cluster.attention[0].actor.loads) == 4


async def test_a_worker_that_loads_hears_of_ffn_workers_that_come_back():
    async with supervised() as cluster:
        actor = cluster.attention[0].actor
        load, loading = actor._load, asyncio.Event()

        async def load_once_told(*arguments):
            loading.set()
            await until(lambda: actor.told)
            return await load(*arguments)

        actor._load = load_once_told
        actor.die()
        await loading.wait()
        cluster.ffn[1].actor.die()
        await until(lambda: cluster.replaced)
        assert actor.told[0] == [0, 1]


async def test_an_attention_worker_that_does_not_listen_holds_nobody_up(monkeypatch):
    monkeypatch.setattr("afd_server.cluster.supervisor.TELL_TIMEOUT_S", 0.05)
    async with supervised() as cluster:
        cluster.attention[0].actor.deaf = True
        cluster.ffn[0].actor.die()
        await until(lambda: cluster.attention[1].actor.told == [[1, 0]])
        await until(lambda: cluster.supervisor.health() == [])


async def test_a_worker_that_lives_is_connected_again(monkeypatch):
    monkeypatch.setattr("afd_server.cluster.supervisor.RECONNECT_POLL_S", 0.01)
    async with supervised() as cluster:
        cluster.connect_failures = [WorkerDiedError("attention-1", "refused")]
        cluster.lost_names = ["attention-1"]
        await until(lambda: cluster.replaced == [("attention-1", "client of attention-1")])
        assert cluster.attention[1].actor.loads == []


async def test_a_member_that_joins_is_watched_and_one_that_has_left_is_not():
    async with supervised() as cluster:
        cluster.supervisor.add(new := cluster.member("ffn", 2))
        await cluster.supervisor.tell_ffn()
        assert [member.actor.told for member in cluster.attention] == [[[0, 0, 0]]] * 2
        new.actor.die()
        await until(lambda: cluster.attention[0].actor.told[1:] == [[0, 0, 1]])
        cluster.supervisor.remove(new)
        await cluster.supervisor.tell_ffn()
        assert cluster.attention[0].actor.told[2:] == [[0, 0]]
        new.actor.die()
        cluster.ffn[0].actor.die()  # noticed later than the other would have been
        await until(lambda: cluster.attention[0].actor.told[3:] == [[1, 0]])
        assert len(new.actor.loads) == 1
        assert [member.name for member in cluster.supervisor.members("ffn")] == ["ffn-0", "ffn-1"]


async def test_a_worker_that_loads_hears_of_what_changed_meanwhile():
    async with supervised() as cluster:
        new, loading, go = cluster.member("attention", 2), asyncio.Event(), asyncio.Event()
        load = new.actor._load

        async def slow_load(*arguments):
            loading.set()
            await go.wait()
            return await load(*arguments)

        new.actor._load = slow_load
        joining = asyncio.create_task(cluster.supervisor.load_attention(new))
        await loading.wait()
        cluster.ffn[1].actor.die()
        await until(lambda: cluster.attention[0].actor.told == [[0, 1]])
        go.set()
        assert await joining == "client of attention-2"
        assert (ports(new.actor.loads[0][1]), new.actor.told) == ([0, 0], [[0, 1]])
