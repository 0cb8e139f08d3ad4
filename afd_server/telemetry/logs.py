"""One form for every log line of every process: time, level, role, message.

Called once at the start of each process. The level is AFD_LOG_LEVEL (default INFO). Nothing else is configured here.
"""

from __future__ import annotations

import logging
import os
import sys

from afd_server.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# Libraries that would tell of each request, or of their own start and end, at INFO.
QUIET = ("httpx", "httpcore", "uvicorn.error", "asyncio", "filelock")


def configure_logging(role: str) -> None:
    """Sends every record to stderr as `time LEVEL role message`. Calling it again only changes the role.

    Raises ConfigError when AFD_LOG_LEVEL is not a level.
    """
    level = os.environ.get("AFD_LOG_LEVEL", "INFO").upper()
    if level not in LEVELS:
        raise ConfigError("AFD_LOG_LEVEL", f"{level!r} is not one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(role)s %(message)s", "%Y-%m-%d %H:%M:%S",
                          defaults={"role": role})
    )  # fmt: skip
    handler.set_name("afd")
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == "afd"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))
