"""Pictures are drawn from the plan's own numbers, as PNG and SVG; without matplotlib the remedy is said."""

import importlib.util

import pytest

from afd_server.errors import ConfigError
from afd_server.planner import plots
from afd_server.planner.hardware import choose, read_hardware
from afd_server.planner.layout import Workload
from afd_server.planner.paper import bundled_model
from afd_server.planner.roofline import Precision
from afd_server.planner.search import Limits, search

WORKLOAD = Workload(
    bundled_model("step-3"), 8192, choose(read_hardware(), ["h800", "h20"]), Precision.all("fp8")
)
LIMITS = Limits(0.05, 12, [("h20", "h800")])


@pytest.fixture(scope="module")
def best():
    return search(WORKLOAD, LIMITS, "cost")[0]


def test_every_picture_is_written_twice(best, tmp_path):
    pytest.importorskip("matplotlib")
    files = plots.draw_all(tmp_path / "new" / "directory", WORKLOAD, LIMITS, best)
    assert {file.name for file in files} == {
        f"{name}.{kind}" for name in ("cost", "ratio", "timeline") for kind in ("png", "svg")
    }
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert all(b"<svg" in file.read_bytes()[:2000] for file in files if file.suffix == ".svg")


def test_the_ratio_is_swept_below_and_above_the_best(best):
    points = plots.sweep(WORKLOAD, LIMITS, best)
    workers = [point.layout.attention_workers for point in points]
    assert workers[0] < best.layout.attention_workers <= workers[-1] == 12 - best.layout.ffn_workers
    assert {point.layout.ffn_workers for point in points} == {best.layout.ffn_workers}


def test_without_matplotlib_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs matplotlib \(pip install 'afd-server\[plots\]'\)"):
        plots.require_matplotlib()


def test_a_directory_that_cannot_be_written(best, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        plots.draw_all(tmp_path / "file" / "below", WORKLOAD, LIMITS, best)
