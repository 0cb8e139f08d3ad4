"""What the dashboard and the rules ask for is what the server exports: every metric, and every label that is looked at."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from afd_server.telemetry.metrics import Metrics
from tests.unit.deploy.test_deploy import DEPLOY

# Prometheus' own, and the labels that it gives every series.
OWN_METRICS, OWN_LABELS = {"up"}, {"instance", "job", "le", "__name__"}
RULES = DEPLOY / "prometheus-alerts.yaml"
DASHBOARD = DEPLOY / "grafana-dashboard.json"
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
NO_METRICS = {
    "by",
    "on",
    "without",
    "ignoring",
    "group_left",
    "group_right",
    "and",
    "or",
    "unless",
    "bool",
    "offset",
}


def exported():
    """The name of every series that the server can export, with its labels."""
    metrics = Metrics("model", tpot_sla_s=0.1, ttft_sla_s=1.0)
    found = {}
    for collector in set(metrics._registry._names_to_collectors.values()):
        for suffix in SUFFIXES[collector._type]:
            found[collector._name + suffix] = {*(collector._labelnames or ("model_name",))}
    return found


def rules():
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard():
    return json.loads(DASHBOARD.read_text())


def panel_queries():
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def queries():
    variables = [each["definition"] for each in dashboard()["templating"]["list"] if each["type"] == "query"]
    (metric,) = [re.fullmatch(r"label_values\(([\w:]+), \w+\)", text)[1] for text in variables]
    return [*(rule["expr"] for rule in rules()), *panel_queries(), metric]


def metrics_of(query):
    """The names of a query's series, each with the labels that it is matched by."""
    bare = re.sub(r"\[[^\]]*\]", "", query)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", "", bare)
    found = re.findall(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?\s*(\()?", bare)
    return [
        (name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)))
        for name, matchers, parenthesis in found
        if not parenthesis and name not in NO_METRICS
    ]


@pytest.mark.parametrize("query", queries())
def test_every_metric_of_a_query_exists(query):
    known = exported() | {rule["record"]: None for rule in rules() if "record" in rule}
    found = metrics_of(query)
    assert found, query
    for name, labels in found:
        assert name in known or name in OWN_METRICS, f"{name} is not exported"
        if known.get(name) is not None:
            assert labels <= known[name] | OWN_LABELS, f"{name} has no label {labels - known[name]}"


@pytest.mark.parametrize("query", queries())
def test_every_label_that_is_grouped_by_exists(query):
    known = exported()
    all_labels = {label for labels in known.values() for label in labels} | OWN_LABELS
    for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query):
        assert {label.strip() for label in group.split(",")} <= all_labels


def test_a_query_for_a_metric_that_there_is_not_would_be_found():
    assert metrics_of(
        'sum by (le) (rate(afd:gone_total{engine="a", worker!="b"}[5m])) > 2 and on (x) afd:left'
    ) == [
        ("afd:gone_total", {"engine", "worker"}),
        ("afd:left", set()),
    ]
    assert "afd:gone_total" not in exported()


def test_every_alert_says_what_to_do():
    for rule in rules():
        if "alert" in rule:
            assert set(rule["annotations"]) == {"summary", "description"}
            assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_the_dashboard_is_whole():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(set(cells)) == len(cells), "panels lie over one another"


def test_prometheus_itself_accepts_the_rules_and_the_queries(tmp_path):
    beside_python = str(Path(sys.executable).parent)  # where `make promtool` puts it
    promtool = shutil.which("promtool", path=f"{beside_python}:{os.environ['PATH']}")
    if promtool is None and "CI" not in os.environ:
        pytest.skip("there is no promtool: make promtool (of Debian's prometheus)")
    assert promtool is not None
    replaced = [re.sub(r"\$__rate_interval", "5m", query).replace("$model", ".*") for query in panel_queries()]
    asked = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(replaced)]
    panels = tmp_path / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    done = subprocess.run(
        [promtool, "check", "rules", RULES, panels], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
