"""The chat template of a model: from messages to the prompt that the model was trained on.

What lives here: jinja2 in a sandbox, with the environment that transformers documents for chat templates
(huggingface.co/docs/transformers/chat_templating_writing). What does not: which messages a client may send (api/).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from afd_server.errors import ConfigError, ModelError, RequestError
from afd_server.text.bounded_jinja import BoundedEnvironment, counted_from_now
from afd_server.text.tokenizer import read_tokenizer_config

MAX_TEMPLATE_CHARACTERS = 1_000_000


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


PROBE = "f_probe"
PROBED_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {"name": PROBE, "description": "", "parameters": {"type": "object"}},
}


class ChatTemplate:
    """A compiled template. Rendering keeps no state. names: what it takes from outside, besides its environment's functions."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, Any] | None = None,
        tool_use: ChatTemplate | None = None,
    ) -> None:
        """tool_use: takes its place where there are tools. Raises ModelError when `source` is not a jinja2 template."""
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
            self.names = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, TypeError) as error:
            # The last three: what jinja2 made of it is not Python. It takes some nonsense for sense.
            raise ModelError(f"the chat template cannot be read: {error}") from error
        self._special_tokens = dict(special_tokens or {})
        self._tool_use = tool_use
        self.source: str = source if tool_use is None else f"{source}\n{tool_use.source}"

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the prompt tells the model of the tools that a request offers."""
        try:
            prompt = self.render([{"role": "user", "content": "?"}], tools=[PROBED_TOOL])
        except RequestError:
            return False
        return PROBE in prompt

    @cached_property
    def wants_arguments_as_text(self) -> bool:
        """Whether a past call's arguments are joined to the prompt as they are. Most templates write an object as JSON."""
        return not self._renders_call({"a": 1}) and self._renders_call('{"a": 1}')

    def _renders_call(self, arguments: Any) -> bool:
        call = {"id": "a" * 9, "type": "function", "function": {"name": PROBE, "arguments": arguments}}
        chat: list[Mapping[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": call["id"], "name": PROBE},
        ]
        try:
            self.render(chat, tools=[PROBED_TOOL])
        except RequestError:
            return False
        return True

    @classmethod
    def load(cls, directory: Path | str, special_tokens: Mapping[str, Any]) -> ChatTemplate | None:
        """From `chat_template.jinja` or tokenizer_config.json's chat_template; None for a model that has none."""
        file = Path(directory) / "chat_template.jinja"
        source: Any = (
            _read(file) if file.is_file() else read_tokenizer_config(Path(directory)).get("chat_template")
        )
        if source is None:
            return None
        named = _named(source, f"{directory}") if isinstance(source, list) else {"default": source}
        if "default" not in named:
            raise ModelError(f"{directory}: no chat template is named 'default', only {', '.join(named)}")
        for each in named.values():
            if not isinstance(each, str) or len(each) > MAX_TEMPLATE_CHARACTERS:
                raise ModelError(
                    f"{directory}: the chat template is no text of at most {MAX_TEMPLATE_CHARACTERS} characters"
                )
        try:
            tool_use = cls(named["tool_use"], special_tokens) if "tool_use" in named else None
            return cls(named["default"], special_tokens, tool_use)
        except ModelError as error:
            raise ModelError(f"{directory}: {error}") from error

    @classmethod
    def given(cls, template: str, special_tokens: Mapping[str, Any]) -> ChatTemplate:
        """As --chat-template has it: a file's name, or the template itself. Raises ConfigError."""
        is_source = "{" in template
        try:
            source = template if is_source else _read(Path(template))
            if len(source) > MAX_TEMPLATE_CHARACTERS:
                raise ModelError(f"the chat template has more than {MAX_TEMPLATE_CHARACTERS} characters")
            return cls(source, special_tokens)
        except ModelError as error:
            raise ConfigError("--chat-template", str(error)) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens written out. messages: role, content and whatever else the template names.

        continue_final_message: the prompt stops right after the last message's content, so that it is continued.
        tools: what the model may call, in OpenAI's form. variables: more names for the template. Raises RequestError when the template refuses the messages.
        """
        if tools is not None and self._tool_use is not None:
            return self._tool_use.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                variables=variables,
            )
        chat = [dict(message) for message in messages]
        # An end that no template rewrites and no client can guess tells where the last message stops.
        mark = f"<{secrets.token_hex(16)}>"
        if continue_final_message:
            chat[-1]["content"] = f"{chat[-1].get('content') or ''}{mark}"
        names = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        names |= {"messages": chat, "add_generation_prompt": add_generation_prompt}
        if tools is not None:
            names["tools"] = list(tools)
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


def _named(templates: list[Any], where: str) -> dict[str, Any]:
    """Several templates by their names."""
    try:
        return {str(entry["name"]): entry["template"] for entry in templates}
    except (TypeError, KeyError) as error:
        raise ModelError(f"{where}: chat_template is not a list of names and templates") from error


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
