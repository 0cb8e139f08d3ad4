"""Router, control channel and engines together: a replica vanishes in the middle of an answer, and the answer is whole."""

import asyncio
import threading

import pytest

from afd_server.engine.engine import Engine
from afd_server.engine.loop import EngineLoop
from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel
from afd_server.router.router import Router
from afd_server.transport.control import ControlClient, ControlServer
from afd_server.types import GenerationRequest, SamplingParams
from tests.unit.engine.toy_worker import ToyWorker, continuation, small_config

SECRET = b"s" * 32
DEADLINE_S = 20.0
SAMPLING = SamplingParams(max_tokens=20, ignore_eos=True)


class Replica:
    """An attention worker without its model. stalls_at: the step that does not end before `vanish` and `stop`."""

    def __init__(self, name, stalls_at=None):
        self.gate, self.stalls_at = threading.Event(), stalls_at
        self.worker = ToyWorker(small_config())
        self.scheduler = Scheduler(small_config(), num_blocks=16, eos_token_ids=())
        self.control = ControlServer(
            SECRET,
            name=name,
            node="here",
            on_submit=lambda request: self.loop.submit(request),
            on_abort=lambda request_id: self.loop.abort(request_id),
        )
        self.loop = EngineLoop(
            Engine(self, self.scheduler, MicroBatchChooser("1"), StepTimeModel()), self.control.publish
        )

    def execute(self, plan):
        if plan.step == self.stalls_at:
            assert self.gate.wait(DEADLINE_S)
        return self.worker.execute(plan)

    async def connect(self):
        await self.control.start()
        return await ControlClient.connect(self.control.endpoint, SECRET, DEADLINE_S)

    async def vanish(self):
        await self.control.close()

    def stop(self):
        self.gate.set()
        self.loop.stop()


@pytest.mark.parametrize("others", [1, 0], ids=["another replica", "its own replacement"])
async def test_an_answer_survives_its_replica(others):
    dying = Replica("attention-0", stalls_at=6)
    living = Replica("attention-1" if others else "attention-0")
    clients = [await dying.connect(), *[await living.connect() for _ in range(others)]]
    tokens = []
    try:
        async with asyncio.timeout(DEADLINE_S), Router(clients) as router:
            async for output in router.generate(GenerationRequest("a", (3, 1, 4), SAMPLING)):
                tokens += output.token_ids
                if len(tokens) == 5 and output.finish_reason is None:
                    await dying.vanish()
                    if not others:
                        router.replace("attention-0", await living.connect())
    finally:
        await living.vanish()
        dying.stop()
        living.stop()
    assert tokens == continuation([3, 1, 4], SAMPLING, 32)[0]
    assert living.worker.plans[0].started[0].output_token_ids == tuple(tokens[:5])
    for replica in (dying, living):
        replica.scheduler.check()
        assert not replica.scheduler.has_work
