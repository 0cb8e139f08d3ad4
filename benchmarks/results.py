"""A comparison as Markdown, for RESULTS.md and the terminal: what ran, on what, and one row for each server and load.

It writes down what it is given, whoever is ahead. Every script takes from here what it ran on: commit and machine.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

HEADER = """# Results

What `versus.py` measured with `--write`, the losing runs too. Times are medians over the rounds; a ratio is A's output
tokens/s over the other's in the same round, A being the first server of a table, as median (least to greatest). Shares are
of the roofline measured in the same run.
"""
COLUMNS = (
    "clients", "server", "output tok/s", "of roofline", "A / this", "prefill tok/s", "of roofline", "A / this",
    "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "CPU ms/token",
)  # fmt: skip


def commit() -> str:
    """The commit that is measured, with a + when the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return (name.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def machine() -> str:
    """The processor's name, its cores and the memory: "AMD EPYC, 2 cores, 23 GiB"."""
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{name}, {os.cpu_count()} cores, {memory_bytes / 2**30:.0f} GiB"


def _ratio(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "A"


def table(reports: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for report in reports:
        for name, server in report["servers"].items():
            cells = (
                report["concurrency"], name,
                f"{server['output_tokens_per_s']:.1f}", f"{server['output_share_of_roofline']:.0%}",
                _ratio(server.get("ratio")),
                f"{server['prefill_tokens_per_s']:.0f}", f"{server['prefill_share_of_roofline']:.0%}",
                _ratio(server.get("prefill_ratio")),
                f"{server['ttft_p50_ms']:.0f} / {server['ttft_p99_ms']:.0f}",
                f"{server['tpot_p50_ms']:.1f} / {server['tpot_p99_ms']:.1f}",
                f"{1e3 * server['cpu_s_per_token']:.1f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
        highest = report["highest"]
        lines.append(
            f"| {report['concurrency']} | *roofline* | {highest['output_tokens_per_s']:.1f} | | "
            f"| {highest['prefill_tokens_per_s']:.0f} | | | | | |"
        )
    return "\n".join(lines)


def section(command: str, commit: str, limits: dict[str, Any], reports: list[dict[str, Any]]) -> str:
    """One run. limits: roofline.py's last line."""
    names = " against ".join(reports[0]["servers"])
    rounds = reports[0]["rounds"]
    return f"""## {Path(limits["model"]).name}, {limits["dtype"]}: {names}

`{command}` at commit {commit}, {rounds} round{"s" if rounds > 1 else ""}, on {machine()}. Measured limits:
{limits["bytes_per_s"] / 1e9:.1f} GB/s, {limits["flop_per_s"] / 1e9:.0f} GFLOP/s. {limits["input_tokens"]} tokens in,
{limits["output_tokens"]} out.

{table(reports)}
"""


def append(file: Path, text: str) -> None:
    before = file.read_text() if file.is_file() else HEADER
    file.write_text(f"{before.rstrip()}\n\n{text}")
