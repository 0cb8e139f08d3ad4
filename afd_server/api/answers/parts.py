"""A message as a row of parts, one after the other: reasoning, text, calls. What two vendors' streams are made of.

What lives here: which part begins, grows and ends when. What does not: the events' JSON (responses.py, messages.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from afd_server.text.message import MessageDelta


class Turn(Enum):
    """What happens to a part."""

    BEGINS = 1
    GROWS = 2
    ENDS = 3


@dataclass(slots=True)
class Part:
    """text: of a call, its arguments as far as they are written. call_id and name are a call's."""

    index: int
    kind: Literal["reasoning", "text", "call"]
    text: str = ""
    call_id: str = ""
    name: str = ""


class Change(NamedTuple):
    """added: what the part has grown by."""

    turn: Turn
    part: Part
    added: str = ""


class Parts:
    """The parts of one answer so far. At most one is open: the last."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self._is_open = False

    def take(self, delta: MessageDelta) -> Iterator[Change]:
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.content:
            yield from self._grow("text", delta.content)
        for call in delta.calls:
            if call.name is not None and call.id is not None:
                yield from self._begin("call", call.id, call.name)
            if call.arguments:
                yield self._add(call.arguments)

    def end(self) -> Iterator[Change]:
        """The open part ends; without any there is an empty text, since an answer consists of something."""
        if not self.all:
            yield from self._begin("text")
        if self._is_open:
            self._is_open = False
            yield Change(Turn.ENDS, self.all[-1])

    @property
    def has_calls(self) -> bool:
        return any(part.kind == "call" for part in self.all)

    def _grow(self, kind: Literal["reasoning", "text"], text: str) -> Iterator[Change]:
        if not self._is_open or self.all[-1].kind != kind:
            yield from self._begin(kind)
        yield self._add(text)

    def _begin(
        self, kind: Literal["reasoning", "text", "call"], call_id: str = "", name: str = ""
    ) -> Iterator[Change]:
        if self._is_open:
            yield Change(Turn.ENDS, self.all[-1])
        self.all.append(Part(len(self.all), kind, call_id=call_id, name=name))
        self._is_open = True
        yield Change(Turn.BEGINS, self.all[-1])

    def _add(self, text: str) -> Change:
        self.all[-1].text += text
        return Change(Turn.GROWS, self.all[-1], text)
