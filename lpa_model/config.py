"""What an LPA model is: sizes, ranks, architecture; and what follows from them by arithmetic alone.

Nothing here touches torch, so the counts can be checked against the module that is built from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lpa_model.hf_keys import own_keys, read_object

Architecture = Literal["setting1", "setting2"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
CacheLayout = Literal["latent", "mixed", "full"]
Rank = int | None
"""Rank of one projection; None is a dense matrix."""
RankSpec = Rank | Mapping[str, "Rank | list[Rank]"]
"""One rank for a group of projections, or every one's by name: a rank, or a list of one rank per layer."""

FORMAT_VERSION = 2
"""Of a written `config.json`. 1, which files do not name: one rank for the feed-forward layers, no `qk_norm`."""
ATTENTION_PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")
FFN_PROJECTIONS: dict[Architecture, tuple[Projection, ...]] = {
    "setting1": ("up", "down"),
    "setting2": ("gate", "up", "down"),
}
ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Kinds of `rope_scaling` with the numbers that each needs."""
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""Further numbers of type yarn, which may be null; `truncate` beside them is true or false."""

# beyond any real model, and within what tensors and floats hold: a typing error in a file is found by its name
MAX_SIZE = 1 << 24
MAX_LAYERS = 4096
MAX_PARAMETERS = 1 << 44
MAX_ROTARY = 1 << 31  # positions x head_dim
A_NUMBER = "a positive number between 1e-30 and 1e30"


@dataclass(frozen=True, kw_only=True)
class LPAConfig:
    """Sizes and architecture of an LPA model (LPA paper, arXiv 2411.02063; keys named as in Hugging Face's configs).

    `setting1`: learned positions, LayerNorm on the branch output, ReLU FFN, biases.
    `setting2`: rotary positions, RMSNorm before the branch and at the end, SwiGLU, no biases.

    `attention_rank` (q, k, v, o) and `ffn_rank` (gate, up, down; without a gate in setting 1) follow one rule: null is
    dense, a number is the rank of each projection, and an object says it by name, {"q": 128, "k": [128, 64], "v": null,
    "o": 128}, where a list has a rank or null per layer.

    Raises:
        ValueError: a size is out of range or a combination is not supported; the message names the key.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    attention_rank: RankSpec = None
    ffn_rank: RankSpec = None
    attention_bias: bool = False  # a bias after B on q, k and v (setting 2 only; setting 1 fixes its own)
    qk_norm: bool = False  # RMSNorm of each head's queries and keys before RoPE, as in Qwen3 (setting 2 only)
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    norm_eps: float | None = None  # None: 1e-5 for setting 1, 1e-6 for setting 2
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None  # several: a text ends at any of them

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(f"architecture: {self.architecture!r} is neither 'setting1' nor 'setting2'")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            _check_positive(name, getattr(self, name), MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"head_dim: hidden_size {self.hidden_size} does not divide into "
                    f"num_attention_heads {self.num_attention_heads} heads"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.norm_eps is None:
            object.__setattr__(self, "norm_eps", 1e-5 if self.architecture == "setting1" else 1e-6)
        _check_positive("head_dim", self.head_dim)
        _check_positive("num_key_value_heads", self.num_key_value_heads)
        for name in ("rope_theta", "norm_eps"):
            if not _is_number(value := getattr(self, name)):
                raise ValueError(f"{name}: {value!r} is not {A_NUMBER}")
            object.__setattr__(self, name, float(value))
        for name in ("attention_bias", "qk_norm", "lm_head_bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} is neither true nor false")
        if isinstance(self.eos_token_id, Sequence) and not isinstance(self.eos_token_id, str):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, value in (("bos_token_id", self.bos_token_id), *(("eos_token_id", end) for end in ends)):
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise ValueError(f"{name}: {value!r} is neither null nor a token id below {self.vocab_size}")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads: {self.kv_heads} does not divide num_attention_heads {self.num_attention_heads}"
            )
        if self.architecture == "setting2" and self.head_size % 2:
            raise ValueError(f"head_dim: {self.head_size} is odd, and rotary positions rotate pairs of dimensions")
        if self.architecture == "setting1":
            if self.attention_bias:
                raise ValueError("attention_bias: setting 1 has its own fixed attention biases; leave it false")
            if self.qk_norm:
                raise ValueError("qk_norm: setting 1 does not normalise queries and keys; leave it false")
            if self.rope_scaling is not None:
                raise ValueError("rope_scaling: setting 1 has learned positions, not rotary ones")
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling, self.rope_theta)
        self._check_ranks("attention_rank", self.attention_rank, ATTENTION_PROJECTIONS)
        self._check_ranks("ffn_rank", self.ffn_rank, self.ffn_projections)
        if (count := self.parameter_count()) > MAX_PARAMETERS:
            raise ValueError(f"hidden_size, vocab_size and so on: they make {count:,} parameters, of no real model")
        if self.rotary and self.max_position_embeddings * self.head_size > MAX_ROTARY:
            raise ValueError(
                f"max_position_embeddings: {self.max_position_embeddings} positions of head_dim {self.head_size} are "
                f"more than rotary tables hold ({MAX_ROTARY:,} together)"
            )

    def _check_ranks(self, key: str, spec: RankSpec, projections: tuple[Projection, ...]) -> None:
        if isinstance(spec, list):
            raise ValueError(f"{key}: {spec!r} is neither a rank nor an object with one for {', '.join(projections)}")
        if isinstance(spec, Mapping):
            if set(spec) != set(projections):
                raise ValueError(f"{key}: keys {sorted(spec)} are not exactly {', '.join(projections)}")
            for name, ranks in spec.items():
                if isinstance(ranks, list) and len(ranks) != self.num_hidden_layers:
                    raise ValueError(f"{key}: {name} lists {len(ranks)} ranks for {self.num_hidden_layers} layers")
        for layer in range(self.num_hidden_layers):
            for projection in projections:
                if (rank := self.rank(projection, layer)) is None:
                    continue
                where, limit = f"{key} ({projection}, layer {layer})", max(self.projection_sizes(projection))
                _check_positive(where, rank)
                if rank > limit:
                    raise ValueError(f"{where}: {rank} is more than {limit}, the longer side of its matrix")

    @property
    def head_size(self) -> int:
        """`head_dim` with its default filled in."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def kv_heads(self) -> int:
        """`num_key_value_heads` with its default filled in."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def eps(self) -> float:
        """`norm_eps` with its default filled in."""
        assert self.norm_eps is not None
        return self.norm_eps

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as what it is in general: several tokens, or none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary, so that key latents cannot be absorbed into the queries."""
        return self.architecture == "setting2"

    @property
    def ffn_projections(self) -> tuple[Projection, ...]:
        """Those of a feed-forward layer."""
        return FFN_PROJECTIONS[self.architecture]

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Those of a layer, attention's first."""
        return ATTENTION_PROJECTIONS + self.ffn_projections

    def rank(self, projection: Projection, layer: int) -> Rank:
        """The rank of one projection of one layer; None is a dense matrix."""
        spec = self.attention_rank if projection in ATTENTION_PROJECTIONS else self.ffn_rank
        ranks = spec[projection] if isinstance(spec, Mapping) else spec
        return ranks[layer] if isinstance(ranks, list) else ranks

    def projection_sizes(self, projection: Projection) -> tuple[int, int]:
        """(input width, output width) of a projection."""
        queries, keys = self.num_attention_heads * self.head_size, self.kv_heads * self.head_size
        d, f = self.hidden_size, self.intermediate_size
        return {
            "q": (d, queries),
            "k": (d, keys),
            "v": (d, keys),
            "o": (queries, d),
            "gate": (d, f),
            "up": (d, f),
            "down": (f, d),
        }[projection]

    def weight_count(self, projection: Projection, layer: int) -> int:
        """Numbers in the matrix of one projection of one layer, or in both of its factors."""
        width_in, width_out = self.projection_sizes(projection)
        rank = self.rank(projection, layer)
        return width_in * width_out if rank is None else rank * (width_in + width_out)

    def parameter_count(self) -> int:
        """Number of trained parameters, tied ones counted once."""
        d = self.hidden_size
        one = self.architecture == "setting1"
        total = self.vocab_size * d + (self.max_position_embeddings * d if one else 0)
        for layer in range(self.num_hidden_layers):
            for projection in self.projections:
                total += self.weight_count(projection, layer)
                width_out, rank = self.projection_sizes(projection)[1], self.rank(projection, layer)
                if one:
                    total += width_out if rank is None or projection in ("o", "down") else rank
                elif self.attention_bias and projection in ("q", "k", "v"):
                    total += width_out
            total += 4 * d if one else 2 * d  # two LayerNorms, two RMSNorms
            total += 2 * self.head_size if self.qk_norm else 0
        total += 0 if one else d
        total += 0 if self.tie_word_embeddings else self.vocab_size * d
        return total + (self.vocab_size if self.lm_head_bias else 0)

    def cache_forms(self, layout: CacheLayout, layer: int) -> tuple[bool, bool]:
        """Whether (keys, values) of a layer are cached as latents.

        A dense projection has no latent to cache, and keys that `qk_norm` normalises are not linear in theirs.
        """
        keys = layout == "latent" and self.rank("k", layer) is not None and not self.qk_norm
        values = layout in ("latent", "mixed") and self.rank("v", layer) is not None
        return keys, values

    def cache_elements_per_token(self, layout: CacheLayout, width_unit: int = 1) -> int:
        """Cached numbers per token over all layers: 2r, H·dh + r, or 2·H·dh in each (lpa_model/README.md).

        Widths of heads and latents are padded to multiples of `width_unit`.
        """

        def width(latent: bool, rank: Rank) -> int:
            heads, own = (1, rank or 0) if latent else (self.kv_heads, self.head_size)
            return heads * -(-own // width_unit) * width_unit

        total = 0
        for layer in range(self.num_hidden_layers):
            keys_latent, values_latent = self.cache_forms(layout, layer)
            total += width(keys_latent, self.rank("k", layer)) + width(values_latent, self.rank("v", layer))
        return total

    def cache_rows_per_token(self, layout: CacheLayout) -> int:
        """Heads and latents cached per token over all layers: an int8 cache has a scale for each."""
        forms = [self.cache_forms(layout, layer) for layer in range(self.num_hidden_layers)]
        return sum(1 if latent else self.kv_heads for form in forms for latent in form)

    def default_cache_layout(self) -> CacheLayout:
        """The layout that `auto` means on a CPU: the smallest one that decodes without rebuilding keys."""
        candidates: tuple[CacheLayout, ...] = ("full", "mixed") if self.rotary else ("full", "mixed", "latent")
        return min(candidates, key=self.cache_elements_per_token)

    def vanilla(self) -> LPAConfig:
        """The twin of the same shape in which every matrix is dense."""
        return dataclasses.replace(self, attention_rank=None, ffn_rank=None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: every key, defaults filled in."""
        return {"model_type": "lpa", "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LPAConfig:
        """Read the JSON form, of any version up to FORMAT_VERSION, with Hugging Face's own keys or without (`hf_keys`).

        Raises:
            ValueError: a newer version, another model_type, or an unknown or missing key; the message names it.
        """
        version = values.get("format_version", 1)
        _check_positive("format_version", version)
        if version > FORMAT_VERSION:
            raise ValueError(f"format_version {version} is newer than this version reads ({FORMAT_VERSION})")
        values = {name: value for name, value in own_keys(values).items() if name != "format_version"}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ValueError(f"missing keys {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> LPAConfig:
        """Read a `config.json`; ValueError that names the file when it is not a JSON object or not an LPA config."""
        values = read_object(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_positive(name: str, value: object, limit: int = MAX_SIZE) -> None:
    if type(value) is not int or value < 1:  # isinstance would let true pass
        raise ValueError(f"{name}: {value!r} is not a positive integer")
    if value > limit:
        raise ValueError(f"{name}: {value} is more than {limit}, the limit")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-30 <= value <= 1e30


def _check_rope_scaling(scaling: object, theta: float) -> None:
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling: {scaling!r} is neither null nor an object")
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str) or kind not in ROPE_SCALING:
        raise ValueError(f"rope_scaling: type {kind!r} is not supported ({', '.join(ROPE_SCALING)} are)")
    for key in ROPE_SCALING[kind]:
        if not _is_number(value := scaling.get(key)):
            raise ValueError(f"rope_scaling: {key} {value!r} is not {A_NUMBER}, which type {kind!r} needs")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor is not below high_freq_factor")
    if kind == "yarn":
        for key in YARN_OPTIONS:
            if (value := scaling.get(key)) is not None and not _is_number(value):
                raise ValueError(f"rope_scaling: {key} {value!r} is neither null nor {A_NUMBER}")
        if not isinstance(value := scaling.get("truncate", True), bool):
            raise ValueError(f"rope_scaling: truncate {value!r} is neither true nor false")
        if theta <= 1:
            raise ValueError(f"rope_theta: {theta} is not above 1, which rope_scaling of type 'yarn' needs")


_LPA_PRESETS = {
    "lpa-tiny": LPAConfig(
        architecture="setting2",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        attention_rank=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    "lpa-130m": LPAConfig(
        architecture="setting2",
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        attention_rank=128,
        max_position_embeddings=2048,
    ),
    "lpa-370m": LPAConfig(
        architecture="setting1",
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=8,
        attention_rank=320,
        max_position_embeddings=2048,
    ),
    "lpa-3b": LPAConfig(
        architecture="setting2",
        vocab_size=32000,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=44,
        num_attention_heads=20,
        attention_rank=512,
        max_position_embeddings=2048,
    ),
}

PRESETS: dict[str, LPAConfig] = {
    **_LPA_PRESETS,
    **{name.replace("lpa-", "vanilla-"): config.vanilla() for name, config in _LPA_PRESETS.items()},
}
"""What `lpa init` and `lpa train` accept; the vanilla twins have the same shape with dense matrices."""
