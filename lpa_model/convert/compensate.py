"""A weight rounded to 4 bits so that a layer's outputs stay near, for inputs of a known second moment.

With H = E[x x^T], the outputs of the rounded weight Q are off by E|(W - Q) x|^2 = tr((W - Q) H (W - Q)^T). GPTQ
(arXiv 2210.17323) rounds the columns in order, and what a column is off by is made up for by those behind it: with
H^-1 = U^T U, U upper triangular, and e = (w_j - q_j) / U_jj, columns from j on lose e U[j, j:]. Then the squares of all
e are the error of the output. Scales are searched when a group is reached, each number's error counting 1 / U_jj^2.

Afterwards, in turn, all scales of a row are solved for with its codes as they are, and every code is put where the
error is least with all others as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_model.quantization import GROUP, Quantized, int4_scales, quantize

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it, so that it has an inverse and fits its text less."""

SWEEPS = 2
"""Times that scales and codes are chosen again."""


class Rounded(NamedTuple):
    """A weight of few bits, and the mean squared error of each output, float64 [out]."""

    weight: Quantized
    errors: Tensor


def compensated(weight: Tensor, moment: Tensor) -> Rounded:
    """weight [out, in] in int4 for inputs of the second moment [in, in], float64.

    Rows of which rounding to the nearest does not make a larger error are rounded so.

    Raises:
        ValueError: not all numbers of the moment are finite.
    """
    if not moment.isfinite().all():
        raise ValueError("the second moment of the inputs has numbers that are not finite")
    found = _compensated(weight, moment)
    nearest = to_nearest(weight, moment, 4)
    errors = output_errors(weight, moment, found)
    worse = (errors >= nearest.errors)[:, None]
    codes = torch.where(worse, nearest.weight.codes, found.codes)
    scales = torch.where(worse, nearest.weight.scales, found.scales)
    return Rounded(Quantized(codes, scales, 4), torch.minimum(errors, nearest.errors))


def to_nearest(weight: Tensor, moment: Tensor, bits: int) -> Rounded:
    """The same without compensation, in int4 or int8."""
    found = quantize(weight, 4 if bits == 4 else 8)
    return Rounded(found, output_errors(weight, moment, found))


def output_errors(weight: Tensor, moment: Tensor, rounded: Quantized) -> Tensor:
    """E[((W - Q) x)^2] of every output, float64 [out]."""
    off = weight.double() - rounded.dequantized()[:, : weight.shape[1]]
    return ((off @ moment) * off).sum(1)


def _compensated(weight: Tensor, moment: Tensor) -> Quantized:
    target = F.pad(weight.double(), (0, -weight.shape[1] % GROUP))
    width = target.shape[1]
    padded = F.pad(moment, (0, width - len(moment), 0, width - len(moment)))
    damped = padded + torch.eye(width, dtype=torch.float64) * (DAMPING * moment.diagonal().mean() + 1e-30)
    found, product = _column_by_column(target, damped), target @ damped
    for _ in range(SWEEPS):
        found = _with_codes(product, damped, _with_scales(product, damped, found))
    return found


def _column_by_column(weight: Tensor, moment: Tensor) -> Quantized:
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    left = weight.T.contiguous()  # W^T, less what was made up for: its columns are rows, side by side in memory
    codes = torch.zeros(left.shape, dtype=torch.int8)
    scales = []
    for start in range(0, len(left), GROUP):
        inside, behind = slice(start, start + GROUP), slice(start + GROUP, None)
        part, corner = left[inside].clone(), upper[inside, inside]
        counts = corner.diagonal().square().reciprocal()
        scale = int4_scales(part.T.unsqueeze(1).float().contiguous(), (counts / counts.mean()).float()[None])[:, 0, 0]
        step = scale.double()
        divisor, errors = torch.where(step == 0, torch.inf, step), torch.empty_like(part)
        for j in range(GROUP):
            code = (part[j] / divisor).round_().clamp_(-8, 7)
            codes[start + j] = code
            errors[j] = (part[j] - code * step) / corner[j, j]
            part[j + 1 :] -= torch.outer(corner[j, j + 1 :], errors[j])
        left[behind] -= upper[inside, behind].T @ errors
        scales.append(scale)
    return Quantized(codes.T.contiguous(), torch.stack(scales, 1), 4)


def _with_scales(product: Tensor, moment: Tensor, found: Quantized) -> Quantized:
    """The same codes with the scales s [out, groups] that solve A s = b, where the error is s^T A s - 2 b^T s + c; rows
    in which they are no better once they are rounded keep theirs. `product` [out, in]: W H."""
    codes = found.codes.double().unflatten(1, (-1, GROUP))
    between = [(codes[:, g] @ rows).unflatten(1, (-1, GROUP)) for g, rows in enumerate(moment.split(GROUP))]
    a = torch.stack([(part * codes).sum(2) for part in between], 1)  # [out, groups, groups]
    b = (product.unflatten(1, (-1, GROUP)) * codes).sum(2)
    ridge = 1e-9 * a.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    solved = torch.linalg.solve(a + torch.diag_embed(ridge[:, None].expand_as(b)), b).bfloat16()

    def error(scales: Tensor) -> Tensor:
        s = scales.double()
        found: Tensor = ((a @ s[:, :, None])[:, :, 0] * s - 2 * b * s).sum(1)
        return found

    better = error(solved) < error(found.scales)
    return found._replace(scales=torch.where(better[:, None], solved, found.scales))


def _with_codes(product: Tensor, moment: Tensor, found: Quantized) -> Quantized:
    """The same scales with each code, in order, moved to where the error is least. `product` [out, in]: W H."""
    codes = found.codes.T.double()
    slope = (product - found.dequantized().double() @ moment).T.contiguous()  # columns are rows here, too
    for start in range(0, len(moment), GROUP):
        inside = slice(start, start + GROUP)
        corner, step, part = moment[inside, inside], found.scales[:, start // GROUP].double(), slope[inside].clone()
        divisor, moves = torch.where(step == 0, torch.inf, step), torch.empty_like(part)
        for j in range(GROUP):
            code = codes[start + j]
            better = (code + part[j] / (corner[j, j] * divisor)).round_().clamp_(-8, 7)
            moves[j] = (better - code) * step
            codes[start + j] = better
            part[j + 1 :] -= torch.outer(corner[j, j + 1 :], moves[j])
        slope -= moment[:, inside] @ moves
    return found._replace(codes=codes.T.to(torch.int8).contiguous())
