"""Rotary positions with the dimensions that rotate together as neighbours, as the kernels read them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_model.layers import RotaryEmbedding


def interleaved(head_dim: int) -> Tensor:
    """Order of a head's dimensions in which i is followed by i + dh/2: 0, dh/2, 1, dh/2 + 1, ...; int64 [dh].

    Applied to queries and keys alike, it leaves their scores as they are.
    """
    return torch.arange(head_dim).view(2, -1).T.flatten()


def rope_cache(rotary: RotaryEmbedding, head_dim: int) -> Tensor:
    """cos + i sin, complex64 [positions, head_dim / 2]: pairs of float32 in memory; zeros behind the model's own."""
    pairs = torch.complex(rotary.cos, rotary.sin)
    return F.pad(pairs, (0, head_dim // 2 - pairs.shape[1]))
