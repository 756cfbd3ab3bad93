"""The passes over rows of logits by kernels, in place of torch's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpa_model.backends.base import Mask
from lpa_model.backends.cpu.kernels import draws, masks, row_scores
from lpa_model.backends.cpu.kernels.launch import compile_kernel
from lpa_model.backends.torch import rows as torch_rows
from lpa_model.backends.torch.sampling import RowOps


def kernel_rows(dtype: torch.dtype) -> RowOps:
    """Kernels for logits of `dtype` and of float32, torch where one cannot be compiled; compiling begins now."""
    draw = {kind: compile_kernel(draws.KERNELS[kind]) for kind in {dtype, torch.float32}}
    score = {kind: compile_kernel(row_scores.KERNELS[kind]) for kind in {dtype, torch.float32}}
    mask = {kind: compile_kernel(masks.KERNELS[kind]) for kind in {dtype, torch.float32}}

    def draw_tokens(logits: Tensor, settings: Tensor) -> Tensor:
        kernel = draw[logits.dtype].result()
        if kernel is None:
            return torch_rows.draw_tokens(logits, settings)
        return draws.draw_tokens(kernel, logits.contiguous(), settings)

    def scores(logits: Tensor, targets: Tensor, top: int) -> torch_rows.RowScores:
        kernel = score[logits.dtype].result()
        if kernel is None:
            return torch_rows.row_scores(logits, targets, top)
        return row_scores.row_scores(kernel, logits.contiguous(), targets, top)

    def copy_allowed(logits: Tensor, allowed: Sequence[Mask | None]) -> Tensor:
        kernel = mask[logits.dtype].result()
        if kernel is None:
            return torch_rows.copy_allowed(logits, allowed)
        return masks.copy_allowed(kernel, logits.contiguous(), allowed)

    return RowOps(draw_tokens, scores, copy_allowed)
