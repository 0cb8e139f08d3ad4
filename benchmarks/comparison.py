"""From the turns of several servers to ratios, medians and shares: arithmetic only, no server and no clock.

Called by versus.py. The turns of one round were taken one after the other, so a ratio is of one round: what slowed the
machine down for a while is in both of its numbers.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import Any

from load import Result

MEDIANS = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


@dataclass(frozen=True)
class Turn:
    """One server at one concurrency in one round."""

    server: str
    round: int
    result: Result
    cpu_s_per_token: float  # per output token
    prefill_tokens_per_s: float


def by_server(turns: list[Turn]) -> dict[str, list[Turn]]:
    """In the order in which the servers had their first turns, each in the order of the rounds."""
    sides: dict[str, list[Turn]] = {}
    for turn in turns:
        sides.setdefault(turn.server, []).append(turn)
    return sides


def check_prompts(turns: list[Turn]) -> None:
    """Raises RuntimeError where two servers count the tokens of the same prompts differently."""
    counted: dict[tuple[int, int], Turn] = {}
    for turn in turns:
        first = counted.setdefault((turn.round, turn.result.concurrency), turn)
        if first.result.input_tokens != turn.result.input_tokens:
            raise RuntimeError(
                f"the same prompts are {first.result.input_tokens} tokens for {first.server}, "
                f"{turn.result.input_tokens} for {turn.server}"
            )


def agreement(text: str, other: str) -> float:
    """Share of the words of `text` with which `other` begins too."""
    words = text.split()
    pairs = zip(words, other.split(), strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return alike / max(1, len(words))


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """a / b pair by pair: median, least and greatest."""
    ratios = [ours / theirs for ours, theirs in zip(a, b, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def compare(turns: list[Turn], highest: dict[str, float]) -> dict[str, Any]:
    """All turns at one concurrency: what each server reached, and A's ratio to it. A is the server of the first turn.

    highest: roofline.py's numbers for this concurrency.
    """
    sides = by_server(turns)
    first = next(iter(sides.values()))
    servers = {}
    for name, taken in sides.items():
        report: dict[str, Any] = {
            field: round(statistics.median(getattr(turn.result, field) for turn in taken), 1)
            for field in MEDIANS
        }
        report["prefill_tokens_per_s"] = round(
            statistics.median(turn.prefill_tokens_per_s for turn in taken), 1
        )
        report["cpu_s_per_token"] = round(statistics.median(turn.cpu_s_per_token for turn in taken), 5)
        report["input_tokens_per_request"] = taken[0].result.input_tokens / taken[0].result.requests
        for field in ("output_tokens_per_s", "prefill_tokens_per_s"):
            share = report[field] / highest[field]
            report[field.replace("tokens_per_s", "share_of_roofline")] = round(share, 3)
        if taken is not first:
            report["ratio"] = ratio(
                [turn.result.output_tokens_per_s for turn in first],
                [turn.result.output_tokens_per_s for turn in taken],
            )
            report["prefill_ratio"] = ratio(
                [turn.prefill_tokens_per_s for turn in first], [turn.prefill_tokens_per_s for turn in taken]
            )
        servers[name] = report
    return {
        "concurrency": first[0].result.concurrency,
        "rounds": len(first),
        "highest": {field: highest[field] for field in ("output_tokens_per_s", "prefill_tokens_per_s")},
        "servers": servers,
    }
