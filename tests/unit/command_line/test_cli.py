"""The command line: what is typed becomes the configuration, and a mistake becomes one line."""

import pytest

from afd_server.cli import main, parse_serve, serve_parser
from afd_server.config import ServeConfig, flag
from afd_server.errors import ConfigError


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "afd.yaml"
    file.write_text("model: some/where\nport: 9000\nffn-workers: 2\nmax_num_seqs: 8\n")
    config = parse_serve(["--config", str(file), "--port", "9001"])
    assert (config.model, config.port, config.ffn_workers, config.max_num_seqs) == ("some/where", 9001, 2, 8)
    assert config.block_size == ServeConfig().block_size


def test_a_number_in_the_file_may_stand_for_a_text(tmp_path):
    file = tmp_path / "afd.yaml"
    file.write_text("micro-batches: 2\nserved-model-name: 12\n")
    config = parse_serve(["--config", str(file)])
    assert (config.micro_batches, config.served_model_name) == ("2", "12")


def test_every_setting_has_a_flag_with_help_in_its_room():
    shown = serve_parser().format_help()
    for name in ServeConfig.__dataclass_fields__:
        assert flag(name) in shown
    assert "tokens of one step on each attention worker. Default: 2048" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", ["unknown key 'prot'", "did you mean 'port'?"]),
        ("port: eight", ["afd.yaml", "--port", "'eight' is not of type int"]),
        ("ffn_workers: 2\nffn-workers: 3", ["'ffn_workers' is given twice"]),
        ("- port", ["does not hold a mapping"]),
        ("port: [", ["is not YAML"]),
        ("transport: carrier-pigeon", ["--transport", "auto, inproc, shm, tcp"]),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, words):
    file = tmp_path / "afd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_serve(["--config", str(file)])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--block-sise", "8"], ["'--block-sise'", "--block-size?"]),
        (["--port", "x"], ["--port"]),
        (["--tensor-parallel-size", "2"], ["--ffn-parallel tp"]),
        ([""], ["MODEL", "is empty"]),
        (["--api-key", ""], ["--api-key", "is empty"]),
        (["--micro-batches", "5"], ["--micro-batches", "1 to 4"]),
        (["--transport", "inproc"], ["--transport", "--executor local"]),
        (["--ffn-workers", "3", "--ffn-replicas", "2"], ["--ffn-replicas"]),
        (["--ffn-workers", "4", "--ffn-parallel", "3x1"], ["--ffn-parallel", "--ffn-workers"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs"]),
        (["--max-num-batched-tokens", "32"], ["--max-num-batched-tokens", "64", "--max-num-seqs"]),
        (["--config", "/nowhere/at.all"], ["--config", "/nowhere/at.all"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, flags, words):
    try:
        code = main(["serve", *flags])
    except SystemExit as end:
        code = end.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("workers", "replicas", "parallel", "shards"),
    [(1, 1, "ep", (1, 1)), (4, 1, "ep", (4, 1)), (4, 2, "tp", (1, 2)), (8, 2, "2x2", (2, 2))],
)
def test_how_ffn_workers_divide_the_model(workers, replicas, parallel, shards):
    config = ServeConfig(ffn_workers=workers, ffn_replicas=replicas, ffn_parallel=parallel)
    assert config.ffn_shards == shards


def test_scale_asks_for_a_number(capsys):
    with pytest.raises(SystemExit):
        main(["scale"])
    assert "--attention-workers or --ffn-replicas" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["workers"], ["restart"], ["scale", "--ffn-replicas", "2"]])
def test_an_operators_command_says_in_one_line_that_nobody_is_there(command, capsys):
    assert main([*command, "--url", "127.0.0.1:1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"afd {command[0]}: http://127.0.0.1:1")


def test_attach_needs_workers_that_outlive_a_front_end():
    with pytest.raises(ConfigError, match=r"--attach: .*--executor local"):
        parse_serve(["m", "--executor", "local", "--attach"])
