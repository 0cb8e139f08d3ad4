"""The clients: what they ask, and what they were given, over real HTTP.

A client streams one request after the other and notes every pause. What it was given is compared with what the same
request gave while nothing was disturbed, down to each token id and the usage.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

# How long a stream may stand still before its client calls it lost. Generous: a restart may need its turn on the CPU.
LOST_AFTER_S = 180.0


@dataclass(frozen=True, slots=True)
class Job:
    """One request. leaves_after: the client closes the stream once it has so many tokens; None stays to the end."""

    name: str
    body: dict[str, Any]
    leaves_after: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """All that a client was given. Of each choice, by its index: text, token ids, log-probabilities, and its end."""

    texts: dict[int, str]
    token_ids: dict[int, list[int]]
    logprobs: dict[int, list[float]]
    ends: dict[int, str]
    usage: dict[str, int] | None


@dataclass(slots=True)
class Told:
    """One request's story: what was given or how it failed, and the longest time without a word. cut: what had been given
    each time that the front-end was killed, whereupon the client asked again."""

    job: Job
    answer: Answer | None = None
    cut: list[Answer] = field(default_factory=list)
    failure: str = ""
    longest_pause_s: float = 0.0
    ended_at: float = field(default_factory=time.monotonic)


def make_jobs(seed: int, number: int, max_tokens: int) -> list[Job]:
    """`number` requests: greedy and sampled ones in turn; some with penalties, log-probabilities, two choices, or a
    client that leaves."""
    dice = random.Random(seed)
    return [_job(index, dice, max_tokens) for index in range(number)]


def _job(index: int, dice: random.Random, max_tokens: int) -> Job:
    body: dict[str, Any] = {
        "prompt": "".join(dice.choices("abcdefghij ,.\n", k=dice.randint(3, 120))),
        "max_tokens": dice.randint(max_tokens // 2, max_tokens),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    body |= {"temperature": 0} if index % 2 else {"temperature": 0.9, "seed": dice.randrange(1000)}
    match index % 8:
        case 2:
            body |= {"top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.2}
        case 3:
            body |= {"repetition_penalty": 1.2}
        case 4:
            body |= {"n": 2, "top_k": 40}
        case 5:
            body |= {"logprobs": 2}
        case 6:
            return Job(f"job-{index}", body, leaves_after=dice.randint(1, body["max_tokens"] // 2))
    return Job(f"job-{index}", body)


class FrontEnd:
    """What clients know of the process that they speak to: how often it was killed, and whether it is there."""

    def __init__(self) -> None:
        self.kills = 0
        self.up = asyncio.Event()
        self.up.set()

    def is_killed(self) -> None:
        """To be called before it is, so that no client sees a cut connection without knowing why."""
        self.kills += 1
        self.up.clear()


class Client:
    """Asks one server. The connections are httpx's, kept from one request to the next."""

    def __init__(self, http: httpx.AsyncClient, model: str, front_end: FrontEnd) -> None:
        self._http = http
        self._model = model
        self._front_end = front_end

    async def ask(self, job: Job) -> Told:
        """Streams one request to its end, from its beginning again when the front-end was killed in the middle.

        A failure of any kind is noted, never raised; so is a connection that was cut for no such reason.
        """
        told = Told(job)
        while told.answer is None and not told.failure:
            answer = Answer({}, defaultdict(list), defaultdict(list), {}, None)
            await self._front_end.up.wait()
            kills = self._front_end.kills
            try:
                told.answer = await self._stream(job, answer, told)
            except (httpx.HTTPError, ValueError, LookupError, AssertionError) as error:
                if isinstance(error, httpx.TransportError) and self._front_end.kills > kills:
                    told.cut.append(answer)
                else:
                    told.failure = f"{type(error).__name__}: {error}"
        told.ended_at = time.monotonic()
        return told

    async def _stream(self, job: Job, answer: Answer, told: Told) -> Answer:
        heard_at = time.monotonic()
        usage, done = None, False
        async with self._http.stream(
            "POST", "/v1/completions", json={"model": self._model, **job.body}
        ) as response:
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:500]}")
            async for line in response.aiter_lines():
                now = time.monotonic()
                told.longest_pause_s, heard_at = max(told.longest_pause_s, now - heard_at), now
                if not line:
                    continue
                assert not done, f"after the end came {line!r}"
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    done = True
                    continue
                chunk = json.loads(data)
                assert "error" not in chunk, chunk["error"]
                usage = _counts(chunk["usage"]) or usage
                for choice in chunk["choices"]:
                    _take(choice, answer)
                if job.leaves_after is not None and len(answer.token_ids[0]) >= job.leaves_after:
                    return answer
        assert done, "the stream ended without [DONE]"
        return Answer(answer.texts, dict(answer.token_ids), dict(answer.logprobs), answer.ends, usage)


def _counts(usage: dict[str, Any] | None) -> dict[str, int] | None:
    """Without what the prefix cache held: that is a matter of what was asked before."""
    return usage and {name: count for name, count in usage.items() if isinstance(count, int)}


def _take(choice: dict[str, Any], answer: Answer) -> None:
    index = choice["index"]
    assert index not in answer.ends, f"choice {index} goes on after its end"
    answer.texts[index] = answer.texts.get(index, "") + choice["text"]
    answer.token_ids[index] += choice["token_ids"]
    if choice["logprobs"] is not None:
        answer.logprobs[index] += choice["logprobs"]["token_logprobs"]
    if choice["finish_reason"] is not None:
        answer.ends[index] = choice["finish_reason"]


def difference(expected: Answer, told: Told) -> str:
    """What is wrong with an answer, beside that of the undisturbed server; empty when nothing is."""
    if told.failure:
        return told.failure
    given = told.answer
    assert given is not None
    left = [given] if told.job.leaves_after is not None else []
    for part in [*told.cut, *left]:
        for index, token_ids in part.token_ids.items():
            if token_ids != expected.token_ids[index][: len(token_ids)]:
                return _first_difference(expected.token_ids[index], token_ids)
    if left:
        return ""
    for index, token_ids in expected.token_ids.items():
        if given.token_ids.get(index, []) != token_ids:
            return _first_difference(token_ids, given.token_ids.get(index, []))
    for name in ("texts", "ends", "usage"):
        if getattr(given, name) != getattr(expected, name):
            return f"{name}: {getattr(given, name)!r} instead of {getattr(expected, name)!r}"
    return _logprob_difference(expected, given)


# Which rows share a batch decides in which order a sum may be taken.
LOGPROB_TOLERANCE = 1e-3


def _logprob_difference(expected: Answer, given: Answer) -> str:
    if {index: len(values) for index, values in given.logprobs.items()} != {
        index: len(values) for index, values in expected.logprobs.items()
    }:
        return "the number of log-probabilities differs"
    for index, values in expected.logprobs.items():
        if any(abs(a - b) > LOGPROB_TOLERANCE for a, b in zip(values, given.logprobs[index], strict=True)):
            return f"the log-probabilities of choice {index} differ"
    return ""


def _first_difference(expected: Sequence[int], given: Sequence[int]) -> str:
    at = next((at for at, pair in enumerate(zip(expected, given, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{len(given)} tokens instead of {len(expected)}"
    return f"token {at} is {given[at]} instead of {expected[at]} (of {len(given)}, expected {len(expected)})"


async def ask_all(http: httpx.AsyncClient, model: str, jobs: Sequence[Job]) -> list[Told]:
    """Every job once, all at the same time, nobody leaving."""
    client = Client(http, model, FrontEnd())
    return list(await asyncio.gather(*(client.ask(Job(job.name, job.body)) for job in jobs)))


async def keep_asking(
    client: Client, jobs: Sequence[Job], first: int, until: asyncio.Event, told: list[Told]
) -> None:
    """The jobs in turn, beginning with number `first`, until the event is set. The last one is finished."""
    number = first
    while not until.is_set():
        told.append(await client.ask(jobs[number % len(jobs)]))
        number += 1
