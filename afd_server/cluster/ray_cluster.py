"""A server's workers as Ray actors: started or found again, connected and stopped.

What lives here: the course of a start, of an attach and of an end. What does not: what a worker is (workers.py), the actor
around it (actors.py), where Ray puts it (placement.py), which workers outlived their front-end (survivors.py), how one is
brought back when it dies (supervisor.py), or which replica serves a request (router/). Runs in the process of the front-end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Sequence

import ray
from ray.exceptions import GetTimeoutError, RayError

from afd_server.cluster.actors import AttentionActor, FFNActor
from afd_server.cluster.groups import end_actors_without_group, remove_abandoned_groups, remove_groups
from afd_server.cluster.layout import with_workers
from afd_server.cluster.loading import load_all, wait_for_processes
from afd_server.cluster.names import worker_name
from afd_server.cluster.own_ray import OwnRay
from afd_server.cluster.placement import (
    Deadline,
    Place,
    bundle_of,
    create,
    give_back,
    join_ray,
    stop_ray,
    wait_for_room,
    wait_until_placed,
    was_given_back,
    why_unplaced,
)
from afd_server.cluster.recording import Recording, all_totals
from afd_server.cluster.rescale import Rescaler
from afd_server.cluster.restarts import Restarts
from afd_server.cluster.supervisor import Supervisor
from afd_server.cluster.survivors import find_crew, new_crew
from afd_server.cluster.watch import Member, Role, first_line
from afd_server.cluster.workers import Started
from afd_server.config import ServeConfig
from afd_server.errors import RayLostError, StartError, UnavailableError
from afd_server.router.router import Router
from afd_server.telemetry.logs import Phases
from afd_server.telemetry.worker_metrics import WorkerMetrics
from afd_server.transport.control import ControlClient
from afd_server.types import WorkerState, WorkerTotals, WorkerTrace

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 10.0
# Between two looks whether an own Ray cluster is there.
LOOK_EVERY_S = 0.5
LOST = "Ray on this host has ended, and every worker with it: its keeper was killed, or one of Ray's processes died (start the server again)"

KINDS: dict[Role, type] = {"ffn": FFNActor, "attention": AttentionActor}


class RayCluster:
    """The actors of one server. `config` is a resolved one. own_ray: the cluster, unless --ray-address names another's."""

    def __init__(self, config: ServeConfig, own_ray: OwnRay | None) -> None:
        """Joins the Ray cluster, and finds what is there already. Raises StartError.

        To be called on the main thread, before the server sets its own signal handlers: Ray sets some, and the last
        one to do so wins.
        """
        # The key is the front-end's alone; workers are handed the rest.
        self._config = config = dataclasses.replace(config, api_key=None)
        self._own_ray = own_ray
        self._places: dict[str, Place] = {}  # by worker
        self._phases = Phases()
        try:
            address = own_ray.address() if own_ray is not None else str(config.ray_address)
            join_ray(address, own=own_ray is not None)
            self._phases.over("starting Ray" if own_ray is not None else "joining Ray")
            inhabited = own_ray is None or own_ray.attached
            if inhabited:
                end_actors_without_group()
                remove_abandoned_groups()
            search = inhabited and config.attach is not False
            found = find_crew(config, own=own_ray is not None) if search else None
        except BaseException:
            self._leave_ray()
            raise
        self._crew = found or new_crew(config)
        self._supervisor = Supervisor(config, self, self._crew.ffn_version)
        self._recording = Recording()
        self._rescaler: Rescaler | None = None  # as soon as the workers are ready

    def start(self, cancelled: threading.Event) -> Started:
        """Places and loads every worker that is not there, FFN first. Raises StartError with the first cause, within
        start_timeout.

        May run on a thread of its own; it gives up soon after `cancelled` is set.
        """
        loaded = {
            name: each.loaded for name, each in self._crew.descriptions.items() if each.loaded is not None
        }
        attached = len(loaded)
        wanted = self._wanted()
        self._take_over()
        missing = [each for each in wanted if worker_name(*each) not in self._places]
        config = self._supervisor.config = self._with_numbers(wanted)
        for member in self.create(missing, config, Deadline(config.placement_timeout, cancelled)):
            self._supervisor.add(member)
        wait_for_processes(self._supervisor.all_members(), cancelled)
        self._phases.over(f"placing {len(missing)} workers and starting their processes")
        deadline = Deadline(config.start_timeout, cancelled)
        for role in KINDS:
            arguments = () if role == "ffn" else (self._supervisor.ffn_list(),)
            empty = [member for member in self._supervisor.members(role) if member.name not in loaded]
            everyone = self._supervisor.all_members()
            answers = load_all(empty, deadline, config, *arguments, everyone=everyone)
            loaded |= {member.name: answer for member, answer in zip(empty, answers, strict=True)}
            for member in self._supervisor.members(role):
                endpoint, info, _ = loaded[member.name]
                member.serves_at(endpoint, info)
            self._phases.over(f"loading {len(empty)} {role} workers")
        infos = {
            role: tuple(loaded[member.name][1] for member in self._supervisor.members(role)) for role in KINDS
        }
        return Started(
            attention=infos["attention"],
            ffn=infos["ffn"],
            transports=tuple(sorted({name for _, _, names in loaded.values() for name in names})),
            attached=attached,
        )

    def _wanted(self) -> list[tuple[Role, int]]:
        """The workers that there shall be: those that there were, FFN replicas made whole, or else as configured."""
        ep, tp = self._config.ffn_shards
        shards, found = ep * tp, [_parsed(name) for name in self._crew.actors]
        replicas = {index // shards for role, index in found if role == "ffn"}
        attention = {index for role, index in found if role == "attention"}
        return [
            *(("ffn", replica * shards + shard)
              for replica in sorted(replicas or range(self._config.ffn_replicas)) for shard in range(shards)),
            *(("attention", index) for index in sorted(attention or range(self._config.attention_workers))),
        ]  # fmt: skip

    def _with_numbers(self, workers: Sequence[tuple[Role, int]]) -> ServeConfig:
        """The configuration with the numbers of these workers: a server that is attached to may have been scaled."""
        ep, tp = self._config.ffn_shards
        num_attention = sum(role == "attention" for role, _ in workers)
        return with_workers(self._config, num_attention, (len(workers) - num_attention) // (ep * tp))

    def _take_over(self) -> None:
        """The workers that have described themselves become this server's. The others are ended, to be made again."""
        for name, actor in self._crew.actors.items():
            known = self._crew.descriptions.get(name)
            if known is not None:
                self._supervisor.add(self._member(name, Place(actor, known.group)))
            else:
                logger.warning("%s does not answer and is made again", name)
                ray.kill(actor)
                remove_groups(self._crew.namespace, name)

    def create(
        self, workers: Sequence[tuple[Role, int]], config: ServeConfig, deadline: Deadline
    ) -> list[Member]:
        """Places workers and starts their processes, all or none; they are not loaded yet. Raises StartError. May block.

        config: with the numbers of workers that there will be.
        """
        bundles = [bundle_of(self._config, role) for role, _ in workers]
        wait_for_room(bundles, own=self._own_ray is not None, deadline=deadline)
        places: dict[str, Place] = {}
        try:
            for role, index in workers:
                places[worker_name(role, index)] = self._create(role, index, config, deadline)
            wait_until_placed(list(places.values()), deadline)
        except BaseException:
            for place in places.values():
                give_back(place)
            raise
        return [self._member(name, place) for name, place in places.items()]

    def _create(self, role: Role, index: int, config: ServeConfig, deadline: Deadline) -> Place:
        bundle, name = bundle_of(self._config, role), worker_name(role, index)
        return create(
            KINDS[role], self._crew.namespace, name, bundle, deadline, config, index, self._crew.server
        )

    def dismiss(self, member: Member) -> None:
        """Ends a worker that is no member any more, after the step or batch under way, and gives its place back. May block."""
        try:
            ray.get(member.actor.stop.remote(), timeout=STOP_TIMEOUT_S)
        except (RayError, GetTimeoutError) as error:
            logger.info("%s did not stop by itself: %s", member.name, first_line(error))
        give_back(self._places.pop(member.name))

    def _member(self, name: str, place: Place) -> Member:
        role, index = _parsed(name)
        life = place.actor.sentinel.remote()
        self._places[name] = place
        return Member(role, index, name, place.actor, life, Restarts(self._config.max_restarts))

    async def connect(self) -> list[ControlClient]:
        """A client to each attention replica, for the router."""
        return [await self.connect_to(member) for member in self._supervisor.members("attention")]

    async def connect_to(self, member: Member) -> ControlClient:
        """See supervisor.Processes."""
        assert member.endpoint is not None
        return await ControlClient.connect(member.endpoint, self._crew.server.secret, CONNECT_TIMEOUT_S)

    def end(self, member: Member, *, restart: bool) -> None:
        """See supervisor.Processes. Ray takes 5 s to end a process that is stopped; on this host it can be done at once."""
        pulse = member.pulse
        if restart and pulse is not None and pulse.node == _node():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pulse.pid, signal.SIGKILL)
        else:
            ray.kill(member.actor, no_restart=not restart)

    def why_unplaced(self, member: Member) -> str:
        """See supervisor.Processes."""
        if was_given_back(self._places[member.name]):
            logger.warning("%s had ended as an orphan and is made again", member.name)
            deadline = Deadline(self._config.placement_timeout, threading.Event())
            ray.kill(member.actor)  # its name is kept for it
            try:
                place = self._create(member.role, member.index, self._supervisor.config, deadline)
            except StartError as error:
                return str(error)
            self._places[member.name], member.actor = place, place.actor
        return why_unplaced(self._places[member.name])

    async def supervise(self, router: Router, metrics: WorkerMetrics) -> None:
        """Watches over every actor until cancelled, and brings back those that die. Raises RayLostError."""
        if self._crew.descriptions:
            await self._supervisor.tell_ffn()  # it may have changed while nobody could be told
        self._rescaler = Rescaler(self._config, self, self._supervisor, router)
        tasks = [
            asyncio.create_task(self._supervisor.run(router, metrics)),
            asyncio.create_task(self._ray_is_lost()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ray_is_lost(self) -> None:
        """Raises RayLostError as soon as there is no Ray any more. In a cluster of others that is for them to notice."""
        while self._own_ray is None or self._own_ray.is_running():
            await asyncio.sleep(LOOK_EVERY_S)
        raise RayLostError(LOST)

    # --- what operators ask ----------------------------------------------------------------------------------------

    def worker_states(self) -> list[WorkerState]:
        """Every worker, those that come and go included."""
        members = self._rescaler.members() if self._rescaler is not None else self._supervisor.all_members()
        return [member.state() for member in members]

    def change_under_way(self) -> str:
        return self._rescaler.under_way if self._rescaler is not None else ""

    async def scale(self, attention_workers: int | None, ffn_replicas: int | None) -> None:
        """See Rescaler."""
        await self._opened().scale(attention_workers, ffn_replicas)

    async def restart(self) -> None:
        """See Rescaler."""
        await self._opened().restart()

    async def trace(self, seconds: float) -> list[WorkerTrace]:
        """See OperatedWorkers.trace."""
        return await self._recording.run([member.recorded() for member in self._serving()], seconds)

    async def totals(self) -> list[WorkerTotals]:
        """See OperatedWorkers.totals."""
        return await all_totals({member.name: member.actor.totals.remote() for member in self._serving()})

    def _serving(self) -> list[Member]:
        return [member for member in self._supervisor.all_members() if member.down_since is None]

    def _opened(self) -> Rescaler:
        if self._rescaler is None:
            raise UnavailableError("the workers are still starting")
        return self._rescaler

    def health(self) -> list[str]:
        return self._supervisor.health()

    def is_serving(self) -> bool:
        return self._supervisor.is_serving()

    def refusal(self) -> str:
        return self._supervisor.refusal()

    def stop(self) -> None:
        """Asks every worker to end its work, then ends the processes. Harmless when nothing was started.

        One that has never answered is not asked: it would be waited for.
        """
        if self._own_ray is not None and not self._own_ray.is_running():  # nobody is left to be asked
            self._own_ray.end()
            return
        try:
            present = [member for member in self._supervisor.all_members() if member.pulse is not None]
            ray.get([member.actor.stop.remote() for member in present], timeout=STOP_TIMEOUT_S)
        except GetTimeoutError as error:
            logger.warning("a worker did not stop by itself: %s", first_line(error))
        except RayError as error:
            logger.info("a worker had ended already: %s", first_line(error))
        for place in self._places.values():
            give_back(place)
        self._leave_ray()

    def _leave_ray(self) -> None:
        stop_ray()
        if self._own_ray is not None:
            self._own_ray.end()


def _parsed(name: str) -> tuple[Role, int]:
    role, _, index = name.rpartition("-")
    return "ffn" if role == "ffn" else "attention", int(index)


def _node() -> str:
    return ray.get_runtime_context().get_node_id()
