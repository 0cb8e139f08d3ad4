import json
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

ABOUT_REQUESTS = """
import asyncio, logging
from afd_server.telemetry.logs import about, concerning, configure_logging
configure_logging("attention-12")
log = logging.getLogger("afd_server.x")

async def request(name):
    concerning(name)
    await asyncio.sleep(0)
    await asyncio.create_task(step())
    log.info("late in %s", name)

async def step():
    log.info("in a task of its own")

async def both():
    await asyncio.gather(asyncio.create_task(request("a")), asyncio.create_task(request("b")))
    log.info("nobody's")

asyncio.run(both())
with about("c"):
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("failed")
log.info("nobody's")
"""

FOREIGN = """
import logging, sys, threading, time, warnings
from afd_server.telemetry.logs import Phases, configure_logging
configure_logging("server")
configure_logging("server")
print("on stdout")
print('{"time": "x", "message": "a worker said"}', file=sys.stderr)
sys.stderr.write("in ")
sys.stderr.write("two parts\\n\\n")
warnings.warn("careful")
Phases(time.monotonic() - 1.5).over("resting")
logging.getLogger("uvicorn.error").error("an error of uvicorn")
def fail():
    raise RuntimeError("in a thread")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
raise ValueError("at last")
"""


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def lines(script, **environment):
    result = run(script, **environment)
    assert (result.returncode, result.stdout) == (0, "")
    return result.stderr.splitlines()


def test_one_line_of_time_level_role_and_message():
    (line,) = lines(SCRIPT)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO ffn-0 loaded 5", line)


@pytest.mark.parametrize(("level", "words"), [("debug", ["loaded 5", "detail"]), ("ERROR", [])])
def test_the_level_comes_from_the_environment(level, words):
    assert [line.split(" ffn-0 ")[1] for line in lines(SCRIPT, AFD_LOG_LEVEL=level)] == words


@pytest.mark.parametrize(("variable", "value"), [("AFD_LOG_LEVEL", "loud"), ("AFD_LOG_FORMAT", "xml")])
def test_an_unknown_word_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(ConfigError, match=f"{variable}: '{value}'"):
        configure_logging("x")
    assert logging.getLogger().handlers == handlers


def test_a_line_tells_the_request_that_it_is_about():
    told = [line.split(" attention-12 ")[1] for line in lines(ABOUT_REQUESTS) if " attention-12 " in line]
    assert sorted(told) == sorted(
        ["in a task of its own [a]", "in a task of its own [b]", "late in a [a]", "late in b [b]",
         "nobody's", "failed [c]", "nobody's"]
    )  # fmt: skip


def test_json_tells_the_same_in_fields():
    records = [json.loads(line) for line in lines(ABOUT_REQUESTS, AFD_LOG_FORMAT="json")]
    assert {(each["role"], each["worker"], each["level"]) for each in records} == {
        ("attention", "attention-12", "INFO"), ("attention", "attention-12", "ERROR"),
    }  # fmt: skip
    assert [each["request_id"] for each in records if each["message"] == "nobody's"] == [None, None]
    assert {each["request_id"] for each in records if each["message"].startswith("in a task")} == {"a", "b"}
    (failed,) = [each for each in records if each["level"] == "ERROR"]
    assert failed["request_id"] == "c" and "ZeroDivisionError" in failed["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", failed["time"])


def test_whatever_is_written_with_json_is_json():
    result = run(FOREIGN, AFD_LOG_FORMAT="json")
    assert result.returncode == 1
    (shown,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert (shown["message"], shown["role"], shown["worker"]) == ("on stdout", "server", None)
    records = [json.loads(line) for line in result.stderr.splitlines()]
    messages = [each["message"] for each in records]
    assert messages[:2] == ["a worker said", "in two parts"]  # as it came, not wrapped
    for words in ("careful", "an error of uvicorn", "RuntimeError: in a thread", "ValueError: at last"):
        assert [message for message in messages if words in message], words
    (phase,) = [each for each in records if "phase" in each]
    assert phase["phase"] == "resting" and 1.5 <= phase["seconds"] < 60
