"""Calls whose arguments are written one by one, between tags: Step-3, and Qwen3-Coder with all that follow it.

A value's text becomes JSON by the type that the function's schema gives it. Source: the chat templates of
stepfun-ai/step3 and of Qwen/Qwen3-Coder-30B-A3B-Instruct.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from afd_server.text.growing_text import Steps, undecided
from afd_server.text.tool_calls.json_text import loads, written
from afd_server.text.tool_calls.parser import MAX_NAME, MarkedParser

MAX_KINDS = 64  # alternatives that are looked at in a schema


class _XmlParser(MarkedParser):
    """name: what stands before and after a function's name; the other tags alike."""

    name: ClassVar[tuple[str, str]]
    parameter: ClassVar[tuple[str, str]]
    parameter_end: ClassVar[str]
    call_ends: ClassVar[tuple[str, ...]]  # in their order; each may be missing

    @abstractmethod
    def _read_opening(self, mark: str) -> Steps[bool]:
        """What stands between the mark and the function. Whether it is right."""

    @abstractmethod
    def _value(self, text: str) -> str:
        """A parameter's text without what the format puts around it."""

    def _read_call(self, mark: str) -> Steps[None]:
        text = self._text
        if not (yield from self._read_opening(mark)) or not (yield from text.accept(self.name[0])):
            return
        name = yield from text.before(self.name[1], MAX_NAME)
        if not name:
            return
        self._begin(name)
        separator = "{"
        yield from text.space()
        while (yield from text.accept(self.parameter[0])):
            parameter = yield from text.before(self.parameter[1], MAX_NAME)
            if parameter is None:
                break
            self._argue(f"{separator}{written(parameter)}: ")
            value, complete = yield from self._read_value()
            if not complete:  # nor are the arguments: they show it by being no JSON
                self._argue(written(value)[:-1])
                return
            self._argue(written(self._typed(name, parameter, self._value(value))))
            separator = ", "
            yield from text.space()
        if text.unread:
            self._argue("{}" if separator == "{" else "}")
        for closing in self.call_ends:
            yield from text.accept(closing)
            yield from text.space()

    def _read_value(self) -> Steps[tuple[str, bool]]:
        """Up to the closing tag, or to the end of the text; and whether the tag came."""
        pieces: list[str] = []
        while True:
            unread = self._text.unread
            at = unread.find(self.parameter_end)
            if at >= 0:
                pieces.append(self._text.read(at))
                self._text.read(len(self.parameter_end))
                return "".join(pieces), True
            kept = 0 if self._text.has_ended else undecided(unread, (self.parameter_end,))
            pieces.append(self._text.read(len(unread) - kept))
            if self._text.has_ended:
                return "".join(pieces), False
            yield

    def _typed(self, name: str, parameter: str, value: str) -> Any:
        function = self._functions.get(name)
        properties = function.parameters.get("properties") if function is not None else None
        kinds = _kinds(properties.get(parameter)) if isinstance(properties, dict) else set()
        if not kinds or kinds == {"string"}:
            return value
        stripped = value.strip()
        if "null" in kinds and stripped.lower() in ("null", "none"):
            return None
        if "boolean" in kinds and stripped.lower() in ("true", "false"):
            return stripped.lower() == "true"
        parsed = loads(stripped)
        wanted = tuple(KINDS[kind] for kind in kinds if kind in KINDS)
        if isinstance(parsed, wanted) and not isinstance(parsed, bool):
            return parsed
        return value


KINDS: dict[str, Any] = {"integer": int, "number": int | float, "object": dict, "array": list}


def _kinds(schema: Any) -> set[str]:
    """The types that a schema allows, as far as it names them."""
    kinds: set[str] = set()
    waiting = [schema]
    while waiting and len(kinds) < MAX_KINDS:
        each = waiting.pop()
        if not isinstance(each, dict):
            continue
        named = each.get("type")
        kinds.update(kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str))
        for key in ("anyOf", "oneOf"):
            alternatives = each.get(key)
            waiting += alternatives[:MAX_KINDS] if isinstance(alternatives, list) else []
    return kinds


class Step3Parser(_XmlParser):
    """`<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="..."><steptml:parameter name="...">value...`."""

    CALLS_BEGIN, CALLS_END = "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"
    CALL_BEGIN, CALL_END = "<｜tool_call_begin｜>", "<｜tool_call_end｜>"
    SEPARATOR = "<｜tool_sep｜>"
    marks = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
    openings = (CALLS_BEGIN, CALL_BEGIN)
    name = ('<steptml:invoke name="', '">')
    parameter = ('<steptml:parameter name="', '">')
    parameter_end = "</steptml:parameter>"
    call_ends = ("</steptml:invoke>", CALL_END, CALLS_END)

    def _read_opening(self, mark: str) -> Steps[bool]:
        text = self._text
        yield from text.space()
        if mark == self.CALLS_BEGIN and not (yield from text.accept(self.CALL_BEGIN)):
            return False
        kind = yield from text.before(self.SEPARATOR, MAX_NAME)
        yield from text.space()
        return kind is not None and kind.strip() == "function"

    def _value(self, text: str) -> str:
        return text


class Qwen3CoderParser(_XmlParser):
    """`<tool_call>`, `<function=name>`, and for each argument `<parameter=name>`, its value on lines of its own."""

    marks = ("<tool_call>", "</tool_call>")
    openings = ("<tool_call>",)
    name = ("<function=", ">")
    parameter = ("<parameter=", ">")
    parameter_end = "</parameter>"
    call_ends = ("</function>", "</tool_call>")

    def _read_opening(self, mark: str) -> Steps[bool]:
        yield from self._text.space()
        return True

    def _value(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")
