"""Who starts, waits or is refused: rules over a fleet whose loads the test sets, then the router with replicas in memory."""

import asyncio
import re
from contextlib import aclosing
from dataclasses import replace

import pytest

from afd_server.errors import OverloadedError
from afd_server.router.admission import Admission, ReplicaLoad
from afd_server.router.router import Router
from afd_server.router.stream import Stream
from afd_server.telemetry.metrics import Metrics
from afd_server.types import GenerationRequest, ReplicaStats, ReplicaUpdate, SamplingParams, StepForecast
from tests.unit.router.memory_client import MemoryClient
from tests.unit.router.test_router import Reader, make_request, turns, until

# A step takes 20 ms, 2 ms more for each request, 1 ms more for each prompt token: 40 requests at 100 ms.
FORECAST = StepForecast(limit_s=0.1, base_s=0.02, request_s=0.002, prompt_token_s=0.001, max_requests=40)
IDLE = ReplicaLoad("attention-0", 0, 0, 0, FORECAST)
FULL = ReplicaLoad("attention-0", 40, 0, 0, FORECAST)


class Fleet:
    """Takes what it has room for by `current`, which the test changes."""

    def __init__(self, *current):
        self.current = list(current)
        self.placed = []

    def loads(self):
        return self.current

    def place(self, stream, among):
        self.placed.append(stream.request_id)
        name = next(iter(among))
        self.current = [
            replace(load, num_requests=load.num_requests + 1) if load.name == name else load
            for load in self.current
        ]
        return True


def a_stream(name, prompt_tokens=10, *, output=100, priority=0, tenant=""):
    request = GenerationRequest(
        name, (1,) * prompt_tokens, SamplingParams(output), priority=priority, tenant=tenant
    )
    return Stream(request)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def an_admission(ttft_sla_s=None, max_queue_len=100, clock=None):
    metrics = Metrics("m")
    return Admission(0.11, ttft_sla_s, max_queue_len, metrics, clock=clock or Clock()), metrics


def value(metrics, name):
    found = re.findall(rf"^afd:{name}(?:{{[^}}]*}})? (\S+)$", metrics.exposition().decode(), re.M)
    return sum(map(float, found))


def drain(admission, fleet):
    """One place after the other becomes free; the order in which they are taken."""
    while True:
        before = len(fleet.placed)
        fleet.current = [replace(FULL, num_requests=39)]
        admission.advance(fleet)
        if len(fleet.placed) == before:
            return fleet.placed


async def test_who_finds_room_starts_at_once():
    admission, metrics = an_admission(ttft_sla_s=1.0)
    fleet = Fleet(IDLE)
    admission.enter(a_stream("a"), fleet)
    assert fleet.placed == ["a"]
    assert (
        value(metrics, "requests_queued_total"),
        value(metrics, "request_admission_time_seconds_count"),
    ) == (
        0,
        1,
    )


async def test_who_does_not_waits_in_order_and_the_wait_is_measured():
    clock = Clock()
    admission, metrics = an_admission(clock=clock)
    fleet = Fleet(FULL)
    for name in "abc":
        admission.enter(a_stream(name), fleet)
    assert fleet.placed == []
    assert value(metrics, "num_requests_queued") == 3
    clock.now = 2.0
    assert drain(admission, fleet) == ["a", "b", "c"]
    assert value(metrics, "request_admission_time_seconds_sum") == 6.0
    assert (value(metrics, "requests_queued_total"), value(metrics, "num_requests_queued")) == (3, 0)


@pytest.mark.parametrize(
    ("load", "prompt_tokens", "has_room"),
    [
        (IDLE, 10**6, True),
        (replace(IDLE, forecast=None), 10**6, True),
        (replace(IDLE, forecast=None, num_requests=1), 1, False),
        (FULL, 1, False),
        (replace(FULL, num_requests=39), 1000, True),
        (ReplicaLoad("a", 21, 1, 50, FORECAST), 30, True),  # two steps with 40 ms each for prompts
        (ReplicaLoad("a", 21, 1, 50, FORECAST), 31, False),
    ],
)
def test_when_a_replica_has_room(load, prompt_tokens, has_room):
    assert load.has_room(prompt_tokens) is has_room


async def test_a_first_token_that_would_come_too_late_is_refused_with_the_prediction():
    admission, metrics = an_admission(ttft_sla_s=1.0)
    fleet = Fleet(FULL)
    refusal = None
    num_waiting = 0
    while refusal is None:
        try:
            admission.enter(a_stream(f"r{num_waiting}"), fleet)
            num_waiting += 1
        except OverloadedError as error:
            refusal = error
    # Each takes 210 ms of a step's 80 ms for requests, of 100 ms: 0.2625 s. Three are ahead; its own prompt is read in 3.625
    # steps, since it gets its share of each and the one under way must end first: 1.15 s.
    assert num_waiting == 3
    assert refusal.reason == "ttft_predicted"
    assert refusal.retry_after_s == 1
    assert "after 1150 ms, at most 1000 ms are promised" in str(refusal)
    assert "a token every 102 ms, 110 ms are promised" in str(refusal)
    assert value(metrics, 'requests_refused_total{model_name="m",reason="ttft_predicted"}') == 1


def test_the_time_to_come_back_grows_with_the_queue():
    async def retry_after(num_waiting):
        admission, _ = an_admission(max_queue_len=num_waiting)
        fleet = Fleet(FULL)
        for number in range(num_waiting):
            admission.enter(a_stream(str(number)), fleet)
        with pytest.raises(OverloadedError) as caught:
            admission.enter(a_stream("late"), fleet)
        assert caught.value.reason == "queue_full"
        return caught.value.retry_after_s

    few, many = (asyncio.run(retry_after(count)) for count in (10, 100))
    assert 1 <= few < many <= 20


async def test_a_replica_with_nothing_to_do_takes_what_is_predicted_to_be_late():
    admission, _ = an_admission(ttft_sla_s=0.001)
    fleet = Fleet(IDLE)
    admission.enter(a_stream("a", 5000), fleet)
    assert fleet.placed == ["a"]


async def test_who_has_waited_in_vain_is_refused_then():
    admission, metrics = an_admission(ttft_sla_s=0.6)
    fleet = Fleet(FULL)
    stream = a_stream("a")
    admission.enter(stream, fleet)
    with pytest.raises(OverloadedError) as caught:
        async with asyncio.timeout(30):
            await stream.next()
    assert caught.value.reason == "ttft_deadline"
    assert value(metrics, "num_requests_queued") == 0
    assert drain(admission, fleet) == []


async def num_accepted(admission, *, output=100):
    """By a fleet without a place, until one is refused."""
    for count in range(1000):
        try:
            admission.enter(a_stream(f"new{count}", output=output), Fleet(FULL))
        except OverloadedError:
            return count
    raise AssertionError("nobody was refused")


async def test_waits_that_took_longer_than_expected_are_expected_to_take_longer():
    async def accepted(slower):
        clock = Clock()
        admission, _ = an_admission(ttft_sla_s=60.0, max_queue_len=1000, clock=clock)
        for number in range(3):
            fleet = Fleet(FULL)
            names = [f"{number} {place}" for place in range(100)]
            for name in names:
                admission.enter(a_stream(name), fleet)
            for _ in names:
                fleet.current = [replace(FULL, num_requests=39)]
                admission.advance(fleet)
                clock.now += slower * 0.2625
            assert fleet.placed == names
        return await num_accepted(admission)

    usual = await accepted(1.0)
    assert usual == pytest.approx(0.9 * (0.95 * 60 - 0.3625) / 0.2625, abs=2)
    assert await accepted(1.5) == pytest.approx(usual / 1.5, rel=0.05)
    assert await accepted(0.7) == pytest.approx(usual / 0.7, rel=0.05)


async def test_a_request_must_start_while_nearly_all_would_still_have_their_first_token_in_time():
    """The replica has room, and its first tokens take as long as expected, or for one in ten three times as long."""

    async def last_start_s(slow):
        clock = Clock()
        admission, _ = an_admission(ttft_sla_s=3.0, clock=clock)
        for number in range(1000):
            stream = a_stream(f"past{number}")
            fleet = Fleet(replace(FULL, num_requests=30))  # reads it in the step after the one under way
            admission.enter(stream, fleet)
            clock.now += 0.2 * (3 if slow and number % 10 == 0 else 1)
            admission.note_output(stream)
        loop = asyncio.get_running_loop()
        admission.enter(a_stream("a"), Fleet(FULL))
        (queued,) = admission._queued.values()
        return queued.timer.when() - loop.time()

    usual_s, careful_s = await last_start_s(slow=False), await last_start_s(slow=True)
    own_s = 0.3625  # see above
    assert usual_s == pytest.approx(0.95 * 3.0 - own_s, abs=0.05)
    assert 0.95 * 3.0 - 3.5 * own_s < careful_s < 0.95 * 3.0 - 2 * own_s


async def test_a_client_that_left_does_not_wait():
    admission, metrics = an_admission()
    fleet = Fleet(FULL)
    streams = [a_stream(name) for name in "abc"]
    for stream in streams:
        admission.enter(stream, fleet)
    admission.leave(streams[1])
    admission.leave(streams[1])
    assert value(metrics, "num_requests_queued") == 2
    assert drain(admission, fleet) == ["a", "c"]


async def test_the_lower_priority_value_goes_first():
    admission, _ = an_admission()
    fleet = Fleet(FULL)
    for name, priority in (("later", 5), ("usual", 0), ("sooner", -5), ("usual too", 0)):
        admission.enter(a_stream(name, priority=priority), fleet)
    assert drain(admission, fleet) == ["sooner", "usual", "usual too", "later"]


async def test_tenants_take_turns_whatever_they_have_queued():
    admission, _ = an_admission()
    fleet = Fleet(FULL)
    for number in range(4):
        admission.enter(a_stream(f"many{number}", tenant="x"), fleet)
    for number in range(2):
        admission.enter(a_stream(f"few{number}", tenant="y"), fleet)
    assert drain(admission, fleet) == ["many0", "few0", "many1", "few1", "many2", "many3"]


async def test_fairness_counts_tokens_not_requests():
    admission, _ = an_admission()
    fleet = Fleet(FULL)
    for number in range(3):
        admission.enter(a_stream(f"long{number}", 300, tenant="x"), fleet)
    for number in range(6):
        admission.enter(a_stream(f"short{number}", 100, tenant="y"), fleet)
    order = drain(admission, fleet)
    assert [name[0] for name in order] == list("lsslsslss")


async def test_a_full_queue_refuses_its_last_and_not_the_newcomer_of_a_quiet_tenant():
    admission, _ = an_admission(max_queue_len=2)
    fleet = Fleet(FULL)
    streams = [a_stream(f"many{number}", tenant="x") for number in range(2)]
    for stream in streams:
        admission.enter(stream, fleet)
    admission.enter(a_stream("few", tenant="y"), fleet)
    with pytest.raises(OverloadedError):
        await streams[1].next()
    assert drain(admission, fleet) == ["many0", "few"]


async def test_who_was_not_served_is_not_charged():
    admission, _ = an_admission()
    fleet = Fleet(FULL)
    gone = a_stream("gone", 5000, tenant="x")
    admission.enter(a_stream("y0", tenant="y"), fleet)
    admission.enter(gone, fleet)
    admission.leave(gone)
    admission.enter(a_stream("x0", 9, tenant="x"), fleet)
    admission.enter(a_stream("y1", tenant="y"), fleet)
    assert drain(admission, fleet) == ["y0", "x0", "y1"]


async def test_outputs_that_end_early_shorten_the_wait_of_those_that_ask_for_much():
    async def accepted(mean_output):
        admission, _ = an_admission(ttft_sla_s=2.0)
        for _ in range(200):
            admission.note_end(mean_output)
        return await num_accepted(admission, output=5000)

    assert await accepted(20) > 2 * await accepted(200)


# --- with the router ---------------------------------------------------------------------------------------------


def tell(client, *outputs, forecast=FORECAST):
    client._updates.put_nowait(ReplicaUpdate(tuple(outputs), ReplicaStats(forecast=forecast)))


ONE = replace(FORECAST, max_requests=1)


async def test_the_end_of_one_request_starts_the_next():
    client = MemoryClient("attention-0")
    admission, _ = an_admission()
    async with Router([client], admission=admission) as router:
        tell(client, forecast=ONE)
        await turns()
        readers = [Reader(router, make_request(name)) for name in "ab"]
        await until(lambda: client.submitted)
        await turns()
        assert [request.request_id for request in client.submitted] == ["a"]
        client.give("a", 5, end="stop", stop_token_id=5)
        await until(lambda: len(client.submitted) == 2)
        client.give("b", 6, end="stop", stop_token_id=6)
        await asyncio.gather(*(reader.task for reader in readers))


async def test_a_queued_request_whose_client_leaves_never_reaches_a_replica():
    client = MemoryClient("attention-0")
    admission, metrics = an_admission()
    async with Router([client], admission=admission) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: client.submitted)
        waiting = Reader(router, make_request("b"))
        await until(lambda: value(metrics, "num_requests_queued") == 1)
        waiting.task.cancel()
        await until(waiting.task.done)
        assert value(metrics, "num_requests_queued") == 0
        client.give("a", 5, end="stop", stop_token_id=5)
        await reader.task
    assert [request.request_id for request in client.submitted] == ["a"]
    assert client.aborted == []


async def test_an_admitted_request_that_loses_its_replica_is_not_asked_again():
    clients = [MemoryClient("attention-0"), MemoryClient("attention-1")]
    admission, metrics = an_admission(ttft_sla_s=5.0)
    async with Router(clients, admission=admission) as router:
        for client in clients:
            tell(client, forecast=ONE)
        await turns()
        readers = [Reader(router, make_request(name)) for name in "abc"]
        await until(lambda: all(client.submitted for client in clients))
        dead, alive = clients
        moved = dead.submitted[0].request_id
        dead.die()
        await until(lambda: len(alive.submitted) == 2)
        assert alive.submitted[1].request_id == moved  # and not c, which waits for a place
        assert value(metrics, "num_requests_queued") == 1
        for request in list(alive.submitted):
            alive.give(request.request_id, 5, end="length")
        await until(lambda: len(alive.submitted) == 3)
        alive.give("c", 5, end="length")
        await asyncio.gather(*(reader.task for reader in readers))


async def test_a_refusal_ends_the_request_for_the_router_too():
    client = MemoryClient("attention-0")
    admission, _ = an_admission(max_queue_len=0)
    async with Router([client], admission=admission) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: client.submitted)
        with pytest.raises(OverloadedError):
            async with aclosing(router.generate(make_request("b"))) as outputs:
                await anext(outputs)
        assert router._streams.keys() == {"a"}
        client.give("a", 5, end="length")
        await reader.task


async def test_while_no_replica_lives_requests_wait_in_the_queue():
    client = MemoryClient("attention-0")
    admission, _ = an_admission()
    async with Router([client], admission=admission) as router:
        client.die()
        await until(router.lost)
        reader = Reader(router, make_request("a"))
        await turns()
        again = MemoryClient("attention-0")
        router.replace("attention-0", again)
        await until(lambda: again.submitted)
        again.give("a", 5, end="length")
        await reader.task
