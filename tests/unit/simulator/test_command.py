"""`afd simulate`: what it prints, what it draws, and the one line that a mistake ends in."""

import json
from pathlib import Path

import pytest

from afd_server import cli
from afd_server.simulator.flags import parser
from afd_server.simulator.studies import STUDIES

TRACES = Path(__file__).parents[3] / "docs" / "traces"
SMALL = ["simulate", "qwen3-moe-235b", "--dtype", "fp8", "--attention-workers", "2", "--ffn-workers", "8", "--duration", "3",
         "--micro-batches", "1", "--detail", "steps", "--output-len", "20", "--warm-up", "0"]  # fmt: skip


def run(capsys, *more):
    code = cli.main([*SMALL, *more])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_json_holds_the_results(capsys):
    code, out, _ = run(capsys, "--request-rate", "5", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["requests"]["answered"] > 0 and result["requests"]["failed"] == 0
    assert result["detail"] == "steps"
    assert 0 < result["utilisation"]["ffn"] <= 1 and 0 < result["bubble_share"] < 1
    assert result["usd_per_mtok"] > 0 and result["wall_us_per_step"] > 0
    assert result["ttft_s"]["p50"] <= result["ttft_s"]["p99"]


def test_text_says_the_same_for_people(capsys):
    code, out, _ = run(
        capsys,
        "--max-concurrency",
        "4",
        "--kill",
        "1:ffn-3",
        "--ffn-restart",
        "0.5",
        "--slow",
        "attention-1=1.5",
    )
    assert code == 0
    for word in ("throughput", "goodput", "TTFT", "TPOT", "utilisation", "cost", "failures", "us a step"):
        assert word in out


@pytest.mark.parametrize(("file", "answered"), [("azure.csv", 60), ("burstgpt.csv", 56)])
def test_traces_in_both_public_formats_are_played(capsys, file, answered):
    """Four of BurstGPT's requests were not answered, and are left out."""
    code, out, _ = run(capsys, "--trace", str(TRACES / file), "--trace-speed", "40", "--json")
    assert code == 0
    assert json.loads(out)["requests"]["came"] == answered


def test_pictures_are_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(
        capsys, "--max-concurrency", "1", "--duration", "0.5", "--detail", "hops", "--plot", str(tmp_path)
    )
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run.png", "run.svg", "lanes.png", "lanes.svg"}
    assert "wrote" in err


MISTAKES = [
    ((), "--request-rate"),
    (("--request-rate", "1", "--max-concurrency", "2"), "one of"),
    (("--request-rate", "1", "--attention-card", "h900"), "unknown card"),
    (("--request-rate", "1", "--ffn-workers", "1"), "GB"),
    (("--request-rate", "1", "--max-model-len", "9999999"), "positions"),
    (("--request-rate", "1", "--kill", "3:ffn-8"), "there is no ffn-8"),
    (("--request-rate", "1", "--kill", "soon:ffn-0"), "soon"),
    (("--request-rate", "1", "--slow", "attention-0=fast"), "--slow"),
    (("--request-rate", "1", "--resize", "3:cards=4"), "attention-workers=N"),
    (("--request-rate", "1", "--input-len", "long"), "--input-len"),
    (("--request-rate", "1", "--warm-up", "5"), "--warm-up"),
    (("--request-rate", "1", "--ffn-replicas", "3"), "equal copies"),
    (("--request-rate", "1", "--detail", "lockstep", "--mtbf-hours", "5"), "no failures"),
    (("--request-rate", "1", "--tpot-sla-ms", "0.5"), "is the least"),
    (("--trace", "/nowhere.csv"), "/nowhere.csv"),
    (("--request-rat", "1"), "did you mean --request-rate"),
]


@pytest.mark.parametrize(("flags", "said"), MISTAKES, ids=[" ".join(flags) for flags, _ in MISTAKES])
def test_a_mistake_ends_in_one_line_that_says_what_is_wrong(capsys, flags, said):
    try:
        code, out, err = run(capsys, *flags)
    except SystemExit as end:
        code, printed = end.code, capsys.readouterr()
        out, err = printed.out, printed.err
    assert code == 2 and out == ""
    assert said in err and err.count("\n") == 1


def test_an_unknown_model_is_named(capsys):
    assert cli.main(["simulate", "gpt-9", "--request-rate", "1"]) == 2
    assert "gpt-9" in capsys.readouterr().err


def test_every_study_can_be_asked_for():
    action = next(action for action in parser()._actions if action.dest == "study")
    assert set(action.choices) == set(STUDIES)
