"""The check of estimators against the exact meta-gradient: its numbers, its words and its command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innerloop as il
from commands import refused
from innerloop.cli import main
from innerloop.cli.check import _names
from innerloop.errors import Failed
from innerloop.inner import InnerSolver
from innerloop.meta_gradient import MetaGradient
from innerloop.problem import Tree
from innerloop.studies.check import Row, Spread, check
from innerloop.tasks import TaskSource
from innerloop.tasks._regression import quadratic_form
from innerloop.training.health import lanczos


def linear_learner(inner: InnerSolver) -> il.MetaLearner:
    """A linear model for the quadratic tasks, whose inner Hessian has eigenvalues from 0.5 to 8."""
    return il.MetaLearner(nn.Linear(8, 1, bias=False).double(), inner=inner, loss=F.mse_loss)


def network(**choices: object) -> il.MetaLearner:
    """A small network for the sinusoids."""
    model = il.models.MLP((1, 8, 8, 1), activation=nn.Tanh).double()
    options = {"inner": il.SGD(lr=0.02, steps=4), "loss": F.mse_loss} | choices
    return il.MetaLearner(model, **options)  # type: ignore[arg-type]


def rows(learner: il.MetaLearner, tasks: TaskSource, *estimators: str | MetaGradient) -> dict[str, Row]:
    return {row.name: row for row in check(learner, tasks, estimators, count=3).rows}


def spread(found: Spread | None) -> Spread:
    assert found is not None
    return found


def test_exact_estimators_have_no_error() -> None:
    exact = ("window:1", "binomial:4", "truncated:4")
    found = rows(network(), il.tasks.sinusoid(), "unrolled", "first-order", *exact)
    assert spread(found["unrolled"].error).high == 0
    for name in exact:
        assert spread(found[name].error).high < 1e-12
        assert spread(found[name].cosine).low > 1 - 1e-12
        assert "agrees with the exact" in found[name].sentence or "is exact" in found[name].sentence
    assert spread(found["first-order"].error).low > 1e-3
    assert [found[name].products for name in ("unrolled", "window:1", "first-order")] == [4, 4, 0]


def test_one_step_of_first_order_has_the_error_of_its_formula() -> None:
    learner, tasks = linear_learner(il.SGD(lr=0.1, steps=1)), il.tasks.quadratic()
    found = spread(check(learner, tasks, ["first-order"], count=1).rows[0].error)
    (inputs, targets), (query, answers) = tasks.batch("train", 0, 1).to(dtype=torch.float64)
    (h, c), (g, d) = (quadratic_form(*pair) for pair in ((inputs, targets), (query, answers)))
    start = learner.model.get_parameter("weight").detach()[0]
    adapted = start - 0.1 * (h[0] @ start - c[0])
    first = g[0] @ adapted - d[0]
    exact = first - 0.1 * h[0] @ first
    assert found.median == pytest.approx(((first - exact).norm() / exact.norm()).item(), rel=1e-10)


@pytest.mark.parametrize(
    ("inner", "shift"),
    [
        (il.SGD(lr=0.05, steps=3), 0.0),
        (il.Momentum(lr=0.05, steps=2, weight_decay=0.25, proximal=1.0), 1.25),
    ],
)
def test_spectrum_of_the_quadratic_tasks(inner: InnerSolver, shift: float) -> None:
    geometry = check(linear_learner(inner), il.tasks.quadratic(), ["unrolled"], count=2).geometry
    assert spread(geometry.smallest).median == pytest.approx(0.5 + shift, rel=1e-5)  # tasks are rounded to float32
    assert geometry.reach == pytest.approx(0.05 * (8 + shift), rel=1e-5)
    assert "the inner problem is convex here" in str(geometry)


def test_spectrum_of_a_network_is_that_of_its_whole_hessian() -> None:
    learner, tasks = network(inner=il.LearnedRates(lr=0.01, steps=1, per="layer-step")), il.tasks.sinusoid()
    with torch.no_grad():
        learner.rates["head/bias"].fill_(0.03)
    geometry = check(learner, tasks, ["unrolled"], count=1).geometry
    (inputs, targets), _ = tasks.batch("train", 0, 1).to(dtype=torch.float64)
    seen = []
    for model in (learner.model, learner.adapt(inputs[0], targets[0])):
        names = [name for name, _ in learner.model.named_parameters()]
        sizes = [model.get_parameter(name).shape for name in names]

        def loss(
            flat: torch.Tensor, model: nn.Module = model, sizes: list[torch.Size] = sizes, names: list[str] = names
        ) -> torch.Tensor:
            parts = flat.split([size.numel() for size in sizes])
            tree = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
            return F.mse_loss(torch.func.functional_call(model, tree, (inputs[0],)), targets[0])

        flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
        seen.append(torch.linalg.eigvalsh(torch.func.hessian(loss)(flat)))
    values = torch.cat(seen)
    assert spread(geometry.largest).median == pytest.approx(values.abs().max().item(), rel=1e-6)
    assert values.min().item() <= spread(geometry.smallest).median * (1 - 1e-9)
    assert spread(geometry.smallest).median == pytest.approx(values.min().item(), rel=0.05)
    assert geometry.rate == pytest.approx(0.03)
    assert "not convex" in str(geometry)


def test_lanczos_stops_where_nothing_is_left_and_passes_nan_on() -> None:
    matrix = torch.diag(torch.tensor([-2.0, 1.0, 5.0], dtype=torch.float64))
    start = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert lanczos(lambda x: matrix @ x, start, 3).tolist() == pytest.approx([-2, 5])
    assert lanczos(lambda x: matrix @ x * torch.nan, start, 3).isnan().all()


def test_sentences_name_the_cure() -> None:
    learner = linear_learner(il.SGD(lr=0.1, steps=6))
    found = rows(learner, il.tasks.quadratic(), "window:5", "binomial:1", "truncated:2", "first-order")
    sentence = found["window:5"].sentence
    assert "outside its safe range: 5 * lr * |H| = 4" in sentence
    assert "use window:1 or an inner rate below 0.025" in sentence
    assert "use binomial:2" in found["binomial:1"].sentence
    assert "use truncated:3" in found["truncated:2"].sentence
    assert "steps * lr * |H| = 4.8" in found["first-order"].sentence
    unsolved = rows(linear_learner(il.SGD(lr=0.01, steps=2, proximal=2.0)), il.tasks.quadratic(), "implicit")
    assert "take more inner steps, a larger rate or a larger proximal" in unsolved["implicit"].sentence
    steep = rows(linear_learner(il.SGD(lr=0.2, steps=6)), il.tasks.quadratic(), "binomial:1")
    assert "outside its safe range: lr * |H| = 1.6" in steep["binomial:1"].sentence
    gentle = rows(linear_learner(il.SGD(lr=0.001, steps=6)), il.tasks.quadratic(), "window:2")
    assert "range" not in gentle["window:2"].sentence


def test_implicit_is_compared_on_the_learners_own_problem() -> None:
    learner = linear_learner(il.SGD(lr=0.1, steps=300, proximal=1.0))
    solved = il.Implicit(il.CG(iterations=8))
    found = check(learner, il.tasks.quadratic(), ["unrolled", solved], count=2)
    row = found.rows[1]
    assert row.name == str(solved)
    assert spread(row.error).high < 1e-6
    assert spread(row.residual).high < 1e-6
    assert spread(row.unsolved).high < 1e-6
    assert spread(found.geometry.smallest).median == pytest.approx(1.5, rel=1e-5)


def test_memory_reduced_is_compared_in_the_backbone_alone() -> None:
    learner = network(adapts=il.Head(), inner=il.SGD(lr=0.2, steps=200, weight_decay=0.5), carry="slot")
    whole = il.Implicit(il.CG(20))  # the solution does not depend on where it starts, so it is as good there
    found = rows(learner, il.tasks.sinusoid(), il.MemoryReduced(il.CG(20)), whole, "unrolled:learn_start=false")
    reduced, full, constant = found.values()
    assert spread(reduced.error).high < 1e-6
    assert spread(full.error).high < 1e-6
    assert spread(constant.error).high == 0
    assert "(in what is not adapted, all that it learns)" in reduced.sentence
    assert "is exact" in constant.sentence
    assert not learner.carried.state_dict()


def test_an_indefinite_system_asks_for_a_larger_term() -> None:
    learner = network(inner=il.SGD(lr=0.02, steps=4, proximal=0.001))
    found = rows(learner, il.tasks.sinusoid(), "implicit")
    assert "not positive definite, the smallest eigenvalue with proximal 0.001 being" in found["implicit"].sentence
    assert "give proximal above" in found["implicit"].sentence


def test_a_singular_system_asks_for_a_term() -> None:
    model = il.models.MLP((4, 8, 8, 3), activation=nn.Tanh).double()
    learner = il.MetaLearner(model, adapts=il.Head(), inner=il.SGD(lr=0.1, steps=2))
    generator = torch.Generator().manual_seed(0)

    class Classes:
        def batch(self, split: str, start: int, count: int) -> list[il.Task]:
            inputs = torch.randn(count, 2, 6, 4, generator=generator)
            labels = torch.arange(3).repeat(2)
            return [il.Task((support, labels), (query, labels)) for support, query in inputs]

    found = check(learner, Classes(), ["implicit"], count=2)
    assert abs(spread(found.geometry.smallest).median) < 1e-9  # adding to all scores changes nothing
    assert "its system is singular: give weight_decay or proximal above 0" in found.rows[0].sentence


def test_reptile_is_judged_by_its_direction() -> None:
    row = rows(network(), il.tasks.sinusoid(), "reptile")["reptile"]
    assert row.error is None
    assert -1 <= spread(row.cosine).low <= spread(row.cosine).high <= 1
    assert "no gradient of the query loss" in row.sentence


def test_what_is_refused_gets_a_row_that_says_why() -> None:
    found = rows(network(), il.tasks.sinusoid(), "memory-reduced", "unrolled")
    assert found["memory-reduced"].cosine is None
    assert "use adapts=Head()" in found["memory-reduced"].sentence
    learner = network(inner=il.NewtonCG(steps=2, proximal=1.0), meta_gradient=il.Implicit())
    newton = rows(learner, il.tasks.sinusoid(), "implicit")
    assert "no exact meta-gradient to compare with" in str(newton["implicit"].refused)


def test_an_inner_loop_that_diverges_is_reported() -> None:
    found = check(linear_learner(il.SGD(lr=1e30, steps=20)), il.tasks.quadratic(), ["unrolled", "window:2"], count=2)
    assert [row.failed for row in found.rows] == [2, 2]
    assert "not finite" in found.rows[0].sentence
    assert "not finite" in str(found.geometry)


def test_the_learner_is_left_alone() -> None:
    learner = network(inner=il.SGD(lr=0.02, steps=4, proximal=0.5))
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    generator = torch.get_rng_state()
    found = check(learner, il.tasks.sinusoid(), ["unrolled", "implicit"], count=1)
    assert [row.refused for row in found.rows] == [None, None]
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert learner.training
    with pytest.raises(ValueError, match="1 task or more"):
        check(learner, il.tasks.sinusoid(), count=0)


def test_names_may_have_arguments() -> None:
    assert _names("unrolled,mixed:1=0.2,5=0.8,window:2,mode=true_forward,t1-t2, first-order") == [
        "unrolled",
        "mixed:1=0.2,5=0.8",
        "window:2,mode=true_forward",
        "t1-t2",
        "first-order",
    ]


class Ridge:
    """Ridge regression whose weight decays and data ratings are meta-parameters; all a source needs is ``batch``."""

    def __init__(self, form: str = "lone", noise: float = 0.0) -> None:
        self.form, self.noise = form, noise
        self.problem = il.Problem(lambda meta: {"w": 0.1 * meta["begin"]}, self.inner_loss, self.outer_loss)

    def inner_loss(self, params: Tree, meta: Tree, support: Any) -> torch.Tensor:
        inputs, targets = support
        error = (inputs + self.noise * torch.randn_like(inputs)) @ params["w"] - targets
        return (meta["rating"].exp() * error.square()).mean() + (meta["decay"].exp() * params["w"].square()).sum()

    def outer_loss(self, params: Tree, meta: Tree, query: Any) -> torch.Tensor:
        return (query[0] @ params["w"] - query[1]).square().mean()

    def batch(self, split: str, start: int, count: int) -> Any:
        tasks = []
        for index in range(start, start + count):
            generator = torch.Generator().manual_seed(index)
            inputs = torch.randn(9, 3, generator=generator, dtype=torch.float64)
            targets = inputs.sum(1) + torch.randn(9, generator=generator, dtype=torch.float64)
            tasks.append(il.Task((inputs[:5], targets[:5]), (inputs[5:], targets[5:])))
        if self.form == "stacked":
            return il.Task(*(tuple(map(torch.stack, zip(*part, strict=True))) for part in zip(*tasks, strict=True)))
        return tasks if self.form == "list" else tasks[0]

    def learner(self, inner: InnerSolver, **choices: Any) -> il.Bilevel:
        meta = {"begin": torch.ones(3), "rating": torch.zeros(5), "decay": torch.tensor([-1.0, 0.0, 1.0])}
        tree = {name: value.double() for name, value in meta.items()}
        return il.Bilevel(self.problem, tree, inner, stacked=self.form == "stacked", **choices)


@pytest.mark.parametrize("form", ["lone", "list", "stacked"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_any_bilevel_problem_is_checked(form: str, noise: float) -> None:
    source = Ridge(form, noise)
    learner = source.learner(il.SGD(lr=0.1, steps=3), carry="slot")
    exact = ("unrolled", "window:1", "truncated:3", "unrolled:copies=2")
    found = check(learner, source, [*exact, "first-order", "truncated:2"], count=3)
    assert found.tasks == 3
    one, *others = (row for row in found.rows if row.name in exact)
    assert spread(one.error).high == 0
    for row in others:  # all draw the same noise
        assert spread(row.error).high < 1e-12
    assert [spread(row.error).low > 1e-3 for row in found.rows[4:]] == [True, True]
    assert one.sentence == "unrolled is exact."
    assert not learner.carried.state_dict()
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_implicit_differentiation_of_a_plain_problem_is_exact_once_solved() -> None:
    source = Ridge()
    learner = source.learner(il.SGD(lr=0.1, steps=250))
    found = check(learner, source, [il.Implicit(il.CG(3)), "implicit:iterations=1", "memory-reduced"], count=2)
    solved, hasty, reduced = found.rows
    assert spread(solved.error).high < 1e-8
    assert spread(reduced.error).high < 1e-8
    assert spread(hasty.error).median > 0.01
    assert "leaves a residual of" in hasty.sentence
    (inputs, _), _ = source.batch("train", 0, 1)
    spectrum = torch.linalg.eigvalsh(
        2 * inputs.T @ inputs / 5 + 2 * torch.tensor([-1.0, 0.0, 1.0]).double().exp().diag()
    )
    geometry = check(learner, source, ["unrolled"], count=1).geometry
    assert spread(geometry.largest).median == pytest.approx(spectrum.max().item(), rel=1e-9)
    assert spread(geometry.smallest).median == pytest.approx(spectrum.min().item(), rel=1e-9)


def test_what_an_estimator_refuses_in_the_task_is_a_row_too() -> None:
    source = Ridge()

    class Stream:
        def batch(self, split: str, start: int, count: int) -> il.Task:
            rows = [source.batch(split, start + step, 1).support for step in range(4)]
            support = tuple(map(torch.stack, zip(*rows, strict=True)))
            return il.Task(il.Steps(support), source.batch(split, start, 1).query)

    learner = source.learner(il.Momentum(lr=0.1, steps=4))
    found = {row.name: row for row in check(learner, Stream(), ["implicit", "unrolled", "window:1"], count=2).rows}
    assert "needs one fixed support batch, not a batch for every step" in str(found["implicit"].refused)
    assert found["implicit"].sentence.startswith("implicit is refused here: ")
    assert spread(found["window:1"].error).high < 1e-12


def test_a_source_without_the_task_asked_for_is_refused() -> None:
    class Two(Ridge):
        def batch(self, split: str, start: int, count: int) -> Any:
            return super().batch(split, start, 2)

    source = Two("list")
    with pytest.raises(ValueError, match="gives 2 of 1 tasks"):
        check(source.learner(il.SGD(lr=0.1, steps=1)), source, ["unrolled"], count=1)


def test_an_interrupted_check_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls = Ridge(noise=0.3), []
    learner = source.learner(il.SGD(lr=0.1, steps=3))
    estimate = il.Bilevel.estimate

    def counted(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return estimate(*given)

    def go(kept: Path | None = None) -> Any:
        calls.clear()
        names = ["unrolled", "window:1", "reptile", "implicit:iterations=2"]
        found = check(learner, source, names, count=4, kept=kept)
        return found.geometry, [replace(row, seconds=None) for row in found.rows]

    monkeypatch.setattr(il.Bilevel, "estimate", counted)
    last = 10**6
    whole = go()
    assert len(calls) == 16
    last = 11  # in the third task
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "kept")
    last = 10**6
    assert go(tmp_path / "kept") == whole
    assert len(calls) == 8


TINY = ["--dataset=sinusoid", "--model=mlp", "--filters=8", "--inner-lr=0.01", "--inner-steps=2", "--device=cpu"]


def test_memory_that_cannot_be_measured_costs_its_column_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> int:
        raise Failed("exit -9")

    monkeypatch.setattr("innerloop.cli.check.peak", killed)
    (tmp_path / "settings.yaml").write_text("dataset: sinusoid\nmodel: mlp\nfilters: 8\ninner_lr: 0.01\n")
    main(["check", str(tmp_path / "settings.yaml"), "--estimators=first-order", "--tasks=2", f"--out={tmp_path}"])
    shown = capsys.readouterr()
    assert "the memory of first-order could not be measured: exit -9" in shown.err
    assert "cosine" in shown.out
    assert json.loads((tmp_path / "check.json").read_text())["fresh weights"]["rows"][0]["memory"] is None


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run, file = tmp_path / "run", tmp_path / "settings.yaml"
    options = ["--tasks-per-batch=2", "--steps=4", "--validate-every=2", "--validation-tasks=4", "--test-tasks=4"]
    main(["train", f"--out={run}", *TINY, "--inner=learned-rates:layer-step", *options])
    capsys.readouterr()
    main(["check", str(run), "--estimators=unrolled,window:2,memory-reduced", "--tasks=3", "--precision=float64"])
    shown = capsys.readouterr().out
    assert "fresh weights: 3 train tasks, sinusoid" in shown
    assert "trained weights: 3 train tasks" in shown
    assert "memory-reduced is refused here" in shown
    results = json.loads((run / "check.json").read_text())
    assert results["settings"]["precision"] == "float64"
    for point in ("fresh weights", "trained weights"):
        assert [row["name"] for row in results[point]["rows"]] == ["unrolled", "window:2", "memory-reduced"]
        assert [row["memory"] is not None for row in results[point]["rows"]] == [True, True, False]  # the last: refused
        assert results[point]["rows"][0]["error"]["high"] == 0
        assert results[point]["rows"][1]["error"]["median"] > 0
    fresh, trained = (results[point]["geometry"]["largest"]["median"] for point in ("fresh weights", "trained weights"))
    assert fresh != trained

    monkeypatch.setattr("innerloop.cli.check.peak", lambda *_: 2**20)  # it takes seconds a row, and was seen above
    file.write_text(
        "dataset: sinusoid\nmodel: mlp\nfilters: 8\ninner: learned-rates:layer-step\ninner_lr: 0.01\ndevice: cpu\n"
        "meta_gradient: binomial:2\n"
    )
    main(["check", str(file), "--tasks=1", f"--out={tmp_path}"])
    results = json.loads((tmp_path / "check.json").read_text())
    assert "trained weights" not in results
    assert results["fresh weights"]["rows"][-1]["name"] == "binomial:2"

    main(["check", str(file), "--tasks=1", "--estimators=memory-reduced", f"--out={tmp_path}"])
    assert "memory-reduced is refused here" in capsys.readouterr().out

    for wrong, message in (
        (["--estimators=unroled"], "did you mean 'unrolled'"),
        (["--estimators=window:0"], "whole number from 1"),
        (["--tasks=0"], "1 or more"),
        (["--split=exam"], "choose one of"),
        ([f"--out={tmp_path / 'nowhere'}"], "is no folder"),
    ):
        assert message in refused(capsys, "check", str(file), *wrong)
    assert "does not exist" in refused(capsys, "check", str(tmp_path / "nothing"))
