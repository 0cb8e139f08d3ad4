"""What a body may ask of its output's form: OpenAI's `response_format` and vLLM's `structured_outputs`.

What does not live here: whether a schema or grammar can be followed (api/constraints.py).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictStr, ValidationInfo

from afd_server.api.protocol.fields import FIRST, Body, NotServed, Refusal, Unused

# vLLM had these once; what each is called now.
GONE = {
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
    "structural_tag": "structured_outputs.structural_tag",
}


class _Gone(Refusal):
    """Marks a field that is not served any more under this name."""

    def check(self, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            instead = GONE.get(info.field_name or "")
            remedy = f"use {instead}" if instead else "there is one backend"
            raise ValueError(f"{info.field_name} is no longer a field: {remedy}")
        return value

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "null"}


def _schema(value: Any) -> Any:
    """A schema may come as the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(value, dict | bool):
        raise ValueError("a JSON schema is an object or a boolean")
    return value


Gone = Annotated[Any, _Gone()]
JSONSchema = Annotated[dict[str, Any] | bool, BeforeValidator(_schema)]
Text = Annotated[StrictStr, Field(min_length=1)]


class NamedSchema(Body):
    name: StrictStr
    schema_: JSONSchema = Field(alias="schema")
    description: Unused = None
    strict: Unused = Field(default=None, description="accepted; the schema is always kept to")


class Structure(Body):
    """A part of the output that begins and ends with these words, and follows the schema in between."""

    begin: Text
    schema_: JSONSchema = Field(alias="schema")
    end: StrictStr


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    structures: Annotated[list[Structure], FIRST, Field(min_length=1)] | None = None
    triggers: Annotated[list[Text], FIRST, Field(min_length=1)] | None = None
    format: NotServed = None


class StructuralTag(Body):
    """`response_format` of that type, as vLLM takes it in `structured_outputs`."""

    type: Literal["structural_tag"] = "structural_tag"
    structures: Annotated[list[Structure], FIRST, Field(min_length=1)]
    triggers: Annotated[list[Text], FIRST, Field(min_length=1)]
    format: NotServed = None


def _from_text(value: Any) -> Any:
    return _schema(value) if isinstance(value, str) else value


class StructuredOutputs(Body):
    """Exactly one of the first six."""

    json_: JSONSchema | None = Field(default=None, alias="json")
    regex: StrictStr | None = None
    choice: Annotated[list[StrictStr], FIRST, Field(min_length=1)] | None = None
    grammar: Text | None = None
    json_object: StrictBool = False
    structural_tag: Annotated[StructuralTag, BeforeValidator(_from_text)] | None = None
    whitespace_pattern: StrictStr | None = None
    disable_any_whitespace: StrictBool = False
    disable_additional_properties: StrictBool = False
    disable_fallback: Unused = Field(default=None, description="accepted; there is one backend")

    @property
    def kinds(self) -> list[str]:
        """Which of the six are given."""
        names = ("regex", "choice", "grammar", "json_object", "structural_tag")
        given = [name for name in names if getattr(self, name) not in (None, False)]
        return ["json", *given] if self.json_ is not None else given
