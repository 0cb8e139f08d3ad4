"""docs/operations.md tells of every metric and every log event, and of none that there is not."""

import ast
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from afd_server.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
LEVELS = {"info", "warning", "error", "exception", "critical", "log"}
PLACEHOLDER = re.compile(r"%[-.\d]*[a-z]")
# A template that is only made of what is filled in, as "%s %s", says nothing here; the page has what it is filled with.
LEAST_LETTERS = 8


def rows_below(heading):
    """The cells of the table rows of a section."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows if not set(row[0]) <= set("-: ")][1:]


def log_templates():
    """The first argument of every logger call, with … for whatever is filled in."""
    for path in (ROOT / "afd_server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS
            ):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "logger"):
                continue
            text = next(
                (
                    arg.value
                    for arg in node.args
                    if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
                ),
                None,
            )
            assert text is not None, f"{path.name}:{node.lineno}: a log event has a text of its own"
            yield PLACEHOLDER.sub("…", text)


def test_every_metric_is_told_of():
    families = text_string_to_metric_families(Metrics("model").exposition().decode())
    exported = {family.name for family in families if not family.name.endswith("_created")}
    assert {row[0].strip("`") for row in rows_below("Metrics")} == exported


def test_every_log_event_is_told_of():
    told = {row[1].strip("`") for row in rows_below("Log events")}
    events = {text for text in log_templates() if sum(map(str.isalpha, text)) >= LEAST_LETTERS}
    assert events - told == set(), "not on the page"
    notes = {text for text in told if text.startswith("WORKER ")}
    assert told - events - notes == set(), "no longer in the code"
