"""The fit gives back the coefficients that made the measurements, also through noise, and never a negative one."""

import dataclasses
import itertools
import random
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.models.config_file import ConfigFile
from afd_server.planner.fit import StepSample, fit_times, least_squares, mean_error
from afd_server.planner.model_config import counted_model
from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes

MODEL = counted_model(
    ConfigFile({
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 100, "num_experts": 16,
        "num_experts_per_tok": 4, "moe_intermediate_size": 32,
    }, "config.json"), "test",
)  # fmt: skip
TRUE = LayerTimes(
    4,
    AttentionTimes(
        fixed_s=5e-5, row_s=1e-6, weights_s=1e-4, compute_row_s=8e-6, context_token_s=1e-7, chunk_pair_s=1e-9
    ),
    FFNTimes(fixed_s=2e-5, row_s=2e-6, expert_s=6e-5, num_experts=16, chosen_share=0.25, compute_row_s=3e-5),
    LinearTimes(4e-5, 1e-6),
    LinearTimes(1e-3, 5e-5),
)


def samples(noise=0.0):
    draw = random.Random(1)
    sizes, contexts = (1, 2, 4, 8, 16, 32, 64), (16, 128, 512, 2048)
    found = [(rows, rows * context, 0.0, rows) for rows, context in itertools.product(sizes, contexts)]
    found += [(tokens, 0, tokens * (tokens + 1) / 2, 1) for tokens in (128, 512)]
    return [
        StepSample(
            rows, context, pairs, sampled,
            *(seconds * draw.uniform(1 - noise, 1 + noise) for seconds in (
                4 * TRUE.attention_s(rows, context, pairs), 4 * TRUE.ffn_s(rows), 4 * 2 * TRUE.wire_s(rows),
                TRUE.step_overhead_s(sampled),
            )),
        )
        for rows, context, pairs, sampled in found
    ]  # fmt: skip


def test_exact_measurements_are_explained():
    assert mean_error(fit_times(samples(), MODEL), samples()) < 0.02


def test_noise_is_seen_through():
    times = fit_times(samples(noise=0.1), MODEL)
    for rows, context in ((1, 64), (8, 1024), (48, 700)):
        assert times.step_s(rows, rows * context) == pytest.approx(TRUE.step_s(rows, rows * context), rel=0.08)
    assert times.attention.context_token_s == pytest.approx(1e-7, rel=0.15)


def test_prompts_that_are_faster_by_the_row_do_not_bend_what_decoding_takes():
    decoding = [sample for sample in samples() if not sample.chunk_pairs]
    prompts = [
        dataclasses.replace(sample, attention_s=0.8 * sample.attention_s, ffn_s=0.8 * sample.ffn_s)
        for sample in samples()
        if sample.chunk_pairs
    ]
    alone, times = fit_times(decoding, MODEL), fit_times(decoding + prompts, MODEL)
    assert times.step_s(64, 64 * 512) == pytest.approx(alone.step_s(64, 64 * 512))
    for sample in prompts:
        pairs = sample.chunk_pairs
        assert 4 * times.attention_s(sample.rows, 0, pairs) == pytest.approx(sample.attention_s, rel=0.05)
        assert 4 * times.ffn_s(sample.rows) == pytest.approx(sample.ffn_s, rel=0.1)
        # Where no prompt was measured, further rows cost what the last of decoding did.
        assert alone.ffn_s(sample.rows) > times.ffn_s(sample.rows)


def test_a_shard_of_what_was_fitted_reads_its_part():
    ffn = fit_times(samples(), MODEL).ffn
    assert ffn.num_experts == 16
    assert ffn.shard(4, 1).seconds(64) < 0.5 * ffn.seconds(64)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_no_coefficient_is_negative(points):
    found, error = least_squares([[1.0, a, b] for a, b, _ in points], [seconds for *_, seconds in points])
    assert min(found) >= 0
    assert error >= 0


def test_every_coefficient_of_a_fit_is_a_time():
    times = fit_times(samples(noise=0.3), MODEL)
    for part in (times.attention, times.ffn, times.wire, times.overhead):
        assert min(astuple(part)) >= 0
