"""Simulated time: the loop and the events beside it have one clock, and it only jumps to what happens."""

import asyncio
import time

import pytest

from afd_server.simulator.virtual_time import Events, current_events, run_virtual


def test_events_run_in_order_of_time_and_of_one_time_in_the_order_in_which_they_were_asked_for():
    events, ran = Events(), []
    for at_s, name in ((2.0, "late"), (1.0, "first"), (1.0, "second")):
        events.at(at_s, ran.append, name)
    events.run_until(1.5)
    assert ran == ["first", "second"] and events.now_s == 1.5
    events.run_until(5.0)
    assert ran == ["first", "second", "late"] and events.now_s == 5.0


def test_hours_pass_at_once_and_sleepers_and_events_meet_in_order():
    async def run():
        events, seen = current_events(), []
        events.at(1800.0, lambda: seen.append(("event", events.now_s)))
        await asyncio.sleep(3600.0)
        seen.append(("sleeper", asyncio.get_running_loop().time()))
        return seen

    began_s = time.monotonic()
    assert run_virtual(run()) == [("event", 1800.0), ("sleeper", 3600.0)]
    assert time.monotonic() - began_s < 60


def test_what_an_event_wakes_runs_before_the_next_event():
    async def run():
        events, loop, seen = current_events(), asyncio.get_running_loop(), []
        future = loop.create_future()

        def wake():
            future.set_result(None)
            events.woke = True

        events.at(1.0, wake)
        events.at(1.0, seen.append, "next event")
        await future
        seen.append("woken")
        await asyncio.sleep(0.5)
        return seen

    assert run_virtual(run()) == ["woken", "next event"]


def test_a_deadline_of_asyncio_is_one_in_simulated_time():
    async def run():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100.0):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtual(run()) == 100.0


def test_where_nothing_is_going_to_happen_it_says_so():
    with pytest.raises(AssertionError, match="everyone waits"):
        run_virtual(asyncio.Event().wait())
