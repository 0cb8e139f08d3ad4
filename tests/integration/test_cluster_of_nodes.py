"""A Ray cluster of three nodes, as deploy/ starts it: front-end, attention node, FFN node; activations go over TCP.

The nodes are processes of this host, so what is tested is placement by resources and the choice of the transport, not a
network between machines. The server's flags are the ones of the compose file.
"""

import contextlib
import json
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from afd_server.config import ServeConfig
from afd_server.llm import LLM
from afd_server.types import SamplingParams
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import Server, afd

pytestmark = pytest.mark.integration

COMPOSE = Path(__file__).parents[2] / "deploy" / "docker-compose.yaml"
NODE_TIMEOUT_S = 60.0
PROMPT = list(range(3, 30))


WAIT_UNTIL_FREE = """
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False)
while not {"attention", "ffn"} <= ray.available_resources().keys():
    time.sleep(0.1)
"""


class Cluster:
    """A head without CPUs and two nodes with a resource each."""

    def __init__(self, port, nodes):
        self.address = f"127.0.0.1:{port}"
        self._nodes = nodes
        self._by_resource = {}

    def start_node(self, resource):
        resources = json.dumps({resource: 1})
        node = ray_node(f"--address={self.address}", "--num-cpus=1", f"--resources={resources}")
        self._by_resource[resource] = node.__enter__()
        self._nodes.push(node.__exit__)

    def wait_until_all_is_free(self):
        """Nothing is reserved on either node."""
        command = [sys.executable, "-c", WAIT_UNTIL_FREE, self.address]
        subprocess.run(command, check=True, timeout=NODE_TIMEOUT_S)

    def kill_node(self, resource):
        """With all its processes, at once."""
        process = psutil.Process(self._by_resource[resource].pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Joined by a token, as in the compose file."""
    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as nodes:
        token = tmp_path_factory.mktemp("secrets") / "ray-auth-token"
        token.write_text(secrets.token_hex(32))
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        nodes.enter_context(ray_node("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"))
        cluster = Cluster(port, nodes)
        for resource in ("attention", "ffn"):
            cluster.start_node(resource)
        yield cluster


@contextlib.contextmanager
def ray_node(*flags):
    """`ray start --block` until the end of the block; gives its process."""
    command = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats", *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + NODE_TIMEOUT_S
        while "Ray runtime started" not in _text(log):
            assert process.poll() is None and time.monotonic() < deadline, _text(log)
            time.sleep(0.1)
        yield process
        process.terminate()
        process.wait(NODE_TIMEOUT_S)


def _text(log):
    log.seek(0)
    return log.read()


def serve_flags(address):
    """The flags of `afd serve` in the compose file's cluster, with this cluster's address and no host and port."""
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    words = shlex.split(services["cluster-head"]["command"][0])
    flags = words[words.index("serve") + 2 :]
    for name in ("--host", "--port"):
        del flags[flags.index(name) : flags.index(name) + 2]
    flags[flags.index("--ray-address") + 1] = address
    return flags


def pids(server):
    return {worker["pid"] for worker in httpx.get(f"{server.url}/admin/workers", timeout=30).json()["workers"]}


def test_each_role_on_its_own_node(cluster, tmp_path):
    directory = write_checkpoint("mixtral", tmp_path / "mixtral")
    write_tokenizer(directory)
    flags = [*serve_flags(cluster.address), "--max-model-len", 64, "--device", "cpu", "--placement-timeout", 5]
    ask = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with Server(directory, *flags) as server:
        assert "transport  tcp" in server.log()
        choice = server.complete(PROMPT, **ask)
        refused = httpx.post(f"{server.url}/admin/scale", json={"attention_workers": 2}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cannot_scale")
        assert "too little" in refused.json()["error"]["message"]
        assert "attention" in refused.json()["error"]["message"]
        before = pids(server)
        server.process.kill()
        server.process.wait()
    with Server(directory, *flags) as server:
        assert "to 2 running workers, none loaded again" in server.log()
        assert pids(server) == before
        assert server.complete(PROMPT, **ask)["token_ids"] == choice["token_ids"]
        assert server.stop() == 0
        _, alive = psutil.wait_procs(
            [psutil.Process(pid) for pid in before if psutil.pid_exists(pid)], NODE_TIMEOUT_S
        )
        assert alive == []
    with Server(directory, *flags, "--orphan-timeout", 2) as server:  # what those before had is free again
        processes = [psutil.Process(pid) for pid in pids(server)]
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(processes, NODE_TIMEOUT_S)
        assert alive == []
    config = ServeConfig(model=str(directory), executor="local", device="cpu", max_model_len=64)
    with LLM(config) as llm:
        expected = llm.generate_token_ids([PROMPT], SamplingParams(8, temperature=0.0, ignore_eos=True))
    assert choice["token_ids"] == expected[0]


def test_a_cluster_without_the_resource_is_said_in_one_line(cluster, tmp_path):
    directory = write_checkpoint("llama", tmp_path / "llama")
    write_tokenizer(directory)
    result = afd("serve", directory, "--port", 0, "--ray-address", cluster.address,
                 "--attention-resource", "big-memory", "--placement-timeout", 5)  # fmt: skip
    assert result.returncode == 2
    assert "big-memory" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


KILLED_BETWEEN = """
    import os, signal, sys

    from afd_server.cluster.ray_environment import prepare_environment

    prepare_environment(own_cluster=False)

    from afd_server.cluster import placement

    groups = []

    def make_group(*arguments, whole=placement.make_group):
        groups.append(whole(*arguments))
        if len(groups) == {number}:
            assert groups[-1].wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        return groups[-1]

    placement.make_group = make_group

    from afd_server.cli import main

    sys.exit(main())
"""


class KilledBetween(Server):
    """A front-end that is killed when it has reserved the place of a worker, and has not created the worker."""

    def __init__(self, number, *arguments):
        self.program = ("-c", textwrap.dedent(KILLED_BETWEEN).format(number=number))
        super().__init__(*arguments)

    def is_killed(self):
        assert self.process.wait(NODE_TIMEOUT_S) == -signal.SIGKILL, self.log()


def test_a_place_that_was_reserved_for_nobody_is_given_back(cluster, tmp_path):
    directory = write_checkpoint("llama", tmp_path / "llama")
    write_tokenizer(directory)
    flags = [*serve_flags(cluster.address), "--max-model-len", 64, "--device", "cpu", "--placement-timeout", 10]
    KilledBetween(1, directory, *flags).is_killed()
    second = KilledBetween(2, directory, *flags, "--orphan-timeout", 1)
    second.is_killed()
    assert re.search("afd-server-.*/ffn-0 was reserved by a front-end that is gone", second.log())
    # Of the second one a worker is there: it ends as an orphan, and gives back the other place with its own.
    cluster.wait_until_all_is_free()
    with Server(directory, *flags) as server:
        assert "was reserved" not in server.log()
        assert server.stop() == 0


def test_a_lost_node_is_said_with_what_is_missing_and_a_new_one_takes_its_worker(cluster, tmp_path):
    directory = write_checkpoint("llama", tmp_path / "llama")
    write_tokenizer(directory)
    flags = [*serve_flags(cluster.address), "--max-model-len", 64, "--device", "cpu", "--ffn-timeout", 6]
    with Server(directory, *flags) as server:

        def complete():
            return server.complete(PROMPT, max_tokens=8, temperature=0, ignore_eos=True, return_token_ids=True)

        def health(status, *words):
            """Waits until /health says so."""
            deadline = time.monotonic() + NODE_TIMEOUT_S
            while True:
                answer = httpx.get(f"{server.url}/health", timeout=30)
                if answer.status_code == status and all(word in answer.text for word in words):
                    return
                assert time.monotonic() < deadline, answer.text
                time.sleep(0.1)

        undisturbed = complete()["token_ids"]
        cluster.kill_node("ffn")
        health(503, "ffn-0", "cannot be placed", "too little", "start a node that offers it")
        assert server.metric("afd:workers_unplaced", worker="ffn-0") == 1
        assert "ffn-0 cannot be placed" in server.log()
        ended = server.post("/v1/completions", prompt=PROMPT, max_tokens=8)
        for words in ("ffn-0", "out of reach for 6 s", "cannot be placed", "too little", "start a node"):
            assert words in ended.json()["error"]["message"]
        cluster.start_node("ffn")
        health(200)
        assert complete()["token_ids"] == undisturbed
        assert server.stop() == 0
