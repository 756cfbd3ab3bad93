"""Matrices that are the product of two thin ones and were stored multiplied out: their rank, by their spectrum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""What a stored product is off by, relatively: the dtype's unit roundoff; in float32, that of its sums."""
GAP = 2.0  # how far the last singular value that counts is above the next one


class Factors(NamedTuple):
    """B A of a matrix [out, in], float64, and the share of its Frobenius norm that they leave out."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]
    error: float


def find_factors(weight: Tensor, tolerance: float | None = None) -> Factors | None:
    """The factors of a matrix [out, in] of low rank; None where it has full rank, or so much that factors do not pay.

    A product that is stored with a relative rounding u has noise, whose largest singular value is about
    u · rms(W) · (sqrt(out) + sqrt(in)) / 2. What is below four times that counts as zero, and only if the spectrum
    drops there by a factor of GAP: a full spectrum that falls smoothly has no such place.

    Args:
        tolerance: instead, what is below this share of the largest singular value counts as zero, drop or none.
    """
    matrix = weight.double()
    rows, columns = matrix.shape
    wide = columns > rows
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    singular = squares.clamp(min=0).sqrt().flip(0)
    if tolerance is not None:
        floor = tolerance * float(singular[0])
    else:
        rms = float(matrix.square().mean().sqrt())
        floor = 2 * ROUNDING[weight.dtype] * rms * (rows**0.5 + columns**0.5)
        floor = max(floor, 1e-7 * float(singular[0]))  # squares in float64 tell no smaller ones
    rank = int((singular > floor).sum())
    if rank == 0 or rank * (rows + columns) >= rows * columns:
        return None
    if tolerance is None and singular[rank - 1] < GAP * singular[rank]:
        return None
    basis = vectors[:, -rank:]
    down, up = (basis.T @ matrix, basis) if wide else (basis.T, matrix @ basis)
    error = float(torch.linalg.vector_norm(matrix - up @ down) / torch.linalg.vector_norm(matrix))
    return Factors(down, up, error)
