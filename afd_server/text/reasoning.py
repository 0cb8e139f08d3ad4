"""What a model thinks before it answers, split off its text: `<think>...</think>answer`.

What lives here: the marks of each parser name of vLLM, and the parser. What does not: whether a request wants to see the
reasoning (api/), and tool calls, which are looked for in the rest only (tool_calls/). The new lines beside a mark belong
to the mark: chat templates write them there, and take them away when they show a message again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from afd_server.text.growing_text import Steps, TextParser, undecided
from afd_server.text.message import MessageDelta


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """assumed: a text that neither the prompt nor the model has opened is reasoning, until it is closed."""

    opening: str = "<think>"
    closing: str = "</think>"
    assumed: bool = False

    def begins_inside(self, prompt: str) -> bool:
        """Whether the output that follows `prompt` begins with reasoning, which it need not open itself."""
        end = prompt[-200:].rstrip()
        if end.endswith(self.opening):
            return True
        return self.assumed and not end.endswith(self.closing)

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.opening, self.closing)


# vLLM's names. In a template that lets a client choose (Qwen3, DeepSeek-V3.1), the end of the prompt tells what it chose.
FORMATS: Mapping[str, ReasoningFormat] = {
    "qwen3": ReasoningFormat(),
    "deepseek_v3": ReasoningFormat(),
    "deepseek_r1": ReasoningFormat(assumed=True),
    "step3": ReasoningFormat(assumed=True),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}

# (all that the template's source holds, name); the first that fits is taken.
SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("</think>", "<steptml:"), "step3"),
    (("</think>", "<｜Assistant｜>", "thinking"), "deepseek_v3"),
    (("</think>", "<｜Assistant｜>"), "deepseek_r1"),
    (("</think>",), "qwen3"),
    (("[/THINK]",), "mistral"),
)


def format_of(template_source: str) -> str | None:
    """The name of the format that a chat template shows its model, if it knows of reasoning."""
    for signs, name in SIGNS:
        if all(sign in template_source for sign in signs):
            return name
    return None


class ReasoningParser(TextParser):
    """One output's text in, reasoning and content out, whichever way it is cut into pieces."""

    def __init__(self, form: ReasoningFormat, *, begins_inside: bool) -> None:
        super().__init__()
        self._format = form
        self._inside = begins_inside
        self._content = self._reasoning = ""

    def _taken(self) -> MessageDelta:
        delta = MessageDelta(self._content, self._reasoning)
        self._content = self._reasoning = ""
        return delta

    def _read(self) -> Steps[None]:
        text = self._text
        text.hold()
        yield from text.space()
        opened = yield from text.accept(self._format.opening)
        if not opened:
            text.go_back()
        text.release()
        if opened or self._inside:
            yield from self._lines_end()
            yield from self._read_reasoning()
            yield from self._lines_end()
        while True:
            self._content += text.read(len(text.unread))
            if text.has_ended:
                return
            yield

    def _read_reasoning(self) -> Steps[None]:
        closing, text = self._format.closing, self._text
        while True:
            unread = text.unread
            at = unread.find(closing)
            if at >= 0:
                self._reasoning += text.read(at).rstrip("\n")
                text.read(len(closing))
                return
            if text.has_ended:
                self._reasoning += text.read(len(unread))
                return
            decided = unread[: len(unread) - undecided(unread, (closing,))].rstrip("\n")
            self._reasoning += text.read(len(decided))
            yield

    def _lines_end(self) -> Steps[None]:
        while (yield from self._text.accept("\n")):
            pass
