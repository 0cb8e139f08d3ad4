"""Whether workers that are running already are those that a command asks for. Pure data; imports no ray.

The workers' half of the settings must be equal, as they were given: a server that has been scaled since is still found by
the command that started it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from afd_server.config import ServeConfig, flag

# What only the front-end needs: it may be another one after an attach.
OF_THE_FRONT_END = frozenset(
    {"served_model_name", "trust_remote_code", "seed", "attach", "start_timeout", "drain_timeout"}
)
# Rooms whose settings are the front-end's, or of which workers that run already keep what they had.
FRONT_END_ROOMS = ("api", "telemetry")
# Besides the workers' settings, what makes it the same command.
OF_THE_COMMAND = ("host", "port")
SECRET = "api_key"


def server_settings(config: ServeConfig) -> dict[str, Any]:
    """What is kept of a server's configuration, as plain data without secrets."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != SECRET}


def differences(config: ServeConfig, settings: Mapping[str, Any]) -> list[str]:
    """The flags by which `config` asks for other workers than those of `settings`, with both values."""
    return [
        f"{flag(setting.name)} {settings.get(setting.name)}, not {getattr(config, setting.name)}"
        for setting in dataclasses.fields(config)
        if setting.metadata["room"] not in FRONT_END_ROOMS and setting.name not in OF_THE_FRONT_END
        if settings.get(setting.name) != getattr(config, setting.name)
    ]


def is_same_command(config: ServeConfig, settings: Mapping[str, Any]) -> bool:
    """Whether the address is the same too."""
    return all(settings.get(name) == getattr(config, name) for name in OF_THE_COMMAND)
