"""`afd profile` as it is typed: its file is what `afd plan` and a server take, and what they then say is near what runs."""

import subprocess
import sys

import pytest

from afd_server.cli import main
from afd_server.config import ServeConfig
from afd_server.errors import ConfigError
from afd_server.llm import LLM
from afd_server.planner.profile_file import read_profile
from afd_server.types import SamplingParams
from tests.checkpoints import write_checkpoint, write_tokenizer

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer(write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def profile(model):
    out = model / "profile.yaml"
    command = [sys.executable, "-m", "afd_server", "profile", model, "--out", out, "--max-num-seqs", "4"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "kinds of steps, fitted to" in done.stdout
    return out


def test_every_part_was_measured(profile):
    times = read_profile(profile).times
    assert times.num_layers == 3
    assert min(times.attention_s(1, 16), times.ffn_s(1), times.step_overhead_s(1)) > 0
    assert times.step_s(4, 400) < 1.0


def test_the_planner_plans_with_it(profile, model, capsys):
    assert main(["plan", str(model), "--profile", str(profile), "--context", "200", "--max-gpus", "3"]) == 0
    out = capsys.readouterr().out
    assert "times measured on" in out
    assert "1 x cpu-epyc" in out


def test_a_server_starts_with_it(profile, model):
    config = ServeConfig(model=str(model), executor="local", profile=str(profile), max_num_seqs=4)
    with LLM(config) as llm:
        (tokens,) = llm.generate_token_ids([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(tokens) == 4


def test_a_profile_of_another_model_is_refused(profile, model, tmp_path):
    other = write_tokenizer(write_checkpoint("qwen3_moe", tmp_path / "other", num_hidden_layers=2))
    with pytest.raises(ConfigError, match=r"--profile: is of .*, which has 3 layers and not 2"):
        LLM(ServeConfig(model=str(other), executor="local", profile=str(profile)))
    assert main(["plan", str(other), "--profile", str(profile), "--context", "200"]) == 2
