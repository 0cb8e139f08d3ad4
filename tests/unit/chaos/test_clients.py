"""The comparison of answers: it must see a token that is missing, twice, or another one, or the chaos runs prove nothing."""

import asyncio
import dataclasses
import json

import httpx
import pytest

from tests.chaos.clients import Answer, Client, FrontEnd, Job, Told, difference, make_jobs

EXPECTED = Answer({0: "abc"}, {0: [1, 2, 3]}, {0: [-0.1, -0.2, -0.3]}, {0: "length"}, {"completion_tokens": 3})
STAYS, LEAVES = Job("stays", {}), Job("leaves", {}, leaves_after=2)


def told(job=STAYS, **changes):
    return Told(job, dataclasses.replace(EXPECTED, **changes))


def test_the_same_is_right():
    assert difference(EXPECTED, told()) == ""


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"token_ids": {0: [1, 2]}}, "2 tokens instead of 3"),
        ({"token_ids": {0: [1, 2, 3, 3]}}, "4 tokens instead of 3"),
        ({"token_ids": {0: [1, 1, 2, 3]}}, "token 1 is 1 instead of 2"),
        ({"token_ids": {}}, "0 tokens instead of 3"),
        ({"texts": {0: "abd"}}, "texts"),
        ({"ends": {}}, "ends"),
        ({"usage": {"completion_tokens": 4}}, "usage"),
        ({"logprobs": {0: [-0.1, -0.2]}}, "number of log-probabilities"),
        ({"logprobs": {0: [-0.1, -0.2, -0.4]}}, "log-probabilities of choice 0"),
    ],
)
def test_every_difference_is_seen(changes, what):
    assert what in difference(EXPECTED, told(**changes))


def test_a_failure_is_wrong_whatever_came_before():
    assert difference(EXPECTED, Told(STAYS, EXPECTED, failure="HTTP 503")) == "HTTP 503"


def test_who_left_needs_a_beginning_only():
    assert difference(EXPECTED, told(LEAVES, token_ids={0: [1, 2]}, texts={0: "ab"}, ends={})) == ""
    assert "token 1" in difference(EXPECTED, told(LEAVES, token_ids={0: [1, 3]}))


def test_jobs_are_greedy_and_sampled_and_some_leave():
    jobs = make_jobs(3, 16, 40)
    assert jobs == make_jobs(3, 16, 40)
    assert {job.body["temperature"] == 0 for job in jobs} == {True, False}
    assert any(job.leaves_after for job in jobs)
    assert all(job.leaves_after < job.body["max_tokens"] for job in jobs if job.leaves_after)


def test_what_a_cut_stream_gave_must_have_been_the_beginning():
    def cut(token_ids):
        return dataclasses.replace(
            told(), cut=[dataclasses.replace(EXPECTED, token_ids={0: token_ids}, ends={})]
        )

    assert difference(EXPECTED, cut([1, 2])) == ""
    assert "token 1" in difference(EXPECTED, cut([1, 3]))


@pytest.mark.parametrize("killed", [True, False])
def test_a_cut_connection_is_asked_again_only_when_the_front_end_was_killed(killed):
    front_end, asked = FrontEnd(), []

    def answer(request):
        asked.append(request)
        if len(asked) == 1:
            if killed:
                front_end.is_killed()
                front_end.up.set()
            raise httpx.ReadError("reset")
        whole = {
            "choices": [
                {"index": 0, "text": "ab", "token_ids": [1, 2], "logprobs": None, "finish_reason": "length"}
            ]
        }
        return httpx.Response(200, text=f"data: {json.dumps({**whole, 'usage': None})}\n\ndata: [DONE]\n\n")

    async def ask():
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server") as http:
            return await Client(http, "m", front_end).ask(STAYS)

    given = asyncio.run(ask())
    assert (len(asked), len(given.cut)) == ((2, 1) if killed else (1, 0))
    assert given.failure == ("" if killed else "ReadError: reset")
    assert not killed or given.answer.token_ids == {0: [1, 2]}
