"""Whether training says that adaptation fails, and at which rate it would not."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import innerloop as il
from innerloop.cli import main
from innerloop.errors import Diverged
from innerloop.tasks import Episodes, ImageSet
from innerloop.training import build, health
from innerloop.training import fit as fit_module
from innerloop.training.evaluation import Estimate, Scores
from innerloop.training.fit import fit
from innerloop.training.runs import read_run
from innerloop.training.settings import Settings
from innerloop.training.store import Record

SINUSOID = ["--dataset=sinusoid", "--model=mlp", "--filters=8", "--inner=sgd", "--tasks-per-batch=2", "--device=cpu"]
SHORT = ["--steps=4", "--validate-every=2", "--validation-tasks=8", "--test-tasks=8"]


@pytest.fixture(scope="module")
def tasks() -> Episodes:
    """3-way 2-shot tasks on 5x5 images: a pattern a class, and noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(18, 1, 1, 5, 5, generator=generator)
    images = (patterns + 0.4 * torch.rand(18, 8, 1, 5, 5, generator=generator)) / 1.4
    splits = {"train": tuple(range(10)), "validation": (10, 11, 12, 13), "test": (14, 15, 16, 17)}
    names = tuple(map(str, range(18)))
    image_set = ImageSet("patterns", (images * 255).byte().flatten(0, 1), (8,) * 18, names, splits)
    return Episodes(image_set, ways=3, shots=2, queries=4)


def head_learner(lr: float, **inner: float) -> il.MetaLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, 3))
    solver = il.SGD(lr=lr, steps=16, **inner)  # type: ignore[arg-type]
    return il.MetaLearner(model, il.Named("3.*"), solver, il.Implicit(il.CG(5)))


def scores(accuracy: float, interval: float, loss: float) -> Scores:
    losses = torch.full((100,), loss)
    return Scores(100, 5, False, Estimate(loss, 0.1), Estimate(accuracy, interval), None, None, None, losses)


def test_a_diverging_head_stops_with_a_sentence(tasks: Episodes, caplog: pytest.LogCaptureFixture) -> None:
    records: list[Record] = []
    options: dict[str, Any] = dict(tasks_per_batch=2, validate_every=4, validation_tasks=20, progress=False)
    with (
        caplog.at_level(logging.WARNING, "innerloop"),
        pytest.raises(
            Diverged, match=r"^stopped at step 12, after 3 hopeless.*guessing.*raises its own loss.*--inner-lr"
        ),
    ):
        fit(head_learner(5.0, proximal=0.5), tasks, steps=100, log=records.append, **options)
    found = [record for record in records if record["kind"] == "validation"]
    assert len(found) == health.PATIENCE
    assert all(record["loss"] > health.FAR * math.log(3) for record in found)
    assert "warning" in found[0]  # at once, not when training stops
    assert "step 4, validation: the accuracy" in caplog.text


def test_a_healthy_head_says_nothing(tasks: Episodes, caplog: pytest.LogCaptureFixture) -> None:
    learner = head_learner(0.3, proximal=0.5)
    records: list[Record] = []
    options: dict[str, Any] = dict(steps=50, tasks_per_batch=2, validate_every=25, validation_tasks=40)
    fit(learner, tasks, log=records.append, progress=False, **options)
    assert records[-1]["accuracy"] > 0.4
    assert not any("warning" in record for record in records)
    assert not caplog.records
    losses = health.inner_losses(learner, tasks)
    assert len(losses) == 17
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("accuracy", "interval", "loss", "losses", "words"),
    [
        (0.20, 0.01, 1.61, [1.7, 0.5], "the accuracy, 20.0 % ± 1.0, is that of guessing, 20.0 %. Train longer"),
        (0.21, 0.02, 276, [1.6, 0.5], "is that of guessing, 20.0 %; the loss is 276, and that of guessing 1.61. Lower"),
        (0.60, 0.01, 6.0, [1.6, 0.5], "the loss is 6, and that of guessing 1.61. Lower the inner rate"),
        (0.60, 0.01, 1.0, [1.6, 0.1, 7.7], "adaptation raises its own loss, 1.6 -> 7.7 in 2 steps. Lower"),
        (0.60, 0.01, 1.0, [1.6, math.nan], "adaptation raises its own loss"),
        (0.23, 0.02, 1.7, [1.6, 0.5], ""),
        (0.20, math.nan, 1.7, [1.6, 0.5], ""),  # of a single task
    ],
)
def test_what_is_said(accuracy: float, interval: float, loss: float, losses: list[float], words: str) -> None:
    found = health.ailment(scores(accuracy, interval, loss), 5, losses)
    assert words in found
    assert bool(found) == bool(words)
    assert health.hopeless(scores(accuracy, interval, loss), 5) == (loss == 276)


@pytest.mark.parametrize(("decay", "proximal"), [(0.0, 0.0), (0.25, 1.0)])
def test_the_fitting_rate_is_one_over_the_curvature(decay: float, proximal: float) -> None:
    learner = il.MetaLearner(
        nn.Linear(8, 1, bias=False).double(),
        inner=il.SGD(lr=1.0, steps=2, weight_decay=decay, proximal=proximal),
        loss=nn.functional.mse_loss,
    )
    tasks = il.tasks.quadratic()  # Hessians with eigenvalues from 0.5 to 8
    assert health.curvature(learner, tasks) == pytest.approx(8 + decay + proximal, rel=1e-5)
    assert health.fitting_rate(learner, tasks) == float(f"{1 / (8 + decay + proximal):.2g}")
    words, warning = health.opening(learner, tasks)
    assert f"rate 1 times curvature {health.curvature(learner, tasks):.2g} is" in words
    assert "overshoots" in warning
    assert f"Give --inner-lr {1 / (8 + decay + proximal):.2g}" in warning


@pytest.mark.parametrize("shots", [1, 5])
def test_one_example_a_class_is_fitted_from_the_start(shots: int) -> None:
    """The class mean is the example itself, far from the others."""
    torch.manual_seed(0)
    linear = nn.Linear(784, 64)
    nn.init.normal_(linear.weight)
    body = nn.Sequential(nn.Flatten(), linear)
    learner = il.MetaLearner(nn.Sequential(body, nn.Linear(64, 5)), start=il.Prototypes(), adapts=il.Head())
    tasks = il.tasks.glyphs(ways=5, shots=shots, queries=2)
    before, *_, after = health.inner_losses(learner, tasks)
    assert (before < 1e-3) == (shots == 1) == (before - after < 1e-3)
    assert ("starts out fitted" in health.opening(learner, tasks)[0]) == (shots == 1)


def test_what_the_inner_loop_lowers_includes_its_terms() -> None:
    """On one quadratic: loss, weight decay and proximal term by hand, at the start and after one step."""
    inner = il.SGD(lr=0.1, steps=1, weight_decay=0.5, proximal=2.0)
    learner = il.MetaLearner(nn.Linear(2, 1, bias=False), inner=inner, loss=nn.functional.mse_loss)
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]])

    class One:
        def batch(self, split: str, start: int, count: int) -> il.Task:
            return il.Task((x[None], y[None]), (x[None], y[None]))

    start = learner.model.get_parameter("weight").detach().clone()
    end = learner.adapted_parameters(x, y)["weight"]

    def objective(w: torch.Tensor) -> float:
        loss = (x @ w.T - y).square().mean() + 0.25 * w.square().sum() + (w - start).square().sum()
        return loss.item()

    assert health.inner_losses(learner, One()) == pytest.approx([objective(start), objective(end)], rel=1e-6)


def test_auto_is_recorded_as_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", f"--out={tmp_path / 'run'}", *SINUSOID, *SHORT])
    settings = read_run(tmp_path / "run")
    auto = Settings(**{**vars(settings), "inner_lr": "auto"})
    assert isinstance(settings.inner_lr, float)
    tasks = build.build_tasks(settings, ["train"])
    learner = build.build_learner(auto, tasks.input_shape, 1, regression=True)
    assert settings.inner_lr == health.fitting_rate(learner, tasks)
    assert settings.threads == torch.get_num_threads()
    text = capsys.readouterr().out
    assert f"inner loop with fresh weights: rate {settings.inner_lr:.2g} times curvature" in text
    assert "on cpu, 1 thread, into" in text


def test_the_default_rate_is_a_number_where_it_was_tuned() -> None:
    assert Settings().inner_lr == Settings(dataset="omniglot").inner_lr == 0.1
    assert Settings(inner_lr="auto").inner_lr == "auto"
    assert Settings(dataset="cifar_fs").inner_lr == 0.1
    assert Settings(dataset="folder").inner_lr == "auto"


def test_a_solver_without_a_rate_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", f"--out={tmp_path / 'run'}", *SINUSOID, *SHORT, "--inner=adam"])
    assert "Adam scales its steps itself: give --inner-lr a number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_overshooting_rate_is_told_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--inner-lr=2", "--inner-steps=3", "--outer-lr=1e-6"]
    main(["train", f"--out={tmp_path / 'run'}", *SINUSOID, *SHORT, *options])
    told = capsys.readouterr().out
    assert "warning: the inner rate 2 overshoots" in told
    assert "warning: adaptation raises its own loss" in told
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["warnings"]) == 2
    report = (tmp_path / "run" / "report.md").read_text()
    assert report.index("**Warning:** the inner rate 2 overshoots") < report.index("8 test tasks")


class Clock:
    """Stands in for `time`: a second passes whenever somebody looks."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("kind", ["a function of the step", "step by step"])
def test_the_schedule_runs_over_the_time_that_there_is(
    tasks: Episodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A small share of the steps fits: by steps alone 99.9 % of the rate would be left."""

    def session(minutes: float | None, resume: bool = False) -> tuple[Any, list[float]]:
        monkeypatch.setattr(fit_module, "time", Clock())
        learner = il.MetaLearner(nn.Sequential(nn.Flatten(), nn.Linear(25, 3)), inner=il.SGD(lr=0.1, steps=1))
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
        scheduler: Any = (
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / 10_000)) / 2)
            if kind == "a function of the step"
            else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000)
        )
        records: list[Record] = []
        options: dict[str, Any] = dict(tasks_per_batch=1, validation_tasks=0, progress=False, folder=tmp_path / kind)
        given: dict[str, Any] = dict(optimizer=optimizer, scheduler=scheduler, minutes=minutes, resume=resume)
        fitted = fit(learner, tasks, steps=10_000, log=records.append, **given, **options)
        return fitted, [record["lr"] for record in records]

    fitted, rates = session(5.0)
    assert fitted.stopped == "minutes"
    assert fitted.step <= 150  # of 10,000: two looks at the clock a step
    assert rates == sorted(rates, reverse=True)
    assert rates[len(rates) // 2] == pytest.approx(5e-4, rel=0.1)
    assert rates[-1] < 1e-5
    if kind == "a function of the step":  # with twice the time it goes on from the middle, and anneals again
        fitted, rates = session(10.0, resume=True)
        assert rates[1] == pytest.approx(5e-4, rel=0.1)
        assert rates[-1] < 1e-5


def test_threads_are_free_ones_that_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Perf:
        now = 0.0

        def perf_counter(self) -> float:
            return Perf.now

    gain: dict[int, float] = {}

    def trial() -> None:
        Perf.now += gain[torch.get_num_threads()]

    monkeypatch.setattr(build, "time", Perf())
    monkeypatch.setattr(os, "environ", {})
    before = torch.get_num_threads()
    try:
        for load, seconds, expected in [
            (0.2, {1: 1.0, 4: 0.4}, 4),
            (0.2, {1: 1.0, 4: 0.6}, 1),  # gains too little
            (2.1, {1: 1.0, 2: 0.45}, 2),
            (3.0, {}, 1),  # nothing is tried where no second core is free
        ]:
            gain.update(seconds)
            monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0), raising=False)
            assert build.choose_threads(trial, most=4) == torch.get_num_threads() == expected
        monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3"})
        assert build.choose_threads(trial, most=3) == 3
    finally:
        torch.set_num_threads(before)
