"""One matrix as the product of two: the best pair of a rank for inputs of a known second moment.

With C = E[x x^T] = L L^T of the inputs and G = M M^T of the outputs, the pair B A of rank r with the least

    E |M^T (W - B A) x|^2  =  |M^T (W - B A) L|^2

comes from the singular values of M^T W L = U S V^T: A = V_r^T L^-1 and B = M^-T U_r S_r. C whitens the inputs
(SVD-LLM, arXiv 2403.07378), G says how much an error of the output matters. Only one of the two Cholesky factors is
needed, that of the shorter side: V_r^T L^-1 = S_r^-1 U_r^T M^T W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK = 1e-3
"""Share of a second moment that is replaced by its diagonal, so that it has an inverse."""
TEXT_SHRINK = 0.05
"""The same of a moment that a text gave, of inputs or of gradients, so that it fits this text less and others more."""


@dataclass(frozen=True)
class Decomposition:
    """A matrix W [out, in] cut at any rank r: `up[:, :r] @ down[:r]`; all of them make W again.

    `energies` float64 [k], descending: the weighted squared error that the i-th pair takes away.
    """

    down: Tensor  # float32 [k, in], k = min(in, out)
    up: Tensor  # float32 [out, k]
    energies: Tensor

    def errors(self) -> Tensor:
        """float64 [k + 1]: the weighted squared error that is left at every rank from 0 to k."""
        tails = self.energies.flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])


def decompose(weight: Tensor, inputs: Tensor, outputs: Tensor | None) -> Decomposition:
    """Cut `weight` [out, in] for inputs of second moment `inputs` [in, in], outputs weighted by `outputs` [out, out].

    None weighs all outputs alike. The pairs are scaled so that a row of A and its column of B are equally long.
    """
    weight = weight.double()
    inputs = shrink(inputs.double(), SHRINK)
    outputs = None if outputs is None else shrink(outputs.double(), SHRINK)
    if weight.shape[0] <= weight.shape[1]:
        cholesky = torch.eye(len(weight), dtype=weight.dtype) if outputs is None else torch.linalg.cholesky(outputs)
        whitened = cholesky.T @ weight  # M^T W
        energies, basis = torch.linalg.eigh(whitened @ inputs @ whitened.T)
        down = basis.T @ whitened
        up = torch.linalg.solve_triangular(cholesky.T, basis, upper=True)
    else:
        cholesky = torch.linalg.cholesky(inputs)
        whitened = weight @ cholesky  # W L
        weighted = whitened if outputs is None else (outputs.float() @ whitened.float()).double()
        energies, basis = torch.linalg.eigh(whitened.T @ weighted)
        down = torch.linalg.solve_triangular(cholesky, basis.T, upper=False, left=False)
        up = whitened @ basis
    scale = (up.norm(dim=0) / down.norm(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    down, up = (down * scale[:, None]).flip(0), (up / scale).flip(1)  # eigh ascends
    return Decomposition(down.float().contiguous(), up.float().contiguous(), energies.flip(0).clamp_min(0))


def shrink(moment: Tensor, share: float) -> Tensor:
    """A second moment, moved by `share` towards its diagonal, and a trace of the identity where that is zero."""
    diagonal = moment.diagonal()
    floor = max(float(diagonal.mean()), 1e-30) * 1e-8
    return moment * (1 - share) + torch.diag(diagonal * share + floor)
