"""A text that is still being written, read from left to right by a parser that never has to guess.

A parser is a generator over one: it asks what comes next, and where the answer depends on text that has not come yet it
yields and is resumed when there is more. So a format is written down once, as if its whole text were there, and what is
read does not depend on how the text was cut into pieces. Called by the parsers of reasoning and of tool calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import TypeVar

from afd_server.text.message import MessageDelta

Result = TypeVar("Result")
Steps = Generator[None, None, Result]  # yields where it needs more text


class GrowingText:
    """`position` moves over what is read. What lies before it is forgotten, except after `hold`."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._held: int | None = None
        self.has_ended = False

    def grow(self, text: str) -> None:
        start = self._position if self._held is None else self._held
        self._text = self._text[start:] + text
        self._position -= start
        self._held = None if self._held is None else 0

    def end(self) -> None:
        """There will be no more."""
        self.has_ended = True

    @property
    def unread(self) -> str:
        return self._text[self._position :]

    def read(self, length: int) -> str:
        read = self._text[self._position : self._position + length]
        self._position += len(read)
        return read

    def hold(self) -> None:
        """From here on nothing is forgotten, so that `go_back` can return here."""
        self._held = self._position

    def go_back(self) -> None:
        assert self._held is not None, "there was no hold"
        self._position = self._held

    def release(self) -> None:
        self._held = None

    def comes(self, mark: str) -> Steps[bool]:
        """Whether `mark` comes next. It stays unread."""
        while True:
            begins = self._text[self._position : self._position + len(mark)]
            if begins == mark or self.has_ended or not mark.startswith(begins):
                return begins == mark
            yield

    def accept(self, mark: str) -> Steps[bool]:
        """Whether `mark` comes next, which is read then."""
        found = yield from self.comes(mark)
        if found:
            self._position += len(mark)
        return found

    def space(self) -> Steps[None]:
        """Reads white space, as much as there is."""
        while True:
            unread = self.unread
            self._position += len(unread) - len(unread.lstrip())
            if self._position < len(self._text) or self.has_ended:
                return
            yield

    def before(self, mark: str, most: int) -> Steps[str | None]:
        """Reads up to and with `mark`, and gives what stands before it. None, and nothing read: it is not among `most` characters."""
        while True:
            at = self._text.find(mark, self._position, self._position + most)
            if at >= 0:
                text = self._text[self._position : at]
                self._position = at + len(mark)
                return text
            if self.has_ended or len(self._text) - self._position >= most:
                return None
            yield


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """(where, which) of the mark that begins first, of two that begin together the longer one."""
    found = [(text.find(mark), -len(mark), mark) for mark in marks if mark in text]
    if not found:
        return None
    at, _, mark = min(found)
    return at, mark


def undecided(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end may yet become one of `marks`: the longest that begin one, less than all of it."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0


class TextParser(ABC):
    """One output's text in, what it adds to the message out, whichever way it is cut into pieces."""

    def __init__(self) -> None:
        self._text = GrowingText()
        self._steps = self._read()

    def feed(self, text: str) -> MessageDelta:
        self._text.grow(text)
        next(self._steps, None)
        return self._taken()

    def finish(self) -> MessageDelta:
        """What was held back, when the text ends."""
        self._text.end()
        next(self._steps, None)
        return self._taken()

    @abstractmethod
    def _read(self) -> Steps[None]:
        """Reads the whole text, to its end."""

    @abstractmethod
    def _taken(self) -> MessageDelta:
        """What has been read since it was last asked."""
