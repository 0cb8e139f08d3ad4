"""From measured steps to the coefficients of times.py: least squares over relative errors, no coefficient below zero.

What lives here: the fit. What does not: measuring (profiling/) and the formulas that are fitted (times.py). Where a time is the
larger of reading and computing, the number of rows at which the one overtakes the other is tried out. Steps that decode are
fitted by themselves, and what prompts add to them afterwards: a prompt's time must not bend what a plan says of decoding.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from afd_server.planner.model_config import CountedModel
from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes

ROUNDS = 400
# Rows at which computing may overtake reading.
CROSSINGS = tuple(2 ** (power / 2) for power in range(25))

Columns = Callable[[float], list[list[float]]]


@dataclass(frozen=True, slots=True)
class StepSample:
    """What a step of one micro-batch did and took, in seconds over all its layers. overhead_s: what is left of its period."""

    rows: int
    context_tokens: int
    chunk_pairs: float
    samples: int
    attention_s: float
    ffn_s: float
    wire_s: float
    overhead_s: float

    @property
    def seconds(self) -> float:
        return self.attention_s + self.ffn_s + self.wire_s + self.overhead_s


def fit_times(samples: Sequence[StepSample], model: CountedModel) -> LayerTimes:
    """Of one attention worker and an FFN worker that holds the whole FFN."""
    layers = model.num_layers
    decoding = [sample for sample in samples if not sample.chunk_pairs]
    prompts = [sample for sample in samples if sample.chunk_pairs]
    many_rows = max(sample.rows for sample in decoding)
    return LayerTimes(
        layers,
        _with_prompts(_fit_attention(decoding, layers), prompts, many_rows, layers),
        _with_large_calls(_fit_ffn(decoding, model), prompts, many_rows, layers),
        _fit_linear([(s.rows, s.wire_s / layers / 2) for s in samples]),
        _fit_linear([(s.samples, s.overhead_s) for s in samples]),
    )


def mean_error(times: LayerTimes, samples: Sequence[StepSample]) -> float:
    """Of the fit on what it was fitted to, as a share of a step."""
    return statistics.mean(abs(predicted_s(times, sample) / sample.seconds - 1) for sample in samples)


def predicted_s(times: LayerTimes, sample: StepSample) -> float:
    return times.layers_s(sample.rows, sample.context_tokens, sample.chunk_pairs) + times.step_overhead_s(
        sample.samples
    )


def _fit_attention(decoding: Sequence[StepSample], layers: int) -> AttentionTimes:
    seconds = [sample.attention_s / layers for sample in decoding]

    def columns(crossing: float) -> list[list[float]]:
        return [[1.0, sample.rows, max(crossing, sample.rows), sample.context_tokens] for sample in decoding]

    crossing, (fixed, row, compute, context) = _best(columns, seconds)
    return AttentionTimes(fixed, row, crossing * compute, compute, context)


def _with_prompts(
    times: AttentionTimes, prompts: Sequence[StepSample], many_rows: int, layers: int
) -> AttentionTimes:
    """What rows beyond those of decoding take, and pairs of a query and a key."""
    further_s, pair_s = _beyond(
        [[sample.rows - many_rows, sample.chunk_pairs] for sample in prompts if sample.rows > many_rows],
        [sample.attention_s / layers for sample in prompts if sample.rows > many_rows],
        times.seconds(many_rows, 0),
        [times.seconds(many_rows, 0) - times.seconds(many_rows - 1, 0), 0.0],
    )
    return dataclasses.replace(times, many_rows=many_rows, further_row_s=further_s, chunk_pair_s=pair_s)


def _fit_ffn(samples: Sequence[StepSample], model: CountedModel) -> FFNTimes:
    """One number of seconds a weight stands for reading whatever a row needs."""
    layers = model.num_layers
    dense, shared, expert = (
        sum(getattr(layer, part).value for layer in model.ffn) / layers
        for part in ("dense", "shared", "expert")
    )
    mixture = next((layer for layer in model.ffn if layer.num_experts), None)
    unit = FFNTimes(
        dense_s=dense,
        shared_s=shared,
        expert_s=expert,
        num_experts=mixture.num_experts if mixture else 0,
        chosen_share=mixture.top_k / mixture.num_experts if mixture else 0.0,
    )
    seconds = [sample.ffn_s / layers for sample in samples]

    def columns(crossing: float) -> list[list[float]]:
        compute = unit.seconds(crossing) / crossing
        return [[1.0, sample.rows, max(unit.seconds(sample.rows), sample.rows * compute)] for sample in samples]

    crossing, (fixed, row, weight_s) = _best(columns, seconds)
    return FFNTimes(
        fixed,
        row,
        dense_s=dense * weight_s,
        shared_s=shared * weight_s,
        expert_s=expert * weight_s,
        num_experts=unit.num_experts,
        chosen_share=unit.chosen_share,
        compute_row_s=weight_s * unit.seconds(crossing) / crossing,
    )


def _with_large_calls(times: FFNTimes, prompts: Sequence[StepSample], many_rows: int, layers: int) -> FFNTimes:
    (further_s,) = _beyond(
        [[sample.rows - many_rows] for sample in prompts if sample.rows > many_rows],
        [sample.ffn_s / layers for sample in prompts if sample.rows > many_rows],
        times.seconds(many_rows),
        [times.seconds(many_rows) - times.seconds(many_rows - 1)],
    )
    return dataclasses.replace(times, many_rows=many_rows, further_row_s=further_s)


def _beyond(
    columns: Sequence[Sequence[float]], seconds: Sequence[float], decoding_s: float, otherwise: list[float]
) -> list[float]:
    """The coefficients of what `seconds` are beyond those of the largest step that decodes; `otherwise` where no step was larger."""
    if not columns:
        return otherwise
    # Errors are relative to the whole.
    return least_squares(columns, seconds, decoding_s)[0]


def _fit_linear(points: Sequence[tuple[float, float]]) -> LinearTimes:
    coefficients, _ = least_squares([[1.0, rows] for rows, _ in points], [seconds for _, seconds in points])
    return LinearTimes(*coefficients)


def _best(columns: Columns, seconds: Sequence[float]) -> tuple[float, list[float]]:
    """The crossing whose fit leaves least."""
    best: tuple[float, float, list[float]] = (math.inf, 1.0, [])
    for crossing in CROSSINGS:
        coefficients, error = least_squares(columns(crossing), seconds)
        if error < best[0]:
            best = (error, crossing, coefficients)
    return best[1], best[2]


def least_squares(
    columns: Sequence[Sequence[float]], seconds: Sequence[float], known_s: float = 0.0
) -> tuple[list[float], float]:
    """The coefficients, none negative, that leave the smallest mean square of relative errors; and what they leave.

    known_s: what of each time is explained already.

    One coefficient after the other is solved for, the others as they are, from the most useful one on.
    """
    rows = [[value / max(s, 1e-9) for value in row] for row, s in zip(columns, seconds, strict=True)]
    wanted = [1 - known_s / max(s, 1e-9) for s in seconds]
    count = len(rows[0])
    products = [[sum(row[i] * row[j] for row in rows) for j in range(count)] for i in range(count)]
    moments = [sum(row[i] * share for row, share in zip(rows, wanted, strict=True)) for i in range(count)]
    found = [0.0] * count
    for _ in range(ROUNDS):
        for i in range(count):
            if products[i][i] > 0:
                others = sum(products[i][j] * found[j] for j in range(count)) - products[i][i] * found[i]
                found[i] = max(0.0, (moments[i] - others) / products[i][i])
    left = [
        sum(value * c for value, c in zip(row, found, strict=True)) - share
        for row, share in zip(rows, wanted, strict=True)
    ]
    return found, statistics.mean(error * error for error in left)
