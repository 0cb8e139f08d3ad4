"""What every body has in common: unknown fields are refused, null means the default.

What lives here: the base of all bodies and the kinds of fields that are refused or change nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)


def finite(**bounds: Any) -> Any:
    return Field(strict=True, allow_inf_nan=False, **bounds)


def refuse(value: Any, info: ValidationInfo) -> Any:
    """Passes what asks for nothing: null, false, 0, empty."""
    if value:
        raise ValueError(f"{info.field_name} is not served")
    return value


def refuse_except(*harmless: Any) -> AfterValidator:
    def check(value: Any, info: ValidationInfo) -> Any:
        return value if value in harmless else refuse(value, info)

    return AfterValidator(check)


# Of every list, the first mistake is enough: explaining each of a million would hold up the event loop for seconds.
FIRST = Field(fail_fast=True)
NotServed = Annotated[Any, AfterValidator(refuse)]
Unused = Annotated[Any, Field(description="accepted; changes nothing")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

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
