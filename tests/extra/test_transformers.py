"""A model exported with its factors, in transformers and in what is built on it: computes, trains and goes back."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lpa_model.checkpoint import load_config, load_model
from lpa_model.config import Architecture, LPAConfig
from lpa_model.convert.export_transformers import export_transformers
from server.engine.engine import build_engine
from server.engine.request import Request, SamplingParams
from server.settings import embedded_checkpoint, load_settings
from tests.extra.test_export import CASES as SETTING2
from tests.extra.test_lm_eval import MAX_LENGTH, QUESTIONS, TASKS, TEXTS, answer, rolling
from tests.tiny import byte_tokenizer, tiny_config, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # what peft and transformers say of each other

CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "setting1": ("setting1", {}),
    "setting1-mixed": (
        "setting1",
        {
            "attention_rank": {"q": [8, None], "k": [None, 6], "v": 5, "o": None},
            "ffn_rank": {"up": 6, "down": [None, 5]},
            "lm_head_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
        },
    ),
    "head-bias": ("setting2", {"lm_head_bias": True}),
    "ends": ("setting2", {"eos_token_id": (0, 5), "qk_norm": True, "rope_theta": 500.0}),
    **{name: ("setting2", changes) for name, changes in SETTING2.items()},
}
IDS = [(7 * i * i + 3) % 300 for i in range(100)]


def exported(folder: Path, architecture: Architecture, **changes: Any) -> tuple[Path, Path]:
    """A random model as it is and exported."""
    source, target = write_checkpoint(folder / "lpa", tiny_config(architecture, **changes)), folder / "hf"
    export_transformers(source, target, torch.float32)
    return source, target


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


def config_of(folder: Path) -> LPAConfig:
    """With the key of a scaling's kind that transformers 5 writes."""
    config = load_config(folder)
    if config.rope_scaling is None:
        return config
    kind = config.rope_scaling.get("rope_type", config.rope_scaling.get("type"))
    rest = {name: value for name, value in config.rope_scaling.items() if name not in ("type", "rope_type")}
    return dataclasses.replace(config, rope_scaling={"rope_type": kind, **rest})


def our_logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, torch.float32, torch.device("cpu"))
    return model.logits(model(torch.tensor([IDS])))[0]


def greedy(source: Path, ids: list[int], count: int) -> list[int]:
    """By our engine."""
    engine = build_engine(source, load_settings(dtype="float32", threads=1, kv_cache_memory=1 << 20).engine_options())
    engine.add_request(Request("r", ids, SamplingParams(max_tokens=count, temperature=0)))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    return tokens


@pytest.mark.parametrize(("architecture", "changes"), CASES.values(), ids=CASES)
def test_it_computes_the_same(tmp_path: Path, architecture: Architecture, changes: dict[str, Any]) -> None:
    source, folder = exported(tmp_path, architecture, **changes)
    model, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing left over
    expected = our_logits(source)
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        logits = model(ids).logits[0]
        generated = model.generate(ids[:, :60], attention_mask=torch.ones(1, 60), max_new_tokens=20, do_sample=False)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert greedy(source, IDS[:60], 20) == generated[0, 60:].tolist()
    assert model.num_parameters() == load_config(source).parameter_count()

    assert config_of(folder) == config_of(source)  # the folder is a model folder, too
    assert torch.equal(our_logits(folder), expected)
    model.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(source)
    assert torch.equal(our_logits(tmp_path / "saved"), expected)


@pytest.mark.parametrize("architecture", ["setting1", "setting2"])
def test_attention_and_outputs_in_every_way(tmp_path: Path, architecture: Architecture) -> None:
    _, folder = exported(tmp_path, architecture, num_key_value_heads=2)
    written_out, model = load(folder, attn_implementation="eager"), load(folder)
    ids = torch.tensor([IDS[:40]])
    with torch.inference_mode():
        full = model(ids)
        eager = written_out(ids, output_attentions=True, output_hidden_states=True)
        torch.testing.assert_close(eager.logits, full.logits, rtol=0, atol=1e-5)
        assert [tuple(a.shape) for a in eager.attentions] == [(1, 4, 40, 40)] * 2
        assert torch.equal(written_out.lm_head(eager.hidden_states[-1]), eager.logits) and len(eager.hidden_states) == 3
        with pytest.raises(ValueError, match="eager"):
            model(ids, output_attentions=True)
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model()
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=3)
        torch.testing.assert_close(embedded.logits, full.logits[:, -3:], rtol=0, atol=1e-5)
        base = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
        torch.testing.assert_close(model.lm_head(base), full.logits, rtol=0, atol=1e-5)
        assert torch.equal(model(ids, return_dict=False)[0], full.logits)

        # in pieces over a cache, and padded on the left
        first = model(ids[:, :30], use_cache=True)
        cache = first.get("cache", first.get("past_key_values"))
        second = model(ids[:, 30:], past_key_values=cache)
        torch.testing.assert_close(second.logits, full.logits[:, 30:], rtol=0, atol=1e-5)
        padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), ids), dim=1)
        mask = torch.cat((torch.zeros(1, 7, dtype=torch.long), torch.ones_like(ids)), dim=1)
        both = model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert both[0, 47:].tolist() == alone[0, 40:].tolist()


def test_bfloat16_keeps_the_stream_and_the_positions_in_float32(tmp_path: Path) -> None:
    source, folder = exported(tmp_path, "setting2")
    model = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary.inv_freq.dtype == torch.float32
    ours = load_model(source, torch.bfloat16, torch.device("cpu"))
    expected = ours.logits(ours(torch.tensor([IDS])))[0]
    with torch.inference_mode():
        for one in (model, load(folder, dtype=torch.float32).bfloat16()):
            difference = one(torch.tensor([IDS])).logits[0].float() - expected
            assert torch.linalg.vector_norm(difference) < 0.01 * torch.linalg.vector_norm(expected)
            assert one.model.rotary.inv_freq.dtype == torch.float32


class Repeated(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One text, over and over."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(byte_tokenizer().encode("Once upon a time there was a little robot").ids)
        return {"input_ids": ids, "labels": ids}


def train(model: Any, out: Path, **arguments: Any) -> list[float]:
    """Losses of eight steps."""
    options = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
        **arguments,
    )
    trainer = Trainer(model=model, args=options, train_dataset=Repeated())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("architecture", ["setting1", "setting2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_model_goes_back(tmp_path: Path, architecture: Architecture, checkpointing: bool) -> None:
    source, folder = exported(tmp_path, architecture, tie_word_embeddings=architecture == "setting2", ffn_rank=12)
    model = load(folder)
    losses = train(model, tmp_path / "run", gradient_checkpointing=checkpointing)
    assert losses[-1] < 0.7 * losses[0]
    assert model.model.layers[0].attention.q_proj.down.weight.shape == (8, 32)  # still in factors
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "trained")
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(our_logits(tmp_path / "trained"), logits, rtol=0, atol=1e-4)
    assert not torch.allclose(our_logits(source), logits, atol=1e-2)
    assert len(greedy(tmp_path / "trained", IDS[:20], 5)) == 5  # it is served


def test_lora_on_the_factors(tmp_path: Path) -> None:
    import peft

    source, folder = exported(tmp_path, "setting2", ffn_rank=12)
    model = peft.get_peft_model(
        load(folder), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["down", "up"], task_type="CAUSAL_LM")
    )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7 * 2 and all("lora" in name for name in trained)  # two on both factors of each
    losses = train(model, tmp_path / "run")
    assert losses[-1] < 0.9 * losses[0]
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        logits = merged.eval()(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(our_logits(tmp_path / "merged"), logits, rtol=0, atol=1e-4)
    assert config_of(tmp_path / "merged") == config_of(source)


def test_a_new_model_is_made_from_its_config(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, "setting2", rope_scaling={"rope_type": "linear", "factor": 2.0})
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    losses = train(model, tmp_path / "run")
    assert losses[-1] < losses[0] < 2 * math.log(300)
    assert torch.isfinite(model.model.rotary.inv_freq).all() and model.model.rotary.inv_freq[0] == 0.5


def test_the_harness_gets_our_numbers(tmp_path: Path) -> None:
    """lm-evaluation-harness with its own `hf` model."""
    export_transformers(embedded_checkpoint(), tmp_path / "hf", torch.float32)
    documents = {"rolling": [{"text": text} for text in TEXTS], "choice": QUESTIONS}
    for name, rows in documents.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{files}{TASKS[name]}")
    arguments = f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32,max_length={MAX_LENGTH - 2}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--include_path", str(tmp_path), "--tasks", "rolling,choice", "--output_path", str(tmp_path / "out")]
    done = subprocess.run([*command, "--batch_size", "2"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]

    model = load_model(embedded_checkpoint(), torch.float32, torch.device("cpu"))
    total, size = sum(rolling(model, text) for text in TEXTS), sum(len(text.encode()) for text in TEXTS)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    best = []
    for question in QUESTIONS:
        sums = [score for score, _ in answer(model, question)]
        best.append(sums.index(max(sums)) == question["gold"])
    assert results["choice"]["acc,none"] == pytest.approx(sum(best) / len(best))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, "setting1", bos_token_id=7)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("The robot liked thé waves.")["input_ids"]
        == byte_tokenizer().encode("The robot liked thé waves.").ids
    )
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.model_max_length) == (0, 7, 128)
