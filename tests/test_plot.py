"""Figures of benchmarks: files of the kind asked for, that say what was measured, at the places where it belongs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from server.bench.load import Timing, summarize
from server.bench.plot import plot_servers
from server.bench.rounds import ratios
from server.cli import app
from tests.serving import Served, serving
from tests.tiny import tiny_config, write_checkpoint

if TYPE_CHECKING:  # to be imported by the process that runs these tests alone
    from matplotlib.figure import Figure

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(write_checkpoint(tmp_path_factory.mktemp("model"), tiny_config())) as server:
        yield server


def lpa(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def texts(path: Path) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iter(f"{SVG}text")]


def test_serve_draws_both_servers_rates_and_latencies(served: Served, tmp_path: Path) -> None:
    asked = ("serve", served.url, "--compare", served.url, "--input-len", 5, "--output-len", 4, "--concurrency", 2)
    report = json.loads(lpa(*asked, "--vocab-size", 300, "--plot", tmp_path / "a.svg", "--json"))
    found = texts(tmp_path / "a.svg")
    assert "tiny: 4 requests, 2 at a time, 5 tokens in, 4 out" in found
    assert found.count(f"tiny at {served.url}") == 2
    ratio = report["ratio"]["output_tokens_per_s"]
    throughput = f"Throughput, ratio {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    assert {throughput, "Time to first token", "Inter-token latency"} <= set(found)
    assert {"output tokens per second", "round", "milliseconds", "share of requests within"} <= set(found)


def test_score_draws_its_rate_and_a_png_is_one(served: Served, tmp_path: Path) -> None:
    asked = ("score", served.url, "--length", 9, "--requests", 2, "--rounds", 1, "--vocab-size", 300)
    lpa(*asked, "--plot", tmp_path / "a.svg")
    lpa(*asked, "--plot", tmp_path / "a.PNG")
    assert {"tiny: 2 texts of 9 tokens, 8 at a time", "scored tokens per second"} <= set(texts(tmp_path / "a.svg"))
    assert "Inter-token latency" not in texts(tmp_path / "a.svg")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_step_draws_every_row_of_its_table(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "small", tiny_config())
    asked = ("step", "--model", folder, "--layout", "full", "--batch", 2, "--context", 20, "--steps", 3, "--threads", 1)
    rows = json.loads(lpa(*asked, "--json", "--plot", tmp_path / "a.svg"))
    found = texts(tmp_path / "a.svg")
    for row in rows:
        assert f"{row['kind']}, full, 2 x 20" in found
        assert f"{row['ms']:,.1f} ms, {row['gap']:.1f}x" in found
    assert any(text.startswith("Steps of small") for text in found)
    assert {"measured", "floor", "milliseconds (logarithmic scale)"} <= set(found)
    lpa(*asked, "--plot", tmp_path / "table.svg")
    assert [text for text in texts(tmp_path / "table.svg") if text.endswith("full, 2 x 20")] == [
        f"{row['kind']}, full, 2 x 20" for row in rows
    ]


def curves(path: Path) -> list[list[tuple[float, float]]]:
    """Points of the lines in the data's colours, in the order that they are drawn."""
    found = []
    for element in ET.parse(path).iter(f"{SVG}path"):
        style, steps = element.get("style", ""), element.get("d", "").split()
        if ("#0072b2" in style or "#d55e00" in style) and "fill: none" in style and steps.count("L") > 1:
            numbers = [float(step) for step in steps if step not in ("M", "L")]
            found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on."""
    figures: list[Figure] = []
    monkeypatch.setattr("server.bench.plot._save", lambda figure, path: figures.append(figure))
    return figures


def test_axes_begin_at_zero_have_head_room_and_say_what_lies_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    timings = [Timing(3, 4, 0.2, [0.01] * 999 + [5.0], 0.5)]
    rounds = [summarize(timings, 1.0)] * 3
    report = {"servers": [{"url": "http://a", "model": "m", "rounds": rounds}]}
    plot_servers(report, [timings], "w", Path("a.svg"))
    rates, firsts, gaps = figures[0].axes
    assert rates.get_ylim() == (0, pytest.approx(1.15 * rounds[0]["output_tokens_per_s"]))
    assert rates.get_xlim() == (0.5, 3.5)
    for axes in (firsts, gaps):
        assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 1
        assert axes.lines[0].get_ydata()[0] == 0  # type: ignore[index]  # an array
    assert firsts.get_xlabel() == "milliseconds"
    assert gaps.get_xlim()[1] == pytest.approx(11.5)
    assert gaps.get_xlabel() == "milliseconds\n(1 of the tokens further right, up to 5,000)"


def test_curves_are_the_numbers(tmp_path: Path) -> None:
    """Rounds of 100, 300 and 200 tokens a second are drawn at a third, all and two thirds of the height."""

    def timings(count: int) -> list[Timing]:
        return [Timing(3, count, 0.2, [0.01] * 3, 0.5)]

    rounds = [summarize(timings(count), 1.0) for count in (100, 300, 200)]
    server = {"url": "http://a", "model": "m", "rounds": rounds}
    report = {"servers": [server, server], "ratio": ratios(rounds, rounds)}
    plot_servers(report, [timings(1)] * 2, "w", tmp_path / "a.svg")
    first = curves(tmp_path / "a.svg")[0]
    (x0, low), (x1, high), (x2, middle) = first
    assert x2 - x1 == pytest.approx(x1 - x0, rel=1e-3)
    assert (low - middle) == pytest.approx((low - high) / 2, rel=1e-3)  # downwards is larger


def test_mistakes_are_one_line_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (tmp_path / "a.pdf", "plot: 'a.pdf' ends neither in .png nor in .svg"),
        (tmp_path / "none" / "a.png", f"plot: there is no folder '{tmp_path / 'none'}'"),
    ]
    for command in (["serve", "http://127.0.0.1:9"], ["score", "http://127.0.0.1:9"], ["step"]):
        for path, message in cases:
            result = CliRunner().invoke(app, ["bench", *command, "--plot", str(path)])
            assert (result.exit_code, result.stderr) == (2, f"lpa: {message}\n")
    monkeypatch.setattr("server.bench.plot.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "step", "--plot", str(tmp_path / "a.png")])
    assert (result.exit_code, result.stderr) == (2, "lpa: plot: needs matplotlib: pip install 'lpa-server[plot]'\n")
