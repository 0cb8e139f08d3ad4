"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one after another.

Source: the chat templates of NousResearch/Hermes-2-Pro and of Qwen2.5 and Qwen3.
"""

from __future__ import annotations

from afd_server.text.growing_text import Steps
from afd_server.text.tool_calls.json_text import read_call_object
from afd_server.text.tool_calls.parser import MarkedParser


class HermesParser(MarkedParser):
    marks = ("<tool_call>", "</tool_call>")
    openings = ("<tool_call>",)

    def _read_call(self, mark: str) -> Steps[None]:
        yield from self._text.space()
        yield from read_call_object(self._text, self._begin, self._argue)
        yield from self._text.space()
        yield from self._text.accept("</tool_call>")
