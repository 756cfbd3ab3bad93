"""Where a model's texts end, and whose sampling defaults hold, by what its files say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lpa_model.checkpoint import load_config
from lpa_model.folder import CheckpointError
from server.engine.generation_config import load_generation_config
from server.engine.tokenizer import load_tokenizer
from tests.serving import serving
from tests.tiny import byte_tokenizer, tiny_config, write_checkpoint

A, B, C = (byte_tokenizer().token_to_id(text) for text in "ABC")


def folder(
    path: Path,
    config: Any = None,
    generation: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> Path:
    """A model folder whose files name these EOS tokens."""
    write_checkpoint(path, tiny_config(eos_token_id=config))
    for name, values in (("generation_config.json", generation), ("tokenizer_config.json", tokenizer)):
        if values is not None:
            (path / name).write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "ends"),
    [
        (None, None, None, ()),
        (A, None, None, (A,)),
        ([A, B], None, None, (A, B)),
        ([], None, None, ()),
        (None, {"eos_token_id": A}, None, (A,)),
        (None, {"eos_token_id": [B, A]}, None, (B, A)),
        (A, {"eos_token_id": None}, None, (A,)),
        (None, None, {"eos_token": "B"}, (B,)),
        (None, None, {"eos_token": {"content": "B", "special": True}}, (B,)),
        (A, {"eos_token_id": [A, C]}, {"eos_token": "B"}, (B, A, C)),
        (A, {"eos_token_id": [A, 5000]}, {"eos_token": "no such token"}, (A,)),
    ],
)
def test_a_text_ends_at_every_eos_token_that_a_file_names(
    tmp_path: Path, config: Any, generation: Any, tokenizer: Any, ends: tuple[int, ...]
) -> None:
    path = folder(tmp_path, config, generation, tokenizer)
    found = load_tokenizer(path, load_config(path))
    assert found.eos_token_ids == ends
    assert found.eos_token_id == (ends[0] if ends else None)


def test_every_eos_token_ends_a_text_and_none_comes_before_min_tokens(tmp_path: Path) -> None:
    path = folder(tmp_path, A, {"eos_token_id": [A, C]}, {"eos_token": "B"})
    with serving(path) as served:
        for token in (A, B, C):
            body = {"prompt": "The sea", "max_tokens": 9, "temperature": 0, "logit_bias": {str(token): 100}}
            (choice,) = served.complete(**body, return_token_ids=True)["choices"]
            assert (choice["finish_reason"], choice["text"], choice["token_ids"]) == ("stop", "", [token])
            assert choice["stop_reason"] is None
            (choice,) = served.complete(**body, ignore_eos=True)["choices"]
            assert (choice["finish_reason"], choice["text"]) == ("length", "ABC"[(A, B, C).index(token)] * 9)
        every = {str(token): 100 for token in (A, B, C)}
        (choice,) = served.complete(prompt="x", max_tokens=9, logit_bias=every, min_tokens=4, return_token_ids=True)[
            "choices"
        ]
        assert not {A, B, C} & set(choice["token_ids"][:4])
        assert choice["token_ids"][4:] in ([A], [B], [C])
        chat = served.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], logit_bias={str(C): 100}
        )
        assert chat.json()["choices"][0]["finish_reason"] == "stop"
        for token in (A, B, C):  # a text that may end and may go on
            asked = {"structured_outputs": {"regex": "[xy]+"}, "logit_bias": {str(token): 100}}
            (choice,) = served.complete(prompt="x", temperature=0, return_token_ids=True, **asked)["choices"]
            assert choice["finish_reason"] == "stop"
            assert choice["token_ids"][-1] == token and choice["text"] in ("x", "y")


def test_the_files_sampling_is_the_default_with_auto_and_only_then(tmp_path: Path, caplog: Any) -> None:
    greedy = {"do_sample": True, "temperature": 0.0, "top_k": 40, "typical_p": 0.9}
    path = folder(tmp_path, None, greedy)
    asked: dict[str, Any] = {"prompt": "The sea", "max_tokens": 12}
    texts: dict[str, set[str]] = {}
    for source in ("auto", "none"):
        with caplog.at_level(logging.INFO), serving(path, generation_config=source) as served:
            texts[source] = {served.complete(**asked)["choices"][0]["text"] for _ in range(4)}
            wild = {served.complete(**asked, temperature=1.0, top_k=0)["choices"][0]["text"] for _ in range(4)}
            assert len(wild) > 1  # what a request says counts
            best = served.complete(**asked, temperature=0)["choices"][0]["text"]
    assert texts["auto"] == {best}
    assert len(texts["none"]) > 1
    assert "temperature 0, top_k 40 are not used; --generation-config auto" in caplog.text
    assert "typical_p are not used" in caplog.text


def test_do_sample_false_is_greedy(tmp_path: Path) -> None:
    path = folder(tmp_path, None, {"do_sample": False, "temperature": 0.7})
    assert load_generation_config(path).sampling == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1], "not a JSON object"),
        ({"eos_token_id": "2"}, "eos_token_id '2' is not a token id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id -1"),
        ({"eos_token_id": True}, "eos_token_id True"),
        ({"temperature": "hot"}, "temperature 'hot' is not a number from 0 to 2"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": 2.5}, "top_k 2.5"),
    ],
)
def test_a_broken_generation_config_is_refused_by_its_key(tmp_path: Path, values: Any, says: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{says}"):
        load_generation_config(tmp_path)
