"""A Ray cluster of this host alone keeps to this host, and its token to this user; what somebody has set stays."""

import os
import stat

import pytest

from afd_server.cluster.ray_environment import OWN_CLUSTER_SETTINGS, SETTINGS, make_token, prepare_environment
from afd_server.errors import StartError


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The process's own without anything of Ray's, and a home without a token. Put back at the end."""
    for name in (*SETTINGS, *OWN_CLUSTER_SETTINGS, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # monkeypatch remembers what was there, or that nothing was
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_an_own_cluster_listens_on_this_host_and_demands_a_token(environment, tmp_path):
    prepare_environment(own_cluster=True)
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_another_cluster_has_its_own_addresses_and_token(environment, tmp_path):
    prepare_environment(own_cluster=False)
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
    assert "RAY_AUTH_MODE" not in os.environ
    assert not (tmp_path / ".ray").exists()


def test_what_is_set_already_stays(environment, tmp_path):
    environment.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    environment.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere")
    prepare_environment(own_cluster=True)
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
    assert not (tmp_path / ".ray").exists()


def test_a_token_that_exists_is_kept(tmp_path):
    file = tmp_path / "auth_token"
    make_token(file)
    first = file.read_text()
    make_token(file)
    assert file.read_text() == first
    assert list(tmp_path.iterdir()) == [file]


def test_a_token_that_cannot_be_kept_is_said_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="RAY_AUTH_TOKEN_PATH"):
        make_token(tmp_path / "file" / "auth_token")
