"""Cross-entropy of a batch, with gradients; bits per byte of a validation text, without."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from lpa_model.model import LPAForCausalLM
from lpa_model.train.tokenizer import TokenIds

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean nats per token of inputs and targets, int64 [sequences, T] both."""


def make_loss(model: LPAForCausalLM, dtype: torch.dtype) -> Loss:
    """Mean cross-entropy of a batch in the arithmetic of inference: weights in `dtype`, residual stream float32."""
    parameters = dict(model.named_parameters())

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if dtype == torch.float32:
            hidden, head = model(ids), model.lm_head.weight
        else:  # the embedding table keeps float32: its gradient is a sum over thousands of tokens
            cast = {name: p if "embed" in name else p.to(dtype) for name, p in parameters.items()}
            hidden, head = torch.func.functional_call(model, cast, (ids,)), model.lm_head.weight.to(dtype)
        logits = F.linear(hidden.flatten(0, 1).to(head.dtype), head, model.lm_head.bias).float()
        return F.cross_entropy(logits, targets.flatten())

    return loss


def accumulate(loss_of: Loss, inputs: torch.Tensor, targets: torch.Tensor, parts: int) -> torch.Tensor:
    """The mean loss of a batch, int64 [sequences, T], detached; its gradients are added to the parameters'.

    The batch is computed in `parts` parts one after another: memory holds the activations of one.
    """
    if parts == 1:
        loss = loss_of(inputs, targets)
        loss.backward()
        return loss.detach()
    total = torch.zeros((), device=inputs.device)
    for some, theirs in zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True):
        loss = loss_of(some, theirs) * (len(some) / len(inputs))
        loss.backward()
        total += loss.detach()
    return total


def bits_per_byte(model: LPAForCausalLM, tokens: TokenIds, num_bytes: float, length: int) -> float:
    """-log2 p per UTF-8 byte over disjoint windows; the first token of a window has no context and is not scored."""
    total, scored = 0.0, 0
    device = model.embed_tokens.weight.device
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, length):
            ids = torch.from_numpy(tokens[start : start + length].astype(np.int64)).to(device)
            if len(ids) < 2:
                continue
            logits = model.logits(model(ids[None, :-1])[0])
            total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
            scored += len(ids) - 1
    return total / scored * len(tokens) / num_bytes / math.log(2)
