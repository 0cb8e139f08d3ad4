"""A refusal for want of room, as a client sees it; and what of a request decides its place in the queue."""

import pytest

from afd_server.errors import OverloadedError
from tests.unit.api.scripted_service import ScriptedService, client_for, openai_client, post, says
from tests.unit.telemetry.test_metrics import value

REFUSAL = OverloadedError("the first token would come after 9 s", reason="ttft_predicted", retry_after_s=7)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
async def test_a_refusal_says_what_was_predicted_and_when_to_come_back(path, prompt, stream):
    response = await post(ScriptedService([REFUSAL]), path, stream=stream, **prompt)
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.json() == {
        "error": {
            "message": "the first token would come after 9 s",
            "type": "overloaded_error",
            "param": None,
            "code": "overloaded",
        }
    }


async def test_openais_client_knows_it_as_a_rate_limit():
    import openai

    with pytest.raises(openai.RateLimitError) as caught:
        await openai_client(ScriptedService([REFUSAL])).completions.create(model="tiny", prompt="hi")
    assert caught.value.code == "overloaded"


async def test_a_refused_request_is_no_error_of_the_server():
    async with client_for(ScriptedService([REFUSAL])) as client:
        await client.post("/v1/completions", json={"prompt": "hi"})
        text = (await client.get("/metrics")).content

    class Exposed:
        def exposition(self):
            return text

    assert value(Exposed(), "request_success_total", finished_reason="refused") == 1
    assert value(Exposed(), "request_success_total", finished_reason="error") == 0


async def test_priority_needs_a_queue():
    service = ScriptedService(says("a"))
    response = await post(service, prompt="hi", priority=3)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")
    assert (await post(service, prompt="hi", priority=0)).status_code == 200
    assert (await post(service, prompt="hi", priority=-3, settings={"priorities": True})).status_code == 200
    assert service.requests[-1].priority == -3
    response = await post(service, prompt="hi", priority=2**31, settings={"priorities": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")


async def test_a_tenant_is_known_by_its_key_which_stays_at_the_door():
    service = ScriptedService(says("a"))
    await post(service, prompt="hi")
    assert service.requests[-1].tenant == ""
    async with client_for(service, api_key="secret") as client:
        for _ in range(2):
            await client.post(
                "/v1/completions", json={"prompt": "hi"}, headers={"Authorization": "Bearer secret"}
            )
    first, second = (request.tenant for request in service.requests[-2:])
    assert first == second != ""
    assert "secret" not in first


async def test_each_of_several_keys_is_a_tenant():
    service = ScriptedService(says("a"))
    async with client_for(service, api_key="one, two") as client:
        statuses = [
            (await client.post("/v1/completions", json={"prompt": "hi"}, headers={"Authorization": f"Bearer {key}"}))
            .status_code
            for key in ("one", "two", "one", "three", "one, two", "")
        ]  # fmt: skip
    assert statuses == [200, 200, 200, 401, 401, 401]
    first, second, third = (request.tenant for request in service.requests)
    assert first == third != second
