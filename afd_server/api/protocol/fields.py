"""What every body has in common: unknown fields are refused, null means the default.

What lives here: the base of all bodies and the kinds of fields that are refused or change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema


def finite(**bounds: Any) -> Any:
    return Field(strict=True, allow_inf_nan=False, **bounds)


# What asks for nothing, as a JSON schema says it.
NOTHING_JSON = (
    {"type": "null"},
    {"const": False},
    {"const": 0},
    {"const": ""},
    {"type": "array", "items": {}, "maxItems": 0},
    {"type": "object", "maxProperties": 0},
)


@dataclass(frozen=True)
class Refusal:
    """Marks a field that is not served. Passes what asks for nothing, and values that say what is done anyway."""

    harmless: tuple[Any, ...] = ()

    def check(self, value: Any, info: ValidationInfo) -> Any:
        if value and not any(_is_same(value, each) for each in self.harmless):
            raise ValueError(f"{info.field_name} is not served")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Of one type each: generators of clients make nothing of an enum of several."""
        return {"anyOf": [*NOTHING_JSON, *map(_json_of, self.harmless)]}


@dataclass(frozen=True)
class ChangesNothing:
    """Marks a field that is accepted and has no effect."""


def _is_same(value: Any, other: Any) -> bool:
    """As JSON sees it: true is not 1."""
    return bool(value == other) and isinstance(value, bool) is isinstance(other, bool)


def _json_of(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"type": "array", "items": {"enum": value}, "minItems": len(value), "maxItems": len(value)}
    return {"const": value}


def refuse_except(*harmless: Any) -> Refusal:
    return Refusal(harmless)


# Of every list, the first mistake is enough: explaining each of a million would hold up the event loop for seconds.
FIRST = Field(fail_fast=True)
NotServed = Annotated[Any, Refusal()]


def _whole(value: Any) -> Any:
    """1.0 is an integer for JSON schema, and for clients whose language has one kind of number."""
    return int(value) if type(value) is float and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # stands after the bounds, which else the JSON schema would not have
Unused = Annotated[Any, ChangesNothing(), Field(description="accepted; changes nothing")]


def _with_null(schema: dict[str, Any]) -> None:
    """Of a body's JSON schema: null stands for the default of every field that has one."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if (
            name in required
            or None in field.get("enum", ())
            or field.keys() <= {"title", "description", "default"}
        ):
            continue
        kinds = field.pop("anyOf", None)
        if kinds is None:
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            kinds, _ = [dict(field)], field.clear()
            field.update(about)
        field["anyOf"] = kinds if {"type": "null"} in kinds else [*kinds, {"type": "null"}]


class Body(BaseModel):
    # A text below a field says what the field means: docs/api.md and /openapi.json are made of them.
    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_extra=_with_null,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_the_default(cls, given: Any) -> Any:
        """Client libraries send null for what their user has not set. Of unknown fields the first is enough to refuse."""
        if not isinstance(given, dict):
            return given
        fields = _fields(cls)
        unknown = next((name for name in given if name not in fields), None)
        if unknown is not None:
            return {unknown: given[unknown]}
        return {name: value for name, value in given.items() if value is not None or fields[name]}


@cache
def _fields(body: type[Body]) -> dict[str, bool]:
    """Field, as clients call it -> whether it is required. A body may hold thousands of messages."""
    return {field.alias or name: field.is_required() for name, field in body.model_fields.items()}
