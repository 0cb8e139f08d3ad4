"""Contents made of parts, as OpenAI's Responses and Anthropic's Messages send them: their texts, and a refusal of the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, StrictStr


def text_of(*kinds: str) -> Callable[[Any], Any]:
    """A validator that makes one text of a list of parts of these types, one to a line. Anything else is left as it is."""

    def joined(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in kinds or not isinstance(part.get("text"), str):
                raise ValueError(f"only parts of type {' and '.join(kinds)} are served, not {kind or part!r}")
            texts.append(part["text"])
        return "\n".join(texts)

    return joined


class _Part(BaseModel):
    """For the document alone: what a part may hold besides is not looked at."""

    text: StrictStr


class TextPart(_Part):
    type: Literal["text"]


class ConversationPart(_Part):
    type: Literal["input_text", "output_text", "text"]


class ReasoningPart(_Part):
    type: Literal["reasoning_text"]


Text = Annotated[StrictStr, BeforeValidator(text_of("text"), StrictStr | list[TextPart])]
ConversationText = Annotated[
    StrictStr, BeforeValidator(text_of("input_text", "output_text", "text"), StrictStr | list[ConversationPart])
]
ReasoningText = Annotated[StrictStr, BeforeValidator(text_of("reasoning_text"), list[ReasoningPart])]


def by_type(kinds: Collection[str], default: str | None = None) -> Discriminator:
    """Tells the members of a union by their `type`; without one a member is of the default's."""

    def kind_of(value: Any) -> Any:
        kind = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", None)
        return kind if kind in kinds else None

    return Discriminator(
        kind_of,
        custom_error_type="unserved_type",
        custom_error_message=f"its type must be one of {', '.join(kinds)}",
    )
