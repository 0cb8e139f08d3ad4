"""The comparison of answers: it must see a token that is missing, twice, or another one, or the chaos runs prove nothing."""

import dataclasses

import pytest

from tests.chaos.clients import Answer, Job, Told, difference, make_jobs

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
