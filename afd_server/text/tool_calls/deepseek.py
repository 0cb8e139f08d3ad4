"""DeepSeek: calls between marks that are tokens of their own, in the two forms of V3 and R1, and of V3.1.

Source: the chat templates of deepseek-ai/DeepSeek-V3-0324, DeepSeek-R1-0528 and DeepSeek-V3.1.
"""

from __future__ import annotations

from abc import abstractmethod

from afd_server.text.growing_text import Steps
from afd_server.text.tool_calls.json_text import read_container
from afd_server.text.tool_calls.parser import MAX_NAME, MarkedParser

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"


class _DeepSeekParser(MarkedParser):
    marks = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
    openings = (CALLS_BEGIN, CALL_BEGIN)

    def _read_call(self, mark: str) -> Steps[None]:
        text = self._text
        yield from text.space()
        if mark == CALLS_BEGIN and not (yield from text.accept(CALL_BEGIN)):
            return
        name = yield from self._read_name()
        if not name or not (yield from text.comes("{")):
            return
        self._begin(name)
        yield from read_container(text, self._argue)
        for closing in ("```", CALL_END, CALLS_END):
            yield from text.space()
            yield from text.accept(closing)

    @abstractmethod
    def _read_name(self) -> Steps[str | None]:
        """Reads up to the arguments."""


class DeepSeekV3Parser(_DeepSeekParser):
    """`function<｜tool▁sep｜>name`, then the arguments as a block of code."""

    def _read_name(self) -> Steps[str | None]:
        kind = yield from self._text.before(SEPARATOR, MAX_NAME)
        if kind is None or kind.strip() != "function":
            return None
        name = yield from self._text.before("\n", MAX_NAME)
        yield from self._text.space()
        if name is None or not (yield from self._text.accept("```json")):
            return None
        yield from self._text.space()
        return name.strip()


class DeepSeekV31Parser(_DeepSeekParser):
    """`name<｜tool▁sep｜>arguments`."""

    def _read_name(self) -> Steps[str | None]:
        name = yield from self._text.before(SEPARATOR, MAX_NAME)
        yield from self._text.space()
        return None if name is None else name.strip()
