"""Where the workers run: joining a Ray cluster, and one bundle of resources for each worker.

A bundle is one CPU, a share of a GPU where there are any, and the custom resource that --attention-resource or
--ffn-resource names. What cannot be placed within the deadline is said with what is missing; nothing hangs. Workers and
their bundles outlive the front-end; each has a placement group of its own (groups.py), so that any of them can be given back
alone.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from afd_server.cluster.actors import ACTOR_THREADS
from afd_server.cluster.groups import make_group
from afd_server.cluster.own_ray import WORKER_ENVIRONMENT
from afd_server.cluster.watch import Role, first_line
from afd_server.config import ServeConfig
from afd_server.errors import ConfigError, StartError
from afd_server.transport.reachable import why_no_grpc

ADDRESS_TIMEOUT_S = 5.0
# Between two looks whether a start is to be given up.
START_POLL_S = 0.5


# Of a CPU, on a host of the server's own: there, how many workers share the cores is its caller's choice. In a cluster of
# others a worker is one CPU.
OWN_CPU_SHARE = 0.001


@dataclass(frozen=True, slots=True)
class Place:
    """An actor, and the group of one bundle that it runs in."""

    actor: Any
    group: PlacementGroup


def join_ray(address: str, *, own: bool) -> None:
    """Joins the cluster at the address; own: it is this server's alone. Raises StartError.

    Ray sets a handler of SIGTERM, which ends the process as a failure; the caller's is put back.
    """
    if not own:
        _check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    where = "Ray on this host" if own else f"--ray-address {address}"
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            # Processes of an own cluster have it from their keeper.
            runtime_env=None if own else {"env_vars": WORKER_ENVIRONMENT},
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, RayError) as error:
        raise StartError(f"{where}: cannot start: {first_line(error)}") from None
    except SystemExit:
        raise SystemExit(0) from None  # Ray's handler, while the start was still going on
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_address(address: str | None) -> None:
    """Raises StartError when no Ray listens at HOST:PORT. Ray itself would try for minutes, and not say so."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or for Ray to judge
    tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    problem = why_no_grpc(host, int(port), ADDRESS_TIMEOUT_S, tls=tls)
    if problem:
        raise StartError(f"--ray-address {address}: {problem} (is a Ray head running there? ray start --head)")


class Deadline:
    """The end of a start, by time or because nobody waits for it any more."""

    def __init__(self, timeout_s: float, cancelled: threading.Event) -> None:
        self.timeout_s = timeout_s
        self._started_at = time.monotonic()
        self._cancelled = cancelled

    def check(self, problem: str) -> None:
        """Raises StartError(problem) once the time is over."""
        if self._cancelled.is_set():
            raise StartError("the start was cancelled")
        if time.monotonic() - self._started_at >= self.timeout_s:
            raise StartError(problem)


def bundle_of(config: ServeConfig, role: Role) -> dict[str, float]:
    """What a worker of a role takes. Raises ConfigError."""
    resource = config.ffn_resource if role == "ffn" else config.attention_resource
    bundle = {"CPU": 1.0 if config.ray_address else OWN_CPU_SHARE}
    gpus = _gpus_per_worker(config)
    if gpus:
        bundle["GPU"] = gpus
    if resource:
        bundle[resource] = 1.0
    return bundle


def wait_for_room(bundles: Sequence[dict[str, float]], *, own: bool, deadline: Deadline) -> None:
    """Returns when all bundles together would find a place. Raises StartError that says what is missing."""
    if own and _missing(bundles):  # this host alone has all that it will ever have
        raise StartError(_why_not_placed(bundles, deadline))
    while problem := _not_free(bundles):
        deadline.check(_why_not_placed(bundles, deadline) if _missing(bundles) else problem)
        time.sleep(START_POLL_S)


def create(
    kind: type, namespace: str, name: str, bundle: dict[str, float], deadline: Deadline, *arguments: Any
) -> Place:
    """Reserves a bundle and creates an actor in it. Its process starts as soon as the bundle has a node. Raises StartError
    when an actor has the name, and keeps it."""
    group = make_group(namespace, name, bundle)
    options: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": ACTOR_THREADS,
        "num_cpus": bundle["CPU"],
        "num_gpus": bundle.get("GPU", 0),
        "resources": {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
    }
    try:
        while True:
            try:
                return Place(ray.remote(**options)(kind).remote(*arguments), group)
            except ValueError:  # its predecessor has the name still
                deadline.check(f"{name}: the name is not free within {deadline.timeout_s:g} s")
                time.sleep(START_POLL_S)
    except BaseException:
        remove_placement_group(group)
        raise


def wait_until_placed(places: Sequence[Place], deadline: Deadline) -> None:
    """Raises StartError that says what is missing."""
    bundles = [place.group.bundle_specs[0] for place in places]
    for place in places:
        while not place.group.wait(START_POLL_S):
            deadline.check(_why_not_placed(bundles, deadline))


def give_back(place: Place) -> None:
    """Ends the process for good and frees its bundle."""
    ray.kill(place.actor)
    remove_placement_group(place.group)


def was_given_back(place: Place) -> bool:
    """Whether its bundle is gone, and its actor for good: a worker to which no front-end has spoken for long does that."""
    return bool(placement_group_table(place.group)["state"] == "REMOVED")


def why_unplaced(place: Place) -> str:
    """What the cluster lacks for an actor whose node was lost; empty when its bundle has a node. Blocks for a moment."""
    table = placement_group_table(place.group)
    if table["state"] == "CREATED" or table["bundles_to_node_id"].get(0):
        return ""
    needed = table["bundles"][0]
    free = {name: amount for name, amount in ray.available_resources().items() if name in needed}
    missing = [name for name, amount in needed.items() if amount > free.get(name, 0.0)]
    return f"it needs {_listed(needed)}, free are {_listed(free)}" + (_too_little(missing) if missing else "")


def stop_ray() -> None:
    ray.shutdown()


def _gpus_per_worker(config: ServeConfig) -> float:
    """An equal share of the cluster's GPUs, at most one each. Raises ConfigError if they are asked for and missing."""
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if config.device == "cuda" and not gpus:
        raise ConfigError("--device", "the Ray cluster has no GPU", "use --device cpu")
    if config.device == "cpu" or not gpus:
        return 0.0
    workers = config.attention_workers + config.ffn_workers
    # As many to a GPU as the fullest one must take: a share that does not divide a GPU would leave the rest of it idle.
    workers_per_gpu = math.ceil(workers / gpus)
    return 1.0 if workers_per_gpu <= 1 else math.floor(1e4 / workers_per_gpu) / 1e4


def _why_not_placed(bundles: Sequence[dict[str, float]], deadline: Deadline) -> str:
    missing = _missing(bundles)
    if not missing:
        return (
            f"the workers are not placed after {deadline.timeout_s:g} s, although the cluster has {_listed(_offered())} "
            "(others may hold it, or a node may be too small for a worker; or raise --placement-timeout)"
        )
    needs = f"the workers need {_listed(_needed(bundles))}, the cluster has {_listed(_offered())}"
    return needs + _too_little(missing)


def _too_little(missing: list[str]) -> str:
    remedies = dict.fromkeys(
        _REMEDIES.get(name, "start a node that offers it, see --attention-resource and --ffn-resource")
        for name in missing
    )
    return f": too little {', '.join(missing)} ({'; '.join(remedies)})"


_REMEDIES = {
    "CPU": "add nodes, or lower --attention-workers or --ffn-workers",
    "GPU": "add nodes, lower --attention-workers or --ffn-workers, or use --device cpu",
}


def _missing(bundles: Sequence[dict[str, float]]) -> list[str]:
    """The resources of which the cluster has less than all bundles together need."""
    offered = _offered()
    return [name for name, amount in _needed(bundles).items() if amount > offered.get(name, 0.0)]


def _not_free(bundles: Sequence[dict[str, float]]) -> str:
    """What the cluster has too little of at this moment for all bundles; empty when nothing is missing."""
    needed, available = _needed(bundles), ray.available_resources()
    free = {name: available.get(name, 0.0) for name in needed}
    missing = [name for name, amount in needed.items() if amount > free[name]]
    return (
        f"the workers need {_listed(needed)}, free are {_listed(free)}{_too_little(missing)}" if missing else ""
    )


def _needed(bundles: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for bundle in bundles for name in bundle})
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}


def _offered() -> dict[str, float]:
    """What the nodes of the cluster offer in all, without Ray's own names and memory."""
    resources = ray.cluster_resources().items()
    return {
        name: amount
        for name, amount in sorted(resources)
        if ":" not in name and "memory" not in name and "_group_" not in name
    }


def _listed(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
