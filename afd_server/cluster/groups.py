"""Placement groups: the bundle of resources that a worker runs in, one for each, named after the server and the worker.

For Ray a group and the actor in it are two things, made one after the other, and a front-end may be killed between them. A
group outlives it (Ray calls that detached), and without an actor nobody would ever give it back. By its name it is found:
by the next server that starts on this Ray cluster, and by the other workers of its own when they end as orphans. The other way
round, an actor whose group was given back is gone and keeps its name, since Ray would start it again, until it is ended, too.
"""

from __future__ import annotations

import contextlib
import logging
import time

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

logger = logging.getLogger(__name__)

# Of the servers' namespaces in Ray, and so of their groups.
NAMESPACE = "afd-server"
# How long a group has to be without an actor before it counts as abandoned. A front-end that lives makes the actor at once.
ABANDONED_AFTER_S = 3.0


def make_group(namespace: str, worker: str, bundle: dict[str, float]) -> PlacementGroup:
    """To be filled at once."""
    return placement_group([bundle], strategy="PACK", name=f"{namespace}/{worker}", lifetime="detached")


def remove_groups(namespace: str, worker: str) -> None:
    """Gives back whatever was reserved for a worker; an actor there ends."""
    for group, name in _groups(f"{namespace}/{worker}").items():
        if name == f"{namespace}/{worker}":
            remove_placement_group(_handle(group))


def remove_abandoned_groups(namespace: str = NAMESPACE) -> None:
    """Gives back the groups without an actor in all namespaces that begin so. Takes a moment when there are any, to be sure."""
    found = _without_actor(namespace)
    if found:
        time.sleep(ABANDONED_AFTER_S)
        found = {group: name for group, name in _without_actor(namespace).items() if group in found}
    for group, name in found.items():
        logger.warning("%s was reserved by a front-end that is gone, and is given back", name)
        remove_placement_group(_handle(group))


def end_actors_without_group() -> None:
    """Ends what is left of workers that have given back their places."""
    actors = [
        each
        for each in ray.util.list_named_actors(all_namespaces=True)
        if each["namespace"].startswith(NAMESPACE)
    ]
    groups = set(_groups(NAMESPACE).values())  # last: an actor comes after its group
    for each in actors:
        if f"{each['namespace']}/{each['name']}" not in groups:
            with contextlib.suppress(ValueError):  # it has just ended
                ray.kill(ray.get_actor(each["name"], namespace=each["namespace"]))


def _without_actor(prefix: str) -> dict[str, str]:
    groups = _groups(prefix)  # first: an actor comes after its group
    actors = {f"{each['namespace']}/{each['name']}" for each in ray.util.list_named_actors(all_namespaces=True)}
    return {group: name for group, name in groups.items() if name not in actors}


def _groups(prefix: str) -> dict[str, str]:
    """Id -> name."""
    return {
        group: about["name"]
        for group, about in placement_group_table().items()
        if about["name"].startswith(prefix) and about["state"] != "REMOVED"
    }


def _handle(group: str) -> PlacementGroup:
    return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group)))
