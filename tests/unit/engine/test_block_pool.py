"""The block pool against a slow, obvious ledger of owners."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gyrfalcon.engine.block_pool import PADDING_BLOCK, BlockPool, block_key, first_parent

NUM_BLOCKS = 9


class PoolMachine(RuleBasedStateMachine):
    """Allocate, share, publish, find and release in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, block_size=4)
        self.owned: list[int] = []  # one entry an ownership
        self.content: dict[int, bytes] = {}  # what was published in a block since it was last allocated
        self.serial = 0

    @precondition(lambda self: self.pool.num_free > 0)
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        assert block not in self.owned
        self.content.pop(block, None)
        self.owned.append(block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.owned))
        self.pool.share(block)
        self.owned.append(block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.owned))
        self.serial += 1
        key = str(self.serial).encode()
        self.pool.publish(block, key)
        self.content.setdefault(block, key)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        block, key = data.draw(st.sampled_from(sorted(self.content.items())))
        assert self.pool.find_prefix([key]) == [block]
        self.pool.share(block)
        self.owned.append(block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.owned))
        self.owned.remove(block)
        self.pool.release(block)

    @invariant()
    def every_block_is_free_or_owned(self) -> None:
        assert self.pool.num_free == NUM_BLOCKS - 1 - len(set(self.owned))
        for block in range(NUM_BLOCKS):
            assert self.pool.references(block) == self.owned.count(block)
        assert PADDING_BLOCK not in self.owned


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_freed_blocks_without_a_prefix_are_taken_before_those_with_one() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    first, second, third = pool.allocate(), pool.allocate(), pool.allocate()
    pool.publish(first, b"kept")
    for block in (first, second, third):
        pool.release(block)
    assert {pool.allocate(), pool.allocate()} == {second, third}
    assert pool.find_prefix([b"kept"]) == [first]
    assert pool.allocate() == first
    assert pool.find_prefix([b"kept"]) == []


def test_a_prefix_is_found_up_to_its_first_missing_block() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    blocks = [pool.allocate(), pool.allocate()]
    pool.publish(blocks[0], b"0")
    pool.publish(blocks[1], b"2")
    assert pool.find_prefix([b"0", b"1", b"2"]) == blocks[:1]


def test_keys_depend_on_the_salt_the_parent_and_the_tokens() -> None:
    tokens = np.array([1, 2, 3], dtype=np.int32)
    keys = {
        block_key(first_parent(""), tokens),
        block_key(first_parent("tenant"), tokens),
        block_key(first_parent(""), tokens + 1),
        block_key(block_key(first_parent(""), tokens), tokens),
    }
    assert len(keys) == 4
