"""The page's files and headers, who is told what, and the live view's stream on a real port."""

import asyncio
import json
import re
from html.parser import HTMLParser

import httpx
import pytest

from afd_server.api.page import live
from afd_server.types import HopSpan, ReplicaStats, StepTiming, WorkerState, WorkerTrace
from tests.unit.api.running_server import DEADLINE_S, Running
from tests.unit.api.scripted_service import ScriptedService, app_for, client_for, says

KEYS = {"api_key": "operators,clients"}


class Workers:
    """What a machine of one attention and one FFN worker tells."""

    def __init__(self):
        self.states = [WorkerState("attention-0", "attention", "serving", 1.0, "n", 5, 0)]
        self.states += [WorkerState("ffn-0", "ffn", "restarting", 2.0, "n", 6, 1, "died")]
        self.traced = []

    def worker_states(self):
        return self.states

    def change_under_way(self):
        return ""

    async def trace(self, seconds):
        self.traced.append(seconds)
        spans = [HopSpan("attention", 0.1 * step, 0.1 * step + 0.05, step, 0, 0) for step in range(4)]
        return [WorkerTrace("attention-0", "attention", tuple(spans))]


def service_of(workers):
    service = ScriptedService(says("hello"))
    service.workers = workers
    return service


async def updates_of(running, count, **headers):
    """The first so many updates of the live view."""
    found = []
    async with running.client.stream("GET", "/admin/live", headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line:
                found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == count:
                return found
    raise AssertionError(f"the stream ended after {len(found)} updates")


# --- the files -------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.paths, self.inline = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith("#"):
                self.paths.append(value)
            if name.startswith("on") or name == "style":
                self.inline.append((tag, name))
        if tag == "style" or (tag == "script" and "src" not in dict(attributes)):
            self.inline.append((tag, None))


async def test_the_page_and_all_that_it_names_are_served_and_nothing_of_elsewhere():
    async with client_for(ScriptedService()) as client:
        page = await client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        links = Links(page.text)
        assert links.inline == []
        waiting, seen = set(links.paths), set()
        while waiting:
            path = waiting.pop()
            seen.add(path)
            answer = await client.get(f"/{path}")
            assert answer.status_code == 200, path
            if path.endswith(".js"):
                imported = re.findall(r'^import .* from "\./(.+)";$', answer.text, re.M)
                waiting |= {f"page/{name}" for name in imported} - seen
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text
            ), path
    assert len(seen) > 12


async def test_the_policy_allows_nothing_but_the_servers_own_files():
    async with client_for(ScriptedService()) as client:
        for path in ("/", "/page/main.js"):
            headers = (await client.get(path)).headers
            policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"


async def test_a_file_that_has_not_changed_is_not_sent_again():
    async with client_for(ScriptedService()) as client:
        first = await client.get("/page/page.css")
        again = await client.get("/page/page.css", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = await client.get("/page/chat.css", headers={"If-None-Match": first.headers["etag"]})
        assert other.status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/routes.py", "/page/../gate.py", "/page/%2e%2e/live.py", "/page/static", "/page/"]
)
async def test_nothing_else_is_a_file_of_the_page(path):
    async with client_for(ScriptedService()) as client:
        assert (await client.get(path)).status_code == 404


async def test_without_the_page_nothing_of_it_is_there():
    async with client_for(service_of(Workers()), page=False) as client:
        for path in ("/", "/page/main.js", "/page/settings.json", "/admin/live"):
            assert (await client.get(path)).status_code == 404, path
        assert (await client.get("/admin/workers")).status_code == 200


async def test_the_page_is_no_part_of_the_api():
    paths = app_for(ScriptedService()).openapi()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/page") or path == "/admin/live"]


# --- who is told what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key", "host", "told"),
    [
        ({}, None, "127.0.0.1", {"asks_for_key": False, "may_ask": True, "may_watch": True}),
        ({}, None, "10.0.0.9", {"asks_for_key": False, "may_ask": True, "may_watch": False}),
        (KEYS, None, "127.0.0.1", {"asks_for_key": True, "may_ask": False}),
        (KEYS, "wrong", "127.0.0.1", {"asks_for_key": True, "may_ask": False}),
        (KEYS, "clients", "10.0.0.9", {"asks_for_key": True, "may_ask": True, "may_watch": False}),
        (KEYS, "operators", "10.0.0.9", {"asks_for_key": True, "may_ask": True, "may_watch": True}),
    ],
)
async def test_the_page_is_told_what_it_may_do_and_strangers_nothing_of_the_model(settings, key, host, told):
    transport = httpx.ASGITransport(app_for(service_of(Workers()), **settings), client=(host, 5))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        answer = (await client.get("/page/settings.json")).json()
    model = {"model": "tiny", "max_model_len": 64} if told["may_ask"] else {}
    assert answer == told | model


async def test_the_live_view_is_the_operators():
    async with Running(service_of(Workers()), **KEYS) as running:
        for key, status in ((None, 401), ("clients", 403)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert (await running.client.get("/admin/live", headers=headers)).status_code == status
        assert await updates_of(running, 1, Authorization="Bearer operators")


# --- the live view -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(live, "PERIOD_S", 0.02)
    monkeypatch.setattr(live, "LANES_PERIOD_S", 0.02)


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_update_tells_of_requests_times_and_workers(quick):
    workers = Workers()
    async with Running(service_of(workers)) as running:
        metrics = running.metrics

        async def work():
            await until(lambda: metrics.listener is not None)
            timing = StepTiming(0.02, bubble_s=0.005, num_tokens=4)
            metrics.observe_step("attention-0", ReplicaStats(3, 2, 10, 6, timing=timing))
            metrics.observe_tokens(1, 0.5, first=True)
            metrics.observe_tokens(1, 0.016, first=False)
            metrics.observe_finish("stop", 1.0, 0.3, 21)
            metrics.set_queue_length(4)

        working = asyncio.create_task(work())
        *_, update = await updates_of(running, 8)
        await working
    assert update["requests"] == {"running": 3, "waiting": 6}
    assert update["kv_cache_usage"] == pytest.approx(0.4)
    assert update["rates"]["output_tokens"] > 0
    ((low, high, count),) = update["times"]["buckets"]
    assert low <= 16 <= high and count == 1
    assert update["times"]["requests_ms"] == [pytest.approx(15)]
    attention, ffn = update["workers"]
    assert attention | {"running": 3, "bubble_share": 0.25, "step_ms": 20, "state": "serving"} == attention
    assert ffn | {"state": "restarting", "reason": "died", "restarts": 1} == ffn and "running" not in ffn
    assert update["worker_counts"] == {"attention serving": 1, "ffn restarting": 1}


async def test_hops_are_recorded_while_requests_run(quick):
    workers = Workers()
    async with Running(service_of(workers)) as running:
        await updates_of(running, 3)
        assert workers.traced == []  # nothing runs
        running.metrics.observe_step("attention-0", ReplicaStats(num_running=1))
        found = [update["lanes"] for update in await updates_of(running, 10) if "lanes" in update]
    assert [step for step, _, _ in found[0]["steps"]] == [1, 2]
    assert all(live.MIN_RECORDED_S <= seconds <= live.MAX_RECORDED_S for seconds in workers.traced)


async def test_nothing_is_sampled_when_nobody_looks(quick):
    async with Running(service_of(Workers())) as running:
        metrics, tasks = running.metrics, asyncio.all_tasks()
        assert metrics.listener is None
        first, second = (asyncio.create_task(updates_of(running, 50)) for _ in range(2))
        await until(lambda: metrics.listener is not None)
        listener = metrics.listener
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert len(await second) == 50
        assert metrics.listener in (listener, None)  # one sampler for both, and it outlived the first to leave
        await until(lambda: metrics.listener is None)
        await until(
            lambda: not [task for task in asyncio.all_tasks() - tasks if task.get_name() == "live view"]
        )
        assert len(await updates_of(running, 2)) == 2  # and it begins again


async def test_the_end_of_the_server_ends_the_views(quick):
    async with Running(service_of(Workers()), shutdown_timeout_s=DEADLINE_S) as running:
        looking = asyncio.create_task(updates_of(running, 10**6))
        await until(lambda: running.metrics.listener is not None)
        began = asyncio.get_running_loop().time()
        running.signal()
        await running.ended()
        assert asyncio.get_running_loop().time() - began < DEADLINE_S / 2
        with pytest.raises((AssertionError, httpx.HTTPError)):
            await looking


async def test_a_view_that_fails_says_so_and_the_next_one_works(quick, caplog):
    workers = Workers()
    async with Running(service_of(workers)) as running:
        right, workers.worker_states = workers.worker_states, None
        answer = await running.client.get("/admin/live")
        assert answer.status_code == 503
        assert "live view failed" in answer.json()["error"]["message"]
        assert "NoneType" in caplog.text
        workers.worker_states = right
        assert await updates_of(running, 2)
