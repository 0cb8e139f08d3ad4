"""The watch over the actors: whatever dies, and whenever, is brought back, and the others are told.

The actors are stand-ins that live on the test's event loop: their calls are awaited as Ray's are. What Ray does itself is
tested by the integration tests, which kill real processes.
"""

import asyncio
import contextlib

import pytest
from prometheus_client import CollectorRegistry
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayActorError

from afd_server.cluster import supervisor
from afd_server.cluster.actors import Pulse
from afd_server.cluster.restarts import Restarts
from afd_server.cluster.supervisor import Supervisor
from afd_server.cluster.watch import Member
from afd_server.config import ServeConfig
from afd_server.errors import WorkerDiedError
from afd_server.telemetry.worker_metrics import WorkerMetrics
from afd_server.transport.base import Endpoint

DEADLINE_S = 10.0


class Method:
    def __init__(self, function):
        self.remote = function


class Life:
    """May be awaited several times, and a wait that is cancelled leaves it as it was: as with Ray's references."""

    def __init__(self, future):
        self._future = future

    def __await__(self):
        return asyncio.shield(self._future).__await__()


class Actor:
    """A process that dies when told, or stands still, or hangs; `end` makes another of it.

    failures: raised by the next loads, one after the other. absent: what Ray says while it has no place for it.
    """

    def __init__(self, name):
        self.name = name
        self.loads = []
        self.told = []
        self.shares = []
        self.told_unplaced = {}
        self.failures = []
        self.ends = []
        self.deaf = self.stopped = False
        self.absent = None
        self.stalled_s = 0.0
        self._processes = 1
        self._life = asyncio.get_running_loop().create_future()

    def die(self, error=None):
        life, self._life = self._life, asyncio.get_running_loop().create_future()
        self._processes += 1
        self.stopped, self.stalled_s = False, 0.0
        life.set_exception(error or RayActorError())
        life.exception()  # whether or not somebody waits

    def end_worker(self, reason):
        self._life.set_result(reason)

    def end(self, restart):
        self.ends.append(restart)
        if self._life.done():  # its worker has ended already
            self._life = asyncio.get_running_loop().create_future()
        self.die()

    def __getattr__(self, name):
        return Method(getattr(self, f"_{name}"))

    def _sentinel(self):
        return Life(self._life)

    async def _heartbeat(self):
        if self.absent:
            raise self.absent
        if self.stopped:
            await asyncio.Event().wait()
        return Pulse(f"process {self._processes}", "node", self._processes, self.stalled_s)

    async def _load(self, *arguments):
        self.loads.append(arguments)
        if self.failures:
            raise self.failures.pop(0)
        endpoint = Endpoint(self.name, "node", None, "127.0.0.1", len(self.loads))
        return endpoint, None, []

    async def _use_ffn(self, ffn):
        if self.deaf:
            await asyncio.Event().wait()
        self.told.append(ports(ffn.endpoints))
        self.told_given_up, self.told_unplaced = ffn.given_up, ffn.unplaced

    async def _share_host(self, config):
        if self.deaf:
            await asyncio.Event().wait()
        self.shares.append(shares(config))


def shares(config):
    return config.attention_workers, config.ffn_workers


def ports(endpoints):
    return [endpoint.port for _, endpoint in sorted(endpoints.items())]


class Cluster:
    """2 attention and 2 FFN members, loaded once (port 0), and a router that notes the clients it is given."""

    def __init__(self, **settings):
        self.config = ServeConfig(**{"ffn_workers": 2, "attention_workers": 2, **settings})
        self.ffn = [self.member("ffn", index) for index in range(2)]
        self.attention = [self.member("attention", index) for index in range(2)]
        self.replaced = []
        self.given_up = {}
        self.lost_names = []
        self.connect_failures = []
        self.missing = ""
        self.lost_replicas = []
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(self.registry, "m", self.lost_replicas.append)
        self.supervisor = Supervisor(self.config, self)
        for member in (*self.ffn, *self.attention):
            self.supervisor.add(member)

    def member(self, role, index):
        name = f"{role}-{index}"
        actor = Actor(name)
        endpoint = Endpoint(name, "node", None, "127.0.0.1", 0)
        restarts = Restarts(self.config.max_restarts)
        return Member(role, index, name, actor, actor.sentinel.remote(), restarts, endpoint)

    def metric(self, name, **labels):
        return self.registry.get_sample_value(name, {"model_name": "m", **labels})

    # --- Processes

    async def connect_to(self, member):
        if self.connect_failures:
            raise self.connect_failures.pop(0)
        return f"client of {member.name}"

    def end(self, member, *, restart):
        member.actor.end(restart)

    def why_unplaced(self, member):
        return self.missing

    # --- Router

    def replace(self, name, client):
        self.replaced.append((name, client))
        self.lost_names = [other for other in self.lost_names if other != name]

    def give_up(self, name, reason):
        self.given_up[name] = reason

    def lost(self):
        return self.lost_names


@contextlib.asynccontextmanager
async def supervised(**settings):
    cluster = Cluster(**settings)
    task = asyncio.create_task(cluster.supervisor.run(cluster, cluster.metrics))
    await asyncio.sleep(0)
    yield cluster
    assert not task.done(), task
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    for name, seconds in {
        "restarts.FIRST_PAUSE_S": 0.001,
        "watch.HEARTBEAT_EVERY_S": 0.01,
        "watch.LOOK_EVERY_S": 0.005,
        "supervisor.NEW_PROCESS_POLL_S": 0.005,
        "supervisor.EXPLAIN_AFTER_S": 0.02,
    }.items():
        monkeypatch.setattr(f"afd_server.cluster.{name}", seconds)


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
        assert ports(cluster.attention[0].actor.loads[0][1].endpoints) == [0, 0]


async def test_both_kinds_at_once_and_the_later_endpoint_wins():
    async with supervised() as cluster:
        cluster.attention[0].actor.failures = [RayActorError()] * 2
        cluster.attention[0].actor.die()
        cluster.ffn[0].actor.die()
        await until(lambda: cluster.replaced)
        loads, told = cluster.attention[0].actor.loads, cluster.attention[0].actor.told
        assert ports(loads[-1][1].endpoints) == [1, 0] or told[-1] == [1, 0]
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


async def test_what_a_worker_is_loaded_with_is_true_when_it_is_sent(monkeypatch):
    """Between the decision to load and the call the process may have to be waited for, for seconds."""
    load = supervisor.load

    async def load_late(member, *arguments):
        if member is cluster.attention[0]:
            cluster.ffn[1].actor.die()
            await until(lambda: cluster.ffn[1].actor.loads and cluster.ffn[1].down_since is None)
        return await load(member, *arguments)

    monkeypatch.setattr(supervisor, "load", load_late)
    async with supervised() as cluster:
        cluster.attention[0].actor.die()
        await until(lambda: cluster.replaced)
        assert ports(cluster.attention[0].actor.loads[-1][1].endpoints) == [0, 1]


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
        await until(
            lambda: new.actor.told == [[0, 1]]
        )  # at once, although it is no member yet: it may wait for this worker
        go.set()
        assert await joining == "client of attention-2"
        assert (ports(new.actor.loads[0][1].endpoints), new.actor.told[-1]) == ([0, 0], [0, 1])


@pytest.mark.parametrize("role", ["ffn", "attention"])
async def test_a_process_that_stands_still_is_ended_and_brought_back(role):
    async with supervised(heartbeat_timeout=0.05) as cluster:
        member = getattr(cluster, role)[0]
        await until(lambda: member.pulse is not None)
        member.actor.stopped = True
        await until(lambda: member.actor.ends == [True])
        await until(lambda: len(member.actor.loads) == 1 and cluster.supervisor.health() == [])
        assert cluster.metric("afd:worker_restarts_total", worker=member.name, reason="frozen") == 1


async def test_a_thread_that_hangs_is_noticed_although_its_process_answers():
    async with supervised(ffn_timeout=60.0) as cluster:
        cluster.attention[0].actor.stalled_s = 119.0  # it may wait for an FFN worker for 60 s, and work as long
        cluster.ffn[1].actor.stalled_s = 29.0  # one batch
        await until(lambda: cluster.ffn[1].pulse is not None and cluster.attention[0].pulse is not None)
        cluster.ffn[0].actor.stalled_s = 31.0
        await until(lambda: cluster.ffn[0].actor.ends == [True])
        await until(lambda: cluster.supervisor.health() == [])
        assert cluster.metric("afd:worker_restarts_total", worker="ffn-0", reason="hung") == 1
        assert cluster.ffn[1].actor.ends == cluster.attention[0].actor.ends == []


async def test_a_worker_whose_thread_has_ended_says_why_and_gets_a_new_process(caplog):
    async with supervised() as cluster:
        await until(lambda: cluster.ffn[0].pulse is not None)
        cluster.ffn[0].actor.end_worker("RuntimeError: boom")
        await until(lambda: cluster.ffn[0].actor.ends == [True])
        assert "ffn-0 RuntimeError: boom" in caplog.messages
        await until(lambda: cluster.supervisor.health() == [])


async def test_the_old_process_is_not_taken_for_the_new_one():
    async with supervised(heartbeat_timeout=0.05) as cluster:
        member = cluster.ffn[0]
        await until(lambda: member.pulse is not None)
        end, ended = member.actor.end, asyncio.Event()

        def slow_end(restart):
            ended.set()
            member.actor.stopped = False  # it goes on for a moment, and answers

        member.actor.end = slow_end
        member.actor.stopped = True
        await ended.wait()
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert member.actor.loads == []
        end(True)
        await until(lambda: len(member.actor.loads) == 1)


async def test_ffn_worker_without_restarts_left_is_given_up_and_everybody_hears_why():
    async with supervised(max_restarts=2) as cluster:
        cluster.ffn[0].actor.failures = [OutOfMemoryError("the node is full")] * 3
        cluster.ffn[0].actor.die()
        await until(lambda: cluster.ffn[0].actor.ends == [False])
        await until(lambda: all(0 in getattr(m.actor, "told_given_up", {}) for m in cluster.attention))
        assert len(cluster.ffn[0].actor.loads) == 2
        (sentence,) = cluster.supervisor.health()
        for word in ("ffn-0", "given up after 2 restarts", "the node is full"):
            assert word in sentence
        assert "the node is full" in cluster.supervisor.refusal()
        assert not cluster.supervisor.is_serving()
        # An attention worker that comes now cannot connect, waits, and costs nothing.
        cluster.attention[0].actor.die()
        await until(lambda: any("waits for ffn-0" in line for line in cluster.supervisor.health()))
        assert cluster.attention[0].actor.loads == []


async def test_with_another_replica_of_the_shard_requests_are_served_on():
    async with supervised(max_restarts=0, ffn_replicas=2) as cluster:
        cluster.ffn[0].actor.die()
        await until(lambda: cluster.ffn[0].given_up)
        assert cluster.supervisor.is_serving()
        assert cluster.supervisor.refusal() == ""
        assert "ffn-0" in cluster.supervisor.health()[0]
        cluster.ffn[1].actor.die()
        await until(lambda: cluster.ffn[1].given_up)
        assert not cluster.supervisor.is_serving()
        assert "ffn-1" in cluster.supervisor.refusal()


async def test_attention_workers_are_given_up_one_by_one():
    async with supervised(max_restarts=0) as cluster:
        cluster.attention[1].actor.die()
        await until(lambda: list(cluster.given_up) == ["attention-1"])
        assert cluster.supervisor.is_serving()
        assert cluster.supervisor.refusal() == ""
        cluster.attention[0].actor.die()
        await until(lambda: list(cluster.given_up) == ["attention-1", "attention-0"])
        assert "attention-0" in cluster.supervisor.refusal()


async def test_a_load_that_hangs_is_ended_and_tried_again():
    async with supervised(start_timeout=0.05) as cluster:
        member = cluster.ffn[0]
        load, member.actor._load = member.actor._load, lambda config: asyncio.Event().wait()
        member.actor.die()
        await until(lambda: member.actor.ends == [True])
        assert "--start-timeout" in cluster.supervisor.health()[0]
        member.actor._load = load
        await until(lambda: cluster.supervisor.health() == [])


@pytest.mark.parametrize("role", ["ffn", "attention"])
async def test_a_process_that_stands_still_while_it_loads_is_ended_and_loaded_again(role, monkeypatch):
    monkeypatch.setattr("afd_server.cluster.watch.LOADING_HEARTBEAT_TIMEOUT_S", 0.05)
    async with supervised(heartbeat_timeout=0.02) as cluster:
        member = getattr(cluster, role)[0]
        load = member.actor._load

        async def stand_still(*arguments):
            member.actor.stopped, member.actor._load = True, load
            await asyncio.Event().wait()

        member.actor._load = stand_still
        member.actor.die()
        await until(lambda: member.actor.ends == [True])
        await until(lambda: len(member.actor.loads) == 1 and cluster.supervisor.health() == [])
        assert cluster.metric("afd:worker_restarts_total", worker=member.name, reason="frozen") == 1


@pytest.mark.parametrize("absence", [ActorUnavailableError("restarting", None), ActorDiedError()], ids=type)
async def test_a_worker_without_a_place_is_said_with_what_is_missing_and_costs_no_restart(absence):
    async with supervised(max_restarts=1) as cluster:
        cluster.missing = "too little ffn"
        cluster.ffn[1].actor.absent = absence
        cluster.ffn[1].actor.die()
        await until(lambda: any("too little ffn" in line for line in cluster.supervisor.health()))
        assert cluster.metric("afd:workers_unplaced", worker="ffn-1", missing="too little ffn") == 1
        assert cluster.metric("afd:worker_up", worker="ffn-1", role="ffn") == 0
        # Attention workers hear of it, for the errors of what waits for it.
        await until(lambda: all(m.actor.told_unplaced == {1: "too little ffn"} for m in cluster.attention))
        cluster.missing = ""
        cluster.ffn[1].actor.absent = None
        await until(lambda: cluster.supervisor.health() == [])
        assert all(m.actor.told_unplaced == {} for m in cluster.attention)
        assert cluster.metric("afd:workers_unplaced", worker="ffn-1", missing="too little ffn") is None
        assert cluster.metric("afd:worker_up", worker="ffn-1", role="ffn") == 1
        assert cluster.metric("afd:worker_restarts_total", worker="ffn-1", reason="died") == 1
        assert cluster.metric("afd:worker_recovery_seconds_count", role="ffn") == 1


async def test_an_attention_worker_that_could_not_connect_for_want_of_ffn_workers_loses_no_restart():
    async with supervised(max_restarts=1, ffn_workers=2) as cluster:
        cluster.ffn[0].actor.absent = ActorUnavailableError("restarting", None)
        cluster.ffn[0].actor.die()
        await until(lambda: not cluster.supervisor.is_serving())
        cluster.attention[0].actor.failures = [RayActorError("ffn-0 is out of reach")] * 3
        cluster.attention[0].actor.die()
        await until(lambda: cluster.replaced)
        assert len(cluster.attention[0].actor.loads) == 4
        assert cluster.given_up == {}


async def test_a_process_that_never_comes_is_ended_and_costs_restarts_although_it_has_a_place(monkeypatch):
    monkeypatch.setattr("afd_server.cluster.supervisor.PROCESS_TIMEOUT_S", 0.05)
    async with supervised(max_restarts=2) as cluster:
        cluster.ffn[0].actor.absent = ActorDiedError()
        cluster.ffn[0].actor.die()
        await until(lambda: cluster.ffn[0].given_up)
        assert "no process within 0.05 s" in cluster.supervisor.refusal()
        assert cluster.ffn[0].actor.ends == [True, True, False]


async def test_a_constructor_that_raises_is_said_with_its_cause():
    async with supervised(max_restarts=2) as cluster:
        trace = "The actor died because of an error raised in its creation task\n  File ...\nOSError: no space"
        cluster.ffn[0].actor.absent = ActorUnavailableError(trace, None)
        cluster.ffn[0].actor.die()
        await until(lambda: cluster.ffn[0].given_up)
        assert "OSError: no space" in cluster.supervisor.refusal()
