"""A chat template is a program of somebody else's: whatever it does, it ends soon, and in one of two ways."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.errors import ModelError, RequestError
from afd_server.text import bounded_jinja
from afd_server.text.chat_template import ChatTemplate
from tests.unit.text.test_chat_template import MESSAGES

TOO_MUCH = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n < 60 %}{{ f(n+1) }}{{ f(n+1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}",
    "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
    "{% set x = namespace(s='a' * 9) %}{% for i in range(60) %}{% set x.s = x.s|replace('a', 'a' * 99) %}{% endfor %}",
    "{% set x = namespace(s='a' * 9) %}{% for i in range(60) %}{% set x.s = x.s.replace('a', 'a' * 99) %}{% endfor %}",
    "{{ 9**9**9**9 }}",
    "{% if 9**9**9**9 %}{% endif %}",
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%*d'|format(999999999, 1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ lipsum(n=10**8) }}",
    "{{ range(10**9)|list }}",
    "{{ ('b' * 100000).replace('', 'b' * 1000000) }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{% if " + "not " * 3000 + "x %}{% endif %}",
]
NONSENSE = [
    "{% break %}", "{% for x in 5 %}{% endfor %}", "{% generation %}", "{{ x.__class__.__mro__ }}", "{% include 'x' %}",
    "{{ self.__init__.__globals__ }}", "{% import 'x' as y %}", "{{ 1 / 0 }}", "{{", "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ raise_exception('no') }}",
]  # fmt: skip


@pytest.mark.parametrize("source", TOO_MUCH + NONSENSE)
def test_it_ends_in_an_error_that_can_be_told(source):
    began = time.monotonic()
    with pytest.raises((ModelError, RequestError), match="chat template"):
        ChatTemplate(source).render(MESSAGES)
    assert time.monotonic() - began < 60  # for ever and "soon" are told apart by any number


def test_each_rendering_counts_for_itself(monkeypatch):
    monkeypatch.setattr(bounded_jinja, "MAX_TURNS", 100)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    for _ in range(50):
        template.render(MESSAGES)
    with pytest.raises(RequestError, match="more than 100 turns"):
        template.render(MESSAGES * 40)


def test_loops_are_as_they_were():
    template = ChatTemplate(
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ' last' if loop.last }} {{ m.role ~ ':' ~ 1 }};"
        "{% else %}none{% endfor %}{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}"
        "{% for a in [1, 2] recursive %}{{ a }}{{ loop([3]) if a == 1 }}{% endfor %}"
    )
    assert template.render(MESSAGES[:2]) == "1/2 system:1;2/2 last user:1;a1132"
    assert template.render([]) == "nonea1132"


PARTS = st.sampled_from(
    ["{% for m in messages %}", "{% endfor %}", "{{ m", "{{ messages", "[0]", ".content", " * 99999", " ** 9", "|join", "|tojson",
     "|center(99)", " }}", "{% set x = 'a' %}", "{% if x %}", "{% endif %}", "{% macro f() %}", "{% endmacro %}", "{{ f() }}", "x ~ x",
     "{% break %}", "{% generation %}", "{% endgeneration %}", "{%-", "-%}", "{{ range(99999)", "|list", "|map('upper')"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PARTS | st.text("{}%a'(-)", max_size=4), max_size=12).map("".join))
def test_any_text_is_a_template_or_a_named_mistake(source):
    try:
        assert isinstance(ChatTemplate(source).render(MESSAGES), str)
    except (ModelError, RequestError) as error:
        assert "chat template" in str(error)  # noqa: PT017  either may come
