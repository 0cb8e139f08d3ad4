"""Workers that have outlived their front-end, as a new front-end finds them in a Ray cluster.

What lives here: the search, and who may be taken over. What does not: whether a Ray cluster of this host survives
(own_ray.py), and the attach itself (ray_cluster.py). Each worker knows its server's settings and secret, so nothing else has
to have survived.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from afd_server.cluster.actors import Description, Server
from afd_server.cluster.attaching import differences, is_same_command, server_settings
from afd_server.cluster.groups import NAMESPACE
from afd_server.config import ServeConfig
from afd_server.errors import StartError

logger = logging.getLogger(__name__)

# How long a worker may take to describe itself. One that is frozen or without a node does not.
DESCRIBE_TIMEOUT_S = 10.0
# A front-end speaks to its workers every second. One that has not done so for this long is gone.
SILENT_S = 5.0
LOOK_EVERY_S = 0.5


@dataclass(slots=True)
class Crew:
    """All workers of one server, by name: the actors, and what those say that answer. Without a worker it is a new server's."""

    server: Server
    actors: dict[str, Any] = field(default_factory=dict)
    descriptions: dict[str, Description] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.server.namespace

    @property
    def ffn_version(self) -> int:
        return max((each.ffn_version for each in self.descriptions.values()), default=0)


def new_crew(config: ServeConfig) -> Crew:
    """Of a server that has no worker yet."""
    namespace = f"{NAMESPACE}-{secrets.token_hex(4)}"
    return Crew(Server(namespace, server_settings(config), secrets.token_bytes(32)))


def find_crew(config: ServeConfig, *, own: bool) -> Crew | None:
    """Those that `config` may take over; None when there are none.

    own: the Ray cluster was this server's alone, and nobody else has a claim to it. Raises StartError when --attach demands
    what is not there.
    """
    contradictions = []
    for actors in _named_actors().values():
        crew = _described(actors)
        if crew is None:
            continue
        unlike = differences(config, crew.server.settings)
        if unlike:
            if crew.server.settings.get("model") == config.model:
                contradictions.append(", ".join(unlike))
            continue
        if own or ((config.attach or is_same_command(config, crew.server.settings)) and _is_orphaned(crew)):
            return crew
    if config.attach:
        if contradictions:
            raise StartError(
                f"--attach: the running workers were started otherwise: {'; or '.join(contradictions)}"
            )
        raise StartError(
            f"--attach: no workers of {config.model} without a front-end are running in the Ray cluster"
        )
    return None


def _named_actors() -> dict[str, dict[str, Any]]:
    """Namespace of a server -> name -> actor."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["namespace"].startswith(NAMESPACE):
            try:
                found[each["namespace"]][each["name"]] = ray.get_actor(
                    each["name"], namespace=each["namespace"]
                )
            except ValueError:
                continue  # it has just ended
    return found


def _described(actors: dict[str, Any]) -> Crew | None:
    answers = {name: actor.describe.remote() for name, actor in actors.items()}
    ready, _ = ray.wait(list(answers.values()), num_returns=len(answers), timeout=DESCRIBE_TIMEOUT_S)
    descriptions: dict[str, Description] = {}
    for name, answer in answers.items():
        try:
            if answer in ready:
                descriptions[name] = ray.get(answer)
        except RayError as error:
            logger.warning("%s cannot be attached to: %s", name, error)
    if not descriptions:
        return None
    return Crew(next(iter(descriptions.values())).server, actors, descriptions)


def _is_orphaned(crew: Crew) -> bool:
    """Whether its front-end is gone. It takes a moment to be sure."""
    silent_s = min(each.silent_s for each in crew.descriptions.values())
    while silent_s < SILENT_S:
        time.sleep(LOOK_EVERY_S)
        again = _described(crew.actors)
        if again is None:
            return False
        before, silent_s = silent_s, min(each.silent_s for each in again.descriptions.values())
        if silent_s <= before:
            return False
    return True
