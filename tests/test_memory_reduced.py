"""Memory-reduced meta-gradients against closed forms, finite differences and plain autograd, in float64."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import innerloop as il
from innerloop.carried import Carried
from innerloop.inner import InnerSolver, NewtonCG
from innerloop.linear import CG, Nystrom
from innerloop.meta_gradient import MemoryReduced, MetaGradient
from innerloop.problem import End, Tree
from problems import model_and_batch, relative_error

L2 = 0.05

# The head's start is among the meta-parameters here, so that it shows that it gets no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:the meta-gradient of head is exactly zero")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Quadratic:
    """``head'H head / 2 - (J theta + c)'head`` inside, ``|D head + E theta - e|^2 / 2`` outside; c and e are the task.

    H's eigenvalues go from 0.5 to 8. The head's start is given by meta, but not learned.
    """

    def __init__(self, heads: int = 8, thetas: int = 6) -> None:
        basis = torch.linalg.qr(draw(heads, heads, seed=0)).Q
        self.matrix = basis @ torch.linspace(0.5, 8, heads, dtype=torch.float64).diag() @ basis.T
        self.mixed, self.direct = draw(heads, thetas, seed=1), draw(heads, thetas, seed=2) / 4
        self.outer_matrix = draw(heads, heads, seed=3) / heads**0.5
        self.meta = {"theta": draw(thetas, seed=4), "head": draw(heads, seed=5)}
        self.problem = il.Problem(lambda meta: {"head": meta["head"]}, self.inner_loss, self.outer_loss)

    def tasks(self, *shape: int, seed: int = 6) -> il.Task:
        support, query = draw(2, *shape, len(self.matrix), seed=seed)
        return il.Task(support, query)

    def inner_loss(self, params: Tree, meta: Tree, support: Tensor) -> Tensor:
        head = params["head"]
        return head @ self.matrix @ head / 2 - (self.mixed @ meta["theta"] + support) @ head

    def outer_loss(self, params: Tree, meta: Tree, query: Tensor) -> Tensor:
        return (self.outer_matrix @ params["head"] + self.direct @ meta["theta"] - query).square().sum() / 2

    def solution(self, theta: Tensor, task: il.Task, l2: float = 0.0) -> Tensor:
        system = self.matrix + l2 * torch.eye(len(self.matrix), dtype=torch.float64)
        return torch.linalg.solve(system, self.mixed @ theta + task.support)

    def exact(self, task: il.Task, l2: float = 0.0) -> Tensor:
        """The hypergradient in theta, as autograd finds it in the closed form of the solution."""

        def solved(theta: Tensor) -> Tensor:
            return self.outer_loss({"head": self.solution(theta, task, l2)}, {"theta": theta}, task.query)

        return torch.func.grad(solved)(self.meta["theta"])


def estimate(
    problem: il.Problem, meta: Tree, task: il.Task, solver: InnerSolver, estimator: MetaGradient, begin=None
) -> il.Result:
    return il.hypergradient(problem, meta, task, solver, estimator, begin=begin)


def of_one_task(batch: il.Task, index: int) -> il.Task:
    return il.Task(*(tuple(value[index] for value in part) for part in batch))


DECAYED = il.SGD(lr=0.1, steps=2, weight_decay=L2)


def head_learner(model: nn.Module, inner: InnerSolver, estimator=None, **settings) -> il.MetaLearner:
    return il.MetaLearner(model, il.Head(), inner, estimator or MemoryReduced(), **settings)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_closed_form_of_a_quadratic(l2):
    quadratic = Quadratic()
    task = quadratic.tasks()
    result = estimate(
        quadratic.problem, quadratic.meta, task, il.SGD(lr=0.12, steps=600, weight_decay=l2), MemoryReduced(CG(8))
    )
    torch.testing.assert_close(result.params["head"], quadratic.solution(quadratic.meta["theta"], task, l2))
    assert relative_error({"theta": result.grad["theta"]}, {"theta": quadratic.exact(task, l2)}) < 1e-10
    assert torch.equal(result.grad["head"], torch.zeros_like(result.grad["head"]))


def test_the_error_falls_by_one_minus_step_times_least_curvature():
    quadratic = Quadratic()
    task, exact = quadratic.tasks(), quadratic.exact(quadratic.tasks())

    def error(steps: int, iterations: int = 8) -> float:
        solver = il.SGD(lr=1 / 8, steps=steps)
        found = estimate(quadratic.problem, quadratic.meta, task, solver, MemoryReduced(CG(iterations)))
        return relative_error({"theta": found.grad["theta"]}, {"theta": exact})

    rates = [(error(steps + 40) / error(steps)) ** (1 / 40) for steps in (40, 80, 120)]
    assert rates == pytest.approx([1 - 0.5 / 8] * 3, abs=2e-3)
    errors = [error(600, iterations) for iterations in (1, 2, 4, 8)]
    assert errors[2] < errors[1] < errors[0] < 1
    assert errors[3] < 1e-12  # as many iterations as there are unknowns


class Regularised:
    """A softmax head on 32 tanh features of a learned matrix, 5 ways and 25 examples."""

    def __init__(self, inputs: int = 3) -> None:
        self.meta = {"features": draw(32, inputs, seed=1), "head": torch.zeros(5, 32, dtype=torch.float64)}
        labels = torch.arange(5).repeat_interleave(5)
        self.task = il.Task((draw(25, inputs, seed=2), labels), (draw(25, inputs, seed=3), labels))
        self.problem = il.Problem(lambda meta: {"head": meta["head"]}, self.loss, self.loss)

    def loss(self, params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(torch.tanh(batch[0] @ meta["features"].T) @ params["head"].T, batch[1])

    def find(self, solver: InnerSolver, estimator: MetaGradient, features: Tensor | None = None) -> il.Result:
        meta = self.meta if features is None else {**self.meta, "features": features}
        return estimate(self.problem, meta, self.task, solver, estimator)


def test_finite_differences_of_a_regularised_softmax_head():
    softmax, width = Regularised(), 1e-4
    solver, estimator = NewtonCG(steps=6, iterations=40, trials=4, weight_decay=L2), MemoryReduced(CG(60))
    found, value = softmax.find(solver, estimator).grad["features"], softmax.meta["features"]
    moves = width * torch.eye(value.numel(), dtype=value.dtype).view(-1, *value.shape)
    # only the loss of these results is of interest; the shortest linear solve is the cheapest
    losses = torch.func.vmap(lambda features: softmax.find(solver, MemoryReduced(CG(1)), features).loss)(
        torch.cat([value + moves, value - moves])
    )
    ahead, behind = losses.chunk(2)
    assert relative_error({"": found.flatten()}, {"": (ahead - behind) / (2 * width)}) < 1e-6


def test_far_from_the_solution_the_estimate_can_be_worse_than_the_direct_term_alone():
    softmax = Regularised(inputs=32)
    exact = softmax.find(NewtonCG(steps=8, iterations=40, weight_decay=L2), MemoryReduced(CG(60))).grad

    def error(estimator: MetaGradient, steps: int) -> float:
        found = softmax.find(il.SGD(lr=0.1, steps=steps, weight_decay=L2), estimator).grad["features"]
        return relative_error({"": found}, {"": exact["features"]})

    few, many = (error(MemoryReduced(CG(20)), steps) for steps in (5, 100))
    assert few > 1.5 * error(il.FirstOrder(), 5)
    assert many < 0.5 * error(il.FirstOrder(), 100)


@pytest.mark.parametrize("model", ["mlp", "conv4"])
@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_the_estimate_is_the_gradient_of_one_scalar_with_solution_and_head_constant(model, reuse_prefix):
    network, batch = model_and_batch(model)
    inner = il.SGD(lr=0.2, steps=4, weight_decay=0.2)
    learner = head_learner(network, inner, MemoryReduced(CG(60)), reuse_prefix=reuse_prefix)
    learner.meta_step(batch)
    meta = {name: p.detach().clone().requires_grad_() for name, p in learner.model.named_parameters()}

    def loss(params: Tree, examples: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(learner.model, {**meta, **params}, (examples[0],)), examples[1])

    total = torch.zeros((), dtype=torch.float64)
    for index in range(2):
        task = of_one_task(batch, index)
        end = learner.adapt(*task.support)
        params = {name: end.get_parameter(name).detach().requires_grad_() for name in learner.adapted}
        grad = _flat(torch.autograd.grad(loss(params, task.support), list(params.values()), create_graph=True))
        outer = _flat(torch.autograd.grad(loss(params, task.query), list(params.values())))
        rows = [_flat(torch.autograd.grad(entry, list(params.values()), retain_graph=True)) for entry in grad]
        v = torch.linalg.solve(torch.stack(rows) + 0.2 * torch.eye(len(grad), dtype=torch.float64), outer)
        total = total + (loss(params, task.query) - grad @ v) / 2
    body = [name for name in meta if name not in learner.adapted]
    expected = dict(zip(body, torch.autograd.grad(total, [meta[name] for name in body]), strict=True))
    found = {name: p.grad for name, p in learner.model.named_parameters()}
    assert relative_error({name: found[name] for name in body}, expected) < 1e-10
    assert all(found[name] is None for name in learner.adapted)  # so that no optimiser moves or decays the head


def _flat(values) -> Tensor:
    return torch.cat([value.flatten() for value in values])


# --- its neighbours -------------------------------------------------------------------------------


def test_anil_tends_to_it_as_the_inner_steps_grow():
    model, batch = model_and_batch("mlp")
    solved = head_learner(model, NewtonCG(steps=6, iterations=30, weight_decay=0.5), MemoryReduced(CG(60)))
    solved.meta_step(batch)
    exact = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in solved.model.named_parameters()}
    errors = []
    for steps in (5, 20, 80):
        anil = il.MetaLearner(model, il.Head(), il.SGD(lr=0.5, steps=steps, weight_decay=0.5))
        anil.meta_step(batch)
        errors.append(relative_error({name: p.grad for name, p in anil.model.named_parameters()}, exact))
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 1e-8  # the gradient of the start, zero here, included


def test_a_linear_solver_can_be_exchanged():
    model, batch = model_and_batch("mlp")
    grads = []
    for linear in (CG(60), Nystrom(100)):
        learner = head_learner(model, il.SGD(lr=0.2, steps=4, weight_decay=0.2), MemoryReduced(linear))
        learner.meta_step(batch)
        grads.append({name: p.grad for name, p in learner.named_parameters() if p.grad is not None})
    assert relative_error(*grads) < 1e-9


# --- warm starts ----------------------------------------------------------------------------------


def meta_train(quadratic: Quadratic, tasks: il.Task, warm: bool, steps: int, rate: float) -> float:
    """Gradient descent with one inner step and one iteration; the squared norm of the true gradient at the end."""
    learner = il.Bilevel(
        quadratic.problem,
        quadratic.meta,
        il.SGD(lr=1 / 8, steps=1),
        MemoryReduced(CG(1)),
        carry="task" if warm else "none",
        stacked=True,
    )
    keys = [f"task {index}" for index in range(len(tasks.query))] if warm else None
    assert isinstance(learner.meta, nn.ParameterDict)
    theta = learner.meta["theta"]
    for _ in range(steps):
        learner.zero_grad()
        learner.meta_step(tasks, task_ids=keys)
        with torch.no_grad():
            theta -= rate * theta.grad
    assert torch.equal(learner.meta["head"], quadratic.meta["head"])
    quadratic.meta["theta"] = theta.detach()
    exact = torch.stack([quadratic.exact(il.Task(*pair)) for pair in zip(*tasks, strict=True)]).mean(0)
    return float(exact.square().sum())


def test_warm_starts_reach_the_stationary_point_with_one_step_and_one_iteration_and_cold_ones_do_not():
    gradients = {}
    for warm in (True, False):
        quadratic = Quadratic(heads=5, thetas=2)
        gradients[warm] = meta_train(quadratic, quadratic.tasks(6), warm, steps=300 if warm else 40, rate=1.2)
    assert gradients[True] < 1e-15
    assert gradients[False] > 0.01


def test_a_task_resumes_from_where_it_was_left():
    quadratic = Quadratic()
    task, estimator, solver = quadratic.tasks(), MemoryReduced(CG(8)), il.SGD(lr=0.1, steps=7)
    first = estimate(quadratic.problem, quadratic.meta, task, solver, estimator)
    again = estimate(quadratic.problem, quadratic.meta, task, solver, estimator, first.end)
    twice = estimate(quadratic.problem, quadratic.meta, task, il.SGD(lr=0.1, steps=14), estimator)
    torch.testing.assert_close(again.params, twice.params)
    torch.testing.assert_close(again.grad, twice.grad)  # eight iterations solve the system from anywhere
    assert again.end.step == 14
    assert again.diagnostics["curvature_products"] == twice.diagnostics["curvature_products"] + 1
    # fewer do not, and then begin with the solution that was left
    some = estimate(quadratic.problem, quadratic.meta, task, solver, MemoryReduced(CG(3)), first.end)
    none = estimate(
        quadratic.problem, quadratic.meta, task, solver, MemoryReduced(CG(3)), first.end._replace(solution={})
    )
    assert some.diagnostics["residual"] < 0.75 * none.diagnostics["residual"]


def test_warm_starts_go_by_key():
    def end(number: float, step: int) -> End:
        return End({"head": torch.full((2,), number)}, {}, step, {"head": torch.full((2,), -number)})

    carried, place = Carried(), torch.device("cpu")
    carried.store(["a", "b"], [end(1.0, 5), end(2.0, 5)])
    carried.store(["b"], [end(3.0, 10)])
    # a task not seen before begins cold, even in the place of one that was
    found, unseen, other = carried.gather(["b", "c", "a"], place)
    torch.testing.assert_close([found, other], [end(3.0, 10), end(1.0, 5)])
    assert unseen is None
    loaded = Carried()
    loaded.load_state_dict(carried.state_dict())
    torch.testing.assert_close(loaded.gather(["b", "a"], place), [end(3.0, 10), end(1.0, 5)])


def test_a_learner_resumes_tasks_by_place_or_by_name():
    network, batch = model_and_batch("mlp")
    swapped = torch.utils._pytree.tree_map(lambda value: value.flip(0), batch)

    def after(carry: str, second: il.Task, first_ids=None, second_ids=None) -> il.MetaLearner:
        inner = il.SGD(lr=0.2, steps=2, weight_decay=0.2)
        learner = head_learner(network, inner, MemoryReduced(CG(1)), carry=carry, chunk_size=1)
        learner.meta_step(batch, task_ids=first_ids)
        learner.zero_grad()
        learner.meta_step(second, task_ids=second_ids)
        return learner

    def body(learner: il.MetaLearner) -> Tree:
        return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}

    cold, slot = body(after("none", batch)), body(after("slot", batch))
    named = body(after("task", swapped, ["a", "b"], ["b", "a"]))
    assert relative_error(slot, cold) > 1e-3
    assert relative_error(named, slot) < 1e-12  # the same tasks, recognised in another order
    assert relative_error(body(after("slot", swapped)), slot) > 1e-3
    assert relative_error(body(after("task", batch, ["a", "b"], ["c", "d"])), cold) < 1e-12
    with pytest.raises(ValueError, match="task_ids are needed"):
        after("task", batch)
    with pytest.raises(ValueError, match="have no use"):
        after("slot", batch, ["a", "b"])


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("names", [None, ["a", "b", "c", "a2"]])
def test_a_learner_resumes_as_begin_does(chunk_size, names: Sequence[Hashable] | None):
    network, batch = model_and_batch("mlp")
    batch = torch.utils._pytree.tree_map(lambda value: torch.cat([value, value.flip(1)]), batch)  # four tasks
    inner = il.Momentum(lr=0.2, steps=2, weight_decay=0.2)
    carried = head_learner(
        network, inner, MemoryReduced(CG(2)), carry="task" if names else "slot", chunk_size=chunk_size
    )
    given = head_learner(network, inner, MemoryReduced(CG(2)), chunk_size=chunk_size)
    ends: il.End | list[il.End] | None = None
    for _ in range(3):
        for learner in (carried, given):
            learner.zero_grad()
        carried.meta_step(batch, task_ids=names)
        ends = given.meta_step(batch, begin=ends, keep_end=True).end
        first, second = (
            {name: cast(Tensor, p.grad) for name, p in cast(Any, each.model)[0].named_parameters()}
            for each in (carried, given)
        )
        assert relative_error(first, second) < 1e-13
    assert isinstance(ends, list)
    assert [end.step for end in ends] == [6] * 4


def test_some_tasks_are_taken_up_and_others_begin():
    network, batch = model_and_batch("mlp")
    inner = il.SGD(lr=0.2, steps=2, weight_decay=0.2)
    learner = head_learner(network, inner, MemoryReduced(CG(1)), carry="task")
    learner.meta_step(batch, task_ids=["a", "b"])
    left = learner.carried.gather(["a"], torch.device("cpu"))
    learner.zero_grad()
    swapped = torch.utils._pytree.tree_map(lambda value: value.flip(0), batch)
    learner.meta_step(swapped, task_ids=["new", "a"])
    one, two = (of_one_task(batch, index) for index in (1, 0))
    parts = [learner.estimate(one).grad, learner.estimate(two, begin=left[0]).grad]
    found = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    assert relative_error(found, {name: (parts[0][name] + parts[1][name]) / 2 for name in found}) < 1e-13


def test_the_plateau_of_random_batches_goes_with_one_over_the_batch():
    quadratic = Quadratic(heads=5, thetas=1)
    quadratic.direct = torch.zeros_like(quadratic.direct)
    # one Newton step and full solves: what is left of the error is that of drawing tasks
    estimator, solver = MemoryReduced(CG(5)), NewtonCG(steps=1, iterations=5, trials=1)
    inverse = torch.linalg.inv(quadratic.matrix)
    response = quadratic.outer_matrix @ inverse @ quadratic.mixed
    rate = 0.5 / torch.linalg.eigvalsh(response.T @ response).max()

    def plateau(batch: int, replicas: int = 1000, steps: int = 20) -> float:
        def mean_gradient(theta: Tensor, tasks: il.Task) -> Tensor:
            meta = {**quadratic.meta, "theta": theta}
            return torch.func.vmap(
                lambda task: estimate(quadratic.problem, meta, task, solver, estimator).grad["theta"]
            )(tasks).mean(0)

        theta, squares = torch.zeros(replicas, 1, dtype=torch.float64), []
        with torch.no_grad():
            for step in range(steps):
                theta = theta - rate * torch.func.vmap(mean_gradient)(
                    theta, quadratic.tasks(replicas, batch, seed=step)
                )
                if step >= steps // 2:  # tasks have mean zero, so the true gradient is linear in theta
                    squares.append((theta @ response.T @ response).square().sum(1).mean())
        return float(torch.stack(squares).mean())

    plateaus = [batch * plateau(batch) for batch in (1, 3, 9)]
    assert max(plateaus) < 1.15 * min(plateaus)


# --- the head, the backbone and what is reported --------------------------------------------------


class Counting(nn.Linear):
    """A backbone that counts how often it is called."""

    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(inputs).tanh()


@pytest.mark.parametrize(("steps", "iterations"), [(1, 1), (20, 30)])
def test_the_backbone_is_called_once_for_support_and_once_for_query(steps, iterations):
    torch.manual_seed(0)
    model = nn.Sequential(Counting(6, 8), nn.Linear(8, 3)).double()
    learner = head_learner(
        model, il.SGD(lr=0.1, steps=steps, weight_decay=L2), MemoryReduced(CG(iterations)), chunk_size=2
    )
    batch = model_and_batch("mlp")[1]
    learner.meta_step(batch)  # the first looks at the model itself
    Counting.calls = 0
    learner.meta_step(batch)
    assert Counting.calls == 2


def test_the_head_stays_what_it_was():
    model, batch = model_and_batch("mlp")
    with pytest.warns(UserWarning, match="singular"):
        learner = head_learner(model, il.SGD(lr=0.1, steps=20), MemoryReduced())
    head = {name: learner.model.get_parameter(name).detach().clone() for name in learner.adapted}
    body = learner.model[0].weight.detach().clone()
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        metrics = learner.meta_step(batch)
        assert {n for n, p in learner.model.named_parameters() if p.grad is None} == set(learner.adapted)
        assert not any(p.grad is not None and p.grad.requires_grad for p in learner.parameters())
        assert not metrics.loss.requires_grad
        optimizer.step()
    assert all(torch.equal(learner.model.get_parameter(name), value) for name, value in head.items())
    assert not torch.equal(learner.model[0].weight, body)


def test_without_an_l2_term_the_solution_grows_without_bound():
    softmax, norms, residuals = Regularised(inputs=40), {}, {}
    for l2 in (0.0, L2):
        for iterations in (20, 120):
            solver = il.SGD(lr=0.1, steps=20, weight_decay=l2)
            found = softmax.find(solver, MemoryReduced(CG(iterations))).diagnostics
            norms[l2, iterations], residuals[l2, iterations] = (float(found[x]) for x in ("solution_norm", "residual"))
    assert norms[L2, 120] == pytest.approx(norms[L2, 20], rel=0.05)
    assert residuals[L2, 120] < 1e-8
    assert norms[0.0, 20] > 10 * norms[L2, 20]
    assert norms[0.0, 120] > 10 * norms[0.0, 20]
    assert residuals[0.0, 120] > 0.1


def test_a_head_without_an_l2_term_is_warned_of():
    model, _ = model_and_batch("mlp")
    message = r"Implicit\(\) without weight_decay or proximal.*singular.*solution_norm and residual in the diagnostics$"
    with pytest.warns(UserWarning, match=message) as caught:
        head_learner(model, il.SGD(lr=0.1, steps=1))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head_learner(model, il.SGD(lr=0.1, steps=1, weight_decay=0.01))
        MemoryReduced().check(il.SGD(lr=0.1, steps=1))  # a problem may have its own regulariser


@pytest.mark.filterwarnings("default")
def test_a_start_that_gets_no_gradient_is_named_once():
    quadratic = Quadratic()
    arguments = quadratic.problem, quadratic.meta, quadratic.tasks(), il.SGD(lr=0.1, steps=2), MemoryReduced()
    message = "the meta-gradient of head is exactly zero. Implicit does not learn the start"
    with pytest.warns(UserWarning, match=message) as caught:
        il.hypergradient(*arguments)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        il.hypergradient(*arguments)
        il.hypergradient(replace(quadratic.problem), *arguments[1:])  # a copy of the same
    learner = il.Bilevel(Quadratic().problem, *arguments[1:2], *arguments[3:])
    with pytest.warns(UserWarning, match=message) as caught:
        learner.meta_step(arguments[2])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.meta_step(arguments[2])


def test_the_l2_term_is_part_of_training_evaluation_and_adaptation():
    model, batch = model_and_batch("mlp")
    decayed = il.SGD(lr=0.1, steps=4, weight_decay=0.3)
    learner, exact = head_learner(model, decayed), il.MetaLearner(model, il.Head(), decayed)
    torch.testing.assert_close(learner.meta_step(batch).loss, exact.evaluate(batch).loss.mean())
    torch.testing.assert_close(learner.evaluate(batch).loss, exact.evaluate(batch).loss)
    plain = il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=4))
    assert not torch.allclose(plain.evaluate(batch).loss, exact.evaluate(batch).loss, rtol=1e-4)
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
    torch.testing.assert_close(adapted(batch.query[0][0]), exact.evaluate(batch).outputs[0])


def test_it_is_implicit_differentiation_whose_start_is_not_learned():
    assert MemoryReduced() == il.Implicit(CG(20), learn_start=False)
    assert MemoryReduced(CG(7)) == il.Implicit(CG(7), learn_start=False)
    softmax, solver = Regularised(), il.SGD(lr=0.1, steps=5, proximal=0.4, weight_decay=L2)
    reduced, whole = (softmax.find(solver, estimator) for estimator in (MemoryReduced(), il.Implicit(CG(20))))
    torch.testing.assert_close(reduced.grad["features"], whole.grad["features"], rtol=0, atol=0)
    torch.testing.assert_close(whole.grad["head"], 0.4 * whole.end.solution["head"])
    assert not reduced.grad["head"].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MemoryReduced(0.05), r"give a linear solver"),  # type: ignore[arg-type]
        (lambda: head_learner(model_and_batch("mlp")[0], DECAYED, carry="always"), "choose 'none', 'slot' or 'task'"),
        (lambda: MemoryReduced().check(il.LearnedRates(lr=0.1, steps=1), learns=True), "does not depend"),
        (lambda: il.MetaLearner(model_and_batch("mlp")[0], meta_gradient=MemoryReduced()), r"use\s+adapts=Head\(\)"),
        (
            lambda: head_learner(model_and_batch("mlp")[0], il.AdamW(lr=0.1, steps=1, weight_decay=0.1)),
            "AdamW's weight decay is no term",
        ),
        (
            lambda: head_learner(model_and_batch("mlp")[0], il.SGD(lr=0.1, steps=1), MemoryReduced(Nystrom(5))),
            r"give SGD weight_decay or proximal, give Nystrom\(damping=...\) above 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_multi_step_loss_is_refused():
    model, batch = model_and_batch("mlp")
    with pytest.raises(ValueError, match="leave step_weights out"):
        head_learner(model, DECAYED).meta_step(batch, step_weights=[0.5, 0.5])


def test_nystrom_needs_something_on_the_diagonal_from_anywhere():
    model, _ = model_and_batch("mlp")
    head_learner(model, il.SGD(lr=0.1, steps=2, weight_decay=0.1), MemoryReduced(Nystrom(5)))
    with pytest.warns(UserWarning, match="singular"):
        head_learner(model, il.SGD(lr=0.1, steps=2), MemoryReduced(Nystrom(5, damping=0.1)))
