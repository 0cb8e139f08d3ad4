"""`afd report`: which worker, layer or expert is slow, as text.

What lives here: how the server's report is printed. What does not: the report (telemetry/stragglers.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from afd_server.admin import ask, operator_client

BAR_WIDTH = 40


def report(url: str, api_key: str | None, *, as_json: bool, console: Console | None = None) -> int:
    """Gives the exit code. Raises AdminError."""
    with operator_client(url, api_key) as client:
        answer = ask(client, "GET", "/admin/stragglers")
    if as_json:
        print(json.dumps(answer))
        return 0
    console = console or Console()
    for part in shown(answer):
        console.print(part)
    return 0


def shown(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    seconds = answer["seconds"]
    yield f"of the last {seconds:.0f} s:" if seconds else "since the workers were loaded:"
    for finding in answer["findings"]:
        yield Text(f"* {finding}")
    yield ""
    yield _workers(answer["workers"])
    if answer["waits"]:
        yield ""
        yield _waits(answer["waits"])
    if answer["hottest_experts"]:
        yield ""
        yield _experts(answer["hottest_experts"])
        yield ""
        yield _histogram(answer["load_histogram"])


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _workers(workers: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("WORKER", "BATCHES", "ROWS EACH", "TIME EACH", "OVER PEERS")
    for pace in workers:
        batches = pace["batches"]
        table.add_row(
            pace["worker"], str(batches), f"{pace['rows'] / batches:.1f}" if batches else "-",
            _ms(pace["seconds"], batches), "-" if pace["slowness"] is None else f"{pace['slowness']:.2f}",
        )  # fmt: skip
    return table


def _waits(waits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    table = _table("CALLS FROM", "TO", "CALLS", "FFN", "QUEUE", "WAITED")
    for worker, peers in waits.items():
        for each in peers:
            calls = each["calls"]
            times = [_ms(each[name], calls) for name in ("ffn_s", "queue_s", "waited_s")]
            table.add_row(worker, each["worker"], str(calls), *times)
    return table


def _experts(experts: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("HOTTEST EXPERTS", "LAYER", "TOKENS", "OVER MEAN")
    for each in experts:
        table.add_row(str(each["expert"]), str(each["layer"]), str(each["tokens"]), f"{each['load']:.2f}")
    return table


def _histogram(bins: Sequence[tuple[float | None, int]]) -> Table:
    table = _table("LOAD OVER MEAN", "EXPERTS", "")
    table.columns[2].justify = "left"
    most = max(count for _, count in bins)
    lower = 0.0
    for bound, count in bins:
        name = f"{lower:g} to {bound:g}" if bound is not None else f"over {lower:g}"
        table.add_row(name, str(count), "#" * round(BAR_WIDTH * count / most))
        lower = bound if bound is not None else lower
    return table


def _ms(seconds: float, count: int) -> str:
    return f"{seconds / count * 1e3:.3f} ms" if count else "-"
