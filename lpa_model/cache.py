"""The latent KV cache: per layer a pool of blocks of keys and a pool of blocks of values.

A block holds `block_size` consecutive tokens of one sequence. Which blocks belong to whom is not known here:
block tables and slots come with every call (slot = block * block_size + offset in the block).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lpa_model.config import CacheLayout, LPAConfig
from lpa_model.quantization import MOST_CODE

SCALE_DTYPE = torch.bfloat16
"""Of an int8 cache, as of int8 weights: codes are chosen after the scale is rounded, so that its rounding costs
no accuracy."""


class LatentCache:
    """Pools of shape [num_blocks, heads, block_size, width], one for keys and one for values in every layer.

    `latent` stores the rank-r projection shared by all heads (heads = 1, width = r), `full` the keys (rotated,
    where positions are rotary) and values themselves (heads = H_kv, width = dh), `mixed` full keys and latent
    values (lpa_model/README.md, "The latent cache"). A dense projection has no latent: its tensor is full in every
    layout. The CPU backends write blocks themselves, and arrange the numbers of a block as their kernels read them.

    An int8 cache has codes in these pools, and a scale for each token and head, or latent, in pools of their own.
    """

    def __init__(
        self,
        config: LPAConfig,
        layout: CacheLayout,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        allocate: Callable[..., Tensor] = torch.zeros,
        width_unit: int = 1,
    ) -> None:
        """
        Args:
            dtype: float32, bfloat16 or int8.
            allocate: (shape, dtype=...) -> zeros on the device of the backend that reads them.
            width_unit: widths are padded to multiples of it, for kernels that read so many numbers at once.
        """
        self.layout = layout
        self.block_size = block_size
        self.num_blocks = num_blocks
        layers = range(config.num_hidden_layers)
        self.forms = [config.cache_forms(layout, layer) for layer in layers]

        def pool(layer: int, latent: bool, rank: int | None) -> Tensor:
            heads, width = (1, rank or 0) if latent else (config.kv_heads, config.head_size)
            return allocate((num_blocks, heads, block_size, -(-width // width_unit) * width_unit), dtype=dtype)

        def scales(pool: Tensor) -> Tensor | None:
            return allocate(tuple(pool.shape[:3]), dtype=SCALE_DTYPE) if dtype is torch.int8 else None

        self.keys = [pool(i, self.forms[i][0], config.rank("k", i)) for i in layers]
        self.values = [pool(i, self.forms[i][1], config.rank("v", i)) for i in layers]
        self.key_scales = [scales(pool) for pool in self.keys]  # [num_blocks, heads, block_size]
        self.value_scales = [scales(pool) for pool in self.values]

    @property
    def pools(self) -> list[Tensor]:
        """Every tensor, with the blocks along its first dimension."""
        scales = [pool for pool in (*self.key_scales, *self.value_scales) if pool is not None]
        return [*self.keys, *self.values, *scales]

    def write(self, layer: int, slots: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [tokens, heads, width] at `slots`, a pair (blocks, offsets) of int64 [tokens].

        Returns:
            Both as they are read from the cache, in their own dtype.
        """
        keys = _write(self.keys[layer], self.key_scales[layer], slots, keys)
        return keys, _write(self.values[layer], self.value_scales[layer], slots, values)

    def read(self, layer: int, blocks: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of n blocks: [n, heads, block_size, width] each; not copied where the pools have `dtype` and
        `blocks` is a slice."""
        keys = _read(self.keys[layer], self.key_scales[layer], blocks, dtype)
        return keys, _read(self.values[layer], self.value_scales[layer], blocks, dtype)

    def gather(self, layer: int, tables: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens of sequences with block tables [batch, n]:
        [batch, length, heads, width] each."""
        pools = self.read(layer, tables.flatten(), dtype)
        keys, values = (pool.unflatten(0, tables.shape).transpose(2, 3).flatten(1, 2)[:, :length] for pool in pools)
        return keys, values

    def zero(self, blocks: Tensor) -> None:
        """Clear blocks (int64 [n]) on allocation: a masked weight of 0 times a stale NaN would be NaN."""
        for pool in self.pools:
            pool[blocks] = 0

    def copy(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy whole blocks (int64 [n] each) in every layer."""
        for pool in self.pools:
            pool[destinations] = pool[sources]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., width] -> int8 codes [.., width] and bfloat16 scales [..], the reference for the kernels.

    number = scale * code: the scale is the largest number of a row / 127, rounded to bfloat16, and codes are quotients
    rounded to even. A row with a number that is not finite has a scale that is not.
    """
    x = x.float()
    peak = x.abs().amax(-1, keepdim=True)
    # a quotient of tensors: by a plain number, some devices multiply by its reciprocal, which rounds twice
    scales = (peak / torch.full_like(peak, MOST_CODE)).to(SCALE_DTYPE)
    steps = torch.where(scales == 0, torch.inf, scales.float())
    codes = (x / steps).round_().clamp_(-MOST_CODE, MOST_CODE).to(torch.int8)
    return codes, scales.squeeze(-1)


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_rows`, rounded to `dtype`."""
    return (codes.float() * scales.float().unsqueeze(-1)).to(dtype)


def bytes_per_token(config: LPAConfig, layout: CacheLayout, dtype: torch.dtype, width_unit: int = 1) -> int:
    """Cache bytes that one token takes over all layers, with widths padded to multiples of `width_unit`."""
    scales = config.cache_rows_per_token(layout) * SCALE_DTYPE.itemsize if dtype is torch.int8 else 0
    return config.cache_elements_per_token(layout, width_unit) * dtype.itemsize + scales


def _write(pool: Tensor, scales: Tensor | None, slots: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    blocks, offsets = slots
    if scales is None:
        pool[blocks, :, offsets] = rows
        return rows
    codes, row_scales = quantize_rows(rows)
    pool[blocks, :, offsets], scales[blocks, :, offsets] = codes, row_scales
    return dequantize_rows(codes, row_scales, rows.dtype)


def _read(pool: Tensor, scales: Tensor | None, blocks: slice | Tensor, dtype: torch.dtype) -> Tensor:
    return pool[blocks] if scales is None else dequantize_rows(pool[blocks], scales[blocks], dtype)
