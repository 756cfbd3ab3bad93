"""How much an error of each projection's output matters, as a matrix G: an error e counts e^T G e.

Nothing here needs a gradient. Errors count by what they do to the residual stream, those of q and k by what they do to
attention's scores, so that matrices of a layer can be compared; `importance` compares layers.

    o, down    write into the stream: G = I
    v          through its heads' part of o_proj: the sum over the group's heads of W_o,h^T W_o,h
    k          what the group's queries see of it: the sum of their second moments, over head_dim
    q          what the group's keys see of it, likewise
    up, gate   through silu(g) u and down_proj: (W_d^T W_d) times, number by number, the slopes' second moment
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpa_model.config import LPAConfig, Projection
from lpa_model.convert.lowrank.calibrate import SINKS, LayerMoments
from lpa_model.convert.lowrank.factor import TEXT_SHRINK, shrink
from lpa_model.model import PreNormBlock

SCORES = 4.0
"""What a squared error of attention's scores counts beside one in the residual stream, before `importance`. Of 1, 4, 16
and 64 it gave the best SmolLM2; 1 was as good."""


def output_weight(config: LPAConfig, block: PreNormBlock, moments: LayerMoments, name: Projection) -> Tensor | None:
    """G [out, out] of one projection, float64; None is the identity."""
    groups, dh = config.num_attention_heads // config.kv_heads, config.head_size
    if name == "v":
        parts = block.get_parameter("attention.o_proj.weight").double().unflatten(1, (config.kv_heads, groups, dh))
        return _diagonal(torch.einsum("dkgi,dkgj->kij", parts, parts))
    if name == "k":
        return _diagonal(moments.queries.unflatten(0, (config.kv_heads, groups)).sum(1) * (SCORES / dh))
    if name == "q":
        return _diagonal(moments.keys.repeat_interleave(groups, dim=0) * (SCORES / dh))
    if name in ("gate", "up"):
        down = block.get_parameter("ffn.down_proj.weight")
        return (down.T @ down) * moments.slopes[name]  # the product in float32: in float64 it would take a while
    return None


def _diagonal(blocks: Tensor) -> Tensor:
    """[n, dh, dh] -> [n dh, n dh]."""
    whole: Tensor = torch.block_diag(*blocks)
    return whole


def importance(hidden: Tensor) -> float:
    """Factor on the errors of a layer, which makes them shares of the residual stream behind it.

    The norms that read the stream divide by its size, and it grows from layer to layer: so early errors count most.
    """
    return 1 / float(hidden[:, SINKS:].square().mean())


def scaled(outputs: Tensor | None, cost: Tensor, width: int) -> Tensor:
    """The weight that a gradient's moment gives, G / 2: errors are then nats per token (gradients.py).

    Where only the moment's mean square is known, it is given to `outputs`, the identity if None.
    """
    if cost.ndim == 2:
        return shrink(cost / 2, TEXT_SHRINK)
    known = torch.eye(width, dtype=cost.dtype) if outputs is None else outputs
    return known * (cost / known.diagonal().mean() / 2)
