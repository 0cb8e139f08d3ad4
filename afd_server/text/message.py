"""What a model's answer consists of beside its text: reasoning and tool calls, whole and in pieces.

What lives here: the data. What does not: how they are found in the text (reasoning.py, tool_calls/), OpenAI's JSON (api/).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Function:
    """A tool that a request offers. parameters: a JSON schema of its arguments."""

    name: str
    parameters: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of the tool call `index`: its id and name when it begins, then its arguments' JSON text piece by piece."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """What a piece of text adds to a message."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


@dataclass(slots=True)
class ToolCall:
    """arguments: JSON text, as far as the model wrote it right and to its end."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class WholeMessage:
    """All deltas of one choice together."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, deltas: Iterable[MessageDelta]) -> WholeMessage:
        message = cls()
        for delta in deltas:
            message.content += delta.content
            message.reasoning += delta.reasoning
            for call in delta.calls:
                if call.name is not None and call.id is not None:
                    message.calls.append(ToolCall(call.id, call.name))
                message.calls[call.index].arguments += call.arguments
        return message
