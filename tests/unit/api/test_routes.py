import asyncio

import pytest

from afd_server.errors import UnavailableError, WorkerDiedError
from afd_server.types import FinishReason, RequestOutput
from tests.unit.api.scripted_service import TOKENIZER, ScriptedService, client_for, events, post, says

FAILURES = [
    ([UnavailableError("still starting")], 503, "still starting"),
    ([WorkerDiedError("ffn-0", "is gone", layer=3, step=9)], 503, "layer 3, step 9"),
    ([RequestOutput("", (), (), FinishReason.ERROR, error="worker ffn-0: no answer")], 500, "ffn-0: no answer"),
    ([RequestOutput("", (), (), FinishReason.ABORT)], 503, "ended the request"),
    ([], 500, "without a reason"),
    ([RuntimeError("a secret of the machine")], 500, "its log has the details"),
]


@pytest.mark.parametrize(("script", "status", "words"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_has_its_status(script, status, words, stream):
    response = await post(ScriptedService(script), prompt="hi", stream=stream)
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize(("script", "status", "words"), FAILURES)
async def test_a_failure_within_a_stream_is_its_last_event(script, status, words):
    response = await post(
        ScriptedService([*says("abc", FinishReason.LENGTH)[:2], *script]), prompt="hi", stream=True
    )
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert last.startswith('data: {"error":') and words in last and "secret" not in last


async def test_a_failure_within_the_first_character_has_its_status():
    """Tokens have come, but nothing was sent yet."""
    beginning = RequestOutput("", (TOKENIZER.encode("ö")[0],))
    response = await post(ScriptedService([beginning, UnavailableError("gone")]), prompt="hi", stream=True)
    assert response.status_code == 503


async def test_one_choice_that_fails_ends_the_others():
    waiting = says("abc")[:1] * 10_000
    service = ScriptedService(waiting, [UnavailableError("gone")])
    response = await post(service, prompt="hi", n=2)
    assert response.status_code == 503
    assert len(service.closed) == 2


async def test_models():
    async with client_for(ScriptedService(), model_name="org/tiny") as client:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert (listed["data"][0]["id"], listed["data"][0]["max_model_len"]) == ("org/tiny", 64)
        assert (await client.get("/v1/models/org/tiny")).json() == listed["data"][0]
        missing = await client.get("/v1/models/other")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_unknown_model():
    response = await post(ScriptedService(), prompt="hi", model="gpt-4")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")


async def test_health_follows_the_machine():
    service = ScriptedService()
    async with client_for(service) as client:
        assert (await client.get("/health")).status_code == 200
        service.problems = ["worker ffn-0 restarts"]
        response = await client.get("/health")
        assert (response.status_code, response.json()["problems"]) == (200, ["worker ffn-0 restarts"])
        service.serving = False
        response = await client.get("/health")
        assert (response.status_code, response.json()["problems"]) == (503, ["worker ffn-0 restarts"])
        assert "retry-after" in response.headers


async def test_version_ping_and_schema():
    async with client_for(ScriptedService()) as client:
        assert (await client.get("/version")).json() == {"version": "9"}
        assert (await client.get("/ping")).status_code == 200
        assert "CompletionRequest" in (await client.get("/openapi.json")).json()["components"]["schemas"]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "words"),
    [
        ("GET", "/nowhere", None, {}, 404, "GET /nowhere"),
        ("GET", "/v1/completions", None, {}, 405, "GET /v1/completions"),
        ("POST", "/v1/completions", "{", {"content-type": "application/json"}, 400, "not JSON"),
        ("POST", "/v1/completions", "[1]", {"content-type": "application/json"}, 400, "JSON object"),
        ("POST", "/v1/completions", "", {"content-type": "application/json"}, 400, "JSON object"),
        ("POST", "/v1/completions", '{"prompt": "x"}', {}, 400, "Content-Type: application/json"),
    ],
)
async def test_every_refusal_has_openais_body(method, path, content, headers, status, words):
    async with client_for(ScriptedService()) as client:
        response = await client.request(method, path, content=content, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "given",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}, {"Authorization": "Basic right"}],
)
async def test_without_the_key(given):
    async with client_for(ScriptedService(says("a")), api_key="right") as client:
        response = await client.post("/v1/completions", json={"prompt": "hi"}, headers=given)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await client.get("/v1/models", headers=given)).status_code == 401
        for path in ("/health", "/metrics", "/version"):
            assert (await client.get(path, headers=given)).status_code == 200


async def test_with_the_key():
    async with client_for(ScriptedService(says("a")), api_key="right") as client:
        response = await client.post(
            "/v1/completions", json={"prompt": "hi"}, headers={"Authorization": "bearer right"}
        )
    assert response.status_code == 200


async def test_a_body_that_says_it_is_too_large():
    async with client_for(ScriptedService(), max_body_bytes=100) as client:
        response = await client.post("/v1/completions", json={"prompt": "x" * 100})
    assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")


async def test_a_body_that_turns_out_too_large():
    async def pieces():
        for _ in range(20):
            yield b"x" * 10

    async with client_for(ScriptedService(), max_body_bytes=100) as client:
        response = await client.post(
            "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
        )
    assert (response.status_code, "100 bytes" in response.json()["error"]["message"]) == (413, True)


async def test_metrics_of_requests():
    service = ScriptedService(says("abc"), says("abc", FinishReason.LENGTH, step=2), [UnavailableError("gone")],
                              [RuntimeError("a bug")])  # fmt: skip
    async with client_for(service) as client:
        for _ in range(4):
            await client.post("/v1/completions", json={"prompt": "hi"})
        text = (await client.get("/metrics")).text
    for line in (
        'afd:prompt_tokens_total{model_name="tiny"} 8.0',
        'afd:generation_tokens_total{model_name="tiny"} 7.0',
        'afd:request_success_total{finished_reason="stop",model_name="tiny"} 1.0',
        'afd:request_success_total{finished_reason="length",model_name="tiny"} 1.0',
        'afd:request_success_total{finished_reason="error",model_name="tiny"} 2.0',
        'afd:time_to_first_token_seconds_count{model_name="tiny"} 2.0',
        'afd:inter_token_latency_seconds_count{model_name="tiny"} 4.0',
        'afd:request_time_per_output_token_seconds_count{model_name="tiny"} 2.0',
        'afd:e2e_request_latency_seconds_count{model_name="tiny"} 2.0',
    ):
        assert line in text


async def test_streams_of_different_requests_do_not_wait_for_each_other():
    """Through one app: the second answer is complete while the first still runs."""
    release = asyncio.Event()
    service = ScriptedService([*says("ab")[:1], release, *says("ab")[1:]], says("xy"))
    async with client_for(service) as client:
        first = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "stream": True}))
        while not service.requests:
            await asyncio.sleep(0)
        second = await client.post("/v1/completions", json={"prompt": "hi", "stream": True})
        assert not first.done() and len(events(second)) == 3
        release.set()
        assert len(events(await first)) == 3
