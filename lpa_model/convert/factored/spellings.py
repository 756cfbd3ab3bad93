"""What other projects call the two factors of a matrix.

A model is a LLaMA in all of them, so that a matrix is known by its layer and its name. Names and shapes are those of:

LEMS, KFAC-SVD      github.com/lems-svd/lems, all_utils/hf_export/modeling_low_rank.py
SVD-LLM             github.com/AIoT-MLSys-Lab/SVD-LLM, component/svd_llama.py
DynRank, SpecTurn   huggingface.co/zhc12/dynrank-compressed-models, its card
ASVD                github.com/hahnyuan/ASVD4LLM, huggingface_repos/modeling_asvd_qwen2.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from lpa_model.config import ATTENTION_PROJECTIONS, FFN_PROJECTIONS, Projection
from lpa_model.folder import CheckpointError

Kind = Literal["dense", "down", "up", "bias"]
PROJECTIONS = ATTENTION_PROJECTIONS + FFN_PROJECTIONS["setting2"]
MODULE = "model.layers.{layer}.{part}.{name}_proj"
HEAD = "lm_head"


class Place(NamedTuple):
    """Where a tensor belongs: a matrix's module, and which part of the matrix it is."""

    layer: int  # -1: the output head
    projection: Projection | Literal["head"]
    kind: Kind
    transposed: bool = False  # [in, rank] and [rank, out]; nn.Linear has [rank, in] and [out, rank]


SPELLINGS: dict[str, dict[str, Kind]] = {
    "LEMS": {"{module}.mod_a.weight": "down", "{module}.mod_b.weight": "up"},
    "SVD-LLM": {
        "model.layers.{layer}.{part}.{name}_v_proj.weight": "down",
        "model.layers.{layer}.{part}.{name}_u_proj.weight": "up",
    },
    "DynRank": {
        "{module}.first.weight": "down",
        "{module}.second.weight": "up",
        "{module}.second.bias": "bias",
    },
    "ASVD": {"{module}.BLinear.weight": "down", "{module}.ALinear.weight": "up", "{module}.ALinear.bias": "bias"},
}
"""By project: a tensor's name, where `{module}` is MODULE or HEAD, and what it is."""

DENSE: dict[str, Kind] = {"{module}.weight": "dense", "{module}.bias": "bias"}


def module_name(layer: int, projection: Projection | Literal["head"]) -> str:
    """LLaMA's name of a matrix's module."""
    return HEAD if projection == "head" else _filled(MODULE, layer, projection)


def places(num_layers: int, patterns: Sequence[tuple[str, str]] = ()) -> dict[str, tuple[str, Place]]:
    """Every name that a tensor of a matrix may have: the project that calls it so ("" for LLaMA itself), and its place.

    Args:
        patterns: names of A and B beside those of SPELLINGS. `{layer}`, `{part}` (self_attn or mlp) and `{name}` (q, k,
            v, o, gate, up or down) stand for a matrix; a pattern without them is what follows the module's name. A
            trailing `.T` says that the tensor is stored transposed.

    Raises:
        CheckpointError: a pattern gives two matrices one name.
    """
    found: dict[str, tuple[str, Place]] = {}
    for project, names in {"": DENSE, **SPELLINGS}.items():
        for template, kind in names.items():
            for name, place in _everywhere(template, kind, num_layers, transposed=False):
                found[name] = (project, place)
    for pair in patterns:
        factors: tuple[Kind, Kind] = ("down", "up")
        for pattern, kind in zip(pair, factors, strict=True):
            template, transposed = pattern.removesuffix(".T"), pattern.endswith(".T")
            if "{" not in template:
                template = "{module}." + template
            own: dict[str, Place] = {}
            for name, place in _everywhere(template, kind, num_layers, transposed):
                if name in own:
                    raise CheckpointError(
                        f"--map {pattern}: two matrices would be {name}; {{layer}} and {{name}} tell them apart"
                    )
                own[name] = place
            found |= {name: ("--map", place) for name, place in own.items()}
    return found


def _everywhere(template: str, kind: Kind, num_layers: int, transposed: bool) -> Iterator[tuple[str, Place]]:
    for layer in range(num_layers):
        for projection in PROJECTIONS:
            name = _filled(template.replace("{module}", MODULE), layer, projection)
            yield name, Place(layer, projection, kind, transposed)
    if "{module}" in template:
        yield template.replace("{module}", HEAD), Place(-1, "head", kind, transposed)


def _filled(template: str, layer: int, projection: str) -> str:
    part = "self_attn" if projection in ATTENTION_PROJECTIONS else "mlp"
    return template.replace("{layer}", str(layer)).replace("{part}", part).replace("{name}", projection)
