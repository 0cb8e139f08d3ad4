"""The account of KV blocks: what is found, what is evicted, and that nothing is lost or lent twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.kvcache.block_pool import BlockAccountError, BlockPool, extend_keys

BLOCK_SIZE = 2


def keys_of(token_ids):
    keys = []
    extend_keys(keys, token_ids, BLOCK_SIZE)
    return keys


def fill(pool, token_ids):
    """Blocks for these tokens, all full ones registered, held by the caller."""
    keys = keys_of(token_ids)
    cached = pool.find_prefix(keys, len(token_ids))
    pool.take(cached)
    blocks = cached + pool.allocate(-(-len(token_ids) // BLOCK_SIZE) - len(cached))
    for block, key in zip(blocks, keys, strict=False):
        pool.register(block, key)
    return blocks


def test_keys_are_a_chain():
    assert keys_of([1, 2, 3, 4])[0] == keys_of([1, 2, 9, 9])[0]
    assert keys_of([1, 2, 3, 4])[1] != keys_of([9, 9, 3, 4])[1]
    assert len(keys_of([1, 2, 3])) == 1


def test_keys_grow_with_the_tokens():
    keys = keys_of([1, 2, 3])
    extend_keys(keys, [1, 2, 3, 4, 5, 6], BLOCK_SIZE)
    assert keys == keys_of([1, 2, 3, 4, 5, 6])


def test_a_known_prefix_is_found_while_held_and_after():
    pool = BlockPool(8, BLOCK_SIZE, enable_prefix_caching=True)
    blocks = fill(pool, [1, 2, 3, 4, 5])
    assert pool.find_prefix(keys_of([1, 2, 3, 4, 7]), 5) == blocks[:2]
    pool.release(blocks)
    assert pool.num_free == 8
    assert pool.find_prefix(keys_of([1, 2, 3, 4, 7]), 5) == blocks[:2]
    assert pool.find_prefix(keys_of([1, 2, 9, 9, 7]), 5) == blocks[:1]


def test_the_last_token_is_never_found():
    pool = BlockPool(8, BLOCK_SIZE, enable_prefix_caching=True)
    blocks = fill(pool, [1, 2, 3, 4])
    assert pool.find_prefix(keys_of([1, 2, 3, 4]), 4) == blocks[:1]


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(8, BLOCK_SIZE, enable_prefix_caching=False)
    fill(pool, [1, 2, 3, 4])
    assert pool.find_prefix(keys_of([1, 2, 3, 4, 5]), 5) == []


def test_blank_blocks_go_first_then_the_longest_unused_prefix():
    pool = BlockPool(4, BLOCK_SIZE, enable_prefix_caching=True)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    pool.allocate(2)
    assert pool.find_prefix(keys_of([1, 2, 0]), 3) == old
    pool.allocate(1)
    assert pool.find_prefix(keys_of([1, 2, 0]), 3) == []
    assert pool.find_prefix(keys_of([3, 4, 0]), 3) == new


def test_of_a_chain_the_tail_is_evicted_first():
    pool = BlockPool(3, BLOCK_SIZE, enable_prefix_caching=True)
    blocks = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find_prefix(keys_of([1, 2, 3, 4, 5, 6, 7]), 7) == blocks[:2]


def test_a_prefix_that_is_used_again_becomes_the_latest():
    pool = BlockPool(2, BLOCK_SIZE, enable_prefix_caching=True)
    first, second = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(first)
    pool.release(second)
    pool.take(first)
    pool.release(first)
    pool.allocate(1)
    assert pool.find_prefix(keys_of([1, 2, 0]), 3) == first


@pytest.mark.parametrize(
    ("held", "message"),
    [([], "0 requests hold it"), ([[0], [0]], "2 requests hold it")],
    ids=["leak", "lent twice"],
)
def test_the_check_finds_what_is_wrong(held, message):
    pool = BlockPool(2, BLOCK_SIZE, enable_prefix_caching=True)
    assert pool.allocate(1) == [0]
    pool.check([[0]])
    with pytest.raises(BlockAccountError, match=message):
        pool.check(held)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.booleans()), max_size=40),
    st.booleans(),
)
def test_the_account_adds_up_after_anything(arrivals, enable_prefix_caching):
    """Requests of few distinct tokens come, share and leave; the content of shared blocks is what their holders think."""
    pool = BlockPool(12, BLOCK_SIZE, enable_prefix_caching)
    held, content = [], {}
    for token_ids, leave_first in arrivals:
        while held and (leave_first or pool.num_free < -(-len(token_ids) // BLOCK_SIZE)):
            leave_first = False
            pool.release(held.pop(0)[1])
        shared = pool.find_prefix(keys_of(token_ids), len(token_ids))
        for index, block in enumerate(shared):
            assert content[block] == token_ids[: (index + 1) * BLOCK_SIZE]
        blocks = fill(pool, token_ids)
        assert blocks[: len(shared)] == shared
        for index, block in enumerate(blocks):
            content[block] = token_ids[: (index + 1) * BLOCK_SIZE]
        held.append((token_ids, blocks))
        pool.check(blocks for _, blocks in held)
        for owner, owned in held:
            assert [content[block] for block in owned] == [
                owner[: (index + 1) * BLOCK_SIZE] for index in range(len(owned))
            ]
