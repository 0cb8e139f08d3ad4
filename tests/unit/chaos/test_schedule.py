"""The schedule of faults: the same from the same seed, every kind in every round, and only workers that exist."""

from itertools import islice

import pytest

from tests.chaos.schedule import Kind, Layout, Role, schedule

LAYOUT = Layout(attention=2, ffn=3)
ROUNDS = 20


@pytest.fixture
def faults():
    return list(islice(schedule(1, LAYOUT), ROUNDS * len(Kind)))


def test_a_seed_is_a_schedule(faults):
    assert list(islice(schedule(1, LAYOUT), len(faults))) == faults
    assert list(islice(schedule(2, LAYOUT), len(faults))) != faults


def test_every_round_has_every_kind(faults):
    rounds = [faults[start : start + len(Kind)] for start in range(0, len(faults), len(Kind))]
    assert all({fault.kind for fault in one} == set(Kind) for one in rounds)
    assert len({tuple(fault.kind for fault in one) for one in rounds}) > 1


def test_every_worker_is_hit_and_none_that_does_not_exist(faults):
    hit = {(blow.role, blow.place) for fault in faults for blow in fault.blows}
    assert hit == {(role, place) for role in Role for place in range(LAYOUT.workers(role))}


def test_what_ends_a_worker_is_told_from_what_stops_it(faults):
    for fault in faults:
        harmless = fault.kind.endswith("for a moment") or fault.kind in (
            Kind.RENEW,
            Kind.SCALE,
            Kind.KILL_FRONT_END,
        )
        assert fault.ends_workers != harmless
        assert all(blow.ends_it != harmless for blow in fault.blows)
        assert all(not harmless or 0 < blow.stopped_s < 1 for blow in fault.blows)


def test_the_front_end_is_killed_alone_and_with_a_worker(faults):
    killed = [fault for fault in faults if fault.kills_front_end]
    assert {(fault.kind, len(fault.blows)) for fault in killed} == {
        (Kind.KILL_FRONT_END, 0), (Kind.KILL_FRONT_END_TOO, 1)}  # fmt: skip


def test_what_is_scaled_ends_as_it_was(faults):
    for fault in faults:
        if fault.kind is Kind.SCALE:
            assert [dict(change.numbers) for change in fault.changes] == [
                {"attention_workers": 3, "ffn_replicas": 4},
                {"attention_workers": 2, "ffn_replicas": 3},
            ]
