"""The account of restarts: what goes on counts, what lies back does not, and the pauses grow."""

from afd_server.cluster.restarts import FIRST_PAUSE_S, FORGOTTEN_AFTER_S, MAX_PAUSE_S, Restarts


def test_a_first_death_costs_no_pause_and_later_ones_twice_as_much_each():
    restarts, pauses = Restarts(10), []
    for _ in range(10):
        pauses.append(restarts.pause_s)
        restarts.begin()
    assert pauses[:4] == [0.0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses == sorted(pauses)
    assert max(pauses) == MAX_PAUSE_S
    assert restarts.used_up


def test_each_minute_of_being_up_makes_up_for_one():
    restarts = Restarts(2)
    restarts.down(0.0)
    restarts.begin()
    restarts.begin()
    assert restarts.used_up
    restarts.up(100.0)
    restarts.down(100.0 + FORGOTTEN_AFTER_S)
    assert (restarts.count, restarts.used_up) == (1, False)
    restarts.up(200.0)
    restarts.down(200.0 + 50 * FORGOTTEN_AFTER_S)
    assert restarts.count == 0


def test_time_of_being_down_makes_up_for_nothing():
    restarts = Restarts(1)
    restarts.down(0.0)
    restarts.begin()
    restarts.down(1000 * FORGOTTEN_AFTER_S)
    assert restarts.used_up


def test_without_restarts_the_first_death_is_the_last():
    assert Restarts(0).used_up


def test_a_restart_that_failed_by_no_fault_of_the_worker_is_taken_back():
    restarts = Restarts(1)
    restarts.begin()
    restarts.take_back()
    assert not restarts.used_up
