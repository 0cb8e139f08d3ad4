"""Whatever a configuration file holds, the end is a configuration or one short line that names the file or the key."""

import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afd_server.cli import MAX_CONFIG_FILE_BYTES, MAX_LINE, main, parse_serve
from afd_server.config import ServeConfig
from afd_server.errors import ConfigError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip
MISTAKES = {
    "a bomb of aliases": (BOMB + "model: *i", ["one value"]),
    "an alias of itself": ("model: &m [*m]", ["one value"]),
    "a merge": ("base: &b {port: 1}\n<<: *b", ["one value"]),
    "a key that is a list": ("[port]: 1", ["one value"]),
    "given twice": ("port: 1\nport: 2", ["'port' is given twice", "line 2"]),
    "given twice, spelled twice": ("block_size: 1\nblock-size: 2", ["'block_size' is given twice"]),
    "python's own objects": ("model: !!python/object/apply:os.system ['true']", ["one value"]),
    "python's own name": ("model: !!python/name:os.system", ["is not YAML"]),
    "nested without end": ("model: " + "[" * 20_000, ["is not YAML"]),
    "a number of 5000 digits": ("port: " + "9" * 5000, ["is not YAML"]),
    "a number of 50 digits": ("max_num_seqs: " + "9" * 50, ["--max-num-seqs", "out of range"]),
    "not a number": ("start_timeout: .nan", ["--start-timeout", "out of range"]),
    "infinity": ("ffn_timeout: .inf", ["--ffn-timeout", "out of range"]),
    "a date": ("port: 2020-01-01", ["--port", "not of type int"]),
    "no date": ("port: 2020-99-99", ["is not YAML"]),
    "nothing": ("", ["does not hold a mapping"]),
    "several documents": ("port: 1\n---\nport: 2", ["is not YAML"]),
    "a control character": ("model: \x07", ["is not YAML"]),
    "an escape for the terminal": ('prot: 1\n"\\e[2Jprot": 2', ["unknown key"]),
    "too large": ("#" * MAX_CONFIG_FILE_BYTES + "\n", ["is larger than 65536 bytes"]),
}


@pytest.mark.parametrize(("text", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(tmp_path, capsys, text, words):
    file = tmp_path / "afd.yaml"
    file.write_text(text)
    assert main(["serve", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.endswith("\n") and error[:-1].isprintable() and len(error) < MAX_LINE + 100
    assert str(file) in error
    for word in words:
        assert word in error


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/dev/null", "/nowhere"])
def test_what_is_no_configuration_file(capsys, path):
    assert main(["serve", "--config", path]) == 2
    assert path in capsys.readouterr().err


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.binary(max_size=9)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3)
)
SETTINGS = st.dictionaries(
    st.sampled_from(sorted(ServeConfig.__dataclass_fields__)) | st.text(max_size=9), VALUES, max_size=4
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SETTINGS.map(lambda values: yaml.safe_dump(values).encode()) | st.binary(max_size=60))
def test_a_configuration_or_a_named_mistake(tmp_path, content):
    file = tmp_path / "afd.yaml"
    file.write_bytes(content)
    try:
        config = parse_serve(["--config", str(file)])
    except ConfigError as error:
        assert str(file) in str(error) or str(error).startswith(("--", "MODEL"))  # noqa: PT017  either may come
        return
    assert config.ffn_shards[0] >= 1


def test_the_key_of_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "afd.yaml"
    file.write_text("api_key: file's")
    assert parse_serve([]).api_key is None
    monkeypatch.setenv("AFD_API_KEY", "environment's")
    assert parse_serve([]).api_key == "environment's"
    assert parse_serve(["--config", str(file)]).api_key == "file's"
    assert parse_serve(["--config", str(file), "--api-key", "flag's"]).api_key == "flag's"


def test_the_key_is_not_shown(tmp_path, capsys, monkeypatch):
    assert "hidden" not in repr(ServeConfig(api_key="hidden"))
    with pytest.raises(ConfigError) as caught:
        ServeConfig(api_key=["hidden"])
    assert "hidden" not in str(caught.value)
    with pytest.raises(ConfigError, match="one of the keys is empty") as caught:
        ServeConfig(api_key="hidden,")
    assert "hidden" not in str(caught.value)
    monkeypatch.setenv("AFD_API_KEY", "hidden")
    assert main(["serve", "--port", "99999"]) == 2
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    assert "hidden" not in "".join(capsys.readouterr())
    assert os.environ["AFD_API_KEY"]
