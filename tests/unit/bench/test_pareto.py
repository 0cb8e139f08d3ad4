"""The front of a sweep, its saved results, and its picture."""

import dataclasses
import json
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.bench import plot
from afd_server.bench.client import BenchError
from afd_server.bench.pareto import Point, by_server, check_names, front, read, result
from afd_server.errors import ConfigError

POINT = Point("afd", 1, 30.0, 33.0, 40.0, 100.0, 0)


def point(server, clients, tokens_per_s, tpot_ms):
    return dataclasses.replace(
        POINT, server=server, max_concurrency=clients, output_throughput=tokens_per_s, median_tpot_ms=tpot_ms
    )


SWEEP = [
    point("a", 1, 30.0, 33.0), point("b", 1, 20.0, 48.0), point("a", 8, 80.0, 95.0), point("b", 8, 85.0, 90.0),
    point("a", 16, 78.0, 180.0),
]  # fmt: skip


def beats(one, other):
    no_worse = one.output_throughput >= other.output_throughput and one.median_tpot_ms <= other.median_tpot_ms
    return no_worse and (one.output_throughput, one.median_tpot_ms) != (
        other.output_throughput,
        other.median_tpot_ms,
    )


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_the_front_is_whom_nobody_beats(drawn):
    points = [point("a", number, tokens, tpot) for number, (tokens, tpot) in enumerate(drawn, start=1)]
    best = front(points)
    assert best
    assert not [one for one in best if any(beats(other, one) for other in points)]
    values = {(one.output_throughput, one.median_tpot_ms) for one in best}
    for one in points:
        unbeaten = not any(beats(other, one) for other in points)
        assert unbeaten == ((one.output_throughput, one.median_tpot_ms) in values)


def test_a_result_marks_the_best_and_can_be_read_again(tmp_path):
    saved = tmp_path / "sweep.json"
    saved.write_text(json.dumps({"points": result(SWEEP)}))
    assert read(saved) == SWEEP
    assert [entry["is_best"] for entry in json.loads(saved.read_text())["points"]] == [
        True,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"points": [{"server": "a"}]}'])
def test_a_file_that_is_no_sweep_is_named(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"other\.json is not a result"):
        read(file)


def test_answers_of_one_token_have_no_point():
    with pytest.raises(BenchError, match="a: answers of a single token"):
        Point.of("a", {"median_tpot_ms": None})


def test_two_servers_of_one_name_are_refused():
    check_names(["a", "b"])
    with pytest.raises(ConfigError, match="two are called 'a'"):
        check_names(["a", "b", "a"])


def test_the_picture_names_every_server_and_its_axes(tmp_path):
    png, svg = plot.draw(SWEEP, tmp_path / "sweep.png", tpot_sla_ms=100.0)
    assert png.read_bytes().startswith(b"\x89PNG")
    texts = {
        "".join(element.itertext()).strip()
        for element in ElementTree.parse(svg).iter()
        if element.tag.endswith("text")
    }
    assert {"a", "b", "promise of 100 ms", "16", "time per output token, median of the requests (ms)"} <= texts
    assert by_server(SWEEP)["a"][-1].max_concurrency == 16


def test_a_place_that_cannot_be_drawn_to_is_named_before_the_sweep(tmp_path):
    plot.check(tmp_path / "fine.png")
    with pytest.raises(ConfigError, match="is no directory"):
        plot.check(tmp_path / "nowhere" / "sweep.png")
