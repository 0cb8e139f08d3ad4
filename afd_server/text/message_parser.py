"""From a choice's text to a message: first the reasoning is taken off, then tool calls are looked for in the rest.

What lives here: how the output of one request is to be read, which is decided once, and the parser of one choice. What does
not: the formats (reasoning.py, tool_calls/). Called by api/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from afd_server.text.message import Function, MessageDelta
from afd_server.text.reasoning import FORMATS, ReasoningFormat, ReasoningParser
from afd_server.text.tool_calls.forced import NamedParser, RequiredParser
from afd_server.text.tool_calls.parser import ToolCallParser
from afd_server.text.tool_calls.registry import id_maker, parser_class

MANY = 2**31


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """How the output of one request is to be read. The default takes it all for content.

    tool_call_parser: a name of the registry, also where only the look of ids depends on it. reads_calls: "auto": calls are
    looked for; "required" and "named": the output is calls alone, or the arguments of functions[0]. prompt_tail: how the
    prompt ends. shows_reasoning: False leaves it out of the message. most_calls: how many calls are let through.
    """

    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    reads_calls: str | None = None
    functions: tuple[Function, ...] = ()
    prompt_tail: str = ""
    shows_reasoning: bool = True
    most_calls: int = MANY

    @property
    def reasoning(self) -> ReasoningFormat | None:
        return None if self.reasoning_parser is None else FORMATS[self.reasoning_parser]

    @property
    def must_call(self) -> bool:
        """Whether the output is nothing but calls."""
        return self.reads_calls in ("required", "named")

    @property
    def begins_inside(self) -> bool:
        """Whether the output begins with reasoning that is open already."""
        return self.reasoning is not None and self.reasoning.begins_inside(self.prompt_tail)

    @property
    def marks(self) -> Sequence[str]:
        """Texts that must not be lost as special tokens."""
        marks = () if self.reasoning is None else self.reasoning.marks
        if self.reads_calls == "auto" and self.tool_call_parser is not None:
            marks += parser_class(self.tool_call_parser).marks
        return marks

    def parser(self) -> MessageParser:
        """A new one for each choice."""
        return MessageParser(self)


class MessageParser:
    """One choice's text in, what it adds to the message out, whichever way it is cut into pieces."""

    def __init__(self, form: MessageFormat) -> None:
        self._format = form
        self._reasoning = _reasoning_parser(form)
        self._calls = _call_parser(form)

    def feed(self, text: str) -> MessageDelta:
        delta = MessageDelta(text) if self._reasoning is None else self._reasoning.feed(text)
        if self._calls is not None:
            found = self._calls.feed(delta.content)
            delta = replace(found, reasoning=delta.reasoning)
        return self._shown(delta)

    def finish(self) -> MessageDelta:
        """What was held back, when the text ends."""
        delta = MessageDelta() if self._reasoning is None else self._reasoning.finish()
        if self._calls is not None:
            read, end = self._calls.feed(delta.content), self._calls.finish()
            delta = MessageDelta(read.content + end.content, delta.reasoning, read.calls + end.calls)
        return self._shown(delta)

    def _shown(self, delta: MessageDelta) -> MessageDelta:
        calls = tuple(call for call in delta.calls if call.index < self._format.most_calls)
        return MessageDelta(delta.content, delta.reasoning if self._format.shows_reasoning else "", calls)


def _reasoning_parser(form: MessageFormat) -> ReasoningParser | None:
    if form.reasoning is None:
        return None
    return ReasoningParser(form.reasoning, begins_inside=form.begins_inside)


def _call_parser(form: MessageFormat) -> ToolCallParser | None:
    new_id = id_maker(form.tool_call_parser)
    match form.reads_calls:
        case "named":
            return NamedParser(form.functions[0].name, new_id)
        case "required":
            return RequiredParser(form.functions, new_id)
        case "auto":
            assert form.tool_call_parser is not None, "nothing says how calls are written"
            return parser_class(form.tool_call_parser)(form.functions, new_id)
    return None
