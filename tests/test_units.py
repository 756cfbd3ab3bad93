"""Surprisal of words and regions, entropies and digests: against plain loops in float64, here and over a server."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lpa_model.config import Architecture
from lpa_model.folder import weights_hash
from lpa_model.perplexity import windows
from server.engine.tokenizer import Tokenizer
from server.llm import LLM
from server.scoring.local import score_texts
from server.scoring.texts import Source
from server.scoring.units import Units, token_cuts, tokenize_units
from tests.serving import Served, serving
from tests.test_cli import assert_one_line, lpa, succeed
from tests.test_perplexity import convention
from tests.test_score import bos_checkpoint, json_lines, write
from tests.tiny import CORPUS, byte_tokenizer, random_model, tiny_config

__all__ = ["bos_checkpoint"]

TEXT = 'The robot said: "çava, 你好 🙂" and the  waves\nof the sea '
PATH = "/v1/perplexity"


@pytest.fixture(scope="module")
def llm(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[LLM]:
    with LLM(tiny_checkpoints["setting2"], dtype="float32", threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


# --- the same in plain loops -----------------------------------------------------------------------------------------


def rows_of(ids: list[int], how: Any) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """By scored token the float64 distribution that predicts it; and the one behind the text."""
    model = random_model(tiny_config())
    found: dict[int, torch.Tensor] = {}
    last = torch.empty(0)
    for window in windows(len(ids), how):
        rows = model.logits(model(torch.tensor([window.tokens(ids)])))[0].double().log_softmax(-1)
        for token in range(window.first_scored, window.end):
            found[token] = rows[window.length - (window.end - token) - 1]
        last = rows[-1]
    return found, last


def expected(text: str, parts: list[str], how: Any, correction: bool) -> list[float | None]:
    """Of parts that begin with a word and together are the text, but for white space before them."""
    encoding = byte_tokenizer().encode(text)
    rows, behind = rows_of(encoding.ids, how)
    names = {i: name for name, i in byte_tokenizer().get_vocab().items()}
    spaces = torch.tensor([i for i, name in names.items() if name.startswith("Ġ")])

    def mass(row: torch.Tensor) -> float:
        return math.log(float(row.exp()[spaces].sum()))

    def begins(token: int) -> bool:
        return token < len(encoding.ids) and names[encoding.ids[token]].startswith("Ġ")

    found: list[float | None] = []
    first = 0
    for i in range(len(parts)):
        last = first
        size = len("".join(parts[: i + 1]))
        # tokens of bytes share a character: what counts is where the next token begins
        while last < len(encoding.ids) and encoding.offsets[last][0] < size:
            last += 1
        total: float | None = 0.0
        for token in range(first, last):
            if token not in rows:
                total = None
            elif total is not None:
                total += float(rows[token][encoding.ids[token]])
        if total is not None and correction:
            if first > 0 and begins(first):
                total -= mass(rows[first])
            if last == len(encoding.ids):
                total += mass(behind)
            elif begins(last):
                total += mass(rows[last])
        found.append(None if total is None else -total / math.log(2))
        first = last
    return found


def words_of(text: str) -> list[str]:
    """With the white space before them; what is behind the last one belongs to it."""
    parts = re.findall(r"\s*\S+", text)
    return [*parts[:-1], text[len("".join(parts[:-1])) :]]


def assert_close(found: list[float | None], wanted: list[float | None]) -> None:
    assert [value is None for value in found] == [value is None for value in wanted]
    pairs = zip(found, wanted, strict=True)
    for own, other in ((own, other) for own, other in pairs if own is not None):
        assert own == pytest.approx(other, abs=1e-4)


def score(llm: LLM, texts: list[str], method: Any, units: Units, **how: Any) -> list[dict[str, Any]]:
    sources = ((Source("x", i, 0), text) for i, text in enumerate(texts))
    return list(score_texts(llm, llm.convention(method, **how), sources, lambda *_: None, units=units))


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize(
    ("method", "how"),
    [("full", {}), ("rolling", {"max_length": 12}), ("sliding", {"max_length": 9, "stride": 4})],
    ids=["full", "rolling", "sliding"],
)
def test_words_are_what_plain_loops_say(llm: LLM, method: Any, how: dict[str, int], correction: bool) -> None:
    cut = llm.convention(method, **how)
    *lines, _ = score(llm, [TEXT, CORPUS[:60], "waves"], method, Units(name="word", correction=correction), **how)
    for text, line in zip([TEXT, CORPUS[:60], "waves"], lines, strict=True):
        units = line["units"]
        assert [unit["text"] for unit in units] == text.split()
        assert [text[unit["offset"] :][: len(unit["text"])] for unit in units] == text.split()
        assert sum(unit["num_tokens"] for unit in units) == len(byte_tokenizer().encode(text).ids)
        assert_close([unit["surprisal"] for unit in units], expected(text, words_of(text), cut, correction))
        assert (units[0]["surprisal"] is None) == (method != "rolling")


def test_corrections_cancel_out_but_for_the_last(llm: LLM) -> None:
    """Words of a text whose spaces all begin tokens: together as probable as the text, and that it has ended."""
    text = "The robot said the sea"
    (plain, _), (corrected, _) = (
        score(llm, [text], "rolling", Units(name="word", correction=correction)) for correction in (False, True)
    )
    of_text = plain["nll_sum"] / math.log(2)
    assert math.fsum(unit["surprisal"] for unit in plain["units"]) == pytest.approx(of_text, rel=1e-9)
    _, behind = rows_of(byte_tokenizer().encode(text).ids, llm.convention("rolling"))
    spaces = [i for name, i in byte_tokenizer().get_vocab().items() if name.startswith("Ġ")]
    ended = -math.log2(float(behind.exp()[spaces].sum()))
    assert math.fsum(unit["surprisal"] for unit in corrected["units"]) == pytest.approx(of_text + ended, abs=1e-4)


def test_a_text_as_long_as_the_context(llm: LLM) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(CORPUS).ids[:128]
    assert len(ids) == llm.max_model_len
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.encode(text).ids == ids
    (line, _) = score(llm, [text], "full", Units(name="word"))
    found = [unit["surprisal"] for unit in line["units"]]
    assert_close(found, expected(text, words_of(text), llm.convention("full"), True))


def test_a_text_without_words_has_no_units(llm: LLM) -> None:
    *lines, _ = score(llm, ["", "  \n ", "the sea"], "rolling", Units(name="word"))
    assert [len(line["units"]) for line in lines] == [0, 0, 2]


# --- regions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", [True, False])
def test_regions_are_what_plain_loops_say(llm: LLM, correction: bool) -> None:
    units = Units(name="region", correction=correction, separator="##")
    (line, _) = score(llm, ["The robot## said ##the wa##ves"], "rolling", units)
    assert [unit["text"] for unit in line["units"]] == ["The robot", " said ", "the wa", "ves"]
    assert [unit["offset"] for unit in line["units"]] == [0, 9, 15, 21]
    tokens = [byte_tokenizer().id_to_token(i) for i in byte_tokenizer().encode("The robot said the waves").ids]
    # the text is tokenized as a whole: a token that goes on beyond its region is where it begins
    starts = [0, 9, 14, 21]
    offsets = [0, *(sum(map(len, tokens[:i])) for i in range(1, len(tokens)))]
    parts = [
        "".join(t.replace("Ġ", " ") for t, at in zip(tokens, offsets, strict=True) if a <= at < b)
        for a, b in zip(starts, [*starts[1:], 99], strict=True)
    ]
    wanted = expected("The robot said the waves", parts, llm.convention("rolling"), correction)
    assert_close([unit["surprisal"] for unit in line["units"]], wanted)


def test_an_empty_region_has_no_surprisal_and_no_tokens(llm: LLM) -> None:
    (line, _) = score(llm, ["|the sea||"], "rolling", Units(name="region"))
    counts = [(unit["text"], unit["num_tokens"]) for unit in line["units"]]
    assert [text for text, _ in counts] == ["", "the sea", "", ""]
    assert sum(count for _, count in counts) == len(byte_tokenizer().encode("the sea").ids)
    assert {unit["surprisal"] for unit in line["units"] if not unit["num_tokens"]} == {0.0}


@given(st.text(st.sampled_from("ab \n\u00e7\U0001f642|"), max_size=40))
@example(" | a|  b |")
def test_every_token_is_in_one_unit(text: str) -> None:
    tokenizer = Tokenizer(byte_tokenizer(), tiny_config())
    for units in (Units(name="word"), Units(name="region")):
        made = tokenize_units(tokenizer, convention("rolling", 8), "x", text, units, with_offsets=True)
        spans = made.regions
        if spans is None:
            spans = [found.span() for found in re.finditer(r"\S+", text)]
        else:
            assert "|".join(made.text[start:end] for start, end in spans) == text
        if not spans:
            continue
        cuts = token_cuts(made, spans)
        assert len(cuts) == len(spans)
        assert cuts[0] == 0
        assert cuts == sorted(cuts)
        assert cuts[-1] <= len(made.token_ids)


# --- entropies -------------------------------------------------------------------------------------------------------


def test_tokens_have_their_entropy_and_surprisal_in_bits(served: Served) -> None:
    found = served.post(PATH, input=TEXT, return_tokens=True, method="full").json()["data"][0]["tokens"]
    ids = byte_tokenizer().encode(TEXT).ids
    rows, _ = rows_of(ids, convention("full", 128))
    assert found[0]["entropy"] is None
    assert found[0]["surprisal"] is None
    for i, entry in enumerate(found[1:], 1):
        probabilities = rows[i].exp()
        entropy = -float((probabilities * rows[i]).sum()) / math.log(2)
        assert entry["entropy"] == pytest.approx(entropy, rel=1e-5, abs=1e-6)
        assert entry["surprisal"] == pytest.approx(-entry["logprob"] / math.log(2), rel=1e-12)


# --- over a server, and as CSV ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["word", "region"])
def test_the_command_line_writes_csv_here_and_over_a_server(
    served: Served, tiny_checkpoints: dict[Architecture, Path], tmp_path: Path, unit: str
) -> None:
    texts = ["The robot said: / the waves", "of /the sea", "çava 🙂"]
    path = write(tmp_path / "a.jsonl", json_lines(*({"text": text} for text in texts)))
    asked = ["score", path, "--field", "text", "--method", "rolling", "--unit", unit, "--csv"]
    asked += ["--region-separator", "/"] if unit == "region" else ["--no-boundary-correction"]
    answers = [
        list(csv.DictReader(io.StringIO(succeed(*asked, *way))))
        for way in (("--model", tiny_checkpoints["setting2"], "--dtype", "float32"), ("--url", served.url))
    ]
    names = [word for text in texts for word in (text.split() if unit == "word" else text.split("/"))]
    for rows in answers:
        assert list(rows[0]) == ["file", "line", "index", "text", "offset", "num_tokens", "surprisal"]
        assert [row["text"] for row in rows] == names
        assert {row["line"] for row in rows} == {"1", "2", "3"}
    for own, other in zip(*answers, strict=True):
        assert float(own["surprisal"]) == pytest.approx(float(other["surprisal"]), abs=1e-4)
    tokens = tmp_path / "tokens.csv"
    rows = list(csv.DictReader(io.StringIO(succeed(*asked[:6], "--csv", "--tokens", tokens, "--url", served.url))))
    assert [int(row["index"]) for row in rows] == [0, 1, 2]
    assert float(rows[0]["nll_sum"]) > 0
    with tokens.open(newline="") as file:
        of_tokens = list(csv.DictReader(file))
    assert len(of_tokens) == sum(int(row["num_tokens"]) for row in rows)
    assert math.fsum(float(row["surprisal"]) for row in of_tokens) * math.log(2) == pytest.approx(
        math.fsum(float(row["nll_sum"]) for row in rows), rel=1e-9
    )


def test_what_does_not_go_together_is_refused(served: Served, tmp_path: Path) -> None:
    for body, param in (
        ({"boundary_correction": False}, "boundary_correction"),
        ({"region_separator": "/"}, "region_separator"),
        ({"unit": "region", "region_separator": ""}, "region_separator"),
        ({"unit": "sentence"}, "unit"),
        ({"unit": "region", "input": [[5, 6, 7], [7, 8]]}, "input[0]"),
    ):
        response = served.post(PATH, **{"input": "the sea", **body})
        assert response.status_code == 400, body
        assert response.json()["error"]["param"] == param
    path = write(tmp_path / "a.txt", "the sea")
    assert_one_line(lpa("score", path, "--unit", "word"), "--unit: needs --csv or --json")
    assert_one_line(lpa("score", path, "--csv", "--json"), "--csv: cannot be combined with --json")
    assert_one_line(lpa("score", path, "--csv", "--region-separator", "/"), "--region-separator: ")
    assert_one_line(lpa("score", path, "--csv", "--no-boundary-correction"), "--no-boundary-correction: ")


# --- digests ---------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_what_the_documents_say(
    llm: LLM, served: Served, tiny_checkpoints: dict[Architecture, Path], tmp_path: Path
) -> None:
    texts = ["The robot said", "", "the waves of the sea"]
    scores = llm.score(texts, method="sliding", max_length=6, stride=2)
    description = json.loads(llm.tokenizer.backend.to_str())
    header = {
        "backend": llm.engine.identity.backend,
        "convention": {"method": "sliding", "max_length": 6, "stride": 2, "add_bos": False, "prefix_token_id": None},
        "tokenizer": hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest(),
        "weights": weights_hash(tiny_checkpoints["setting2"]),
    }
    content = json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    for text in scores.texts:
        content += struct.pack(f"<Q{len(text.token_ids)}I", len(text.token_ids), *text.token_ids)
        scored = [value for value in text.logprobs if value is not None]
        content += struct.pack(f"<{len(scored)}f", *scored)
    assert scores.digest == hashlib.sha256(content).hexdigest()[:16]

    path = write(tmp_path / "a.jsonl", json_lines(*({"text": text} for text in texts)))
    asked = ("score", path, "--field", "text", "--digest", "--json", "--max-length", 6, "--stride", 2)
    here = json.loads(succeed(*asked, "--model", tiny_checkpoints["setting2"], "--dtype", "float32"))
    if llm.engine.backend.batch_invariant:
        assert here["digest"] == scores.digest
        there = json.loads(succeed(*asked, "--url", served.url))
        assert there["digest"] == scores.digest
        body = {"input": texts, "method": "sliding", "max_length": 6, "stride": 2, "digest": True}
        assert served.post(PATH, **body).json()["digest"] == scores.digest
    assert "digest" not in served.post(PATH, input="the sea").json()
    assert llm.score(texts, method="sliding", max_length=6, stride=3).digest != scores.digest
    assert llm.score([*texts[:2], "the waves of the seas"], method="sliding", max_length=6, stride=2).digest != (
        scores.digest
    )
