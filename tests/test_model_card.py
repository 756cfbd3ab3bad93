"""What a model's README.md says of it, as /v1/models tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpa_model.config import Architecture
from server.model_card import LONGEST, description
from server.settings import embedded_checkpoint
from tests.serving import serving
from tests.tiny import tiny_config, write_checkpoint

FRONT_MATTER = "---\nlicense: mit\ntags:\n- text-generation\n---\n"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("# Name\n\nIt writes\nverse.\n\nMore.\n", "It writes verse."),
        (f"{FRONT_MATTER}\n# Name\n\nIt writes verse.", "It writes verse."),
        ("<!-- about -->\n<img src='x'>\n\n![logo](x.png)\n\n**Verse** of [a poet](https://example.org), `v2`.\n",
         "Verse of a poet, v2."),
        ("| a | b |\n| - | - |\n\n- a list\n\n1. another\n\n> quoted\n\n    code\n\nmax_model_len is 5.",
         "max_model_len is 5."),
        ("\ufeffIt writes.", "It writes."),
        (f"One sentence. {'word ' * LONGEST}", "One sentence."),
        ("# Name\n\n## Use\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_first_paragraph_of_prose(card: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert description(tmp_path) == expected


def test_a_long_sentence_ends_at_a_word(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("word " * LONGEST)
    found = description(tmp_path)
    assert found is not None
    assert len(found) <= LONGEST
    assert found.endswith("word …")


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_card_that_cannot_be_read_is_none(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    assert description(tmp_path) is None


def test_models_have_it(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"]) as served:
        assert served.client.get("/v1/models").json()["data"][0]["description"] is None
    found = description(embedded_checkpoint())
    assert found is not None
    assert "story" in found


def test_models_say_whether_they_chat_and_what_a_token_takes(tmp_path: Path) -> None:
    config = tiny_config("setting2", hidden_size=128, num_key_value_heads=2, attention_rank=32)
    folder = write_checkpoint(tmp_path, config)
    heads, own, rank, layers, size = 2, 32, 32, 2, 4
    for template in (None, "{{ messages[0].content }}"):
        with serving(folder, chat_template=template) as served:
            [card] = served.client.get("/v1/models").json()["data"]
        assert card["chat"] is (template is not None)
        assert card["dense_cache_bytes_per_token"] == layers * 2 * heads * own * size
        assert card["cache_bytes_per_token"] == layers * (heads * own + rank) * size  # keys whole, values latent
