"""`lpa score` in this process: what it reads, every method against plain loops, tokens, tables, and mistakes."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from typer.testing import Result

from lpa_model.checkpoint import save_checkpoint
from lpa_model.config import Architecture
from lpa_model.perplexity import Method
from server.engine.model_runner import BatchResult, ModelRunner
from server.engine.scheduler import ScheduledBatch
from server.llm import LLM
from server.scoring import local
from server.scoring.texts import Source, find_files, read_texts, total_size
from tests.test_cli import assert_one_line, lpa, succeed
from tests.test_perplexity import NAIVE, convention
from tests.tiny import CORPUS, END_OF_TEXT_ID, byte_tokenizer, random_model, tiny_config

TEXT = 'The robot said: "çava, 你好 🙂" and the waves'


def write(path: Path, content: str | bytes) -> Path:
    """A file, gzipped if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def json_lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture(scope="module")
def bos_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a BOS token, whose tokenizer adds it."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().to_str())
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.post_processor = template  # type: ignore[assignment]  # its stub has a narrower type
    folder = tmp_path_factory.mktemp("bos") / "model"
    config = tiny_config("setting2", bos_token_id=END_OF_TEXT_ID)
    save_checkpoint(folder, random_model(config), tokenizer, torch.float32)
    return folder


# --- texts -----------------------------------------------------------------------------------------------------------


def texts_of(*names: object, field: str | None = None) -> list[tuple[str, str]]:
    files = find_files([str(name) for name in names], field)
    return [(str(source), text) for source, text in read_texts(files, field)]


def test_a_file_is_a_text_as_it_stands(tmp_path: Path) -> None:
    content = "Vögel\r\n\n and the sea\n"
    plain, packed = write(tmp_path / "a.txt", content), write(tmp_path / "b.txt.gz", content)
    assert texts_of(plain, packed) == [(str(plain), content), (str(packed), content)]
    assert total_size([str(plain), str(packed)]) == plain.stat().st_size + packed.stat().st_size
    assert total_size([str(plain), "-"]) is None
    sizes = [source.size for source, _ in read_texts([str(plain), str(packed)], None)]
    assert sizes == [plain.stat().st_size, packed.stat().st_size]


def test_a_line_of_json_is_a_text(tmp_path: Path) -> None:
    lines = json_lines({"text": "the sea"}, {"text": "", "id": 3}) + " \n\n" + json_lines({"text": TEXT})
    for path in (write(tmp_path / "a.jsonl", lines), write(tmp_path / "b.jsonl.gz", lines)):
        assert texts_of(path, field="text") == [(f"{path}:1", "the sea"), (f"{path}:2", ""), (f"{path}:5", TEXT)]
    sources = [source for source, _ in read_texts([str(tmp_path / "a.jsonl")], "text")]
    assert sum(source.size for source in sources) <= len(lines)
    assert [source.fields()["line"] for source in sources] == [1, 2, 5]


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.TXT", ".hidden.txt", ".git/d.txt", "e.py", "f.jsonl", "a/g.jsonl.gz"):
        write(tmp_path / name, "{}")
    write(tmp_path / "a/packed.txt.gz", "x")
    assert find_files([str(tmp_path)], None) == [
        str(tmp_path / name) for name in ("a/c.TXT", "a/packed.txt.gz", "a/z.md", "b.txt")
    ]
    assert find_files([str(tmp_path)], "text") == [str(tmp_path / name) for name in ("a/g.jsonl.gz", "f.jsonl")]
    with pytest.raises(ValueError, match=r"\.git: has no \.jsonl or \.ndjson file"):
        find_files([str(tmp_path / ".git")], "text")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "a.jsonl:2: not JSON"),
        (b'"text"', "a.jsonl:2: not an object with a field 'text'"),
        (b'{"txt": "a"}', "a.jsonl:2: not an object with a field 'text'"),
        (b'{"text": null}', "a.jsonl:2: field 'text' is not a text"),
        (b'{"text": "a\\ud800"}', "a.jsonl:2: half a surrogate pair at character 1"),
        (b'{"text": "caf\xe9"}', "a.jsonl:2: not UTF-8 at byte 13"),
    ],
)
def test_a_line_that_is_no_text_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "the sea"}\n' + line)
    texts = read_texts([str(path)], "text")
    assert next(texts)[1] == "the sea"
    with pytest.raises(ValueError, match=re.escape(message)):
        next(texts)


def test_files_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", "a")
    texts = read_texts([str(first), str(tmp_path / "later.txt")], None)
    assert next(texts)[1] == "a"
    write(tmp_path / "later.txt", "b")
    assert next(texts)[1] == "b"


def test_texts_are_read_only_as_far_ahead_as_the_engine_needs(tiny_checkpoints: dict[Architecture, Path]) -> None:
    numbers = itertools.count()
    texts = ((Source("endless", i, 1), "the sea" if i % 3 else "") for i in numbers)
    told: list[float] = []
    with LLM(tiny_checkpoints["setting2"], dtype="float32", threads=1, max_num_seqs=4) as llm:
        lines = local.score_texts(llm, llm.convention("full"), texts, lambda size, tokens: told.append(size))
        assert [line["line"] for line in itertools.islice(lines, 5)] == [0, 1, 2, 3, 4]
        assert next(numbers) <= 5 + 2 * 4
        assert told == [1] * 5


# --- numbers ---------------------------------------------------------------------------------------------------------


def answer_of(*arguments: object, stdin: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("score", *arguments, "--dtype", "float32", "--json", stdin=stdin))
    return found


def test_the_sums_of_each_file_and_of_all(tiny_checkpoint: Path, architecture: Architecture, tmp_path: Path) -> None:
    model = random_model(tiny_config(architecture))
    texts = [CORPUS[:120], "Vögel, and the sea.\r\nThe end", "the waves"]
    files = [write(tmp_path / "plain.txt", texts[0]), write(tmp_path / "packed.txt.gz", texts[1]), "-"]
    answer = answer_of(*files, "--model", tiny_checkpoint, "--method", "full", stdin=texts[2])
    assert [entry["file"] for entry in answer["data"]] == [str(file) for file in files]
    assert (answer["method"], answer["max_length"], answer["stride"], answer["dtype"]) == ("full", 128, None, "float32")
    assert (answer["add_bos"], answer["prefix_token_id"], answer["model"]) == (False, None, tiny_checkpoint.name)
    expected = []
    for text in texts:
        nlls = NAIVE["full"](model, byte_tokenizer().encode(text).ids, convention("full", 128))
        expected.append((math.fsum(nlls), len(nlls), len(text.encode()), len(re.split(r"\s+", text))))
    total = [sum(column) for column in zip(*expected, strict=True)]
    for entry, (nll, tokens, size, words) in zip(
        [*answer["data"], answer["aggregate"]], [*expected, total], strict=True
    ):
        assert entry["nll_sum"] == pytest.approx(nll, rel=1e-5)
        assert (entry["num_tokens"], entry["num_bytes"], entry["num_words"]) == (tokens, size, words)
        assert entry["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert entry["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
        assert entry["word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-5)
    assert answer["aggregate"]["num_texts"] == 3
    means = [math.exp(nll / tokens) for nll, tokens, _, _ in expected]
    assert answer["aggregate"]["mean_perplexity"] == pytest.approx(sum(means) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "flags", "stride", "prefix"),
    [
        ("sliding", ["--stride", 7], 7, None),
        ("sliding", [], 12, None),
        ("rolling", [], None, END_OF_TEXT_ID),
        ("chunks", [], None, None),
    ],
)
def test_every_method_is_its_loop(
    tiny_checkpoints: dict[Architecture, Path],
    tmp_path: Path,
    method: Method,
    flags: list[object],
    stride: int | None,
    prefix: int | None,
) -> None:
    ids = byte_tokenizer().encode(CORPUS).ids
    nlls = NAIVE[method](random_model(tiny_config()), ids, convention(method, 25, stride, prefix))
    path = write(tmp_path / "corpus.txt", CORPUS)
    asked = ["--method", method, "--max-length", 25, *flags]
    answer = answer_of(path, "--model", tiny_checkpoints["setting2"], *asked)
    assert answer["stride"] == stride
    assert answer["prefix_token_id"] == prefix
    assert answer["aggregate"]["num_tokens"] == len(nlls)
    assert answer["aggregate"]["nll_sum"] == pytest.approx(math.fsum(nlls), rel=1e-5)


def test_bos_is_the_tokenizers_own_setting_unless_it_is_said(bos_checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    model, ids = random_model(tiny_config()), byte_tokenizer().encode(TEXT).ids
    for flags, prefix in (([], END_OF_TEXT_ID), (["--add-bos"], END_OF_TEXT_ID), (["--no-add-bos"], None)):
        nlls = NAIVE["full"](model, ids, convention("full", 128, None, prefix))
        answer = answer_of(path, "--model", bos_checkpoint, "--method", "full", *flags)
        assert (answer["add_bos"], answer["prefix_token_id"]) == (prefix is not None, prefix)
        assert answer["data"][0]["num_tokens"] == len(nlls)
        assert answer["data"][0]["nll_sum"] == pytest.approx(math.fsum(nlls), rel=1e-5)


def test_long_texts_slide_by_default(tiny_checkpoints: dict[Architecture, Path], tmp_path: Path) -> None:
    path = write(tmp_path / "long.txt", CORPUS * 2)
    answer = answer_of(path, "--model", tiny_checkpoints["setting2"])
    assert (answer["method"], answer["max_length"], answer["stride"]) == ("sliding", 128, 64)
    assert answer["aggregate"]["num_tokens"] == len(byte_tokenizer().encode(CORPUS * 2).ids) - 1


def test_every_token_is_written(
    tiny_checkpoints: dict[Architecture, Path], bos_checkpoint: Path, tmp_path: Path
) -> None:
    path, out = write(tmp_path / "a.jsonl", json_lines({"text": ""}, {"text": TEXT})), tmp_path / "tokens.jsonl"
    model, ids = random_model(tiny_config()), byte_tokenizer().encode(TEXT).ids
    distributions = model.logits(model(torch.tensor([ids])))[0].double().log_softmax(-1)
    asked = (path, "--field", "text", "--method", "full", "--tokens", out)
    answer = answer_of(*asked, "--model", tiny_checkpoints["setting2"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ids
    assert {(row["file"], row["line"]) for row in rows} == {(str(path), 2)}
    assert set(rows[0]) == {"file", "line", "id", "text", "offset", "logprob", "surprisal", "entropy", "rank"}
    assert (rows[0]["logprob"], rows[0]["rank"], rows[0]["offset"]) == (None, None, 0)
    for i, row in enumerate(rows[1:], 1):
        own = distributions[i - 1, ids[i]]
        assert row["logprob"] == pytest.approx(own.item(), rel=1e-5, abs=1e-5)
        assert row["rank"] == 1 + int((distributions[i - 1] > own).sum())
        if not row["text"].startswith("bytes:"):
            assert TEXT.startswith(row["text"], row["offset"])
    assert -math.fsum(row["logprob"] for row in rows[1:]) == pytest.approx(answer["aggregate"]["nll_sum"], rel=1e-12)

    asked = (path, "--field", "text", "--method", "chunks", "--max-length", 8, "--tokens", out)
    refused = lpa("score", *asked, "--model", bos_checkpoint, "--dtype", "float32")
    assert_one_line(refused, "a.jsonl:1: has 1 tokens with BOS; method 'chunks' needs at least 16")
    write(path, json_lines({"text": f"<|endoftext|>{TEXT}"}))
    answer_of(*asked, "--model", bos_checkpoint)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ids  # the text's own BOS is the one that is added anyway
    assert rows[0]["offset"] == len("<|endoftext|>")
    whole = (len(ids) + 1) // 8
    scored = [i for i, row in enumerate(rows) if row["logprob"] is not None]
    assert scored == [8 * chunk + place - 1 for chunk in range(whole) for place in (5, 6, 7)]


# --- tables ----------------------------------------------------------------------------------------------------------


def cells(table: str) -> list[list[str]]:
    rows = (line for line in table.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows]


def test_few_texts_are_all_in_the_table(tiny_checkpoints: dict[Architecture, Path], tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate(("the sea", "", CORPUS[:90]))]
    asked = (*files, "--model", tiny_checkpoints["setting2"], "--dtype", "float32", "--method", "full")
    table, answer = succeed("score", *asked), answer_of(*asked)
    expected = [
        [
            entry.get("file", "total"),
            f"{entry['num_tokens']:,}",
            f"{entry['nll_sum']:,.3f}",
            f"{entry['perplexity']:.4f} ± {entry['perplexity_stderr']:.4f}" if entry["num_tokens"] else "-",
            f"{entry['bits_per_byte']:.4f}" if entry["num_tokens"] else "-",
        ]
        for entry in [*answer["data"], answer["aggregate"]]
    ]
    assert cells(table) == expected
    assert re.search("setting2, float32, full, max_length 128, without BOS", table)
    assert [row[0] for row in cells(succeed("score", *asked[1:]))] == [str(files[1]), str(files[2]), "total"]
    assert [row[0] for row in cells(succeed("score", *asked[2:]))] == [str(files[2])]
    assert "sliding, max_length 128, stride 64" in succeed("score", files[0], "--model", tiny_checkpoints["setting2"])


def test_of_many_texts_the_worst_are_shown(tiny_checkpoints: dict[Architecture, Path], tmp_path: Path) -> None:
    texts = [f"{word} {i}" for i, word in enumerate(CORPUS.split()[:30])]
    path = write(tmp_path / "a.jsonl", json_lines(*({"text": text} for text in texts)))
    asked = (path, "--field", "text", "--model", tiny_checkpoints["setting2"], "--dtype", "float32")
    table, answer = succeed("score", *asked), answer_of(*asked)
    worst = sorted(answer["data"], key=lambda entry: -entry["perplexity"])[:20]
    assert [row[0] for row in cells(table)] == [*(f"{path}:{entry['line']}" for entry in worst), "total"]
    assert "the 20 worst of 30 texts" in table
    assert [entry["line"] for entry in answer["data"]] == list(range(1, 31))
    assert answer["aggregate"]["num_texts"] == 30


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(tiny_checkpoints: dict[Architecture, Path], tmp_path: Path) -> None:
    model = tiny_checkpoints["setting2"]

    def score(name: str, content: str | bytes, *more: object) -> Result:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return lpa("score", tmp_path / name, "--model", model, *more)

    assert_one_line(score("latin.txt", b"caf\xe9"), "latin.txt: not UTF-8 at byte 3")
    assert_one_line(score("cut.gz", gzip.compress(b"text" * 999)[:-12]), "cut.gz: .*end-of-stream")
    assert_one_line(score("not.gz", "plain text"), "not.gz: Not a gzipped file")
    assert_one_line(score("long.txt", CORPUS, "--method", "full"), r"long.txt: has .* at most 128;")
    assert_one_line(score("a.txt", "abc", "--method", "chunks"), r"a.txt: has 3 tokens; method 'chunks' needs")
    assert_one_line(score("a.txt", "abc", "--max-length", 129), "max_length: 129 .* context of 128")
    assert_one_line(score("a.txt", "abc", "--stride", 128), "stride: 128 .* 127")
    assert_one_line(score("a.txt", "abc", "--stride", 0), "stride: 0 ")
    assert_one_line(score("a.txt", "abc", "--stride", 4, "--method", "full"), "stride: has no meaning")
    assert_one_line(score("a.txt", "abc", "--add-bos"), "add_bos: the model has no BOS")
    assert_one_line(score("a.txt", "a"), "input: has no token to score; without BOS the first token")
    assert_one_line(score("empty.txt", ""), "input: has no token to score")
    assert_one_line(score("a.jsonl", "{}"), "a.jsonl: is a file of JSON lines; --field")
    assert_one_line(score("a.txt", "abc", "--tokens", tmp_path / "none" / "t"), "none/t: No such file or directory")
    assert_one_line(lpa("score", tmp_path / "none.txt"), "none.txt: No such file or directory")
    assert_one_line(lpa("score", tmp_path / "a.txt", "--model", tmp_path / "none"), "none: no such model folder")
    (tmp_path / "bare").mkdir()
    assert_one_line(lpa("score", tmp_path / "bare"), r"bare: has no \.txt or \.md file")
    for flags, message in (
        (("--url", "http://127.0.0.1:1", "--dtype", "float32"), "--dtype: cannot be combined with --url"),
        (("--url", "http://127.0.0.1:1", "--threads", 1), "--threads: cannot be combined with --url"),
        (("--url", "http://127.0.0.1:1", "--compare", "a", "b"), "--compare: cannot be combined with --url"),
        (("--compare", "a", "b"), "--model: cannot be combined with --compare"),
    ):
        assert_one_line(score("a.txt", "abc", *flags), message)


def test_an_error_late_in_a_corpus_prints_no_half_answer(
    tiny_checkpoints: dict[Architecture, Path], tmp_path: Path
) -> None:
    files = [write(tmp_path / "a.txt", "the sea"), write(tmp_path / "b.txt", b"\xff")]
    for flags in ((), ("--json",)):
        assert_one_line(lpa("score", *files, "--model", tiny_checkpoints["setting2"], *flags), "b.txt: not UTF-8")


def test_numbers_that_are_none_name_their_text(
    tiny_checkpoints: dict[Architecture, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ModelRunner.run

    def broken(self: ModelRunner, batch: ScheduledBatch) -> BatchResult:
        result = run(self, batch)
        for item in batch.items:
            if 77 in item.request.token_ids:
                result.prompt_logprobs[item.request.id].logprobs[0] = math.nan
        return result

    monkeypatch.setattr(ModelRunner, "run", broken)
    text = byte_tokenizer().decode([5, 77, 6])
    assert byte_tokenizer().encode(text).ids == [5, 77, 6]
    path = write(tmp_path / "a.jsonl", json_lines({"text": "the sea"}, {"text": text}))
    refused = lpa("score", path, "--field", "text", "--model", tiny_checkpoints["setting2"])
    assert_one_line(refused, "a.jsonl:2: the model gave a log-probability that is not a finite number")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, name: str) -> None:
    field = "text" if "jsonl" in name else None
    content = "hello \ufeff there" if field is None else '{"text": "hello \ufeff there"}\n'
    encoded = codecs.BOM_UTF8 + content.encode()
    (tmp_path / name).write_bytes(gzip.compress(encoded) if name.endswith(".gz") else encoded)
    ((_, text),) = read_texts([str(tmp_path / name)], field)
    assert text == "hello \ufeff there"  # elsewhere it is a character as any other
