"""Who holds which cache block, and which blocks already hold a given prefix. Integers and digests only, no tensors.

A block is held (reference count above 0), cached (full, findable by its hash, reference count 0) or free. Free blocks
are handed out lowest number first, so that the live range of the pool stays dense; when none is left, the cached
block that was released longest ago is taken.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Sequence


def hash_root(cache_salt: str) -> bytes:
    """Where a chain of digests begins: chains of different salts have no digest in common."""
    if not cache_salt:
        return b""
    return hashlib.blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=16, person=b"cache_salt").digest()


def hash_block(parent: bytes, token_ids: Sequence[int], salt: bytes = b"") -> bytes:
    """Digest of a full block: its tokens and everything before them; `salt` keeps a block private."""
    digest = hashlib.blake2b(parent, digest_size=16, key=salt)
    digest.update(array("I", token_ids).tobytes())
    return digest.digest()


class BlockManager:
    """Reference counts, the hash index of cached blocks, and the free list.

    Invariant: num_free + num_cached + num_held == num_blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks))  # a heap
        self._cached: dict[int, None] = {}  # released longest ago first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return sum(count > 0 for count in self._references)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Held blocks as a fraction of all."""
        return 1 - self.num_available / self.num_blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of `hashes`; they are not taken yet."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take(self, blocks: Sequence[int]) -> None:
        """Add a reference to blocks found by `match`."""
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] += 1

    def num_available_besides(self, blocks: Sequence[int]) -> int:
        """What `num_available` would be once `blocks` are taken."""
        return self.num_available - sum(self._references[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """`count` fresh blocks with one reference each; the caller has checked `num_available`."""
        blocks = []
        for _ in range(count):
            if self._free:
                block = heapq.heappop(self._free)
            else:
                block = next(iter(self._cached))
                del self._cached[block]
                del self._block_of[self._hash_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable; the first block with a digest wins."""
        if self.enable_prefix_caching and digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def forget(self) -> int:
        """Make no block findable any more; the number of cached ones, which are free now."""
        cached = list(self._cached)
        for block in cached:
            heapq.heappush(self._free, block)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of.clear()
        return len(cached)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference each, last block first, so that the tail of a chain is evicted before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released once too often"
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    heapq.heappush(self._free, block)
