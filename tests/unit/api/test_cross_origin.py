"""What pages of other origins may do, and a server below a path of a proxy."""

import json

import pytest

from afd_server.api.settings import CrossOrigin
from afd_server.config import ServeConfig
from afd_server.errors import ConfigError
from tests.unit.api.scripted_service import ScriptedService, client_for, says

PAGE = "https://page.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


async def ask(client, **headers):
    return await client.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": PAGE, **headers})


async def test_without_being_asked_for_no_page_may_read_an_answer():
    async with client_for(ScriptedService(says("a"))) as client:
        answer = await ask(client)
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
        assert (await client.options("/v1/completions", headers=PREFLIGHT)).status_code == 405


async def test_a_page_that_may_needs_the_key_all_the_same():
    cross_origin = CrossOrigin([PAGE], ["POST"], ["*"])
    async with client_for(ScriptedService(says("a")), cross_origin=cross_origin, api_key="k") as client:
        before = await client.options("/v1/completions", headers=PREFLIGHT)
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == PAGE
        assert before.headers["x-request-id"]
        refused = await ask(client)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        answer = await ask(client, Authorization="Bearer k")
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        other = await ask(client, Authorization="Bearer k", Origin="https://other.example")
        assert "access-control-allow-origin" not in other.headers


async def test_any_page_with_credentials():
    async with client_for(
        ScriptedService(says("a")), cross_origin=CrossOrigin(["*"], credentials=True)
    ) as client:
        answer = await ask(client, Cookie="a=b")
        assert answer.headers["access-control-allow-origin"] == PAGE  # a browser takes no * with credentials
        assert answer.headers["access-control-allow-credentials"] == "true"


@pytest.mark.parametrize("text", ["*", "[1]", '{"a": "b"}', "[", "null"])
def test_a_list_that_is_none(text):
    with pytest.raises(ConfigError, match=r"--allowed-origins.*JSON list"):
        ServeConfig(allowed_origins=text)
    assert ServeConfig(allowed_origins=json.dumps(["*"])).allowed_origins == '["*"]'


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_below_a_path(prefix):
    """Whether the proxy takes the path away or not; and a key is asked for either way."""
    async with client_for(ScriptedService(says("a")), root_path="/llm", api_key="operator,k") as client:
        for key, status in (("k", 200), ("wrong", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            answer = await client.post(f"{prefix}/v1/completions", json={"prompt": "x"}, headers=headers)
            assert answer.status_code == status
            assert (await client.get(f"{prefix}/admin/nothing", headers=headers)).status_code == {
                200: 403,
                401: 401,
            }[status]
        assert (await client.get(f"{prefix}/health")).status_code == 200
        assert (await client.post(f"{prefix}/llm/v1/completions", json={"prompt": "x"})).status_code in (
            401,
            404,
        )
        schema = (await client.get(f"{prefix}/openapi.json")).json()
    assert schema["servers"] == [{"url": "/llm"}]


@pytest.mark.parametrize("path", ["llm", "/", "//"])
def test_a_path_that_is_none(path):
    with pytest.raises(ConfigError, match="--root-path"):
        ServeConfig(root_path=path)
