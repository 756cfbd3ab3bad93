"""What is printed of each part."""

from __future__ import annotations

from typing import Any


def print_part(name: str, found: dict[str, Any]) -> None:
    """One line for a part, and one for each row that it measured."""
    what = found.get("error") or found.get("left_out")
    state = (
        "failed"
        if "error" in found
        else "left out"
        if "left_out" in found
        else "ok"
        if found.get("ok", True)
        else "WRONG"
    )
    taken = f", {found['seconds_taken']:.1f} s" if "seconds_taken" in found else ""
    print(f"{name}: {state}{taken}{f': {what.strip().splitlines()[-1]}' if what else ''}", flush=True)
    rest = {
        key: value for key, value in found.items() if key not in ("rows", "error", "left_out", "ok", "seconds_taken")
    }
    for row in [*([rest] if rest else []), *found.get("rows", [])]:
        print("   " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{max(value.values()):.2g} ({max(value, key=value.__getitem__)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
