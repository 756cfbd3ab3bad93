"""Weights in every arrangement that training tools leave, and SentencePiece's tokenizers against its own encoder."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from lpa_model.checkpoint import load_model
from lpa_model.convert.official import convert_official
from lpa_model.convert.source import find_weights
from lpa_model.convert.spm import read_sentencepiece
from lpa_model.folder import CheckpointError
from lpa_model.model import LPAForCausalLM
from server.engine.tokenizer import Tokenizer as EngineTokenizer
from tests.test_cli import lpa, succeed
from tests.test_convert_official import HEADS, POSITIONS, tensors_of
from tests.tiny import CORPUS, byte_tokenizer, tiny_config


def write_shards(folder: Path, tensors: dict[str, Tensor], *, pickled: bool = False) -> None:
    names = sorted(tensors)
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:]), 1):
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        chosen = {name: tensors[name].contiguous() for name in part}
        torch.save(chosen, folder / file) if pickled else save_file(chosen, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def wrapped(key: str) -> Callable[[Path, dict[str, Tensor]], None]:
    """As a training loop saves: the model beside the optimizer's state."""

    def write(folder: Path, tensors: dict[str, Tensor]) -> None:
        optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        torch.save({key: tensors, "optimizer": optimizer, "step": 5, "rng": torch.zeros(4).byte()}, folder / "ckpt.pt")

    return write


def in_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    for number in (9, 100, 20):
        (folder / f"checkpoint-{number}").mkdir()
        values = tensors if number == 100 else {name: tensor + 1 for name, tensor in tensors.items()}
        torch.save(values, folder / f"checkpoint-{number}/pytorch_model.bin")
        (folder / f"checkpoint-{number}/optimizer.pt").write_bytes(b"not read")
        (folder / f"checkpoint-{number}/rng_state.pth").write_bytes(b"not read")


def compiled_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Wrappers inside of the model, too."""
    inside = {
        name.replace(".attention.", "._orig_mod.attention._fsdp_wrapped_module."): tensor
        for name, tensor in tensors.items()
    }
    torch.save(prefixed("_orig_mod.module.", inside), folder / "pytorch_model.bin")


ARRANGEMENTS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "shards": write_shards,
    "pickled shards": lambda folder, tensors: write_shards(folder, tensors, pickled=True),
    "checkpoint-N": in_checkpoint,
    "parts": compiled_parts,
    "nested": lambda folder, tensors: torch.save(
        {"state_dict": {"model": prefixed("module._orig_mod.", tensors)}}, folder / "last.ckpt"
    ),
    "prefixed shards": lambda folder, tensors: write_shards(folder, prefixed("module.", tensors)),
    **{
        f"prefix {prefix}": lambda folder, tensors, prefix=prefix: torch.save(  # type: ignore[misc]
            prefixed(prefix, tensors), folder / "pytorch_model.bin"
        )
        for prefix in ("module.", "_orig_mod.", "model.", "model.module._orig_mod.", "module.model.", "student.net.")
    },
    **{f"wrapped in {key}": wrapped(key) for key in ("model", "module", "state_dict", "model_state_dict")},
}


def converted(folder: Path, setting: str, write: Callable[[Path, dict[str, Tensor]], None]) -> LPAForCausalLM:
    """The model that is made of a setting's tensors as `write` arranges them."""
    (folder / "source").mkdir()
    byte_tokenizer().save(str(folder / "source/tokenizer.json"))
    write(folder / "source", tensors_of(setting))
    options: dict[str, Any] = {"num_heads": HEADS} if setting == "setting1" else {"max_position_embeddings": POSITIONS}
    convert_official(folder / "source", folder / "converted", **options)
    return load_model(folder / "converted", torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module", params=["setting1", "setting2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LPAForCausalLM]:
    """A setting's name, and its model from one file with the published names."""
    folder = tmp_path_factory.mktemp("plain")
    made = converted(folder, request.param, lambda folder, tensors: save_file(tensors, folder / "model.safetensors"))
    return request.param, made


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_arrangement_gives_the_same_model(
    tmp_path: Path, arrangement: str, plain: tuple[str, LPAForCausalLM]
) -> None:
    setting, plain_model = plain
    other = converted(tmp_path, setting, ARRANGEMENTS[arrangement])
    assert plain_model.config == other.config
    for (name, a), (_, b) in zip(plain_model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_a_run_uses_the_runs_tokenizer(tmp_path: Path) -> None:
    in_checkpoint(tmp_path, tensors_of("setting1"))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = convert_official(tmp_path / "checkpoint-20", tmp_path / "out", num_heads=HEADS)
    assert config.max_position_embeddings == POSITIONS


def test_a_file_may_be_named(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for name in ("a.pt", "b.pt"):
        torch.save(tensors_of("setting1"), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"has a\.pt, b\.pt; name the file that is meant"):
        find_weights(tmp_path)
    convert_official(tmp_path / "a.pt", tmp_path / "out", num_heads=HEADS)


def test_parts_of_distributed_runs_are_told_how_to_be_joined(tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    (deep / "global_step10").mkdir(parents=True)
    (deep / "zero_to_fp32.py").write_text("")
    (deep / "latest").write_text("global_step10")
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (deep / "global_step10" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"DeepSpeed.*`python {deep}/zero_to_fp32\.py {deep} {deep}/fp32`"):
        find_weights(deep)
    shutil.move(deep, tmp_path / "run" / "checkpoint-10")
    with pytest.raises(CheckpointError, match="DeepSpeed"):
        find_weights(tmp_path / "run")
    fsdp = tmp_path / "fsdp"
    (fsdp / "pytorch_model_fsdp_0").mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (fsdp / "pytorch_model_fsdp_0" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"FSDP.*dcp_to_torch {fsdp}/pytorch_model_fsdp_0 {fsdp}/model\.pt"):
        find_weights(fsdp)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda f, t: torch.save({"model": t, "args": argparse.Namespace(lr=1)}, f / "ckpt.pt"), r"model\.state_dict"),
        (lambda f, t: torch.save(list(t.values()), f / "a.pt"), "not a dictionary of tensors"),
        (lambda f, t: torch.save(prefixed("a.", t) | prefixed("b.", t), f / "a.pt"), "two models"),
        (lambda f, t: torch.save({"encoder.w": torch.zeros(2)}, f / "a.pt"), r"neither .* but encoder\.w"),
        (lambda f, t: (write_shards(f, t), (f / "model-00002-of-00002.safetensors").unlink()), "that is not in the"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Any], words: str
) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tensors_of("setting1"))
    with pytest.raises(CheckpointError, match=words):
        convert_official(tmp_path, tmp_path / "out", num_heads=HEADS)


def test_the_command_says_what_the_model_is(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    byte_tokenizer().save(str(src / "tokenizer.json"))
    in_checkpoint(src, tensors_of("setting1"))
    out = succeed("convert", "official", src, tmp_path / "dst", "--num-heads", HEADS)
    for words in (
        "read " + str(src / "checkpoint-100/pytorch_model.bin"),
        "setting1",
        "parameters in float32, all finite",
        f"heads {HEADS} of head_dim 10",
        "ranks q 6  k 6  v 6  o 6  up dense  down dense",
        f"context {POSITIONS} tokens",
    ):
        assert words in out
    broken = lpa("convert", "official", src / "nowhere", tmp_path / "dst2")
    assert broken.exit_code == 2


TEXTS = [*CORPUS.split("\n"), "Wörter, naïve café; 12 34 5678.", "tabs\tand  two spaces"] * 5


def train_sentencepiece(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=["<sep>"], **{"vocab_size": 380, "model_type": "bpe", "byte_fallback": True, **options},
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


KINDS: dict[str, dict[str, Any]] = {
    "LLaMA's": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True},
    "BPE with NFKC": {},
    "no dummy prefix": {"add_dummy_prefix": False, "normalization_rule_name": "identity"},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 120},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
}


@pytest.fixture(scope="module", params=KINDS)
def sentencepiece_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    return train_sentencepiece(path, **KINDS[request.param]), read_sentencepiece(path, add_bos=False)


WORDS = st.sampled_from(
    [*sorted({word for text in TEXTS for word in text.split()}), "  ", "ﬁ", "日本", "🙂", "12", "½", "<sep>"]
)


@given(words=st.lists(WORDS, max_size=8), joint=st.sampled_from([" ", "", "  "]))
def test_sentencepiece_tokenizers_encode_as_sentencepiece(
    sentencepiece_pair: tuple[sentencepiece.SentencePieceProcessor, Tokenizer], words: list[str], joint: str
) -> None:
    theirs, ours = sentencepiece_pair
    text = joint.join(words)
    if "<sep>" in text:  # a symbol's neighbours lose a space in one of the two, as with Hugging Face's own converters
        assert theirs.piece_to_id("<sep>") in ours.encode(text).ids
        return
    assert ours.encode(text).ids == theirs.encode(text)
    if theirs.unk_id() not in theirs.encode(text):  # SentencePiece writes a sign for it
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text))


def test_a_sentencepiece_tokenizer_is_converted_with_the_model(tmp_path: Path) -> None:
    save_file(tensors_of("setting1"), tmp_path / "model.safetensors")
    theirs = train_sentencepiece(tmp_path / "tokenizer.model", **KINDS["LLaMA's"])
    config = convert_official(tmp_path, tmp_path / "dst", num_heads=HEADS)
    assert (config.bos_token_id, config.eos_token_id) == (theirs.bos_id(), theirs.eos_id())
    tokenizer = Tokenizer.from_file(str(tmp_path / "dst/tokenizer.json"))
    assert tokenizer.encode("Once upon").ids == [theirs.bos_id(), *theirs.encode("Once upon")]
    engine = EngineTokenizer(tokenizer, tiny_config(vocab_size=500, bos_token_id=1, eos_token_id=2))
    ids = theirs.encode("naïve café 🙂 the robot")
    assert b"".join(map(engine.token_bytes, ids)).decode() == " naïve café 🙂 the robot"
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    convert_official(tmp_path, tmp_path / "without", num_heads=HEADS)
    assert Tokenizer.from_file(str(tmp_path / "without/tokenizer.json")).encode("a").ids == theirs.encode("a")


def test_a_sentencepiece_model_of_words_is_refused(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", model_type="word", byte_fallback=False, vocab_size=60)
    with pytest.raises(CheckpointError, match="only BPE and unigram are supported"):
        read_sentencepiece(tmp_path / "tokenizer.model")
