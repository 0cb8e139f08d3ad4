"""X-Request-Id: on every answer, in the ids that go to the workers, in every log line of the request."""

import logging

import pytest

from afd_server.errors import UnavailableError
from afd_server.telemetry.logs import TextFormatter, name_request
from tests.unit.api.running_server import Running
from tests.unit.api.scripted_service import ScriptedService, client_for, says

COMPLETION = {"prompt": "hi"}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", COMPLETION, 200),
        ("POST", "/v1/completions", {**COMPLETION, "stream": True}, 200),
        ("POST", "/v1/chat/completions", CHAT, 200),
        ("POST", "/v1/completions", {"nonsense": 1}, 400),
        ("POST", "/v1/completions", {"prompt": "x" * 2000}, 413),
        ("GET", "/nowhere", None, 404),
        ("GET", "/health", None, 200),
    ],
)
async def test_every_answer_has_the_id_that_came(method, path, body, status):
    async with client_for(ScriptedService(says("a")), max_body_bytes=1000) as client:
        answer = await client.request(method, path, json=body, headers={"X-Request-ID": "abc/1:2"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "abc/1:2")
        others = [(await client.request(method, path, json=body)).headers["x-request-id"] for _ in range(2)]
        assert len({*others, ""}) == 3


@pytest.mark.parametrize("script", [[UnavailableError("gone")], [RuntimeError("a bug")]])
async def test_a_failure_has_it_too(script):
    async with client_for(ScriptedService(script)) as client:
        answer = await client.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "abc"})
        assert answer.status_code >= 500 and answer.headers["x-request-id"] == "abc"
    async with client_for(ScriptedService(says("a")), api_key="k") as client:
        answer = await client.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "abc"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (401, "abc")


@pytest.mark.parametrize("bad", ["", "two words", "x" * 129, "ä", "a\tb"])
async def test_what_is_no_id_is_replaced(bad):
    async with client_for(ScriptedService(says("a"))) as client:
        answer = await client.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": bad.encode()})
    given = answer.headers["x-request-id"]
    assert answer.status_code == 200 and given != bad and given.isalnum()


@pytest.mark.parametrize(
    ("header", "body", "used"),
    [("of-header", None, "of-header"), ("of-header", "of-body", "of-header"), (None, "of-body", "of-body")],
)
async def test_it_is_in_the_ids_of_answer_and_workers(header, body, used):
    service = ScriptedService(says("a"))
    headers = {} if header is None else {"X-Request-Id": header}
    async with client_for(service) as client:
        for path, fields, kind in (("completions", COMPLETION, "cmpl"), ("chat/completions", CHAT, "chatcmpl")):
            answer = await client.post(f"/v1/{path}", json={**fields, "request_id": body}, headers=headers)
            assert answer.headers["x-request-id"] == used
            assert answer.json()["id"] == f"{kind}-{used}"
            assert service.requests[-1].request_id.startswith(f"{kind}-{used}-0-")


async def test_log_lines_of_a_request_name_it(capfd):
    """Through the real server, so that also what uvicorn logs of a bug is seen; requests overlap on one event loop."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter("server"))
    handler.addFilter(name_request)
    logging.getLogger().addHandler(handler)
    scripts = [
        [UnavailableError("gone")],
        [*says("abc")[:1], RuntimeError("a bug in a stream")],
        [RuntimeError("a bug")],
    ]
    try:
        async with Running(ScriptedService(*scripts)) as running:
            for name, stream in (("first", False), ("second", True), ("third", False)):
                body = {**COMPLETION, "stream": stream}
                await running.client.post("/v1/completions", json=body, headers={"X-Request-Id": name})
    finally:
        logging.getLogger().removeHandler(handler)
    shown = [line for line in capfd.readouterr().err.splitlines() if line.endswith("]") and " server " in line]
    assert [line.split(" server ")[1] for line in shown] == [
        "a request failed: gone [first]",
        "a request failed: a bug in a stream [second]",
        "a stream failed [second]",
        "a request failed: a bug [third]",
        "Exception in ASGI application [third]",
    ]
