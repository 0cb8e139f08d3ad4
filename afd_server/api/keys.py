"""API keys: who may ask, and for how much. Those of --api-key, and those of a file, which holds hashes only.

What lives here: the file's form, the hash, and finding the key that a client has sent. What does not: what a key opens
(gate.py), how use is counted (rate_limits.py), the command that makes keys (key_command.py).

A key is 256 random bits, so nobody finds one by trying, whatever the hash costs: a fast salted hash (BLAKE2b) is right,
and a slow one, as passwords need, would only let strangers keep the server busy.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from afd_server.config import separate_keys
from afd_server.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "afd-"  # by which scanners of source code find keys that were committed
KEY_BYTES, SALT_BYTES, DIGEST_BYTES = 32, 16, 32
HASH_KIND = "blake2b"
# What a client sends is hashed once with the salt of each key: that must cost little, whatever it is.
MAX_SENT_BYTES = 512
MAX_KEYS = 1000
MAX_FILE_BYTES = 256 * 1024
MAX_PER_MINUTE = 10**12
ROLES = ("user", "operator")
LIMITS = ("requests-per-minute", "tokens-per-minute")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
NAME_RULE = "the name is not 1 to 64 of A-Z a-z 0-9 . _ @ -"
# Between two looks whether the file has changed.
LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without itself. name: what logs and metrics call it. Limits: None for none."""

    name: str
    salt: bytes
    digest: bytes
    is_operator: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def matches(self, sent: bytes) -> bool:
        """In constant time: how long it takes must not tell how much of a guess was right."""
        return hmac.compare_digest(_digest(sent, self.salt), self.digest)

    def line(self) -> str:
        """As it stands in a file."""
        limits = zip(LIMITS, (self.requests_per_minute, self.tokens_per_minute), strict=True)
        return " ".join(
            [
                self.name,
                ROLES[self.is_operator],
                f"{HASH_KIND}:{self.salt.hex()}:{self.digest.hex()}",
                *(f"{name}={limit}" for name, limit in limits if limit is not None),
            ]
        )


def new_key(
    name: str,
    *,
    is_operator: bool = False,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> tuple[str, ApiKey]:
    """(the key, which is kept nowhere, and what a server keeps of it). Raises ValueError for a bad name or limit."""
    if not NAME.fullmatch(name):
        raise ValueError(NAME_RULE)
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    made = _hashed(key, name, is_operator)
    made = ApiKey(name, made.salt, made.digest, is_operator, requests_per_minute, tokens_per_minute)
    return key, parse_line(made.line())


def parse_line(line: str) -> ApiKey:
    """NAME ROLE blake2b:SALT:DIGEST [requests-per-minute=N] [tokens-per-minute=N]. Raises ValueError."""
    parts = line.split()
    if len(parts) < 3:
        raise ValueError("is not NAME ROLE HASH")
    name, role, hashed, *given = parts
    if not NAME.fullmatch(name):
        raise ValueError(NAME_RULE)
    if role not in ROLES:
        raise ValueError(f"the role is not {' or '.join(ROLES)}")
    kind, _, rest = hashed.partition(":")
    salt, _, digest = rest.partition(":")
    if kind != HASH_KIND or not _is_hex(salt, SALT_BYTES) or not _is_hex(digest, DIGEST_BYTES):
        raise ValueError(f"the hash is not {HASH_KIND}:SALT:DIGEST, as `afd key new` writes it")
    limits: dict[str, int] = {}
    for each in given:
        what, _, number = each.partition("=")
        if what not in LIMITS or what in limits:
            raise ValueError(f"{what!r} is not one of {', '.join(LIMITS)}, each once")
        if not (number.isascii() and number.isdigit() and 0 < int(number[:20]) <= MAX_PER_MINUTE):
            raise ValueError(f"{what}: not a number from 1 to {MAX_PER_MINUTE}")
        limits[what] = int(number)
    return ApiKey(
        name, bytes.fromhex(salt), bytes.fromhex(digest), role == "operator", *map(limits.get, LIMITS)
    )


def parse_file(content: str) -> list[ApiKey]:
    """One key a line; empty lines, and those that begin with #, say nothing. Raises ValueError naming the line."""
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = parse_line(line)
            if key.name in keys:
                raise ValueError(f"{key.name} stands there twice")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        keys[key.name] = key
    if len(keys) > MAX_KEYS:
        raise ValueError(f"more than {MAX_KEYS} keys")
    return list(keys.values())


def read_file(path: Path) -> list[ApiKey]:
    """Raises ConfigError naming file and line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        return parse_file(content.decode())
    except OSError as error:
        raise ConfigError("--api-key-file", f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError("--api-key-file", f"{path}: is not UTF-8") from None
    except ValueError as error:
        raise ConfigError("--api-key-file", f"{path}: {error}") from None


class KeyRing:
    """The keys of one server. plain: those of --api-key, of which the first is the operator's.

    A file is read again when it has changed. One that cannot be read then changes nothing, and the log says so.
    """

    def __init__(
        self,
        plain: str | None = None,
        file: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError naming the flag."""
        given = [] if plain is None else separate_keys(plain)
        if any(len(key.encode()) > MAX_SENT_BYTES for key in given):
            raise ConfigError("--api-key", f"a key is longer than {MAX_SENT_BYTES} bytes")
        self._plain = [_hashed(key, f"api-key-{at}", at == 1) for at, key in enumerate(given, 1)]
        self._file = None if file is None else Path(file)
        self._clock = clock
        self._looked_at = clock()
        self._seen: tuple[int, ...] | None = None
        self._keys: Sequence[ApiKey] = self._plain
        if self._file is not None:
            self._seen = _version(self._file)
            from_file = read_file(self._file)
            if not from_file:
                raise ConfigError("--api-key-file", f"{file} holds no key", "see afd key new")
            self._keys = self._with_plain(from_file)
            _warn_of_permissions(self._file)

    @property
    def is_asked_for(self) -> bool:
        """Whether clients need a key: also when every one has been taken out of the file."""
        return bool(self._plain) or self._file is not None

    def find(self, sent: bytes) -> ApiKey | None:
        """The key that this is. Looks at every one, whichever it is."""
        self._refresh()
        if len(sent) > MAX_SENT_BYTES:
            return None
        matching = [key for key in self._keys if key.matches(sent)]
        return matching[0] if matching else None

    def _refresh(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        version = _version(self._file)
        if version == self._seen:
            return
        self._seen = version
        try:
            self._keys = self._with_plain(read_file(self._file))
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        logger.info("%d keys have been read again from %s", len(self._keys) - len(self._plain), self._file)
        _warn_of_permissions(self._file)

    def _with_plain(self, from_file: Iterable[ApiKey]) -> Sequence[ApiKey]:
        """Names of --api-key that the file uses too belong to the file: they would be one in limits and metrics."""
        from_file = list(from_file)
        taken = {key.name for key in from_file} & {key.name for key in self._plain}
        if taken:
            raise ConfigError(
                "--api-key-file", f"{self._file}: {min(taken)} is what --api-key calls one of its keys"
            )
        return [*self._plain, *from_file]


def _hashed(key: str, name: str, is_operator: bool) -> ApiKey:
    salt = secrets.token_bytes(SALT_BYTES)
    return ApiKey(name, salt, _digest(key.encode(), salt), is_operator)


def _digest(key: bytes, salt: bytes) -> bytes:
    return hashlib.blake2b(key, salt=salt, digest_size=DIGEST_BYTES).digest()


def _is_hex(text: str, num_bytes: int) -> bool:
    return re.fullmatch(r"[0-9a-f]+", text) is not None and len(text) == 2 * num_bytes


def _version(file: Path) -> tuple[int, ...] | None:
    """Another one when the file may have changed."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _warn_of_permissions(file: Path) -> None:
    with suppress(FileNotFoundError):  # gone since it was read
        _warn_of_mode(file, stat.S_IMODE(file.stat().st_mode))


def _warn_of_mode(file: Path, mode: int) -> None:
    if mode & (stat.S_IWGRP | stat.S_IWOTH | stat.S_IROTH):
        logger.warning("%s can be read or written by others (mode %o): chmod 600", file, mode)
