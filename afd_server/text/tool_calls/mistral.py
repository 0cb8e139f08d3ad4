"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` for each call.

The first is written by models whose tokenizer is older than version 11. Version 11 left [ARGS] out where the name is
followed by `{`; version 13 has `[CALL_ID]id` between the two. Source: mistral-common's instruct tokenizers.
"""

from __future__ import annotations

import re

from afd_server.text.growing_text import Steps
from afd_server.text.tool_calls.json_text import read_call_object, read_container
from afd_server.text.tool_calls.parser import MAX_NAME, MarkedParser

NAME = re.compile(r"[\w.:/-]*")


class MistralParser(MarkedParser):
    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    openings = ("[TOOL_CALLS]",)

    def _read_call(self, mark: str) -> Steps[None]:
        yield from self._text.space()
        if (yield from self._text.accept("[")):
            yield from self._read_list()
        else:
            yield from self._read_named()

    def _read_list(self) -> Steps[None]:
        yield from self._text.space()
        yield from self._read_several(lambda: read_call_object(self._text, self._begin, self._argue), ",")
        yield from self._text.space()
        yield from self._text.accept("]")

    def _read_named(self) -> Steps[None]:
        text = self._text
        while True:
            name = NAME.match(text.unread)
            assert name is not None
            if name.end() < len(text.unread) or text.has_ended or name.end() > MAX_NAME:
                break
            yield
        if not 0 < name.end() <= MAX_NAME:
            return
        text.read(name.end())
        if (yield from text.accept("[CALL_ID]")):
            yield from text.before("[ARGS]", MAX_NAME)
        else:
            yield from text.accept("[ARGS]")
        yield from text.space()
        if (yield from text.comes("{")):
            self._begin(name[0])
            yield from read_container(text, self._argue)
