"""`afd plan` as it is typed: JSON of the agreed form, a command that the server takes, and mistakes in one line."""

import json
import shlex

import pytest

from afd_server.cli import main, parse_serve
from afd_server.planner.paper import MODELS
from tests.checkpoints import COMMON, FAMILIES

STEP_3 = str(MODELS / "step-3.json")


def run(capsys, *arguments):
    code = main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_of_a_configuration(capsys):
    code, out, _ = run(
        capsys, STEP_3, "--hardware", "h800,h20,a800,910b", "--context", 8192, "--json", "--max-gpus", 16
    )
    content = json.loads(out)
    assert code == 0
    assert list(content)[:2] == ["counts", "cost_usd_per_mtok"]
    assert list(content["counts"]) == ["kv_bytes", "attention_flop", "linear_flop", "ffn_flop"]
    assert content["cost_usd_per_mtok"]["h20"] == pytest.approx({"attention": 0.040, "ffn": 0.040}, abs=0.001)
    assert content["layouts"][0]["tpot_ms"]["total"] <= 50


def test_a_model_that_the_server_runs_gets_a_command_that_it_takes(capsys, tmp_path):
    values = {
        **COMMON,
        **FAMILIES["qwen3_moe"],
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, _ = run(
        capsys, tmp_path, "--hardware", "h20,h800", "--context", 200, "--max-gpus", 4, "--explain"
    )
    assert code == 0
    assert "does not run" not in out
    assert "FFN FLOP, a layer" in out
    command = next(line.strip() for line in out.splitlines() if line.startswith("  afd serve"))
    config = parse_serve(shlex.split(command)[2:])
    assert config.model == str(tmp_path)
    assert config.attention_workers + config.ffn_workers <= 4


def test_a_model_that_the_server_does_not_run_is_counted_all_the_same(capsys, tmp_path):
    values = {**COMMON, "intermediate_size": 88, "architectures": ["GptOssForCausalLM"], "sliding_window": 128,
              "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, _ = run(
        capsys, tmp_path / "config.json", "--hardware", "l40s", "--context", 200, "--max-gpus", 4
    )
    assert code == 0
    assert "the server does not run this model as it is" in out
    assert "'GptOssForCausalLM' is not served" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([STEP_3, "--hardware", "h900"], "unknown card 'h900'"),
        ([STEP_3, "--tpot-sla-ms", 1, "--hardware", "h800", "--max-gpus", 12], "nearest: "),
        ([STEP_3, "--max-gpus", 2, "--hardware", "h800"], "nearest: "),
        (["no-such-model"], "no-such-model: no such file or directory"),
        ([STEP_3, "--hardware-file", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        ([STEP_3, "--profile", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(capsys, arguments, says):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [[], [STEP_3, "--contxt", "1"], [STEP_3, "--context", "0"], [STEP_3, "--objective", "joy"]]
)
def test_mistyped_flags_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert "afd plan: " in capsys.readouterr().err


def test_an_infeasible_promise_still_gives_counts_and_the_reason(capsys):
    code, out, _ = run(capsys, STEP_3, "--tpot-sla-ms", 1, "--hardware", "h800", "--max-gpus", 12, "--json")
    content = json.loads(out)
    assert (code, content["layouts"]) == (2, [])
    assert content["infeasible"].startswith("--tpot-sla-ms: 1 ms per token cannot be kept")
    assert content["counts"]["ffn_flop"] > 0
