"""The default model behind real Ray actors, through the openai client: what `make serve` gives a user."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import anthropic
import httpx
import jsonschema
import openai
import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from afd_server.checkpoints.default_model import afd_home, default_model
from tests.server_process import Server, afd

pytestmark = pytest.mark.integration

COMPOSE = Path(__file__).parents[2] / "deploy" / "docker-compose.yaml"
SHOWN = Path(__file__).parents[2] / "docs" / "examples"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]


@pytest.fixture(scope="module")
def directory():
    return default_model(afd_home())


@pytest.fixture(scope="module")
def server(directory):
    with Server(directory, "--served-model-name", "smol", "--max-model-len", 2048) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=120, max_retries=0)


def wait_until(value, expected, timeout_s=30.0):
    """Asks until `value()` is as expected; the test fails at the deadline."""
    deadline = time.monotonic() + timeout_s
    while (seen := value()) != expected:
        assert time.monotonic() < deadline, f"still {seen}, not {expected}"
        time.sleep(0.02)


def test_chat_answers_in_english(client):
    answer = client.chat.completions.create(model="smol", messages=QUESTION, temperature=0, max_tokens=40)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_same_text_in_pieces(client):
    whole = client.chat.completions.create(model="smol", messages=QUESTION, temperature=0, max_tokens=40)
    stream = client.chat.completions.create(
        model="smol", messages=QUESTION, temperature=0, max_tokens=40, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_an_answer_keeps_to_a_schema_a_pattern_or_a_choice(client):
    person = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "Describe a person as JSON."}], max_tokens=200, n=2,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": person}},
        extra_body={"seed": 1},
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), person)
    stream = client.completions.create(
        model="smol", prompt="The capital of France is", temperature=0, logprobs=1, stream=True,
        extra_body={"structured_outputs": {"choice": ["London", "Paris", "Rome"]}},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == "Paris"
    phone = client.completions.create(
        model="smol",
        prompt="Call me: ",
        max_tokens=30,
        extra_body={"structured_outputs": {"regex": r"555-[0-9]{4}"}},
    )
    assert re.fullmatch(r"555-[0-9]{4}", phone.choices[0].text)
    with pytest.raises(openai.BadRequestError, match=r"(?s)structured_outputs\.regex: .*unclosed group"):
        client.completions.create(model="smol", prompt="x", extra_body={"structured_outputs": {"regex": "(("}})


def test_completion_equals_transformers_token_for_token(client, directory):
    prompts = ["The three primary colours are", "def fibonacci(n):", "Once upon a time, in a small village,"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        answer = client.completions.create(
            model="smol", prompt=prompt, temperature=0, max_tokens=24, extra_body={"return_token_ids": True}
        )
        assert answer.choices[0].token_ids == expected.tolist()
        assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)


def test_prompts_as_token_ids_and_as_lists(client):
    batch = client.completions.create(model="smol", prompt=["One, two,", "A, B,"], temperature=0, max_tokens=6)
    assert [choice.index for choice in batch.choices] == [0, 1]
    single = client.completions.create(model="smol", prompt="A, B,", temperature=0, max_tokens=6)
    assert batch.choices[1].text == single.choices[0].text


def test_n_choices_and_a_seed(client):
    def ask():
        answer = client.completions.create(
            model="smol", prompt="My favourite animal is", n=3, seed=5, max_tokens=12, temperature=1
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_anthropics_client_is_answered(server):
    client = anthropic.Anthropic(base_url=server.url, api_key="unused", timeout=120, max_retries=0)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with client.messages.stream(
        model="smol", max_tokens=24, messages=question, extra_body={"temperature": 0}
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert "Paris" in text
    assert (final.content[0].text, final.stop_reason) == (text, "end_turn")


# Program -> what it prints, of many words. Those with a server find it by their environment.
EXAMPLES = {
    "chat.py": r"Paris\.\n\d+ tokens in, \d+ tokens out\n\w+",
    "curl.sh": r'"id":"smol".*Paris.*"text":" four.*data: \[DONE\]',
    "batch.py": r"(0\.\d\d a token: The capital of France is'.*'\n){2}(0\.\d\d a token: Water freezes at.*\n){2}",
    "structured.py": r"\{'name': '.*', 'country': '.*', 'is_capital': (True|False)\}\n(positive|negative)\n",
    "tools.py": r"get_weather \w+.*\n.*\w+",
    "offline.py": r"The capital of France is Paris.*\nThe opposite of hot is cold",
    "plan.py": r"(\d+ attention and \d+ FFN workers: \d+ tokens/s a card.*\n)+start the first with: afd serve",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_as_they_are_shown(server, name):
    program = ["bash" if name.endswith(".sh") else sys.executable, str(SHOWN / name)]
    environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1"}
    run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(EXAMPLES[name], run.stdout, re.S), run.stdout


def test_every_example_is_run():
    assert set(EXAMPLES) == {path.name for path in SHOWN.iterdir() if path.suffix in (".py", ".sh")}


def test_32_concurrent_streams_finish_and_afd_bench_counts_what_the_server_counts(server):
    before = server.metric("afd:generation_tokens_total")
    run = afd("bench", "serve", "--base-url", server.url, "--num-prompts", 32, "--random-input-len", 8,
              "--random-output-len", 24, "--ignore-eos")  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["completed"], result["failed"]) == (32, 0)
    assert result["total_output_tokens"] == 32 * 24
    assert result["total_input_tokens"] == pytest.approx(32 * 8, rel=0.2)
    assert 0 < result["p50_ttft_ms"] <= result["p50_e2el_ms"]
    # Besides, one request to warm up, and two of a token each to learn how the server counts words.
    assert server.metric("afd:generation_tokens_total") - before == 33 * 24 + 2


def test_a_client_that_leaves_frees_its_blocks(server):
    body = {"model": "smol", "prompt": "Numbers:", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: thrown away, the generator would close the connection
        next(lines)
        wait_until(lambda: server.metric("afd:num_requests_running"), 1)
    wait_until(lambda: server.metric("afd:num_requests_running"), 0)
    # Only the blocks that the prefix cache may keep are left, and those count as free.
    wait_until(lambda: server.metric("afd:kv_cache_usage_perc"), 0)


def test_errors_name_the_field(server):
    cases = [
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "max_tokenss": 3}, 400, "max_tokenss"),
        ({"prompt": "x", "model": "gpt-4"}, 404, "model"),
        ({"prompt": "x " * 5000}, 400, "prompt"),
        ({}, 400, "prompt"),
    ]
    for body, status, field in cases:
        response = server.post("/v1/completions", **body)
        assert response.status_code in (status, 422) if status == 400 else response.status_code == status, body
        error = response.json()["error"]
        assert field in (error["param"] or "") or field in error["message"]


def test_the_metrics_tell_of_both_sides(server, client):
    client.completions.create(model="smol", prompt="Hello", max_tokens=4)
    for name in ("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count", "generation_tokens_total",
                 "prompt_tokens_total", "request_success_total"):  # fmt: skip
        assert server.metric(f"afd:{name}") > 0


def test_each_side_holds_only_its_own(server, directory):
    """Resident memory tells: attention weights + KV cache on one side, MLP weights on the other."""
    (attention,), (ffn,) = server.pids("Attention"), server.pids("FFN")
    assert attention != ffn
    log = server.log()
    config = json.loads((directory / "config.json").read_text())
    mlp_bytes = 4 * config["num_hidden_layers"] * 3 * config["hidden_size"] * config["intermediate_size"]
    assert f"FFN        1 worker on cpu, {mlp_bytes / 1e6:.0f} MB of weights" in log
    assert psutil.pid_exists(attention)


@pytest.mark.parametrize("roles", [["FFN"], ["Attention"], ["Attention", "FFN"]], ids="+".join)
def test_killed_workers_come_back_and_the_stream_goes_on(server, client, roles):
    prompt = f"The history of the railway begins ({roles})"
    ask = {"model": "smol", "prompt": prompt, "temperature": 0.7, "seed": 3, "max_tokens": 100}
    ask["extra_body"] = {"ignore_eos": True}
    undisturbed = client.completions.create(**ask).choices[0].text
    pids = [pid for role in roles for pid in server.pids(role)]
    text = ""
    for number, chunk in enumerate(client.completions.create(**ask, stream=True)):
        text += chunk.choices[0].text
        if number == 10:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
    assert text == undisturbed
    new_pids = [pid for role in roles for pid in server.pids(role)]
    assert len(new_pids) == len(pids)
    assert not set(new_pids) & set(pids)
    wait_until(lambda: httpx.get(f"{server.url}/health", timeout=30).status_code, 200)


def test_the_containers_command_line_starts_the_same_server():
    """What docker-compose.yaml runs, on a free port: the default model by its name, on all addresses."""
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    model, *flags = services["afd"]["command"]
    at = flags.index("--port")
    with Server(model, *flags[:at], *flags[at + 2 :], "--max-model-len", 512) as server:
        answer = server.post("/v1/chat/completions", messages=QUESTION, temperature=0, max_tokens=20).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert server.stop() == 0


def test_sigterm_lets_the_running_request_finish_and_exits_with_0(directory):
    """Last in this file: its own server, so that the shared one keeps running."""
    with Server(
        directory, "--max-model-len", 512, "--executor", "local", "--served-model-name", "smol"
    ) as server:
        body = {"model": "smol", "prompt": "Numbers:", "max_tokens": 40, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in events[-2].replace(" ", "")
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log()
