"""`convert_official` against torch modules written here in the shapes and with the key names of the published code."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lpa_model.checkpoint import load_model
from lpa_model.config import LPAConfig
from lpa_model.convert.official import convert_official
from lpa_model.folder import CheckpointError
from tests.tiny import VOCAB_SIZE, byte_tokenizer

HIDDEN, HEADS, HEAD_DIM, FFN, LAYERS, POSITIONS = 24, 3, 10, 40, 2, 64
RANKS = [(None, None), (6, None), (None, 5), (6, 5)]  # attention, FFN


def linear(width_in: int, width_out: int, rank: int | None, bias: str) -> nn.Module:
    """`bias`: '' for none, 'dense' for a dense layer's only, 'first' or 'last' for which low-rank factor has one."""
    if rank is None:
        return nn.Linear(width_in, width_out, bias=bias != "")
    return nn.Sequential(
        nn.Linear(width_in, rank, bias=bias == "first"), nn.Linear(rank, width_out, bias=bias == "last")
    )


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [T, H·dh] -> [T, H·dh], one head and one query at a time."""
    out = torch.zeros_like(q)
    for head in range(HEADS):
        part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        for t in range(len(q)):
            weights = torch.softmax(k[: t + 1, part] @ q[t, part] / math.sqrt(HEAD_DIM), 0)
            out[t, part] = weights @ v[: t + 1, part]
    return out


class Attention1(nn.Module):
    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.query_proj = linear(HIDDEN, HEADS * HEAD_DIM, rank, "first")
        self.key_proj = linear(HIDDEN, HEADS * HEAD_DIM, rank, "first")
        self.value_proj = linear(HIDDEN, HEADS * HEAD_DIM, rank, "first")
        self.out_proj = linear(HEADS * HEAD_DIM, HIDDEN, rank, "last")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_proj(causal(self.query_proj(x), self.key_proj(x), self.value_proj(x)))
        return y


class Block1(nn.Module):
    def __init__(self, rank: int | None, ffn_rank: int | None) -> None:
        super().__init__()
        self.attention = Attention1(rank)
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN, eps=1e-5), nn.LayerNorm(HIDDEN, eps=1e-5)
        if ffn_rank is None:
            self.fc = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.ReLU(), nn.Linear(FFN, HIDDEN))
        else:
            self.fc = nn.Sequential(
                nn.Linear(HIDDEN, ffn_rank),
                nn.Linear(ffn_rank, FFN, bias=False),
                nn.ReLU(),
                nn.Linear(FFN, ffn_rank, bias=False),
                nn.Linear(ffn_rank, HIDDEN),
            )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attention(x))
        return x + self.norm2(self.fc(x))  # type: ignore[no-any-return]  # modules return Any


class Body1(nn.Module):
    def __init__(self, rank: int | None, ffn_rank: int | None) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.positional_embedding = nn.Embedding(POSITIONS, HIDDEN)
        self.transformer_blocks = nn.ModuleList(Block1(rank, ffn_rank) for _ in range(LAYERS))
        self.fc = nn.Linear(HIDDEN, VOCAB_SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding.weight[: len(ids)]
        for block in self.transformer_blocks:
            x = block(x)
        y: Tensor = self.fc(x)
        return y


class Published1(nn.Module):
    """Setting 1: learned positions, LayerNorm on the branch's output, ReLU."""

    def __init__(self, rank: int | None, ffn_rank: int | None) -> None:
        super().__init__()
        self.lpa = Body1(rank, ffn_rank)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.lpa(ids)
        return y


class Rotary(nn.Module):
    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H·dh]; a head's dimensions i and i + dh/2 are a complex number, turned by t·inv_freq[i]."""
        heads = x.view(len(x), HEADS, 2, HEAD_DIM // 2)
        angles = torch.outer(torch.arange(len(x)).to(x.dtype), self.inv_freq.to(x.dtype))
        turned = torch.complex(heads[:, :, 0], heads[:, :, 1]) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.stack((turned.real, turned.imag), 2).reshape(x.shape)


class RMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / torch.sqrt((x * x).sum(-1, keepdim=True) / HIDDEN + 1e-6)


class Attention2(nn.Module):
    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.q_proj = linear(HIDDEN, HEADS * HEAD_DIM, rank, "")
        self.k_proj = linear(HIDDEN, HEADS * HEAD_DIM, rank, "")
        self.v_proj = linear(HIDDEN, HEADS * HEAD_DIM, rank, "")
        self.o_proj = linear(HEADS * HEAD_DIM, HIDDEN, rank, "")
        self.rotary_emb = Rotary()

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.rotary_emb(self.q_proj(x)), self.rotary_emb(self.k_proj(x))
        y: Tensor = self.o_proj(causal(q, k, self.v_proj(x)))
        return y


class Gated(nn.Module):
    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.gate_proj = linear(HIDDEN, FFN, rank, "")
        self.up_proj = linear(HIDDEN, FFN, rank, "")
        self.down_proj = linear(FFN, HIDDEN, rank, "")

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        y: Tensor = self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))
        return y


class Block2(nn.Module):
    def __init__(self, rank: int | None, ffn_rank: int | None) -> None:
        super().__init__()
        self.attention, self.ffn = Attention2(rank), Gated(ffn_rank)
        self.norm1, self.norm2 = RMS(), RMS()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))  # type: ignore[no-any-return]  # modules return Any


class Body2(nn.Module):
    def __init__(self, rank: int | None, ffn_rank: int | None) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.transformer_blocks = nn.ModuleList(Block2(rank, ffn_rank) for _ in range(LAYERS))
        self.norm = RMS()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids)
        for block in self.transformer_blocks:
            x = block(x)
        y: Tensor = self.norm(x)
        return y


class Published2(nn.Module):
    """Setting 2: rotary positions, RMSNorm before the branch, SwiGLU."""

    def __init__(self, rank: int | None, ffn_rank: int | None) -> None:
        super().__init__()
        self.lpa = Body2(rank, ffn_rank)
        self.fc = nn.Linear(HIDDEN, VOCAB_SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.fc(self.lpa(ids))
        return y


PUBLISHED: dict[str, type[nn.Module]] = {"setting1": Published1, "setting2": Published2}
OPTIONS: dict[str, dict[str, Any]] = {
    "setting1": {"num_heads": HEADS},
    "setting2": {"max_position_embeddings": POSITIONS},
}


def published(setting: str, rank: int | None = 6, ffn_rank: int | None = None) -> nn.Module:
    """A random model with random biases and norms."""
    torch.manual_seed(0)
    model = PUBLISHED[setting](rank, ffn_rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def write(folder: Path, tensors: dict[str, Tensor], *, pickled: bool = False) -> Path:
    """The folder that Trainer.save_model leaves."""
    folder.mkdir(exist_ok=True)
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def tensors_of(setting: str, rank: int | None = 6, ffn_rank: int | None = None) -> dict[str, Tensor]:
    return dict(published(setting, rank, ffn_rank).state_dict())


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("setting", PUBLISHED)
@pytest.mark.parametrize(("rank", "ffn_rank"), RANKS)
def test_log_probabilities_equal_the_published_module(
    tmp_path: Path, setting: str, rank: int | None, ffn_rank: int | None
) -> None:
    source = published(setting, rank, ffn_rank)
    src = write(tmp_path / "src", dict(source.state_dict()), pickled=rank is None)
    config = convert_official(src, tmp_path / "dst", **OPTIONS[setting])
    assert config == LPAConfig(
        architecture="setting1" if setting == "setting1" else "setting2",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        attention_rank=rank,
        ffn_rank=ffn_rank,
        lm_head_bias=True,
    )
    ids = torch.randint(VOCAB_SIZE, (50,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = source.double()(ids).log_softmax(-1)
        model = load_model(tmp_path / "dst", torch.float32, torch.device("cpu"))
        assert model.config == config
        found = model.logits(model(ids[None])[0]).log_softmax(-1)
    assert expected.std() > 0.5  # not a flat distribution, which anything would equal
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_ranks_are_read_off_every_projection_and_layer(tmp_path: Path) -> None:
    two = published("setting2")
    first, second = two.lpa.transformer_blocks
    first.attention.q_proj = linear(HIDDEN, HEADS * HEAD_DIM, None, "")
    second.attention.o_proj = linear(HEADS * HEAD_DIM, HIDDEN, 4, "")
    for block in (first, second):
        block.attention.v_proj = linear(HIDDEN, HEADS * HEAD_DIM, 9, "")
        block.ffn.up_proj = linear(HIDDEN, FFN, 7, "")
    second.ffn.down_proj = linear(FFN, HIDDEN, 5, "")
    one = published("setting1")
    first, second = one.lpa.transformer_blocks
    second.attention.key_proj = linear(HIDDEN, HEADS * HEAD_DIM, None, "dense")
    second.fc = Block1(6, 5).fc
    second.fc[3], second.fc[4] = nn.Linear(FFN, 8, bias=False), nn.Linear(8, HIDDEN)
    expected: dict[str, Any] = {
        "setting2": (
            {"q": [None, 6], "k": 6, "v": 9, "o": [6, 4]},
            {"gate": None, "up": 7, "down": [None, 5]},
        ),
        "setting1": ({"q": 6, "k": [6, None], "v": 6, "o": 6}, {"up": [None, 5], "down": [None, 8]}),
    }
    ids = torch.randint(VOCAB_SIZE, (50,), generator=torch.Generator().manual_seed(1))
    for setting, source in (("setting1", one), ("setting2", two)):
        src = write(tmp_path / setting, dict(source.state_dict()))
        config = convert_official(src, tmp_path / f"{setting}-native", **OPTIONS[setting])
        assert (config.attention_rank, config.ffn_rank) == expected[setting]
        with torch.inference_mode():
            truth = source.double()(ids).log_softmax(-1)
            model = load_model(tmp_path / f"{setting}-native", torch.float32, torch.device("cpu"))
            found = model.logits(model(ids[None])[0]).log_softmax(-1)
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", PUBLISHED)
@pytest.mark.parametrize(("rank", "ffn_rank"), [(6, 5), (None, None)])
def test_every_missing_tensor_is_named_and_nothing_is_left(
    tmp_path: Path, setting: str, rank: int | None, ffn_rank: int | None
) -> None:
    tensors = tensors_of(setting, rank, ffn_rank)
    for name in tensors:
        src = write(tmp_path / "src", {key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(CheckpointError) as caught:
            convert_official(src, tmp_path / "dst", **OPTIONS[setting])
        assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("setting", PUBLISHED)
def test_wrong_shapes_and_types_are_named(tmp_path: Path, setting: str) -> None:
    tensors = tensors_of(setting)
    for name in tensors:
        if "blocks.1." in name:  # the second block's sizes follow from the first's
            src = write(tmp_path / "src", {**tensors, name: torch.zeros(7, 9)})
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                convert_official(src, tmp_path / "dst", **OPTIONS[setting])
    src = write(tmp_path / "src", {**tensors, "lpa.token_embedding.weight": torch.zeros(7)})
    with pytest.raises(CheckpointError, match=r"lpa\.token_embedding\.weight has shape \[7\]"):
        convert_official(src, tmp_path / "dst", **OPTIONS[setting])
    src = write(tmp_path / "src", {**tensors, "lpa.token_embedding.weight": torch.zeros(7, 9, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"lpa\.token_embedding\.weight holds torch\.int8"):
        convert_official(src, tmp_path / "dst", **OPTIONS[setting])


@pytest.mark.parametrize("setting", PUBLISHED)
@pytest.mark.parametrize(
    "extra", ["lpa.transformer_blocks.1.attention.gate.weight", "head.bias", "lpa.transformer_blocks.0.fc.9.weight"]
)
def test_an_extra_tensor_is_named(tmp_path: Path, setting: str, extra: str) -> None:
    src = write(tmp_path / "src", {**tensors_of(setting), extra: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"unknown tensor {extra}"):
        convert_official(src, tmp_path / "dst", **OPTIONS[setting])


def test_a_rotary_buffer_is_not_ignored_in_setting_1(tmp_path: Path) -> None:
    name = "lpa.transformer_blocks.0.attention.rotary_emb.inv_freq"
    src = write(tmp_path / "src", {**tensors_of("setting1"), name: torch.ones(5)})
    with pytest.raises(CheckpointError, match=f"unknown tensor {name}"):
        convert_official(src, tmp_path / "dst", num_heads=HEADS)


def test_missing_options_are_asked_for_by_their_flags(tmp_path: Path) -> None:
    one = write(tmp_path / "one", tensors_of("setting1"))
    with pytest.raises(CheckpointError, match="--num-heads is needed"):
        convert_official(one, tmp_path / "dst")
    two = write(tmp_path / "two", tensors_of("setting2"))
    with pytest.raises(CheckpointError, match="--max-position-embeddings is needed"):
        convert_official(two, tmp_path / "dst")
    bare = {name: tensor for name, tensor in tensors_of("setting2").items() if "rotary_emb" not in name}
    two = write(tmp_path / "two", bare)
    with pytest.raises(CheckpointError, match="--num-heads is needed"):
        convert_official(two, tmp_path / "dst", max_position_embeddings=POSITIONS)
    with pytest.raises(CheckpointError, match="--rope-theta is needed"):
        convert_official(two, tmp_path / "dst", max_position_embeddings=POSITIONS, num_heads=HEADS)
    config = convert_official(two, tmp_path / "dst", max_position_embeddings=POSITIONS, num_heads=HEADS, rope_theta=2e4)
    assert (config.head_dim, config.rope_theta) == (HEAD_DIM, 2e4)


@pytest.mark.parametrize(
    ("setting", "options", "flag"),
    [
        ("setting1", {"num_heads": 7}, "--num-heads"),
        ("setting1", {"num_heads": 0}, "--num-heads"),
        ("setting1", {"rope_theta": 1e4}, "--rope-theta"),
        ("setting1", {"max_position_embeddings": 65}, "--max-position-embeddings"),
        ("setting2", {"num_heads": 5}, "--num-heads"),
        ("setting2", {"rope_theta": 5e5}, "--rope-theta"),
    ],
)
def test_options_that_contradict_the_checkpoint_are_refused(
    tmp_path: Path, setting: str, options: dict[str, Any], flag: str
) -> None:
    src = write(tmp_path / "src", tensors_of(setting))
    with pytest.raises(CheckpointError, match=flag):
        convert_official(src, tmp_path / "dst", **{**OPTIONS[setting], **options})
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("theta", "dtype"),
    [(10000.0, torch.float32), (500000.0, torch.float32), (1234.5, torch.float32), (10000.0, torch.bfloat16)],
)
def test_theta_is_read_from_the_rotary_buffer(tmp_path: Path, theta: float, dtype: torch.dtype) -> None:
    frequencies = (theta ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)).to(dtype)
    tensors = {name: frequencies if "inv_freq" in name else t for name, t in tensors_of("setting2").items()}
    src = write(tmp_path / "src", tensors, pickled=True)
    assert convert_official(src, tmp_path / "dst", **OPTIONS["setting2"]).rope_theta == theta


def test_other_frequencies_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of("setting2")
    name = "lpa.transformer_blocks.{}.attention.rotary_emb.inv_freq"
    src = write(tmp_path / "src", {**tensors, name.format(1): tensors[name.format(1)] / 2})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attention\.rotary_emb\.inv_freq differs"):
        convert_official(src, tmp_path / "dst", **OPTIONS["setting2"])
    odd = torch.linspace(1, 0.1, HEAD_DIM // 2)
    src = write(tmp_path / "src", {**tensors, name.format(0): odd, name.format(1): odd.clone()})
    with pytest.raises(CheckpointError, match="not the frequencies of plain rotary"):
        convert_official(src, tmp_path / "dst", **OPTIONS["setting2"])


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    src = write(tmp_path / "src", {}, pickled=True)
    (src / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "harm")))
    (src / "training_args.bin").write_bytes(pickle.dumps(Touch(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        convert_official(src, tmp_path / "dst", num_heads=HEADS)
    write(src, tensors_of("setting1"))
    (src / "training_args.bin").write_bytes(pickle.dumps(Touch(tmp_path / "harm")))
    convert_official(src, tmp_path / "dst", num_heads=HEADS)
    assert not (tmp_path / "harm").exists()


def test_broken_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        convert_official(tmp_path / "nowhere", tmp_path / "dst")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        convert_official(tmp_path / "empty", tmp_path / "dst")
    src = write(tmp_path / "src", tensors_of("setting1"))
    data = (src / "model.safetensors").read_bytes()
    (src / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        convert_official(src, tmp_path / "dst", num_heads=HEADS)
    src = write(tmp_path / "src", {"encoder.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="setting 1"):
        convert_official(src, tmp_path / "dst", num_heads=HEADS)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    src = write(tmp_path / "src", tensors_of("setting1"))
    dst = tmp_path / "dst"
    dst.mkdir()
    convert_official(src, dst, num_heads=HEADS)  # an empty one is fine
    before = {path.name: path.read_bytes() for path in dst.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        convert_official(src, dst, num_heads=HEADS, dtype=torch.bfloat16)
    assert {path.name: path.read_bytes() for path in dst.iterdir()} == before


def test_tokenizer_files_and_special_tokens(tmp_path: Path) -> None:
    src = write(tmp_path / "src", tensors_of("setting1"))
    (src / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}, "x": 1}))
    (src / "special_tokens_map.json").write_text(json.dumps({"bos_token": "a", "eos_token": "b"}))
    config = convert_official(src, tmp_path / "dst", num_heads=HEADS)
    tokenizer = byte_tokenizer()
    assert config.bos_token_id == tokenizer.token_to_id("a")
    assert config.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert (tmp_path / "dst/tokenizer_config.json").read_bytes() == (src / "tokenizer_config.json").read_bytes()
    assert json.loads((tmp_path / "dst/tokenizer.json").read_text()) == json.loads((src / "tokenizer.json").read_text())

    (src / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        convert_official(src, tmp_path / "other", num_heads=HEADS)


def test_a_broken_sentencepiece_tokenizer_is_named_and_a_given_one_is_taken(tmp_path: Path) -> None:
    src = write(tmp_path / "src", tensors_of("setting1"))
    given = (src / "tokenizer.json").rename(tmp_path / "given.json")
    (src / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        convert_official(src, tmp_path / "dst", num_heads=HEADS)
    convert_official(src, tmp_path / "dst", num_heads=HEADS, tokenizer=given)
    assert (tmp_path / "dst/tokenizer.json").is_file()


def test_no_tokenizer_at_all_is_asked_for_by_its_flag(tmp_path: Path) -> None:
    src = write(tmp_path / "src", tensors_of("setting1"))
    (src / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"nor tokenizer\.model; give one with --tokenizer"):
        convert_official(src, tmp_path / "dst", num_heads=HEADS)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_named_by_their_tensor(tmp_path: Path, value: float) -> None:
    tensors = tensors_of("setting2")
    tensors["lpa.transformer_blocks.1.ffn.up_proj.weight"][3, 5] = value
    src = write(tmp_path / "src", tensors)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.up_proj\.weight holds numbers that are not finite"):
        convert_official(src, tmp_path / "dst", **OPTIONS["setting2"])
    assert not (tmp_path / "dst").exists()


def test_weights_are_stored_in_the_type_asked_for(tmp_path: Path) -> None:
    src = write(tmp_path / "src", tensors_of("setting2"))
    convert_official(src, tmp_path / "dst", max_position_embeddings=POSITIONS, dtype=torch.bfloat16)
    with safe_open(tmp_path / "dst/model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118 (no mapping)
