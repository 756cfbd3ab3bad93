"""Bookkeeping of cache blocks: the conservation law, order of hand-out, eviction, and the hash chain."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.block_manager import BlockManager, hash_block, hash_root


def test_lowest_free_numbers_first() -> None:
    blocks = BlockManager(6, 4, True)
    first = blocks.allocate(3)
    assert first == [0, 1, 2]
    blocks.release([1])
    assert blocks.allocate(2) == [1, 3]


def test_cached_blocks_are_found_and_the_oldest_tail_is_evicted_first() -> None:
    blocks = BlockManager(4, 2, True)
    chain = [hash_block(b"", [1, 2])]
    chain.append(hash_block(chain[0], [3, 4]))
    held = blocks.allocate(2)
    for block, digest in zip(held, chain, strict=True):
        blocks.publish(block, digest)
    blocks.release(held)
    assert (blocks.num_free, blocks.num_cached, blocks.num_held) == (2, 2, 0)
    assert blocks.match(chain) == held
    assert blocks.allocate(3)[-1] == held[1]  # the free ones, then the tail of the chain
    assert blocks.match(chain) == held[:1]


def test_hits_are_not_available_for_allocation() -> None:
    blocks = BlockManager(3, 2, True)
    digest = hash_block(b"", [1, 2])
    (block,) = blocks.allocate(1)
    blocks.publish(block, digest)
    blocks.release([block])
    assert blocks.num_available == 3
    assert blocks.num_available_besides(blocks.match([digest])) == 2
    blocks.take([block])
    assert blocks.num_available == 2


def test_the_first_block_with_a_digest_wins() -> None:
    blocks = BlockManager(3, 2, True)
    digest = hash_block(b"", [1, 2])
    a, b = blocks.allocate(2)
    blocks.publish(a, digest)
    blocks.publish(b, digest)
    blocks.release([a, b])
    assert blocks.match([digest]) == [a]
    assert (blocks.num_free, blocks.num_cached) == (2, 1)


def test_nothing_is_found_without_prefix_caching() -> None:
    blocks = BlockManager(3, 2, False)
    (block,) = blocks.allocate(1)
    blocks.publish(block, b"x")
    assert blocks.match([b"x"]) == []
    blocks.release([block])
    assert blocks.num_free == 3


def test_a_digest_depends_on_tokens_order_parent_and_salt() -> None:
    digests = {
        hash_block(b"", [1, 2]),
        hash_block(b"", [2, 1]),
        hash_block(b"x", [1, 2]),
        hash_block(b"", [1, 2], b"salt"),
        hash_block(b"", [258]),
    }
    assert len(digests) == 5


def test_chains_of_different_salts_begin_differently() -> None:
    roots = [hash_root(""), hash_root("a"), hash_root("b"), hash_root("a" * 1000), hash_root("\ud800")]
    assert len({hash_block(root, [1, 2]) for root in roots}) == 5
    assert hash_root("a") == hash_root("a")
    assert hash_block(hash_root(""), [1, 2]) == hash_block(b"", [1, 2])


class Bookkeeping(RuleBasedStateMachine):
    """Random requests that match, take, allocate, publish and release chains of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(8, 2, True)
        self.held: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def start(self, tokens: list[int]) -> None:
        chain: list[bytes] = []
        for token in tokens:
            chain.append(hash_block(chain[-1] if chain else b"", [token]))
        hits = self.blocks.match(chain)
        needed = len(tokens) - len(hits)
        if needed > self.blocks.num_available_besides(hits):
            return
        self.blocks.take(hits)
        fresh = self.blocks.allocate(needed)
        assert not set(fresh) & {b for table in self.held for b in table}, "a held block was handed out"
        table = hits + fresh
        for block, digest in zip(table, chain, strict=True):
            self.blocks.publish(block, digest)
        assert self.blocks.match(chain)[: len(hits)] == hits
        self.held.append(table)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.blocks.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def conserved(self) -> None:
        held = {b for table in self.held for b in table}
        assert self.blocks.num_held == len(held)
        assert self.blocks.num_free + self.blocks.num_cached + len(held) == 8
        assert self.blocks.num_available == 8 - len(held)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(stateful_step_count=30)


def test_what_is_forgotten_is_free_or_becomes_so_when_it_is_released() -> None:
    blocks = BlockManager(4, 2, True)
    held, cached = blocks.allocate(2)
    blocks.publish(held, b"held")
    blocks.publish(cached, b"cached")
    blocks.release([cached])
    assert blocks.forget() == 1
    assert not blocks.match([b"held"]) and not blocks.match([b"cached"])
    assert (blocks.num_free, blocks.num_cached, blocks.num_held) == (3, 0, 1)
    blocks.release([held])
    assert (blocks.num_free, blocks.num_cached, blocks.num_held) == (4, 0, 0)
    assert sorted(blocks.allocate(4)) == [0, 1, 2, 3]
