"""The one table: which backend computes a model, and for every faster one that does not, the reason and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from lpa_model.backends import features
from lpa_model.backends.base import Backend
from lpa_model.backends.cpu.backend import CpuBackend
from lpa_model.backends.cuda import limits
from lpa_model.backends.cuda.backend import CudaBackend
from lpa_model.backends.cuda.twins import TWINS
from lpa_model.backends.torch.backend import TorchBackend
from lpa_model.checkpoint import load_model
from lpa_model.config import CacheLayout, LPAConfig
from lpa_model.model import LPAForCausalLM
from lpa_model.quantization import WeightType, hold_weights, round_weights

BLOCK_SIZES = (32, 64, 128)
"""Tokens of a cache block: what `--block-size` offers, since every backend is fast with them."""


class Case(NamedTuple):
    """What is to be computed, and on what."""

    config: LPAConfig
    dtype: torch.dtype
    device: torch.device
    layout: CacheLayout
    block_size: int
    instruction_sets: tuple[str, ...]  # of the processor, the best first
    weights: WeightType
    cache_dtype: torch.dtype  # int8, or the dtype
    invariant: bool = False  # whether batch invariance is wanted where it has a price


class Candidate(NamedTuple):
    """A row of the table."""

    name: str
    refuses: Callable[[Case], str | None]  # the reason why not, with the remedy
    batch_invariant: Callable[[Case], bool]
    what: Callable[[Case], str]  # instruction set or device
    build: Callable[[Case, LPAForCausalLM], Backend]


@dataclass(frozen=True)
class Choice:
    """The backend of a case, and the faster candidates that cannot compute it."""

    case: Case
    candidate: Candidate
    refused: tuple[tuple[str, str], ...]  # (candidate, why not)

    @property
    def name(self) -> str:
        """The backend's name, as it calls itself when it is loaded."""
        return _name(self.candidate, self.case)

    @property
    def types(self) -> str:
        """Of activations, and of weights and cache where they differ: "bfloat16", "float32, int8 cache"."""
        return _types(self.case)

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's bits depend on the row alone."""
        return self.candidate.batch_invariant(self.case)

    def load(self, folder: Path) -> Backend:
        """The folder's model in this backend; CheckpointError names what is wrong with it."""
        widen = self.candidate is not C  # its op list has copies of all matrices
        return self.build(load_model(folder, self.case.dtype, self.case.device, widen=widen))

    def build(self, model: LPAForCausalLM) -> Backend:
        """This backend for a loaded model, which is its own from now on."""
        return self.candidate.build(self.case, model)


def choose(
    config: LPAConfig,
    *,
    dtype: str = "auto",
    weights: str = "auto",
    device: str = "cpu",
    layout: str = "auto",
    cache_dtype: str = "auto",
    block_size: int = 64,
    instruction_sets: tuple[str, ...] | None = None,
    stored: WeightType | None = None,
    batch_invariant: bool = False,
) -> Choice:
    """The best backend for a model.

    Args:
        config: the model's sizes.
        dtype: of activations: auto (bfloat16 where the device has it in hardware), float32 or bfloat16.
        weights: how they are held in memory: auto (see `resolve_types`), float32, bfloat16, int8 or int4.
        device: cpu, cuda or cuda:N.
        layout: auto, latent, mixed or full.
        cache_dtype: auto (the dtype) or int8.
        block_size: tokens of a cache block.
        instruction_sets: instead of the processor's own.
        stored: int8 or int4 if that is what the folder holds (`checkpoint.stored_weights`).
        batch_invariant: take what is batch-invariant where a backend has the choice; the others are or are not.

    Raises:
        ValueError: an option does not fit the model or the machine; the message names it.
    """
    place = features.resolve_device(device)
    sets = features.instruction_sets() if instruction_sets is None else instruction_sets
    computed, held = resolve_types(dtype, weights, place, sets, stored)
    if cache_dtype not in ("auto", "int8"):
        raise ValueError(f"kv_cache_dtype: {cache_dtype!r} is none of auto, int8")
    cached = torch.int8 if cache_dtype == "int8" else computed
    case = Case(
        config, computed, place, _layout(config, layout, place), block_size, sets, held, cached, batch_invariant
    )
    refused: list[tuple[str, str]] = []
    for candidate in CANDIDATES:
        reason = candidate.refuses(case)
        if reason is None:
            return Choice(case, candidate, tuple(refused))
        refused.append((candidate.name, reason))
    raise AssertionError("torch refuses nothing")


def resolve_types(
    dtype: str,
    weights: str,
    device: torch.device,
    instruction_sets: tuple[str, ...],
    stored: WeightType | None = None,
) -> tuple[torch.dtype, WeightType]:
    """What activations are computed in, and how weights are held in memory.

    Weights `auto` are of a `dtype` that is named. Where both are `auto` they are bfloat16 as well, if the device has
    bfloat16 in hardware or is a CPU with kernels that widen it on the way: half the bytes of float32 to read. Weights
    that are `stored` in few bits stay as they are.

    Raises:
        ValueError: what is named does not fit.
    """
    if stored is not None:
        if weights not in ("auto", stored):
            raise ValueError(f"weights: the folder holds {stored}, which does not become {weights}; take auto")
        return features.resolve_dtype(dtype, device), stored
    if weights == "float32" and dtype == "auto":
        dtype = "float32"
    computed = features.resolve_dtype(dtype, device)
    if weights == "float32" and computed is torch.bfloat16:
        raise ValueError("weights: float32 has no kernels with dtype bfloat16; take one of the two for both")
    held: dict[str, WeightType] = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int4"}
    if weights != "auto":
        return computed, held[weights]
    widened = dtype == "auto" and device.type == "cpu" and bool(instruction_sets)
    return computed, "bfloat16" if computed is torch.bfloat16 or widened else "float32"


def _layout(config: LPAConfig, name: str, device: torch.device) -> CacheLayout:
    if name == "auto":
        return config.default_cache_layout()
    layouts: tuple[CacheLayout, ...] = get_args(CacheLayout)
    if name not in layouts:
        raise ValueError(f"kv_cache_layout: {name!r} is none of auto, {', '.join(layouts)}")
    layout = layouts[layouts.index(name)]
    if layout == "latent" and config.qk_norm:
        raise ValueError(
            "kv_cache_layout: latent needs keys that follow from their latents by a matrix, and this model's are "
            "normalised (qk_norm); mixed keeps the values' latents"
        )
    forms = [config.cache_forms(layout, layer) for layer in range(config.num_hidden_layers)]
    if layout != "full" and not any(any(form) for form in forms):
        raise ValueError(f"kv_cache_layout: {name} needs low-rank projections, and this model's are dense")
    if device.type == "cpu" and config.rotary and any(keys_latent for keys_latent, _ in forms):
        raise ValueError(
            f"kv_cache_layout: {name} would rebuild every rotary key from its latent in every step, which a CPU does "
            "slower than it reads whole keys; take mixed (latent values) or full"
        )
    return layout


def _no_op_list(case: Case) -> str | None:
    if case.device.type != "cpu":
        return "is for CPUs"
    if features.cuda_kernels() == "twins":
        return "LPA_CUDA=twins takes cuda instead"
    if not case.instruction_sets:
        return "its kernels are not compiled; `make kernels` does it, and so does an installation on Linux"
    if case.block_size % 2:
        return f"block_size {case.block_size} is odd; take 32, 64 or 128"
    return _rebuilt_keys(case)


def _build_op_list(case: Case, model: LPAForCausalLM) -> Backend:
    held = hold_weights(model, case.weights)
    return CpuBackend(model, case.instruction_sets[0], held, _name(C, case), case.dtype, case.cache_dtype)


def _no_graphs(case: Case) -> str | None:
    wanted = features.cuda_kernels()
    if case.device.type != "cuda" and wanted != "twins":
        return "is for GPUs"
    if case.device.type == "cuda" and not features.has_triton():
        return "needs Triton to compile its kernels; it comes with torch's CUDA builds, or `pip install triton`"
    if reason := cannot_graph(case):
        return reason
    if wanted == "0":
        return "has never run on a GPU yet: LPA_CUDA=1 takes it, `lpa bench device` checks and measures it"
    return None


def cannot_graph(case: Case) -> str | None:
    """Why the CUDA backend cannot compute a case, whatever the device; None if it can."""
    if case.weights not in ("float32", "bfloat16"):
        return f"holds no {case.weights} weights; take --weights auto"
    if case.weights != str(case.dtype).removeprefix("torch."):
        return "holds weights in the dtype of activations; take --dtype float32 or --dtype bfloat16"
    if case.cache_dtype is torch.int8:
        return "reads no int8 cache; take --kv-cache-dtype auto"
    return limits.unsupported(case.config, case.layout)


def _build_graphs(case: Case, model: LPAForCausalLM) -> Backend:
    ops = TWINS
    if features.cuda_kernels() == "1":
        from lpa_model.backends.cuda.kernels import kernels  # needs Triton

        ops = kernels(case.invariant)
    return CudaBackend(model, _name(CUDA, case), ops, _graphs_invariant(case))


def _graphs_invariant(case: Case) -> bool:
    """The kernels may be; torch's products are not."""
    return case.invariant and features.cuda_kernels() == "1"


def _what_graphs(case: Case) -> str:
    return str(case.device) + (" with twins" if features.cuda_kernels() == "twins" else "")


def _build_torch(case: Case, model: LPAForCausalLM) -> Backend:
    if hold_weights(model, case.weights) is torch.bfloat16:
        round_weights(model)
    return TorchBackend(model, _name(TORCH, case), case.cache_dtype)


def _rebuilt_keys(case: Case) -> str | None:
    config = case.config
    if config.rotary and any(config.cache_forms(case.layout, layer)[0] for layer in range(config.num_hidden_layers)):
        return "rotary keys cached as latents would be rebuilt in every step; take --kv-cache-layout mixed"
    return None


def _name(candidate: Candidate, case: Case) -> str:
    return f"{candidate.name} ({candidate.what(case)}, {_types(case)})"


def _types(case: Case) -> str:
    name = str(case.dtype).removeprefix("torch.")
    weights = "" if case.weights == name else f", {case.weights} weights"
    return name + weights + (", int8 cache" if case.cache_dtype is torch.int8 else "")


C = Candidate("cpu", _no_op_list, lambda case: True, lambda case: case.instruction_sets[0], _build_op_list)
CUDA = Candidate("cuda", _no_graphs, _graphs_invariant, _what_graphs, _build_graphs)
TORCH = Candidate("torch", lambda case: None, lambda case: False, lambda case: str(case.device), _build_torch)
CANDIDATES = (C, CUDA, TORCH)
"""The fastest first."""
