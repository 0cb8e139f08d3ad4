"""What a model writes that cannot but call: a list of calls, or the arguments of one function, and nothing else.

The form is no model's own; decoding is constrained to it (forced_schema.py). vLLM has the same.
"""

from __future__ import annotations

from collections.abc import Callable

from afd_server.text.growing_text import Steps
from afd_server.text.tool_calls.json_text import read_call_object, read_container
from afd_server.text.tool_calls.parser import ToolCallParser, call_id


class RequiredParser(ToolCallParser):
    """`[{"name": ..., "parameters": {...}}, ...]`."""

    def _read(self) -> Steps[None]:
        yield from self._attempt(self._read_list())
        yield from self._read_content(())

    def _read_list(self) -> Steps[None]:
        text = self._text
        yield from text.space()
        if (yield from text.accept("[")):
            yield from text.space()
            yield from self._read_several(lambda: read_call_object(text, self._begin, self._argue), ",")
            yield from text.space()
            yield from text.accept("]")


class NamedParser(ToolCallParser):
    """The arguments of `name`."""

    def __init__(self, name: str, new_id: Callable[[], str] = call_id) -> None:
        super().__init__(new_id=new_id)
        self._name = name

    def _read(self) -> Steps[None]:
        yield from self._text.space()
        self._begin(self._name)
        if (yield from self._text.comes("{")):
            yield from read_container(self._text, self._argue)
        yield from self._read_content(())
