import json

import pytest

from afd_server.errors import ModelError
from afd_server.text.generation_defaults import read_generation_defaults


def write(directory, **config):
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def test_the_sampling_of_the_file(tmp_path):
    write(
        tmp_path,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        max_new_tokens=512,
        min_p=None,
        do_sample=True,
        eos_token_id=2,
    )
    assert read_generation_defaults(tmp_path) == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "max_tokens": 512,
    }


def test_no_file_recommends_nothing(tmp_path):
    assert read_generation_defaults(tmp_path) == {}


@pytest.mark.parametrize(
    "config", [{"temperature": -1}, {"top_p": 1.5}, {"top_k": 2.5}, {"max_new_tokens": True}]
)
def test_a_value_out_of_range_is_named(tmp_path, config):
    with pytest.raises(ModelError, match=next(iter(config))):
        read_generation_defaults(write(tmp_path, **config))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read_generation_defaults(tmp_path)
