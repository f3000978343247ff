"""Regression tasks: what their sources promise about them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import innerloop as il
from innerloop.tasks import TaskSource
from innerloop.tasks._regression import normal, quadratic_form

SOURCES = ["sinusoid", "linear", "quadratic", "stations"]


@pytest.fixture(params=SOURCES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str, request: pytest.FixtureRequest, **options: object) -> TaskSource:
    if name == "stations":
        options["data"] = request.getfixturevalue("shared_data")
    return il.tasks.SOURCES[name](**{"shots": 9, "queries": 12, **options})


def test_shapes(name: str, request: pytest.FixtureRequest) -> None:
    tasks = make(name, request)
    (support, support_targets), (query, query_targets) = tasks.batch("train", 0, 4)
    assert tasks.name == name
    assert tasks.ways is None
    assert tasks.output_size == 1
    assert support.shape == (4, 9, *tasks.input_shape)
    assert query.shape == (4, 12, *tasks.input_shape)
    assert support_targets.shape == (4, 9, 1)
    assert query_targets.shape == (4, 12, 1)
    assert all(
        values.dtype == torch.float32 and values.isfinite().all()
        for values in (support, support_targets, query, query_targets)
    )


def test_a_task_is_a_function_of_split_seed_and_index(name: str, request: pytest.FixtureRequest) -> None:
    tasks = make(name, request)
    alone = tasks.batch("train", 812, 1)
    for one, many in zip(alone, make(name, request).batch("train", 810, 5), strict=True):
        assert torch.equal(one[0][0], many[0][2])
        assert torch.equal(one[1][0], many[1][2])
    targets = alone.support[1]
    others = [
        tasks.batch("train", 811, 1),
        tasks.batch("test", 812, 1),
        make(name, request, seed=1).batch("train", 812, 1),
    ]
    assert not any(torch.equal(targets, other.support[1]) for other in others)


def test_impossible_numbers(name: str, request: pytest.FixtureRequest) -> None:
    for option in ("shots", "queries"):
        with pytest.raises(ValueError, match=f"{option} is 0; it must be at least 1"):
            make(name, request, **{option: 0})
    with pytest.raises(ValueError, match="seed is -1"):
        make(name, request, seed=-1)
    with pytest.raises(ValueError, match=f"{name} has no split 'val'; it has train, validation, test"):
        make(name, request).batch("val", 0, 1)


def test_sinusoids() -> None:
    (x, y), _ = il.tasks.sinusoid(shots=200).batch("train", 0, 300)
    assert x.min() > -5
    assert x.max() < 5
    # A least-squares fit of a sin x + b cos x finds every task's amplitude and phase.
    basis = torch.cat([x.sin(), x.cos()], -1).double()
    fit = torch.linalg.lstsq(basis, y.double()).solution
    assert torch.allclose(basis @ fit, y.double(), atol=1e-5)
    amplitude, phase = fit.norm(dim=1).flatten(), torch.atan2(-fit[:, 1], fit[:, 0]).flatten()
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, torch.pi)):
        assert low <= values.min() < low + 0.05 * high
        assert 0.95 * high < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, rel=0.1)


def test_linear_weights_lie_around_one() -> None:
    (x, y), _ = il.tasks.linear(shots=40, inputs=5, noise=0.0).batch("train", 0, 500)
    weights = torch.linalg.lstsq(x.double(), y.double()).solution
    assert torch.allclose(x.double() @ weights, y.double(), atol=1e-5)
    assert torch.allclose(weights.mean((0, 2)), torch.ones(5, dtype=torch.float64), atol=0.15)
    assert weights.std() == pytest.approx(1, rel=0.1)
    (x, y), _ = il.tasks.linear(shots=400, inputs=5, noise=0.5).batch("train", 0, 50)
    residuals = y - x @ torch.linalg.lstsq(x, y).solution
    assert residuals.std() == pytest.approx(0.5, rel=0.05)


def test_quadratic_has_the_hessian_it_promises() -> None:
    tasks = il.tasks.quadratic(shots=10, queries=8, inputs=6, eigenvalues=(0.1, 10.0))
    task = tasks.batch("test", 0, 3).to(dtype=torch.float64)
    forms = [quadratic_form(*part) for part in task]
    spectrum = torch.from_numpy(np.geomspace(0.1, 10, 6))
    for (inputs, targets), (hessian, slope) in zip(task, forms, strict=True):
        assert torch.allclose(torch.linalg.eigvalsh(hessian), spectrum.expand(3, 6), rtol=1e-5)
        weights = torch.randn(6, dtype=torch.float64, requires_grad=True)
        loss = F.mse_loss(inputs[1] @ weights, targets[1, :, 0])
        (gradient,) = torch.autograd.grad(loss, weights)
        assert torch.allclose(gradient, hessian[1] @ weights - slope[1], rtol=1e-12, atol=1e-12)
    optima = [torch.linalg.solve(hessian, slope) for hessian, slope in forms]
    assert torch.allclose(optima[0], optima[1], atol=1e-4)
    assert not torch.allclose(forms[0][0], forms[1][0], atol=0.1)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("quadratic", {"shots": 5}, "shots is 5, fewer than its 8 inputs, .* ask for 8 or more"),
        ("quadratic", {"eigenvalues": (2.0, 1.0)}, "the smallest and the largest, above 0"),
        ("quadratic", {"inputs": 0}, "inputs must be at least 1"),
        ("linear", {"inputs": 0}, "at least 1 and at least 0"),
        ("linear", {"noise": -1.0}, "at least 1 and at least 0"),
    ],
)
def test_impossible_shapes(source: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        il.tasks.SOURCES[source](**options)


def test_normal_numbers() -> None:
    values = normal(np.random.Philox(key=0).random_raw(200_000))
    assert values.shape == (100_000,)
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)
    assert (np.abs(values) < 1.959964).mean() == pytest.approx(0.95, abs=0.003)


# Weather stations


def test_stations_are_real_years_of_their_split(shared_data: Path) -> None:
    tasks = il.tasks.stations(data=shared_data)
    with np.load(shared_data / "temperature_normals.npz") as stored:
        celsius, split = (stored["tavg_tenths_degF"] / 10 - 32) / 1.8, stored["split"]
    assert tasks.mean == pytest.approx(celsius[split == 0].mean())
    assert tasks.std == pytest.approx(celsius[split == 0].std())
    assert -5 < tasks.mean < 25
    for number, name in enumerate(("train", "validation", "test")):
        (days, given), (others, asked) = tasks.batch(name, 0, 20)
        assert given.shape == (20, 5, 1)
        assert asked.shape == (20, 361, 1)
        position = ((torch.cat([days, others], 1).squeeze(-1) + 1) * 365 / 2).round().long()
        assert torch.equal(position.sort().values, torch.arange(366).expand(20, 366))
        years = torch.empty(20, 366).scatter_(1, position, torch.cat([given, asked], 1).squeeze(-1))
        known = torch.from_numpy((celsius[split == number] - tasks.mean) / tasks.std).float()
        distances = (years[:, None] - known).abs().amax(-1)
        assert (distances.amin(1) < 1e-5).all()
        assert distances.argmin(1).unique().numel() > 15


def test_stations_ask_for_no_more_than_a_year(shared_data: Path) -> None:
    (_, query) = il.tasks.stations(shots=3, queries=7, data=shared_data).batch("train", 0, 2)
    assert query[0].shape == (2, 7, 1)
    with pytest.raises(ValueError, match="360 shots and 7 queries are more than the 366 days"):
        il.tasks.stations(shots=360, queries=7, data=shared_data)


def test_stations_need_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"stations is not downloaded; data= \(--data\) takes"):
        il.tasks.stations()
    np.savez(tmp_path / "temperature_normals.npz", tavg_tenths_degF=np.zeros((2, 365)), split=np.zeros(2))
    with pytest.raises(ValueError, match="is not laid out as expected; data="):
        il.tasks.stations(data=tmp_path)
