"""Who may use a Ray cluster of this host: told by locks, which two objects of one process hold as two processes would."""

import stat
import sys
import threading

import pytest

from afd_server.cluster.attaching import server_settings
from afd_server.cluster.keeper import keep
from afd_server.cluster.own_ray import OwnRay, own_ray
from afd_server.cluster.run_directory import RunDirectory
from afd_server.config import ServeConfig
from afd_server.errors import StartError

CONFIG = ServeConfig(model="/models/a", attention_workers=2, api_key="secret", port=8001)
DEADLINE_S = 20.0


@pytest.fixture
def orphan(tmp_path):
    """The directory of a server whose keeper lives and whose front-end is gone."""
    directory = RunDirectory.create(tmp_path, server_settings(CONFIG))
    directory.give_back()
    with RunDirectory(directory.path).kept():
        yield directory


@pytest.fixture
def no_keeper(monkeypatch, tmp_path):
    """Keepers that are started end at once."""
    monkeypatch.setattr(sys, "executable", "/bin/true")


def test_a_new_one_is_its_makers_alone(tmp_path):
    directory = RunDirectory.create(tmp_path, server_settings(CONFIG))
    other = RunDirectory(directory.path)
    assert other.has_front_end()
    assert not other.is_kept()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert "secret" not in (directory.path / "server.json").read_text()
    directory.give_back()
    assert not other.has_front_end()
    assert other.take()
    assert directory.has_front_end()


def test_the_same_command_finds_what_its_front_end_left(tmp_path, orphan):
    found = own_ray(ServeConfig(model="/models/a", attention_workers=2, port=8001), tmp_path)
    assert found.attached
    assert orphan.has_front_end()
    orphan.tell(address="127.0.0.1:1")
    assert found.address() == "127.0.0.1:1"


@pytest.mark.parametrize(
    "other", [{"port": 8002}, {"attention_workers": 3}, {"model": "/models/b"}, {"attach": False}], ids=str
)
def test_another_command_starts_its_own(tmp_path, orphan, no_keeper, other):
    settings = {"model": "/models/a", "attention_workers": 2, "port": 8001, **other}
    assert not own_ray(ServeConfig(**settings), tmp_path).attached
    assert not orphan.has_front_end()


@pytest.mark.parametrize(("port", "ends"), [(8001, True), (8002, False)])
def test_a_server_that_takes_the_place_of_another_ends_what_that_one_left(
    tmp_path, orphan, no_keeper, port, ends
):
    config = ServeConfig(model="/models/a", attention_workers=3, port=port)
    assert not own_ray(config, tmp_path).attached
    assert orphan.has_ended() == ends


def test_one_with_a_front_end_is_left_alone(tmp_path, orphan, no_keeper):
    assert orphan.take()
    assert not own_ray(CONFIG, tmp_path).attached


def test_attach_takes_the_same_workers_at_another_port(tmp_path, orphan):
    config = ServeConfig(model="/models/a", attention_workers=2, port=8002, attach=True)
    assert own_ray(config, tmp_path).attached


def test_attach_says_by_which_flags_the_workers_differ(tmp_path, orphan):
    with pytest.raises(StartError, match=r"--attach: .*--attention-workers 2, not 3"):
        own_ray(ServeConfig(model="/models/a", attention_workers=3, attach=True), tmp_path)
    assert not orphan.has_front_end()


def test_attach_says_that_there_is_nothing(tmp_path):
    with pytest.raises(StartError, match="--attach: no workers of /models/a"):
        own_ray(ServeConfig(model="/models/a", attach=True), tmp_path)


def test_what_nobody_uses_is_removed(tmp_path, no_keeper):
    left = RunDirectory.create(tmp_path, server_settings(CONFIG))
    left.give_back()
    assert not own_ray(CONFIG, tmp_path).attached
    assert not left.path.exists()


def test_a_keeper_that_ends_is_an_error_and_a_problem_is_passed_on(tmp_path, no_keeper):
    ray = own_ray(CONFIG, tmp_path)
    with pytest.raises(StartError, match="its keeper ended"):
        ray.address()
    ray.end()
    assert list((tmp_path / "run").iterdir()) == []
    directory = RunDirectory.create(tmp_path, {})
    directory.tell(problem="no space")
    with pytest.raises(StartError, match="cannot start: no space"):
        OwnRay(directory, None).address()


def test_the_keeper_waits_for_a_front_end_and_for_the_end(tmp_path):
    directory = RunDirectory.create(tmp_path, server_settings(CONFIG))
    keeping = threading.Thread(target=keep, args=(RunDirectory(directory.path), 0.0), daemon=True)
    keeping.start()
    keeping.join(0.3)
    assert keeping.is_alive()  # there is a front-end
    directory.give_back()
    keeping.join(DEADLINE_S)
    assert not keeping.is_alive()  # nobody came within 0 s
    assert directory.take()
    keeping = threading.Thread(target=keep, args=(RunDirectory(directory.path), 3600.0), daemon=True)
    keeping.start()
    directory.end()
    keeping.join(DEADLINE_S)
    assert not keeping.is_alive()
