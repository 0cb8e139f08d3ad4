"""The report: its percentiles and its two forms."""

import json

from tests.chaos.clients import Answer, Job, Told
from tests.chaos.faults import Done
from tests.chaos.report import Report, percentile
from tests.chaos.schedule import Blow, Fault, Kind, Role

KILL = Fault(Kind.KILL_FFN, 0.0, (Blow(Role.FFN, 0),))
STOP = Fault(Kind.STOP_FFN, 0.0, (Blow(Role.FFN, 0, stopped_s=0.5),))


def test_percentiles_are_values_that_occurred():
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99), percentile([], 50)) == (
        50.0, 99.0, 7.0, None)  # fmt: skip


def test_the_whole_is_the_sum_of_its_parts():
    report = Report([Done(KILL, [11], 0.2, 3.0), Done(STOP)], [Told(Job("a", {}), longest_pause_s=3.5)])
    report.add(Report([Done(KILL, [12], 0.4, 5.0)], [Told(Job("b", {}))], ["b: HTTP 503"]))
    assert json.loads(report.line()) == {
        "faults": 3, "requests": 2, "failures": 1, "cut_streams": 0, "longest_pause_s": 3.5, "detected_max_s": 0.4,
        "recovery_p50_s": 3.0, "recovery_p99_s": 5.0,
    }  # fmt: skip
    rows = {line[:30].strip(): line for line in report.table().splitlines()}
    assert rows[Kind.KILL_FFN].split()[-6:] == ["3.00", "s", "5.00", "s", "5.00", "s"]
    assert rows["all"].split()[1:3] == ["3", "2"]
    assert "b: HTTP 503" in report.table()


def test_streams_that_a_killed_front_end_cut_are_no_failures_and_have_a_line():
    front_end = Fault(Kind.KILL_FRONT_END, 0.0, kills_front_end=True)
    cut = Answer({}, {0: [1]}, {}, {}, None)
    report = Report([Done(front_end, [11], recovered_s=4.0)], [Told(Job("a", {}), cut, [cut, cut])])
    table = report.table().splitlines()
    assert table[-2:] == ["2 streams were cut by a killed front-end, and asked for again", "0 failures"]
    assert json.loads(report.line())["cut_streams"] == 2
