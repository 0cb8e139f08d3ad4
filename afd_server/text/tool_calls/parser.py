"""What the parsers of all formats share: content up to a mark, a call that may turn out to be none, and its deltas.

A call begins as soon as its name is known and its arguments have begun: from then on they are handed out as they come, and
what the text holds is the model's word, right or wrong. Text that looks like a call and never gets there is content.
White space around calls belongs to the format. What does not live here: any format.
"""

from __future__ import annotations

import random
import secrets
import string
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from afd_server.text.growing_text import Steps, TextParser, first_of, undecided
from afd_server.text.message import CallDelta, Function, MessageDelta

MAX_NAME = 256  # characters of a function's name; a text that does not end it by then is none


def call_id() -> str:
    return f"chatcmpl-tool-{secrets.token_hex(16)}"


def short_call_id() -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return "".join(random.SystemRandom().choices(string.ascii_letters + string.digits, k=9))


class ToolCallParser(TextParser):
    """One output's text in, content and calls out, whichever way it is cut into pieces.

    marks: texts that the format is made of, and that may be special tokens. new_id: makes the id of a call.
    """

    marks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, functions: Sequence[Function] = (), new_id: Callable[[], str] = call_id) -> None:
        super().__init__()
        self._functions = {function.name: function for function in functions}
        self._new_id = new_id
        self._num_calls = 0
        self._after_call = False
        self._unless_call = ""  # content, unless a call begins
        self._content: list[str] = []
        self._deltas: list[CallDelta] = []

    def _taken(self) -> MessageDelta:
        delta = MessageDelta("".join(self._content), calls=tuple(self._deltas))
        self._content, self._deltas = [], []
        return delta

    def _say(self, content: str) -> None:
        if content:
            self._content.append(content)
            self._after_call = False

    def _begin(self, name: str) -> None:
        self._deltas.append(CallDelta(self._num_calls, id=self._new_id(), name=name))
        self._num_calls += 1
        self._after_call = True
        self._unless_call = ""
        self._text.release()

    def _argue(self, piece: str) -> None:
        """More of the arguments of the call that has begun last."""
        if not piece:
            return
        index = self._num_calls - 1
        last = self._deltas[-1] if self._deltas else None
        if last is None or last.index != index:
            self._deltas.append(CallDelta(index, piece))
        else:
            self._deltas[-1] = CallDelta(index, last.arguments + piece, last.id, last.name)

    def _attempt(self, steps: Steps[None]) -> Steps[bool]:
        """Whether a call began. If none did, what `steps` read is unread again."""
        before = self._num_calls
        self._text.hold()
        yield from steps
        began = self._num_calls > before
        if not began:
            self._text.go_back()
        self._text.release()
        return began

    def _read_several(self, read_one: Callable[[], Steps[None]], separator: str) -> Steps[None]:
        """A call, and more of them with `separator` before each."""
        before = self._num_calls
        yield from read_one()
        if self._num_calls > before:
            while (yield from self._attempt(self._read_next(read_one, separator))):
                pass

    def _read_next(self, read_one: Callable[[], Steps[None]], separator: str) -> Steps[None]:
        yield from self._text.space()
        if (yield from self._text.accept(separator)):
            yield from self._text.space()
            yield from read_one()

    def _read_content(self, marks: Sequence[str]) -> Steps[str | None]:
        """Up to and with the first of `marks`, which it gives; None when the text has ended without one."""
        if self._after_call:
            yield from self._text.space()
        while True:
            unread = self._text.unread
            found = first_of(unread, marks)
            if found is not None:
                at, mark = found
                content = unread[:at].rstrip()
                self._say(content)
                self._unless_call = unread[len(content) : at + len(mark)]
                self._text.read(at + len(mark))
                return mark
            if self._text.has_ended:
                self._say(self._text.read(len(unread)))
                return None
            decided = unread[: len(unread) - undecided(unread, marks)].rstrip()
            self._say(self._text.read(len(decided)))
            yield


class MarkedParser(ToolCallParser):
    """A format whose calls stand behind one of the texts of `openings`, anywhere in the output."""

    openings: ClassVar[tuple[str, ...]]

    def _read(self) -> Steps[None]:
        while (mark := (yield from self._read_content(self.openings))) is not None:
            if not (yield from self._attempt(self._read_call(mark))):
                self._say(self._unless_call)

    @abstractmethod
    def _read_call(self, mark: str) -> Steps[None]:
        """Reads what follows the mark, to the end of the call."""
