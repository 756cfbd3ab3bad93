"""Which optimizer trains which weights."""

from __future__ import annotations

import torch

from lpa_model.model import LPAForCausalLM
from lpa_model.train.config import TrainConfig
from lpa_model.train.muon import Muon


def optimizers(model: LPAForCausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the blocks' matrices and AdamW for the rest; no decay on vectors and embeddings."""
    blocks = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = set(blocks)
    rest = [p for p in model.parameters() if p not in inside]
    groups = [{"params": rest, "weight_decay": 0.0}]
    if config.muon_learning_rate is None:
        groups.append({"params": blocks, "weight_decay": config.weight_decay})
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    ]
    if config.muon_learning_rate is not None:
        found.append(Muon(blocks, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found
