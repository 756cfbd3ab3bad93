"""Low-rank factors: optimal for their inputs, within their budget, allocated where they cost least."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.checkpoint import load_model
from lpa_model.config import LPAConfig, Projection
from lpa_model.convert.export import export_llama
from lpa_model.convert.lowrank import calibrate, gradients, repair, weigh
from lpa_model.convert.lowrank.allocate import Option, allocate, parameter_options
from lpa_model.convert.lowrank.convert import Budget, factorise
from lpa_model.convert.lowrank.factor import decompose
from server.cli import lowrank
from tests.test_cli import assert_one_line, lpa, succeed
from tests.tiny import CORPUS, random_model, tiny_config, write_checkpoint

GROUPED: dict[str, Any] = {"attention_rank": None, "num_key_value_heads": 2}


def dense_config(**changes: Any) -> LPAConfig:
    return tiny_config(**{**GROUPED, **changes})


def random_windows(count: int = 6, length: int = 48) -> Tensor:
    return torch.randint(0, 300, (count, length), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> Any:
    return load_model(folder, torch.float32, torch.device("cpu"))


def skewed(rows: int, columns: int, seed: int) -> Tensor:
    """Rows whose second moment is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator).double()
    return torch.randn(rows, columns, generator=generator).double() * torch.logspace(0, -2, columns).double() @ mixing


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_cut_is_the_best_of_its_rank_for_the_inputs_and_the_weighted_outputs(
    shape: tuple[int, int], weighted: bool
) -> None:
    width_out, width_in = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()
    inputs = skewed(400, width_in, 4)
    outputs = skewed(300, width_out, 5) if weighted else None
    second = inputs.T @ inputs / len(inputs)
    importance = None if outputs is None else outputs.T @ outputs / len(outputs)
    found = decompose(weight, second, importance)
    root = torch.eye(width_out).double() if importance is None else torch.linalg.cholesky(importance).T

    def error(candidate: Tensor) -> float:
        return float((root @ (weight - candidate) @ inputs.T).square().sum() / len(inputs))

    energy = torch.linalg.svdvals(root @ weight @ inputs.T / len(inputs) ** 0.5).square()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for rank in (2, 5, 11):
        cut = found.up[:, :rank].double() @ found.down[:rank].double()
        best = float(energy[rank:].sum())  # Eckart and Young
        assert best * (1 - 1e-9) <= error(cut) <= best * 1.02 + 1e-4 * error(0 * cut)
        assert error(cut) < error(u[:, :rank] * s[:rank] @ vh[:rank])
        assert found.errors()[rank] == pytest.approx(best, rel=0.05, abs=2e-3 * float(energy.sum()))
    torch.testing.assert_close(found.up @ found.down, weight.float(), atol=1e-4, rtol=1e-4)


def test_inputs_that_span_less_than_the_whole_are_no_obstacle() -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    inputs = torch.zeros(8, 8)
    inputs[0, 0] = 1.0
    found = decompose(weight, inputs, None)
    cut = found.up[:, :1] @ found.down[:1]
    torch.testing.assert_close(cut[:, 0], weight[:, 0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.up @ found.down, weight, atol=1e-3, rtol=1e-3)
    assert decompose(torch.zeros(4, 4), torch.eye(4), None).up.isfinite().all()


@given(st.data())
def test_allocation_stays_within_its_budget_and_is_near_the_best(data: st.DataObject) -> None:
    curves = {}
    for key in range(data.draw(st.integers(1, 4))):
        costs = sorted(data.draw(st.sets(st.integers(1, 30), min_size=1, max_size=4)))
        errors = sorted(
            data.draw(st.lists(st.integers(1, 100), min_size=len(costs), max_size=len(costs))), reverse=True
        )
        curves[key] = [*(Option(c, c, float(e)) for c, e in zip(costs, errors, strict=True)), Option(None, 31, 0.0)]
    least = sum(min(option.cost for option in options) for options in curves.values())
    budget = data.draw(st.integers(max(0, least - 5), 31 * len(curves)))
    if budget < least:
        with pytest.raises(ValueError, match=f"least that factors take is {least:,}, more than the {budget:,}"):
            allocate(curves, budget)
        return
    chosen = allocate(curves, budget)
    assert chosen.keys() == curves.keys() and all(chosen[key] in curves[key] for key in curves)
    assert sum(option.cost for option in chosen.values()) <= budget
    all_ways = itertools.product(*curves.values())
    best = min(sum(o.error for o in way) for way in all_ways if sum(o.cost for o in way) <= budget)
    total = sum(option.error for option in chosen.values())
    # greedy misses the best by less than one step of one matrix
    assert total <= best + max(option.error for options in curves.values() for option in options)


def test_allocation_beats_equal_shares_where_matrices_differ() -> None:
    """One matrix of rank 4, one without any structure: the first gives, the second stays dense."""
    sizes = (64, 64)
    flat, steep = [float(64 - r) for r in range(65)], [max(0.0, 64.0 - 16 * r) for r in range(65)]
    curves = {"flat": parameter_options(sizes, flat, 4), "steep": parameter_options(sizes, steep, 4)}
    budget = 64 * 64 * 5 // 4
    chosen = allocate(curves, budget)
    assert chosen["steep"].rank is not None and chosen["steep"].error == 0 and chosen["flat"].rank is None
    equal = {
        key: max((o for o in options if o.cost <= budget / 2), key=lambda o: o.cost) for key, options in curves.items()
    }
    assert sum(o.error for o in chosen.values()) < sum(o.error for o in equal.values()) / 3


def test_full_rank_reproduces_the_dense_model(tmp_path: Path) -> None:
    """Every matrix, with biases and norms of queries and keys, at full rank."""
    config = dense_config(attention_bias=True, qk_norm=True)
    model = random_model(config)
    hidden = calibrate.embed(model, random_windows())
    ids = random_windows(2, 40)
    wanted = model.logits(model(ids))
    for layer, moments in calibrate.layers(model, hidden, config.projections, config.projections, len(hidden)):
        block = model.layers[layer]
        for name in config.projections:
            module = block.get_submodule(f"{'attention' if name in 'qkvo' else 'ffn'}.{name}_proj")
            found = decompose(
                module.weight,
                moments.inputs[calibrate.INPUT_OF[name]],
                weigh.output_weight(config, block, moments, name),
            )
            module.weight.copy_(found.up @ found.down)
            assert found.errors()[-1] == 0
    torch.testing.assert_close(model.logits(model(ids)), wanted, atol=2e-3, rtol=1e-3)


def test_moments_are_those_of_a_plain_forward_pass() -> None:
    config = dense_config()
    model, windows = random_model(config), random_windows()
    hidden = calibrate.embed(model, windows)
    seen: list[Tensor] = []
    handle = model.layers[1].ffn.down_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(windows)
    handle.remove()
    rows = seen[0][:, calibrate.SINKS :: calibrate.SPARSE[0]].flatten(0, 1).double()
    *_, (layer, moments) = calibrate.layers(model, hidden, config.projections, config.projections, len(hidden))
    assert layer == 1
    torch.testing.assert_close(moments.inputs["down"], rows.T @ rows / len(rows), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.norm(hidden), model(windows), atol=1e-4, rtol=1e-4)
    assert moments.queries.shape == (4, 8, 8) and moments.keys.shape == (2, 8, 8)


def test_moments_are_of_the_windows_that_count_and_all_move_on() -> None:
    config = dense_config()
    model, windows = random_model(config), random_windows()
    hidden, fewer = calibrate.embed(model, windows), calibrate.embed(model, windows[:2])
    of_some = list(calibrate.layers(model, hidden, config.projections, config.projections, 2))
    of_few = list(calibrate.layers(model, fewer, config.projections, config.projections, 2))
    for (_, some), (_, few) in zip(of_some, of_few, strict=True):
        assert all(torch.equal(some.inputs[name], few.inputs[name]) for name in few.inputs)
    torch.testing.assert_close(model.norm(hidden), model(windows), atol=1e-4, rtol=1e-4)


def test_a_turned_moment_is_that_of_turned_rows() -> None:
    model = random_model(dense_config())
    assert model.rotary is not None
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    offsets = [offset for offset in calibrate.OFFSETS if offset < model.config.max_position_embeddings]
    wanted = torch.zeros(8, 8).double()
    for offset in offsets:
        turned = model.rotary(rows[:, None], torch.full((50,), offset))[:, 0].double()
        wanted += turned.T @ turned / 50 / len(offsets)
    found = calibrate.turned(model.rotary, (rows.T @ rows / 50).double(), 1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    # what a key sees of a query that is t further on: (R_t q) . k = q . (R_-t k)
    back = calibrate.turned(model.rotary, torch.eye(8).double(), -1)
    torch.testing.assert_close(back, torch.eye(8).double(), atol=1e-6, rtol=1e-6)


SMALL = {"multiple": 4}


def parameters(config: LPAConfig, names: tuple[Projection, ...]) -> int:
    return sum(config.weight_count(name, layer) for layer in range(config.num_hidden_layers) for name in names)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "model", dense_config(tie_word_embeddings=True))


@pytest.mark.parametrize("method", ["weights", "kfac", "none"])
@pytest.mark.parametrize(
    ("budget", "names"),
    [
        ({"keep": 0.8}, ("q", "k", "v", "o", "gate", "up", "down")),
        ({"keep": 0.6, "attention_only": True}, ("q", "k", "v", "o")),
        ({"keep": 0.8, "uniform": True}, ("q", "k", "v", "o", "gate", "up", "down")),
    ],
)
def test_kept_parameters_are_within_the_share(
    dense_folder: Path, tmp_path: Path, method: Any, budget: dict[str, Any], names: tuple[Projection, ...]
) -> None:
    rows = factorise(
        dense_folder, tmp_path / "out", Budget(**budget, **SMALL, method=method), random_windows(), torch.float32
    )
    config = load(tmp_path / "out").config
    before = parameters(dense_config(), names)
    assert 0.9 * budget["keep"] * before < parameters(config, names) <= budget["keep"] * before or "uniform" in budget
    assert parameters(config, names) <= budget["keep"] * before
    assert {(row.layer, row.projection) for row in rows} == {(layer, name) for layer in (0, 1) for name in names}
    for row in rows:
        assert config.rank(row.projection, row.layer) == row.rank
        assert 0 <= row.error < 1 and (row.error == 0) == (row.rank is None)
        if row.rank is not None:
            sizes = config.projection_sizes(row.projection)
            assert row.rank % 4 == 0 and row.rank * sum(sizes) < sizes[0] * sizes[1]
    assert all(config.rank(name, 0) is None for name in config.projections if name not in names)
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


@pytest.mark.parametrize("ratio", [1.1, 1.25, 1.6])
@pytest.mark.parametrize("keep", [None, 0.9])
def test_cache_bytes_are_those_of_the_ratio(
    dense_folder: Path, tmp_path: Path, ratio: float, keep: float | None
) -> None:
    budget = Budget(cache_ratio=ratio, keep=keep, **SMALL)
    factorise(dense_folder, tmp_path / "out", budget, random_windows(), torch.float32)
    config, dense = load(tmp_path / "out").config, dense_config()
    cached = config.cache_elements_per_token("mixed", 4)
    assert cached == sum(16 + (config.rank("v", layer) or 16) for layer in (0, 1))
    assert cached * ratio <= dense.cache_elements_per_token("full", 4) < (cached + 4) * ratio + 4
    if keep is None:
        assert all(config.rank(name, layer) is None for name in "qko" for layer in (0, 1)) and config.ffn_rank is None
    else:
        assert parameters(config, config.projections) <= keep * parameters(dense, dense.projections)


def test_one_rank_for_all_leaves_what_does_not_pay_dense(dense_folder: Path, tmp_path: Path) -> None:
    factorise(dense_folder, tmp_path / "out", Budget(rank=12, **SMALL), random_windows(), torch.float32)
    config = load(tmp_path / "out").config
    assert config.attention_rank == {"q": [12, 12], "k": [None, None], "v": [None, None], "o": [12, 12]}
    assert config.ffn_rank == {"gate": [12, 12], "up": [12, 12], "down": [12, 12]}


def test_budgets_that_cannot_be_met_are_refused_with_the_reason(dense_folder: Path, tmp_path: Path) -> None:
    def refused(match: str, folder: Path = dense_folder, **budget: Any) -> None:
        with pytest.raises(ValueError, match=match):
            factorise(folder, tmp_path / "out", Budget(**budget), random_windows(), torch.float32)
        assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))

    refused(
        "cache_ratio: 1.7 cannot be met: rotary keys stay whole, 32 of the 64 numbers .* 1.60 is",
        cache_ratio=1.7,
        **SMALL,
    )
    refused(
        "keep: 0.05 of 15,360 parameters cannot be met: with factors of rank 4 wherever they pay 0.242 are",
        keep=0.05,
        **SMALL,
    )
    refused("keep: 1.0 is not between 0 and 1", keep=1.0)
    refused("cache_ratio: 1.0 is not above 1", cache_ratio=1.0)
    refused("rank: .* cannot be combined", rank=4, keep=0.9)
    refused("rank: 31 is below 32", rank=31)
    refused("keep, cache_ratio or rank")
    low_rank = write_checkpoint(tmp_path / "low", tiny_config())
    refused("q of layer 0 has rank 8 already", low_rank, keep=0.9)
    one = write_checkpoint(tmp_path / "one", tiny_config("setting1", attention_rank=None))
    refused("architecture: only setting 2", one, keep=0.9)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        factorise(dense_folder, full, Budget(keep=0.9), random_windows(), torch.float32)


@pytest.mark.parametrize("method", ["weights", "kfac"])
def test_what_is_kept_of_a_text_serves_other_budgets_with_the_same_numbers(
    dense_folder: Path, tmp_path: Path, method: Any
) -> None:
    windows, more, cuts = random_windows(), random_windows(2), tmp_path / "cuts"

    def made(name: str, cuts: Path | None = None, **budget: Any) -> tuple[bytes, bytes]:
        given = Budget(**budget, method=method, **SMALL)
        rows = factorise(
            dense_folder,
            tmp_path / name,
            given,
            windows,
            torch.float32,
            more=more,
            states=tmp_path / f"{name}.safetensors",
            cuts=cuts,
        )
        assert rows == found.setdefault(str(budget), rows)
        return (tmp_path / name / "model.safetensors").read_bytes(), (tmp_path / f"{name}.safetensors").read_bytes()

    found: dict[str, Any] = {}
    for number, budget in enumerate([{"keep": 0.8}, {"cache_ratio": 1.25}, {"keep": 0.6, "attention_only": True}]):
        assert made(f"alone{number}", **budget) == made(f"kept{number}", cuts, **budget)
    before = {path.name: path.stat().st_mtime_ns for path in cuts.iterdir()}
    assert set(before) == {"curves.json", "0.safetensors", "1.safetensors"}
    made("last", cuts, rank=12)
    assert {path.name: path.stat().st_mtime_ns for path in cuts.iterdir()} == before
    other = Budget(keep=0.8, method=method, multiple=8)
    for text, refused, match in (
        (windows[:3], Budget(keep=0.8, method=method, **SMALL), "cuts: .*cuts is of text "),
        (windows, Budget(keep=0.8, method="none", **SMALL), f"cuts: .*cuts is of method {method}: name another folder"),
        (windows, other, "cuts: .*cuts is of multiple 4"),
    ):
        with pytest.raises(ValueError, match=match):
            factorise(dense_folder, tmp_path / "never", refused, text, torch.float32, cuts=cuts)
    with pytest.raises(ValueError, match="exists already"):
        factorise(dense_folder, tmp_path / "never", other, windows, torch.float32, cuts=tmp_path / "last")
    assert not list(tmp_path.glob("never*")) and not list(tmp_path.glob(".*"))


def test_divergence_and_its_gradient_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "ROWS", 16)
    model, dense, ids = random_model(dense_config(), seed=1), random_model(dense_config()), random_windows(1, 40)[0]
    model.requires_grad_(True)
    with torch.no_grad():
        states = dense(ids[None])[0]
        wanted = model.logits(states).log_softmax(-1)
    loss = (wanted.exp() * (wanted - model.logits(model(ids[None])[0]).log_softmax(-1))).sum() / len(ids)
    weight = model.layers[0].get_parameter("attention.q_proj.weight")
    (gradient,) = torch.autograd.grad(loss, weight)
    assert repair.divergence(model, ids, states, train=True) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-4)


def drawn(probabilities: Tensor, points: Tensor) -> Tensor:
    """The first column of each row whose cumulative probability is above a point between 0 and 1."""
    rows = [list(itertools.accumulate(row)) for row in probabilities.tolist()]
    found = [
        next(i for i, total in enumerate(row) if total > point * row[-1])
        for row, point in zip(rows, points.flatten().tolist(), strict=True)
    ]
    return torch.tensor(found)[:, None]


def test_gradients_take_parts_of_all_windows() -> None:
    windows = torch.arange(4 * 600).view(4, 600)
    found = gradients.short(windows, 4 * gradients.SHORT)
    assert found[:, 0].tolist() == [0, 600 + 0, 2 * 600 + 0, 3 * 600 + 256]  # of eight parts
    assert torch.equal(found - found[:, :1], torch.arange(256).repeat(4, 1))
    assert len(gradients.short(windows)) == 8 and torch.equal(gradients.short(windows[:1, :100]), windows[:1, :100])


def test_labels_are_drawn_as_often_as_they_are_probable() -> None:
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    found = gradients.drawn(probabilities.repeat(20_000, 1), torch.Generator().manual_seed(0))
    shares = found.flatten().bincount(minlength=4) / len(found)
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)  # four standard deviations
    assert shares[1] == 0


def test_a_wide_moment_is_that_of_all_its_columns() -> None:
    """Its products are taken in blocks."""
    rows = torch.randn(30, 395)
    moment = calibrate.Moment(395)
    for part in (rows[:17], rows[17:]):
        moment.add(part)
    whole = rows.double().T @ rows.double() / 30
    torch.testing.assert_close(moment.mean(), whole, atol=1e-5, rtol=1e-5)
    assert moment.trace() == pytest.approx(float(30 * whole.trace()), rel=1e-5)


def test_gradients_are_those_of_every_token(tmp_path: Path) -> None:
    """Against autograd on the output of one projection, with the same labels drawn."""
    model, windows = random_model(dense_config()), random_windows(2, 20)
    found = gradients.output_moments(model, windows, ("v", "down"))
    generator = torch.Generator().manual_seed(0)
    total, count = torch.zeros(16, 16), 0
    for ids in windows:
        kept: list[Tensor] = []

        def keep(_: Any, __: Any, output: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(output.detach().requires_grad_(True))
            return kept[-1]

        handle = model.layers[0].attention.v_proj.register_forward_hook(keep)
        logprobs = model.logits(model(ids[None]))[0].log_softmax(-1)
        handle.remove()
        labels = drawn(logprobs.detach().exp(), torch.rand(len(logprobs), 1, generator=generator))
        (gradient,) = torch.autograd.grad(-logprobs.gather(1, labels).sum(), kept[0])
        rows = gradient[0, calibrate.SINKS :]
        total, count = total + rows.T @ rows, count + len(rows)
    torch.testing.assert_close(found[0, "v"].float(), total / count, atol=1e-4, rtol=1e-3)
    assert found[1, "down"].shape == (32, 32) and len(found) == 4


def repaired(source: Path, folder: Path, steps: int, stop_after: int | None = None) -> list[repair.Step]:
    """A run of `--repair`, ended after so many steps as by ^C."""
    windows, work = random_windows(5, 32), folder.with_name(folder.name + ".repair")
    repair.prepare(source, work, Budget(keep=0.7, **SMALL), windows[:3], windows[3:], random_windows(2, 32))
    count = itertools.count(1)
    return list(
        repair.repair(
            work, folder, windows, random_windows(2, 32), steps, torch.float32, lambda: next(count) == stop_after
        )
    )


def test_repair_goes_on_to_the_same_bits_and_brings_the_models_closer(dense_folder: Path, tmp_path: Path) -> None:
    whole = repaired(dense_folder, tmp_path / "whole", 40)
    assert [step.step for step in whole] == list(range(41))
    assert repaired(dense_folder, tmp_path / "parts", 40, stop_after=13)[-1].step == 13
    assert not (tmp_path / "parts").exists()
    with pytest.raises(ValueError, match=r"parts\.repair: is of a start with keep 0.7"):
        repair.prepare(
            dense_folder,
            tmp_path / "parts.repair",
            Budget(keep=0.8, **SMALL),
            random_windows(5, 32)[:3],
            random_windows(5, 32)[3:],
            random_windows(2, 32),
        )
    assert [step.step for step in repaired(dense_folder, tmp_path / "parts", 40)] == list(range(14, 41))
    one, other = (dict(load(tmp_path / name).named_parameters()) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole[-1].validation is not None
    ids, dense = random_windows(2, 32), load(dense_folder)
    factorise(dense_folder, tmp_path / "cut", Budget(keep=0.7, **SMALL), random_windows(5, 32)[:3], torch.float32)
    with torch.inference_mode():
        teacher = torch.cat([dense(window[None]) for window in ids])
    before = repair.validate(load(tmp_path / "cut"), ids, teacher)
    assert repair.validate(load(tmp_path / "whole"), ids, teacher) == pytest.approx(whole[-1].validation)
    assert whole[-1].validation < before
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts", "cut"}


def test_least_squares_alone_brings_outputs_closer(dense_folder: Path, tmp_path: Path) -> None:
    windows = random_windows(6, 48)
    factorise(dense_folder, tmp_path / "cut", Budget(keep=0.6, **SMALL), windows, torch.float32)
    dense, model = load(dense_folder), load(tmp_path / "cut")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        before = (model(windows) - dense(windows))[:, calibrate.SINKS :].square().mean()
        repair.refit(model, dense, windows, lambda done: None)
        after = (model(windows) - dense(windows))[:, calibrate.SINKS :].square().mean()
    assert after < before


def test_the_command_makes_factors_of_a_llama_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "POOR", 0.5)  # of a random model nothing is lost
    monkeypatch.setattr("lpa_model.convert.lowrank.text.EVALUATED", 512)
    config = dense_config(hidden_size=128, intermediate_size=256, num_key_value_heads=4, head_dim=32)
    export_llama(write_checkpoint(tmp_path / "own", config), tmp_path / "llama", torch.float32)
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 20, encoding="utf-8")
    given = ("--calibrate", text, "--calibrate-tokens", 1024)
    out = succeed("convert", "llama", tmp_path / "llama", tmp_path / "new", "--keep", 0.7, *given)
    after = load(tmp_path / "new").config
    assert 0.6 < parameters(after, after.projections) / parameters(config, config.projections) <= 0.7
    for wanted in ("of the projections", "cache bytes per token", "calibration's own kind", "not worth having"):
        assert wanted in out
    assert {path.name for path in tmp_path.iterdir()} == {"own", "llama", "text.txt", "new"}
    own = ("convert", "lowrank", tmp_path / "own", tmp_path / "x")
    assert_one_line(lpa(*own, "--cache-ratio", 1.9), "cache_ratio: 1.9 cannot be met: rotary keys")
    assert_one_line(lpa("convert", "llama", tmp_path / "llama", tmp_path / "x", "--repair", 3), "repair: needs keep")
    out = succeed(*own, "--cache-ratio", 1.2, *given, "--cuts", tmp_path / "cuts", "--repair", 3)
    assert "step 0, on text held out" in out and "step 3, KL" in out and load(tmp_path / "x").config.ffn_rank is None
    assert not (tmp_path / "x.repair").exists()
    again = ("convert", "lowrank", tmp_path / "own", tmp_path / "y", "--keep", 0.7, *given, "--cuts", tmp_path / "cuts")
    succeed(*again)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("new", "y")]
    assert weights[0] == weights[1]
    assert_one_line(lpa(*again[:3], tmp_path / "z", *again[4:], "--method", "none"), "is of method kfac: name another")
