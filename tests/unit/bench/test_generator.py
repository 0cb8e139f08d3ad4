"""Schedules and limits: what is sent, how much of it at a time, and what is given up."""

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.bench.client import Client, Target
from afd_server.bench.dataset import Prompt
from afd_server.bench.generator import Limits, replayed, run, schedule
from tests.unit.bench.scripted_server import ScriptedServer, counting, usage

PROMPTS = [Prompt(f"word {number}", output_tokens=2) for number in range(12)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.floats(0.01, 1e4), st.floats(0.1, 10), st.integers())
def test_a_schedule_has_the_rate_that_it_is_asked_for(count, rate, burstiness, seed):
    prompts = [Prompt(str(number), 1) for number in range(count)]
    timed = schedule(prompts, rate, burstiness, seed)
    times = [at_s for at_s, _ in timed]
    assert [prompt for _, prompt in timed] == prompts
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert timed == schedule(prompts, rate, burstiness, seed)


def test_an_infinite_rate_sends_all_at_once():
    assert {at_s for at_s, _ in schedule(PROMPTS, math.inf)} == {0.0}


def test_a_trace_is_stretched_to_a_rate_or_left_as_it_is():
    trace = [(0.0, PROMPTS[0]), (1.0, PROMPTS[1]), (4.0, PROMPTS[2])]
    assert replayed(trace) == trace
    assert [at_s for at_s, _ in replayed(trace, 0.5)] == [0.0, 1.5, 6.0]
    assert replayed([(0.0, PROMPTS[0])], 5.0) == [(0.0, PROMPTS[0])]


async def run_on(server, timed, *limits, **more):
    async with server.running(), Client(Target(server.url, "m")) as client:
        return await run(client, timed, *limits, **more)


async def test_every_request_is_sent_and_told_of_once():
    server, told = ScriptedServer(counting), []
    result = await run_on(server, schedule(PROMPTS, math.inf), on_outcome=told.append)
    assert sorted(body["prompt"] for body in server.bodies) == sorted(prompt.text for prompt in PROMPTS)
    assert told == result.outcomes
    assert all(outcome.is_complete for outcome in told)
    assert {(outcome.input_tokens, outcome.output_tokens) for outcome in told} == {(3, 2)}


async def test_no_more_are_under_way_than_allowed_and_places_are_used():
    server = ScriptedServer(counting)
    result = await run_on(server, schedule(PROMPTS, math.inf), Limits(max_concurrency=3))
    assert len(result.outcomes) == len(PROMPTS)
    assert server.most_under_way <= 3
    assert result.max_concurrent_requests == 3


async def test_failures_free_their_places_too():
    result = await run_on(
        ScriptedServer([], status=503), schedule(PROMPTS, math.inf), Limits(max_concurrency=2)
    )
    assert [outcome.error for outcome in result.outcomes] == ["HTTP 503"] * len(PROMPTS)


async def test_none_is_sent_before_it_is_due():
    result = await run_on(
        ScriptedServer(counting), [(0.02 * number, prompt) for number, prompt in enumerate(PROMPTS)]
    )
    assert all(outcome.sent_s >= outcome.due_s for outcome in result.outcomes)
    assert max(outcome.due_s for outcome in result.outcomes) == pytest.approx(0.22)
    assert result.duration_s >= 0.22


async def test_what_does_not_end_is_given_up_and_counted():
    server = ScriptedServer(counting)
    async with server.running(), Client(Target(server.url, "m")) as client:
        server.may_answer.clear()
        result = await run(client, schedule(PROMPTS, math.inf), Limits(patience_s=0.05))
        server.may_answer.set()
    assert [outcome.error for outcome in result.outcomes] == ["unfinished"] * len(PROMPTS)


async def test_none_is_sent_when_the_time_is_over():
    """The clock is real, so how many are sent is not known: but the endless supply ends."""

    def endless():
        while True:
            yield 0.0, PROMPTS[0]

    result = await run_on(ScriptedServer(counting), endless(), Limits(max_concurrency=2, until_s=0.2))
    assert result.outcomes
    assert all(outcome.sent_s <= result.duration_s for outcome in result.outcomes)


async def test_a_client_that_was_refused_rests():
    """For longer than requests are sent, so there is no second one however slow the machine."""
    timed = [(0.0, prompt) for prompt in PROMPTS]
    limits = Limits(max_concurrency=1, until_s=0.1, pause_s=0.2)
    result = await run_on(ScriptedServer([], status=429), timed, limits)
    assert [outcome.error for outcome in result.outcomes] == ["HTTP 429"]


async def test_an_interrupted_run_leaves_no_request_behind():
    server = ScriptedServer([(0.0, usage(1, 1))])
    async with server.running(), Client(Target(server.url, "m")) as client:
        server.may_answer.clear()
        running = asyncio.create_task(run(client, schedule(PROMPTS, math.inf)))
        async with asyncio.timeout(30):
            while server.under_way < len(PROMPTS):
                await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert len(asyncio.all_tasks()) <= 1 + 2 * len(PROMPTS)  # this one, and the server's
        server.may_answer.set()


async def test_the_generator_measures_itself():
    result = await run_on(ScriptedServer(counting), schedule(PROMPTS, math.inf))
    assert result.cpu_s > 0
    assert min(result.loop_late_s) >= 0
