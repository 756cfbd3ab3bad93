"""lm-evaluation-harness itself, on tasks over local files, against `lpa serve`: equals plain loops in this process."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lpa_model.checkpoint import load_model, load_tokenizer
from lpa_model.convert.export import export_llama
from lpa_model.model import LPAForCausalLM
from server.settings import embedded_checkpoint
from tests.processes import lpa_serve
from tests.test_perplexity import harness_windows
from tests.tiny import CORPUS

ROOT = Path(__file__).parent.parent.parent
MAX_LENGTH = 50  # the harness', which counts a generated token
GENERATED = 16
TEXTS = [
    CORPUS,
    "He came to the door at last, and knocked.\n\nNobody answered.  “Where are they?” he asked himself, twice.",
    "🙂 naïve",
    "the",
]
QUESTIONS: list[dict[str, Any]] = [
    {"context": "The old man sat down by the", "choices": ["fire", "purple arithmetic", "window and slept"], "gold": 0},
    {"context": "She opened the door and went", "choices": ["out into the garden", "of", "in"], "gold": 0},
    {"context": "“I do not know,” said the", "choices": ["sea of the sea", "King", "naïve 🙂"], "gold": 1},
    {"context": "Once upon a time there was a ", "choices": ["little girl who lived in a house", "was"], "gold": 0},
    {"context": "He was very tired, for he had walked all", "choices": ["day", "the way", "cheese"], "gold": 0},
]
PROMPTS = [
    "The King said to the little",
    "There was once a man who",
    "“Come,” said he, “and",
    "It was a dark night, and",
]
TASKS = {
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "generation": f"""\
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [","], max_gen_toks: {GENERATED}, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
""",
}


# --- the same in this process ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LPAForCausalLM:
    return load_model(embedded_checkpoint(), torch.float32, torch.device("cpu"))


def encode(text: str) -> list[int]:
    ids: list[int] = load_tokenizer(embedded_checkpoint()).encode(text, add_special_tokens=False).ids
    return ids


def loglikelihood(model: LPAForCausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Sum over the continuation's tokens, and whether each is the most probable."""
    ids = context + continuation
    rows = model.logits(model(torch.tensor([ids])))[0].double()
    total, greedy = 0.0, True
    for place in range(len(context), len(ids)):
        row = rows[place - 1]
        total += (row[ids[place]] - torch.logsumexp(row, 0)).item()
        greedy = greedy and int(row.argmax()) == ids[place]
    return total, greedy


def rolling(model: LPAForCausalLM, text: str) -> float:
    """Windows of one token of context and MAX_LENGTH - 2 that are predicted; EOS, 0, before the first."""
    return sum(loglikelihood(model, *window)[0] for window in harness_windows(encode(text), 0, MAX_LENGTH - 2))


def answer(model: LPAForCausalLM, question: dict[str, Any]) -> list[tuple[float, bool]]:
    """Of each choice. White space at the end of the context belongs to what follows, as tokens have it."""
    context = question["context"].rstrip()
    start = encode(context)
    found = []
    for choice in question["choices"]:
        whole = encode(f"{question['context']} {choice}")
        found.append(loglikelihood(model, whole[: len(start)], whole[len(start) :]))
    return found


def generate(model: LPAForCausalLM, prompt: str) -> str:
    ids = encode(prompt)
    start = len(ids)
    while len(ids) < start + GENERATED:
        ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    text: str = load_tokenizer(embedded_checkpoint()).decode(ids[start:], skip_special_tokens=False)
    return re.split(r",|<\|endoftext\|>", text)[0]


# --- the harness ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`lpa serve` on the embedded model in float32."""
    log = tmp_path_factory.mktemp("serve") / "stdout"
    with lpa_serve(log, "--dtype", "float32", "--threads", 1) as (found, process):
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model: LPAForCausalLM) -> Path:
    """A folder of tasks. Every second prompt's wanted answer is what the model says."""
    folder = tmp_path_factory.mktemp("tasks")
    generations = [
        {"prompt": prompt, "answer": "something else" if i % 2 else generate(model, prompt)}
        for i, prompt in enumerate(PROMPTS)
    ]
    documents = {"rolling": [{"text": text} for text in TEXTS], "choice": QUESTIONS, "generation": generations}
    documents["long"] = [{"context": CORPUS, "choices": [CORPUS[:40], "fire"], "gold": 0}]
    for name, rows in documents.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}{TASKS['choice' if name == 'long' else name]}")
    return folder


def run_harness(
    url: str, tasks: Path, out: Path, batch_size: int, **more: object
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Its results by task, and each task's responses by document."""
    arguments = {"model": "lpa-tiny", "base_url": f"{url}/v1/completions", "tokenized_requests": True}
    arguments |= {"max_length": MAX_LENGTH, "max_retries": 1, **more}
    command = ["lm_eval", "run", "--model", "local-completions", "--batch_size", str(batch_size)]
    return run_command(command, arguments, tasks, out, TASKS)


def run_command(
    command: list[str], arguments: dict[str, Any], tasks: Path, out: Path, names: Iterable[str]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The same of any module and model."""
    command = [sys.executable, "-m", *command, "--model_args"]
    command += [",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(tasks), "--tasks", ",".join(names), "--output_path", str(out), "--log_samples"]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "HF_HOME": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr[-10_000:]
    (results,) = out.rglob("results_*.json")
    samples = {}
    for name in names:
        (path,) = out.rglob(f"samples_{name}_*.jsonl")
        rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
        samples[name] = [row["resps"] for row in rows]
    found: dict[str, Any] = json.loads(results.read_text())["results"]
    return found, samples


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_the_harness_gets_the_numbers_of_plain_loops(
    url: str, tasks: Path, model: LPAForCausalLM, tmp_path: Path, backend: str
) -> None:
    if backend == "huggingface":
        export_llama(embedded_checkpoint(), tmp_path / "llama", torch.float32)
        more = {"tokenizer": tmp_path / "llama", "num_concurrent": 1}
        results, responses = run_harness(url, tasks, tmp_path, 1, tokenizer_backend=backend, **more)
    else:  # the server's own, and several prompts in several requests at a time
        results, responses = run_harness(url, tasks, tmp_path, 3, tokenizer_backend=backend, num_concurrent=2)

    sums = [rolling(model, text) for text in TEXTS]
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert results["rolling"]["word_perplexity,none"] == pytest.approx(math.exp(-sum(sums) / words), rel=1e-5)
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(-sum(sums) / size), rel=1e-5)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(-sum(sums) / size / math.log(2), rel=1e-5)

    answers = [answer(model, question) for question in QUESTIONS]
    for found, expected in zip(responses["choice"], answers, strict=True):
        for ((sum_found, greedy),), (total, is_greedy) in zip(found, expected, strict=True):
            assert float(sum_found) == pytest.approx(total, rel=1e-5)
            assert str(greedy) == str(is_greedy)
    best, best_by_length = [], []
    for question, expected in zip(QUESTIONS, answers, strict=True):
        totals = [total for total, _ in expected]
        normed = [total / len(choice) for total, choice in zip(totals, question["choices"], strict=True)]
        best.append(totals.index(max(totals)) == question["gold"])
        best_by_length.append(normed.index(max(normed)) == question["gold"])
    assert 0 < sum(best) < len(best)
    assert best != best_by_length
    assert results["choice"]["acc,none"] == pytest.approx(sum(best) / len(best))
    assert results["choice"]["acc_norm,none"] == pytest.approx(sum(best_by_length) / len(best))

    assert responses["generation"] == [[[generate(model, prompt)]] for prompt in PROMPTS]
    assert results["generation"]["exact_match,none"] == 0.5

    asked = {"model": "lpa-tiny", "input": TEXTS, "method": "rolling", "max_length": MAX_LENGTH - 1}
    request = urllib.request.Request(
        f"{url}/v1/perplexity", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        own = json.load(response)["aggregate"]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert own[name] == pytest.approx(results["rolling"][f"{name},none"], rel=1e-6)


def numbers(responses: list[Any]) -> list[Any]:
    """The harness logs numbers as texts."""

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return [read(entry) for entry in value]
        try:
            return float(value)
        except ValueError:
            return value

    return [read(response) for response in responses]


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for entry in value:
            yield from flat(entry)
    else:
        yield value


def test_the_model_lpa_gets_the_numbers_of_hf(url: str, tasks: Path, model: LPAForCausalLM, tmp_path: Path) -> None:
    """Prompts that are too long, too, which both cut at their beginning."""
    export_llama(embedded_checkpoint(), tmp_path / "llama", torch.float32)
    fed = MAX_LENGTH - 2
    names = [*TASKS, "long"]
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    own.mkdir()
    theirs.mkdir()
    command = ["server.lm_eval", "run", "--model", "lpa"]
    found = run_command(command, {"base_url": url, "max_length": fed}, tasks, own, names)
    asked = {"pretrained": tmp_path / "llama", "dtype": "float32", "max_length": fed}
    command = ["lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "2"]
    wanted = run_command(command, asked, tasks, theirs, names)
    for name in names:
        pairs = list(zip(flat(numbers(found[1][name])), flat(numbers(wanted[1][name])), strict=True))
        assert pairs
        for mine, their in pairs:
            assert mine == (pytest.approx(their, rel=1e-4) if isinstance(their, float) else their)
        for metric, value in wanted[0][name].items():
            if isinstance(value, float):
                assert found[0][name][metric] == pytest.approx(value, rel=1e-4), metric
    sums = [rolling(model, text) for text in TEXTS]
    size = sum(len(text.encode()) for text in TEXTS)
    assert found[0]["rolling"]["bits_per_byte,none"] == pytest.approx(-sum(sums) / size / math.log(2), rel=1e-5)


def test_the_model_lpa_without_a_limit(url: str, tasks: Path, model: LPAForCausalLM, tmp_path: Path) -> None:
    command = ["server.lm_eval", "run", "--model", "lpa"]
    _, responses = run_command(command, {"base_url": url}, tasks, tmp_path, TASKS)
    for found, expected in zip(responses["choice"], [answer(model, question) for question in QUESTIONS], strict=True):
        for ((sum_found, greedy),), (total, is_greedy) in zip(found, expected, strict=True):
            assert float(sum_found) == pytest.approx(total, rel=1e-5)
            assert str(greedy) == str(is_greedy)
    assert responses["generation"] == [[[generate(model, prompt)]] for prompt in PROMPTS]
