"""`lpa convert gguf` on files that llama.cpp's own writer has made here: numbers, tokenizers, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from lpa_model.checkpoint import load_config, load_model, load_tokenizer
from lpa_model.convert.gguf import convert_gguf, llama3_scaling
from lpa_model.convert.gguf_tokenizer import PRE_TOKENIZERS
from lpa_model.folder import CheckpointError
from server.engine.tokenizer import load_tokenizer as load_with_template
from server.llm import LLM, SamplingParams
from tests.hub_cache import hub_cache
from tests.llama_oracle import BASE, LLAMA3, YARN, logits_of, rotation, tensors_of
from tests.test_cli import assert_one_line, lpa, succeed
from tests.tiny import VOCAB_SIZE, byte_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def their_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[module] + f".{kind}"


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head in llama.cpp's order: 0, dh/2, 1, dh/2 + 1, ..."""
    size = len(rows) // heads
    order = [head * size + i // 2 + (i % 2) * size // 2 for head in range(heads) for i in range(size)]
    return rows[order]


class File:
    """A GGUF file of a random model with the byte tokenizer; tests change `keys` and `tensors` before `write`."""

    def __init__(self, path: Path, config: dict[str, Any], kind: Kind = Kind.F32) -> None:
        self.path, self.config = path, config
        self.architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
        self.theirs = tensors_of(config)
        self.tensors: dict[str, tuple[np.ndarray[Any, Any], Kind]] = {}
        for name, tensor in self.theirs.items():
            for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if self.architecture == "llama" and part in name:
                    tensor = neighbours(tensor, config[heads])
            self.tensors[their_name(name)] = tensor.numpy(), kind if tensor.ndim == 2 else Kind.F32
        at = self.architecture
        self.keys: dict[str, Any] = {
            f"{at}.block_count": config["num_hidden_layers"],
            f"{at}.context_length": config["max_position_embeddings"],
            f"{at}.embedding_length": config["hidden_size"],
            f"{at}.feed_forward_length": config["intermediate_size"],
            f"{at}.attention.head_count": config["num_attention_heads"],
            f"{at}.attention.head_count_kv": config["num_key_value_heads"],
            f"{at}.attention.key_length": config["head_dim"],
            f"{at}.attention.value_length": config["head_dim"],
            f"{at}.rope.dimension_count": config["head_dim"],
            f"{at}.rope.freq_base": config["rope_theta"],
            f"{at}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            **byte_level_keys(),
        }

    def write(self) -> Path:
        writer = gguf.GGUFWriter(self.path, self.architecture)
        for key, value in self.keys.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)
        for name, (values, kind) in self.tensors.items():
            if kind == Kind.F16:
                writer.add_tensor(name, values.astype(np.float16))
            else:
                writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.path


def byte_level_keys(pre: str = "gpt-2") -> dict[str, Any]:
    model = json.loads(byte_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


KINDS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 6},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_every_architecture_computes_what_its_formulas_say(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {**BASE, **changes}
    file = File(tmp_path / "model.gguf", config)
    out = succeed("convert", "gguf", file.write(), tmp_path / "ours")
    assert "setting2, dense" in out and "float32" in out
    model = load_model(tmp_path / "ours", torch.float32, torch.device("cpu"))
    ids = [(7 * i * i + 3) % config["vocab_size"] for i in range(40)]
    logits = model.logits(model(torch.tensor([ids])))[0].double()
    torch.testing.assert_close(logits, logits_of(config, file.theirs, ids), atol=1e-4, rtol=0)
    assert load_config(tmp_path / "ours").eps == 1e-5


@pytest.mark.parametrize(
    "kind",
    [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0],
    ids=lambda kind: kind.name,
)
def test_quantised_tensors_become_the_numbers_that_they_stand_for(tmp_path: Path, kind: Kind) -> None:
    config = {**BASE, "hidden_size": 32, "intermediate_size": 64}
    file = File(tmp_path / "model.gguf", config, kind)
    convert_gguf(file.write(), tmp_path / "ours")
    found = load_file(tmp_path / "ours/model.safetensors")
    whole = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    for ours, theirs in (
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("layers.1.ffn.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        ("layers.0.attention.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
    ):
        expected = file.theirs[theirs]
        if kind not in (Kind.F16, Kind.BF16):
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(expected.numpy(), kind), kind))
        assert found[ours].dtype == whole
        assert torch.equal(found[ours], expected.to(whole))


def q4_k(scales: Tensor, minima: Tensor, d: float, least: float, values: Tensor) -> tuple[np.ndarray[Any, Any], Tensor]:
    """A block of 256 as Q4_K bytes, and its numbers: scales, minima [8] of six bits, values [8, 32] of four."""
    packed = np.zeros(12, np.uint8)
    for i in range(4):
        packed[i] = int(scales[i]) | (int(scales[4 + i]) >> 4) << 6
        packed[4 + i] = int(minima[i]) | (int(minima[4 + i]) >> 4) << 6
        packed[8 + i] = (int(scales[4 + i]) & 15) | (int(minima[4 + i]) & 15) << 4
    nibbles = [values[2 * i] | values[2 * i + 1] << 4 for i in range(4)]
    head = np.array([d, least], np.float16).view(np.uint8)
    data = np.concatenate([head, packed, torch.cat(nibbles).to(torch.uint8).numpy()])
    d, least = float(np.float16(d)), float(np.float16(least))
    return data, (d * scales[:, None] * values - least * minima[:, None]).flatten()


def test_blocks_of_256_become_numbers(tmp_path: Path) -> None:
    """Q4_K, the most common kind in use, whose blocks are written here by its layout."""
    config = {**BASE, "hidden_size": 32, "intermediate_size": 256}
    file = File(tmp_path / "model.gguf", config)
    generator = torch.Generator().manual_seed(0)
    blocks = [
        q4_k(
            *torch.randint(0, 64, (2, 8), generator=generator),
            0.01,
            0.02,
            torch.randint(0, 16, (8, 32), generator=generator),
        )
        for _ in range(32)
    ]
    name = "blk.0.ffn_down.weight"
    writer_of = file.tensors.pop(name)
    assert writer_of[0].shape == (32, 256)
    packed = np.stack([data for data, _ in blocks])
    original = gguf.quantize
    file.tensors[name] = packed, Kind.Q4_K
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "quantize", lambda v, k: v if k == Kind.Q4_K else original(v, k))
        convert_gguf(file.write(), tmp_path / "ours")
    found = load_file(tmp_path / "ours/model.safetensors")["layers.0.ffn.down_proj.weight"]
    torch.testing.assert_close(found, torch.stack([numbers for _, numbers in blocks]).float(), atol=1e-6, rtol=1e-6)


def test_scalings(tmp_path: Path) -> None:
    for number, (config, keys) in enumerate(
        (
            ({**BASE, "rope_scaling": LLAMA3}, {}),
            (
                {**BASE, "model_type": "qwen2", "rope_scaling": YARN},
                {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            ),
            (
                {**BASE, "rope_scaling": {"type": "linear", "factor": 2.5}},
                {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
            ),
        )
    ):
        file = File(tmp_path / f"{number}.gguf", config)
        file.keys |= {f"{file.architecture}.{key}": value for key, value in keys.items()}
        if not keys:  # as factors of each frequency
            plain, _ = rotation({**config, "rope_scaling": None})
            scaled, _ = rotation(config)
            factors = np.array([a / b for a, b in zip(plain, scaled, strict=True)], np.float32)
            file.tensors["rope_freqs.weight"] = factors, Kind.F32
        convert_gguf(file.write(), tmp_path / f"ours{number}")
        model = load_model(tmp_path / f"ours{number}", torch.float32, torch.device("cpu"))
        ids = [(7 * i * i + 3) % config["vocab_size"] for i in range(40)]
        logits = model.logits(model(torch.tensor([ids])))[0].double()
        torch.testing.assert_close(logits, logits_of(config, file.theirs, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("factor", "original", "high", "head_dim", "theta"),
    [
        (8.0, 8192, 4.0, 128, 5e5),  # Llama 3.1
        (32.0, 8192, 4.0, 64, 5e5),  # Llama 3.2
        (5.0, 3000, 7.5, 128, 1e6),
    ],
)
def test_llama3_parameters_are_found_in_its_factors(
    factor: float, original: int, high: float, head_dim: int, theta: float
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = {"head_dim": head_dim, "rope_theta": theta}
    plain, _ = rotation(config)
    scaled, _ = rotation({**config, "rope_scaling": scaling})
    factors = torch.tensor([a / b for a, b in zip(plain, scaled, strict=True)], dtype=torch.float32)
    assert llama3_scaling(Path("x"), factors, theta) == scaling
    assert llama3_scaling(Path("x"), torch.ones(head_dim // 2), theta) is None
    factors[3] *= 1.5
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has factors that are none of Llama 3's"):
        llama3_scaling(Path("x"), factors, theta)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_byte_level_tokenizer_comes_back_exactly(tmp_path: Path, pre: str) -> None:
    """Every text comes back from its tokens, and the pieces are cut where the kind cuts: digits tell them apart."""
    file = File(tmp_path / "model.gguf", BASE)
    file.keys |= byte_level_keys(pre)
    file.keys |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": False}
    convert_gguf(file.write(), tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours")
    text = "  The robot's 12345 waves,\n\n\tnaïve 你好 ½ I'LL DON't"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    runs = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 12345")]
    digits = {"gpt-2": [5], "olmo": [5], **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), [1] * 5)}
    digits |= dict.fromkeys(("qwen2", "tekken"), [1] * 5)
    assert [len(run.strip("Ġ")) for run in runs if run.strip("Ġ").isdigit()] == digits.get(pre, [3, 2])
    if pre == "gpt-2":
        assert tokenizer.encode(text).ids == byte_tokenizer().encode(text).ids


def test_beginnings_and_ends_of_texts(tmp_path: Path) -> None:
    """add_bos_token, add_eos_token, their defaults, eot tokens, and several chat templates."""

    def ids(number: int, **keys: Any) -> list[int]:
        file = File(tmp_path / f"{number}.gguf", BASE)
        file.keys |= {f"tokenizer.{key}".replace("__", "."): value for key, value in keys.items()}
        convert_gguf(file.write(), tmp_path / f"ours{number}")
        return load_tokenizer(tmp_path / f"ours{number}").encode("a b").ids

    plain = byte_tokenizer().encode("a b").ids
    assert ids(0) == plain
    assert ids(1, ggml__bos_token_id=5, ggml__add_bos_token=True) == [5, *plain]
    assert ids(2, ggml__bos_token_id=5, ggml__add_bos_token=True, ggml__add_eos_token=True) == [5, *plain, 0]
    assert ids(3, ggml__bos_token_id=5, ggml__pre="llama-bpe")[0] == 5  # Llama 3's do without being told
    tokens = [*byte_level_keys()["tokenizer.ggml.tokens"][:-1], "<|im_end|>"]
    merges = byte_level_keys()["tokenizer.ggml.merges"][:-1]
    types = [3] + [1] * (VOCAB_SIZE - 2) + [3]
    named = {"ggml__tokens": tokens, "ggml__token_type": types, "ggml__merges": merges, "ggml__eot_token_id": 7}
    ids(4, **named, chat_template=TEMPLATE, chat_templates=["tool_use"], chat_template__tool_use="{{ 1 }}")
    assert load_config(tmp_path / "ours4").eos_token_ids == (0, 7, 299)
    assert json.loads((tmp_path / "ours4/generation_config.json").read_text())["eos_token_id"] == [0, 7, 299]
    found = load_with_template(tmp_path / "ours4", load_config(tmp_path / "ours4"))
    assert found.chat_template == TEMPLATE
    assert found.encode("x<|im_end|>")[-1] == 299
    assert found.tokenizer_config["chat_template"][1] == {"name": "tool_use", "template": "{{ 1 }}"}


def test_a_chat_ends_at_its_end_token(tmp_path: Path) -> None:
    file = File(tmp_path / "model.gguf", BASE)
    file.keys["tokenizer.chat_template"] = TEMPLATE
    file.tensors["output.weight"][0][0] = 100 * file.tensors["output.weight"][0][0]  # it soon gives token 0
    convert_gguf(file.write(), tmp_path / "ours")
    assert (tmp_path / "ours/chat_template.jinja").read_text() == TEMPLATE
    with LLM(tmp_path / "ours", dtype="float32", threads=1, kv_cache_memory=1 << 20) as llm:
        completions = llm.generate(["The robot", "a"], SamplingParams(max_tokens=40, seed=1))
    assert any(completion.finish_reason == "stop" for completion in completions)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["▁", "t", "h", "e", "▁t", "he", "▁the", "r", "er", "re", "▁r", "x"]


def test_a_sentencepiece_vocabulary_merges_by_its_scores(tmp_path: Path) -> None:
    tokens = [*PIECES, *WORDS, "<|im_end|>", "[TOOL]"]
    scores = [0.0] * len(PIECES) + [-float(i) for i in range(len(WORDS))] + [-1000.0, -1000.0]
    file = File(tmp_path / "model.gguf", {**BASE, "vocab_size": len(tokens)})
    file.keys = {key: value for key, value in file.keys.items() if not key.startswith("tokenizer")}
    file.keys |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS) + [3, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    convert_gguf(file.write(), tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours")
    for text in ("the there", "x", "", " the", "naïve\nthe", "rere", "the<|im_end|>the", "a[TOOL]x"):
        assert tokenizer.encode(text).tokens == ["<s>", *merged(text, tokens, scores)], text
    assert tokenizer.decode(tokenizer.encode("the naïve\nx").ids) == "the naïve\nx"
    assert load_config(tmp_path / "ours").eos_token_ids == (2, tokens.index("<|im_end|>"))
    served = load_with_template(tmp_path / "ours", load_config(tmp_path / "ours"))
    assert served.decode(served.encode("the naïve\nx")) == "the naïve\nx"
    file.keys["tokenizer.ggml.add_space_prefix"] = False
    file.path = tmp_path / "other.gguf"
    convert_gguf(file.write(), tmp_path / "other")
    assert load_tokenizer(tmp_path / "other").encode("the").tokens == ["<s>", "t", "he"]


def merged(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece's BPE: join the pair whose piece has the highest score, the leftmost first; unknown characters
    as bytes. Each part of a text between special tokens begins with a space."""
    found: list[str] = []
    for special in ("<|im_end|>", "[TOOL]"):
        if special in text:
            before, after = text.split(special, 1)
            return [*merged(before, tokens, scores), special, *merged(after, tokens, scores)]
    if not text:
        return []
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(i, a + b) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        pairs = [(scores[tokens.index(piece)], -i) for i, piece in joined if piece in WORDS]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    for part in parts:
        found += [part] if part in WORDS else [f"<0x{byte:02X}>" for byte in part.encode()]
    return found


def test_files_of_a_split(tmp_path: Path) -> None:
    file = File(tmp_path / "model-00001-of-00002.gguf", BASE)
    names = list(file.tensors)
    second = File(tmp_path / "model-00002-of-00002.gguf", BASE)
    second.keys = {}
    second.tensors = {name: second.tensors[name] for name in names[5:]}
    file.tensors = {name: file.tensors[name] for name in names[:5]}
    second.write()
    convert_gguf(file.write(), tmp_path / "ours")
    load_model(tmp_path / "ours", torch.float32, torch.device("cpu"))
    second.path.unlink()
    assert_one_line(lpa("convert", "gguf", file.path, tmp_path / "more"), "model-00002-of-00002.gguf: no such file")


def key(name: str, value: Any) -> Callable[[File], None]:
    return lambda file: file.keys.__setitem__(name, value)


def tensor(name: str, values: Any) -> Callable[[File], None]:
    return lambda file: file.tensors.__setitem__(name, (np.array(values, np.float32), Kind.F32))


def architecture(file: File) -> None:
    file.architecture = "gemma3"


REFUSED: dict[str, tuple[Callable[[File], Any], str]] = {
    "architecture": (architecture, "general.architecture 'gemma3' is not supported (llama, qwen2, qwen3 are)"),
    "experts": (key("llama.expert_count", 8), "llama.expert_count 8 is not supported"),
    "window": (key("llama.attention.sliding_window", 32), "llama.attention.sliding_window 32 is shorter"),
    "half of a head": (key("llama.rope.dimension_count", 4), "llama.rope.dimension_count 4 is not the 8"),
    "scaling": (key("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type 'longrope' is not supported"),
    "no context": (key("llama.context_length", None), "llama.context_length None is not one whole number"),
    "widths by layer": (key("llama.feed_forward_length", [40, 48]), "llama.feed_forward_length [40, 48]"),
    "factors": (tensor("rope_freqs.weight", [1, 2, 1, 3]), "rope_freqs.weight has factors that are none of Llama 3's"),
    "extra tensor": (tensor("blk.0.ffn_gate_inp.weight", [1]), "unexpected tensor blk.0.ffn_gate_inp.weight"),
    "missing tensor": (lambda file: file.tensors.pop("blk.1.ffn_up.weight"), "missing tensor"),
    "wrong shape": (tensor("blk.1.attn_norm.weight", [1] * 23), "blk.1.attn_norm.weight has shape [23]"),
    "NaN": (tensor("output_norm.weight", [float("nan")] * 24), "output_norm.weight has 24 of 24 numbers that are NaN"),
    "bias of o": (tensor("blk.0.attn_output.bias", [1] * 24), "blk.0.attn_output.bias is not zero"),
    "pre-tokenizer": (key("tokenizer.ggml.pre", "klingon"), "tokenizer.ggml.pre 'klingon' is not supported (gpt-2,"),
    "no pre-tokenizer": (key("tokenizer.ggml.pre", None), "tokenizer.ggml.pre is missing"),
    "tokenizer": (key("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model 'bert' is not supported"),
    "no tokenizer": (key("tokenizer.ggml.tokens", None), "the file has no tokenizer"),
    "types": (key("tokenizer.ggml.token_type", [1, 1]), "tokenizer.ggml.token_type does not have a number for each"),
    "merges": (key("tokenizer.ggml.merges", ["ab"]), "tokenizer.ggml.merges has 'ab', which is no pair"),
    "eos": (key("tokenizer.ggml.eos_token_id", 300), "tokenizer.ggml.eos_token_id 300 is none of"),
    "bos": (key("tokenizer.ggml.add_bos_token", True), "add_bos_token is true, and there is no bos_token_id"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_named_and_leaves_nothing(
    tmp_path: Path, change: Callable[[File], Any], message: str
) -> None:
    file = File(tmp_path / "model.gguf", BASE)
    change(file)
    assert_one_line(lpa("convert", "gguf", file.write(), tmp_path / "ours"), re.escape(message))
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    file = File(tmp_path / "model.gguf", {**BASE, "vocab_size": 290})
    assert_one_line(lpa("convert", "gguf", file.write(), tmp_path / "ours"), "has 300 tokens and the model 290")


def test_files_that_are_cut_off_or_none(tmp_path: Path) -> None:
    path = File(tmp_path / "model.gguf", BASE).write()
    whole = path.read_bytes()
    for size in (0, 3, 20, 400, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        assert_one_line(lpa("convert", "gguf", path, tmp_path / "ours"), "truncated or not a GGUF file")
    path.write_bytes(b"PK" + whole[2:])
    assert_one_line(lpa("convert", "gguf", path, tmp_path / "ours"), "truncated or not a GGUF file")
    assert_one_line(lpa("convert", "gguf", tmp_path / "none.gguf", tmp_path / "ours"), "none.gguf: no such file")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_quantisation_that_the_reader_lacks(tmp_path: Path) -> None:
    file = File(tmp_path / "model.gguf", {**BASE, "hidden_size": 32, "intermediate_size": 64}, Kind.Q8_0)
    whole = file.write().read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and two of them
    assert whole[at] == Kind.Q8_0
    for kind, message in (
        (99, "quantisation type 99 is none that the reader has"),
        (Kind.Q8_1, "ffn_up.weight is quantised as Q8_1, which the reader cannot undo"),
    ):
        file.path.write_bytes(whole[:at] + bytes([kind, 0, 0, 0]) + whole[at + 4 :])
        assert_one_line(lpa("convert", "gguf", file.path, tmp_path / "ours"), message)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_gguf_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    path = File(tmp_path / "model.gguf", BASE).write()
    assert_one_line(lpa("generate", "a", "--model", path), "is a GGUF file; `lpa convert gguf")
    assert "setting2, dense" in succeed("convert", "llama", path, tmp_path / "ours")
    assert isinstance(load_tokenizer(tmp_path / "ours"), Tokenizer)


def test_a_gguf_file_of_the_hub(tmp_path: Path, hub: Path) -> None:
    (tmp_path / "theirs").mkdir()
    File(tmp_path / "theirs/model.gguf", BASE).write()
    hub_cache(hub, "someone/quantised", tmp_path / "theirs")
    asked = ("convert", "llama", "someone/quantised", tmp_path / "ours")
    assert_one_line(lpa(*asked), "no config.json; `lpa convert llama --file NAME.gguf` takes a GGUF file")
    assert_one_line(lpa(*asked, "--file", "other.gguf"), "someone/quantised: has no file other.gguf")
    assert "setting2, dense" in succeed(*asked, "--file", "model.gguf")
