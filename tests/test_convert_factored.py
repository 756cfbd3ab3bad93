"""`lpa convert factored`: models in the names and shapes that other projects publish, written by modules that are
defined here from those shapes, compute the same after conversion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpa_model.checkpoint import load_model
from lpa_model.config import LPAConfig
from lpa_model.convert.factored import convert_factored
from lpa_model.convert.factored.refactor import find_factors
from lpa_model.convert.source import read_tensors
from lpa_model.folder import CheckpointError
from tests.test_cli import lpa, succeed
from tests.tiny import VOCAB_SIZE, byte_tokenizer

D, FFN, LAYERS, HEADS, WIDTH = 32, 48, 2, 4, 8
NAMES = ("q", "k", "v", "o", "gate", "up", "down")
Ranks = dict[str, int | None]
Make = Callable[[int, int, int, bool], nn.Module]


# --- the projects' modules, from their published shapes -------------------------------------------------------------


class Lems(nn.Module):
    def __init__(self, width_in: int, width_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.mod_a = nn.Linear(width_in, rank, bias=False)
        self.mod_b = nn.Linear(rank, width_out, bias=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(width_out)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mod_b(self.mod_a(x))
        return y if self.bias is None else y + self.bias


class DynRank(nn.Module):
    def __init__(self, width_in: int, width_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(width_in, rank, bias=False)
        self.second = nn.Linear(rank, width_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class Asvd(nn.Module):
    """A is the one on the left of the product."""

    def __init__(self, width_in: int, width_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.BLinear = nn.Linear(width_in, rank, bias=False)
        self.ALinear = nn.Linear(rank, width_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ALinear(self.BLinear(x))
        return y


class Columns(nn.Module):
    """x A B, as code without nn.Linear has it: [in, rank] and [rank, out]."""

    def __init__(self, width_in: int, width_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        assert not bias
        self.low = nn.Parameter(torch.empty(width_in, rank))
        self.high = nn.Parameter(torch.empty(rank, width_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.low @ self.high


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Block(nn.Module):
    """LLaMA's block; `svd_llm` has two linear layers under names of their own instead of one module."""

    def __init__(self, make: Make | None, ranks: Ranks, kv_heads: int, bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.input_layernorm, self.post_attention_layernorm = Norm(D), Norm(D)
        if qk_norm:
            self.self_attn.q_norm, self.self_attn.k_norm = Norm(WIDTH), Norm(WIDTH)
        sizes = {
            "q": (D, D),
            "k": (D, kv_heads * WIDTH),
            "v": (D, kv_heads * WIDTH),
            "o": (D, D),
            "gate": (D, FFN),
            "up": (D, FFN),
            "down": (FFN, D),
        }
        for name, (width_in, width_out) in sizes.items():
            rank, has_bias = ranks[name], bias and name in ("q", "k", "v")
            if rank is None:
                self.part(name).add_module(f"{name}_proj", nn.Linear(width_in, width_out, bias=has_bias))
            elif make is None:  # SVD-LLM
                self.part(name).add_module(f"{name}_u_proj", nn.Linear(rank, width_out, bias=False))
                self.part(name).add_module(f"{name}_v_proj", nn.Linear(width_in, rank, bias=False))
            else:
                self.part(name).add_module(f"{name}_proj", make(width_in, width_out, rank, has_bias))

    def part(self, name: str) -> nn.Module:
        return self.self_attn if name in ("q", "k", "v", "o") else self.mlp

    def product(self, name: str, x: Tensor) -> Tensor:
        part = self.part(name)
        if hasattr(part, f"{name}_proj"):
            y: Tensor = getattr(part, f"{name}_proj")(x)
        else:
            y = getattr(part, f"{name}_u_proj")(getattr(part, f"{name}_v_proj")(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.input_layernorm(x)
        q, k, v = (self.product(name, y).view(batch, length, -1, WIDTH).transpose(1, 2) for name in ("q", "k", "v"))
        if hasattr(self.self_attn, "q_norm"):
            q, k = self.self_attn.q_norm(q), self.self_attn.k_norm(k)
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
        spin = torch.polar(torch.ones_like(angles), angles)

        def rotated(t: Tensor) -> Tensor:
            turned = torch.complex(t[..., : WIDTH // 2].contiguous(), t[..., WIDTH // 2 :].contiguous()) * spin
            return torch.cat((turned.real, turned.imag), -1)

        groups = q.shape[1] // k.shape[1]
        q, k, v = rotated(q), rotated(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH) + torch.full((length, length), -math.inf).triu(1)
        x = x + self.product("o", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.product("down", F.silu(self.product("gate", y)) * self.product("up", y))


class Model(nn.Module):
    """A whole model; `ranks` by layer."""

    def __init__(
        self,
        make: Make | None,
        ranks: list[Ranks],
        *,
        kv_heads: int = HEADS,
        bias: bool = False,
        qk_norm: bool = False,
        head: int | None = None,
    ) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB_SIZE, D)
        self.model.layers = nn.ModuleList(Block(make, of_layer, kv_heads, bias, qk_norm) for of_layer in ranks)
        self.model.norm = Norm(D)
        self.lm_head = nn.Linear(D, VOCAB_SIZE, bias=False) if head is None else Asvd(D, VOCAB_SIZE, head, False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.normal_(std=1.0 if "embed" in name else 0.2, generator=generator)
                if "norm" in name:
                    parameter.add_(1.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            x = block(x)
        y: Tensor = self.lm_head(self.model.norm(x)).log_softmax(-1)
        return y


def hf_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": D,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        **changes,
    }


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder


def every(rank: int) -> list[Ranks]:
    return [dict.fromkeys(NAMES, rank) for _ in range(LAYERS)]


MIXED: list[Ranks] = [
    {"q": 8, "k": 5, "v": None, "o": 12, "gate": 16, "up": None, "down": 7},
    {"q": None, "k": 6, "v": 3, "o": None, "gate": 9, "up": 11, "down": None},
]
IDS = torch.tensor([[(7 * i * i + 3) % VOCAB_SIZE for i in range(40)]])


def ranks_of(config: LPAConfig) -> list[Ranks]:
    return [{name: config.rank(name, layer) for name in NAMES} for layer in range(LAYERS)]  # type: ignore[arg-type]


def check(model: Model, folder: Path, ranks: list[Ranks]) -> LPAConfig:
    ours = load_model(folder, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(IDS)).log_softmax(-1), model(IDS), rtol=0, atol=1e-5)
    assert ranks_of(ours.config) == ranks
    assert (folder / "tokenizer.json").is_file()
    return ours.config


def rank_dict(ranks: list[Ranks]) -> dict[str, int]:
    parts = dict.fromkeys(("q", "k", "v", "o"), "self_attn") | dict.fromkeys(("gate", "up", "down"), "mlp")
    return {
        f"model.layers.{layer}.{parts[name]}.{name}_proj": rank
        for layer, of_layer in enumerate(ranks)
        for name, rank in of_layer.items()
        if rank is not None
    }


# what transformers 4's config.to_dict() has beside the model's own keys
WRITTEN_OUT = {
    "return_dict": True,
    "output_hidden_states": False,
    "torchscript": False,
    "torch_dtype": "float16",
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "max_length": 20,
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "suppress_tokens": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0"},
    "task_specific_params": None,
    "problem_type": None,
    "_name_or_path": "org/model",
    "transformers_version": "4.51.0",
    "initializer_range": 0.02,
    "use_cache": True,
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}


def write_lems(folder: Path, model: Model, base: dict[str, Any], ranks: dict[str, int]) -> Path:
    config = {
        "model_type": "low_rank_compressed",
        "auto_map": {"AutoConfig": "configuration_low_rank.LowRankConfig"},
        "base_config": base,
        "base_model_type": base["model_type"],
        "base_model_id": "org/model",
        "rank_dict": ranks,
        "compression_method": "kfac_svd",
        "target_ratio": 0.6,
        "transformers_version": "4.51.0",
    }
    write_base(folder, config)
    tensors = {f"wrapped_model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


# --- each project ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        ({}, {}),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 4096}, {"kv_heads": 2}),
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 21},
            {"bias": True},
        ),
        (
            {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 2, "attention_bias": False},
            {"kv_heads": 2, "qk_norm": True},
        ),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_lems(tmp_path: Path, base: dict[str, Any], shape: dict[str, Any]) -> None:
    model = Model(Lems, MIXED, **shape)
    config = hf_config(**{**WRITTEN_OUT, **base})
    source = write_lems(tmp_path / "lems", model, config, rank_dict(MIXED))
    out = succeed("convert", "factored", source, tmp_path / "out")
    assert "factors by the names of LEMS" in out
    assert "ranks q 8 to dense  k 5 to 6" in out
    config_out = check(model, tmp_path / "out", MIXED)
    assert config_out.qk_norm == ("qk_norm" in shape) and config_out.attention_bias == ("bias" in shape)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_the_embedding(tmp_path: Path, stored: bool) -> None:
    model = Model(Lems, MIXED)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.mul_(0.2))
    source = write_lems(tmp_path / "lems", model, hf_config(tie_word_embeddings=True), rank_dict(MIXED))
    if not stored:
        tensors = load_file(source / "model.safetensors")
        del tensors["wrapped_model.lm_head.weight"]
        save_file(tensors, source / "model.safetensors")
    succeed("convert", "factored", source, tmp_path / "out", "--dtype", "float32")
    assert check(model, tmp_path / "out", MIXED).tie_word_embeddings


def test_weights_keep_their_dtype_or_take_another(tmp_path: Path) -> None:
    model = Model(Lems, MIXED)
    source = write_lems(tmp_path / "lems", model, hf_config(), rank_dict(MIXED))
    halves = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(halves, source / "model.safetensors")
    model.load_state_dict({name.removeprefix("wrapped_model."): tensor.float() for name, tensor in halves.items()})
    assert "parameters in float16" in succeed("convert", "factored", source, tmp_path / "same")
    assert "parameters in float32" in succeed("convert", "factored", source, tmp_path / "wide", "--dtype", "float32")
    check(model, tmp_path / "same", MIXED)
    check(model, tmp_path / "wide", MIXED)


def test_svd_llm_from_a_state_dict_beside_its_base(tmp_path: Path) -> None:
    model = Model(None, every(8))
    tensors = model.state_dict()
    frequencies = 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    for layer in range(LAYERS):  # a buffer that their attention keeps
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
    torch.save(tensors, tmp_path / "svd_llm.pt")
    base = write_base(tmp_path / "base", hf_config())
    out = succeed("convert", "factored", tmp_path / "svd_llm.pt", tmp_path / "out", "--base", base)
    assert "SVD-LLM" in out
    assert check(model, tmp_path / "out", every(8)).attention_rank == 8
    (base / "config.json").write_text(json.dumps(hf_config(rope_theta=500000.0)))
    refused = lpa("convert", "factored", tmp_path / "svd_llm.pt", tmp_path / "other", "--base", base)
    assert "inv_freq: these are not the frequencies of rope_theta 500000" in refused.stderr


def test_a_pickled_module_is_refused_with_the_lines_that_save_its_tensors(tmp_path: Path) -> None:
    model, file = Model(None, every(8)), tmp_path / "whole.pt"
    torch.save({"model": model, "tokenizer": byte_tokenizer()}, file)
    base = write_base(tmp_path / "base", hf_config())
    refused = lpa("convert", "factored", file, tmp_path / "out", "--base", base)
    assert refused.exit_code == 2 and not (tmp_path / "out").exists()
    lines = refused.stderr.split("`")[1::2]
    assert len(lines) == 2 and "tests.test_convert_factored." in refused.stderr
    names: dict[str, Any] = {"torch": torch}
    for line in lines:
        exec(line, names)
    succeed("convert", "factored", tmp_path / "whole-tensors.pt", tmp_path / "out", "--base", base)
    check(model, tmp_path / "out", every(8))


def test_dynrank_with_its_list_of_ranks(tmp_path: Path) -> None:
    ranks: list[Ranks] = [dict(zip(NAMES, range(4 + layer, 11 + layer), strict=True)) for layer in range(LAYERS)]
    model = Model(DynRank, ranks, kv_heads=2)
    listed = [rank for of_layer in ranks for rank in of_layer.values()]
    folder = write_base(tmp_path / "base", hf_config(num_key_value_heads=2))
    saved = {"step": 1000, "ranks": listed, "state_dict": model.state_dict(), "val_loss": 2.5}
    torch.save(saved, folder / "v8_hardened_step1000.pt")
    assert "DynRank" in succeed("convert", "factored", folder, tmp_path / "out")
    check(model, tmp_path / "out", ranks)
    for wrong, message in (([*listed[:-1], 3], "rank 11 of its tensors"), (listed[1:], "rank 4 of its tensors")):
        torch.save({**saved, "ranks": wrong}, folder / "v8_hardened_step1000.pt")
        assert message in lpa("convert", "factored", folder, tmp_path / "other").stderr


def test_asvd_with_a_head_in_factors(tmp_path: Path) -> None:
    model = Model(Asvd, MIXED, bias=True, head=20)
    ranks = {**rank_dict(MIXED), "lm_head": 20}
    config = hf_config(
        **WRITTEN_OUT, architectures=["ASVDQwen2ForCausalLM"], truncation_ranks=ranks, **{"attention_bias": True}
    )
    config["model_type"] = "qwen2"
    folder = write_base(tmp_path / "asvd", config)
    save_file(model.state_dict(), folder / "model.safetensors")
    out = succeed("convert", "factored", folder, tmp_path / "out")
    assert "the output head came in factors" in out
    check(model, tmp_path / "out", MIXED)
    (folder / "config.json").write_text(json.dumps({**config, "truncation_ranks": {**ranks, "lm_head": 21}}))
    assert (
        "lm_head has rank 21 there, and 20 in the weights" in lpa("convert", "factored", folder, tmp_path / "x").stderr
    )


def test_pairs_by_other_names(tmp_path: Path) -> None:
    model = Model(Columns, every(32))  # square matrices of a square rank: shapes tell nothing of q, k, v and o
    folder = write_base(tmp_path / "plain", hf_config())
    tensors = model.state_dict()
    save_file(tensors, folder / "model.safetensors")
    succeed("convert", "factored", folder, tmp_path / "out", "--map", "low.T,high.T")
    check(model, tmp_path / "out", every(32))
    untransposed = lpa("convert", "factored", folder, tmp_path / "x", "--map", "low,high").stderr
    assert "they fit transposed (`.T` in --map)" in untransposed and "gate_proj" in untransposed
    swapped = lpa("convert", "factored", folder, tmp_path / "x", "--map", "high.T,low.T").stderr
    assert "they fit the other way round" in swapped
    named = {
        name.replace("model.layers.", "factors/").replace(".self_attn.", "/").replace(".mlp.", "/"): tensor
        for name, tensor in tensors.items()
        if name.endswith((".low", ".high"))
    }
    others = {name: tensor for name, tensor in tensors.items() if not name.endswith((".low", ".high"))}
    save_file({**named, **others}, folder / "model.safetensors")
    pattern = "factors/{layer}/{name}_proj"
    succeed("convert", "factored", folder, tmp_path / "out2", "--map", f"{pattern}.low.T,{pattern}.high.T")
    check(model, tmp_path / "out2", every(32))
    for wrong, message in (("low.T", "not two names"), ("{layer}.low,{layer}.high", "two matrices would be 0.low")):
        assert message in lpa("convert", "factored", folder, tmp_path / "x", "--map", wrong).stderr
    unmatched = lpa("convert", "factored", folder, tmp_path / "x", "--map", "a,b").stderr
    assert "missing tensor model.layers.0.self_attn.q_proj.weight, and no factors of it" in unmatched


# --- dense matrices of low rank ---------------------------------------------------------------------------------------


def folded(model: Model) -> dict[str, Tensor]:
    """The tensors with every pair multiplied out, as float32 products."""
    tensors = dict(model.state_dict())
    for name in [name for name in tensors if name.endswith(".first.weight")]:
        first, second = tensors.pop(name), tensors.pop(name.replace("first", "second"))
        tensors[name.replace(".first", "")] = second @ first
    return tensors


def test_products_are_factored_again(tmp_path: Path) -> None:
    model = Model(DynRank, MIXED)
    folder = write_base(tmp_path / "dense", hf_config())
    save_file(folded(model), folder / "model.safetensors")
    out = succeed("convert", "factored", folder, tmp_path / "out", "--refactor")
    assert "of a matrix's norm is left out" in out
    check(model, tmp_path / "out", MIXED)
    refused = lpa("convert", "factored", folder, tmp_path / "x")
    assert "no factors of a matrix by the names of LEMS" in refused.stderr and "--refactor" in refused.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(192, 256), (256, 192), (224, 224)])
def test_the_rank_of_a_rounded_product_is_found(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, columns = shape
    up, down = torch.randn(rows, 40, generator=generator), torch.randn(40, columns, generator=generator)
    scales = torch.logspace(0, -1, 40)  # a spectrum that falls to a tenth before it ends
    product = ((up * scales) @ down).to(dtype)
    factors = find_factors(product)
    assert factors is not None and factors.down.shape == (40, columns) and factors.up.shape == (rows, 40)
    assert factors.error < 2 * torch.finfo(dtype).eps
    restored = torch.linalg.vector_norm(factors.up @ factors.down - product.double())
    assert restored < 2 * torch.finfo(dtype).eps * torch.linalg.vector_norm(product.double())


def test_full_rank_is_not_taken_for_low() -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(96, 128, generator=generator)
    assert find_factors(matrix) is None and find_factors(matrix.bfloat16()) is None
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    smooth = (u * torch.logspace(0, -9, 96, dtype=torch.float64)) @ v  # falls to nothing, and nowhere at once
    assert find_factors(smooth.float()) is None
    loose = find_factors(smooth.float(), tolerance=1e-3)
    assert loose is not None and len(loose.down) == 32 and loose.error < 2e-3


# --- what is refused --------------------------------------------------------------------------------------------------


Q = "wrapped_model.model.layers.0.self_attn.q_proj"
OUT = "wrapped_model.model.layers.0.self_attn.o_proj"
NORM = "wrapped_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.mod_b.weight"), r"q_proj\.mod_a\.weight: the other factor of"),
        (lambda t: [t.pop(f"{Q}.mod_{x}.weight") for x in "ab"], r"missing tensor .*q_proj\.weight, and no factors"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(D, D)}), "one matrix, dense and in factors"),
        (lambda t: t.update({f"{Q}.first.weight": torch.zeros(8, D)}), "stand for the same part of a matrix"),
        (lambda t: t.update({f"{Q}.mod_a.weight": torch.zeros(D, 8)}), r"mod_a\.weight \[32, 8\] and"),
        (lambda t: t.update({f"{Q}.mod_a.weight": torch.full((8, D), math.nan)}), r"mod_a\.weight has 256 of 256"),
        (
            lambda t: t.update({"wrapped_model.model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight has shape \[3\]",
        ),
        (lambda t: t.pop("wrapped_model.lm_head.weight"), r"missing tensor lm_head\.weight"),
        (lambda t: t.update({"wrapped_model.extra": torch.ones(3)}), "unexpected tensor extra"),
        (
            lambda t: t.update({f"{Q.replace('q_', 'o_')}.bias": torch.ones(D)}),
            r"o_proj\.bias: LPA models have no bias",
        ),
        (lambda t: t.update({f"{Q}.bias": torch.ones(D)}), r"missing tensor .*k_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    source = write_lems(tmp_path / "lems", Model(Lems, every(8)), hf_config(), rank_dict(every(8)))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert_factored(source, tmp_path / "out", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lems"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type: 'gemma2' is none of llama, mistral"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window: 64 is shorter than"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "missing tensor model.layers.2.self_attn.q_proj.weight, and no factors"),
        ({"num_hidden_layers": 1}, "model.layers.1.mlp.down_proj has rank 8 there, and no factors in the weights"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
        ({"surprise": 1}, "unknown keys surprise"),
    ],
)
def test_configs_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = write_lems(tmp_path / "lems", Model(Lems, every(8)), hf_config(**changes), rank_dict(every(8)))
    with pytest.raises(CheckpointError, match=message):
        convert_factored(source, tmp_path / "out", torch.float32)


def test_a_window_is_no_obstacle_within_it(tmp_path: Path) -> None:
    model = Model(Lems, every(8))
    config = hf_config(model_type="mistral", sliding_window=64)
    source = write_lems(tmp_path / "lems", model, config, rank_dict(every(8)))
    succeed("convert", "factored", source, tmp_path / "out", "--max-position-embeddings", 64)
    assert check(model, tmp_path / "out", every(8)).max_position_embeddings == 64


def test_ranks_that_the_config_lists_otherwise_are_named(tmp_path: Path) -> None:
    listed = rank_dict(every(8))
    listed["model.layers.0.mlp.up_proj"] = 9
    source = write_lems(tmp_path / "lems", Model(Lems, every(8)), hf_config(), listed)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj has rank 9 there, and 8 in the weights"):
        convert_factored(source, tmp_path / "out", torch.float32)
    del listed["model.layers.0.mlp.up_proj"]
    source = write_lems(tmp_path / "lems", Model(Lems, every(8)), hf_config(), listed)
    with pytest.raises(CheckpointError, match=r"up_proj has rank none there, and 8 in the weights"):
        convert_factored(source, tmp_path / "out", torch.float32)


def test_without_a_config_the_option_is_named(tmp_path: Path) -> None:
    torch.save(Model(None, every(8)).state_dict(), tmp_path / "model.pt")
    assert "--base FOLDER" in lpa("convert", "factored", tmp_path / "model.pt", tmp_path / "out").stderr
    assert len(read_tensors(tmp_path / "model.pt")) == 3 + LAYERS * 16
