"""`afd key new`: makes an API key for the file of `afd serve --api-key-file`.

What lives here: the command. What does not: what a key is (keys.py). The key itself is printed once and kept nowhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from afd_server.api.keys import new_key, read_file
from afd_server.command_line import Parser
from afd_server.errors import ConfigError


def key_command(argv: Sequence[str]) -> int:
    """Gives the exit code. Raises ConfigError."""
    actions = Parser(prog="afd key", description="API keys for afd serve --api-key-file.")
    actions.add_argument("action", choices=["new"], help="new: make one")
    actions.parse_args(list(argv[:1]))
    parser = Parser(prog="afd key new", description="Print a new API key, once. A server knows its hash only.")
    parser.add_argument("name", metavar="NAME", help="what logs and metrics call it")
    parser.add_argument("--operator", action="store_true", help="it opens /admin too")
    parser.add_argument("--requests-per-minute", type=int, metavar="N", help="default: no limit")
    parser.add_argument(
        "--tokens-per-minute", type=int, metavar="N", help="of prompts and outputs. Default: no limit"
    )
    parser.add_argument(
        "--file", type=Path, help="where to add it; default: its line for such a file is printed below the key"
    )
    given = parser.parse_args(list(argv[1:]))
    try:
        key, kept = new_key(
            given.name,
            is_operator=given.operator,
            requests_per_minute=given.requests_per_minute,
            tokens_per_minute=given.tokens_per_minute,
        )
    except ValueError as error:
        raise ConfigError(f"key {given.name!r}", str(error)) from None
    if given.file is not None:
        _add(given.file, given.name, kept.line())
    print(key)
    if given.file is None:
        print(kept.line())
    print("This key is not shown again.", file=sys.stderr)
    return 0


def _add(path: Path, name: str, line: str) -> None:
    """A file that is made here is for its owner only."""
    if path.exists() and name in {key.name for key in read_file(path)}:
        raise ConfigError("--file", f"{path} has a key {name} already", "take its line out first")
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+", encoding="utf-8") as file:
            file.seek(0)
            content = file.read()
            file.write(line + "\n" if content.endswith("\n") or not content else f"\n{line}\n")
    except OSError as error:
        raise ConfigError("--file", f"cannot write {path}: {error.strerror or error}") from None
