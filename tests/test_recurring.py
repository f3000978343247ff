"""Tasks that come again: MOML, sources that repeat and prefer tasks, weights of tasks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import innerloop as il
from problems import model_and_batch, network, relative_error
from reference import meta_gradient

Tree = dict[str, Tensor]
INNER = il.SGD(lr=0.1, steps=3, proximal=0.1)

# --- MOML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("chosen", [il.Everything(), il.Head()])
@pytest.mark.parametrize("estimator", [il.MOML(beta=1.0), il.MOML(beta=1.0, share=1.0)])
def test_moml_with_beta_1_is_maml_at_every_visit(estimator, chosen, memory):
    model, batch = model_and_batch("mlp")
    learner = il.MetaLearner(model, chosen, INNER, estimator, carry="task", memory=memory)
    for _ in range(2):
        learner.zero_grad()
        learner.meta_step(batch, task_ids=[3, 5])
        expected, _ = meta_gradient(learner, batch)
        found = {name: p.grad for name, p in learner.named_parameters()}
        assert relative_error(found, expected) < 1e-10
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter *= 0.9


@pytest.mark.parametrize("share", [None, 0.5])
def test_moml_is_its_formula_over_several_visits(share):
    """Against the recursion written out, with the mean of what the authors' code keeps for each task."""
    model, batch = model_and_batch("mlp")
    inner, beta = il.SGD(lr=0.1, steps=2), 0.3
    estimator = il.MOML(beta, share)
    learner = il.MetaLearner(model, inner=inner, meta_gradient=estimator, carry="task")
    alone = il.Task(*((part[0][:1], part[1][:1]) for part in batch))
    kept: dict[int, Tree] = {}
    for visit, ids in enumerate([[0, 1], [0], [0, 1]]):
        tasks = batch if len(ids) == 2 else alone
        learner.zero_grad()
        found = learner.meta_step(tasks, task_ids=ids, keep_end=True)
        start = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        total = {name: torch.zeros_like(p) for name, p in start.items()}
        for place, each in enumerate(ids):
            support, query = ((part[0][place], part[1][place]) for part in tasks)

            def loss(params: Tree, examples: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(torch.func.functional_call(learner.model, params, examples[0]), examples[1])

            def adapted(params: Tree, examples: tuple[Tensor, Tensor] = support) -> Tree:
                for _ in range(2):
                    slopes = torch.func.grad(loss)(params, examples)
                    params = {name: p - 0.1 * slopes[name] for name, p in params.items()}
                return params

            end, pull = torch.func.vjp(adapted, start)
            there = end if share is None else {n: start[n] + (v - start[n]) / share for n, v in end.items()}
            old = kept.get(each)
            kept[each] = end if old is None else {n: (1 - beta) * old[n] + beta * v for n, v in there.items()}
            assert relative_error(found.end[place].params, kept[each]) < 1e-12
            (mine,) = pull(torch.func.grad(loss)(kept[each], query))
            total = {name: value + mine[name] / len(ids) for name, value in total.items()}
        if share is not None:
            for each in kept.keys() - set(ids):
                kept[each] = {n: (1 - beta) * v + beta * start[n] for n, v in kept[each].items()}
        grads = {name: p.grad for name, p in learner.model.named_parameters()}
        assert relative_error(grads, total) < 1e-10, visit
        with torch.no_grad():
            for name, parameter in learner.model.named_parameters():
                parameter -= 0.1 * grads[name]


def test_local_moml_is_outer_steps_of_each_task_averaged():
    problem, meta, task = network()
    inner, lr = il.SGD(lr=0.1, steps=3), 0.05
    once = il.hypergradient(problem, meta, task, inner, il.LocalMOML(0.4, lr, 1))
    assert relative_error(once.grad, il.hypergradient(problem, meta, task, inner).grad) < 1e-10
    at = meta
    for _ in range(3):
        grad = il.hypergradient(problem, at, task, inner).grad
        at = {name: value - lr * grad[name] for name, value in at.items()}
    found = il.hypergradient(problem, meta, task, inner, il.LocalMOML(1.0, lr, 3)).grad
    assert relative_error({n: v - lr * found[n] for n, v in meta.items()}, at) < 1e-12
    other = il.hypergradient(problem, meta, task, inner, il.LocalMOML(0.4, lr, 3)).grad
    assert relative_error(other, found) > 1e-3


def test_moml_refuses_what_it_has_no_use_for():
    model, batch = model_and_batch("mlp")
    for bad in (
        lambda: il.MOML(0.0),
        lambda: il.MOML(share=2.0),
        lambda: il.LocalMOML(lr=0.0),
        lambda: il.LocalMOML(rounds=0),
    ):
        with pytest.raises(ValueError, match="above 0"):
            bad()
    with pytest.raises(ValueError, match="leave step_weights out"):
        il.MetaLearner(model, inner=INNER, meta_gradient=il.MOML()).meta_step(batch, [0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match="adapts=Everything"):
        il.MetaLearner(model, il.Head(), INNER, il.LocalMOML())
    learner = il.MetaLearner(model, inner=INNER, meta_gradient=il.LocalMOML(), carry="slot")
    learner.meta_step(batch)
    with pytest.raises(ValueError, match="leave begin and carry out"):
        learner.meta_step(batch)


# --- tasks that recur ------------------------------------------------------------------------------------------------


def test_recurring_tasks_are_the_first_ones_over_and_over():
    plain = il.tasks.glyphs(ways=2, shots=1, queries=1)
    tasks = il.tasks.Recurring(plain, 3)
    assert tasks.ids("train", 2, 3) == [2, 0, 1]
    found, first = tasks.batch("train", 3, 3), plain.batch("train", 0, 3)
    assert torch.equal(found.support[0], first.support[0])
    assert torch.equal(tasks.batch("test", 5, 1).query[0], plain.batch("test", 5, 1).query[0])
    assert (tasks.ways, tasks.shots, tasks.input_shape) == (2, 1, (1, 28, 28))
    with pytest.raises(ValueError, match="whole number from 1"):
        il.tasks.Recurring(plain, 0)


def linear_learner(estimator: Any, **options: Any) -> il.MetaLearner:
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 1, bias=False).double()
    return il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=1), meta_gradient=estimator, loss=F.mse_loss, **options)


def session(folder, steps: int, source, **options: Any) -> il.MetaLearner:
    learner = linear_learner(il.MOML(0.5), carry=options.pop("carry", "none"))
    il.fit(
        learner, source, steps=steps, tasks_per_batch=2, validation_tasks=0, folder=folder, resume=True,
        progress=False, **options,
    )  # fmt: skip
    return learner


@pytest.mark.parametrize("kind", ["recurring", "prioritised", "weights"])
def test_what_training_remembers_of_tasks_is_in_the_checkpoint(kind, tmp_path):
    def again(name: str, steps: int) -> il.MetaLearner:
        plain = il.tasks.linear()
        if kind == "recurring":
            return session(tmp_path / name, steps, il.tasks.Recurring(plain, 3), carry="task")
        if kind == "prioritised":
            return session(tmp_path / name, steps, il.tasks.Prioritised(plain, 5, 0.7))
        return session(tmp_path / name, steps, plain, task_weights=il.SPSA())

    whole = again("whole", 6)
    again("cut", 3)
    cut = again("cut", 6)
    assert torch.equal(whole.model.weight, cut.model.weight)


def test_moml_needs_tasks_that_recur():
    with pytest.raises(ValueError, match=r"il\.tasks\.Recurring"):
        il.fit(linear_learner(il.MOML(), carry="task"), il.tasks.linear(), steps=1)


# --- priority and weights --------------------------------------------------------------------------------------------


class Grouped(il.tasks.TaskSource):
    """Linear regression in ten dimensions; one task in ten is of a hard group, with an optimum of its own."""

    name, input_shape, ways, output_size = "grouped", (10,), None, 1

    def batch(self, split: str, start: int, count: int) -> il.Task:
        draws = il.tasks.random_bits(f"grouped/{split}", 0, start, count, 10 * 21)
        values = torch.from_numpy(il.tasks.uniform(draws)[:, :210]).view(count, 21, 10) * 2 - 1
        hard = torch.tensor([self.hard(each) for each in range(start, start + count)])
        values[hard, :20, :5] = 0  # the groups read different inputs, so that one does not undo the other
        values[~hard, :20, 5:] = 0
        optimum = torch.where(hard[:, None], 3.0, 0.3) + 0.1 * values[:, 20]
        targets = (values[:, :20] @ optimum[..., None]).double()
        return il.Task((values[:, :10], targets[:, :10]), (values[:, 10:20], targets[:, 10:]))

    @staticmethod
    def hard(place: int) -> bool:
        return place % 10 == 3


def steps_to_recover(source, limit: int, **options: Any) -> int:
    """Outer steps until the loss of new hard tasks has fallen to a tenth."""
    learner = linear_learner(il.Unrolled())
    plain = Grouped()
    held = [plain.batch("test", each, 1) for each in range(3, 203, 10)]
    hard = il.Task(
        *(
            (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
            for parts in zip(*held, strict=True)
        )
    )
    first = learner.evaluate(hard).loss.mean()
    losses: list[float] = []
    il.fit(
        learner, source, steps=limit, tasks_per_batch=10, validation_tasks=0, progress=False,
        log=lambda record: losses.append(learner.evaluate(hard).loss.mean().item()),
        optimizer=torch.optim.SGD(learner.parameters(), lr=0.1), **options,
    )  # fmt: skip
    return next(step for step, loss in enumerate(losses, 1) if loss < 0.1 * first)


def test_priority_and_weights_recover_a_hard_group_of_tasks_sooner():
    uniform = steps_to_recover(Grouped(), 250)
    drawn = steps_to_recover(il.tasks.Prioritised(Grouped(), 50, share=0.5), 90)
    weighted = steps_to_recover(Grouped(), 90, task_weights=il.by_loss(1.0))
    assert uniform > 180
    assert drawn < 60
    assert weighted < 60


def test_prioritised_tasks_are_drawn_by_their_losses():
    plain = Grouped()
    tasks = il.tasks.Prioritised(plain, 3, share=0.8, power=2.0)
    assert tasks.ids("train", 4, 2) == [4, 5]
    tasks.seen([0, 1, 2, 3], [1.0, 0.5, 3.0, 2.0])
    assert tasks.state_dict() == {"losses": {2: 3.0, 3: 2.0, 0: 1.0}}
    ids = np.array(tasks.ids("train", 10, 20000))
    assert tasks.ids("train", 10, 20000) == ids.tolist()
    shares = [(ids == each).mean() for each in (2, 3, 0)]
    assert shares == pytest.approx([0.8 * each / 14 for each in (9, 4, 1)], abs=0.02)
    assert torch.equal(tasks.batch("train", 10, 4).support[0][2], plain.batch("train", ids[2].item(), 1).support[0][0])
    assert tasks.ids("validation", 7, 2) == [7, 8]
    for bad in ({"share": 1.5}, {"power": -1.0}):
        with pytest.raises(ValueError, match="from 0 to 1"):
            il.tasks.Prioritised(plain, **bad)


def test_weights_by_loss_and_by_perturbation():
    losses = torch.tensor([1.0, 2.0, 4.0])
    assert il.by_loss(2.0)(losses, [0, 1, 2], 0).tolist() == pytest.approx([1 / 21, 4 / 21, 16 / 21])
    weigh = il.SPSA()
    for step in range(1500):
        found = weigh(losses, [0, 1, 2], step)
    assert [w**2 for w in weigh.w.values()] == pytest.approx(losses.tolist(), rel=0.15)
    assert found.sum() == pytest.approx(1)
    by_class = il.SPSA(lambda each: ["a", "b"] if each else ["a"])
    by_class(losses[:2], [0, 1], 0)
    assert set(by_class.w) == {"a", "b"}
    with pytest.raises(ValueError, match="above 0"):
        il.SPSA(reach=0.0)


def test_the_published_scale_of_perturbation_hardly_sees_the_losses():
    """Of L(w + 15 d) - L(w - 15 d) at w = 1 / 4 and the losses of guessing one of five, task by task."""
    near, far = (0.25 - 15) ** 2, (0.25 + 15) ** 2
    seen, logarithm = math.log(5) * (1 / near - 1 / far), math.log(far / near)
    assert seen < 0.01 * (seen + logarithm)
