"""Where the workers run: starting or joining a Ray cluster, and one bundle of resources for each worker.

A bundle is one CPU, a share of a GPU where there are any, and the custom resource that --attention-resource or
--ffn-resource names. What cannot be placed within the deadline is said with what is missing; nothing hangs.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from afd_server.cluster.actors import ACTOR_THREADS
from afd_server.cluster.layout import usable_cores
from afd_server.cluster.watch import first_line
from afd_server.config import ServeConfig
from afd_server.errors import ConfigError, StartError
from afd_server.transport.reachable import why_unreachable

# A thread that waits for work must sleep: spinning on a core that the other side needs costs a hundredfold.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}

ADDRESS_TIMEOUT_S = 5.0
# Between two looks whether a start is to be given up.
START_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """An actor, and the bundle that it runs in."""

    actor: Any
    group: PlacementGroup
    bundle: int


@dataclass(frozen=True, slots=True)
class Actors:
    """By worker index."""

    ffn: list[Place]
    attention: list[Place]


def start_ray(config: ServeConfig) -> None:
    """Joins the cluster at --ray-address, or starts one of this host alone. Raises StartError.

    Ray sets a handler of SIGTERM, which ends the process as a failure; the caller's is put back.
    """
    _check_address(config.ray_address)
    handler = signal.getsignal(signal.SIGTERM)
    workers = config.attention_workers + config.ffn_workers
    own = {} if config.ray_address else {
        # One CPU a worker is a matter of placement here, not of speed: more workers than cores must start too.
        "num_cpus": max(workers, usable_cores()),
        "include_dashboard": False,
    }  # fmt: skip
    where = f"--ray-address {config.ray_address}" if config.ray_address else "Ray on this host"
    try:
        ray.init(
            address=config.ray_address or "local",
            logging_level=logging.ERROR,
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, RayError) as error:
        raise StartError(f"{where}: cannot start: {first_line(error)}") from None
    except SystemExit:
        raise SystemExit(0) from None  # Ray's handler, while the start was still going on
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_address(address: str | None) -> None:
    """Raises StartError when nobody listens at HOST:PORT. Ray itself would try for minutes, and not say so."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or for Ray to judge
    problem = why_unreachable(host, int(port), ADDRESS_TIMEOUT_S)
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


def place(config: ServeConfig, ffn: type, attention: type, secret: bytes, deadline: Deadline) -> Actors:
    """Reserves every bundle, then creates the actors in them. Raises StartError that says what is missing."""
    gpus = _gpus_per_worker(config)
    ffn_bundle = _bundle(gpus, config.ffn_resource)
    attention_bundle = _bundle(gpus, config.attention_resource)
    bundles = [ffn_bundle] * config.ffn_workers + [attention_bundle] * config.attention_workers
    if not config.ray_address and _missing(bundles):  # this host alone has all that it will ever have
        raise StartError(_why_not_placed(bundles, deadline))
    group = placement_group(bundles, strategy="PACK")
    while not group.wait(START_POLL_S):
        deadline.check(_why_not_placed(bundles, deadline))
    return Actors(
        [_create(ffn, config, index, secret, group, index, ffn_bundle) for index in range(config.ffn_workers)],
        [_create(attention, config, index, secret, group, config.ffn_workers + index, attention_bundle)
         for index in range(config.attention_workers)],
    )  # fmt: skip


def why_unplaced(place: Place) -> str:
    """What the cluster lacks for an actor whose node was lost; empty when its bundle has a node. Blocks for a moment."""
    table = placement_group_table(place.group)
    if table["state"] == "CREATED" or table["bundles_to_node_id"].get(place.bundle):
        return ""
    needed = table["bundles"][place.bundle]
    free = {name: amount for name, amount in ray.available_resources().items() if name in needed}
    missing = [name for name, amount in needed.items() if amount > free.get(name, 0.0)]
    return f"it needs {_listed(needed)}, free are {_listed(free)}" + (_too_little(missing) if missing else "")


def stop_ray() -> None:
    ray.shutdown()


def _create(
    kind: type,
    config: ServeConfig,
    index: int,
    secret: bytes,
    group: PlacementGroup,
    bundle: int,
    resources: dict[str, float],
) -> Place:
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": ACTOR_THREADS,
        "num_cpus": resources["CPU"],
        "num_gpus": resources.get("GPU", 0),
        "resources": custom,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    }
    return Place(ray.remote(**options)(kind).remote(config, index, secret), group, bundle)


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


def _bundle(gpus: float, resource: str | None) -> dict[str, float]:
    bundle = {"CPU": 1.0}
    if gpus:
        bundle["GPU"] = gpus
    if resource:
        bundle[resource] = 1.0
    return bundle


def _why_not_placed(bundles: list[dict[str, float]], deadline: Deadline) -> str:
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


def _missing(bundles: list[dict[str, float]]) -> list[str]:
    """The resources of which the cluster has less than all bundles together need."""
    offered = _offered()
    return [name for name, amount in _needed(bundles).items() if amount > offered.get(name, 0.0)]


def _needed(bundles: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for bundle in bundles for name in bundle})
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}


def _offered() -> dict[str, float]:
    """What the nodes of the cluster offer in all, without Ray's own names and memory."""
    resources = ray.cluster_resources().items()
    return {name: amount for name, amount in sorted(resources) if ":" not in name and "memory" not in name}


def _listed(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
