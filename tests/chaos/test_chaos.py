"""Nothing is lost while workers die: the short run. `make chaos MINUTES=30` is the long one."""

from itertools import islice

import pytest

from tests.chaos.clients import make_jobs
from tests.chaos.run import CLIENTS, LAYOUTS, MAX_TOKENS, run, write_model
from tests.chaos.schedule import Kind, schedule

pytestmark = pytest.mark.integration

SEED = 4
# What each layout is good for: another attention worker that takes over, and another replica of the FFN shard.
SHORT = {
    "2A1F": (Kind.KILL_ATTENTION, Kind.FREEZE_ATTENTION, Kind.KILL_ALL, Kind.STOP_BOTH),
    "1A2F": (Kind.KILL_FFN, Kind.FREEZE_FFN, Kind.KILL_BOTH, Kind.KILL_AGAIN),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chaos") / "model")


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=pytest.mark.slow) if each == "2A1F" else each for each in SHORT]
)
def test_nothing_is_lost(model, layout):
    kinds = SHORT[layout]
    report = run(model, layout, SEED, islice(schedule(SEED, LAYOUTS[layout][0], kinds), len(kinds)))
    print(report.table())
    assert report.wrong == []
    assert {done.fault.kind for done in report.faults} == set(kinds)
    assert all(done.killed for done in report.faults if done.fault.ends_workers)
    asked = {job.name for job in make_jobs(SEED, CLIENTS, MAX_TOKENS)}
    assert {told.job.name for told in report.requests} == asked
