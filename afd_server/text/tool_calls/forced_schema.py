"""What a model may write that must call: calls of the request's functions by their schemas, and nothing else.

What lives here: the JSON schema of what forced.py reads. What does not: keeping a model to it (text/constraints.py, attention/).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afd_server.text.message import Function
from afd_server.text.message_parser import MessageFormat

MAX_DEPTH = 200  # of a function's schema


def forced_schema(form: MessageFormat) -> dict[str, Any]:
    """Of the output that must call. Raises ValueError for a function's schema that is too deep."""
    assert form.must_call
    if form.reads_calls == "named":
        return _arguments(form.functions[0])
    return _schema_of_calls(form.functions, one_call=form.most_calls == 1)


def _schema_of_calls(functions: Sequence[Function], *, one_call: bool) -> dict[str, Any]:
    """Each function's own schema stands under a name, and what it refers to within itself is found there."""
    schemas = {f"f{at}": _moved(_arguments(each), f"#/$defs/f{at}") for at, each in enumerate(functions)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "parameters": {"$ref": f"#/$defs/f{at}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for at, function in enumerate(functions)
    ]
    most = {"maxItems": 1} if one_call else {}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, "$defs": schemas}


def _arguments(function: Function) -> dict[str, Any]:
    """Arguments are an object, also where the schema leaves it open."""
    return {"type": "object", **function.parameters}


def _moved(schema: Any, root: str, depth: int = 0) -> Any:
    """The schema with its references, for a place below another root."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is more than {MAX_DEPTH} levels deep")
    if isinstance(schema, list):
        return [_moved(each, root, depth + 1) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: (
            f"{root}{value[1:]}"
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root, depth + 1)
        )
        for key, value in schema.items()
    }
