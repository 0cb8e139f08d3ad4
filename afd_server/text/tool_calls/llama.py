"""Llama: the output is a JSON object of name and parameters, several with semicolons between, or a list of Python calls.

Nothing marks them but where they stand, at the very beginning or after a tag, so a call is one only if it names a function
of the request. Source: Meta's model cards and prompt formats of Llama 3.1, 3.2 and 4.
"""

from __future__ import annotations

import ast
import re
from abc import abstractmethod
from typing import ClassVar

from afd_server.text.growing_text import Steps
from afd_server.text.tool_calls.json_text import read_call_object, written
from afd_server.text.tool_calls.parser import MAX_NAME, ToolCallParser

MAX_CALL = 100_000  # characters of a Python call, which is parsed at once
OUTSIDE_STRINGS = re.compile(r"[\"'()\[\]{}]")
INSIDE_STRINGS = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}
CLOSES = {"(": ")", "[": "]", "{": "}"}


class _LlamaParser(ToolCallParser):
    openings: ClassVar[tuple[str, ...]]

    def _read(self) -> Steps[None]:
        yield from self._attempt(self._read_bare())
        while (yield from self._read_content(self.openings)) is not None:
            if not (yield from self._attempt(self._read_calls())):
                self._say(self._unless_call)

    def _read_bare(self) -> Steps[None]:
        yield from self._text.space()
        for opening in self.openings:
            if (yield from self._text.accept(opening)):
                break
        yield from self._read_calls()

    @abstractmethod
    def _read_calls(self) -> Steps[None]: ...

    def _is_offered(self, name: str) -> bool:
        return name in self._functions


class Llama3JsonParser(_LlamaParser):
    """`{"name": ..., "parameters": {...}}`, after `<|python_tag|>` or without it."""

    marks = ("<|python_tag|>",)
    openings = ("<|python_tag|>",)

    def _read_calls(self) -> Steps[None]:
        yield from self._text.space()
        yield from self._read_several(self._read_one, ";")

    def _read_one(self) -> Steps[None]:
        return read_call_object(
            self._text, self._begin, self._argue, self._is_offered, may_lack_arguments=False
        )


class PythonicParser(_LlamaParser):
    """`[name(key=value), ...]`, between `<|python_start|>` and `<|python_end|>` or without. A call is handed out whole."""

    marks = ("<|python_start|>", "<|python_end|>")
    openings = ("<|python_start|>",)

    def _read_calls(self) -> Steps[None]:
        text = self._text
        yield from text.space()
        if not (yield from text.accept("[")):
            return
        yield from text.space()
        yield from self._read_several(self._read_one, ",")
        for closing in ("]", "<|python_end|>"):
            yield from text.space()
            yield from text.accept(closing)

    def _read_one(self) -> Steps[None]:
        text = self._text
        name = yield from text.before("(", MAX_NAME)
        if name is None or not self._is_offered(name):
            return
        inner = yield from self._read_to_parenthesis()
        arguments = None if inner is None else _arguments(inner)
        if arguments is not None:
            self._begin(name)
            self._argue(arguments)

    def _read_to_parenthesis(self) -> Steps[str | None]:
        """What stands before the parenthesis that closes the call, with it."""
        closings, quote, at = [")"], "", 0
        while True:
            unread = self._text.unread
            while at < len(unread):
                found = (INSIDE_STRINGS[quote] if quote else OUTSIDE_STRINGS).search(unread, at)
                if found is None:
                    at = len(unread)
                elif found[0] == "\\":
                    at = found.end() + 1
                elif found[0] in "\"'":
                    quote = "" if quote else found[0]
                    at = found.end()
                elif found[0] in CLOSES:
                    closings.append(CLOSES[found[0]])
                    at = found.end()
                elif found[0] != closings.pop():
                    return None
                else:
                    at = found.end()
                    if not closings:
                        return self._text.read(at)[:-1]
            if self._text.has_ended or at > MAX_CALL:
                return None
            yield


def _arguments(inner: str) -> str | None:
    """The JSON of `key=value, ...` with literals of Python for values; None for anything else."""
    try:
        call = _Words().visit(ast.parse(f"f({inner})", mode="eval")).body
        if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
            return None
        return written({str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords})
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


class _Words(ast.NodeTransformer):
    """JSON's words for Python's, which models write too."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node
