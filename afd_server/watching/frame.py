"""One frame of `afd top`: how the server does, its workers, and where the time of a hop goes.

What lives here: what is shown and how. What does not: asking the server (top.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from afd_server.telemetry.stragglers import SLOW_WORKER
from afd_server.watching.samples import Samples

STATE_STYLES = {"serving": "green", "down": "bold red"}
MOVING = "yellow"  # loading, draining, restarting
MAX_FINDINGS = 4


@dataclass(frozen=True, slots=True)
class View:
    """What is known at one moment. recent: what was added in the last `seconds`; None: since the server began.

    workers and change: as /admin/workers says; report: as /admin/stragglers does. problem: why the server does not answer now.
    """

    url: str
    clock: str
    now: Samples
    recent: Samples
    seconds: float | None
    workers: Sequence[Mapping[str, Any]]
    change: str | None
    report: Mapping[str, Any]
    problem: str = ""


def frame(view: View) -> RenderableType:
    parts: list[RenderableType] = [
        _title(view),
        "",
        _requests(view),
        _pace(view),
        "",
        _workers(view),
        "",
        _hops(view),
    ]
    parts += [Text(f"* {finding}") for finding in view.report["findings"][:MAX_FINDINGS]]
    return Group(*parts)


def _title(view: View) -> Text:
    (model, *_) = [*view.now.label_values("num_requests_queued", "model_name"), "?"]
    title = Text.assemble(("afd top", "bold"), f"  {view.clock}", no_wrap=True, overflow="ellipsis")
    title.append(f"  last {view.seconds:.0f} s" if view.seconds else "  since the start", "dim")
    title.append(f"  {view.url}  ").append(model, "cyan")
    if view.change:
        title.append(f"  {view.change}", MOVING)
    if view.problem:
        title.append(f"\n{view.problem}", "bold red")
    return title


def _requests(view: View) -> Text:
    now, recent = view.now, view.recent
    line = Text(
        f"requests  {now.total('num_requests_running'):.0f} running, {now.total('num_requests_waiting'):.0f} waiting, "
        f"{now.total('num_requests_queued'):.0f} queued"
    )
    refused, failed = (
        recent.total("requests_refused_total"),
        recent.total("request_success_total", finished_reason="error"),
    )
    if refused:
        line.append(f", {refused:.0f} refused", MOVING)
    if failed:
        line.append(f", {failed:.0f} failed", "bold red")
    if view.seconds:
        tokens, prompt = recent.total("generation_tokens_total"), recent.total("prompt_tokens_total")
        line.append(f"   {tokens / view.seconds:.1f} tokens/s, {prompt / view.seconds:.0f} prompt tokens/s")
    else:
        tokens, prompt = now.total("generation_tokens_total"), now.total("prompt_tokens_total")
        line.append(f"   {tokens:.0f} tokens, {prompt:.0f} prompt tokens")
    return line


def _pace(view: View) -> Text:
    def both(name: str) -> str:
        median_s, high_s = (view.recent.quantile(name, share) for share in (0.5, 0.95))
        return "-" if median_s is None or high_s is None else f"{_time(median_s)}, 95% within {_time(high_s)}"

    return Text(f"TTFT {both('time_to_first_token_seconds')}   TPOT {both('inter_token_latency_seconds')}")


def _workers(view: View) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("WORKER", no_wrap=True)
    table.add_column("STATE", overflow="fold")
    for name in ("SINCE", "RUN", "WAIT", "KV", "BATCH/S", "ROWS", "TIME", "PEERS"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in view.workers:
        style = STATE_STYLES.get(worker["state"], MOVING)
        state = f"{worker['state']}: {worker['reason']}" if worker["reason"] else worker["state"]
        table.add_row(
            worker["name"], Text(state, style), _duration(worker["since_s"]),
            *_load(view.now, worker), *_work(view.report, worker["name"]),
        )  # fmt: skip
    return table


def _load(now: Samples, worker: Mapping[str, Any]) -> tuple[str, str, str]:
    """Of an attention worker: requests that run and wait, and how full its cache is."""
    if worker["role"] != "attention":
        return "", "", ""
    engine = worker["name"]
    return (
        f"{now.total('num_requests_running', engine=engine):.0f}",
        f"{now.total('num_requests_waiting', engine=engine):.0f}",
        f"{100 * now.total('kv_cache_usage_perc', engine=engine):.0f}%",
    )


def _work(report: Mapping[str, Any], worker: str) -> tuple[str, str, str, Text]:
    """Batches a second, rows and time of each, and its time over its peers'; of the time that the report is of."""
    pace = next((each for each in report["workers"] if each["worker"] == worker), None)
    if pace is None or not pace["batches"]:
        return "-", "-", "-", Text("-")
    slowness, batches, seconds = pace["slowness"], pace["batches"], report["seconds"]
    style = "bold red" if (slowness or 0) >= SLOW_WORKER else ""
    return (
        f"{batches / seconds:.0f}" if seconds else "-",
        f"{pace['rows'] / batches:.1f}",
        _time(pace["seconds"] / batches),
        Text("-" if slowness is None else f"{slowness:.1f}x", style),
    )


def _hops(view: View) -> Text:
    means = {
        word: view.recent.mean(f"{name}_hop_seconds")
        for word, name in (("attention", "attention"), ("wire", "wire"), ("FFN", "ffn"))
    }
    shown = "  ".join(f"{word} {'-' if mean_s is None else _time(mean_s)}" for word, mean_s in means.items())
    bubble, micro_batches = view.recent.mean("bubble_share"), view.recent.mean("micro_batches")
    shown += f"  bubble {'-' if bubble is None else f'{100 * bubble:.0f}%'}"
    shown += f"  micro-batches {'-' if micro_batches is None else f'{micro_batches:.1f}'}"
    return Text(f"hop  {shown}")


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds < 1e-4:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2f} ms"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
