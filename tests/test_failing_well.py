"""What is not finite is named, by task and by place, and never reaches the weights or a checkpoint."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop as il
from innerloop.choices import META_GRADIENT, make
from innerloop.errors import BadData, Diverged
from innerloop.linear import CG, LinearSolver, Neumann, Nystrom
from innerloop.meta_gradient import Implicit, MemoryReduced, MetaGradient, Mixed, ReleasedIMAML
from innerloop.tasks import TaskSource
from innerloop.training.checkpoints import load_checkpoint
from innerloop.training.fit import fit, replay
from innerloop.training.store import Record

TASKS, BAD = 4, 2


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Differentiable once where output and target agree, and not twice."""
    difference = output - target
    return (difference.abs().pow(1.5) + difference.square()).mean()


class Sums(TaskSource):
    """Regression of weighted sums; from task ``first_bad`` on, every fourth task is spoilt."""

    name, input_shape, ways, output_size = "sums", (2,), None, 1

    def __init__(self, kind: str | None = None, first_bad: int = 0) -> None:
        self.kind, self.first_bad = kind, first_bad

    def batch(self, split: str, start: int, count: int) -> il.Task:
        tasks = [self.task(split, index) for index in range(start, start + count)]
        return il.Task(*(tuple(map(torch.stack, zip(*part, strict=True))) for part in zip(*tasks, strict=True)))

    def task(self, split: str, index: int) -> il.Task:
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(8, 2, generator=generator)
        targets = inputs @ torch.randn(2, 1, generator=generator)
        support, query = (inputs[:4], targets[:4]), (inputs[4:], targets[4:])
        if split == "train" and index >= self.first_bad and index % TASKS == BAD:
            match self.kind:
                case "data":
                    query = (query[0], query[1].fill_(math.nan))
                case "inner":
                    support = (1e8 * support[0], support[1])
                case "query":
                    query = (query[0].fill_(1e30), query[1])
                case "product":
                    support = (support[0].zero_(), support[1].zero_())
        return il.Task(support, query)


def make_learner(
    estimator: MetaGradient | None = None, steps: int = 3, terms: dict[str, Any] | None = None, **options: Any
) -> il.MetaLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    adapts = il.Everything() if estimator is None or estimator.learn_start else il.Head()
    if isinstance(estimator, Implicit) and terms is None:
        terms = {"proximal": 2.0} if estimator.learn_start else {"weight_decay": 0.05}
    return il.MetaLearner(model, adapts, il.SGD(lr=0.05, steps=steps, **(terms or {})), estimator, loss, **options)


def weights(learner: il.MetaLearner) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in learner.parameters()]


KINDS = {
    "data": "the query set holds numbers that are not finite",
    "inner": r"the support loss is (inf|nan) before inner step [23] of 3 \(it goes [0-9.e+]+.*, (inf|nan)\)",
    "query": "the query loss is inf after finite inner steps",
    "product": "curvature product 1 of 3 on the way back, at inner step 3, is not finite, though its direction is",
}

CURES = {
    "data": "repair that data",
    "inner": "lower the inner rate",
    "query": "look at the scale of that task's queries",
    "product": "give a loss that is twice differentiable there",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_and_what_goes_wrong_in_it_are_named(kind: str) -> None:
    learner, batch = make_learner(), Sums(kind).batch("train", 0, TASKS)
    learner.meta_step(batch)
    assert any(p.grad is not None and not p.grad.isfinite().all() for p in learner.parameters())
    learner.zero_grad()
    before = weights(learner)
    found = learner.diagnose(batch)
    assert found is not None
    assert re.match(f"in task {BAD} of the batch {KINDS[kind]}", found), found
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert all(map(torch.equal, before, weights(learner)))


PRODUCTS: dict[str, tuple[MetaGradient, str]] = {
    "truncated": (il.Truncated(2), "product 1 of 2 on the way back, at inner step 3,"),
    "window": (il.Window(2), "product 1 of 2 on the way back, at inner step 3,"),
    "binomial": (il.Binomial(2), "product 1 of 4 on the way back, at inner step 3,"),
    "mixed": (Mixed((1, 2), (0.5, 0.5)), "product 1 of 2 on the way back, at inner step 3,"),
    "implicit": (Implicit(CG(4)), "product 1 of 4 in the linear solve"),
    "implicit, neumann": (Implicit(Neumann(4, step=0.1)), "product 1 of 4 in the linear solve"),
    "implicit, nystrom": (Implicit(Nystrom(3)), "product 1 of 4 in the linear solve"),
    "imaml as released": (ReleasedIMAML(), "product 1 of 5 in the linear solve"),
    "memory-reduced": (MemoryReduced(CG(4)), "product 1 of 4 in the linear solve"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_product_is_numbered_for_every_estimator(name: str) -> None:
    estimator, words = PRODUCTS[name]
    learner, batch = make_learner(estimator), Sums("product").batch("train", 0, TASKS)
    learner.meta_step(batch)
    assert any(p.grad is not None and not p.grad.isfinite().all() for p in learner.parameters())
    found = learner.diagnose(batch)
    assert found is not None
    assert f"in task {BAD} of the batch curvature {words} is not finite, though its direction is (norm " in found


def test_a_product_in_the_middle_of_the_walk_is_found() -> None:
    """The loss has no second derivative where the first inner step begins, and has one from there on."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    batch = il.Task((torch.ones(1, 2, 1), torch.tensor([[[0.0], [1.0]]])), (torch.ones(1, 1, 1), torch.ones(1, 1, 1)))
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.05, steps=4), loss=loss)
    learner.meta_step(batch)
    assert "curvature product 4 of 4 on the way back, at inner step 1," in str(learner.diagnose(batch))


def test_a_solve_that_explodes_is_told_from_a_derivative_that_does_not_exist() -> None:
    learner, batch = (
        make_learner(Implicit(Neumann(12, step=1e6)), terms={"proximal": 1e-6}),
        Sums().batch("train", 0, TASKS),
    )
    found = str(learner.diagnose(batch))
    assert "in task 0 of the batch curvature product" in found
    assert "of 12 in the linear solve" in found
    assert f"of {TASKS} tasks {TASKS} fail" in found


def test_the_gradient_of_the_query_loss_is_told_from_the_loss() -> None:
    def root(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum().sqrt()

    inputs, targets = torch.randn(1, 3, 2), torch.randn(1, 3, 1)
    batch = il.Task((inputs, targets), (torch.zeros_like(inputs), torch.zeros_like(targets)))
    model = nn.Linear(2, 1, bias=False)
    for estimator, words in (
        (il.FirstOrder(), "the query loss is 0, but its gradient is not finite in 'weight'"),
        (il.Unrolled(), "the query loss is finite but its gradient is not, and so curvature product 1 of 2"),
    ):
        learner = il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=2), meta_gradient=estimator, loss=root)
        assert f"in task 0 of the batch {words}" in str(learner.diagnose(batch))


def test_the_last_inner_step_and_the_start_are_named() -> None:
    learner, batch = make_learner(steps=1), Sums("inner").batch("train", BAD, 1)
    batch.support[0].mul_(1e15)
    assert "in task 0 of the batch the support loss is inf before the first inner step" in str(learner.diagnose(batch))
    learner.inner = il.SGD(lr=3e38, steps=1)
    found = str(learner.diagnose(Sums().batch("train", 0, 1)))
    assert "in task 0 of the batch the last inner step makes '1.weight' not finite" in found


def test_the_learners_own_weights_are_looked_at_first() -> None:
    learner = make_learner()
    with torch.no_grad():
        learner.model.get_parameter("1.weight")[0, 0] = math.inf
    found = learner.diagnose(Sums().batch("train", 0, TASKS))
    assert found == "the learner's own model.1.weight is not finite: go back to weights that are"


@pytest.mark.parametrize("name", ["unrolled", "window:2", "binomial:1", "implicit", "memory-reduced", "reptile"])
def test_nothing_is_said_of_a_sound_batch(name: str) -> None:
    learner = make_learner(make("meta-gradient", META_GRADIENT, name))
    assert learner.diagnose(Sums().batch("train", 0, TASKS)) is None


def test_data_may_hold_infinities_and_words_where_the_losses_take_them() -> None:
    def inner_loss(params: il.Tree, meta: il.Tree, batch: Any) -> Tensor:
        return ((params["w"] + batch["mask"]).softmax(0) * batch["x"]).sum() + params["w"].square().sum()

    problem = il.Problem(lambda meta: {"w": meta["w"]}, inner_loss, inner_loss)
    learner = il.Bilevel(problem, {"w": torch.zeros(3)}, il.SGD(lr=0.1, steps=2))
    batch = {"mask": torch.tensor([0.0, 0.0, -math.inf]), "x": torch.arange(3.0), "name": "one"}
    assert learner.diagnose([il.Task(batch, batch)]) is None
    assert "support set" in str(learner.diagnose([il.Task(batch | {"x": torch.full((3,), math.nan)}, batch)]))


def test_a_task_with_a_name_is_called_by_it_and_stays_where_it_was() -> None:
    learner = make_learner(MemoryReduced(CG(4)), terms={"weight_decay": 0.1}, carry="task")
    names = ["a", "b", "c", "d"]
    good, bad = (Sums(kind).batch("train", 0, TASKS) for kind in (None, "product"))
    learner.meta_step(good, task_ids=names)
    left = learner.carried.state_dict()
    learner.meta_step(bad, task_ids=names)
    assert "in task 2 of the batch ('c') curvature product" in str(learner.diagnose(bad, task_ids=names))
    now = learner.carried.state_dict()
    same = [torch.equal(now[name]["params"]["1.weight"], left[name]["params"]["1.weight"]) for name in names]
    assert same == [False, False, True, False]
    learner.zero_grad()
    learner.meta_step(good, task_ids=names)
    assert all(p.grad is None or p.grad.isfinite().all() for p in learner.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_before_the_weights_and_says_why(tmp_path: Path, kind: str) -> None:
    learner = make_learner()
    seen: list[list[Tensor]] = []
    options: dict[str, Any] = dict(steps=6, tasks_per_batch=TASKS, validate_every=2, validation_tasks=2, progress=False)
    message = (
        rf"^outer step 4: loss .*; in task {BAD} of the batch {KINDS[kind]}.*"
        rf" \(the batch is tasks {3 * TASKS} to {4 * TASKS - 1} of the training stream\); "
        rf"{CURES[kind]}.*checkpoint of step 2"
    )
    tasks = Sums(kind, first_bad=3 * TASKS)
    with pytest.raises(Diverged, match=message):
        fit(learner, tasks, folder=tmp_path, log=lambda record: seen.append(weights(learner)), **options)
    assert not torch.equal(seen[0][0], seen[-1][0])
    assert all(map(torch.equal, weights(learner), seen[-1]))  # those of step 3
    saved = load_checkpoint(tmp_path / "last.safetensors")
    assert saved["progress"]["step"] == 2
    assert all(value.isfinite().all() for value in saved["learner"].values())
    fitted = fit(learner, Sums(), folder=tmp_path, resume=True, **options)
    assert (fitted.step, fitted.stopped) == (6, "steps")


def outer_loop(**changes: Any) -> dict[str, Any]:
    options = dict(steps=6, tasks_per_batch=TASKS, validate_every=3, validation_tasks=2, progress=False)
    return options | changes


def test_a_batch_that_goes_wrong_is_left_out_and_recorded(tmp_path: Path) -> None:
    class OneBadBatch(Sums):
        def task(self, split: str, index: int) -> il.Task:
            self.kind = "data" if index // TASKS == 3 else None
            return super().task(split, index)

    learner, records = make_learner(), list[Record]()
    fitted = fit(learner, OneBadBatch(), folder=tmp_path, log=records.append, on_nonfinite="skip", **outer_loop())
    assert (fitted.step, fitted.skipped) == (6, 1)
    (skipped,) = (record for record in records if record["kind"] == "skipped")
    assert (skipped["step"], skipped["tasks"], skipped["seed"]) == (4, [12, 15], [0, 3])
    assert skipped["why"].startswith(f"in task {BAD} of the batch the query set holds numbers that are not finite")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 5, 6]
    assert all(value.isfinite().all() for value in weights(learner))


def test_batches_are_left_out_so_many_times_in_a_row_and_a_step_is_explained(tmp_path: Path) -> None:
    tasks = Sums("data", first_bad=3 * TASKS)
    with pytest.raises(Diverged, match=r"^outer step 6, number 3 in a row that is not finite: .* repair that data"):
        fit(make_learner(), tasks, folder=tmp_path, on_nonfinite="skip:2", **outer_loop())
    for step, words in ((3, "diagnosis: every number is finite"), (5, f"diagnosis: in task {BAD} of the batch the ")):
        learner = make_learner()
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
        found = replay(learner, tasks, step, folder=tmp_path, optimizer=optimizer, tasks_per_batch=TASKS)
        assert f"outer step {step}: tasks {4 * step - 4} to {4 * step - 1} of the training stream, seed (0, " in found
        assert words in found
    assert "repair that data" in found
    learner, tasks = make_learner(), Sums()
    fit(learner, tasks, folder=tmp_path / "later", keep=1, **outer_loop())
    with pytest.raises(ValueError, match="keeps no checkpoint from before step 4: the oldest is of step 6"):
        replay(make_learner(), tasks, 4, folder=tmp_path / "later", optimizer=optimizer, tasks_per_batch=TASKS)


def test_a_validation_that_is_not_finite_is_an_error() -> None:
    class BadValidation(Sums):
        def task(self, split: str, index: int) -> il.Task:
            task = super().task(split, index)
            return task._replace(query=(task.query[0], task.query[1] / 0)) if split != "train" and index else task

    with pytest.raises(
        Diverged, match="validation at outer step 3: the loss of 1 of 2 tasks is not finite, first that of "
    ):
        fit(make_learner(), BadValidation(), **outer_loop())


def test_a_log_that_fails_is_dropped() -> None:
    seen: list[int] = []

    def failing(record: Record) -> None:
        seen.append(record["step"])
        raise OSError("the server is gone")

    with pytest.warns(UserWarning, match="the log failing failed and gets no more records: the server is gone"):
        assert fit(make_learner(), Sums(), log=failing, **outer_loop()).step == 6
    assert seen == [1]


@pytest.mark.parametrize("given", ["skip:0", "skip:x", "go on", "skip:-1"])
def test_what_to_do_at_a_bad_batch_must_be_known(given: str) -> None:
    with pytest.raises(ValueError, match="give stop, skip, or skip:N"):
        fit(make_learner(), Sums(), on_nonfinite=given, **outer_loop())


def classify(*between: nn.Module) -> il.MetaLearner:
    return il.MetaLearner(nn.Sequential(nn.Linear(2, 6), *between, nn.Linear(6, 3)), inner=il.SGD(lr=0.1, steps=1))


LABELS = torch.arange(3).repeat(2)


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        (
            (6, LABELS + 1),
            (6, LABELS),
            "labels of the support set run from 1 to 3, but the model tells 3 classes",
        ),
        ((6, LABELS), (6, LABELS - 1), "labels of the query set run from -1 to 1, .* give labels from 0 to 2"),
        (
            (6, LABELS.float()),
            (6, LABELS),
            r"labels of the support set are float32: give whole numbers .* labels.long\(\)",
        ),
        ((0, LABELS[:0]), (6, LABELS), "the support set of a task is empty"),
    ],
)
def test_labels_that_the_model_cannot_have_are_named(support: Any, query: Any, message: str) -> None:
    pairs = [(torch.randn(count, 2), targets) for count, targets in (support, query)]
    with pytest.raises(BadData, match=message):
        classify().meta_step([il.Task(*pairs)])
    good = (torch.randn(6, 2), LABELS)
    if support[1] is not LABELS:
        with pytest.raises(BadData):
            classify().adapt(*pairs[0])
    learner = classify()
    learner.meta_step([il.Task(good, good)] * 2)
    with pytest.raises(BadData, match="of task 1 of the batch"):
        classify().meta_step([il.Task(good, good), il.Task(good, (good[0], LABELS + 3))])
    with pytest.raises(BadData, match="run from 3 to 5"):
        learner.adapt(good[0], LABELS + 3)


def test_inputs_that_the_model_cannot_take_are_named() -> None:
    with pytest.raises(
        BadData, match=r"Sequential cannot take a support set of shape \[6, 5\] .* give inputs of the shape"
    ):
        classify().adapt(torch.randn(6, 5), LABELS)
    with pytest.raises(BadData, match="the support set holds 6 numbers of 12 that are not finite"):
        classify().adapt(torch.full((6, 2), 1.0).index_fill(1, torch.tensor(0), math.nan), LABELS)
    with pytest.raises(BadData, match="batch norm needs two examples or more in a set, or batch_norm='frozen'"):
        classify(nn.BatchNorm1d(6)).adapt(torch.randn(1, 2), LABELS[:1])


def test_a_source_of_nonsense_is_refused_on_the_first_batch() -> None:
    with pytest.raises(
        BadData, match="the query set of the batch from task 0 on of the training stream holds 4 numbers"
    ):
        fit(make_learner(), Sums("data"), **outer_loop())


def test_a_solve_that_meets_no_upward_curvature_is_warned_of_once() -> None:
    learner = make_learner(Implicit(CG(20)), steps=1, terms={"proximal": 1e-3})
    records: list[Record] = []
    options: dict[str, Any] = dict(steps=4, tasks_per_batch=TASKS, validation_tasks=0, progress=False)
    with pytest.warns(UserWarning, match="outer step 1: in [0-9]+% of the tasks.*a larger weight_decay") as caught:
        fit(learner, Sums(), log=records.append, **options)
    assert len(caught) == 1
    assert all(record["negative_curvature"] > 0 for record in records)
    assert all(value.isfinite().all() for value in weights(learner))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_gives_no_nan_and_is_counted(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=dtype)).Q
    matrix = basis @ torch.tensor([0.0, 0.0, 0.0, 0.1, 0.5, 1.0, 1.0, 2.0, 3.0], dtype=dtype).diag() @ basis.T
    b = torch.randn(9, generator=generator, dtype=dtype)
    for solver in (CG(40), Neumann(40)):
        x, info = solver.solve(lambda vector: matrix @ vector, b)
        assert x.isfinite().all()
        assert info.residual > 0.1
    x, info = CG(40).solve(lambda vector: matrix @ vector, b)
    assert info.negative_curvature == 1
    inside = matrix @ b  # a singular system with solutions is solved
    x, info = CG(40).solve(lambda vector: matrix @ vector, inside)
    torch.testing.assert_close(matrix @ x, inside, rtol=1e-3, atol=1e-4)


def test_a_broken_product_reaches_the_solution_of_its_own_task_only() -> None:
    scales = torch.tensor([1.0, math.nan, 2.0])
    matrix, b = torch.eye(4), torch.ones(4)
    for solver in (CG(3), Neumann(3), Nystrom(2, damping=0.1)):

        def solve(scale: Tensor, solver: LinearSolver = solver) -> Tensor:
            return solver.solve(lambda vector: scale * (matrix @ vector), b)[0]

        found = torch.func.vmap(solve)(scales)
        assert found.isfinite().all(-1).tolist() == [True, False, True]
