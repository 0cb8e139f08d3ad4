import json

import pytest
from transformers import PreTrainedTokenizerFast

from afd_server.errors import ConfigError, ModelError, RequestError
from afd_server.text.chat_template import ChatTemplate
from tests.unit.text.tiny_tokenizers import byte_level

MESSAGES = [
    {"role": "system", "content": "Be brief. <b>é</b>"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello "},
]
TEMPLATES = {
    "blocks are trimmed": """
        {%- for message in messages %}
            {{ bos_token }}{{ message['role'] }}
            {% if loop.last %}last{% endif %}
        {% endfor %}""",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "prompt": "{{ messages[0].content }}{% if add_generation_prompt %}<go>{% endif %}{{ tools }}{{ documents }}",
    "names": "{{ eos_token }}{{ unk_token is defined }}{{ thinking }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name):
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    expected = theirs.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, thinking=True
    )
    ours = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.render(MESSAGES, variables={"thinking": True}) == expected


@pytest.mark.parametrize("after", ["", "|trim"])
def test_the_last_message_is_continued(after):
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content" + after + " }}<end>{% endfor %}"
    )
    prompt = template.render(MESSAGES[1:], continue_final_message=True, add_generation_prompt=False)
    assert prompt == "<user>Hi<end><assistant>Hello "
    assert MESSAGES[-1]["content"] == "Hello "


def test_a_message_that_the_template_leaves_out_cannot_be_continued():
    with pytest.raises(RequestError, match="cannot be continued"):
        ChatTemplate("nothing").render(MESSAGES, continue_final_message=True)


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no system, please') }}", "{{ messages[0].x.y }}", "{{ 1 / 0 }}"]
)
def test_what_a_template_raises_is_the_clients_error(source):
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert caught.value.field == "messages"


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}{{ x.y }}", "{{ messages.append(1) }}"])
def test_the_sandbox_holds(source):
    with pytest.raises(RequestError):
        ChatTemplate(source).render(MESSAGES)


def test_where_a_template_is_found(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    assert ChatTemplate.load(tmp_path, {}) is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert ChatTemplate.load(tmp_path, {}).render(MESSAGES) == "one"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert ChatTemplate.load(tmp_path, {}).render(MESSAGES) == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert ChatTemplate.load(tmp_path, {}).render(MESSAGES) == "three"


def test_templates_that_cannot_be_used(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTemplate("{% if %}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": ""}]})
    )
    with pytest.raises(ModelError, match="rag"):
        ChatTemplate.load(tmp_path, {})


def test_tools_have_a_template_of_their_own_where_the_model_has_one(tmp_path):
    several = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | tojson }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    template = ChatTemplate.load(tmp_path, {})
    assert template.render(MESSAGES) == "plain"
    assert template.render(MESSAGES, tools=[{"type": "function"}]) == '[{"type": "function"}]'
    assert template.shows_tools and "tojson" in template.source


@pytest.mark.parametrize(
    ("source", "shows", "as_text"),
    [
        ("{{ messages[0].content }}", False, False),
        ("{{ tools | tojson }}", True, False),
        ("{{ raise_exception('no') }}", False, False),
        ("{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}", False, False),
        ("{% for m in messages if m.tool_calls %}{{ 'a' + m.tool_calls[0].function.arguments }}{% endfor %}", False, True),
    ],
)  # fmt: skip
def test_what_a_template_does_with_tools(source, shows, as_text):
    template = ChatTemplate(source)
    assert (template.shows_tools, template.wants_arguments_as_text) == (shows, as_text)


def test_which_names_a_template_takes():
    template = ChatTemplate(
        "{% if not thinking is defined %}{% set thinking = 1 %}{% endif %}{% set own = 2 %}{{ own }}{{ strftime_now('') }}"
    )
    assert "thinking" in template.names and "own" not in template.names


def test_a_template_given_at_the_start(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ bos_token }}file")
    assert ChatTemplate.given(str(file), {"bos_token": "<s>"}).render(MESSAGES) == "<s>file"
    assert ChatTemplate.given("{{ bos_token }}inline", {"bos_token": "<s>"}).render(MESSAGES) == "<s>inline"
    for wrong in (str(tmp_path / "none.jinja"), "{% if %}", "{{ a }}" * 200_000):
        with pytest.raises(ConfigError, match="--chat-template"):
            ChatTemplate.given(wrong, {})
