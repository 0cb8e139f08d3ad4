"""One server under load, watched in every way: a trace whose spans fit into one another, a report, a frame, the metrics."""

import collections
import contextlib
import threading

import httpx
import pytest

from tests.server_process import Server, afd, wait_until
from tests.unit.deploy.test_prometheus import OWN_METRICS, metrics_of, queries, rules

pytestmark = pytest.mark.integration

WORKERS = {"attention-0", "attention-1", "ffn-0", "ffn-1"}
PROMPTS = [
    f"{number} abc" for number in range(8)
]  # of one request: enough for two micro-batches on each worker
NUM_CLIENTS = 2
FLAGS = ("--attention-workers", 2, "--ffn-workers", 2, "--micro-batches", 2, "--kv-cache-memory-bytes", 1 << 22)


@pytest.fixture(scope="module")
def server(mixtral):
    with Server(mixtral, *FLAGS) as running:
        yield running


@contextlib.contextmanager
def load(server):
    over = threading.Event()

    def ask():
        while not over.is_set():
            server.complete(PROMPTS, max_tokens=200, ignore_eos=True, temperature=0.0)

    threads = [threading.Thread(target=ask) for _ in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def admin(server, path):
    answer = httpx.get(f"{server.url}/admin/{path}", timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def by_worker(document):
    """Complete events, by the worker that they are of and by name."""
    workers = {e["pid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"}
    found = collections.defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            found[workers[event["pid"]], event["name"]].append(event)
    return found


def calls_of(events):
    """The calls, by FFN worker, attention worker, step, layer and micro-batch."""
    return {
        (e["args"]["peer"], worker, e["args"]["step"], e["args"]["layer"], e["args"]["micro_batch"]): e
        for (worker, name), of_worker in events.items()
        if name == "call"
        for e in of_worker
    }


def test_what_an_ffn_worker_computes_lies_within_the_call_for_it(server):
    with load(server):
        wait_until(lambda: server.metric("afd:generation_tokens_total") > 100)
        events = by_worker(admin(server, "trace?seconds=0.5"))
    calls = calls_of(events)
    for worker in ("ffn-0", "ffn-1"):
        found = [
            (
                calls[
                    worker, e["args"]["peer"], e["args"]["step"], e["args"]["layer"], e["args"]["micro_batch"]
                ],
                e,
            )
            for e in events[worker, "ffn"]
            # A step that is under way when the window opens has calls from before.
            if (worker, e["args"]["peer"], e["args"]["step"], e["args"]["layer"], e["args"]["micro_batch"])
            in calls
        ]
        assert len(found) > len(events[worker, "ffn"]) / 2
        for call, computed in found:
            assert call["ts"] <= computed["ts"]
            assert computed["ts"] + computed["dur"] <= call["ts"] + call["dur"] + 1  # rounded to microseconds
    for worker in ("attention-0", "attention-1"):
        for name in ("attention", "bubble", "sampling", "wire out", "wire back"):
            assert events[worker, name], f"{worker} has no {name}"
    assert {micro_batch for *_, micro_batch in calls} == {0, 1}


def test_sums_are_kept_of_every_worker_and_expert(server):
    report = admin(server, "stragglers")
    assert {pace["worker"] for pace in report["workers"]} == WORKERS
    assert all(pace["batches"] > 0 and pace["seconds"] > 0 for pace in report["workers"])
    assert set(report["waits"]) == {"attention-0", "attention-1"}
    assert report["expert_tokens"]
    for tokens in report["expert_tokens"].values():
        assert len(tokens) == 8  # of which each FFN worker holds half
        assert sum(tokens[:4]) > 0 and sum(tokens[4:]) > 0


def test_the_terminal_shows_every_worker(server):
    for command in ("top", "report"):
        shown = afd(command, *(["--once"] if command == "top" else []), "--url", server.url)
        assert shown.returncode == 0, shown.stderr
        assert all(worker in shown.stdout for worker in WORKERS)


def test_every_metric_that_rules_and_dashboard_ask_for_is_exported(server):
    exposition = httpx.get(f"{server.url}/metrics", timeout=30).text
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for query in queries():
        for name, _ in metrics_of(query):
            family = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
            assert name in recorded | OWN_METRICS or f"# TYPE {family} " in exposition, name
