"""The layout search: what it finds keeps every limit, nothing that was tried is better, and none found is explained."""

import dataclasses
import itertools
import re

import pytest

from afd_server.config import ServeConfig
from afd_server.errors import ConfigError
from afd_server.planner import infeasible
from afd_server.planner.hardware import choose, read_hardware
from afd_server.planner.layout import (
    Layout,
    Workload,
    attention_weight_bytes,
    ffn_worker_bytes,
    most_requests,
    predict,
    reaching_share,
    usable_bytes,
)
from afd_server.planner.paper import bundled_model
from afd_server.planner.roofline import Precision
from afd_server.planner.search import Limits, best_pairs, combinations, search

CARDS = choose(read_hardware(), ["h800", "h20"])
PAIRS = [("h20", "h800"), ("h800", "h800")]


def workload(context=8192, name="step-3", dtype="fp8"):
    return Workload(bundled_model(name), context, CARDS, Precision.all(dtype))


LIMITS = Limits(0.05, 16, PAIRS)


def test_the_few_pairs_that_are_searched_hold_the_best_of_all():
    cards = choose(read_hardware(), ["h800", "h20", "a800", "910b"])
    work = dataclasses.replace(workload(), cards=cards)
    everything = Limits(0.05, 16, list(itertools.product(cards, repeat=2)), micro_batches=(3,))
    few = dataclasses.replace(everything, pairs=best_pairs(work, everything, "cost", 4))
    assert len(few.pairs) == 4
    assert search(work, few, "cost", best=1)[0] == search(work, everything, "cost", best=1)[0]


@pytest.mark.parametrize("objective", ["cost", "throughput"])
def test_what_is_found_keeps_every_limit(objective):
    work = workload()
    found = search(work, LIMITS, objective)
    assert found
    for prediction in found:
        layout = prediction.layout
        assert prediction.tpot_s <= 0.05
        assert layout.num_cards <= 16
        assert layout.requests % layout.micro_batches == 0
        kept = attention_weight_bytes(work) + layout.requests * work.counts.request_bytes
        assert kept <= usable_bytes(work, layout.attention_card)
        assert ffn_worker_bytes(work, layout) <= usable_bytes(work, layout.ffn_card)
        parts = (
            prediction.attention_s,
            prediction.ffn_s,
            prediction.wire_s,
            prediction.bubble_s,
            prediction.overhead_s,
        )
        assert sum(parts) == pytest.approx(prediction.tpot_s)
        assert min(parts) >= -1e-9


def test_nothing_that_can_be_tried_is_better():
    work, limits = workload(), Limits(0.05, 12, PAIRS[:1], wire_dtypes=("fp8",))
    best = search(work, limits, "cost")[0]
    for layout in combinations(work, limits):
        for share in (0.5, 0.75, 1.0):
            requests = (
                int(share * most_requests(work, layout.attention_card))
                // layout.micro_batches
                * layout.micro_batches
            )
            other = predict(work, dataclasses.replace(layout, requests=requests))
            assert other.tpot_s > 0.05 or other.usd_per_mtok >= best.usd_per_mtok * (1 - 1e-9), layout


def test_a_looser_promise_or_more_cards_never_cost_more():
    work = workload()
    best = search(work, LIMITS, "cost")[0].usd_per_mtok
    assert search(work, dataclasses.replace(LIMITS, tpot_s=0.1), "cost")[0].usd_per_mtok <= best
    assert search(work, dataclasses.replace(LIMITS, max_cards=17), "cost")[0].usd_per_mtok <= best * (1 + 1e-9)


def test_fewer_attention_than_ffn_workers_are_tried():
    layouts = list(combinations(workload(), LIMITS))
    assert any(layout.attention_workers < layout.ffn_workers for layout in layouts)
    assert any(layout.attention_workers > layout.ffn_workers for layout in layouts)
    assert {layout.dispatch for layout in layouts} == {"broadcast", "sparse"}
    assert {layout.micro_batches for layout in layouts} == {1, 2, 3, 4}


def test_the_chance_that_a_token_needs_a_shard():
    assert reaching_share(48, 3, 2) == pytest.approx(0.883, abs=0.001)
    assert reaching_share(48, 3, 4) == pytest.approx(0.587, abs=0.001)
    assert reaching_share(48, 3, 1) == 1


def nearest(error):
    return float(re.search(r"nearest: ([\d.]+)", str(error))[1])


@pytest.mark.parametrize(
    ("flag", "context", "limits"),
    [
        ("--tpot-sla-ms", 8192, dataclasses.replace(LIMITS, tpot_s=0.001)),
        ("--max-gpus", 8192, dataclasses.replace(LIMITS, max_cards=3)),
        ("--context", 10_000_000, LIMITS),
    ],
)
def test_the_nearest_value_is_feasible_and_nothing_before_it(flag, context, limits):
    work = workload(context)
    assert search(work, limits, "cost") == []
    error = infeasible.reason(work, limits)
    assert error.flag == flag
    near = nearest(error)
    if flag == "--tpot-sla-ms":
        assert search(work, dataclasses.replace(limits, tpot_s=near / 1e3), "cost")
        assert not search(work, dataclasses.replace(limits, tpot_s=(near - 0.1) / 1e3), "cost")
    elif flag == "--max-gpus":
        many = dataclasses.replace(limits, tpot_s=10.0)
        assert search(work, dataclasses.replace(many, max_cards=int(near)), "cost")
        assert not search(work, dataclasses.replace(many, max_cards=int(near) - 1), "cost")
    else:
        slow = dataclasses.replace(limits, tpot_s=1000.0)
        assert search(dataclasses.replace(work, context=int(near)), slow, "cost")
        assert not search(dataclasses.replace(work, context=int(near) + 1), slow, "cost")


def test_attention_weights_that_no_card_holds():
    work = Workload(
        bundled_model("deepseek-v3"), 8192, choose(read_hardware(), ["rtx-4090"]), Precision.all("bfloat16")
    )
    error = infeasible.reason(work, Limits(0.05, 64, [("rtx-4090", "rtx-4090")]))
    assert isinstance(error, ConfigError)
    assert "the largest card, rtx-4090" in str(error)


def test_a_layouts_numbers_are_settings_that_the_server_takes():
    for layout in combinations(workload(), LIMITS):
        assert isinstance(layout, Layout)
        config = ServeConfig(attention_workers=layout.attention_workers, ffn_workers=layout.ffn_workers,
                             ffn_parallel=f"{layout.expert_shards}x{layout.tensor_shards}",
                             micro_batches=str(layout.micro_batches), wire_dtype=layout.wire_dtype)  # fmt: skip
        assert config.ffn_shards == (layout.expert_shards, layout.tensor_shards)
