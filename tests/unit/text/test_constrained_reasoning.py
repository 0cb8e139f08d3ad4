import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from afd_server.text.constrained_reasoning import after_reasoning
from afd_server.text.message_parser import MessageFormat
from afd_server.text.tokenizer import Tokenizer
from tests.unit.text.tiny_tokenizers import byte_level

BYTES = LLTokenizer("byte")
TOKENIZER = Tokenizer(byte_level())
SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
CONSTRAINTS = {
    "schema": (LLMatcher.grammar_from_json_schema(SCHEMA), '{"a": 1}'),
    "regex": (LLMatcher.grammar_from_regex("[a-c]+"), "abba"),
    "Lark": ('start: "yes" | "no"', "no"),
}


def follows(text, constraint, prompt, parser="qwen3"):
    form = MessageFormat(reasoning_parser=parser, prompt_tail=prompt)
    matcher = LLMatcher(BYTES, after_reasoning(constraint, form, TOKENIZER))
    assert not matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize(
    ("prompt", "before", "right"),
    [
        ("", "", True),
        ("", "<think>\nhm {</think>\n\n", True),
        ("", "hm</think>", False),
        ("", "<think>hm", False),
        ("<think>\n", "hm\n</think>", True),
        ("<think>\n", "</think>\n\n", True),
        ("<think>\n", "", False),  # still reasoning
        ("<think>\n\n</think>\n\n", "", True),
        ("<think>\n\n</think>\n\n", "<think></think>", False),
    ],
)
def test_reasoning_is_free_and_the_answer_is_bound(kind, prompt, before, right):
    constraint, answer = CONSTRAINTS[kind]
    assert follows(before + answer, constraint, prompt) == right
    assert not follows(before + "Hello", constraint, prompt)


def test_a_model_that_does_not_reason_is_bound_from_the_beginning():
    assert after_reasoning("start: /a/", MessageFormat(), TOKENIZER) == "start: /a/"


def test_marks_that_are_special_tokens():
    backend = byte_level()
    backend.add_special_tokens(["[THINK]", "[/THINK]"])
    form = MessageFormat(reasoning_parser="mistral")
    grammar = json.loads(after_reasoning("start: /a/", form, Tokenizer(backend)))["grammars"][0]["lark_grammar"]
    for token in ("[THINK]", "[/THINK]"):
        assert f"<[{backend.token_to_id(token)}]>" in grammar
