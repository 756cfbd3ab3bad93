"""minicons on an exported model: the surprisal of words and regions, with and without its correction, and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from minicons import scorer
from transformers import AutoTokenizer, LlamaForCausalLM

from lpa_model.convert.export import export_llama
from server.llm import LLM
from server.scoring.local import score_texts
from server.scoring.texts import Source
from server.scoring.units import Units
from server.settings import embedded_checkpoint

SENTENCES = [
    "The old man sat down by the fire.",
    "The horse raced past the barn fell.",
    "“I do not know,” said the King; “ask somebody else!”",
    "She opened the door, and nobody was there",
    "The keys to the cabinet are on the table.",
    "Naïve 🙂 unbelievably antidisestablishmentarian words",
    "the",
    "Once upon a time there was a little girl who lived in a house by the sea.",
]
REGIONS = ["The horse| raced past| the barn |fell.", "The keys |to the cabinet| are| on the table."]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exported") / "llama"
    export_llama(embedded_checkpoint(), folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.eos_token  # what method rolling puts before a text of this model
    tokenizer.pad_token = tokenizer.eos_token
    return scorer.IncrementalLMScorer(LlamaForCausalLM.from_pretrained(folder), "cpu", tokenizer=tokenizer)


def units_of(texts: list[str], units: Units) -> list[list[dict[str, Any]]]:
    with LLM(embedded_checkpoint(), dtype="float32", threads=1) as llm:
        sources = ((Source("x", i, 0), text) for i, text in enumerate(texts))
        lines = list(
            score_texts(
                llm, llm.convention("rolling"), sources, lambda size, tokens: None, lambda *_: None, units=units
            )
        )
    return [line["units"] for line in lines[:-1]]


@pytest.mark.parametrize("correction", [True, False])
def test_the_surprisal_of_words(theirs: Any, correction: bool) -> None:
    expected = theirs.word_score_tokenized(
        SENTENCES, str.split, bow_correction=correction, bos_token=True, surprisal=True, base_two=True
    )
    found = units_of(SENTENCES, Units(name="word", correction=correction))
    for own, their in zip(found, expected, strict=True):
        assert [unit["text"] for unit in own] == [word for word, _ in their]
        assert [unit["surprisal"] for unit in own] == pytest.approx([value for _, value in their], abs=1e-4)


@pytest.mark.parametrize("correction", [True, False])
def test_the_surprisal_of_regions_is_the_sum_of_their_words(theirs: Any, correction: bool) -> None:
    found = units_of(REGIONS, Units(name="region", correction=correction))
    for text, regions in zip(REGIONS, found, strict=True):
        (words,) = theirs.word_score_tokenized(
            [text.replace("|", "")], str.split, bow_correction=correction, bos_token=True, surprisal=True, base_two=True
        )
        values = iter(value for _, value in words)
        expected = [sum(next(values) for _ in region.split()) for region in text.split("|")]
        assert [region["surprisal"] for region in regions] == pytest.approx(expected, abs=1e-4)


def test_the_surprisal_and_rank_of_tokens(theirs: Any) -> None:
    expected = theirs.token_score(SENTENCES, bos_token=True, surprisal=True, base_two=True, rank=True)
    rows: list[list[dict[str, Any]]] = []
    with LLM(embedded_checkpoint(), dtype="float32", threads=1) as llm:
        sources = ((Source("x", i, 0), text) for i, text in enumerate(SENTENCES))
        convention = llm.convention("rolling")
        for _ in score_texts(llm, convention, sources, lambda *_: None, lambda _, entries: rows.append(entries)):
            pass
    for own, their in zip(rows, expected, strict=True):
        assert [entry["surprisal"] for entry in own] == pytest.approx([value for _, value, _ in their[1:]], abs=1e-4)
        assert [entry["rank"] for entry in own] == [rank for *_, rank in their[1:]]
