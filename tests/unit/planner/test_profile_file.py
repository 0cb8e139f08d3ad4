"""A profile comes back as it was written, and what is wrong with a file is named."""

import pytest
import yaml

from afd_server.errors import ConfigError
from afd_server.planner.profile_file import Profile, read_profile, write_profile
from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes

TIMES = LayerTimes(
    8,
    AttentionTimes(1e-4, 2e-6, 3e-5, 4e-6, 5e-8, 6e-9, 64, 3e-6),
    FFNTimes(1e-5, 2e-6, 0.0, 0.0, 3e-5, 16, 0.25, 1e-6, 64, 2e-6),
    LinearTimes(4e-5, 1e-7),
    LinearTimes(1e-3, 2e-5),
)
PROFILE = Profile("tiny", "a machine", "2025-01-01", 0.03, TIMES)


def test_a_profile_comes_back(tmp_path):
    write_profile(PROFILE, tmp_path / "profile.yaml")
    assert read_profile(tmp_path / "profile.yaml") == PROFILE


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.pop("ffn"), "ffn is missing"),
        (lambda v: v["ffn"].pop("expert_s"), "ffn: expert_s is missing"),
        (lambda v: v["wire"].update(colour=1), "wire: colour is unknown"),
        (lambda v: v["wire"].update(row_s=-1), "wire.row_s is -1"),
        (lambda v: v["wire"].update(row_s=float("nan")), "wire.row_s is nan"),
        (lambda v: v.update(num_layers=0), "num_layers is 0"),
        (lambda v: v.update(afd_profile=9), "no profile of version 2"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, says):
    path = tmp_path / "profile.yaml"
    write_profile(PROFILE, path)
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=says):
        read_profile(path)


@pytest.mark.parametrize("content", ["[1", "- a", "", "{"])
def test_what_is_no_profile_is_refused(tmp_path, content):
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"p\.yaml"):
        read_profile(tmp_path / "p.yaml")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "none.yaml")
