"""JSON that is still being written: strings, containers handed on as they come, and calls written as JSON objects."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from afd_server.text.growing_text import GrowingText, Steps

# No JSON has `<` outside of a string: there, a format's closing mark ends a value that was never closed.
OUTSIDE_STRINGS = re.compile(r'["{}\[\]<]')
INSIDE_STRINGS = re.compile(r'["\\]')
CLOSES = {"{": "}", "[": "]"}
SCALAR = re.compile(r"[-+.\w]*")


def read_container(text: GrowingText, hand_on: Callable[[str], None]) -> Steps[bool]:
    """An object or a list, in pieces. Whether it came to its end; its content may be no JSON even then."""
    closings: list[str] = []
    in_string = False
    while True:
        unread, at = text.unread, 0
        while at < len(unread):
            found = (INSIDE_STRINGS if in_string else OUTSIDE_STRINGS).search(unread, at)
            if found is None:
                at = len(unread)
            elif found[0] == "\\":
                if found.end() == len(unread):
                    at = found.start()
                    break  # what is escaped comes later
                at = found.end() + 1
            elif found[0] == '"':
                in_string = not in_string
                at = found.end()
            elif found[0] in CLOSES:
                closings.append(CLOSES[found[0]])
                at = found.end()
            elif not closings or found[0] != closings.pop():
                hand_on(text.read(found.start()))
                return False
            else:
                at = found.end()
                if not closings:
                    hand_on(text.read(at))
                    return True
        hand_on(text.read(at))
        if text.has_ended:
            hand_on(text.read(len(unread)))
            return False
        yield


def read_value(text: GrowingText) -> Steps[str | None]:
    """Any value, whole; None when it is none or never ends."""
    if (yield from text.comes("{")) or (yield from text.comes("[")):
        pieces: list[str] = []
        complete = yield from read_container(text, pieces.append)
        return "".join(pieces) if complete else None
    if (yield from text.comes('"')):
        return (yield from _read_string(text))
    while True:
        unread = text.unread
        scalar = SCALAR.match(unread)
        assert scalar is not None
        if scalar.end() < len(unread) or text.has_ended:
            return text.read(scalar.end()) or None
        yield


def _read_string(text: GrowingText) -> Steps[str | None]:
    at = 1
    while True:
        unread = text.unread
        while (found := INSIDE_STRINGS.search(unread, at)) is not None:
            if found[0] == '"':
                return text.read(found.end())
            at = found.end() + 1  # past what is escaped, which may be yet to come
        at = max(at, len(unread))
        if text.has_ended:
            return None
        yield


def loads(text: str | None) -> Any:
    """None for what is no JSON, has numbers beyond what JSON's readers hold, or is too deep."""
    try:
        return None if text is None else json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float:
    """json reads NaN, Infinity and 1e999, and would write the first two, which no other reader takes."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def written(value: Any) -> str:
    """As JSON. Half of a surrogate pair, which no UTF-8 has, stays the escape that it was."""
    return _escaped(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _escaped(json_text: str) -> str:
    return json_text.encode(errors="backslashreplace").decode()


def read_call_object(
    text: GrowingText,
    begin: Callable[[str], None],
    argue: Callable[[str], None],
    is_name: Callable[[str], bool] = bool,
    *,
    may_lack_arguments: bool = True,
) -> Steps[None]:
    """`{"name": ..., "arguments": {...}}`, `parameters` for `arguments`, in any order and with other keys.

    Calls `begin` once the name and the beginning of the arguments are there, or never. Then reads on as far as it can.
    """
    name: str | None = None
    arguments: str | None = None
    if not (yield from text.accept("{")):
        return
    while True:
        yield from text.space()
        if not (yield from text.comes('"')):
            break
        key = loads((yield from _read_string(text)))
        yield from text.space()
        if not (yield from text.accept(":")):
            return
        yield from text.space()
        is_arguments = key in ("arguments", "parameters")
        if is_arguments and name is not None and (yield from text.comes("{")):
            begin(name)
            yield from read_container(text, argue)
            yield from _read_rest(text)
            return
        value = yield from read_value(text)
        if value is None:
            return
        if key == "name":
            name = loads(value)
            if not isinstance(name, str) or not name.isprintable() or not is_name(name):
                return
        elif is_arguments:
            arguments = _arguments(value)
            if arguments is None:
                return
        yield from text.space()
        if not (yield from text.accept(",")):
            break
    if name is None or not (yield from text.accept("}")):
        return
    if arguments is not None or may_lack_arguments:
        begin(name)
        argue(arguments or "{}")


def _read_rest(text: GrowingText) -> Steps[None]:
    """What an object may hold after the arguments, and its end."""
    yield from text.space()
    while (yield from text.accept(",")):
        yield from text.space()
        if (yield from text.comes('"')):
            yield from _read_string(text)
        yield from text.space()
        if (yield from text.accept(":")):
            yield from text.space()
            yield from read_value(text)
        yield from text.space()
    yield from text.accept("}")


def _arguments(value: str) -> str | None:
    """As the text of an object: models write null for none, and now and then the text as a string. None for anything else."""
    if value.startswith("{"):
        return value
    parsed = loads(value)
    if isinstance(parsed, str) and isinstance(loads(parsed), dict):
        return _escaped(parsed)
    return "{}" if value == "null" else None
