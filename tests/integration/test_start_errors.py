"""What a person sees who starts the server with a mistake: one line that names the flag and the remedy, exit code 2."""

import http.server
import json
import socket
import socketserver
import threading

import pytest

from tests.broken_workers import break_workers
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import afd

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")
    write_tokenizer(directory)
    return directory


def assert_one_line(result, *words):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if " INFO " not in line]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in lines[0]


def test_a_mistyped_flag(model):
    assert_one_line(afd("serve", model, "--max-model-length", "64"), "--max-model-length", "--max-model-len?")


def test_a_mistyped_key_of_the_configuration_file(model, tmp_path):
    file = tmp_path / "afd.yaml"
    file.write_text("ffn_worker: 2\n")
    assert_one_line(afd("serve", model, "--config", file), str(file), "ffn_worker", "'ffn_workers'?")


def test_a_missing_model(tmp_path):
    assert_one_line(afd("serve", tmp_path / "nowhere"), "nowhere")


def test_a_missing_file(model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    assert_one_line(afd("serve", tmp_path), "tokenizer.json")


def test_an_unknown_architecture(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_one_line(afd("serve", tmp_path), "MambaForCausalLM", "LlamaForCausalLM")


def test_a_taken_port(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(afd("serve", model, "--port", port), "--port", str(port))


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_too_little_memory_for_one_full_length_request(model, executor):
    result = afd("serve", model, "--port", 0, "--kv-cache-memory-bytes", 1024, "--executor", executor)
    assert_one_line(result, "--kv-cache-memory-bytes", "one request of")


def test_a_layout_that_does_not_fit(model):
    assert_one_line(afd("serve", model, "--ffn-workers", 3, "--ffn-parallel", "2x2"), "--ffn-parallel", "2x2")


def test_version_and_help():
    assert afd("--version").stdout.startswith("afd-server ")
    shown = afd("serve", "--help").stdout
    for room in ("engine", "kvcache", "cluster", "pipeline"):
        assert f"\n{room}:" in shown
    assert "--max-num-batched-tokens" in shown


def test_nobody_at_the_address_of_the_ray_cluster(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # free again when the block ends
    result = afd("serve", model, "--port", 0, "--ray-address", f"127.0.0.1:{port}")
    assert_one_line(result, "--ray-address", "Connection refused")


def test_something_else_at_the_address_of_the_ray_cluster(model):
    with socketserver.TCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_address[1]}"
        assert_one_line(
            afd("serve", model, "--port", 0, "--ray-address", address), "--ray-address", "is not Ray"
        )
        other.shutdown()


def test_somebody_mute_at_the_address_of_the_ray_cluster(model):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        assert_one_line(
            afd("serve", model, "--port", 0, "--ray-address", address), "--ray-address", "no answer within 5 s"
        )


def test_a_resource_that_this_host_does_not_offer(model):
    result = afd("serve", model, "--port", 0, "--ffn-resource", "big-memory")
    assert_one_line(result, "big-memory", "--ffn-resource")


def test_a_missing_weight_file(model, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((model / name).read_text())
    assert_one_line(afd("serve", tmp_path, "--port", 0), str(tmp_path), "safetensors")


def test_a_truncated_weight_file(model, tmp_path):
    for file in model.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            content[: len(content) // 2] if file.suffix == ".safetensors" else content
        )
    assert_one_line(afd("serve", tmp_path, "--port", 0), "model.safetensors", "cannot be read")


CONSTRUCTOR = """
    from afd_server.cluster.actors import AttentionActor

    def construct(self, *arguments):
        raise OSError("no space for the worker")

    AttentionActor.__init__ = construct
"""
LOAD = """
    import afd_server.cluster.workers

    afd_server.cluster.workers.load_ffn_half = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
"""
IMPORT = """
    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise OSError("libgomp.so.1: cannot open shared object file")

    sys.meta_path.insert(0, NoTorch())
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [(IMPORT, ["ffn-0: OSError: libgomp.so.1"]), (CONSTRUCTOR, ["attention-0: OSError: no space for the worker"]), (LOAD, ["ffn-0: its process ended while it loaded"])],
    ids=["lacks a library", "raises in its constructor", "dies while it loads"],
)  # fmt: skip
def test_a_worker_that_cannot_start_ends_it_with_the_first_cause(model, tmp_path, monkeypatch, code, words):
    break_workers(monkeypatch, tmp_path / "site", code)
    result = afd("serve", model, "--port", 0, "--device", "cpu")
    assert result.returncode == 2, result.stderr
    for word in words:  # the lines before come from the worker itself, by way of Ray
        assert word in result.stderr.splitlines()[-1]
