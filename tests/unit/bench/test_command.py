"""The three commands against a scripted server: what they print, what they write, and how mistakes end."""

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest

from afd_server.cli import main
from tests.unit.bench.scripted_server import ScriptedServer, counting

DEADLINE_S = 30.0
SHORT = ("--random-input-len", "20", "--random-output-len", "4")


@contextmanager
def served(script=counting, status=200):
    """The command has an event loop of its own, so the server runs on another thread."""
    ready, over = threading.Event(), threading.Event()
    servers = []

    async def serve():
        server = ScriptedServer(script, status=status)
        async with server.running():
            servers.append(server)
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield servers[0]
    finally:
        over.set()
        thread.join(DEADLINE_S)


def bench(capsys, *arguments):
    """Exit code, standard output's last line read as JSON, all of it, and standard error."""
    try:
        code = main(["bench", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    last = printed.out.splitlines()[-1] if printed.out else ""
    return code, json.loads(last) if last.startswith("{") else None, printed.out, printed.err


def test_serve_reports_what_the_clients_saw_and_ends_in_json(capsys, monkeypatch):
    monkeypatch.setenv("AFD_API_KEY", "secret")
    with served() as server:
        code, result, out, _ = bench(
            capsys, "serve", "--base-url", server.url, *SHORT, "--num-prompts", 12, "--max-concurrency", 3,
            "--num-warmups", 2, "--ignore-eos", "--temperature", 0, "--goodput", "tpot:60000", "ttft:60000", "--metadata", "layout=2A1F",
        )  # fmt: skip
    assert code == 0
    assert (result["completed"], result["failed"], result["model_id"]) == (12, 0, "scripted")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (240, 48)
    assert (result["max_concurrency"], result["request_rate"], result["layout"]) == (3, "inf", "2A1F")
    assert result["goodput_share"] == 1.0
    assert {"p99_tpot_ms", "median_itl_ms", "mean_e2el_ms", "p50_ttft_ms"} <= result.keys()
    assert "12 completed, 0 failed" in out
    assert server.most_under_way <= 3
    counted, measured = server.bodies[:2], server.bodies[2:]
    assert [body["max_tokens"] for body in counted] == [1, 1]
    assert len(measured) == 2 + 12
    assert len({body["prompt"] for body in measured}) == 14
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in measured)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_serve_speaks_chat_and_saves_every_request(capsys, tmp_path):
    with served() as server:
        code, result, _, _ = bench(
            capsys, "serve", "--base-url", f"{server.url}/v1", "--backend", "openai-chat", *SHORT, "--num-prompts", 5,
            "--request-rate", 500, "--save-result", "--save-detailed", "--result-dir", tmp_path / "new",
        )  # fmt: skip
    assert code == 0
    assert result["endpoint"] == "/v1/chat/completions"
    assert "itls" not in result
    (file,) = (tmp_path / "new").iterdir()
    assert file.name.startswith("openai-chat-500.0qps-scripted-")
    saved = json.loads(file.read_text())
    assert saved["output_lens"] == [4] * 5
    assert saved.items() >= result.items()


def test_a_result_that_cannot_be_saved_is_still_printed(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with served() as server:
        code, result, _, err = bench(
            capsys, "serve", "--base-url", server.url, *SHORT, "--num-prompts", 1, "--result-dir", tmp_path / "file",
            "--save-result",
        )  # fmt: skip
    assert code == 2
    assert "cannot write" in err
    assert result["completed"] == 1


def test_serve_replays_a_trace(capsys, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"2023-11-16 18:15:4{number}.5,{10 + number},{1 + number}\n" for number in range(3)
    ))  # fmt: skip
    with served() as server:
        code, result, _, _ = bench(
            capsys, "serve", "--base-url", server.url, "--dataset-name", "azure", "--dataset-path", trace,
            "--request-rate", 100, "--num-warmups", 0,
        )  # fmt: skip
    assert code == 0
    assert (result["self_timed"], result["num_prompts"]) == (True, 3)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (33, 6)


def test_sla_searches_and_says_what_holds(capsys):
    with served() as server:
        code, result, out, _ = bench(
            capsys, "sla", "--base-url", server.url, *SHORT, "--tpot-sla-ms", 60000, "--max-load", 2, "--probe-seconds", 0.05,
        )  # fmt: skip
    assert code == 0
    assert result["highest_load"] == 2
    assert [probe["load"] for probe in result["probes"]] == [1, 2, 2]
    assert "highest load that holds: 2 clients" in out


def test_sla_without_a_load_that_holds_fails_with_the_nearest_promise(capsys):
    with served() as server:
        code, result, out, _ = bench(
            capsys, "sla", "--base-url", server.url, *SHORT, "--tpot-sla-ms", 60000, "--ttft-sla-ms", 1e-6, "--workload-var",
            "request_rate", "--probe-seconds", 0.05,
        )  # fmt: skip
    assert code == 1
    assert result["highest_load"] is None
    assert "no load holds; what 99 % of the requests keep" in out


def test_pareto_measures_servers_in_turns_and_draws_them(capsys, tmp_path):
    with served() as one, served() as other:
        code, result, _, err = bench(
            capsys, "pareto", "--server", f"one={one.url}", f"other={other.url}", *SHORT, "--max-concurrency", 1, 2,
            "--probe-seconds", 0.05, "--plot", tmp_path / "sweep.png", "--tpot-sla-ms", 50, "--result-filename", tmp_path / "sweep.json",
        )  # fmt: skip
        assert code == 0, err
        assert [(point["server"], point["max_concurrency"]) for point in result["points"]] == [
            ("one", 1), ("other", 1), ("one", 2), ("other", 2),
        ]  # fmt: skip
        assert (tmp_path / "sweep.svg").is_file()
        code, result, _, _ = bench(
            capsys, "pareto", "--base-url", one.url, "--label", "third", *SHORT, "--max-concurrency", 1, "--probe-seconds", 0.05,
            "--with", tmp_path / "sweep.json",
        )  # fmt: skip
    assert code == 0
    assert {point["server"] for point in result["points"]} == {"one", "other", "third"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["serve", "--request-rte", "3"], "did you mean --request-rate?"),
        (["serve", "--api-key", "k"], "AFD_API_KEY in the environment"),
        (["serve", "--request-rate", "-1"], "--request-rate: '-1' is not a number above 0"),
        (["serve", "--num-prompts", "0"], "--num-prompts: '0' is not a whole number above 0"),
        (["serve", "--num-warmups", "-1"], "--num-warmups: '-1'"),
        (["serve", "--request-timeout", "inf"], "--request-timeout: 'inf' is not a number above 0"),
        (["serve", "--random-prefix-len", "-1"], "--random-prefix-len: must be at least 0"),
        (["serve", "--custom-output-len", "0"], "--custom-output-len: must be at least 1"),
        (["serve", "--header", "a=b\nc"], "is more than one line of text"),
        (["sla", "--tpot-sla-ms", "5", "--sla-percentile", "101"], "--sla-percentile: '101' is not a number from 0 to 100"),
        (["serve", "--max-concurrency", "many"], "--max-concurrency"),
        (["serve", "--dataset-name", "sonnet"], "'sonnet' is none of random, sharegpt, custom, azure, burstgpt"),
        (["serve", "--dataset-name", "azure"], "--dataset-path"),
        (["serve", "--self-timed"], "--self-timed: --dataset-name random has no times"),
        (["serve", "--goodput", "itl:5"], "--goodput: 'itl' is none of ttft, tpot, e2el"),
        (["serve", "--goodput", "tpot:soon"], "--goodput: 'tpot:soon'"),
        (["serve", "--percentile-metrics", "tps"], "--percentile-metrics: 'tps' is none of"),
        (["serve", "--metric-percentiles", "50,101"], "--metric-percentiles: '101'"),
        (["serve", "--header", "plain"], "--header: 'plain' is not KEY=VALUE"),
        (["serve", "--extra-body", "[1]"], "--extra-body: '[1]' is not a JSON object"),
        (["serve", "--tokenizer", "/nowhere"], "--tokenizer: /nowhere/tokenizer.json"),
        (["sla"], "--tpot-sla-ms"),
        (["sla", "--tpot-sla-ms", "5", "--workload-var", "request_rate"], "--ttft-sla-ms: --workload-var request_rate needs it"),
        (["pareto", "--with", "/nowhere.json"], "--with: cannot read /nowhere.json"),
        (["pareto", "--plot", "/nowhere/x.png"], "--plot: /nowhere is no directory"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, words):
    code, _, _, err = bench(capsys, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert words in err


@pytest.mark.parametrize("kind", [["serve"], ["sla", "--tpot-sla-ms", "50"], ["pareto"]])
def test_a_server_that_is_not_there_is_one_line(capsys, unused_tcp_port, kind):
    code, _, _, err = bench(capsys, *kind, "--port", unused_tcp_port)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert f"no server answers at http://127.0.0.1:{unused_tcp_port}" in err


@pytest.mark.parametrize("kind", [["serve"], ["sla", "--tpot-sla-ms", "50"], ["pareto"]])
def test_a_server_that_refuses_everything_is_one_line(capsys, kind):
    with served(status=429) as server:
        code, _, _, err = bench(capsys, *kind, "--base-url", server.url, *SHORT)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "HTTP 429" in err
    assert "no room" in err


def test_failures_among_answers_are_counted_and_shown(capsys, tmp_path):
    def sometimes(body):
        return counting(body) if len(body["prompt"].split()) % 2 else [(0.0, b"data: nonsense\n\n")]

    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a", "a b", "a b c", "a b c d"))
    )
    with served(sometimes) as server:
        code, result, out, _ = bench(
            capsys, "serve", "--base-url", server.url, "--dataset-name", "custom", "--dataset-path", file,
            "--custom-output-len", 3, "--num-prompts", 8, "--num-warmups", 0,
        )  # fmt: skip
    assert code == 0
    assert (result["completed"], result["failed"], result["errors"]) == (4, 4, {"malformed answer": 4})
    assert "4 x malformed answer" in out
