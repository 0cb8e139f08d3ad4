"""From a body's words on its output's form to a constraint that the workers will be able to follow, or a refusal.

What lives here: which field asks for what, that a schema or grammar is compiled once before a worker hears of it, and the
place in it that is wrong. What does not: making grammars (text/constraints.py), and following them (attention/).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.api.protocol.generation import GenerationFields
from afd_server.api.protocol.structure import ResponseFormat, StructuralTag, StructuredOutputs
from afd_server.errors import RequestError
from afd_server.text import constraints
from afd_server.text.constrained_reasoning import after_reasoning
from afd_server.text.constraints import Schema
from afd_server.text.message_parser import MessageFormat
from afd_server.text.tokenizer import Tokenizer
from afd_server.text.tool_calls.forced_schema import forced_schema

# Compiling as much takes up to about half a second.
MAX_CONSTRAINT_CHARACTERS = 128 * 1024
# Every choice carries its constraint to the worker.
MAX_CONSTRAINT_CHARACTERS_IN_ALL = 4 * 2**20
# Constraints that are known to be sound, and not compiled again here.
MAX_SOUND = 1024
# Between the parts of a call's JSON: models like to go on with white space for ever where they may.
WHITE_SPACE_OF_CALLS = " ?"
ANY_OBJECT: Schema = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a field asks for. make: raises ValueError. schema: where there is one to look for the place of a mistake in."""

    field: str
    make: Callable[[], str]
    schema: Schema | None = None


class ConstraintCheck:
    """Makes and checks the constraints of one model's requests, on one thread beside the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = tokenizer.added_special_tokens
        self._vocabulary = constraints.byte_vocabulary(tokenizer)
        self._sound: OrderedDict[bytes, None] = OrderedDict()  # by digest: a text may be long
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="check-grammar")

    async def of_body(self, body: GenerationFields, num_choices: int) -> str | None:
        """What each of the body's choices must follow; None leaves them free. Raises RequestError that names the field."""
        wanted = self._wanted(body.response_format, body.structured_outputs)
        return None if wanted is None else await self.checked(wanted, num_choices)

    async def of_chat(self, body: ChatCompletionRequest, form: MessageFormat) -> str | None:
        """The same for a chat, where the choice among tools may ask for a form, too. What is thought before it stays free."""
        constraint = await self.of_body(body, body.n)
        if form.must_call:
            if constraint is not None:
                raise RequestError(
                    "tool_choice: asks for calls, and another field for another form of output", "tool_choice"
                )
            constraint = await self._calls(body, form)
        return None if constraint is None else after_reasoning(constraint, form, self._tokenizer)

    async def _calls(self, body: ChatCompletionRequest, form: MessageFormat) -> str:
        try:
            constraint = _calls(forced_schema(form))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"tools: {error}", "tools") from error
        try:
            return await self.checked(Wanted("tools", lambda: constraint), body.n)
        except RequestError:
            if len(constraint) <= MAX_CONSTRAINT_CHARACTERS:
                await self._check_each(body, {function.name for function in form.functions})
            raise

    async def _check_each(self, body: ChatCompletionRequest, called: Collection[str]) -> None:
        """Raises RequestError for the first tool whose schema is wrong by itself."""
        for at, tool in enumerate(body.tools):
            schema = tool.function.parameters or {}
            if tool.function.name in called:
                wanted = Wanted(f"tools.{at}.function.parameters", partial(_calls, schema), schema)
                await self.checked(wanted, 1)

    async def checked(self, wanted: Wanted, num_choices: int) -> str:
        """The constraint, which has been compiled. Raises RequestError that says what is wrong with it, and where."""
        try:
            constraint = wanted.make()
        except (ValueError, RecursionError) as error:
            raise self._refusal(wanted, str(error)) from error
        length = len(constraint)
        if length > MAX_CONSTRAINT_CHARACTERS or length * num_choices > MAX_CONSTRAINT_CHARACTERS_IN_ALL:
            raise self._refusal(
                wanted,
                f"{length} characters for each of {num_choices} choices; at most {MAX_CONSTRAINT_CHARACTERS}, "
                f"and {MAX_CONSTRAINT_CHARACTERS_IN_ALL} in all",
            )
        digest = hashlib.blake2b(constraint.encode(errors="surrogatepass"), digest_size=16).digest()
        if digest not in self._sound:
            problem, place = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._problem, constraint, wanted.schema
            )
            if problem:
                raise self._refusal(wanted, problem, place)
            self._sound[digest] = None
            if len(self._sound) > MAX_SOUND:
                self._sound.popitem(last=False)
        return constraint

    def _problem(self, constraint: str, schema: Schema | None) -> tuple[str, list[str]]:
        problem = constraints.problem(constraint, self._vocabulary)
        if not problem or schema is None:
            return problem, []
        return problem, constraints.place_of_problem(schema, problem, self._vocabulary)

    def _refusal(self, wanted: Wanted, problem: str, place: list[str] | None = None) -> RequestError:
        where = ".".join([wanted.field, *(place or ())])
        return RequestError(f"{where}: {problem.strip()}", wanted.field)

    def _wanted(self, given: ResponseFormat | None, more: StructuredOutputs | None) -> Wanted | None:
        by_format = None if given is None else self._by_format(given)
        if more is None:
            return by_format
        if by_format is not None:
            raise RequestError(
                "structured_outputs: response_format asks for a form already", "structured_outputs"
            )
        return self._by_kind(more)

    def _by_format(self, given: ResponseFormat) -> Wanted | None:
        if given.type == "text":
            return None
        if given.type == "json_object":
            return Wanted("response_format", lambda: constraints.from_json_schema(ANY_OBJECT))
        if given.type == "json_schema":
            if given.json_schema is None:
                raise RequestError(
                    "response_format.json_schema: the field is required", "response_format.json_schema"
                )
            schema = given.json_schema.schema_
            return Wanted(
                "response_format.json_schema.schema", lambda: constraints.from_json_schema(schema), schema
            )
        if given.structures is None or given.triggers is None:
            missing = "response_format.structures" if given.structures is None else "response_format.triggers"
            raise RequestError(f"{missing}: the field is required", missing)
        tag = StructuralTag.model_construct(structures=given.structures, triggers=given.triggers)
        return self._by_tag("response_format", tag)

    def _by_kind(self, given: StructuredOutputs) -> Wanted:
        kinds = given.kinds
        if len(kinds) != 1:
            several = " and ".join(kinds) or "none"
            raise RequestError(
                "structured_outputs: exactly one of json, regex, choice, grammar, json_object and structural_tag is to be "
                f"given, not {several}",
                "structured_outputs",
            )
        (kind,) = kinds
        field = f"structured_outputs.{kind}"
        if kind in ("json", "json_object"):
            schema = ANY_OBJECT if given.json_ is None else given.json_
            return Wanted(
                field,
                lambda: constraints.from_json_schema(
                    schema,
                    any_whitespace=not given.disable_any_whitespace,
                    whitespace_pattern=given.whitespace_pattern,
                    additional_properties=not given.disable_additional_properties,
                ),
                schema,
            )
        if given.structural_tag is not None:
            return self._by_tag(field, given.structural_tag)
        makers: dict[str, Callable[[], str]] = {
            "regex": lambda: constraints.from_regex(given.regex or ""),
            "choice": lambda: constraints.from_choices(given.choice or ()),
            "grammar": lambda: constraints.from_grammar(given.grammar or ""),
        }
        return Wanted(field, makers[kind])

    def _by_tag(self, field: str, tag: StructuralTag) -> Wanted:
        parts = [(each.begin, each.schema_, each.end) for each in tag.structures]
        return Wanted(
            field, lambda: constraints.from_structural_tags(parts, tag.triggers, self._special_tokens)
        )


def _calls(schema: Schema) -> str:
    """Functions get no arguments that they do not know, unless they say that they take them."""
    return constraints.from_json_schema(
        schema, whitespace_pattern=WHITE_SPACE_OF_CALLS, additional_properties=False
    )
