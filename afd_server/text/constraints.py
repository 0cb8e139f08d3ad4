"""What an output must follow, as a grammar of llguidance: from a JSON schema, a regular expression, choices or a grammar.

What lives here: the grammars' text, which is all that travels to a worker; what is wrong with one, and where; the
vocabulary over which llguidance runs them. What does not: running them (attention/constraints.py) and the fields that
clients give them in (api/).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import llguidance
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag

from afd_server.errors import ModelError
from afd_server.text.tokenizer import Tokenizer

# What compiling a grammar and finding the next tokens may cost, in llguidance's units: its defaults, made explicit.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
# Schemas are compiled one by one to find the one that is wrong, as long as they are no longer together.
MAX_SEARCHED_CHARACTERS = 2**19
# Where a schema holds others: by name, in a list, or one alone.
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
IN_LIST = ("anyOf", "allOf", "oneOf", "prefixItems")
ALONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")

Schema = Mapping[str, Any] | bool


def from_json_schema(
    schema: Schema,
    *,
    any_whitespace: bool = True,
    whitespace_pattern: str | None = None,
    additional_properties: bool = True,
) -> str:
    """JSON that is valid against the schema. Raises ValueError for what is no schema at all.

    any_whitespace: between the parts, else none; whitespace_pattern: a regular expression for it instead.
    additional_properties: whether objects that list their properties may have others where the schema leaves it open.
    """
    if isinstance(schema, bool):  # options are put into an object
        if not schema:
            return LLMatcher.grammar_from_json_schema("false")
        schema = {}
    options: dict[str, Any] = {"whitespace_flexible": any_whitespace}
    if whitespace_pattern is not None:
        options["whitespace_pattern"] = whitespace_pattern
    text = json.dumps(schema if additional_properties else _closed(schema))
    return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def from_regex(pattern: str) -> str:
    """Text that matches the whole of a regular expression."""
    return LLMatcher.grammar_from_regex(pattern)


def from_choices(choices: Sequence[str]) -> str:
    """One of these texts."""
    # As one terminal they are an automaton, as rules each would be a row of the parser's.
    return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices)))


def from_grammar(text: str) -> str:
    """Text of a grammar in Lark's notation, as llguidance extends it, or in GBNF (`root ::= ...`). Raises ValueError."""
    return llguidance.grammar_from("grammar", text)


def from_structural_tags(
    structures: Sequence[tuple[str, Schema, str]], triggers: Sequence[str], special_tokens: Collection[str]
) -> str:
    """Free text, in which whatever begins with a trigger is one of the structures: (its begin, a JSON schema, its end).
    Raises ValueError."""
    tags = []
    for begin, schema, end in structures:
        trigger = next((each for each in triggers if begin.startswith(each)), None)
        if trigger is None:
            raise ValueError(f"no trigger begins {begin!r}")
        if isinstance(schema, bool):
            raise ValueError("the schema of a structure is an object")
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=dict(schema), end=end))
    # A special token is a symbol of its own: its text does not stand for it.
    special = any(tag.trigger in special_tokens for tag in tags)
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=special))


def problem(constraint: str, vocabulary: LLTokenizer) -> str:
    """What is wrong with a constraint, in llguidance's words; "" when it can be followed. Lets other threads run."""
    matcher = LLMatcher(vocabulary, constraint, log_level=0, limits=LIMITS)
    allowed = int.from_bytes(matcher.compute_bitmask(), "little")
    if allowed and not matcher.is_stopped():  # some are too complex right behind their beginning
        matcher.consume_token((allowed & -allowed).bit_length() - 1)
        matcher.compute_bitmask()
    return error_of(matcher)


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher can go on no more; "" when it can."""
    return matcher.get_error().removesuffix("<non-verbose/>").strip()


def place_of_problem(schema: Schema, message: str, vocabulary: LLTokenizer) -> list[str]:
    """The path to the innermost schema in which compiling ends with this message; [] when only the whole does."""
    num_characters = 0
    place: list[str] = []
    shared = {} if isinstance(schema, bool) else {name: schema[name] for name in ("$defs", "definitions") if name in schema}  # fmt: skip
    found: Schema | None = schema
    while found is not None and not isinstance(found, bool):
        outer, found = found, None
        for path, inner in _inner(outer):
            constraint = _alone(inner, shared)
            num_characters += len(constraint)
            if num_characters > MAX_SEARCHED_CHARACTERS:
                return place
            if problem(constraint, vocabulary) == message:
                place, found = [*place, *path], inner
                break
    return place


def _alone(schema: Schema, shared: Mapping[str, Any]) -> str:
    """The constraint of a schema that is a part of another one; "" where it is none."""
    try:
        return from_json_schema(schema if isinstance(schema, bool) else {**shared, **schema})
    except ValueError:
        return ""


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[list[str], Schema]]:
    for keyword, value in schema.items():
        if keyword in BY_NAME and isinstance(value, Mapping):
            yield from (([keyword, name], inner) for name, inner in value.items() if _is_schema(inner))
        elif keyword in IN_LIST and isinstance(value, list):
            yield from (([keyword, str(at)], inner) for at, inner in enumerate(value) if _is_schema(inner))
        elif keyword in ALONE and _is_schema(value):
            yield [keyword], value


def _is_schema(value: Any) -> bool:
    return isinstance(value, Mapping | bool)


def _closed(value: Any) -> Any:
    """The schema, in which an object that lists its properties has no others unless it says so."""
    if isinstance(value, list):
        return list(map(_closed, value))
    if not isinstance(value, Mapping):
        return value
    closed = {name: _closed(inner) for name, inner in value.items()}
    if isinstance(value.get("properties"), Mapping):
        closed.setdefault("additionalProperties", False)
    return closed


def load_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The model's tokens, for running grammars. Raises ModelError for a model whose outputs cannot be constrained.

    Takes some 0.2 s for 50,000 tokens, and holds up every other thread of this process meanwhile.
    """
    ends = [token_id for token_id in eos_token_ids if token_id < tokenizer.vocab_size]
    if not ends:
        raise ModelError("the model has no token that ends an output")
    size = max(vocab_size, tokenizer.vocab_size)
    try:
        return LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=ends)
    except ValueError as error:
        raise ModelError(f"llguidance cannot read the tokenizer: {error}") from error


class _Bytes:
    """A vocabulary of single bytes and some special tokens, in the form that llguidance asks for."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        specials = ["<|end|>", *(token for token in special_tokens if token != "<|end|>")]
        self.tokens = [*(bytes([byte]) for byte in range(256)), *(token.encode() for token in specials)]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id, self.bos_token_id = 256, None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def byte_vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """Single bytes and the model's special tokens: enough to tell whether a grammar can be compiled, and made in no time."""
    return LLTokenizer(llguidance.TokenizerWrapper(_Bytes(tokenizer.added_special_tokens)), slices=[])
