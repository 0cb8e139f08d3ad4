"""One form for every log line of every process: time, level, role, message, and the request that it is about.

What lives here: the two forms, text and JSON, and how a line learns of its request. What does not: which lines there are.
`configure_logging` is called once at the start of each process, with --log-level and --log-format.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from afd_server.config import LOG_FORMATS, LOG_LEVELS
from afd_server.errors import ConfigError

LEVEL_VARIABLE, FORMAT_VARIABLE = "AFD_LOG_LEVEL", "AFD_LOG_FORMAT"
# Libraries that would tell of each request, or of their own start and end, at INFO.
QUIET = ("httpx", "httpcore", "uvicorn.error", "asyncio", "filelock")
# What a record may carry besides, by `extra`, and JSON shows.
FIELDS = ("phase", "seconds", "url")

_request_id: ContextVar[str] = ContextVar("request_id", default="")

logger = logging.getLogger(__name__)


def configure_logging(role: str, level: str | None = None, form: str | None = None) -> None:
    """Sends every record to stderr; role: server, keeper, or the name of a worker. Calling it again replaces the last call.

    level, form: default from AFD_LOG_LEVEL and AFD_LOG_FORMAT, else info and text. With json, whatever else this process
    writes by Python to stdout or stderr becomes such a line, too. Raises ConfigError for what is not one of them.
    """
    level = _one_of(LOG_LEVELS, LEVEL_VARIABLE, level, "info").upper()
    form = _one_of(LOG_FORMATS, FORMAT_VARIABLE, form, "text")
    formatter = JsonFormatter(role) if form == "json" else TextFormatter(role)
    if form == "json":
        sys.stdout, sys.stderr = (JsonLines(_bare(stream), formatter) for stream in (sys.stdout, sys.stderr))
    handler = logging.StreamHandler(_bare(sys.stderr))
    handler.setFormatter(formatter)
    handler.addFilter(name_request)
    handler.set_name("afd")
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == "afd"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))


def _one_of(choices: tuple[str, ...], variable: str, given: str | None, default: str) -> str:
    chosen = (given or os.environ.get(variable, default)).lower()
    if chosen not in choices:
        raise ConfigError(variable, f"{chosen!r} is not one of {', '.join(choices)}")
    return chosen


# --- which request a line is about ---------------------------------------------------------------------------------


def concerning(request_id: str) -> None:
    """What this task logs from now on is about this request."""
    _request_id.set(request_id)


@contextmanager
def about(request_id: str) -> Iterator[None]:
    """What is logged within is about this request."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def name_request(record: logging.LogRecord) -> bool:
    """A filter that lets everything pass."""
    record.request_id = _request_id.get()
    return True


# --- phases of a start ---------------------------------------------------------------------------------------------


class Phases:
    """A line for each phase of a start, when it is over."""

    def __init__(self, began_s: float | None = None) -> None:
        """began_s: when the first one began, monotonic; default: now."""
        self._began = time.monotonic() if began_s is None else began_s

    def over(self, phase: str) -> None:
        """It went from the end of the one before, or from construction, until now."""
        now = time.monotonic()
        seconds, self._began = now - self._began, now
        extra = {"phase": phase, "seconds": round(seconds, 3)}
        logger.info("start: %s took %.1f s", phase, seconds, extra=extra)


# --- the two forms -------------------------------------------------------------------------------------------------


class TextFormatter(logging.Formatter):
    """`time LEVEL role message [request]`."""

    def __init__(self, role: str) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03d %(levelname)s %(role)s %(message)s", "%Y-%m-%d %H:%M:%S",
            defaults={"role": role},
        )  # fmt: skip

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record).rstrip()  # uvicorn ends some with a line end
        request_id = getattr(record, "request_id", "")
        return f"{line} [{request_id}]" if request_id else line


class JsonFormatter(logging.Formatter):
    """An object on one line. Of the role attention-0 the worker is attention-0 and the role attention."""

    def __init__(self, role: str) -> None:
        super().__init__()
        kind, _, index = role.rpartition("-")
        is_worker = index.isdigit()
        self._who = {
            "role": kind if is_worker else role,
            "worker": role if is_worker else None,
            "pid": os.getpid(),
        }

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        request_id = getattr(record, "request_id", "") or None
        return self.line(record.created, record.levelname, record.getMessage(), request_id, record.name, fields)

    def line(
        self, at_s: float, level: str, message: str, request_id: str | None, source: str, fields: dict[str, Any]
    ) -> str:
        when = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = {"time": when, "level": level, **self._who, "request_id": request_id, "message": message}
        return json.dumps({**head, "logger": source, **fields}, default=str)


class JsonLines(io.TextIOBase):
    """A stream on which every line is a JSON object: those that are none already, of a library or a worker's own output, say, are
    made the message of one. `inner`: where they go."""

    def __init__(self, inner: TextIO, formatter: logging.Formatter) -> None:
        assert isinstance(formatter, JsonFormatter)
        self.inner = inner
        self._formatter = formatter
        self._begun = ""  # a line without an end
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                if line.strip():
                    self.inner.write((line if _is_object(line) else self._wrapped(line)) + "\n")
        return len(text)

    def flush(self) -> None:
        self.inner.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.inner.fileno()

    def _wrapped(self, line: str) -> str:
        return self._formatter.line(time.time(), "INFO", line, None, "output", {})


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _bare(stream: Any) -> TextIO:
    """The stream itself, when it has been made one of JSON lines."""
    return stream.inner if isinstance(stream, JsonLines) else stream
