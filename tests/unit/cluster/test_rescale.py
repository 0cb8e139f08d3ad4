"""Changes of the workers: who comes is loaded before anybody is told, who goes gets no new work, and a failure changes nothing.

The actors and the router are stand-ins, see test_supervisor.py. Real ones are scaled by the integration tests.
"""

import asyncio
import contextlib

import pytest
from ray.exceptions import OutOfMemoryError

from afd_server.cluster.rescale import Rescaler
from afd_server.errors import CannotScaleError, ChangeUnderWayError, StartError, WorkerError
from tests.unit.cluster.test_supervisor import (  # noqa: F401  a fixture
    shares,
    short_waits,
    supervised,
    until,
)


class Staff:
    """Makes members of stand-ins. events: what happened, in order."""

    def __init__(self, cluster):
        self.cluster, self.events, self.problem, self.failures = cluster, [], None, {}
        self.loop = asyncio.get_running_loop()

    def create(self, workers, config, deadline):
        if self.problem:
            raise StartError(self.problem)
        self.events.append(f"create for {config.attention_workers}A {config.ffn_replicas}R")

        async def members():
            made = [self.cluster.member(role, index) for role, index in workers]
            for member in made:
                member.actor.failures = self.failures.pop(member.name, [])
            return made

        return asyncio.run_coroutine_threadsafe(members(), self.loop).result(10)

    def dismiss(self, member):
        self.events.append(f"dismiss {member.name}")


class Router:
    """Notes what it is told."""

    def __init__(self, events):
        self.events = events

    def add(self, client):
        self.events.append(f"add {client}")

    async def drain(self, name, timeout_s):
        self.events.append(f"drain {name}")

    def remove(self, name):
        self.events.append(f"remove {name}")


@contextlib.asynccontextmanager
async def rescaled(**settings):
    async with supervised(**settings) as cluster:
        for member in cluster.supervisor.all_members():
            member.enter("serving")
        staff = Staff(cluster)
        rescaler = Rescaler(cluster.config, staff, cluster.supervisor, Router(staff.events))
        yield cluster, staff, rescaler


def names(rescaler):
    return [(member.name, member.phase) for member in rescaler.members()]


SERVING = [(f"{role}-{index}", "serving") for role in ("attention", "ffn") for index in range(2)]


async def test_more_of_both_kinds():
    async with rescaled() as (cluster, staff, rescaler):
        await rescaler.scale(3, 2)
        new = [("attention-2", "serving"), ("ffn-2", "serving"), ("ffn-3", "serving")]
        assert names(rescaler) == sorted([*SERVING, *new])
        assert staff.events == ["create for 3A 2R", "add client of attention-2"]
        # Those that were there hear of the new replica; the new attention worker is loaded with it.
        assert [len(told) for told in cluster.attention[0].actor.told] == [4]
        (new_attention,) = [each for each in rescaler.members() if each.name == "attention-2"]
        assert len(new_attention.actor.loads[0][1].endpoints) == 4
        assert rescaler.under_way == ""
        new_attention.actor.die()  # it is watched over
        await until(lambda: cluster.replaced == [("attention-2", "client of attention-2")])


async def test_fewer_of_both_kinds_the_dispensable_ones_first():
    async with rescaled(ffn_workers=2, ffn_replicas=2) as (cluster, staff, rescaler):
        cluster.ffn[0].down_since = 1.0
        await rescaler.scale(1, 1)
        assert names(rescaler) == [("attention-0", "serving"), ("ffn-1", "serving")]
        assert staff.events == [
            "drain attention-1",
            "remove attention-1",
            "dismiss attention-1",
            "dismiss ffn-0",
        ]
        assert cluster.attention[0].actor.told == [[0]]
        assert set(cluster.supervisor.ffn_list().endpoints) == {1}


async def test_everybody_hears_how_many_they_are_and_so_does_whoever_is_restarted_later():
    async with rescaled() as (cluster, _, rescaler):
        await rescaler.scale(3, 2)
        assert {member.actor.shares[-1] for member in rescaler.members()} == {(3, 4)}
        (new,) = [member for member in rescaler.members() if member.name == "attention-2"]
        assert shares(new.actor.loads[0][0]) == (3, 4)
        cluster.ffn[0].actor.die()
        await until(lambda: cluster.ffn[0].actor.loads and cluster.supervisor.health() == [])
        assert shares(cluster.ffn[0].actor.loads[0][0]) == (3, 4)
        await rescaler.scale(1, 1)
        assert {member.actor.shares[-1] for member in rescaler.members()} == {(1, 2)}


async def test_what_has_failed_is_not_counted_later():
    async with rescaled() as (cluster, staff, rescaler):
        staff.failures = {"attention-2": [StartError("its file is damaged")]}
        with pytest.raises(CannotScaleError):
            await rescaler.scale(3, 1)
        assert shares(cluster.supervisor.config) == (2, 2)
        assert cluster.attention[0].actor.shares == []


async def test_one_number_alone_leaves_the_other():
    async with rescaled() as (_, staff, rescaler):
        await rescaler.scale(None, 1)
        await rescaler.scale(2, None)
        assert (staff.events, names(rescaler)) == ([], SERVING)


async def test_what_cannot_be_placed_changes_nothing_and_is_said():
    async with rescaled() as (_, staff, rescaler):
        staff.problem = "too little GPU"
        with pytest.raises(CannotScaleError, match="nothing has changed: too little GPU"):
            await rescaler.scale(1, 2)
        assert (staff.events, names(rescaler), rescaler.under_way) == ([], SERVING, "")


@pytest.mark.parametrize("failing", ["ffn-3", "attention-2", "attention-3"])
async def test_one_that_cannot_be_loaded_takes_its_companions_along(failing):
    async with rescaled() as (cluster, staff, rescaler):
        staff.failures = {failing: [StartError("its file is damaged")]}
        with pytest.raises(CannotScaleError, match="its file is damaged"):
            await rescaler.scale(4, 2)
        assert names(rescaler) == SERVING
        dismissed = {event for event in staff.events if event.startswith("dismiss")}
        assert dismissed == {f"dismiss {name}" for name in ("ffn-2", "ffn-3", "attention-2", "attention-3")}
        added = [event.split()[-1] for event in staff.events if event.startswith("add")]
        assert {f"remove {name}" for name in added} == {event for event in staff.events if "remove" in event}
        assert set(cluster.supervisor.ffn_list().endpoints) == {0, 1}


async def test_one_change_at_a_time():
    async with rescaled() as (_cluster, _staff, rescaler):
        go = asyncio.Event()

        async def drain(name, timeout_s):
            await go.wait()

        rescaler._router.drain = drain
        first = asyncio.create_task(rescaler.scale(1, None))
        await until(lambda: rescaler.under_way)
        await until(lambda: ("attention-1", "draining") in names(rescaler))
        for change in (rescaler.scale(3, None), rescaler.restart()):
            with pytest.raises(ChangeUnderWayError, match="scaling to 1 attention workers"):
                await change
        go.set()
        await first
        await rescaler.scale(2, None)
        assert names(rescaler) == SERVING


async def test_a_restart_renews_everybody_one_after_the_other():
    async with rescaled() as (cluster, staff, rescaler):
        await rescaler.restart()
        assert [name for name, _ in names(rescaler)] == ["attention-0", "attention-2", "ffn-0", "ffn-1"]
        assert staff.events == [
            "create for 2A 1R", "add client of attention-2",
            "drain attention-0", "remove attention-0", "dismiss attention-0",
            "create for 2A 1R", "add client of attention-0",
            "drain attention-1", "remove attention-1", "dismiss attention-1",
        ]  # fmt: skip
        assert [member.actor.ends for member in cluster.ffn] == [[True], [True]]
        assert [len(member.actor.loads) for member in cluster.ffn] == [1, 1]
        assert [member.restarts.count for member in cluster.ffn] == [0, 0]


async def test_without_room_for_a_successor_attention_workers_are_drained_and_restarted_in_their_place():
    async with rescaled() as (cluster, staff, rescaler):
        staff.problem = "too little CPU"
        await rescaler.restart()
        assert names(rescaler) == SERVING
        assert staff.events == ["drain attention-0", "drain attention-1"]
        assert [name for name, _ in cluster.replaced] == ["attention-0", "attention-1"]
        assert [member.actor.ends for member in cluster.attention] == [[True], [True]]


async def test_an_ffn_worker_with_a_stand_in_is_drained_before_its_restart():
    async with rescaled(ffn_workers=2, ffn_replicas=2) as (_cluster, _, rescaler):
        await rescaler.restart()
        told = next(each for each in rescaler.members() if each.role == "attention").actor.told
        # Each leaves the list before it is restarted, and is back on it after, where it listens then.
        assert told[-4:] == [[0], [1, 0], [1], [1, 1]]


async def test_a_restart_costs_no_restarts_and_says_when_a_worker_does_not_come_back():
    async with rescaled(max_restarts=0) as (cluster, _staff, rescaler):
        await rescaler.restart()
        assert cluster.metric("afd:worker_restarts_total", worker="ffn-0", reason="planned") == 1
        cluster.ffn[0].actor.failures = [OutOfMemoryError("its file is damaged")]
        with pytest.raises(WorkerError, match="its file is damaged"):
            await rescaler.restart()
        assert rescaler.under_way == ""
