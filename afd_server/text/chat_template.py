"""The chat template of a model: from messages to the prompt that the model was trained on.

What lives here: jinja2 in a sandbox, with the environment that transformers documents for chat templates
(huggingface.co/docs/transformers/chat_templating_writing). What does not: which messages a client may send (api/).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from afd_server.errors import ModelError, RequestError
from afd_server.text.bounded_jinja import BoundedEnvironment, counted_from_now
from afd_server.text.tokenizer import read_tokenizer_config

MAX_TEMPLATE_CHARACTERS = 1_000_000


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Rendering keeps no state."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        """Raises ModelError when `source` is not a jinja2 template."""
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, TypeError) as error:
            # The last three: what jinja2 made of it is not Python. It takes some nonsense for sense.
            raise ModelError(f"the chat template cannot be read: {error}") from error
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, directory: Path | str, special_tokens: Mapping[str, Any]) -> ChatTemplate | None:
        """From `chat_template.jinja` or tokenizer_config.json's chat_template; None for a model that has none."""
        file = Path(directory) / "chat_template.jinja"
        source: Any = (
            _read(file) if file.is_file() else read_tokenizer_config(Path(directory)).get("chat_template")
        )
        if isinstance(source, list):  # several, by name
            source = _default_of(source, f"{directory}")
        if source is None:
            return None
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ModelError(
                f"{directory}: the chat template is no text of at most {MAX_TEMPLATE_CHARACTERS} characters"
            )
        try:
            return cls(source, special_tokens)
        except ModelError as error:
            raise ModelError(f"{directory}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens written out. messages: role, content and whatever else the template names.

        continue_final_message: the prompt stops right after the last message's content, so that it is continued.
        variables: more names for the template. Raises RequestError when the template refuses the messages.
        """
        chat = [dict(message) for message in messages]
        # An end that no template rewrites and no client can guess tells where the last message stops.
        mark = f"<{secrets.token_hex(16)}>"
        if continue_final_message:
            chat[-1]["content"] = f"{chat[-1].get('content') or ''}{mark}"
        names = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        names |= {"messages": chat, "add_generation_prompt": add_generation_prompt}
        counted_from_now()
        try:
            prompt = self._template.render(names)
        except Exception as error:  # a template is a program: it may fail in any way
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        if not continue_final_message:
            return prompt
        before, found, _ = prompt.rpartition(mark)
        if not found:
            raise RequestError(
                "the model's chat template does not show the last message, so it cannot be continued",
                "continue_final_message",
            )
        return before


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(MAX_TEMPLATE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error


def _default_of(templates: list[Any], where: str) -> Any:
    try:
        named = {str(entry["name"]): entry["template"] for entry in templates}
    except (TypeError, KeyError) as error:
        raise ModelError(f"{where}: chat_template is not a list of names and templates") from error
    if "default" not in named:
        raise ModelError(f"{where}: no chat template is named 'default', only {', '.join(named)}")
    return named["default"]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
