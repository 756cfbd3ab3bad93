"""`lpa convert factored`: other projects' low-rank models, their factors taken over as they are.

They are LLaMA, Mistral or Qwen with some matrices in two factors. `spellings` knows what each project calls them,
`base` reads the config of the model that was factored, `refactor` finds the factors of products that were stored dense.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpa_model.checkpoint import TOKENIZER_FILES
from lpa_model.config import ATTENTION_PROJECTIONS, LPAConfig, Projection, Rank
from lpa_model.convert.factored.base import base_config
from lpa_model.convert.factored.refactor import find_factors
from lpa_model.convert.factored.spellings import HEAD, PROJECTIONS, SPELLINGS, Kind, module_name, places
from lpa_model.convert.official import read_words, shortest
from lpa_model.convert.source import find_weights, read_tensors, without_prefix
from lpa_model.convert.stream import DTYPES, Progress, Stored, check_free, row_blocks, write_model
from lpa_model.folder import CheckpointError
from lpa_model.hf_keys import read_object
from lpa_model.model import module_of, without_weights

EMBEDDING = "model.embed_tokens.weight"
LEMS = "low_rank_compressed"
FREQUENCIES = "rotary_emb.inv_freq"
BLOCK = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}
"""Our modules of a block beside its matrices, and LLaMA's."""


class Part(NamedTuple):
    """A tensor under the name that it has in its file."""

    name: str
    tensor: Tensor
    dtype: torch.dtype  # in the file
    transposed: bool = False


Matrix = dict[Kind, Part]


class Converted(NamedTuple):
    """What was written, and how it was found."""

    config: LPAConfig
    projects: tuple[str, ...]
    """Whose names the factors have."""
    merged_head: bool
    """Whether the output head came in factors; LPA's is dense."""
    error: float
    """Of products that were factored again: the largest share of a matrix's norm that its factors leave out."""


def convert_factored(
    src: Path,
    dst: Path,
    dtype: torch.dtype | None = None,
    *,
    base: Path | None = None,
    patterns: Sequence[tuple[str, str]] = (),
    refactor: bool = False,
    tolerance: float | None = None,
    max_position_embeddings: int | None = None,
    tokenizer: Path | None = None,
    layers: Callable[[int, int], None] | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write the low-rank model `src` as the native folder `dst`, which must not exist or be empty.

    Args:
        src: a folder, or a file of weights.
        dtype: of the weights written; None keeps that of each tensor.
        base: a folder with config.json and tokenizer of the model that was factored, if `src` has none.
        patterns: names of A and B that no known project uses (`spellings.places`).
        refactor: look for factors of the dense matrices, too; `tolerance` as in `find_factors`.
        max_position_embeddings: a shorter context than the model's.
        tokenizer: a tokenizer.json, or SentencePiece's tokenizer.model.
        layers: called before each layer with its number and how many there are.
        progress: of the writing.

    Raises:
        CheckpointError: the model is none of these, or a tensor is missing, left over, not finite or of the wrong
            shape; the message names it.
    """
    check_free(dst)
    files = find_weights(src)
    path = (base or files[0].parent) / "config.json"
    values, declared = _config_values(path)
    try:
        config = base_config(values, max_position_embeddings=max_position_embeddings)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    words, words_folder = read_words(base or src, path, tokenizer)
    for file in files:
        _refuse_code(file)
    tensors = without_prefix(read_tensors(src), EMBEDDING)
    matrices, projects, others = _by_matrix(tensors, places(config.num_hidden_layers, patterns))
    if any("bias" in matrix for (_, name), matrix in matrices.items() if name in ("q", "k", "v")):
        config = dataclasses.replace(config, attention_bias=True)
    found: dict[str, Part] = {}
    ranks: dict[Projection, list[Rank]] = {name: [] for name in PROJECTIONS}
    counted: dict[str, int] = {}
    worst = 0.0
    for layer in range(config.num_hidden_layers):
        if layers is not None:
            layers(layer, config.num_hidden_layers)
        for name in PROJECTIONS:
            matrix = matrices.pop((layer, name), {})
            down, up = _factors(module_name(layer, name), matrix, *config.projection_sizes(name))
            if down is not None:
                counted[module_name(layer, name)] = len(down.tensor)
            elif refactor and (factors := find_factors(up.tensor, tolerance)) is not None:
                down, up = (Part(up.name, half.float(), up.dtype) for half in (factors.down, factors.up))
                worst = max(worst, factors.error)
            part = f"layers.{layer}.{module_of(name)}"
            found |= {f"{part}.weight": up} if down is None else {f"{part}.down.weight": down, f"{part}.up.weight": up}
            found |= _bias(name, part if down is None else f"{part}.up", matrix)
            ranks[name].append(None if down is None else len(down.tensor))
    head, head_rank = _head(config, matrices.pop((-1, "head"), {}))
    if head_rank is not None:
        counted[HEAD] = head_rank
        config = dataclasses.replace(config, tie_word_embeddings=False)
    if head is not None:
        found["lm_head.weight"] = head
    _check_ranks(declared, counted, path)
    _check_listed(files, counted)
    if all(rank is None for of_layers in ranks.values() for rank in of_layers):
        raise CheckpointError(f"{src}: {_nothing(refactor, tolerance)}")
    config = dataclasses.replace(
        config,
        attention_rank=shortest({name: ranks[name] for name in ATTENTION_PROJECTIONS}),
        ffn_rank=shortest({name: ranks[name] for name in config.ffn_projections}),
    )
    _named(config, found, others)
    texts = {name: words_folder / name for name in TOKENIZER_FILES}
    write_model(
        dst,
        config,
        {name: _stored(src, part) for name, part in found.items()},
        words,
        {name: path.read_text(encoding="utf-8-sig") for name, path in texts.items() if path.is_file()},
        dtype=dtype,
        progress=progress,
    )
    return Converted(config, projects, head_rank is not None, worst)


def _config_values(path: Path) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The config of the model that was factored, and the ranks by module that LEMS and ASVD write beside it."""
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: no config.json; --base FOLDER names a folder of the model that was factored, with its "
            "config.json and tokenizer"
        )
    try:
        values = read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    declared = values.pop("truncation_ranks", None)
    if values.get("model_type") == LEMS:
        declared, inner = values.get("rank_dict"), values.get("base_config")
        if not isinstance(inner, dict) or not isinstance(declared, dict):
            raise CheckpointError(f"{path}: {LEMS} without an object as base_config or as rank_dict")
        values = {**inner, "model_type": values.get("base_model_type", inner.get("model_type"))}
    if declared is not None and not isinstance(declared, dict):
        raise CheckpointError(f"{path}: truncation_ranks: {declared!r} is not an object")
    return values, declared


def _refuse_code(file: Path) -> None:
    """Raises CheckpointError for a pickled module, which would be run to be read."""
    if file.suffix == ".safetensors" or not zipfile.is_zipfile(file):
        return
    if not (globals_ := torch.serialization.get_unsafe_globals_in_checkpoint(file)):
        return
    tensors = file.with_name(f"{file.stem}-tensors.pt")
    raise CheckpointError(
        f"{file}: holds Python objects ({sorted(globals_)[0]}{' and others' * (len(globals_) > 1)}), which are never "
        f"loaded. If you trust it, these two lines write its tensors alone, in an environment that has the code: "
        f"`loaded = torch.load({str(file)!r}, map_location='cpu', weights_only=False)` and "
        f"`torch.save(loaded['model'].state_dict(), {str(tensors)!r})`"
    )


def _by_matrix(
    tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, Any]]
) -> tuple[dict[tuple[int, str], Matrix], tuple[str, ...], dict[str, Tensor]]:
    """The tensors of each matrix, by layer and name; whose names its factors have; and all other tensors."""
    matrices: dict[tuple[int, str], Matrix] = {}
    projects: set[str] = set()
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in names:
            others[name] = tensor
            continue
        project, place = names[name]
        matrix = matrices.setdefault((place.layer, place.projection), {})
        if place.kind in matrix:
            raise CheckpointError(f"{name} and {matrix[place.kind].name} stand for the same part of a matrix")
        matrix[place.kind] = Part(name, tensor, tensor.dtype, place.transposed)
        if place.kind in ("down", "up"):
            projects.add(project)
    return matrices, tuple(sorted(projects)), others


def _factors(module: str, matrix: Matrix, width_in: int, width_out: int) -> tuple[Part | None, Part]:
    """(A [rank, in], B [out, rank]) of a matrix in factors; (None, W [out, in]) of a dense one."""
    dense, down, up = matrix.get("dense"), matrix.get("down"), matrix.get("up")
    if dense is not None and (down is not None or up is not None):
        raise CheckpointError(f"{dense.name} and {(down or up or dense).name}: one matrix, dense and in factors")
    if dense is not None:
        if dense.tensor.shape != (width_out, width_in):
            raise CheckpointError(
                f"{dense.name} has shape {list(dense.tensor.shape)}; the config asks for {[width_out, width_in]}"
            )
        return None, dense
    if down is None or up is None:
        if (one := down or up) is not None:
            raise CheckpointError(f"{one.name}: the other factor of {module} is missing")
        raise CheckpointError(f"missing tensor {module}.weight, and no factors of it either")
    a, b = (part.tensor.T if part.transposed and part.tensor.ndim == 2 else part.tensor for part in (down, up))
    if a.ndim == b.ndim == 2 and a.shape[1] == width_in and b.shape == (width_out, len(a)):
        return Part(down.name, a, down.dtype), Part(up.name, b, up.dtype)
    raise CheckpointError(
        f"{down.name} {list(down.tensor.shape)} and {up.name} {list(up.tensor.shape)}: these are not the factors "
        f"[rank, {width_in}] and [{width_out}, rank] of {module}{_other_way(down, up, width_in, width_out)}"
    )


def _other_way(down: Part, up: Part, width_in: int, width_out: int) -> str:
    """Where a pair fits otherwise than it was named: how."""
    if down.tensor.ndim != 2 or up.tensor.ndim != 2:
        return ""
    for first, second, swapped in ((down, up, ""), (up, down, "the other way round")):
        for transposed in (False, True):
            a, b = (part.tensor.T if transposed else part.tensor for part in (first, second))
            if a.shape[1] == width_in and b.shape == (width_out, len(a)):
                how = " and ".join(way for way in (swapped, "transposed (`.T` in --map)" * transposed) if way)
                return f"; they fit {how or 'as they are, without `.T`'}"
    return ""


def _bias(name: Projection, part: str, matrix: Matrix) -> dict[str, Part]:
    """The bias of a matrix under our name."""
    if (bias := matrix.get("bias")) is None:
        return {}
    if name in ("q", "k", "v"):
        return {f"{part}.bias": bias}
    if bias.tensor.any():
        raise CheckpointError(f"{bias.name}: LPA models have no bias there")
    return {}


def _head(config: LPAConfig, matrix: Matrix) -> tuple[Part | None, Rank]:
    """The output head [vocab, d] if there is one, multiplied out in float64 if it came in factors of this rank."""
    if "bias" in matrix:
        raise CheckpointError(f"unexpected tensor {matrix['bias'].name}")
    if not matrix:
        return None, None
    down, up = _factors(HEAD, matrix, config.hidden_size, config.vocab_size)
    if down is None:
        return up, None
    return Part(up.name, (up.tensor.double() @ down.tensor.double()).float(), up.dtype), len(down.tensor)


def _check_ranks(declared: Mapping[str, Any] | None, counted: Mapping[str, int], path: Path) -> None:
    """Raises CheckpointError where the ranks that the config lists are not those of the tensors."""
    if declared is None:
        return
    for module in sorted(declared.keys() | counted.keys()):
        if declared.get(module) != counted.get(module):
            raise CheckpointError(
                f"{path}: {module} has rank {declared.get(module, 'none')} there, and "
                f"{counted.get(module, 'no factors')} in the weights"
            )


def _check_listed(files: Sequence[Path], counted: Mapping[str, int]) -> None:
    """Raises CheckpointError where a file's own list of ranks, as DynRank writes one, is not that of its tensors."""
    for file in files:
        if file.suffix == ".safetensors":
            continue
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        listed = loaded.get("ranks") if isinstance(loaded, dict) else None
        if not isinstance(listed, list):
            continue
        if unlisted := Counter(counted.values()) - Counter(listed):
            raise CheckpointError(f"{file}: rank {min(unlisted)} of its tensors is not in its list of ranks")
        if len(listed) < len(counted):
            raise CheckpointError(f"{file}: lists {len(listed)} ranks for {len(counted)} pairs of tensors")


def _nothing(refactor: bool, tolerance: float | None) -> str:
    if refactor:
        how = "where its spectrum drops to rounding" if tolerance is None else f"within a tolerance of {tolerance}"
        return f"no matrix is of low rank {how}; `lpa convert llama` takes a dense model as it is"
    return (
        f"no factors of a matrix by the names of {', '.join(SPELLINGS)}; --map says other names, --refactor looks for "
        "the factors of dense matrices, `lpa convert llama` takes a dense model as it is"
    )


def _named(config: LPAConfig, found: dict[str, Part], others: dict[str, Tensor]) -> None:
    """Put the tensors that are no matrix's into `found` under our names; one that has none there is an error."""
    others = _without_frequencies(config, others)
    expected = dict(without_weights(config).named_parameters())
    for name in expected:
        if name not in found:
            if (theirs := _their_name(name)) not in others:
                raise CheckpointError(f"missing tensor {theirs}")
            tensor = others.pop(theirs)
            found[name] = Part(theirs, tensor, tensor.dtype)
    head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if head is not None and not torch.equal(head.tensor, found["embed_tokens.weight"].tensor):
        raise CheckpointError("lm_head.weight is not the embedding, which tie_word_embeddings says")
    if others:
        raise CheckpointError(f"unexpected tensor {min(others)}" + f" and {len(others) - 1} more" * (len(others) > 1))


def _stored(src: Path, part: Part) -> Stored:
    """As the writer takes it: some rows at a time."""
    tensor = part.tensor
    dtype = part.dtype if part.dtype in DTYPES else torch.float32
    shape = tuple(tensor.shape)
    return Stored(src, part.name, shape, dtype, lambda: (tensor[rows] for rows in row_blocks(shape)))


def _without_frequencies(config: LPAConfig, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without rotary frequencies [dh/2], which follow from the config if they are those that it says.

    SVD-LLM's modules have the base 10000, even if the model's is another.
    """
    kept: dict[str, Tensor] = {}
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    for name, tensor in others.items():
        if not name.endswith(FREQUENCIES):
            kept[name] = tensor
            continue
        expected = config.rope_theta**-exponents
        rounding = 16 * torch.finfo(tensor.dtype).eps
        if tensor.shape != expected.shape or not torch.allclose(tensor.double(), expected, rtol=rounding, atol=1e-7):
            raise CheckpointError(f"{name}: these are not the frequencies of rope_theta {config.rope_theta:g}")
    return kept


def _their_name(name: str) -> str:
    """LLaMA's name of one of our parameters."""
    if name == "lm_head.weight":
        return name
    if not name.startswith("layers."):
        return f"model.{name}"
    _, layer, module = name.split(".", 2)
    module, kind = module.rsplit(".", 1)
    if module not in BLOCK:  # a bias that the config says
        part = "self_attn" if module.startswith("attention.") else "mlp"
        return f"model.layers.{layer}.{part}.{module.split('.')[1]}.{kind}"
    return f"model.layers.{layer}.{BLOCK[module]}.{kind}"
