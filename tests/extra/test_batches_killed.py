"""A server that SIGKILL ends at twenty random moments loses no line of its batches, repeats none, and answers as one
that was never killed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types import Batch

from tests.serving import serving
from tests.test_batches import ENDED, content, lines, request, start
from tests.test_processes import killed_at_the_end
from tests.tiny import tiny_config, write_checkpoint

KILLS = 20
LINES = 100
LONGEST = 1.5  # seconds from the greeting to the kill: of the order of a batch


def test_twenty_kills_change_no_answer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    wanted = [request(f"r{i}", max_tokens=20, seed=i, temperature=1.0, ignore_eos=True) for i in range(LINES)]
    wanted[7::50] = [request(f"wrong{i}", max_tokens=-1) for i in range(len(wanted[7::50]))]
    with serving(folder, data_dir=tmp_path / "calm") as server, OpenAI(base_url=f"{server.url}/v1", api_key="x") as one:
        expected = answers(one, finished(one, start(one, lines(*wanted))))
    rng, batches, hit = random.Random(0), list[Batch](), 0
    for _ in range(KILLS):
        with killed_at_the_end(folder, tmp_path / "data") as client:
            if not batches or client.batches.retrieve(batches[-1].id).status in ENDED:
                batches.append(start(client, lines(*wanted)))
            time.sleep(rng.uniform(0, LONGEST))
            hit += client.batches.retrieve(batches[-1].id).status not in ENDED
    assert hit
    with killed_at_the_end(folder, tmp_path / "data") as client:
        for batch in batches:
            done = finished(client, batch)
            assert done.status == "completed" and done.request_counts is not None
            assert done.request_counts.completed + done.request_counts.failed == LINES
            assert answers(client, done) == expected
    print(f"{len(batches)} batches, {hit} of {KILLS} kills in the middle of one")


def finished(client: OpenAI, batch: Batch) -> Batch:
    deadline = time.monotonic() + 300
    while client.batches.retrieve(batch.id).status not in ENDED:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return client.batches.retrieve(batch.id)


def answers(client: OpenAI, batch: Batch) -> list[list[Any]]:
    """What the output and the error file say, line by line, without ids and times."""
    return [[answer(entry) for entry in content(client, name)] for name in (batch.output_file_id, batch.error_file_id)]


def answer(entry: dict[str, Any]) -> tuple[Any, ...]:
    body = entry["response"]["body"]
    return (
        entry["custom_id"],
        entry["response"]["status_code"],
        body.get("choices"),
        body.get("usage"),
        body.get("error"),
    )
