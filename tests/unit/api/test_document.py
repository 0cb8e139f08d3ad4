"""/openapi.json against the routes: whatever it calls valid or not, each answer is one that it tells of."""

import json

import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

from afd_server.api.answers.schema import ChatCompletionChunk, Completion
from afd_server.api.document import ROWS
from afd_server.types import FinishReason, RequestOutput, TokenLogprobs
from tests.unit.api.scripted_service import TOKENIZER, ScriptedService, app_for, client_for, events, post, says
from tests.unit.api.test_admin import Workers

# What depends on several fields, or on the model, is refused although the document cannot say so.
LEFT_OUT = ("positive_data_acceptance",)


class Obedient(ScriptedService):
    """Says "hi!" to whatever it is asked, and reports what is to be reported."""

    workers = Workers()

    async def generate(self, request):
        sampling = request.sampling
        if sampling.prompt_logprobs is not None:
            report = (logprobs_of(sampling.prompt_logprobs, rank=1),) * (len(request.prompt_token_ids) - 1)
            yield RequestOutput("", prompt_logprobs=report)
        ids = TOKENIZER.encode("hi!")[: sampling.max_tokens]
        for token_id in ids[:-1]:
            yield RequestOutput("", (token_id,), own_logprobs(sampling))
        last = own_logprobs(sampling) if ids else ()
        yield RequestOutput("", tuple(ids[-1:]), last, FinishReason.LENGTH)


def own_logprobs(sampling):
    return () if sampling.logprobs is None else (logprobs_of(sampling.logprobs),)


def logprobs_of(num_top, rank=0):
    return TokenLogprobs(-0.5, tuple((token_id, -0.7) for token_id in range(num_top)), rank)


APP = app_for(Obedient(), max_model_len=1 << 16, tokenizer_info={"tokenizer_class": "Fast"})
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
OPERATIONS = {
    operation.label: operation
    for operation in (result.ok() for result in SCHEMA.get_all_operations())
    # Of those below /admin without a body there is one answer only, and Workers here has no traces.
    if not operation.path.startswith("/admin") or operation.body
}


def examine(operation, mode, num_examples):
    @settings(max_examples=num_examples, deadline=None, database=None, derandomize=True,
              phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        case.call_and_validate(excluded_checks=EXCLUDED)

    run()


EXCLUDED = [CHECKS.get_one(name) for name in LEFT_OUT]


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_to_valid_requests_are_those_of_the_document(label):
    examine(OPERATIONS[label], GenerationMode.POSITIVE, 40)


@pytest.mark.parametrize("label", [label for label, operation in OPERATIONS.items() if operation.body])
def test_requests_that_the_document_calls_wrong_are_refused(label):
    examine(OPERATIONS[label], GenerationMode.NEGATIVE, 40)


def test_every_route_has_its_row():
    routes = {
        (method.lower(), route.path.replace(":path", ""))
        for route in APP.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods
    }
    assert routes == ROWS.keys()


async def test_the_document_is_whole():
    async with client_for(Obedient(), api_key="k") as client:
        document = (await client.get("/openapi.json")).json()
        assert (await client.get("/docs")).status_code == 404
    operations = [
        (path, operation) for path, methods in document["paths"].items() for operation in methods.values()
    ]
    ids = [operation["operationId"] for _, operation in operations]
    assert len(set(ids)) == len(ids)
    for path, operation in operations:
        assert operation["tags"] and operation["summary"]
        assert "422" not in operation["responses"]
        guarded = path.startswith(("/v1", "/admin"))
        assert ("security" in operation, "401" in operation["responses"]) == (guarded, guarded), path
        for status, answer in operation["responses"].items():
            if status != "200":
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
    references = [line.split('"')[3] for line in json.dumps(document, indent=0).split("\n") if '"$ref"' in line]
    schemas = document["components"]["schemas"]
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= schemas.keys()


def test_whatever_may_be_refused_for_a_limit_tells_of_it():
    """What is asked of the model counts against a key's limit, and so many may record at once."""
    limited = {row for row in ROWS if row[0] == "post" and row[1].startswith("/v1")} | {("get", "/admin/trace")}
    assert {row for row, told in ROWS.items() if 429 in told.errors} == limited


def test_generators_of_clients_can_read_it():
    """openapi-python-client leaves out what has names in two modules, or enums of several types."""
    schemas = APP.openapi()["components"]["schemas"]
    assert not [name for name in schemas if "__" in name]

    def enums(node):
        if isinstance(node, dict):
            if isinstance(node.get("enum"), list):
                yield node["enum"]
            for value in node.values():
                yield from enums(value)
        elif isinstance(node, list):
            for value in node:
                yield from enums(value)

    assert not [values for values in enums(schemas) if len({type(value) for value in values}) > 1]


async def test_examples_are_accepted():
    for (method, path), row in ROWS.items():
        if row.example is not None and not path.startswith("/admin"):
            body = {**row.example, "model": "tiny"}
            async with client_for(Obedient(), max_model_len=256) as client:
                assert (await client.request(method, path, json=body)).status_code == 200, path


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("/v1/completions", Completion, {"prompt": "hi", "logprobs": 1, "echo": True}),
        ("/v1/chat/completions", ChatCompletionChunk, {"messages": [{"role": "user", "content": "a"}],
                                                      "logprobs": True, "top_logprobs": 1}),
    ],
)  # fmt: skip
async def test_every_chunk_is_what_the_document_says(path, model, body):
    options = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    chunks = events(await post(Obedient(), path, **body, **options))
    assert len(chunks) > 3
    for chunk in chunks:
        model.model_validate(chunk)


async def test_strict_clients_find_what_they_check():
    chat = {"messages": [{"role": "user", "content": "a"}]}
    (choice,) = (await post(ScriptedService(says("x")), "/v1/chat/completions", **chat)).json()["choices"]
    assert (choice["message"]["refusal"], choice["logprobs"]) == (None, None)
    assert {"refusal"} <= choice["message"].keys() and {"logprobs"} <= choice.keys()
    body = {"prompt": "hi", "echo": True, "logprobs": 0}
    (choice,) = (await post(Obedient(), **body)).json()["choices"]
    assert [value is None for value in choice["logprobs"]["token_logprobs"]] == [True, *[False] * 4]
