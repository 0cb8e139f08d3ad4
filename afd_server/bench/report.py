"""A run as a person reads it: its table, its warnings, and the bar that shows how far it is.

What lives here: text for the terminal. The numbers are statistics.py's; the JSON is the commands'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from afd_server.bench.outcome import Outcome
from afd_server.bench.statistics import METRICS

REDRAWS_PER_S = 2  # drawing takes time from the event loop that is measured with


def lines(summary: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> list[str]:
    """The table of one run. summary: of statistics.py."""
    generator = summary["generator"]
    found = [
        f"requests        {summary['completed']} completed, {summary['failed']} failed in {summary['duration']:.1f} s; "
        f"at most {summary['max_concurrent_requests']} at a time",
        f"tokens          {summary['total_input_tokens']} in, {summary['total_output_tokens']} out",
        f"throughput      {summary['request_throughput']:.2f} requests/s, {summary['output_throughput']:.1f} output tokens/s, "
        f"{summary['total_token_throughput']:.1f} tokens/s in all",
    ]
    if summary["request_goodput"] is not None:
        promises = ", ".join(f"{METRICS[m]} {ms:g} ms" for m, ms in summary["goodput_promises_ms"].items())
        found.append(f"goodput         {summary['request_goodput']:.2f} requests/s within {promises}: "
                     f"{summary['goodput_share']:.0%} of all")  # fmt: skip
    found.append(f"load generator  {generator['cpu_share']:.0%} of a core, event loop {generator['loop_late_p99_ms']:.1f} ms "
                 f"late at p99")  # fmt: skip
    heads = ["mean", *(f"p{percentile:g}" for percentile in percentiles)]
    found += ["", "ms".ljust(6) + "".join(head.rjust(11) for head in heads)]
    for metric in metrics:
        values = [summary[f"{head}_{metric}_ms"] for head in heads]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        found.append(METRICS[metric].ljust(6) + "".join(cell.rjust(11) for cell in cells))
    return found + list(complaints(summary))


def complaints(summary: Mapping[str, Any]) -> Iterator[str]:
    """Failed requests by kind, and the generator's own trouble."""
    for kind, count in summary["errors"].items():
        message = summary["error_messages"][kind]
        yield f"failed          {count} x {kind}" + (f": {message}" if message else "")
    generator = summary["generator"]
    if generator["is_bottleneck"]:
        yield (
            f"warning: the load generator took {generator['cpu_share']:.0%} of a core and was up to "
            f"{generator['loop_late_p99_ms']:.1f} ms late (p99): times above may be its own; "
            "give it a core, or start several with a part of the load each"
        )


@contextmanager
def progress(total: int | None, about: str, is_shown: bool) -> Iterator[Callable[[Outcome], None]]:
    """A bar on standard error, where that is a terminal, moved on by every outcome. total: None where nobody knows."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    shown = is_shown and console.is_terminal
    bar = Progress(
        *columns, console=console, refresh_per_second=REDRAWS_PER_S, transient=True, disable=not shown
    )
    failed = 0
    with bar:
        task = bar.add_task(about, total=total, failed="")

        def move_on(outcome: Outcome) -> None:
            nonlocal failed
            failed += not outcome.is_complete
            bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")

        yield move_on
