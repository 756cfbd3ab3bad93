"""`lpa bench`: a benchmark per sub-command; what each does is in its file in `server/bench`.

A benchmark reports ratios that were measured in one run: absolute figures move with the other load of the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.cli.command import CacheDtype, Dtype, Model, Weights, user_errors

bench = typer.Typer(
    help="Measure servers and the engine; ratios come from one run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Argument(help="Root of a server, with or without /v1.")]
Compare = Annotated[str | None, typer.Option(help="A second server: rounds alternate, and ratios are shown.")]
ModelName = Annotated[str | None, typer.Option(help="Model of the first server.", show_default="the first it lists")]
CompareModel = Annotated[str | None, typer.Option(help="Model of the second.", show_default="the first it lists")]
Pid = Annotated[int | None, typer.Option(help="Process of the first server, stopped while the second is measured.")]
ComparePid = Annotated[int | None, typer.Option(help="Process of the second server, stopped likewise.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not; 5 or more to compare.")]
EngineRounds = Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")]
InputLen = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
OutputLen = Annotated[int, typer.Option(min=1, help="Tokens of a completion.")]
StreamLen = Annotated[int, typer.Option(min=2, help="Tokens of a completion.")]  # with a time from one to the next
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the matrix products.", show_default="all")]
Seed = Annotated[int, typer.Option(help="The prompts follow from it.")]
VocabSize = Annotated[int, typer.Option(min=1, help="Prompt token ids are below this.")]
ApiKey = Annotated[str | None, typer.Option(help="Sent as a bearer token.", envvar="OPENAI_API_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE.png|.svg", help="Draw a figure; needs the extra `plot` (matplotlib).")
]
ScoreApi = Literal["echo", "prompt_logprobs", "perplexity"]


@bench.callback()
def _bench() -> None:
    """A group, however many sub-commands it has."""


@bench.command()
def serve(
    url: Url,
    compare: Compare = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests a second, at random intervals, instead of --concurrency.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of a round.", show_default="2 x concurrency")
    ] = None,
    rounds: Rounds = 5,
    seed: Seed = 0,
    vocab_size: VocabSize = 4096,
    connection_per_request: Annotated[bool, typer.Option(help="Open a connection for every request.")] = False,
    model: ModelName = None,
    compare_model: CompareModel = None,
    pid: Pid = None,
    compare_pid: ComparePid = None,
    api_key: ApiKey = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Streamed greedy completions of random prompts: rates and latencies of any OpenAI-compatible server."""
    from server.bench.load import Load
    from server.bench.rounds import Target, Workload
    from server.bench.serve import complete
    from server.client import Client

    with user_errors():
        _check_plot(plot)
        load = Load(requests=requests or 2 * concurrency, concurrency=concurrency, rate=rate)
        workload = Workload(load=load, input_len=input_len, vocab_size=vocab_size, seed=seed, rounds=rounds)
        targets = [
            Target(
                Client(where, api_key=api_key, keep_alive=not connection_per_request),
                name,
                lambda model: complete(output_len, model),
                process,
            )
            for where, name, process in ((url, model, pid), (compare, compare_model, compare_pid))
            if where is not None
        ]
    pace = f"{concurrency} at a time" if rate is None else f"{rate:g} a second"
    title = f"{load.requests} requests, {pace}, {input_len} tokens in, {output_len} out"
    _run(targets, workload, title, plot, as_json)


@bench.command()
def score(
    url: Url,
    compare: Compare = None,
    api: Annotated[ScoreApi, typer.Option(help="How the first server is asked.")] = "perplexity",
    compare_api: Annotated[ScoreApi, typer.Option(help="How the second server is asked.")] = "prompt_logprobs",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a text.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Texts of a round.", show_default="4 x concurrency")
    ] = None,
    rounds: Rounds = 5,
    seed: Seed = 0,
    vocab_size: VocabSize = 4096,
    model: ModelName = None,
    compare_model: CompareModel = None,
    pid: Pid = None,
    compare_pid: ComparePid = None,
    api_key: ApiKey = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Log-probabilities of random texts: the rate of any server that gives them, by the API that it has."""
    from server.bench.load import Load
    from server.bench.rounds import Target, Workload
    from server.bench.score import score_text
    from server.client import Client

    with user_errors():
        _check_plot(plot)
        load = Load(requests=requests or 4 * concurrency, concurrency=concurrency)
        workload = Workload(load=load, input_len=length, vocab_size=vocab_size, seed=seed, rounds=rounds)
        targets = [Target(Client(url, api_key=api_key), model, lambda name: score_text(api, name), pid)]
        if compare is not None:
            other = Client(compare, api_key=api_key)
            targets.append(Target(other, compare_model, lambda name: score_text(compare_api, name), compare_pid))
    title = f"{load.requests} texts of {length} tokens, {concurrency} at a time"
    _run(targets, workload, title, plot, as_json)


def _check_plot(path: Path | None) -> None:
    """Before anything is measured."""
    from server.bench.plot import check_plot

    if path is not None:
        check_plot(path)


def _run(targets: Any, workload: Any, title: str, plot: Path | None, as_json: bool) -> None:
    from server.bench.plot import plot_servers
    from server.bench.report import print_report, run_rounds
    from server.client import RequestFailed

    with user_errors():
        try:
            report, timings = run_rounds(targets, workload)
        except RequestFailed as error:
            raise ValueError(error) from error
        if as_json:
            typer.echo(json.dumps({"workload": title, **report}, indent=2))
        else:
            print_report(report, title)
        if plot is not None:
            plot_servers(report, timings, title, plot)


@bench.command()
def step(
    model: Model = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="latent|mixed|full",
            help="Cache layout; may be given several times.",
            show_default="full and the model's own",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences at once; may be given several times.", show_default="1, 8, 32"),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens before; may be given several times.", show_default="256"),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Decode steps timed.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Threads = None,
    dtype: Dtype = None,
    weights: Weights = None,
    kv_cache_dtype: CacheDtype = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """The engine's step without HTTP, beside the least time that its bytes and operations take on this machine."""
    from server.bench.plot import plot_steps
    from server.bench.step import bench_steps, print_rows
    from server.settings import load_settings

    with user_errors():
        _check_plot(plot)
        settings = load_settings(
            model=model, dtype=dtype, weights=weights, kv_cache_dtype=kv_cache_dtype, threads=threads, device=device
        )
        rows = bench_steps(
            settings.model,
            layout or [],
            batch or [1, 8, 32],
            context or [256],
            steps=steps,
            dtype=settings.dtype,
            weights=settings.weights,
            kv_cache_dtype=settings.kv_cache_dtype,
            threads=settings.threads,
            device=settings.device,
        )
        if as_json:
            measured = list(rows)
            typer.echo(json.dumps(measured, indent=2))
        else:
            measured = print_rows(rows)
        if plot is not None:
            plot_steps(measured, f"Steps of {settings.model.resolve().name}, dtype {settings.dtype}", plot)


@bench.command()
def models(
    folders: Annotated[
        list[Path], typer.Argument(help="Model folders; the others are compared with the first, as a dense one.")
    ],
    text: Annotated[
        list[Path] | None, typer.Option(help="Text whose perplexity is measured; may be given several times.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=3, help="Tokens of each text.")] = 16384,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window.", show_default="the model's context")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Minimal pairs: tab-separated columns phenomenon, good and bad, the last two sentences."),
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences that decode at once; may be given several times.", show_default="1, 32"),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, and before the decoded ones.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed in a round.")] = 16,
    rounds: EngineRounds = 5,
    threads: Threads = None,
    dtype: Dtype = None,
    weights: Weights = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Versions of one model side by side: perplexities, minimal pairs, bytes, and speeds without HTTP."""
    from rich.progress import SpinnerColumn, TextColumn

    from server.bench.models import bench_models, print_rows, read_pairs
    from server.bench.plot import plot_models
    from server.cli.command import progress_bar
    from server.settings import local_model

    with user_errors(), progress_bar(SpinnerColumn(), TextColumn("{task.description}")) as bar:
        _check_plot(plot)
        task = bar.add_task("")
        rows = bench_models(
            [local_model(folder) for folder in folders],
            {str(path): path.read_text(encoding="utf-8-sig") for path in text or []},
            [] if pairs is None else read_pairs(pairs),
            tokens=tokens,
            max_length=max_length,
            streams=streams or [1, 32],
            context=context,
            steps=steps,
            rounds=rounds,
            options={"dtype": dtype, "weights": weights, "threads": threads},
            progress=lambda what: bar.update(task, description=what),
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_rows(rows)
    if plot is not None:
        plot_models(rows, plot)


@bench.command()
def overhead(
    model: Model = None,
    streams: Annotated[int, typer.Option(min=1, help="Completions at once.")] = 32,
    input_len: InputLen = 128,
    output_len: StreamLen = 128,
    dtype: Dtype = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """The share of HTTP, detokenization and scheduling in a step, over real sockets."""
    from server.bench.overhead import bench_overhead
    from server.settings import load_settings

    with user_errors():
        settings = load_settings(
            model=model, dtype=dtype, weights=weights, log_requests=False, max_num_seqs=max(64, streams)
        )
        found = bench_overhead(settings, streams, input_len, output_len)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(
        f"{found['streams']} streams: {found['step_ms']:.2f} ms from step to step, {found['run_ms']:.2f} ms of them in "
        f"the model and sampling, {found['outside']:.1%} outside. The event loop computes "
        f"{found['event_loop_cpu_ms']:.2f} ms in that time, {found['metrics_ms']:.3f} ms of them "
        f"({found['metrics']:.2%} of a step) for the metrics. Without HTTP a step takes {found['alone_ms']:.2f} ms "
        f"({found['slowdown']:.2f}x)."
    )


@bench.command()
def batches(
    model: Model = None,
    streams: Annotated[int, typer.Option(min=1, help="Completions at once.")] = 8,
    input_len: InputLen = 128,
    output_len: StreamLen = 128,
    rounds: EngineRounds = 5,
    dtype: Dtype = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Streams alone, and beside a running batch: what it takes from their inter-token latency, and gets through."""
    from rich.progress import BarColumn, MofNCompleteColumn

    from server.bench.batches import bench_batches
    from server.cli.command import progress_bar
    from server.settings import load_settings

    with user_errors(), progress_bar(BarColumn(), MofNCompleteColumn()) as bar:
        task = bar.add_task("", total=rounds + 1)
        found = bench_batches(
            load_settings(model=model, dtype=dtype, weights=weights),
            streams=streams,
            input_len=input_len,
            output_len=output_len,
            rounds=rounds,
            on_round=lambda number: bar.update(task, completed=number),
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name in ("median", "p99"):
        of, ratio = found[name], found[name]["ratio"]
        typer.echo(
            f"inter-token latency of {streams} streams, {name}: {of['alone_ms']:.2f} ms alone and "
            f"{of['beside_ms']:.2f} ms beside a batch: {ratio['median']:.2f}x "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    typer.echo(f"the batch got through {found['batch_tokens_per_s']:,.0f} tokens per second meanwhile")


@bench.command()
def sampling(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    streams: Annotated[int, typer.Option(min=2, help="Streams that decode together.")] = 32,
    input_len: InputLen = 65,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed per feature and round.")] = 10,
    rounds: EngineRounds = 7,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="dtype that the model computes in.")
    ] = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """The engine's step without HTTP, one sampling feature after another, as a ratio to a greedy step."""
    from rich.progress import Progress

    from server.bench.sampling import bench_sampling, print_rows

    with user_errors(), Progress(transient=True) as progress:
        task = progress.add_task("rounds", total=rounds + 1)
        rows = bench_sampling(
            model,
            streams=streams,
            input_len=input_len,
            steps=steps,
            rounds=rounds,
            dtype=dtype,
            threads=threads,
            on_round=lambda number: progress.update(task, completed=number),
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_rows(rows)


@bench.command()
def loglikelihood(
    model: Annotated[
        Path | None, typer.Argument(help="Model folder.", show_default="LPA_MODEL, or the embedded model")
    ] = None,
    sets: Annotated[int, typer.Option(min=1, help="Contexts of a round.")] = 16,
    context_len: Annotated[int, typer.Option(min=1, help="Tokens of a context.")] = 400,
    continuations: Annotated[int, typer.Option(min=2, help="Continuations of each context.")] = 4,
    continuation_len: Annotated[int, typer.Option(min=1, help="Tokens of a continuation.")] = 10,
    rounds: EngineRounds = 5,
    dtype: Dtype = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Multiple choice: continuations of shared contexts as sets, and one by one without a prefix cache."""
    from server.bench.loglikelihood import bench_loglikelihood
    from server.client import RequestFailed
    from server.settings import load_settings

    with user_errors():
        settings = load_settings(model=model, dtype=dtype, weights=weights, log_requests=False)
        try:
            found = bench_loglikelihood(
                settings,
                sets=sets,
                context_len=context_len,
                continuations=continuations,
                continuation_len=continuation_len,
                rounds=rounds,
            )
        except RequestFailed as error:
            raise ValueError(error) from error
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    speedup = found["speedup"]
    typer.echo(
        f"{sets} contexts of {context_len} tokens with {continuations} continuations of {continuation_len}: sets are "
        f"{speedup['median']:.2f}x as fast as pairs one by one ({speedup['low']:.2f} to {speedup['high']:.2f}; tokens "
        f"{found['bound']:.2f}x); sums of log-probabilities differ by {found['difference']:.1e} nats at most"
    )


@bench.command()
def health(
    url: Url,
    api_key: ApiKey = None,
    limit_ms: Annotated[
        float | None, typer.Option(min=0, help="End with status 1 if a silence is longer than this.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The longest silence of /health beside each kind of the largest request that the server's limits allow.

    The limits are those of this command's own LPA_ variables: set them as the server's are.
    """
    import dataclasses

    from server.bench.health import Silence, bench_health
    from server.settings import load_settings

    def show(one: Silence) -> None:
        typer.echo(
            f"{one.name:26} {one.body_bytes:>12,} {one.took_ms:>10,.0f} {one.longest_ms:>10.1f} {one.answers:>8}   "
            f"{one.status}"
        )

    if not as_json:
        typer.echo(f"{'request':26} {'bytes':>12} {'took ms':>10} {'silence ms':>10} {'/health':>8}   answer")
    with user_errors():
        found = bench_health(url, api_key, load_settings(), (lambda _: None) if as_json else show)
    longest = max(silence.longest_ms for silence in found)
    if as_json:
        rows = [dataclasses.asdict(silence) for silence in found]
        typer.echo(json.dumps({"longest_ms": longest, "kinds": rows}, indent=2))
    else:
        typer.echo(f"The longest silence is {longest:.1f} ms.")
    if limit_ms is not None and longest > limit_ms:
        raise typer.Exit(1)


@bench.command()
def capacity(
    steps: Annotated[Path, typer.Argument(help="What `lpa bench step --json` has written.")],
    layout: Annotated[
        str | None,
        typer.Option(metavar="latent|mixed|full", help="Cache layout.", show_default="the one that was measured"),
    ] = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at once, as --max-num-seqs.", show_default="the largest batch measured"),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait.")] = 1024,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=1e-6, help="Requests a second that machines are counted for; may be given several times."),
    ] = None,
    inter_token_ms: Annotated[float, typer.Option(min=0, help="Most milliseconds between tokens, on average.")] = 100,
    wait_s: Annotated[float, typer.Option(min=0, help="Most seconds in the queue, on average.")] = 1,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of a machine, in any currency.")] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """How many requests a machine carries at which latency, and how many machines more take: computed from steps."""
    from server.bench.capacity import Workload, bench_capacity, print_capacity, rates_to_plot, read_steps
    from server.bench.plot import plot_capacity

    with user_errors():
        _check_plot(plot)
        measured = read_steps(steps, layout, input_len, output_len)
        workload = Workload(input_len, output_len, slots or measured.batches[-1], max_queue)
        found = bench_capacity(
            measured,
            workload,
            sorted(rate or []),
            inter_token_ms=inter_token_ms,
            wait_s=wait_s,
            price_per_hour=price_per_hour,
        )
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            print_capacity(found)
        if plot is not None:
            title = f"{input_len} tokens in, {output_len} out, {workload.slots} sequences at once"
            plot_capacity(rates_to_plot(measured, workload), found["replicas"], title, plot)


@bench.command()
def device(
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu: tiny sizes without a GPU's kernels.")] = "cuda",
    part: Annotated[
        list[str] | None, typer.Option(help="Part to run; may be given several times.", show_default="all of them")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, as on a CPU.")] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="For all parts; what they leave no time for is named.")] = 9,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Where the report is written, after each part.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the CUDA backend on a GPU, part by part, and measure it; ends with status 1 if a check or a part failed."""
    from lpa_model.backends.features import resolve_device
    from server.bench.device.parts import PARTS, bench_device
    from server.bench.device.report import print_part
    from server.bench.device.setup import Setup

    with user_errors():
        place = resolve_device(device)
        if unknown := set(part or []) - set(PARTS):
            raise ValueError(f"part: {min(unknown)!r} is none of {', '.join(PARTS)}")
        setup = Setup(device, quick or place.type == "cpu")
        report = bench_device(
            setup, part or list(PARTS), minutes, out, (lambda name, found: None) if as_json else print_part
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    if any("error" in found or not found.get("ok", True) for found in report.values()):
        raise typer.Exit(1)
