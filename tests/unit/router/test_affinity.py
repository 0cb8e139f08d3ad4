"""What is remembered of prompts: how much of a beginning, by whom, and for how long."""

from afd_server.router.affinity import SHORTEST_TOKENS, PrefixMemory


def test_the_longest_common_beginning_counts_for_each_replica():
    memory = PrefixMemory()
    memory.remember(range(100), "a")
    memory.remember([*range(40), *[0] * 60], "b")
    assert memory.known_tokens(range(300)) == {"a": 64, "b": 32}
    assert memory.known_tokens([1, *range(300)]) == {}


def test_short_prompts_leave_no_trace():
    memory = PrefixMemory()
    memory.remember(range(SHORTEST_TOKENS - 1), "a")
    assert memory.known_tokens(range(SHORTEST_TOKENS - 1)) == {}


def test_a_restarted_replica_knows_nothing():
    memory = PrefixMemory()
    memory.remember(range(32), "a")
    memory.remember(range(32), "b")
    memory.forget("a")
    assert memory.known_tokens(range(32)) == {"b": 32}


def test_the_longest_unused_is_forgotten_first():
    memory = PrefixMemory(max_entries=2)
    for start in (0, 1, 0, 2):
        memory.remember(range(start, start + 32), "a")
    known = [bool(memory.known_tokens(range(start, start + 32))) for start in (0, 1, 2)]
    assert known == [True, False, True]
