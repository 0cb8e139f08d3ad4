"""A replica of the same process behind the router: real engine thread, toy worker, one event loop after another."""

import asyncio

import pytest

from afd_server.engine.engine import Engine
from afd_server.engine.loop import EngineLoop
from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel
from afd_server.errors import UnavailableError, WorkerDiedError
from afd_server.router.replica_client import LocalReplicaClient
from afd_server.router.router import Router
from afd_server.types import (
    FinishReason,
    GenerationRequest,
    ReplicaStats,
    ReplicaUpdate,
    RequestOutput,
    SamplingParams,
)
from tests.unit.engine.toy_worker import ToyWorker, continuation, small_config

SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def client():
    config = small_config()
    scheduler = Scheduler(config, num_blocks=32, eos_token_ids=())
    client = LocalReplicaClient("attention-0")
    loop = EngineLoop(
        Engine(ToyWorker(config), scheduler, MicroBatchChooser("1"), StepTimeModel()), client.deliver
    )
    client.attach(loop)
    client.scheduler = scheduler
    yield client
    loop.stop()
    assert scheduler.stats().num_free_blocks == 32


async def tokens_of(router, prompt):
    request = GenerationRequest(str(prompt), tuple(prompt), SAMPLING)
    return [token_id async for output in router.generate(request) for token_id in output.token_ids]


async def run(client, prompts):
    async with asyncio.timeout(20), Router([client], failover_timeout_s=0.0) as router:
        return await asyncio.gather(*(tokens_of(router, prompt) for prompt in prompts))


def test_one_event_loop_after_another(client):
    for start in range(3):
        prompts = [[start, index] for index in range(6)]
        assert asyncio.run(run(client, prompts)) == [
            continuation(prompt, SAMPLING, 32)[0] for prompt in prompts
        ]


def test_what_a_router_leaves_behind_is_aborted(client):
    async def leave():
        async with asyncio.timeout(20), Router([client]) as router:
            outputs = router.generate(GenerationRequest("a", (1,), SamplingParams(max_tokens=30)))
            await anext(outputs)

    asyncio.run(leave())
    assert asyncio.run(run(client, [[1, 2]])) == [continuation([1, 2], SAMPLING, 32)[0]]


class Recorder:
    """In an engine loop's place: what the client asks of it."""

    def __init__(self):
        self.submitted, self.aborted = [], []
        self.submit, self.abort = self.submitted.append, self.aborted.append


async def test_closing_aborts_what_has_not_ended_and_hears_no_more():
    client, recorder = LocalReplicaClient("attention-0"), Recorder()
    client.attach(recorder)
    updates = client.updates()
    for name in "abc":
        client.submit(GenerationRequest(name, (1,), SAMPLING))
    ended = RequestOutput("a", (5,), finish_reason=FinishReason.STOP)
    client.deliver(ReplicaUpdate((ended,), ReplicaStats()))
    assert (await anext(updates)).outputs == (ended,)
    client.abort("b")
    client.close()
    assert recorder.aborted == ["b", "c"]
    client.deliver(ReplicaUpdate((ended,), ReplicaStats()))
    more = asyncio.ensure_future(anext(updates))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not more.done()
    more.cancel()


def test_a_replica_that_has_stopped_is_gone(client):
    client._engine_loop.stop()
    with pytest.raises(WorkerDiedError):
        client.submit(GenerationRequest("a", (1,), SAMPLING))
    with pytest.raises(UnavailableError):
        asyncio.run(run(client, [[1]]))
