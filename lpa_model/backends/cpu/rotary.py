"""Rotary positions with the dimensions that rotate together as neighbours, as the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from lpa_model.layers import RotaryEmbedding


def interleaved(width: int, head_dim: int) -> Tensor:
    """Order of output rows [heads·dh] in which dimension i of a head is followed by i + dh/2; int64 [width].

    Applied to queries and keys alike, it leaves their scores as they are.
    """
    order = torch.arange(head_dim).view(2, -1).T.flatten()  # 0, dh/2, 1, dh/2 + 1, ...
    return torch.arange(width).view(-1, head_dim)[:, order].flatten()


def rope_cache(rotary: RotaryEmbedding) -> Tensor:
    """cos + i sin, complex64 [positions, dh/2]: pairs (cos, sin) of float32 in memory."""
    return torch.complex(rotary.cos, rotary.sin)
