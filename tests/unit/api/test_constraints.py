"""Structured outputs in bodies: which constraint goes to the workers, and what is refused, by name and place."""

import pytest
from openai import BadRequestError

from afd_server.api import constraints
from afd_server.text import constraints as made
from tests.unit.api.scripted_service import ScriptedService, client_for, openai_client, post, says

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
STRUCTURES = {"structures": [{"begin": "<f=a>", "schema": PERSON, "end": "</f>"}], "triggers": ["<f="]}


def named(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, made.from_json_schema({"type": "object"})),
        ({"response_format": named(PERSON, strict=True, description="x")}, made.from_json_schema(PERSON)),
        ({"structured_outputs": {"json": PERSON}}, made.from_json_schema(PERSON)),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, made.from_json_schema({"type": "integer"})),
        (
            {"structured_outputs": {"json_object": True, "regex": None}},
            made.from_json_schema({"type": "object"}),
        ),
        ({"structured_outputs": {"regex": "a+"}}, made.from_regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, made.from_choices(["a", "b"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, made.from_grammar('start: "a"')),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, made.from_grammar('root ::= "a"')),
        (
            {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
            made.from_json_schema(PERSON, any_whitespace=False),
        ),
        (
            {"structured_outputs": {"json": PERSON, "whitespace_pattern": " ?"}},
            made.from_json_schema(PERSON, whitespace_pattern=" ?"),
        ),
        (
            {"structured_outputs": {"json": PERSON, "disable_additional_properties": True}},
            made.from_json_schema({**PERSON, "additionalProperties": False}),
        ),
    ],
)
async def test_the_constraint_that_is_asked_for_goes_to_the_worker(fields, expected):
    service = ScriptedService(says("a"))
    assert (await post(service, prompt="hi", **fields)).status_code == 200
    assert service.requests[0].sampling.constraint == expected


async def test_structural_tags_come_both_ways():
    service = ScriptedService(says("a"))
    tag = {"type": "structural_tag", **STRUCTURES}
    for fields in ({"response_format": tag}, {"structured_outputs": {"structural_tag": tag}}):
        assert (await post(service, prompt="hi", **fields)).status_code == 200
    first, second = (request.sampling.constraint for request in service.requests)
    assert first == second and "<f=" in first


async def test_every_choice_of_a_chat_has_it():
    service = ScriptedService(says("a"))
    async with openai_client(service) as client:
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], n=2, response_format=named(PERSON)
        )
    assert [each.sampling.constraint for each in service.requests] == [made.from_json_schema(PERSON)] * 2


def inside(schema):
    return {"type": "object", "properties": {"a": {"type": "array", "items": schema}, "b": {"type": "string"}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "json"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "no such field"),
        ({"response_format": named("x")}, "response_format.json_schema.schema", "not JSON"),
        ({"response_format": named(3)}, "response_format.json_schema.schema", "an object or a boolean"),
        (
            {"response_format": named(inside({"type": "nothing"}))},
            "response_format.json_schema.schema",
            "schema.properties.a.items: Invalid type: nothing",
        ),
        (
            {"response_format": named({"$ref": "#/$defs/x", "$defs": {"x": inside({"not": {}})}})},
            "response_format.json_schema.schema",
            "schema.$defs.x.properties.a.items: Unimplemented keys",
        ),
        (
            {"response_format": named({"anyOf": [PERSON, {"minimum": 3, "maximum": 2, "type": "integer"}]})},
            None,
            None,  # the other branch is left
        ),
        (
            {"response_format": named({"properties": {"a": False}, "required": ["a"], "type": "object"})},
            "response_format.json_schema.schema",
            "unsatisfiable",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format.structures", "required"),
        (
            {"response_format": {"type": "structural_tag", **STRUCTURES, "triggers": ["<g"]}},
            "response_format",
            "no trigger begins '<f=a>'",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "not none"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "not json and regex"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice.1", "string"),
        ({"structured_outputs": {"grammar": "start: a"}}, "structured_outputs.grammar", 'unknown name: "a"'),
        ({"structured_outputs": {"grammar": "start: <|x|>"}}, "structured_outputs.grammar", "<|x|>"),
        (
            {"structured_outputs": {"json": PERSON, "whitespace_pattern": "(("}},
            "structured_outputs.json",
            "unclosed",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "already",
        ),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs.backend", "no such field"),
        ({"guided_json": PERSON}, "guided_json", "use structured_outputs.json"),
        ({"guided_choice": ["a"]}, "guided_choice", "use structured_outputs.choice"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "no longer"),
    ],
)
async def test_what_cannot_be_followed_is_refused_with_its_place(fields, param, words):
    service = ScriptedService(says("a"))
    response = await post(service, prompt="hi", **fields)
    if param is None:
        assert response.status_code == 200
        return
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"] and words in error["message"]
    assert service.requests == []


async def test_a_constraint_is_bounded_in_its_length_and_for_all_choices():
    service = ScriptedService(says("a"))
    long = {"structured_outputs": {"choice": ["x" * (constraints.MAX_CONSTRAINT_CHARACTERS + 1)]}}
    assert "at most" in (await post(service, prompt="hi", **long)).json()["error"]["message"]
    most = constraints.MAX_CONSTRAINT_CHARACTERS_IN_ALL // constraints.MAX_CONSTRAINT_CHARACTERS
    several = {"structured_outputs": {"choice": ["x" * (constraints.MAX_CONSTRAINT_CHARACTERS - 100)]}}
    assert (await post(service, prompt="hi", n=most + 1, **several)).status_code == 400
    assert service.requests == []


async def test_deep_and_wide_schemas_are_refused_or_followed_but_never_fail_the_server():
    deep = {"type": "string"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    for schema in (deep, wide, loop):
        response = await post(ScriptedService(says("a")), prompt="hi", response_format=named(schema))
        assert response.status_code in (200, 400), response.text


async def test_openais_client_learns_the_field():
    async with openai_client(ScriptedService(says("a"))) as client:
        with pytest.raises(BadRequestError) as refused:
            await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], response_format=named({"type": "x"})
            )
    assert refused.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("kind", ["choice", "regex", "grammar", "json"])
async def test_half_a_surrogate_pair_is_refused(kind):
    value = {"choice": '["\\ud800"]', "json": '{"const": "\\ud800"}'}.get(kind, '"\\ud800"')
    body = f'{{"prompt": "hi", "structured_outputs": {{"{kind}": {value}}}}}'
    async with client_for(ScriptedService(says("a"))) as client:
        response = await client.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"structured_outputs.{kind}"


async def test_the_place_of_a_mistake_is_not_searched_for_ever(monkeypatch):
    monkeypatch.setattr(made, "MAX_SEARCHED_CHARACTERS", 10)
    response = await post(ScriptedService(says("a")), prompt="hi", response_format=named(inside({"type": "x"})))
    message = response.json()["error"]["message"]
    assert message == "response_format.json_schema.schema: Invalid type: x"
