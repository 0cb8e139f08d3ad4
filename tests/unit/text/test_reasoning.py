import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.text.message import WholeMessage
from afd_server.text.reasoning import FORMATS, ReasoningParser, format_of
from tests.unit.text.tool_calls.test_formats import CUTS, pieces_of

TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "\n", " ", "<", "/think>", "a", "ö"]),
    max_size=10,
).map("".join)


def parse(name, text, prompt="", pieces=None):
    form = FORMATS[name]
    parser = ReasoningParser(form, begins_inside=form.begins_inside(prompt))
    message = WholeMessage.of([*(parser.feed(piece) for piece in pieces or [text]), parser.finish()])
    return message.reasoning, message.content


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("qwen3", "", "<think>\nhm\n</think>\n\nHi\n", ("hm", "Hi\n")),
        ("qwen3", "<think>\n", "hm\n\nso\n</think>\n\nHi", ("hm\n\nso", "Hi")),
        ("qwen3", "<think>", "<think>\nhm</think>Hi", ("hm", "Hi")),  # opened twice
        ("qwen3", "<think>\n\n</think>\n\n", "Hi", ("", "Hi")),
        ("qwen3", "", "Hi </think> <think>", ("", "Hi </think> <think>")),
        ("qwen3", "", "  Hi", ("", "  Hi")),
        ("qwen3", "<think>", "cut off\n", ("cut off\n", "")),
        ("qwen3", "<think>", "a </think> b </think>", ("a ", " b </think>")),
        ("deepseek_r1", "", "hm</think>Hi", ("hm", "Hi")),
        ("deepseek_r1", "</think>", "Hi", ("", "Hi")),
        ("deepseek_v3", "</think>", "Hi", ("", "Hi")),
        ("deepseek_v3", "", "Hi", ("", "Hi")),
        ("step3", "<think>\n", "hm\n</think>\n\nHi", ("hm", "Hi")),
        ("mistral", "", "[THINK]hm[/THINK]Hi", ("hm", "Hi")),
    ],
)
def test_what_is_reasoning(name, prompt, text, expected):
    assert parse(name, text, prompt) == expected


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(FORMATS)), st.sampled_from(["", "<think>", "</think>"]), TEXTS, CUTS)
def test_the_cuts_change_nothing(name, prompt, text, cuts):
    assert parse(name, text, prompt, pieces_of(text, cuts)) == parse(name, text, prompt)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(FORMATS)), st.sampled_from(["", "<think>", "</think>"]), TEXTS)
def test_nothing_is_lost_but_marks_and_the_lines_beside_them(name, prompt, text):
    form = FORMATS[name]
    reasoning, content = parse(name, text, prompt)
    kept = reasoning + content
    if form.opening not in text and form.closing not in text and not form.begins_inside(prompt):
        assert content == text
    letters = [character for character in kept if character in "aö "]
    assert letters == [character for character in text if character in "aö "] or form.opening in text


def test_reasoning_is_handed_out_as_it_comes():
    parser = ReasoningParser(FORMATS["qwen3"], begins_inside=True)
    assert [parser.feed(piece).reasoning for piece in ("a", " b", "\n", "c<", "/x")] == [
        "a",
        " b",
        "",
        "\nc",
        "</x",
    ]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ messages }}", None),
        ("{% if enable_thinking %}<think></think>{% endif %}", "qwen3"),
        ("<｜Assistant｜>{{ content.split('</think>') }}", "deepseek_r1"),
        ("<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}", "deepseek_v3"),
        ("<think></think><steptml:invoke", "step3"),
        ("[THINK][/THINK]", "mistral"),
    ],
)
def test_which_format_a_template_is_written_for(source, name):
    assert format_of(source) == name
