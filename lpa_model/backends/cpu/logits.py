"""The passes over rows of logits by the C kernels, with torch's definitions."""

from __future__ import annotations

from functools import partial

from lpa_model.backends.cpu import library
from lpa_model.backends.cpu.sampling import draw_tokens, mask_logits
from lpa_model.backends.cpu.score import score_rows
from lpa_model.backends.torch.sampling import RowOps


def row_ops(instruction_set: str) -> RowOps:
    """Those of an instruction set; LibraryError where the library has none."""
    kernels = library.load().kernels(instruction_set)
    return RowOps(partial(draw_tokens, kernels), partial(score_rows, kernels), partial(mask_logits, kernels))
