import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.text.message import WholeMessage
from afd_server.text.tool_calls.registry import PARSERS, parser_class
from tests.unit.text.tool_calls.written import FUNCTIONS, WRITERS

NAMES = ["get_weather", "now"]
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs", "Cc"]), st.sampled_from(list("\"'\\{}[]()<>/;,:=|`\n\t "))
    ),
    max_size=12,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-99, 99), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=4,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": TEXTS,
        "days": st.integers(),
        "exact": st.booleans(),
        "share": st.one_of(st.none(), st.floats(-9, 9)),
        "where": st.one_of(st.none(), st.dictionaries(TEXTS, JSON, max_size=2)),
        "tags": st.lists(TEXTS, max_size=2),
    },
)
CALLS = st.lists(
    st.one_of(st.tuples(st.just("get_weather"), ARGUMENTS), st.tuples(st.just("now"), st.just({}))),
    min_size=1,
    max_size=3,
)
# What texts are made of where something is amiss: parts of every format, in any order and cut anywhere.
PARTS = sorted(
    {mark for name in PARSERS for mark in parser_class(name).marks}
    | {
        "function", "get_weather", "now", "\n```json\n", "\n```", '{"name": "now", "arguments": {}}', '{"name": "now", ',
        '"arguments": {"city": "a', '", "days": 1}}', "[", "]", "{", "}", "(", ")", ",", ";", '"', "\\", "'", " ", "\n",
        "now()", "[now(), get_weather(city='a", '")', '<steptml:invoke name="now">', "</steptml:invoke>",
        '<steptml:parameter name="city">', "</steptml:parameter>", "<function=now>", "<parameter=city>", "</parameter>",
        "</function>", "Hello", "<", "[TOOL", "_CALLS]", "｜>",
    }
)  # fmt: skip
BROKEN = st.lists(st.one_of(st.sampled_from(PARTS), TEXTS), max_size=12).map("".join)


def pieces_of(text, cuts):
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def parse(name, pieces):
    parser = parser_class(name)(FUNCTIONS)
    return WholeMessage.of([*(parser.feed(piece) for piece in pieces), parser.finish()])


def without_ids(message):
    return message.content, [(call.name, call.arguments) for call in message.calls]


CUTS = st.one_of(st.just(list(range(2000))), st.lists(st.integers(0, 2000), max_size=6))


def fits(name, calls):
    """A format without escapes cannot carry its own tags, nor new lines at the ends that it takes for its own."""
    texts = [value for _, arguments in calls for value in arguments.values() if isinstance(value, str)]
    return name not in ("step3", "qwen3_coder") or not any("</" in text for text in texts)


@pytest.mark.parametrize("form", WRITERS)
@settings(deadline=None, max_examples=25)
@given(calls=CALLS, before=TEXTS, after=TEXTS, cuts=CUTS)
def test_what_was_written_is_read_however_it_is_cut(form, calls, before, after, cuts):
    name, write, after_content = WRITERS[form]
    before = before.replace("<", "").replace("[", "").strip() if after_content else ""
    after = after.replace("<", "").replace("[", "").strip(" \n\t,;]`") if after_content else ""
    if not fits(name, calls) or (before[:1] in ("{", "[") and name in ("llama3_json", "pythonic")):
        return
    text = before + write(calls) + ("\n" + after if after.strip() == after else "")
    message = parse(name, pieces_of(text, cuts))
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == calls
    assert message.content == before + (after if after.strip() == after else "")


@pytest.mark.parametrize("name", PARSERS)
@settings(deadline=None, max_examples=30)
@given(text=BROKEN, cuts=CUTS)
def test_the_cuts_change_nothing_whatever_the_text_is(name, text, cuts):
    assert without_ids(parse(name, pieces_of(text, cuts))) == without_ids(parse(name, [text]))


@pytest.mark.parametrize("name", PARSERS)
@settings(deadline=None, max_examples=30)
@given(text=BROKEN)
def test_a_text_without_a_call_is_content_to_the_last_character(name, text):
    message = parse(name, [text])
    if not message.calls:
        assert message.content == text


@pytest.mark.parametrize("form", WRITERS)
@settings(deadline=None, max_examples=15)
@given(calls=CALLS, length=st.integers(0, 400))
def test_a_text_that_is_cut_off_loses_nothing(form, calls, length):
    """What came of a call stays a beginning of it, and what came before the call is content."""
    name, write, _ = WRITERS[form]
    if not fits(name, calls):
        return
    whole, part = parse(name, [write(calls)]), parse(name, [write(calls)[:length]])
    assert len(part.calls) <= len(whole.calls)
    for cut, call in zip(part.calls, whole.calls, strict=False):
        assert cut.name == call.name
    for cut, call in list(zip(part.calls, whole.calls, strict=False))[:-1]:
        assert cut.arguments == call.arguments
    if not part.calls:
        assert part.content == write(calls)[:length]


@pytest.mark.parametrize("form", WRITERS)
def test_ids_are_unique_and_as_the_models_want_them(form):
    name, write, _ = WRITERS[form]
    calls = parse(name, [write([("now", {})] * 3)]).calls
    assert len({call.id for call in calls}) == 3


@pytest.mark.parametrize("form", WRITERS)
def test_arguments_come_before_they_are_complete(form):
    name, write, _ = WRITERS[form]
    text = write([("get_weather", {"city": "Paris", "tags": ["a" * 50]})])
    parser = parser_class(name)(FUNCTIONS)
    begun = [bool(parser.feed(character).calls) for character in text]
    if "pythonic" not in name:  # a call of Python is read whole
        assert begun.count(True) > 2
    assert begun.index(True) < text.index("]", text.index("aaa")) + 2
