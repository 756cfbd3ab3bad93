"""A dense model folder in, a folder of factors and a report out: calibrate, cut, allocate, write, measure.

Ranks and errors are of one pass over the calibration text. Factors wait in a folder beside the target, so that memory
holds the model, the text's hidden states and one layer's matrices.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpa_model.checkpoint import check_unquantized, completed, load_config, load_model, load_tokenizer, save_checkpoint
from lpa_model.config import ATTENTION_PROJECTIONS, LPAConfig, Projection, Rank
from lpa_model.convert.lowrank import calibrate, gradients, kept, weigh
from lpa_model.convert.lowrank.allocate import Option, allocate, cache_options, parameter_options
from lpa_model.convert.lowrank.factor import TEXT_SHRINK, decompose, shrink
from lpa_model.convert.stream import check_free
from lpa_model.model import LPAForCausalLM, PreNormBlock, module_of, without_weights

MULTIPLE = 32
"""Ranks are multiples of it: what the kernels pad latents to."""

Key = tuple[int, Projection]
Method = Literal["kfac", "weights", "none"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of a dense model is to stay. `keep` and `cache_ratio` go together; `rank` stands alone.

    keep: share of the parameters of the projections (with `attention_only`, of attention's).
    cache_ratio: bytes of the dense model's cache over those of the new one.
    rank: one rank for every projection.
    uniform: the same share of every matrix instead of ranks by their errors, to compare with.
    method: what weighs errors of outputs: `kfac` (gradients.py, a backward pass), `weights` (weigh.py), or `none`.
    """

    keep: float | None = None
    cache_ratio: float | None = None
    rank: int | None = None
    attention_only: bool = False
    uniform: bool = False
    method: Method = "kfac"
    multiple: int = MULTIPLE

    def __post_init__(self) -> None:
        if self.rank is not None and (self.keep is not None or self.cache_ratio is not None):
            raise ValueError("rank: is one for every matrix, and cannot be combined with keep or cache_ratio")
        if self.rank is None and self.keep is None and self.cache_ratio is None:
            raise ValueError("keep, cache_ratio or rank: one of them says how much of the model is to stay")
        if self.rank is not None and self.rank < self.multiple:
            raise ValueError(f"rank: {self.rank} is below {self.multiple}; ranks are multiples of it")
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"keep: {self.keep} is not between 0 and 1; a dense model needs no factors")
        if self.cache_ratio is not None and not self.cache_ratio > 1:
            raise ValueError(f"cache_ratio: {self.cache_ratio} is not above 1, the dense model's")

    def projections(self, config: LPAConfig) -> tuple[Projection, ...]:
        """Those that may get factors."""
        if self.keep is None and self.rank is None:
            return ("v",)
        return ATTENTION_PROJECTIONS if self.attention_only else config.projections


def ranks_within(config: LPAConfig, budget: Budget, errors: Mapping[Key, Sequence[float]]) -> dict[Key, Option]:
    """The option of every matrix that may get factors; `errors` of each at every rank, from 0 up.

    Raises:
        ValueError: the budget cannot be met; the message says which and why.
    """
    layers, m = range(config.num_hidden_layers), budget.multiple
    keys = [(layer, name) for layer in layers for name in budget.projections(config)]
    by_parameters = {key: parameter_options(config.projection_sizes(key[1]), errors[key], m) for key in keys}
    if budget.rank is not None:
        return {key: _at_most(options, budget.rank) for key, options in by_parameters.items()}
    chosen: dict[Key, Option] = {}
    if budget.cache_ratio is not None:
        chosen = _values_within(config, budget, errors)
        if budget.keep is None:
            return chosen
    assert budget.keep is not None
    total = sum(config.weight_count(name, layer) for layer, name in keys)
    left = int(budget.keep * total)
    for layer, name in chosen:
        rank, sizes = chosen[layer, name].rank, config.projection_sizes(name)
        left -= sizes[0] * sizes[1] if rank is None else rank * sum(sizes)
    curves = {key: options for key, options in by_parameters.items() if key not in chosen}
    if budget.uniform:
        return {**chosen, **{key: _share(options, left / total) for key, options in curves.items()}}
    least = sum(min(option.cost for option in options) for options in curves.values())
    if least > left:
        share = (int(budget.keep * total) - left + least) / total
        raise ValueError(
            f"keep: {budget.keep} of {total:,} parameters cannot be met: with factors of rank {m} wherever they pay "
            f"{share:.3f} are left"
        )
    return {**chosen, **allocate(curves, left)}


def _values_within(config: LPAConfig, budget: Budget, errors: Mapping[Key, Sequence[float]]) -> dict[Key, Option]:
    assert budget.cache_ratio is not None
    layers = range(config.num_hidden_layers)
    whole = config.cache_elements_per_token("full", budget.multiple)
    width = whole // (2 * config.num_hidden_layers)  # of keys or values in one layer
    left = int(whole / budget.cache_ratio) - width * len(layers)
    curves: dict[Key, list[Option]] = {
        (layer, "v"): cache_options(width, errors[layer, "v"], budget.multiple) for layer in layers
    }
    least = sum(min(option.cost for option in options) for options in curves.values())
    if left < least:
        most = whole / (width * len(layers) + least)
        raise ValueError(
            f"cache_ratio: {budget.cache_ratio} cannot be met: rotary keys stay whole, {width * len(layers):,} of the "
            f"{whole:,} numbers of a token, and latents of values are {budget.multiple} wide or more, so that "
            f"{most:.2f} is the most"
        )
    if budget.uniform:
        share = left / (width * len(layers))
        return {key: _share(options, share) for key, options in curves.items()}
    return allocate(curves, left)


def _share(options: Sequence[Option], share: float) -> Option:
    """The most that costs no more than a share of the dense matrix, or the cheapest."""
    dense = max(option.cost for option in options if option.rank is None)
    within = [option for option in options if option.cost <= share * dense]
    return max(within, key=lambda o: o.cost) if within else min(options, key=lambda o: o.cost)


def _at_most(options: Sequence[Option], rank: int) -> Option:
    """The largest rank up to `rank`; dense where factors of it do not pay."""
    factors = {option.rank: option for option in options if option.rank is not None}
    if not factors or max(factors) < rank:
        return next(option for option in options if option.rank is None)
    return factors[max(r for r in factors if r <= rank)]


def with_options(config: LPAConfig, chosen: dict[Key, Option]) -> LPAConfig:
    """The config with these ranks; a projection without one is dense."""

    def spec(projections: Sequence[Projection]) -> dict[str, list[Rank]] | None:
        layers = range(config.num_hidden_layers)
        ranks: dict[str, list[Rank]] = {
            name: [chosen[layer, name].rank if (layer, name) in chosen else None for layer in layers]
            for name in projections
        }
        return None if all(rank is None for column in ranks.values() for rank in column) else ranks

    return dataclasses.replace(
        config, attention_rank=spec(ATTENTION_PROJECTIONS), ffn_rank=spec(config.ffn_projections)
    )


def check_dense(config: LPAConfig) -> None:
    """Raises ValueError if factors of this model cannot be computed here, with the reason."""
    if config.architecture != "setting2":
        raise ValueError("architecture: only setting 2 (LLaMA and its like) gets factors; setting 1 has biases on A")
    for layer in range(config.num_hidden_layers):
        for name in config.projections:
            if (rank := config.rank(name, layer)) is not None:
                raise ValueError(f"{name} of layer {layer} has rank {rank} already; only dense models get factors")


@dataclass(frozen=True)
class Row:
    """What became of one matrix: its rank, and the share of its weighted output that is lost."""

    layer: int
    projection: Projection
    rank: Rank
    error: float


def factorise(
    source: Path,
    folder: Path,
    budget: Budget,
    windows: Tensor,
    dtype: torch.dtype,
    *,
    more: Tensor | None = None,
    states: Path | None = None,
    cuts: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Write the dense model folder `source` as factors into `folder`, which must not exist or be empty.

    Args:
        windows: token ids int64 [windows, T] of the calibration text.
        more: further windows, of which no moment is taken, only states.
        states: a .safetensors file for the dense model's states before its head, [windows, T, d] as `states`.
        cuts: a folder where the pairs and error curves of all matrices stay, about as large as the model in float32.
            If it exists they are taken from there: another budget then needs no pass over the text.
        progress: called with what is done, layers and windows that went back for their gradients, and the number of
            both.

    Returns:
        A row for every matrix that could get factors.

    Raises:
        CheckpointError: of the source folder, or its weights are quantised, or `folder` holds something.
        ValueError: the source is not dense, the budget cannot be met, or `cuts` is of another model, text or method;
            before anything is computed.
    """
    check_free(folder)
    config = check_source(source, budget)
    facts = kept.facts(source, windows, budget.method, budget.multiple)
    errors = None if cuts is None else kept.curves(cuts, facts)
    model = load_model(source, torch.float32, torch.device("cpu"))
    folder = folder.resolve()
    work = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    factors = work / "factors" if cuts is None else cuts
    work.mkdir(parents=True)
    try:
        names = budget.projections(config) if cuts is None else config.projections
        texts = gradients.short(windows) if errors is None and budget.method == "kfac" else windows[:0]
        passes, total = len(texts), len(texts) + config.num_hidden_layers
        costs: dict[Key, Tensor] = {}
        if passes:  # before the hidden states are there: this pass takes the most memory
            costs = gradients.output_moments(model, texts, names, lambda done, _: progress(done, total))
        hidden = calibrate.embed(model, windows if more is None else torch.cat([windows, more]))
        if errors is None:
            errors = {}
            with kept.written(factors, facts, errors) as place:
                for layer, found in _cut(model, hidden, len(windows), budget, names, costs, place):
                    errors.update({(layer, name): curve for name, curve in found.items()})
                    progress(passes + layer + 1, total)
        elif states is not None:
            for layer, block in enumerate(model.layers):
                with torch.inference_mode():
                    calibrate.push(block, model.rotary, hidden)
                progress(layer + 1, config.num_hidden_layers)
        if states is not None:
            assert model.norm is not None
            for window in hidden:
                window.copy_(model.norm(window))
            save_file({"states": hidden}, states)
        del hidden
        chosen = ranks_within(config, budget, errors)
        factored = assemble(with_options(config, chosen), model, factors)
        save_checkpoint(work / "model", factored, load_tokenizer(source), dtype, tokenizer_files=source)
        (work / "model").replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [
        Row(layer, name, option.rank, option.error / max(errors[layer, name][0], 1e-300))
        for (layer, name), option in chosen.items()
    ]


def check_source(source: Path, budget: Budget) -> LPAConfig:
    """The config of a folder of which factors within the budget can be made; the text does not matter.

    Raises:
        CheckpointError: the folder cannot be read, or its weights are quantised.
        ValueError: the model is not dense, or the budget cannot be met.
    """
    config = load_config(source)
    check_unquantized(source, "factorise")
    check_dense(config)
    sides = {name: min(config.projection_sizes(name)) for name in budget.projections(config)}
    layers = range(config.num_hidden_layers)
    ranks_within(
        config, budget, {(layer, name): [0.0] * (side + 1) for layer in layers for name, side in sides.items()}
    )
    return config


def _cut(
    model: LPAForCausalLM,
    hidden: Tensor,
    counted: int,
    budget: Budget,
    names: Sequence[Projection],
    costs: Mapping[Key, Tensor],
    factors: Path,
) -> Iterator[tuple[int, dict[Projection, list[float]]]]:
    """Each layer's error curves, by the first `counted` windows of `hidden`; its pairs, as many ranks as could pay, go
    to `factors`. `costs`: of `gradients.output_moments`, where they weigh errors."""
    config = model.config
    weighed = [name for name in names if budget.method != "none" and (not costs or costs[0, name].ndim == 0)]
    for layer, moments in calibrate.layers(model, hidden, names, weighed, counted):
        block = model.layers[layer]
        assert isinstance(block, PreNormBlock)
        scale = 1.0 if costs else weigh.importance(hidden[:counted])
        inputs = {name: shrink(moment, TEXT_SHRINK) for name, moment in moments.inputs.items()}
        curves: dict[Projection, list[float]] = {}
        tensors: dict[str, Tensor] = {}
        for name in names:
            weight = calibrate.projection_of(block, name).get_parameter("weight")
            outputs = weigh.output_weight(config, block, moments, name) if name in weighed else None
            if costs:
                outputs = weigh.scaled(outputs, costs[layer, name], len(weight))
            found = decompose(weight, inputs[calibrate.INPUT_OF[name]], outputs)
            curves[name] = (scale * found.errors()).tolist()
            most = min(len(found.energies), weight.numel() // sum(weight.shape) + budget.multiple)
            tensors[f"{name}.down"] = found.down[:most].contiguous()
            tensors[f"{name}.up"] = found.up[:, :most].contiguous()
        save_file(tensors, factors / f"{layer}.safetensors")
        yield layer, curves


def assemble(config: LPAConfig, dense: LPAForCausalLM, factors: Path) -> LPAForCausalLM:
    """The model of `config`: everything of `dense`, and factors where the config has ranks."""
    model = without_weights(config)
    state = dict(dense.state_dict())
    for layer in range(config.num_hidden_layers):
        with safe_open(factors / f"{layer}.safetensors", framework="pt") as file:
            for name in config.projections:
                if (rank := config.rank(name, layer)) is None:
                    continue
                prefix = f"layers.{layer}.{module_of(name)}"
                del state[f"{prefix}.weight"]
                state[f"{prefix}.down.weight"] = file.get_slice(f"{name}.down")[:rank]
                state[f"{prefix}.up.weight"] = file.get_slice(f"{name}.up")[:, :rank].contiguous()
                if f"{prefix}.bias" in state:
                    state[f"{prefix}.up.bias"] = state.pop(f"{prefix}.bias")
    model.load_state_dict(state, assign=True)
    return completed(model, torch.device("cpu"))
