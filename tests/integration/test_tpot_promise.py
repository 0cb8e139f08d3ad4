"""A server that promises a pace it cannot keep for many: some are refused with a reason, all others get what they asked for."""

import asyncio
import os
from pathlib import Path

import httpx
import pytest

from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import Server

pytestmark = pytest.mark.integration

NUM_CLIENTS = 20
QUEUE = 2
TOKENS = 150
# No step is as short: one request runs at a time, whatever the speed of the machine.
FLAGS = ("--tpot-sla-ms", 0.001, "--max-queue-len", QUEUE, "--max-model-len", 256, "--device", "cpu")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = write_checkpoint("mixtral", tmp_path_factory.mktemp("promise") / "model")
    write_tokenizer(directory)
    with Server(directory, *FLAGS, "--api-key", "secret") as server:
        yield server


def client_of(server):
    return httpx.AsyncClient(
        base_url=server.url, headers={"Authorization": "Bearer secret"}, timeout=120, limits=httpx.Limits()
    )


def body(**fields):
    return {"prompt": [5, 6, 7], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **fields}


async def test_more_than_can_run_is_refused_with_a_reason_and_the_rest_is_served(server):
    async with client_of(server) as client:
        answers = await asyncio.gather(
            *(
                client.post("/v1/completions", json=body(prompt=[5, 6, 7 + number]))
                for number in range(NUM_CLIENTS)
            )
        )
    served = [answer.json() for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(served) + len(refused) == NUM_CLIENTS
    assert len(served) >= 1 + QUEUE
    assert refused
    assert all(answer["usage"]["completion_tokens"] == TOKENS for answer in served)
    for answer in refused:
        error = answer.json()["error"]
        assert int(answer.headers["retry-after"]) >= 1
        assert (error["code"], error["type"], error["param"]) == ("overloaded", "overloaded_error", None)
        assert "no more than 2 may wait" in error["message"]
        assert "the first token would come after" in error["message"].lower()
    assert server.metric("afd:requests_refused_total", reason="queue_full") == len(refused)
    assert server.metric("afd:request_admission_time_seconds_count") == len(served)
    assert server.metric("afd:sla_requests_total", sla="tpot", outcome="missed") == len(served)
    assert server.metric("afd:goodput_requests_total") == 0
    assert server.metric("afd:step_prediction_error_count") > 0


async def test_priority_is_served_where_requests_queue(server):
    async with client_of(server) as client:
        answer = await client.post("/v1/completions", json=body(priority=-1, max_tokens=2))
    assert answer.status_code == 200
    assert "secret" not in server.log()


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not share by sessions")
def test_workers_yield_to_the_front_end(server):
    """Where processors are short the front-end goes first: a token that nobody passes on is late, too."""

    def session(pid):
        return Path(f"/proc/{pid}/autogroup").read_text().split()[-1], os.getpriority(os.PRIO_PROCESS, pid)

    front_end = session(server.process.pid)
    workers = server.pids("Attention") + server.pids("FFN")
    assert len(workers) == 2
    for pid in workers:
        session_niceness, niceness = session(pid)
        assert int(session_niceness) > int(front_end[0])
        assert niceness == front_end[1]
