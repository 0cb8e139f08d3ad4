"""Ratios, shares and the two checks of a comparison, on turns made up here."""

import pytest
from comparison import Turn, agreement, check_prompts, compare
from load import Result
from results import append, section

HIGHEST = {"concurrency": 8, "output_tokens_per_s": 400.0, "prefill_tokens_per_s": 1000.0}
LIMITS = {
    "model": "/m/toy", "dtype": "float32", "bytes_per_s": 2e10, "flop_per_s": 2e11, "input_tokens": 16,
    "output_tokens": 4,
}  # fmt: skip


def turn(server, round_, tokens_per_s, *, prefill=500.0, input_tokens=128):
    result = Result(8, 8, input_tokens, 32, tokens_per_s, 0.0, 5.0, 9.0, 7.0, 8.0, 1.0)
    return Turn(server, round_, result, 0.01, prefill)


def test_a_ratio_pairs_the_turns_of_one_round():
    """The second round was slow for all: medians of each side would say 100 / 100, the pairs say otherwise."""
    a = [turn("a", 0, 200.0), turn("a", 1, 50.0), turn("a", 2, 100.0)]
    b = [turn("b", 0, 100.0), turn("b", 1, 40.0), turn("b", 2, 200.0)]
    report = compare([a[0], b[0], a[1], b[1], a[2], b[2]], HIGHEST)
    assert report["servers"]["b"]["ratio"] == {"median": 1.25, "min": 0.5, "max": 2.0}
    assert "ratio" not in report["servers"]["a"]
    assert report["rounds"] == 3


def test_every_other_server_has_its_own_ratio_to_the_first():
    report = compare(
        [turn("a", 0, 100.0, prefill=600.0), turn("b", 0, 50.0), turn("c", 0, 200.0, prefill=300.0)], HIGHEST
    )
    ratios = {name: server.get("ratio", {}).get("median") for name, server in report["servers"].items()}
    assert ratios == {"a": None, "b": 2.0, "c": 0.5}
    assert report["servers"]["c"]["prefill_ratio"]["median"] == 2.0


def test_shares_are_of_the_roofline_of_this_load():
    server = compare([turn("a", 0, 100.0)], HIGHEST)["servers"]["a"]
    assert server["output_share_of_roofline"] == 0.25
    assert server["prefill_share_of_roofline"] == 0.5
    assert server["input_tokens_per_request"] == 16


def test_servers_that_count_a_prompt_differently_cannot_be_compared():
    check_prompts([turn("a", 0, 1.0), turn("b", 0, 1.0), turn("a", 1, 1.0, input_tokens=130)])
    with pytest.raises(RuntimeError, match="128 tokens for a, 136 for b"):
        check_prompts([turn("a", 0, 1.0), turn("b", 0, 1.0, input_tokens=136)])


def test_agreement_ends_at_the_first_other_word():
    assert agreement(" one two three four", " one two six four") == 0.5
    assert agreement("one", "two") == 0.0
    assert agreement("one two", "one two three") == 1.0


def test_results_keep_what_was_there_and_show_a_lost_comparison(tmp_path):
    reports = [compare([turn("a", 0, 50.0), turn("b", 0, 100.0)], HIGHEST)]
    for commit in ("abc1", "abc2"):
        append(tmp_path / "RESULTS.md", section("versus.py /m/toy", commit, LIMITS, reports))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("# Results") == 1
    assert text.index("abc1") < text.index("abc2")
    assert "| 8 | b | 100.0 | 25% | 0.50 (0.50 to 0.50) |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1, "a row with too few or too many cells"
