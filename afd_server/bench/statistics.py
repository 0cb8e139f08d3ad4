"""From the outcomes of a run to the numbers that are reported: arithmetic only, under the names of `vllm bench serve`.

Milliseconds, percentiles with linear interpolation. Only requests with a whole answer have times; the others are counted by
kind. TPOT is taken of requests with two output tokens and more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afd_server.bench.generator import Run
from afd_server.bench.outcome import Outcome

METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
# Promises are made for a request, so not for the time between two tokens.
PROMISED = ("ttft", "tpot", "e2el")
# From where on the generator's own delays are worth a warning.
BUSY_SHARE, LATE_MS, LATE_SHARE_OF_TPOT = 0.8, 5.0, 0.1


def times_ms(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Of the complete requests, by metric."""
    complete = [outcome for outcome in outcomes if outcome.is_complete]
    seconds = {
        "ttft": [outcome.ttft_s for outcome in complete],
        "tpot": [outcome.tpot_s for outcome in complete if outcome.output_tokens > 1],
        "itl": [gap_s for outcome in complete for gap_s in outcome.itl_s],
        "e2el": [outcome.e2el_s for outcome in complete],
    }
    return {metric: [1e3 * value for value in values] for metric, values in seconds.items()}


def keeps(outcome: Outcome, promises_ms: Mapping[str, float]) -> bool:
    """Whether a request was answered within all promises."""
    if not outcome.is_complete:
        return False
    return all(1e3 * getattr(outcome, f"{metric}_s") <= limit_ms for metric, limit_ms in promises_ms.items())


def described(
    values: Sequence[float], name: str, percentiles: Sequence[float], unit: str = "_ms"
) -> dict[str, float | None]:
    """mean_, median_, std_ and pN_ of a metric; None where nothing was measured."""
    numbers = {
        f"{kind}_{name}{unit}": round(float(function(values)), 3) if len(values) else None
        for kind, function in (("mean", np.mean), ("median", np.median), ("std", np.std))
    }
    for percentile in percentiles:
        value = round(float(np.percentile(values, percentile)), 3) if len(values) else None
        numbers[f"p{percentile:g}_{name}{unit}"] = value
    return numbers


def summary(
    run: Run,
    metrics: Sequence[str] = tuple(METRICS),
    percentiles: Sequence[float] = (50, 90, 99),
    promises_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The numbers of one run."""
    complete = [outcome for outcome in run.outcomes if outcome.is_complete]
    failed = [outcome for outcome in run.outcomes if not outcome.is_complete]
    input_tokens = sum(outcome.input_tokens for outcome in complete)
    output_tokens = sum(outcome.output_tokens for outcome in complete)
    report: dict[str, Any] = {
        "duration": round(run.duration_s, 3),
        "completed": len(complete),
        "failed": len(failed),
        "errors": dict(Counter(outcome.error for outcome in failed).most_common()),
        "error_messages": {outcome.error: outcome.message for outcome in reversed(failed)},
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": round(len(complete) / run.duration_s, 4),
        "output_throughput": round(output_tokens / run.duration_s, 3),
        "total_token_throughput": round((input_tokens + output_tokens) / run.duration_s, 3),
        "max_concurrent_requests": run.max_concurrent_requests,
        "request_goodput": None,
    }
    if promises_ms:
        good = sum(keeps(outcome, promises_ms) for outcome in run.outcomes)
        report["request_goodput"] = round(good / run.duration_s, 4)
        report["goodput_share"] = round(good / max(1, len(run.outcomes)), 4)
        report["goodput_promises_ms"] = dict(promises_ms)
    times = times_ms(run.outcomes)
    for metric in metrics:
        report |= described(times[metric], metric, percentiles)
    report["generator"] = generator_report(run, times["tpot"])
    return report


def generator_report(run: Run, tpots_ms: Sequence[float]) -> dict[str, Any]:
    """How well the generator kept up. is_bottleneck: the times above may be the generator's own.

    cpu_share: of one core. loop_late: of its event loop, by which every time may be too long. sent_late: of requests.
    """
    late_ms = [1e3 * late_s for late_s in run.loop_late_s]
    loop_late_p99_ms = round(float(np.percentile(late_ms, 99)), 3)
    sent_late_ms = [1e3 * (outcome.sent_s - outcome.due_s) for outcome in run.outcomes] or [0.0]
    cpu_share = run.cpu_s / run.duration_s
    share_ms = LATE_SHARE_OF_TPOT * float(np.median(tpots_ms)) if len(tpots_ms) else 0.0
    return {
        "cpu_share": round(cpu_share, 4),
        "loop_late_p99_ms": loop_late_p99_ms,
        "loop_late_max_ms": round(max(late_ms), 3),
        "sent_late_p99_ms": round(float(np.percentile(sent_late_ms, 99)), 3),
        "is_bottleneck": bool(cpu_share > BUSY_SHARE or loop_late_p99_ms > max(LATE_MS, share_ms)),
    }


def detailed(run: Run) -> dict[str, Any]:
    """Every request's numbers, in the order in which they were due: --save-detailed."""
    ordered = sorted(run.outcomes, key=lambda outcome: (outcome.due_s, outcome.sent_s))
    return {
        "input_lens": [outcome.input_tokens for outcome in ordered],
        "output_lens": [outcome.output_tokens for outcome in ordered],
        "start_times": [outcome.sent_s for outcome in ordered],
        "ttfts": [outcome.ttft_s if outcome.is_complete else None for outcome in ordered],
        "itls": [outcome.itl_s for outcome in ordered],
        "latencies": [outcome.e2el_s if outcome.is_complete else None for outcome in ordered],
        "request_errors": [outcome.error for outcome in ordered],
    }
