"""Figures of what the benchmarks measured, and of training runs, as PNG or SVG; needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.bench.load import Timing, quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lpa_model.train.metrics import Row

FORMATS = (".png", ".svg")
# Okabe and Ito's blue and vermilion: safe for colour blindness; marker and line style differ as well
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
)
GREY = "#555555"
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # behind text, for lines to stop at
HEAD = 1.15  # of the largest value, for the highest line to have space above it
SMOOTHED = 20  # of so many steps there is one in a running mean
SHARES = (0.5, 0.9, 0.99)  # of a distribution, marked on it


def check_plot(path: Path) -> None:
    """Before anything is measured: whether a figure can be written there.

    Raises:
        ValueError: of another format, into a folder that is not there, or without matplotlib.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot: {path.name!r} ends neither in .png nor in .svg")
    if not path.parent.is_dir():
        raise ValueError(f"plot: there is no folder {str(path.parent)!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("plot: needs matplotlib: pip install 'lpa-server[plot]'")


def plot_servers(report: dict[str, Any], timings: Sequence[Sequence[Timing]], workload: str, path: Path) -> None:
    """Tokens a second of every round, of one server or two; and where tokens were streamed, how the times to the first
    one and between two are distributed.

    Args:
        report: as `run_rounds` returns it.
        timings: of all requests that count, for each server of the report.
    """
    servers = report["servers"]
    streamed = any(timing.first is not None for of_server in timings for timing in of_server)
    figure = _figure(13.5 if streamed else 6.5, 4.8)
    rounds, *latencies = figure.subplots(1, 3 if streamed else 1, squeeze=False)[0]
    rate = "output_tokens_per_s" if streamed else "input_tokens_per_s"
    for server, style in zip(servers, STYLES, strict=False):
        values = [summary[rate] for summary in server["rounds"]]
        rounds.plot(range(1, len(values) + 1), values, label=f"{server['model']} at {server['url']}", **style)
    ratio = report.get("ratio", {}).get(rate)
    spread = "" if ratio is None else f", ratio {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    kind = "output" if streamed else "scored"
    _describe(rounds, f"Throughput{spread}", "round", f"{kind} tokens per second")
    highest = max(summary[rate] for server in servers for summary in server["rounds"])
    rounds.set_ylim(0, HEAD * highest or 1)
    rounds.set_xlim(0.5, max(len(server["rounds"]) for server in servers) + 0.5)
    rounds.xaxis.get_major_locator().set_params(integer=True)
    if streamed:
        firsts = [[timing.first for timing in mine if timing.first is not None] for mine in timings]
        _distributions(latencies[0], firsts, "Time to first token", "requests")
        gaps = [[gap for timing in mine for gap in timing.gaps] for mine in timings]
        _distributions(latencies[1], gaps, "Inter-token latency", "tokens")
    names = list(dict.fromkeys(server["model"] for server in servers))
    figure.suptitle(f"{' and '.join(names)}: {workload}")
    figure.legend(*rounds.get_legend_handles_labels(), loc="outside lower center", ncols=2 if streamed else 1)
    _save(figure, path)


def plot_steps(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Each row of the table of `lpa bench step`: its measured time beside its floor."""
    figure = _figure(9, 1.9 + 0.34 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    measured, floors = [row["ms"] for row in rows], [row["floor_ms"] for row in rows]
    axes.hlines(places, floors, measured, color=GREY, linewidth=1.2, zorder=1)
    axes.scatter(floors, places, color=STYLES[1]["color"], marker="|", s=140, linewidths=2.5, label="floor", zorder=2)
    axes.scatter(measured, places, color=STYLES[0]["color"], marker="o", s=36, label="measured", zorder=2)
    for place, row in enumerate(rows):
        text = f"{row['ms']:,.1f} ms, {row['gap']:.1f}x"
        at = (max(row["ms"], row["floor_ms"]), place)
        axes.annotate(text, at, (8, 0), textcoords="offset points", va="center", bbox=WHITE)
    labels = [f"{row['kind']}, {row['layout']}, {row['batch']} x {row['context']}" for row in rows]
    axes.set_yticks(places, labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axes.set_xscale("log", subs=[2, 5])
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("{x:,g}")
    axes.set_xlim(min(*floors, *measured) / 1.5, max(*floors, *measured) * 6)  # space for the last label
    _describe(axes, "by kind of work, layout, batch x context", "milliseconds (logarithmic scale)", "")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", which="minor", alpha=0.3)
    machine = f"{rows[0]['bandwidth_gb_per_s']:.1f} GB/s, {rows[0]['gemm_gflops']:,.0f} GFLOP/s measured in this run"
    figure.suptitle(f"{title}\nfloor: bytes or operations at {machine}")
    figure.legend(loc="outside lower center", ncols=2)
    _save(figure, path)


def plot_capacity(
    points: Sequence[dict[str, float]], fleet: Sequence[dict[str, float]], title: str, path: Path
) -> None:
    """What one machine sees as more requests come, and how many machines higher rates take.

    Args:
        points: as `at_rate` returns them, by ascending rate.
        fleet: as `replicas` returns them; without any there is no second diagram.
    """
    figure = _figure(11 if fleet else 6.5, 4.8)
    latency, *machines = figure.subplots(1, 2 if fleet else 1, squeeze=False)[0]
    rates = [point["requests_per_s"] for point in points]
    values = ([point["inter_token_ms"] for point in points], [1e3 * point["wait_s"] for point in points])
    for name, series, style in zip(("inter-token latency", "wait in the queue"), values, STYLES, strict=True):
        latency.plot(rates, series, label=name, color=style["color"], linestyle=style["linestyle"])
    latency.set_ylim(0, 4 * values[0][0])  # the wait has no bound
    _describe(latency, "One machine", "requests per second", "milliseconds (mean)")
    latency.legend(loc="upper left")
    if fleet:
        machines[0].plot([row["rate"] for row in fleet], [row["replicas"] for row in fleet], **STYLES[0])
        machines[0].set_ylim(0, None)
        _describe(machines[0], "Machines", "requests per second", "machines")
    figure.suptitle(title)
    _save(figure, path)


def plot_models(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Of models as `bench_models` returns them: how far perplexity on each text is above the first model's, against the
    speed of one stream (or of the fewest that were measured), and against the bytes of the cache, both in ratios.

    Raises:
        ValueError: no text was measured, or more than there are styles for.
    """
    first = rows[0]
    if not 1 <= len(first["texts"]) <= len(STYLES):
        raise ValueError(f"plot: needs one text or {len(STYLES)}")
    kind = next(iter(first["speeds"]))
    figure = _figure(11, 6)
    speed, cache = figure.subplots(1, 2, sharey=True)
    against = {
        speed: [row["speeds"][kind]["ratio"] for row in rows],
        cache: [row["cache_bytes"] / first["cache_bytes"] for row in rows],
    }
    above = {name: [100 * (row["texts"][name]["ratio"] - 1) for row in rows] for name in first["texts"]}
    for axes, places in against.items():
        axes.set_yscale("symlog", linthresh=1)  # from 1 % up each decade is equally high
        axes.yaxis.set_major_formatter("{x:,g} %")
        for (name, values), style in zip(above.items(), STYLES, strict=False):
            errors = [100 * row["texts"][name]["ratio_stderr"] for row in rows]
            look = {**style, "linestyle": "none"}
            axes.errorbar(places, values, errors, label=Path(name).name, capsize=2, **look)
        axes.margins(x=0.18, y=0.1)
    count = "1 stream" if kind == "decode 1" else f"{kind.removeprefix('decode ')} streams"
    of_first = Path(first["model"]).name
    _describe(speed, "Quality and speed", f"decoding speed at {count}, {of_first} = 1", f"perplexity above {of_first}")
    _describe(cache, "Quality and cache", f"cache bytes per token, {of_first} = 1", "")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.draw_without_rendering()  # places are known from here on
    for axes, places in against.items():
        names = [Path(row["model"]).name for row in rows]
        _name_points(axes, names, [list(zip(places, values, strict=True)) for values in above.values()])
    _save(figure, path)


def _name_points(axes: Axes, names: Sequence[str], series: Sequence[Sequence[tuple[float, float]]]) -> None:
    """A name at each point of the first series, on the side where it covers the fewest points and other names."""
    points = axes.transData.transform([point for each in series for point in each])
    placed: list[Any] = []
    sides = ((0, 7, "center", "bottom"), (8, 0, "left", "center"), (-8, 0, "right", "center"), (0, -7, "center", "top"))
    for name, at in zip(names, series[0], strict=True):
        tried = []
        for x, y, horizontal, vertical in sides:
            text = axes.annotate(
                name, at, (x, y), textcoords="offset points", ha=horizontal, va=vertical, fontsize="small"
            )
            box = text.get_window_extent()
            covered = box.count_overlaps(placed) + box.padded(6).count_contains(points)
            tried.append((covered + (not axes.bbox.containsx(box.x1) or not axes.bbox.containsx(box.x0)), text, box))
        best = min(tried, key=lambda one: one[0])
        for one in tried:
            if one is not best:
                one[1].remove()
        placed.append(best[2])


def plot_training(rows: Sequence[Row], title: str, path: Path) -> None:
    """Losses of a run over its steps: of the steps themselves, their running mean if there are many, and validations.

    Raises:
        ValueError: there is no line to draw.
    """
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ValueError("plot: the run has no line in its metrics.csv")
    figure = _figure(9, 5)
    axes = figure.subplots()
    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    window = len(rows) // SMOOTHED
    blue, vermilion = STYLES
    alone: dict[str, Any] = {"linestyle": "none", "marker": "o"} if len(rows) == 1 else {}
    if window < 5:
        axes.plot(steps, losses, label="training, one step", color=blue["color"], **alone)
    else:
        axes.plot(steps, losses, label="training, one step", color=blue["color"], alpha=0.3, linewidth=0.8)
        sums = [0.0]
        for loss in losses:
            sums.append(sums[-1] + loss)
        means = [(sums[i + window] - sums[i]) / window for i in range(len(rows) - window + 1)]
        label = f"training, mean of the last {window} reports"
        axes.plot(steps[window - 1 :], means, label=label, color=blue["color"])
    validated = [(row.step, row.validation_loss) for row in rows if row.validation_loss is not None]
    if validated:
        at, validations = zip(*validated, strict=True)
        axes.plot(at, validations, label="validation", **vermilion)
        last = (at[-1], validations[-1])
        axes.annotate(f"{last[1]:.3f}", last, (0, 8), textcoords="offset points", ha="right", bbox=WHITE)
    _describe(axes, "", "step", "loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{title}: {rows[-1].step:,} steps, {rows[-1].tokens:,} tokens")
    figure.legend(loc="outside lower center", ncols=3)
    _save(figure, path)


def _distributions(axes: Axes, samples: Sequence[Sequence[float]], title: str, what: str) -> None:
    """Cumulative shares of times in seconds, from zero to a little beyond the slowest hundredth; the label of the axis
    says how many are further right, and the slowest."""
    longest, slowest = 0.0, 0.0
    for values, style in zip(samples, STYLES, strict=False):
        if not values:
            continue
        ordered = sorted(1e3 * value for value in values)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.plot(
            [ordered[0], *ordered],
            [0, *shares],
            drawstyle="steps-post",
            color=style["color"],
            linestyle=style["linestyle"],
        )
        marks = [quantile(ordered, share) for share in SHARES]
        axes.plot(marks, SHARES, color=style["color"], marker=style["marker"], linestyle="none")
        longest, slowest = max(longest, *marks), max(slowest, ordered[-1])
    end = HEAD * longest or 1
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.03)
    axes.set_yticks([0, 0.25, *SHARES], ["0", "25 %", "50 %", "90 %", "99 %"])
    beyond = sum(1e3 * value > end for values in samples for value in values)
    label = f"milliseconds\n({beyond} of the {what} further right, up to {slowest:,.0f})" if beyond else "milliseconds"
    _describe(axes, title, label, f"share of {what} within")


def _figure(width: float, height: float) -> Figure:
    """In inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _describe(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(path, dpi=150)
