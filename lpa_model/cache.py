"""The latent KV cache: per layer a pool of blocks of keys and a pool of blocks of values.

A block holds `block_size` consecutive tokens of one sequence. Which blocks belong to whom is not known here:
block tables and slots come with every call (slot = block * block_size + offset in the block).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lpa_model.config import CacheLayout, LPAConfig


class LatentCache:
    """Pools of shape [num_blocks, heads, block_size, width], one for keys and one for values in every layer.

    `latent` stores the rank-r projection shared by all heads (heads = 1, width = r), `full` the keys (rotated,
    where positions are rotary) and values themselves (heads = H_kv, width = dh), `mixed` full keys and latent
    values (lpa_model/README.md, "The latent cache"). A dense projection has no latent: its tensor is full in every
    layout. The CPU backends write blocks themselves, and arrange the numbers of a block as their kernels read them.
    """

    def __init__(
        self,
        config: LPAConfig,
        layout: CacheLayout,
        num_blocks: int,
        block_size: int,
        allocate: Callable[[tuple[int, ...]], Tensor],
        width_unit: int = 1,
    ) -> None:
        """
        Args:
            allocate: zeros of a shape, of the dtype and on the device of the backend that reads them.
            width_unit: widths are padded to multiples of it, for kernels that read so many numbers at once.
        """
        self.layout = layout
        self.block_size = block_size
        self.num_blocks = num_blocks
        layers = range(config.num_hidden_layers)
        self.forms = [config.cache_forms(layout, layer) for layer in layers]

        def pool(layer: int, latent: bool, rank: int | None) -> Tensor:
            heads, width = (1, rank or 0) if latent else (config.kv_heads, config.head_size)
            return allocate((num_blocks, heads, block_size, -(-width // width_unit) * width_unit))

        self.keys = [pool(i, self.forms[i][0], config.rank("k", i)) for i in layers]
        self.values = [pool(i, self.forms[i][1], config.rank("v", i)) for i in layers]

    def write(self, layer: int, slots: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, heads, width] at `slots`, a pair (blocks, offsets) of int64 [tokens]."""
        blocks, offsets = slots
        self.keys[layer][blocks, :, offsets] = keys
        self.values[layer][blocks, :, offsets] = values

    def zero(self, blocks: Tensor) -> None:
        """Clear blocks (int64 [n]) on allocation: a masked weight of 0 times a stale NaN would be NaN."""
        for pool in (*self.keys, *self.values):
            pool[blocks] = 0

    def copy(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy whole blocks (int64 [n] each) in every layer."""
        for pool in (*self.keys, *self.values):
            pool[destinations] = pool[sources]

    @staticmethod
    def gather(pool: Tensor, blocks: Tensor, length: int) -> Tensor:
        """The first `length` tokens of sequences with block tables [batch, n]: [batch, length, heads, width]."""
        batch = blocks.shape[0]
        _, heads, block_size, width = pool.shape
        tokens = pool[blocks].transpose(2, 3).reshape(batch, blocks.shape[1] * block_size, heads, width)
        return tokens[:, :length]


def bytes_per_token(config: LPAConfig, layout: CacheLayout, dtype: torch.dtype, width_unit: int = 1) -> int:
    """Cache bytes that one token takes over all layers, with widths padded to multiples of `width_unit`."""
    return config.cache_elements_per_token(layout, width_unit) * dtype.itemsize
