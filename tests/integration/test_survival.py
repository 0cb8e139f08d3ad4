"""A front-end that is killed, and the next one that attaches to its workers; workers that come, go and are renewed.

One server for it all. What clients must not notice is compared with what the undisturbed server gave them.
"""

import os
import signal
import threading

import httpx
import psutil
import pytest

from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import Server, afd, wait_until

pytestmark = pytest.mark.integration

DEADLINE_S = 120.0
NUM_CLIENTS = 8
FLAGS = ["--max-model-len", 512, "--device", "cpu", "--served-model-name", "tiny", "--ffn-workers", 2,
         "--drain-timeout", 1, "--kv-cache-memory-bytes", 4_000_000]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An AFD_HOME of this module alone: nobody else's servers are found."""
    with pytest.MonkeyPatch.context() as environment:
        home = tmp_path_factory.mktemp("home")
        environment.setenv("AFD_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def model(home, tmp_path_factory):
    directory = write_checkpoint(
        "mixtral", tmp_path_factory.mktemp("models") / "mixtral", max_position_embeddings=512
    )
    write_tokenizer(directory)
    return directory


def ask(number):
    return {"model": "tiny", "prompt": list(range(3, 20 + number)), "temperature": 0.8, "seed": number,
            "max_tokens": 200, "ignore_eos": True, "stream": True, "return_token_ids": True}  # fmt: skip


def stream(server, number, on_token=lambda count: None):
    """The token ids of a stream; raises when it fails."""
    token_ids, error = server.stream(ask(number), on_token)
    assert error is None, error
    return token_ids


def workers(server):
    return httpx.get(f"{server.url}/admin/workers", timeout=30).json()["workers"]


def pids(server):
    return {worker["name"]: worker["pid"] for worker in workers(server)}


class Clients:
    """Clients that stream the same requests again and again, and compare. `with` ends when each has had one more whole."""

    def __init__(self, server, expected):
        self.server, self.expected = server, expected
        self.counts, self.failures = [0] * NUM_CLIENTS, []
        self._leaving = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(NUM_CLIENTS)]

    def _run(self, number):
        try:
            while not self._leaving.is_set():
                assert stream(self.server, number) == self.expected[number]
                self.counts[number] += 1
        except BaseException as error:
            self.failures.append(repr(error))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.failures or min(self.counts) > 0)
        return self

    def __exit__(self, *_):
        self._leaving.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        assert self.failures == []


@pytest.fixture(scope="module")
def first(model):
    with Server(model, *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def expected(first):
    return [stream(first, number) for number in range(NUM_CLIENTS)]


@pytest.fixture(scope="module")
def second(first, expected, model):
    """The same command, after the first front-end was killed in the middle of its streams."""
    before = pids(first)
    killed, cut = threading.Event(), []

    def read_until_killed(number):
        try:
            stream(first, number, lambda count: count >= 20 and killed.set())
        except httpx.HTTPError:
            cut.append(number)

    readers = [threading.Thread(target=read_until_killed, args=(number,)) for number in range(NUM_CLIENTS)]
    for reader in readers:
        reader.start()
    assert killed.wait(DEADLINE_S)
    family = psutil.Process(first.process.pid).children(recursive=True)
    os.kill(first.process.pid, signal.SIGKILL)
    for reader in readers:
        reader.join(DEADLINE_S)
    assert cut  # one or another may have had its last token before
    first.process.wait(DEADLINE_S)
    with Server(model, *FLAGS) as server:
        server.pids_before, server.family = before, family
        yield server


def test_the_same_command_attaches_and_nothing_is_loaded_again(second, expected):
    assert "to 3 running workers, none loaded again" in second.log()
    assert pids(second) == second.pids_before
    assert "of weights on" not in second.log()
    assert [stream(second, number) for number in range(NUM_CLIENTS)] == expected
    # What the killed front-end's streams held is free.
    assert second.metric("afd:num_requests_running") == 0
    assert second.metric("afd:kv_cache_usage_perc") == 0
    assert httpx.get(f"{second.url}/health", timeout=30).status_code == 200


def test_another_command_does_not_attach_to_workers_that_have_a_front_end(second, model):
    result = afd("serve", model, *FLAGS, "--port", 0, "--attach")
    assert result.returncode == 2
    assert "--attach" in result.stderr.splitlines()[-1]


def test_more_and_fewer_workers_under_load(second, expected):
    with Clients(second, expected):
        answer = afd("scale", "--url", second.url, "--attention-workers", 3, "--ffn-replicas", 2)
        assert answer.returncode == 0, answer.stderr
        assert [worker["state"] for worker in workers(second)] == ["serving"] * 7
        answer = afd("scale", "--url", second.url, "--attention-workers", 1, "--ffn-replicas", 1)
        assert answer.returncode == 0, answer.stderr
    assert pids(second) == second.pids_before


def test_what_there_is_no_room_for_is_refused_and_changes_nothing(second):
    too_many = httpx.post(f"{second.url}/admin/scale", json={"attention_workers": 1 << 20}, timeout=30)
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "attention_workers")
    assert pids(second) == second.pids_before


def test_every_worker_is_renewed_under_load(second, expected):
    before = set(pids(second).values())
    with Clients(second, expected):
        answer = afd("restart", "--url", second.url)
        assert answer.returncode == 0, answer.stderr
    assert len(workers(second)) == 3
    assert not before & set(pids(second).values())
    assert httpx.get(f"{second.url}/health", timeout=30).status_code == 200


def test_sigterm_leaves_nothing(second, home):
    last = [psutil.Process(pid) for pid in pids(second).values()]
    assert second.stop() == 0
    assert "Traceback" not in second.log()
    _gone, alive = psutil.wait_procs([*second.family, *last], timeout=DEADLINE_S)
    assert alive == []
    assert list((home / "run").iterdir()) == []


def test_workers_that_nobody_comes_for_end_themselves(model, home, expected):
    with Server(model, *FLAGS, "--orphan-timeout", 4) as server:
        # Not dead but stopped: when it goes on it finds its workers gone, and makes them again.
        before = pids(server)
        server.process.send_signal(signal.SIGSTOP)
        _gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in before.values()], timeout=DEADLINE_S)
        assert alive == []
        server.process.send_signal(signal.SIGCONT)
        wait_until(lambda: not set(before.values()) & set(pids(server).values()))
        assert stream(server, 0) == expected[0]
        # Now it dies.
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        _gone, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
        assert alive == []
    wait_until(lambda: list((home / "run").iterdir()) == [])


@pytest.mark.parametrize(
    "victim", ["keeper", "raylet", pytest.param("gcs_server", marks=pytest.mark.slow)]
)  # two ways to notice it
def test_a_server_whose_ray_has_been_killed_ends_with_the_cause(model, home, victim):
    with Server(model, *FLAGS) as server:
        below = [psutil.Process(pid) for pid in pids(server).values()]
        (keeper,) = psutil.Process(server.process.pid).children()
        (process,) = [keeper] if victim == "keeper" else [p for p in keeper.children() if p.name() == victim]
        process.kill()
        assert server.process.wait(DEADLINE_S) == 1
        assert "\nafd serve: Ray on this host has ended" in server.log()
    _gone, alive = psutil.wait_procs(below, timeout=DEADLINE_S)
    assert alive == []
    assert list((home / "run").iterdir()) == []


def test_the_workers_of_one_process_are_not_scaled(model):
    with Server(model, *FLAGS, "--executor", "local") as server:
        for command in (["scale", "--attention-workers", 2], ["restart"]):
            answer = afd(*command, "--url", server.url)
            assert answer.returncode == 1
            assert "--executor local" in answer.stderr
        shown = afd("workers", "--url", server.url).stdout
        assert "attention-0" in shown and "serving" in shown
