"""What `lpa score` prints: JSON or tables, written as the lines of an answer arrive."""

from __future__ import annotations

import csv
import heapq
import json
import tempfile
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console
from rich.table import Table

SHOWN = 20  # rows of a table; of more texts, those that are predicted worst


def print_json(lines: Iterable[dict[str, Any]], extra: dict[str, Any], out: IO[str]) -> None:
    """The answer as one object, with `extra` fields. Nothing is printed before all is there, nor held in memory."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as entries:
        for line in lines:
            if line["object"] == "perplexity.text":
                entries.write(f"{',' if entries.tell() else ''}\n    {json.dumps(line)}")
            else:
                rest = json.dumps({**line, **extra}, indent=2).removesuffix("\n}")
        entries.seek(0)
        out.write(f'{rest},\n  "data": [')
        while piece := entries.read(1 << 16):
            out.write(piece)
        out.write("\n  ]\n}\n")


def print_csv(lines: Iterable[dict[str, Any]], out: IO[str]) -> str | None:
    """A row for each text, or for each unit of each text if they have units, as they arrive; null is empty.

    Returns the digest, if there is one.
    """
    table: csv.DictWriter[str] | None = None
    digest: str | None = None
    for line in lines:
        if line["object"] != "perplexity.text":
            digest = line.get("digest")
            continue
        place = {name: line[name] for name in ("file", "line", "index")}
        for row in [place | unit for unit in line["units"]] if "units" in line else [line]:
            if table is None:
                table = csv.DictWriter(
                    out, [name for name in row if name != "object"], extrasaction="ignore", lineterminator="\n"
                )
                table.writeheader()
            table.writerow(row)
    return digest


def print_table(lines: Iterable[dict[str, Any]], extra: dict[str, Any]) -> None:
    """A row for each text and one for all of them."""
    worst: list[tuple[float, int, dict[str, Any]]] = []
    for line in lines:
        if line["object"] == "perplexity.text":
            # of equal ones the earlier stays; no two entries are equal up to the dict
            entry = (line["perplexity"] or 0.0, -line["index"], line)
            (heapq.heappush if len(worst) < SHOWN else heapq.heappushpop)(worst, entry)
        else:
            total = line
    count = total["aggregate"]["num_texts"]
    if count > SHOWN:
        worst.sort(reverse=True)
    else:
        worst.sort(key=lambda entry: -entry[1])
    table = Table(title=f"the {SHOWN} worst of {count:,} texts" if count > SHOWN else None, caption=_how(total, extra))
    table.add_column("text", overflow="fold")
    for name in ("tokens", "NLL sum (nats)", "perplexity", "bits per byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, _, row in worst:
        name = row["file"] if row["line"] is None else f"{row['file']}:{row['line']}"
        table.add_row(name, *_cells(row))
    if count > 1:
        table.add_section()
        table.add_row("total", *_cells(total["aggregate"]))
    Console().print(table)


def print_comparison(found: dict[str, Any]) -> None:
    """Both models' perplexities and the comparison token by token."""
    table = Table(caption=_how(found, {}))
    table.add_column("model", overflow="fold")
    for name in ("tokens", "NLL sum (nats)", "perplexity", "bits per byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for side in ("a", "b"):
        table.add_row(f"{side.upper()}: {found[side]['model']} ({found[side]['dtype']})", *_cells(found[side]))
    pairs = found["comparison"]
    measures = Table(show_header=False)
    measures.add_column(overflow="fold")
    measures.add_column(justify="right")
    for text, name in (("NLL(B) - NLL(A), nats per token", "nll_difference"), ("KL(A || B), nats", "kl_divergence")):
        measures.add_row(text, _with_error(pairs[name], pairs[f"{name}_stderr"], "+.6f" if "nll" in name else ".6f"))
    measures.add_row("perplexity of B / A", f"{pairs['perplexity_ratio']:.6f}")
    measures.add_row("same most probable token", f"{pairs['top1_agreement']:.2%}")
    console = Console()
    console.print(table)
    console.print(measures)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['num_tokens']:,}",
        f"{row['nll_sum']:,.3f}",
        _with_error(row["perplexity"], row["perplexity_stderr"], ".4f"),
        "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
    )


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.removeprefix('+')}}"


def _how(found: dict[str, Any], extra: dict[str, Any]) -> str:
    """The model and the convention, in words."""
    parts = [*([found["model"]] if "model" in found else []), *extra.values()]
    parts += [found["method"], f"max_length {found['max_length']}"]
    parts += [] if found["stride"] is None else [f"stride {found['stride']}"]
    parts += [f"digest {found['digest']}"] if "digest" in found else []
    bos = "with BOS" if found["add_bos"] else "without BOS" if found["prefix_token_id"] is None else "with EOS"
    return ", ".join(map(str, [*parts, bos]))
