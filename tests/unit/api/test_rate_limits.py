"""What a key may use within a minute: the refusals, what is counted and when, and what every answer tells of it."""

import json
from types import SimpleNamespace

import openai
import pytest
from limits.storage import memory

from afd_server.api import rate_limits
from afd_server.api.keys import KeyRing, new_key
from afd_server.types import FinishReason
from tests.unit.api.scripted_service import ScriptedService, client_for, says


class Clock:
    """Stands in for the time of the day."""

    now = 1e9

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (memory, rate_limits):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=clock.time))
    return clock


def door(tmp_path, service, **limits):
    """(client, headers with a key of these limits)"""
    key, kept = new_key("alice", **limits)
    path = tmp_path / "keys"
    path.write_text(kept.line())
    return client_for(service, keys=KeyRing(file=str(path))), {"Authorization": f"Bearer {key}"}


async def ask(client, headers, prompt="hi", **fields):
    return await client.post("/v1/completions", json={"prompt": prompt, **fields}, headers=headers)


def told(response, what):
    return tuple(response.headers[f"x-ratelimit-{each}-{what}"] for each in ("limit", "remaining", "reset"))


async def test_requests_of_the_last_minute(tmp_path, clock):
    client, headers = door(tmp_path, ScriptedService(says("a")), requests_per_minute=2)
    async with client:
        assert told(await ask(client, headers), "requests") == ("2", "1", "60.000s")
        clock.now += 20
        assert told(await ask(client, headers), "requests") == ("2", "0", "40.000s")
        clock.now += 10
        refused = await ask(client, headers)
        error = refused.json()["error"]
        assert (refused.status_code, error["type"], error["code"]) == (429, "requests", "rate_limit_exceeded")
        assert "alice" in error["message"] and "2 requests a minute" in error["message"]
        assert (refused.headers["retry-after"], *told(refused, "requests")) == ("30", "2", "0", "30.000s")
        clock.now += 30.1  # a refusal was not counted: the first one is a minute old, the second is not
        assert [(await ask(client, headers)).status_code for _ in range(2)] == [200, 429]


async def test_what_does_not_ask_the_model_is_not_counted(tmp_path, clock):
    client, headers = door(tmp_path, ScriptedService(says("a")), requests_per_minute=1)
    async with client:
        for path in ("/v1/models", "/health", "/v1/models"):
            assert (await client.get(path, headers=headers)).status_code == 200
        assert (await ask(client, headers, prompt=7)).status_code == 400  # but what was refused for its form is
        assert (await ask(client, headers)).status_code == 429


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_prompt_and_output(tmp_path, clock, stream):
    service = ScriptedService(says("abc", FinishReason.LENGTH))
    client, headers = door(tmp_path, service, tokens_per_minute=12)
    async with client:
        answers = [await ask(client, headers, prompt="12", stream=stream) for _ in range(2)]
        assert [told(answer, "tokens")[:2] for answer in answers] == [
            ("12", "9" if stream else "7"),
            ("12", "4" if stream else "2"),
        ]
        refused = await ask(client, headers, prompt="123", stream=stream)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        assert refused.headers["retry-after"] == "60"
        assert (
            await ask(client, headers, prompt="12", stream=stream)
        ).status_code == 200  # 2 are left: the prompt fits
        assert (await ask(client, headers, prompt="1", stream=stream)).status_code == 429
        assert len(service.requests) == 3
        clock.now += 60.1
        assert (await ask(client, headers, prompt="123")).status_code == 200


async def test_output_beyond_the_limit_is_not_cut_but_counted(tmp_path, clock):
    client, headers = door(tmp_path, ScriptedService(says("a" * 30, FinishReason.LENGTH)), tokens_per_minute=10)
    async with client:
        answer = await ask(client, headers, max_tokens=30)
        assert answer.json()["usage"]["completion_tokens"] == 30
        assert told(answer, "tokens")[1] == "0"
        assert (await ask(client, headers)).status_code == 429


async def test_a_prompt_that_never_fits(tmp_path, clock):
    client, headers = door(tmp_path, ScriptedService(says("a")), tokens_per_minute=10)
    async with client:
        refused = await ask(client, headers, prompt="x" * 11)
        assert refused.status_code == 429 and "never fit" in refused.json()["error"]["message"]
        assert (await ask(client, headers, prompt="x" * 10)).status_code == 200


async def test_a_large_limit_is_counted_exactly(tmp_path, clock):
    """It is kept in units of many tokens; what is less than one is not lost."""
    client, headers = door(
        tmp_path, ScriptedService(says("a", FinishReason.LENGTH)), tokens_per_minute=50 * rate_limits.UNITS
    )
    async with client:
        for number in range(1, 30):
            answer = await ask(client, headers, prompt="1234567")
            assert int(told(answer, "tokens")[1]) == 50 * rate_limits.UNITS - 8 * number


async def test_keys_do_not_share_a_limit_and_one_without_has_none(tmp_path, clock):
    made = {name: new_key(name, requests_per_minute=limit) for name, limit in (("a", 1), ("b", 1), ("c", None))}
    path = tmp_path / "keys"
    path.write_text("\n".join(kept.line() for _, kept in made.values()))
    statuses = {}
    async with client_for(ScriptedService(says("a")), keys=KeyRing(file=str(path))) as client:
        for _ in range(2):
            for name, (key, _) in made.items():
                answer = await ask(client, {"Authorization": f"Bearer {key}"})
                statuses.setdefault(name, []).append(answer.status_code)
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
        counts = (await client.get("/metrics")).text
    assert statuses == {"a": [200, 429], "b": [200, 429], "c": [200, 200]}
    assert 'afd:key_requests_total{key="c",model_name="tiny"} 2.0' in counts
    assert 'afd:key_tokens_total{key="a",kind="prompt",model_name="tiny"} 2.0' in counts
    assert 'afd:key_tokens_total{key="a",kind="generation",model_name="tiny"} 2.0' in counts
    assert 'afd:key_refused_total{key="b",limit="requests",model_name="tiny"} 1.0' in counts


async def test_openais_client_knows_the_refusal(tmp_path, clock):
    client, headers = door(tmp_path, ScriptedService(says("a")), requests_per_minute=1)
    async with client, openai.AsyncOpenAI(base_url="http://test/v1", api_key=headers["Authorization"].split()[1],
                                          max_retries=0, http_client=client) as users:  # fmt: skip
        await users.completions.create(model="tiny", prompt="x")
        with pytest.raises(openai.RateLimitError) as caught:
            await users.completions.create(model="tiny", prompt="x")
    assert json.loads(caught.value.response.text)["error"]["code"] == caught.value.code == "rate_limit_exceeded"
