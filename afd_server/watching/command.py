"""The flags of `afd top`, `afd report` and `afd trace`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from afd_server.command_line import Parser
from afd_server.config import API_KEY_VARIABLE


def top(argv: Sequence[str]) -> int:
    parser = _parser(
        "top", "The workers of a running server, once a second: load, KV cache, pace, where a hop's time goes."
    )
    parser.add_argument(
        "--once", action="store_true", help="print one frame, of the time since the server began, and end"
    )
    given = parser.parse_args(list(argv))
    from afd_server.watching.top import top

    return top(given.url, given.api_key, once=given.once)


def report(argv: Sequence[str]) -> int:
    parser = _parser(
        "report", "Which worker, layer or expert of a running server is slow, and how experts are loaded."
    )
    parser.add_argument("--json", action="store_true", help="everything that is known, for programs")
    given = parser.parse_args(list(argv))
    from afd_server.watching.report import report

    return report(given.url, given.api_key, as_json=given.json)


def trace(argv: Sequence[str]) -> int:
    parser = _parser("trace", "Record every hop of every worker of a running server, for ui.perfetto.dev.")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="for how long. Default: %(default)s"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("trace.json"), metavar="FILE",
        help="compressed when it ends in .gz. Default: %(default)s",
    )  # fmt: skip
    given = parser.parse_args(list(argv))
    from afd_server.watching.trace import trace

    return trace(given.url, given.api_key, given.seconds, given.output)


def _parser(command: str, about: str) -> Parser:
    parser = Parser(prog=f"afd {command}", description=about)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server. Default: %(default)s")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY_VARIABLE),
        help=f"the key the server asks for. Default: {API_KEY_VARIABLE} in the environment",
    )
    return parser
