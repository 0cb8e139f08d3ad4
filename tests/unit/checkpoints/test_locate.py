"""What MODEL may be, and what is said when it is nothing."""

import pytest
from huggingface_hub import constants

from afd_server.checkpoints.locate import locate_model
from afd_server.errors import ModelError


def test_a_directory_is_taken_as_it_is(tmp_path):
    assert locate_model(str(tmp_path)) == tmp_path


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate_model("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./model", "../model", "a/b/c", "~/nothing-here", "", "model/"]
)
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such directory"):
        locate_model(name)


def test_a_gguf_file_is_answered_with_the_command_that_converts_it(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="afd convert"):
        locate_model(str(file))


def test_another_file_is_answered_with_what_is_expected(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(ModelError, match="directory"):
        locate_model(str(file))


def test_a_hub_name_without_a_network_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="check the network") as caught:
        locate_model("nobody/no-such-model")
    assert "\n" not in str(caught.value)
