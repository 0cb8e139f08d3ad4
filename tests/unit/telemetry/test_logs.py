import logging
import re
import subprocess
import sys

import pytest

from afd_server.errors import ConfigError
from afd_server.telemetry.logs import configure_logging

SCRIPT = """
import logging
from afd_server.telemetry.logs import configure_logging
configure_logging("first")
configure_logging("ffn-0")
logging.getLogger("afd_server.x").info("loaded %d", 5)
logging.getLogger("afd_server.x").debug("detail")
logging.getLogger("httpx").info("a request")
logging.getLogger("uvicorn.error").info("started")
"""


def run(level):
    environment = {"AFD_LOG_LEVEL": level} if level else {}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_one_line_of_time_level_role_and_message():
    (line,) = run(None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO ffn-0 loaded 5", line)


@pytest.mark.parametrize(("level", "words"), [("debug", ["loaded 5", "detail"]), ("ERROR", [])])
def test_the_level_comes_from_the_environment(level, words):
    assert [line.split(" ffn-0 ")[1] for line in run(level)] == words


def test_an_unknown_level_is_named(monkeypatch):
    monkeypatch.setenv("AFD_LOG_LEVEL", "loud")
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(ConfigError, match="AFD_LOG_LEVEL: 'LOUD'"):
        configure_logging("x")
    assert logging.getLogger().handlers == handlers
