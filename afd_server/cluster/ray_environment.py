"""What Ray reads from the environment: addresses, the token, priorities. To be set before ray is imported.

Imports no ray, for that reason. Called by serving.py. What somebody has set already stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from afd_server.errors import StartError
from afd_server.telemetry.logs import FORMAT_VARIABLE, LEVEL_VARIABLE

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray runs workers at niceness 15, so that a driver stays responsive. Here the workers are what everybody waits for.
    "RAY_worker_niceness": "0",
    "RAY_COLOR_PREFIX": "0",  # worker lines in a log file, too, without terminal codes
    # Ray would fold lines of several workers into one that differ in numbers only: in the request that they are about, say.
    "RAY_DEDUP_LOGS": "0",
    # Workers see every GPU of their node even when they ask for none, as with CUDA itself.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # How soon a call fails whose actor has died: Ray waits this long for news of the death, and looks this often. Its own
    # values, a second each, make two of them.
    "RAY_timeout_ms_task_wait_for_death_info": "100",
    "RAY_core_worker_internal_heartbeat_ms": "100",
}

# A cluster of this host alone listens on 127.0.0.1 alone and demands a token. The first name is Ray's switch for hosts
# whose addresses are not to be used, whatever their system; without it every process of Ray listens on all of them.
OWN_CLUSTER_SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    # Ray would start idle processes before it calls itself started, and wait for a minute for those that do not come up.
    "RAY_prestart_worker_first_driver": "0",
    # Ray's records of calls and its own metrics: nobody reads them here, and they grow with every heartbeat.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
}


def prepare_environment(*, own_cluster: bool, log_level: str = "info", log_format: str = "text") -> None:
    """Sets what this process and those that it starts need, for a cluster of its own or for another's.

    Raises StartError when a token is needed and cannot be kept.
    """
    for name, value in {**SETTINGS, **(OWN_CLUSTER_SETTINGS if own_cluster else {})}.items():
        os.environ.setdefault(name, value)
    os.environ[LEVEL_VARIABLE], os.environ[FORMAT_VARIABLE] = log_level, log_format  # for the keeper
    if log_format == "json":  # Ray puts the worker's name before each line: the line has it
        os.environ["RAY_DISABLE_WORKER_LOG_PREFIX"] = "1"
    named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if own_cluster and os.environ["RAY_AUTH_MODE"] == "token" and not named:
        make_token(Path.home() / ".ray" / "auth_token")


def make_token(file: Path) -> None:
    """Writes a new token, readable by this user alone, unless there is one. Raises StartError.

    At Ray's own default path Ray would make one too, and let every user of the host read it.
    """
    if file.exists():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as whole:  # mode 600
            whole.write(secrets.token_hex(32))
            whole.flush()
            with contextlib.suppress(FileExistsError):  # another server was faster: both use its token
                os.link(whole.name, file)
    except OSError as error:
        raise StartError(
            f"the token of the Ray cluster cannot be kept: {error} (name a file by RAY_AUTH_TOKEN_PATH)"
        ) from None
