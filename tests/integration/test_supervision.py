"""A worker that stands still is noticed, ended and brought back; one that cannot be kept alive is given up, and said so.

One server for all of it, with real processes that are stopped and killed. The tests follow one another.
"""

import os
import re
import signal

import httpx
import psutil
import pytest

from tests.broken_workers import break_workers
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import Server, wait_until

pytestmark = pytest.mark.integration

MAX_RESTARTS = 3
ASK = {"model": "tiny", "prompt": list(range(3, 30)), "temperature": 0.8, "seed": 5, "max_tokens": 400}
ASK |= {"ignore_eos": True, "stream": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def flag(tmp_path_factory):
    """A file: while it exists, the next FFN call removes it and raises."""
    return tmp_path_factory.mktemp("flag") / "raise"


@pytest.fixture(scope="module")
def server(tmp_path_factory, flag):
    directory = write_checkpoint(
        "mixtral", tmp_path_factory.mktemp("models") / "mixtral", max_position_embeddings=512
    )
    write_tokenizer(directory)
    flags = ["--max-model-len", 512, "--device", "cpu", "--served-model-name", "tiny"]
    broken = f"""
        import pathlib
        from afd_server.models.halves import FFNHalf

        def forward(self, call, out=None, whole=FFNHalf.forward):
            flag = pathlib.Path({str(flag)!r})
            if flag.exists():
                flag.unlink()
                raise RuntimeError("the device is gone")
            return whole(self, call, out)

        FFNHalf.forward = forward

        from afd_server.cluster import hosting, workers

        workers.kernel_ffn = lambda layer: None  # calls served by kernels alone do not come by here

        def load(*arguments, whole=hosting.AttentionReplica, **named):
            flag = pathlib.Path({str(flag.with_name("stand-still"))!r})
            if flag.exists():
                flag.unlink()
                os.kill(os.getpid(), signal.SIGSTOP)
            return whole(*arguments, **named)

        hosting.AttentionReplica = load
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_workers(monkeypatch, tmp_path_factory.mktemp("site"), broken)
        with Server(directory, *flags, "--heartbeat-timeout", 2, "--max-restarts", MAX_RESTARTS) as server:
            yield server


def once(count, act):
    """Does it as soon as so many tokens have come."""
    done = []

    def on_token(number):
        if number >= count and not done:
            done.append(number)
            act()

    return on_token


def health(server):
    return httpx.get(f"{server.url}/health", timeout=30)


def test_nothing_listens_on_the_addresses_of_this_host(server):
    front_end = psutil.Process(server.process.pid)
    listening = {
        connection.laddr.ip
        for process in (front_end, *front_end.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


@pytest.mark.parametrize("role", ["FFN", "Attention"])
def test_a_worker_that_stands_still_is_replaced_and_the_text_is_the_same(server, role):
    undisturbed, error = server.stream(ASK)
    assert (len(undisturbed), error) == (ASK["max_tokens"], None)
    (pid,) = server.pids(role)
    stop = once(20, lambda: os.kill(pid, signal.SIGSTOP))
    assert server.stream({**ASK, "request_id": f"during-{role}"}, stop) == (undisturbed, None)
    if role == "Attention":
        assert re.search(
            r"server the request goes on .* after \d+ tokens \[cmpl-during-Attention-", server.log()
        )
    worker = f"{role.lower()}-0"
    assert server.metric("afd:worker_restarts_total", worker=worker, reason="frozen") == 1
    wait_until(lambda: health(server).status_code == 200)
    assert pid not in server.pids(role)
    assert server.metric("afd:worker_up", worker=worker) == 1
    assert server.metric("afd:worker_recovery_seconds_count", role=role.lower()) == 1


def test_a_worker_that_stands_still_while_it_loads_is_replaced_too(server, flag):
    undisturbed, _ = server.stream(ASK)
    frozen = server.metric("afd:worker_restarts_total", worker="attention-0", reason="frozen")
    (pid,) = server.pids("Attention")

    def kill():
        flag.with_name("stand-still").touch()
        os.kill(pid, signal.SIGKILL)

    assert server.stream(ASK, once(20, kill)) == (undisturbed, None)
    assert not flag.with_name("stand-still").exists()
    assert "while it loaded" in server.log()
    assert server.metric("afd:worker_restarts_total", worker="attention-0", reason="frozen") == frozen + 1
    wait_until(lambda: health(server).status_code == 200)


def test_an_exception_in_the_expert_code_restarts_the_worker_and_the_text_is_the_same(server, flag):
    undisturbed, _ = server.stream(ASK)
    (pid,) = server.pids("FFN")
    assert server.stream(ASK, once(20, flag.touch)) == (undisturbed, None)
    assert not flag.exists()
    assert server.metric("afd:worker_restarts_total", worker="ffn-0", reason="failed") == 1
    assert server.metric("afd:ffn_calls_resent_total", engine="attention-0") >= 1
    wait_until(lambda: health(server).status_code == 200)
    assert pid not in server.pids("FFN")
    assert "RuntimeError: the device is gone" in server.log()


def test_a_worker_without_restarts_left_is_given_up_and_requests_end_at_once(server):
    def is_given_up():
        return "given up" in str(health(server).json())

    def kill():
        for pid in server.pids("FFN"):
            if not is_given_up():
                os.kill(pid, signal.SIGKILL)

    error = None
    for _ in range(MAX_RESTARTS + 2):
        _, error = server.stream({**ASK, "request_id": "the-last"}, once(10, kill))
        if error:
            break
    assert error, "it was killed more often than it may be restarted"
    wait_until(is_given_up)
    for word in ("ffn-0", "given up", f"after {MAX_RESTARTS} restarts"):
        assert word in error["message"]
    # Both processes say so, in lines about that request.
    wait_until(
        lambda: re.search(r"attention-0 the request ends with its step: .*\[\d+:cmpl-the-last-", server.log())
    )
    assert re.search(r"server a request failed: .*ffn-0.* \[the-last\]", server.log())
    answer = health(server)
    assert answer.status_code == 503
    assert "ffn-0" in answer.json()["problems"][0]
    refused = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=30)
    assert refused.status_code == 503
    assert "ffn-0" in refused.json()["error"]["message"]
    assert server.metric("afd:worker_up", worker="ffn-0") == 0
    assert server.stop() == 0
