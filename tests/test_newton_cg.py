"""Newton-CG, the Hessian-free inner solver of iMAML-HF, in float64."""

import itertools

import pytest
import torch
from torch import Tensor

import innerloop as il
from innerloop.inner import NewtonCG, bind
from innerloop.meta_gradient import Implicit
from innerloop.problem import Tree
from problems import model_and_batch


def quadratic(size: int = 20) -> tuple[il.Problem, Tree, il.Task, Tensor, Tensor]:
    """``params' A params / 2 - c' params`` with A's eigenvalues from 0.01 to 10, started at meta."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    matrix = basis @ torch.logspace(-2, 1, size, dtype=torch.float64).diag() @ basis.T
    target, start = torch.randn(2, size, dtype=torch.float64, generator=generator)

    def inner_loss(params: Tree, meta: Tree, support: None) -> Tensor:
        w = params["w"]
        return w @ matrix @ w / 2 - target @ w

    problem = il.Problem(lambda meta: {"w": meta["w"]}, inner_loss, lambda params, meta, query: params["w"].sum())
    return problem, {"w": start}, il.Task(None, None), matrix, target


def run(problem: il.Problem, meta: Tree, task: il.Task, solver: NewtonCG) -> tuple[Tree, list[Tree]]:
    visited: list[Tree] = []
    with torch.no_grad():
        loop = bind(problem, meta, task.support, solver, {})
        last = loop.run(solver.steps, lambda step, params, *_: visited.append(params)).params
    return last, [*visited, last]


def scalar(loss, start: float, **settings) -> list[float]:
    """Where Newton-CG goes on a function of one variable."""
    problem = il.Problem(
        lambda meta: meta, lambda params, meta, support: loss(params["x"]).sum(), lambda *_: torch.ones(())
    )
    meta = {"x": torch.tensor([start], dtype=torch.float64)}
    return [float(place["x"]) for place in run(problem, meta, il.Task(None, None), NewtonCG(**settings))[1]]


def test_a_full_solve_finds_the_minimum_of_a_quadratic_in_one_step():
    problem, meta, task, matrix, target = quadratic()
    solver = NewtonCG(steps=1, iterations=40, weight_decay=0.1, proximal=0.5)
    found, _ = run(problem, meta, task, solver)
    damped = matrix + 0.6 * torch.eye(20, dtype=torch.float64)
    exact = torch.linalg.solve(damped, target + 0.5 * meta["w"])
    assert float((found["w"] - exact).norm() / exact.norm()) < 1e-13


def test_five_conjugate_gradients_a_step_reduce_the_error_a_hundredfold():
    problem, meta, task, matrix, target = quadratic()
    exact = torch.linalg.solve(matrix + 2 * torch.eye(20, dtype=torch.float64), target + 2 * meta["w"])
    _, places = run(problem, meta, task, NewtonCG(steps=4, proximal=2.0))
    errors = [float((place["w"] - exact).norm() / exact.norm()) for place in places]
    assert all(after < 0.05 * before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-6


def test_no_step_raises_the_loss_of_a_network_and_the_last_is_stationary():
    model, batch = model_and_batch("mlp")
    solver = NewtonCG(steps=12, iterations=30, proximal=0.3, weight_decay=0.05)
    learner = il.MetaLearner(model)
    task = il.Task(*(tuple(value[0] for value in part) for part in batch))
    problem, meta = learner.problem, learner.meta_tree()
    _, places = run(problem, meta, task, solver)

    def objective(params: Tree) -> Tensor:
        loss = problem.inner_loss(params, meta, task.support)
        for name, value in params.items():
            loss = loss + 0.05 / 2 * value.square().sum() + 0.3 / 2 * (value - meta[name]).square().sum()
        return loss

    values = [float(objective(place)) for place in places]
    assert all(after <= before + 1e-14 for before, after in itertools.pairwise(values))
    assert values[-1] < 0.9 * values[0]
    grad = torch.func.grad(objective)(places[-1])
    assert max(float(value.abs().max()) for value in grad.values()) < 1e-10


def test_the_line_search_takes_the_first_length_that_is_enough():
    # Newton's step for sqrt(1 + x^2) goes from x to -x^3: from 2 that is -8, and 2 - 10 t is low enough at t = 1/4
    _, reached = scalar(lambda x: (1 + x**2).sqrt(), 2.0, steps=1)
    assert reached == pytest.approx(-0.5)
    assert scalar(lambda x: (1 + x**2).sqrt(), 2.0, steps=1, lr=0.1)[-1] == pytest.approx(1.0)


def test_a_search_that_finds_nothing_goes_on_in_the_next_step():
    one_by_one = scalar(lambda x: (1 + x**2).sqrt(), 2.0, steps=4, trials=1)
    assert one_by_one == pytest.approx([2.0, 2.0, 2.0, -0.5, 0.125])


def test_negative_curvature_falls_back_on_the_gradient():
    # cos has negative curvature at 0.5; its gradient -sin(0.5) leads uphill in x
    assert scalar(torch.cos, 0.5, steps=1)[-1] == pytest.approx(0.5 + torch.sin(torch.tensor(0.5)).item())
    assert scalar(torch.cos, 0.5, steps=12)[-1] == pytest.approx(torch.pi, abs=1e-12)


def test_tasks_are_computed_at_once_as_they_are_one_by_one():
    model, batch = model_and_batch("conv4")
    together, alone = (
        il.MetaLearner(
            model, inner=NewtonCG(steps=3, proximal=1.0), meta_gradient=Implicit(), chunk_size=size
        ).evaluate(batch, curve=True)
        for size in (2, 1)
    )
    torch.testing.assert_close(together.loss_curve, alone.loss_curve)
    torch.testing.assert_close(together.outputs, alone.outputs)


def test_a_learner_adapts_with_it():
    model, batch = model_and_batch("mlp")
    inputs, targets = batch.support[0][0], batch.support[1][0]
    learner = il.MetaLearner(model, inner=NewtonCG(steps=1, test_steps=8, proximal=0.05), meta_gradient=Implicit())
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    adapted = learner.adapt(inputs, targets)
    assert (adapted(inputs).argmax(-1) == targets).all()
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_estimators_that_differentiate_its_steps_are_told_so():
    with pytest.raises(
        ValueError, match=r"Unrolled goes through inner steps, but NewtonCG's have no derivative: use Implicit\(\)"
    ):
        il.MetaLearner(model_and_batch("mlp")[0], inner=NewtonCG(steps=1))


def test_what_the_line_search_would_overrule_is_refused():
    for setting in ({"clip": 1.0}, {"lr": {"*": 1.0}}, {"lr": lambda step: 1.0}, {"moves": [{"w"}]}):
        with pytest.raises(ValueError, match="NewtonCG chooses its own step for all parameters together"):
            NewtonCG(**{"steps": 1, **setting})


@pytest.mark.parametrize("setting", ["iterations", "trials"])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"NewtonCG\\({setting}=0\\)"):
        NewtonCG(**{"steps": 1, setting: 0})
