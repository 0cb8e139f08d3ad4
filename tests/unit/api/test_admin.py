"""The routes of operators: what they pass on, what they answer, and who may ask."""

import asyncio

import httpx
import pytest

from afd_server.errors import CannotScaleError, ChangeUnderWayError
from afd_server.types import WorkerState
from tests.unit.api.scripted_service import ScriptedService, app_for

WORKER = WorkerState("attention-0", "attention", "serving", 1.5, "node", 17, 0)


class Workers:
    def __init__(self):
        self.asked, self.error, self.change = [], None, ""

    def worker_states(self):
        return [WORKER]

    def change_under_way(self):
        return self.change

    async def scale(self, attention_workers, ffn_replicas):
        self.asked.append((attention_workers, ffn_replicas))
        if self.error:
            raise self.error

    async def restart(self):
        await self.scale("restart", None)


@pytest.fixture
def workers():
    return Workers()


async def ask(workers, method, path, *, json=None, headers=None, host="127.0.0.1", **settings):
    service = ScriptedService()
    service.workers = workers
    app = app_for(service, **settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(host, 50000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, json=json, headers=headers)


async def test_the_workers_are_shown(workers):
    workers.change = "scaling"
    answer = await ask(workers, "GET", "/admin/workers")
    assert answer.json() == {
        "change": "scaling",
        "workers": [{"name": "attention-0", "role": "attention", "state": "serving", "since_s": 1.5, "node": "node",
                     "pid": 17, "restarts": 0, "reason": ""}],
    }  # fmt: skip


async def test_a_change_is_passed_on_and_answered_with_what_there_is_then(workers):
    for body, asked in (
        ({"attention_workers": 3}, (3, None)),
        ({"attention_workers": 1, "ffn_replicas": 2}, (1, 2)),
    ):
        answer = await ask(workers, "POST", "/admin/scale", json=body)
        assert (answer.status_code, workers.asked.pop()) == (200, asked)
        assert answer.json()["workers"][0]["name"] == "attention-0"
    assert (await ask(workers, "POST", "/admin/restart")).status_code == 200
    assert workers.asked == [("restart", None)]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "must be given"),
        ({"attention_workers": 0}, "attention_workers"),
        ({"attention_workers": "2"}, "attention_workers"),
        ({"ffn_replicas": 1e9}, "ffn_replicas"),
        ({"ffn_workers": 2}, "ffn_workers"),
    ],
)
async def test_a_number_that_cannot_be_is_named(workers, body, word):
    answer = await ask(workers, "POST", "/admin/scale", json=body)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]
    assert workers.asked == []


@pytest.mark.parametrize("error", [ChangeUnderWayError("another change"), CannotScaleError("too little GPU")])
async def test_a_refused_change_is_a_conflict(workers, error):
    workers.error = error
    answer = await ask(workers, "POST", "/admin/scale", json={"ffn_replicas": 2})
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, str(error))


async def test_a_change_is_carried_through_although_its_caller_leaves(workers):
    go, done = asyncio.Event(), asyncio.Event()

    async def slow_restart():
        await go.wait()
        done.set()

    workers.restart = slow_restart
    asking = asyncio.create_task(ask(workers, "POST", "/admin/restart"))
    for _ in range(20):
        await asyncio.sleep(0)
    asking.cancel()
    go.set()
    async with asyncio.timeout(10):
        await done.wait()


async def test_of_several_keys_the_first_opens_admin(workers):
    for key, status in (("operator", 200), ("client", 403), ("stranger", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        answer = await ask(workers, "GET", "/admin/workers", headers=headers, api_key="operator,client")
        assert answer.status_code == status


@pytest.mark.parametrize("path", ["/admin/workers", "/admin/scale", "/admin/restart"])
async def test_with_a_key_the_key_is_asked_for_from_everywhere(workers, path):
    method = "GET" if path.endswith("workers") else "POST"
    for host in ("127.0.0.1", "192.0.2.7"):
        refused = await ask(workers, method, path, json={"ffn_replicas": 1}, host=host, api_key="right")
        assert refused.status_code == 401
        headers = {"Authorization": "Bearer right"}
        allowed = await ask(
            workers, method, path, json={"ffn_replicas": 1}, host=host, headers=headers, api_key="right"
        )
        assert allowed.status_code == 200


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("127.8.0.1", {}, 200),
        ("::1", {}, 200),
        ("::ffff:127.0.0.1", {}, 200),
        ("192.0.2.7", {}, 403),
        ("::ffff:192.0.2.7", {}, 403),
        ("", {}, 403),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.7"}, 403),
        ("127.0.0.1", {"Origin": "https://page.example"}, 403),
        ("127.0.0.1", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("127.0.0.1", {"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
async def test_without_a_key_programs_of_this_host_may_ask(workers, host, headers, status):
    answer = await ask(workers, "POST", "/admin/scale", json={"ffn_replicas": 1}, host=host, headers=headers)
    assert answer.status_code == status
    assert len(workers.asked) == (status == 200)
