"""The client against a server that streams at scripted times: what it notes is exactly what was sent, and how."""

import json

import pytest

from afd_server.bench.client import BenchError, Client, Target
from afd_server.bench.dataset import Prompt
from tests.unit.bench.scripted_server import DONE, ScriptedClock, ScriptedServer, delta, event, text, usage

PROMPT = Prompt("one two three", output_tokens=4)


async def outcome_of(script, *, chat=False, status=200, cut_off=False, **target):
    clock = ScriptedClock()
    server = ScriptedServer(script, clock, status)
    server.is_cut_off = cut_off
    endpoint = "/v1/chat/completions" if chat else "/v1/completions"
    async with (
        server.running(),
        Client(Target(server.url, "scripted", endpoint, is_chat=chat, **target)) as client,
    ):
        return await client.send(PROMPT, 0.0, clock), server


async def test_times_are_those_at_which_the_chunks_came():
    script = [(0.5, text(" a")), (0.75, text(" b")), (1.25, text(" c", "length")), (3.0, usage(7, 4) + DONE)]
    outcome, server = await outcome_of(script)
    assert outcome.is_complete
    assert (outcome.ttft_s, outcome.e2el_s) == (0.5, 1.25)
    assert outcome.itl_s == [0.25, 0.5]
    assert outcome.tpot_s == 0.25  # four tokens by the server's count, in three chunks
    assert (outcome.input_tokens, outcome.output_tokens) == (7, 4)
    body = server.bodies[0]
    assert body["prompt"] == "one two three"
    assert (body["max_tokens"], body["stream"], body["stream_options"]) == (4, True, {"include_usage": True})


async def test_events_may_be_cut_anywhere_and_come_together():
    first = text(" a")
    script = [(1.0, first[:20]), (2.0, first[20:] + text(" b") + b": ping\r\n\r\n"), (3.0, usage(1, 2) + DONE)]
    outcome, _ = await outcome_of(script)
    assert outcome.chunks_s == (2.0, 2.0)


async def test_a_token_without_text_is_a_token():
    outcome, _ = await outcome_of([(1.0, text("")), (2.0, text("é", "stop")), (2.0, usage(1, 2))])
    assert outcome.chunks_s == (1.0, 2.0)


async def test_a_chat_begins_with_its_first_word_and_not_with_who_speaks():
    script = [
        (1.0, delta("", role="assistant")), (2.0, delta("a")), (3.0, delta(None, reasoning_content="b")),
        (4.0, delta(None, "stop")), (5.0, usage(9, 3) + DONE),
    ]  # fmt: skip
    outcome, server = await outcome_of(script, chat=True)
    assert outcome.chunks_s == (2.0, 3.0, 4.0)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "one two three"}]
    assert server.bodies[0]["max_completion_tokens"] == 4


async def test_headers_and_fields_go_with_every_request():
    outcome, server = await outcome_of(
        [(1.0, text("a")), (1.0, usage(1, 1))],
        headers={"Authorization": "Bearer k"},
        fields={"temperature": 0, "ignore_eos": True},
    )
    assert outcome.is_complete
    assert server.headers[0]["Authorization"] == "Bearer k"
    assert (server.bodies[0]["temperature"], server.bodies[0]["ignore_eos"]) == (0, True)


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ([(1.0, text("a")), (2.0, DONE)], "no usage", "stream_options"),
        ([(1.0, usage(1, 0) + DONE)], "no output", "without a token"),
        ([(1.0, text("a")), (2.0, event({"error": {"message": "worker died"}}))], "error in the stream", "worker died"),
        ([(1.0, b"data: {nonsense\n\n")], "malformed answer", "nonsense"),
        ([(1.0, b"data: []\n\n")], "malformed answer", "[]"),
    ],
)  # fmt: skip
async def test_an_answer_that_is_none_is_an_error_of_its_kind(script, kind, words):
    outcome, _ = await outcome_of(script)
    assert not outcome.is_complete
    assert outcome.error == kind
    assert words in outcome.message


async def test_a_refusal_is_told_by_its_status():
    outcome, _ = await outcome_of([], status=429)
    assert (outcome.error, json.loads(outcome.message)) == ("HTTP 429", {"error": {"message": "no room"}})


async def test_an_error_is_one_line_that_no_terminal_obeys():
    outcome, _ = await outcome_of([(1.0, event({"error": "first\nsecond \x1b[2J" + 1000 * "x"}))])
    assert outcome.message.startswith("first second [2Jxxx")
    assert len(outcome.message) == 300


async def test_a_connection_that_breaks_in_the_middle_is_an_error():
    outcome, _ = await outcome_of([(1.0, text("a"))], cut_off=True)
    assert outcome.error == "connection lost"


async def test_an_answer_that_does_not_end_in_time_is_an_error():
    server = ScriptedServer([])
    async with server.running(), Client(Target(server.url, "m", timeout_s=0.05)) as client:
        server.may_answer.clear()
        outcome = await client.send(PROMPT, 0.0, lambda: 0.0)
        server.may_answer.set()
    assert (outcome.error, outcome.message) == ("timeout", "no end after 0.05 s")


async def test_a_server_that_is_not_there_is_named(unused_tcp_port):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with Client(Target(url, "m")) as client:
        outcome = await client.send(PROMPT, 0.0, lambda: 0.0)
        assert outcome.error == "cannot connect"
        with pytest.raises(BenchError, match=f"no server answers at {url}"):
            await client.first_model()


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "ftp://127.0.0.1", "http://"])
async def test_an_address_that_is_none_is_named(url):
    async with Client(Target(url, "m")) as client:
        outcome = await client.send(PROMPT, 0.0, lambda: 0.0)
        assert outcome.error == "cannot connect"
        with pytest.raises(BenchError, match="is no address"):
            await client.first_model()


async def test_the_first_model_is_asked_for():
    async with ScriptedServer([]).running() as server, Client(Target(server.url)) as client:
        assert await client.first_model() == "scripted"


async def test_a_server_that_is_no_such_server_is_named():
    async with ScriptedServer([]).running() as server, Client(Target(f"{server.url}/elsewhere")) as client:
        with pytest.raises(BenchError, match="does not list its models"):
            await client.first_model()
