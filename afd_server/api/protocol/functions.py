"""Tools in a body: the functions that a request offers, which of them the model may or must call, and calls of the past."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, StrictBool, StrictStr

from afd_server.api.protocol.fields import Body, Unused

MAX_TOOLS = 1024
MAX_CALLS = 1024  # of one message

FunctionName = Annotated[
    StrictStr, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x20<>\"'\[\]{}()]+$")
]


class FunctionTool(Body):
    """parameters: a JSON schema. strict: obeyed where the call is decoded under a constraint, see docs/tool-calling.md."""

    name: FunctionName
    description: StrictStr | None = None
    parameters: dict[StrictStr, Any] | None = None
    strict: StrictBool = False


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool


class CalledFunction(Body):
    name: StrictStr
    arguments: StrictStr = ""


class PastCall(Body):
    """A call that the assistant made. index: what client libraries leave of a stream."""

    id: StrictStr
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Unused = None


class _NamedFunction(Body):
    name: FunctionName


class NamedChoice(Body):
    """The function that the model must call."""

    type: Literal["function"] = "function"
    function: _NamedFunction


def _tool_choice(value: Any) -> Any:
    if value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict):
        if value.get("type", "function") != "function":
            raise ValueError(f"the type {value['type']!r} is not served")
        function = value.get("function")
        if isinstance(function, dict) and value.keys() <= {"type", "function"} and function.keys() == {"name"}:
            name = function["name"]
            if isinstance(name, str):
                return NamedChoice.model_construct(
                    type="function", function=_NamedFunction.model_construct(name=name)
                )
    raise ValueError('is "none", "auto", "required", or {"type": "function", "function": {"name": ...}}')


ToolChoice = Annotated[Any, PlainValidator(_tool_choice, Literal["none", "auto", "required"] | NamedChoice)]
