"""The router's promises to a client: its tokens once and in order, a pause when a replica dies, an end in any case."""

import asyncio
from contextlib import aclosing

import pytest

from afd_server.errors import UnavailableError
from afd_server.router.router import REQUEST_TOKENS, Router
from afd_server.types import FinishReason, GenerationRequest, RequestOutput, SamplingParams, TokenLogprobs
from tests.unit.router.memory_client import MemoryClient


def make_request(request_id, prompt=(1, 2), **sampling):
    return GenerationRequest(
        request_id, tuple(prompt), SamplingParams(**{"max_tokens": 10, "seed": 3, **sampling})
    )


class Reader:
    """A client that reads a request to its end. outputs: what it has so far."""

    def __init__(self, router, request):
        self.outputs = []
        self.task = asyncio.create_task(self._read(router, request))
        # Some tests end with their router, before their readers: that is no news for the log.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _read(self, router, request):
        async with aclosing(router.generate(request)) as outputs:
            async for output in outputs:
                self.outputs.append(output)

    @property
    def token_ids(self):
        return [token_id for output in self.outputs for token_id in output.token_ids]


async def until(condition):
    """Lets the event loop run until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def turns(count=5):
    """Lets the event loop do what is due, timers of no delay included."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
def clients():
    return [MemoryClient("attention-0"), MemoryClient("attention-1")]


async def test_outputs_reach_their_own_reader_in_order(clients):
    async with Router(clients[:1]) as router:
        readers = [Reader(router, make_request(name)) for name in "ab"]
        await until(lambda: len(clients[0].submitted) == 2)
        clients[0].give("a", 5)
        clients[0].give("b", 6)
        clients[0].give("nobody's", 7)
        clients[0].give("a", 8, end="stop", stop_token_id=8)
        clients[0].give("b", 9, end="length")
        await asyncio.gather(*(reader.task for reader in readers))
    assert [reader.token_ids for reader in readers] == [[5, 8], [6, 9]]
    assert clients[0].aborted == []


async def test_what_waits_together_comes_together(clients):
    """A reader that was busy elsewhere gets one output, with all that every one of them said."""
    logprobs = [TokenLogprobs(-0.5 * token, ((token, -0.5 * token),)) for token in range(4)]
    async with Router(clients[:1]) as router, aclosing(router.generate(make_request("a"))) as outputs:
        clients[0].give("a", 0, logprobs=(logprobs[0],), cached_tokens=2)
        first = await anext(outputs)
        clients[0].give("a", 1, logprobs=(logprobs[1],))
        clients[0].give("a", 2, logprobs=(logprobs[2],))
        clients[0].give("a", 3, logprobs=(logprobs[3],), end="stop", stop_token_id=3)
        await turns()
        rest = [output async for output in outputs]
    assert (first.token_ids, first.cached_tokens) == ((0,), 2)
    expected = RequestOutput("a", (1, 2, 3), tuple(logprobs[1:]), FinishReason.STOP, stop_token_id=3)
    assert rest == [expected]


async def test_tokens_reach_a_reader_before_the_failure_that_waits_behind_them(clients):
    async with Router(clients[:1]) as router, aclosing(router.generate(make_request("a"))) as outputs:
        clients[0].give("a", 5)
        await anext(outputs)
        clients[0].give("a", 6)
        clients[0].give("a", 7)
        clients[0].give("a", end="error", error="worker ffn-0: gone")
        await turns()
        rest = [output async for output in outputs]
    assert [output.token_ids for output in rest] == [(6, 7), ()]
    assert [output.error for output in rest] == [None, "worker ffn-0: gone"]


async def test_what_was_reported_of_a_prompt_is_not_asked_for_again(clients):
    report = [TokenLogprobs(-0.5 * place, rank=place) for place in range(1, 4)]
    async with Router(clients) as router, aclosing(router.generate(make_request("a"))) as outputs:
        first = asyncio.ensure_future(anext(outputs))
        await until(lambda: clients[0].submitted)
        clients[0].give("a", prompt_logprobs=tuple(report[:1]))
        clients[0].give("a", prompt_logprobs=tuple(report[1:2]))
        given = [*(await first).prompt_logprobs]
        clients[0].die()
        await until(lambda: clients[1].submitted)
        assert clients[1].submitted[0].resumed_prompt_logprobs == 2
        assert clients[1].submitted[0].resumed_output_token_ids == ()
        clients[1].give("a", 5, prompt_logprobs=tuple(report[2:]), end="stop")
        given += [entry async for output in outputs for entry in output.prompt_logprobs]
    assert given == report


async def test_the_least_loaded_replica_is_chosen(clients):
    async with Router(clients) as router:
        for name in "abcd":
            Reader(router, make_request(name, prompt=[ord(name)]))
        await until(lambda: sum(len(client.submitted) for client in clients) == 4)
        assert [len(client.submitted) for client in clients] == [2, 2]


async def test_a_long_unread_prompt_counts_more_than_a_decoding_request(clients):
    async with Router(clients) as router:
        Reader(router, make_request("long", prompt=[1] * 500))
        await until(lambda: clients[0].submitted)
        for name in "abc":
            Reader(router, make_request(name, prompt=[ord(name)]))
        await until(lambda: len(clients[1].submitted) == 3)
        clients[0].give("long", 1)
        await until(lambda: router._replicas["attention-0"].load_tokens == REQUEST_TOKENS)
        Reader(router, make_request("d", prompt=[9]))
        await until(lambda: len(clients[0].submitted) == 2)


async def test_a_known_beginning_goes_to_the_replica_that_knows_it(clients):
    prompt = list(range(200))
    async with Router(clients) as router:
        first = Reader(router, make_request("first", prompt))
        await until(lambda: clients[0].submitted)
        clients[0].give("first", 1, end="stop")
        await first.task
        Reader(router, make_request("other", [7] * 40))
        await until(lambda: clients[0].submitted[1:] or clients[1].submitted)
        for name in "ab":
            Reader(router, make_request(name, [*prompt, ord(name)]))
        await until(lambda: sum(len(client.submitted) for client in clients) == 4)
    where = {request.request_id: index for index, client in enumerate(clients) for request in client.submitted}
    # 128 known tokens are worth waiting behind one request of 40 + REQUEST_TOKENS, but not behind a long prompt too.
    assert where == {"first": 0, "other": 0, "a": 0, "b": 1}


async def test_closing_the_generator_aborts_at_once(clients):
    async with Router(clients[:1]) as router:
        outputs = router.generate(make_request("a"))
        clients[0].give("a", 5)
        assert (await anext(outputs)).token_ids == (5,)
        await outputs.aclose()
        assert clients[0].aborted == ["a"]
        clients[0].give("a", 6)  # was under way when the abort was


async def test_a_cancelled_reader_aborts_at_once(clients):
    async with Router(clients[:1]) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        reader.task.cancel()
        await asyncio.wait([reader.task])
        assert clients[0].aborted == ["a"]


async def test_a_request_goes_on_at_another_replica_and_no_token_comes_twice(clients):
    async with Router(clients) as router:
        reader = Reader(router, make_request("a", min_tokens=3))
        await until(lambda: clients[0].submitted)
        clients[0].give("a", 5, cached_tokens=1)
        clients[0].give("a", 6)
        clients[0].die()
        await until(lambda: clients[1].submitted)
        await until(lambda: reader.token_ids == [5, 6])
        (resumed,) = clients[1].submitted
        assert resumed == GenerationRequest("a", (1, 2), make_request("a", min_tokens=3).sampling, (5, 6))
        clients[1].give("a", 7, cached_tokens=2)
        clients[1].give("a", 8, end="length")
        await reader.task
        assert reader.token_ids == [5, 6, 7, 8]
        assert sum(output.cached_tokens for output in reader.outputs) == 1
        assert clients[0].closed
        (sentence,) = router.health()
        assert "attention-0" in sentence
        assert "the connection ended" in sentence


async def test_a_death_noticed_by_submitting_is_a_death(clients):
    async with Router(clients) as router:
        clients[0]._dead = True
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[1].submitted)
        clients[1].give("a", 5, end="stop")
        await reader.task
        assert len(router.health()) == 1


async def test_a_second_death_is_survived_too(clients):
    async with Router(clients) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        clients[0].give("a", 5)
        clients[0].die()
        await until(lambda: clients[1].submitted)
        clients[1].give("a", 6)
        clients[1].die()
        await until(lambda: len(router.health()) == 2)
        back = MemoryClient("attention-0")
        router.replace("attention-0", back)
        await until(lambda: back.submitted)
        assert back.submitted[0].resumed_output_token_ids == (5, 6)
        router.replace("attention-1", other := MemoryClient("attention-1"))
        back.give("a", 7, end="stop")
        await reader.task
        assert reader.token_ids == [5, 6, 7]
        assert (len(back.submitted), other.submitted) == (1, [])
        assert router.health() == []


async def test_replacing_a_replica_whose_death_was_not_noticed_moves_its_requests(clients):
    async with Router(clients[:1], failover_timeout_s=0.0) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        back = MemoryClient("attention-0")
        router.replace("attention-0", back)
        await until(lambda: back.submitted)
        clients[0].give("a", 99)
        await turns()
        back.give("a", 5, end="stop")
        await reader.task
        assert reader.token_ids == [5]
        assert router.health() == []


async def test_a_restarted_replica_has_an_empty_cache(clients):
    prompt = list(range(200))
    async with Router(clients) as router:
        first = Reader(router, make_request("first", prompt))
        await until(lambda: clients[0].submitted)
        clients[0].give("first", 1, end="stop")
        await first.task
        router.replace("attention-0", back := MemoryClient("attention-0"))
        Reader(router, make_request("other", [7]))
        await until(lambda: back.submitted)
        Reader(router, make_request("again", prompt))
        await until(lambda: clients[1].submitted)


async def test_waiting_for_a_replacement_ends_by_the_deadline(clients):
    async with Router(clients[:1], failover_timeout_s=0.0) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        clients[0].die()
        with pytest.raises(UnavailableError, match="attention-0 died"):
            await reader.task
        router.replace("attention-0", back := MemoryClient("attention-0"))
        assert back.submitted == []


async def test_without_a_live_replica_new_requests_wait_for_one(clients):
    async with Router(clients[:1]) as router:
        clients[0].die()
        await until(router.health)
        reader = Reader(router, make_request("a"))
        await turns()
        router.replace("attention-0", back := MemoryClient("attention-0"))
        await until(lambda: back.submitted)
        back.give("a", 5, end="stop")
        await reader.task
        assert reader.token_ids == [5]


async def test_a_new_request_does_not_wait_for_ever(clients):
    async with Router(clients[:1], failover_timeout_s=0.0) as router:
        clients[0]._dead = True  # noticed only by this request
        with pytest.raises(UnavailableError, match=r"attention-0 died \(the connection is closed\)"):
            await anext(router.generate(make_request("a")))
        assert not router._streams
        assert not router._orphans


async def test_when_every_replica_is_given_up_whoever_waits_hears_why_at_once(clients):
    async with Router(clients) as router:
        clients[1].die()
        await until(router.health)
        router.give_up("attention-1", "attention-1 died 10 times")
        assert router.is_serving()
        assert router.health() == []  # whoever gave it up says so
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        clients[0].die()
        await until(router.health)
        assert not router.is_serving()
        assert not reader.task.done()  # attention-0 may come back
        router.give_up("attention-0", "attention-0 died 10 times")
        with pytest.raises(UnavailableError, match="attention-0 died 10 times"):
            await reader.task
        with pytest.raises(UnavailableError, match="attention-1 died 10 times"):
            await anext(router.generate(make_request("b")))


async def test_requests_that_a_lost_replica_had_are_counted(clients):
    lost = []
    async with Router(clients, on_lost=lambda name, requests: lost.append((name, requests))) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        clients[0].die()
        await until(lambda: clients[1].submitted)
        clients[1].give("a", 5, end="stop")
        await reader.task
    assert lost == [("attention-0", 1)]


async def test_an_error_of_the_replica_is_passed_on_and_not_repeated(clients):
    async with Router(clients) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        clients[0].give("a", end="error", error="worker ffn-0: gone")
        await reader.task
    assert reader.outputs[-1].error == "worker ffn-0: gone"
    assert clients[1].submitted == []


async def test_closing_the_router_ends_what_is_under_way(clients):
    async with Router(clients[:1]) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
    assert clients[0].closed
    with pytest.raises(UnavailableError, match="shutting down"):
        await reader.task


async def test_statistics_are_passed_on_and_cost_no_token_when_they_fail(clients):
    seen = []

    def on_stats(name, stats):
        seen.append((name, stats.num_running))
        raise KeyError("a bug in the metrics")

    async with Router(clients[:1], on_stats) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        clients[0].give("a", 5)
        clients[0].give("a", 6, end="stop")
        await reader.task
        assert router.health() == []
    assert reader.token_ids == [5, 6]
    assert seen == [("attention-0", 1)] * 2


async def test_a_new_replica_takes_requests_and_those_that_wait_first(clients):
    async with Router(clients[:1]) as router:
        clients[0].die()
        reader = Reader(router, make_request("a"))
        await until(router.health)
        await turns()
        router.add(new := MemoryClient("attention-7"))
        await until(lambda: new.submitted)
        new.give("a", 5, end="stop")
        await reader.task
        assert reader.token_ids == [5]


async def test_a_draining_replica_ends_what_it_has_and_gets_no_more(clients):
    async with Router(clients) as router:
        first = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        draining = asyncio.create_task(router.drain("attention-0", 10.0))
        await turns()
        for name in "bc":
            Reader(router, make_request(name))
        await until(lambda: len(clients[1].submitted) == 2)
        clients[0].give("a", 5)
        clients[0].give("a", 6, end="stop")
        await first.task
        await draining
        router.remove("attention-0")
        assert first.token_ids == [5, 6]
        assert (len(clients[0].submitted), clients[0].aborted, clients[0].closed) == (1, [], True)
        assert router.health() == []


async def test_what_a_draining_replica_does_not_end_in_time_goes_on_elsewhere(clients):
    async with Router(clients) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        clients[0].give("a", 5)
        await until(lambda: reader.token_ids == [5])
        await router.drain("attention-0", 0.0)
        assert clients[0].aborted == ["a"]
        clients[0].give("a", 99)  # was under way when the abort was
        assert clients[1].submitted[0].resumed_output_token_ids == (5,)
        clients[1].give("a", 6, end="stop")
        await reader.task
        assert reader.token_ids == [5, 6]


async def test_requests_wait_for_the_only_replica_to_come_back_from_draining(clients):
    async with Router(clients[:1]) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        await router.drain("attention-0", 0.0)
        later = Reader(router, make_request("b"))
        await turns()
        assert len(clients[0].submitted) == 1
        router.replace("attention-0", back := MemoryClient("attention-0"))
        await until(lambda: len(back.submitted) == 2)
        for name in "ab":
            back.give(name, 5, end="stop")
        await asyncio.gather(reader.task, later.task)
        assert (reader.token_ids, later.token_ids) == ([5], [5])


async def test_a_replica_that_is_removed_at_once_loses_nothing(clients):
    async with Router(clients) as router:
        reader = Reader(router, make_request("a"))
        await until(lambda: clients[0].submitted)
        router.remove("attention-0")
        await until(lambda: clients[1].submitted)
        clients[1].give("a", 5, end="stop")
        await reader.task
        assert reader.token_ids == [5]
        assert clients[0].closed
