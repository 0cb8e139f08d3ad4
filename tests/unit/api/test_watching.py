"""What operators see of the workers' hops and of stragglers over HTTP."""

import httpx
import pytest

from afd_server.errors import TooManyRecordingsError
from afd_server.telemetry.stragglers import straggler_report
from afd_server.types import HopSpan, LayerTotal, WorkerTotals, WorkerTrace
from tests.unit.api.scripted_service import ScriptedService, app_for

TOTALS = [WorkerTotals("ffn-0", "ffn", (LayerTotal(0.1, 100, 800),))]


class Workers:
    def __init__(self):
        self.asked, self.error = [], None

    async def trace(self, seconds):
        self.asked.append(seconds)
        if self.error:
            raise self.error
        return [WorkerTrace("ffn-0", "ffn", (HopSpan("ffn", 7.0, 7.5, 1, 2, 0, "attention-0", 4),))]


@pytest.fixture
def service():
    built = ScriptedService()
    built.workers = Workers()

    async def stragglers():
        return straggler_report(TOTALS, 60.0)

    built.stragglers = stragglers
    return built


async def ask(service, path, *, host="127.0.0.1", headers=None, **settings):
    transport = httpx.ASGITransport(app_for(service, **settings), client=(host, 50000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path, headers=headers)


async def test_a_trace_is_a_chrome_trace_of_the_time_that_is_asked_for(service):
    answer = await ask(service, "/admin/trace?seconds=0.5")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert [event["name"] for event in answer.json()["traceEvents"] if event["ph"] == "X"] == ["ffn"]
    await ask(service, "/admin/trace")
    assert service.workers.asked == [0.5, 2.0]


@pytest.mark.parametrize("seconds", ["0", "-1", "61", "nan", "a"])
async def test_a_time_that_cannot_be_is_refused(service, seconds):
    answer = await ask(service, f"/admin/trace?seconds={seconds}")
    assert answer.status_code == 400
    assert "seconds" in answer.json()["error"]["message"]
    assert service.workers.asked == []


async def test_too_many_recordings_are_refused(service):
    service.workers.error = TooManyRecordingsError("4 recordings are under way already")
    answer = await ask(service, "/admin/trace")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_recordings")


async def test_stragglers_are_told_of(service):
    answer = (await ask(service, "/admin/stragglers")).json()
    assert answer["findings"] == ["no worker, layer or expert stands out"]
    assert answer["workers"] == [
        {"worker": "ffn-0", "role": "ffn", "batches": 100, "rows": 800, "seconds": 0.1, "slowness": None}
    ]


@pytest.mark.parametrize("path", ["/admin/trace", "/admin/stragglers"])
async def test_both_are_for_operators(service, path):
    assert (await ask(service, path, host="192.0.2.7")).status_code == 403
    for key, status in (("operator", 200), ("client", 403), ("stranger", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        assert (await ask(service, path, headers=headers, api_key="operator,client")).status_code == status
