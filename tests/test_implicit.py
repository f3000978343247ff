"""Implicit gradients against closed forms, finite differences of the solved problem and dense algebra, in float64."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import innerloop as il
from innerloop.curvature import second_order_kernels
from innerloop.inner import InnerSolver, NewtonCG, bind
from innerloop.linear import CG, Neumann, Nystrom
from innerloop.meta_gradient import Implicit, MetaGradient, ReleasedIMAML
from innerloop.problem import Tree
from problems import SOLVERS, model_and_batch, relative_error, subset

# --- problems -------------------------------------------------------------------------------------


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectrum(size: int, low: float, high: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues spaced evenly in their logarithm."""
    basis = torch.linalg.qr(draw(size, size, seed=seed)).Q
    return basis @ torch.logspace(math.log10(low), math.log10(high), size, dtype=torch.float64).diag() @ basis.T


class Quadratic:
    """``w'Aw / 2 - (c + M tilt)'w`` inside, ``|Dw - e|^2 / 2 + tilt.w`` outside: start and tilt are learned."""

    def __init__(self, size: int = 20) -> None:
        self.matrix, self.mixed = spectrum(size, 0.01, 10), draw(size, size, seed=1)
        self.target, self.goal = draw(2, size, seed=2)
        self.outer_matrix = draw(size, size, seed=3) / size**0.5
        self.meta = {"w": draw(size, seed=4), "tilt": draw(size, seed=5)}
        self.problem = il.Problem(lambda meta: {"w": meta["w"]}, self.inner_loss, self.outer_loss)
        self.task = il.Task(None, None)

    def inner_loss(self, params: Tree, meta: Tree, support: None) -> Tensor:
        w = params["w"]
        return w @ self.matrix @ w / 2 - (self.target + self.mixed @ meta["tilt"]) @ w

    def outer_loss(self, params: Tree, meta: Tree, query: None) -> Tensor:
        return (self.outer_matrix @ params["w"] - self.goal).square().sum() / 2 + meta["tilt"] @ params["w"]

    def solution(self, proximal: float, decay: float = 0.0) -> Tensor:
        force = self.target + self.mixed @ self.meta["tilt"] + proximal * self.meta["w"]
        return torch.linalg.solve(self.system(proximal, decay), force)

    def system(self, proximal: float, decay: float = 0.0) -> Tensor:
        return self.matrix + (proximal + decay) * torch.eye(len(self.matrix), dtype=torch.float64)

    def exact(self, proximal: float, decay: float = 0.0) -> Tree:
        w = self.solution(proximal, decay)
        outer = self.outer_matrix.T @ (self.outer_matrix @ w - self.goal) + self.meta["tilt"]
        v = torch.linalg.solve(self.system(proximal, decay), outer)
        return {"w": proximal * v, "tilt": w + self.mixed.T @ v}


def network() -> tuple[il.Problem, Tree, il.Task]:
    """A tanh network 3-8-1 on ten weighted examples, not convex; its start and the weights' logarithms are learned."""
    meta = {
        "w1": draw(8, 3, seed=1),
        "b1": draw(8, seed=2),
        "w2": draw(1, 8, seed=3),
        "log weights": 0.3 * draw(10, seed=4),
    }

    def output(params: Tree, inputs: Tensor) -> Tensor:
        return (torch.tanh(inputs @ params["w1"].T + params["b1"]) @ params["w2"].T).squeeze(-1)

    def inner_loss(params: Tree, meta: Tree, support: tuple[Tensor, Tensor]) -> Tensor:
        return (meta["log weights"].exp() * (output(params, support[0]) - support[1]).square()).mean()

    def outer_loss(params: Tree, meta: Tree, query: tuple[Tensor, Tensor]) -> Tensor:
        return (output(params, query[0]) - query[1]).square().mean()

    problem = il.Problem(lambda meta: {name: meta[name] for name in ("w1", "b1", "w2")}, inner_loss, outer_loss)
    support, query = ((draw(10, 3, seed=seed), draw(10, seed=seed + 1)) for seed in (5, 7))
    return problem, meta, il.Task(support, query)


def softmax() -> tuple[il.Problem, Tree, il.Task]:
    """A softmax layer on features that a learned matrix makes; its start is learned too."""
    meta = {"head": draw(3, 4, seed=1), "features": draw(4, 5, seed=2) / 2}

    def outputs(params: Tree, meta: Tree, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ meta["features"].T) @ params["head"].T

    def loss(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs(params, meta, batch[0]), batch[1])

    labels = torch.arange(3).repeat_interleave(4)
    task = il.Task((draw(12, 5, seed=3), labels), (draw(12, 5, seed=4), labels))
    return il.Problem(lambda meta: {"head": meta["head"]}, loss, loss), meta, task


def estimate(problem: il.Problem, meta: Tree, task: il.Task, solver: InnerSolver, estimator: MetaGradient) -> il.Result:
    return il.hypergradient(problem, meta, task, solver, estimator)


def dense(tree: Tree) -> Tensor:
    return torch.cat([value.flatten() for value in tree.values()])


def like(tree: Tree, vector: Tensor) -> Tree:
    parts = vector.split([value.numel() for value in tree.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(tree.items(), parts, strict=True)}


def derivatives(
    problem: il.Problem, vector: Tensor, like_params: Tree, meta: Tree, task: il.Task
) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the support loss, by reverse-over-reverse: torch.func.hessian is wrong on batch norm."""

    def gradient(vector: Tensor) -> tuple[Tensor, Tensor]:
        grad = torch.func.grad(lambda vector: problem.inner_loss(like(like_params, vector), meta, task.support))(vector)
        return grad, grad

    matrix, grad = torch.func.jacrev(gradient, has_aux=True)(vector)
    return grad, matrix


def hessian(problem: il.Problem, params: Tree, meta: Tree, task: il.Task) -> Tensor:
    return derivatives(problem, dense(params), params, meta, task)[1]


def differences(problem: il.Problem, meta: Tree, task: il.Task, near: Tree, proximal: float, decay: float) -> Tree:
    """Central differences, in every entry of meta, of the outer loss at the minimiser, found by Newton's method."""
    width = 1e-5

    def solved(meta: Tree) -> Tensor:
        vector, start = dense(near), dense(problem.begin(meta, task.support))
        for _ in range(4):
            grad, matrix = derivatives(problem, vector, near, meta, task)
            grad = grad + decay * vector + proximal * (vector - start)
            matrix = matrix + (proximal + decay) * torch.eye(len(vector), dtype=vector.dtype)
            vector = vector - torch.linalg.solve(matrix, grad)
        return problem.outer_loss(like(near, vector), meta, task.query)

    grad = {}
    for name, value in meta.items():
        moves = width * torch.eye(value.numel(), dtype=value.dtype).view(-1, *value.shape)
        moved = torch.cat([value + moves, value - moves])
        ahead, behind = torch.func.vmap(lambda moved, name=name: solved({**meta, name: moved}))(moved).chunk(2)
        grad[name] = ((ahead - behind) / (2 * width)).view(value.shape)
    return grad


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_closed_form_of_a_quadratic(decay):
    quadratic = Quadratic()
    solver = NewtonCG(steps=3, iterations=40, weight_decay=decay, proximal=2.0)
    result = estimate(quadratic.problem, quadratic.meta, quadratic.task, solver, Implicit(CG(40)))
    torch.testing.assert_close(result.params["w"], quadratic.solution(2.0, decay))
    assert relative_error(result.grad, quadratic.exact(2.0, decay)) < 1e-10


@pytest.mark.parametrize("build", [network, softmax])
@pytest.mark.parametrize(("decay", "proximal"), [(0.0, 0.7), (0.02, 0.7), (0.3, 0.5)])
def test_finite_differences_of_the_solved_problem(build, decay, proximal):
    problem, meta, task = build()
    solver = NewtonCG(steps=12, iterations=30, weight_decay=decay, proximal=proximal)
    result = estimate(problem, meta, task, solver, Implicit(CG(60)))
    expected = differences(problem, meta, task, result.params, proximal, decay)
    for name in meta:  # every kind of meta-parameter by itself
        assert relative_error({name: result.grad[name]}, {name: expected[name]}) < 1e-6
    unread = pytest.warns(UserWarning, match="log weights is exactly zero") if build is network else nullcontext()
    with unread:
        first_order = estimate(problem, meta, task, il.SGD(lr=0.1, steps=1), il.FirstOrder()).grad
    assert relative_error(first_order, expected) > 0.1


def test_finite_differences_of_a_start_that_is_read_off_the_support_set():
    problem, meta, task = softmax()

    def start(meta: Tree, support: tuple[Tensor, Tensor]) -> Tree:
        features = torch.tanh(support[0] @ meta["features"].T)
        return {"head": torch.stack([features[support[1] == way].mean(0) for way in range(3)]) + meta["head"]}

    problem = il.Problem(start, problem.inner_loss, problem.outer_loss)
    solver = NewtonCG(steps=8, iterations=30, weight_decay=0.1, proximal=0.4)
    result = estimate(problem, meta, task, solver, Implicit(CG(60)))
    expected = differences(problem, meta, task, result.params, 0.4, 0.1)
    for name in meta:
        assert relative_error({name: result.grad[name]}, {name: expected[name]}) < 1e-6


# --- the problem as it is, without a term of ours ---------------------------------------------------


def squares() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets of 12 support and of 9 query examples with 4 features."""
    return draw(12, 4, seed=1), draw(12, seed=2), draw(9, 4, seed=3), draw(9, seed=4)


def ridge() -> tuple[il.Problem, Tree, il.Task, Callable[[Tree], Tree]]:
    """Ridge regression; the logarithm of its own weight decay and the scales of the features are learned."""
    inputs, targets, queries, wanted = squares()

    def inner_loss(params: Tree, meta: Tree, support: tuple[Tensor, Tensor]) -> Tensor:
        error = support[0] * meta["scales"] @ params["w"] - support[1]
        return error.square().sum() / 2 + meta["log decay"].exp() / 2 * params["w"].square().sum()

    def outer_loss(params: Tree, meta: Tree, query: tuple[Tensor, Tensor]) -> Tensor:
        return (query[0] * meta["scales"] @ params["w"] - query[1]).square().mean()

    def solution(meta: Tree) -> Tree:
        scaled = inputs * meta["scales"]
        matrix = scaled.T @ scaled + meta["log decay"].exp() * torch.eye(4, dtype=torch.float64)
        return {"w": torch.linalg.solve(matrix, scaled.T @ targets)}

    meta = {"log decay": torch.tensor(0.3, dtype=torch.float64), "scales": 1 + 0.2 * draw(4, seed=5)}
    problem = il.Problem(lambda meta: {"w": torch.zeros(4, dtype=torch.float64)}, inner_loss, outer_loss)
    return problem, meta, il.Task((inputs, targets), (queries, wanted)), solution


def data_weights() -> tuple[il.Problem, Tree, il.Task, Callable[[Tree], Tree]]:
    """Least squares with a learned weight for every example."""
    inputs, targets, queries, wanted = squares()

    def inner_loss(params: Tree, meta: Tree, support: tuple[Tensor, Tensor]) -> Tensor:
        return (meta["weights"].sigmoid() * (support[0] @ params["w"] - support[1]).square()).mean()

    def outer_loss(params: Tree, meta: Tree, query: tuple[Tensor, Tensor]) -> Tensor:
        return (query[0] @ params["w"] - query[1]).square().mean()

    def solution(meta: Tree) -> Tree:
        weighted = inputs * meta["weights"].sigmoid()[:, None]
        return {"w": torch.linalg.solve(weighted.T @ inputs, weighted.T @ targets)}

    problem = il.Problem(lambda meta: {"w": torch.zeros(4, dtype=torch.float64)}, inner_loss, outer_loss)
    return problem, {"weights": draw(12, seed=5)}, il.Task((inputs, targets), (queries, wanted)), solution


@pytest.mark.parametrize("build", [ridge, data_weights])
def test_without_a_term_of_the_inner_solver_it_is_plain_implicit_differentiation(build):
    problem, meta, task, solution = build()
    exact = torch.func.grad(lambda meta: problem.outer_loss(solution(meta), meta, task.query))(meta)
    for solver in (NewtonCG(steps=3, iterations=10), il.SGD(lr=0.03 if build is ridge else 0.3, steps=800)):
        result = estimate(problem, meta, task, solver, il.Implicit())
        assert relative_error(result.params, solution(meta)) < 1e-9
        for name in meta:
            assert relative_error({name: result.grad[name]}, {name: exact[name]}) < 1e-8


@pytest.mark.parametrize("proximal", [0.0, 0.4])
def test_the_closed_form_with_the_solvers_two_terms(proximal):
    """The terms of the inner solver are those of a problem that has them written out."""
    problem, meta, task, _ = ridge()
    decay, centre = 0.7, draw(4, seed=6)
    problem = il.Problem(lambda meta: {"w": centre * meta["scales"]}, problem.inner_loss, problem.outer_loss)

    def solved(meta: Tree) -> Tensor:
        scaled, start = task.support[0] * meta["scales"], centre * meta["scales"]
        matrix = scaled.T @ scaled + (meta["log decay"].exp() + decay + proximal) * torch.eye(4, dtype=torch.float64)
        w = torch.linalg.solve(matrix, scaled.T @ task.support[1] + proximal * start)
        return problem.outer_loss({"w": w}, meta, task.query)

    solver = NewtonCG(steps=3, iterations=10, weight_decay=decay, proximal=proximal)
    result = estimate(problem, meta, task, solver, il.Implicit())
    assert relative_error(result.grad, torch.func.grad(solved)(meta)) < 1e-9


def test_a_softmax_layer_without_a_term_of_the_inner_solver():
    """Its own weight decay, learned, makes the solution one; the start has no part in it."""
    plain, meta, task = softmax()
    meta = {**meta, "log decay": torch.tensor(-2.0, dtype=torch.float64)}

    def inner_loss(params: Tree, meta: Tree, support: tuple[Tensor, Tensor]) -> Tensor:
        return plain.inner_loss(params, meta, support) + meta["log decay"].exp() / 2 * params["head"].square().sum()

    problem = il.Problem(plain.start, inner_loss, plain.outer_loss)
    with pytest.warns(UserWarning, match="of head is exactly zero. Implicit differentiates the solution"):
        result = estimate(problem, meta, task, NewtonCG(steps=8, iterations=30), Implicit(CG(60)))
    expected = differences(problem, meta, task, result.params, 0.0, 0.0)
    for name in ("features", "log decay"):
        assert relative_error({name: result.grad[name]}, {name: expected[name]}) < 1e-6
    assert torch.equal(result.grad["head"], torch.zeros_like(result.grad["head"]))
    assert expected["head"].abs().max() < 1e-9


SAME_STEPS: list[MetaGradient] = [
    il.Implicit(),
    il.MemoryReduced(),
    il.Implicit(Nystrom(4, damping=0.1)),
    il.Unrolled(record=True),
    il.Truncated(2),
    il.FirstOrder(),
    il.Binomial(2),
    il.Mixed((0, 2), (0.5, 0.5)),
    il.Window(2, "true_forward"),
    il.Reptile(),
]


@pytest.mark.filterwarnings("ignore:the meta-gradient of")
@pytest.mark.parametrize("estimator", SAME_STEPS, ids=repr)
@pytest.mark.parametrize("terms", [{}, {"proximal": 1.5}, {"weight_decay": 0.2, "proximal": 0.3}])
def test_an_estimator_never_changes_the_problem(estimator, terms):
    problem, meta, task = network()
    for solver in (il.SGD(lr=0.1, steps=4, **terms), il.Adam(lr=0.05, steps=4, **terms)):
        found, expected = (estimate(problem, meta, task, solver, each) for each in (estimator, il.Unrolled()))
        torch.testing.assert_close(found.params, expected.params, rtol=0, atol=1e-15)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-15)
        torch.testing.assert_close(
            found.diagnostics["support_loss"], expected.diagnostics["support_loss"], rtol=0, atol=1e-15
        )


def test_the_network_of_the_finite_differences_is_not_convex():
    problem, meta, task = network()
    found = estimate(problem, meta, task, NewtonCG(steps=12, iterations=30, proximal=0.7), Implicit(CG(60))).params
    smallest = torch.linalg.eigvalsh(hessian(problem, found, meta, task)).min()
    assert -0.7 < smallest < -0.1


@pytest.mark.parametrize("model", ["mlp", "conv4", "encoder"])
@pytest.mark.parametrize("chosen", ["everything", "head", "pattern"])
def test_any_model_and_subset_is_dense_linear_algebra(model, chosen):
    network, batch = model_and_batch(model)
    proximal, decay = 20.0, 0.5
    solver = il.SGD(lr=0.02, steps=3, weight_decay=decay, proximal=proximal)
    learner = il.MetaLearner(network, subset(model, chosen), solver, Implicit(CG(40)))
    metrics = learner.meta_step(batch)
    assert metrics.diagnostics["negative_curvature"] == 0
    found = {name: p.grad for name, p in learner.model.named_parameters()}
    meta = {name: p.detach() for name, p in learner.model.named_parameters()}

    def loss(params: Tree, given: Tree, examples: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(learner.model, {**given, **params}, (examples[0],)), examples[1])

    expected = {name: torch.zeros_like(value) for name, value in meta.items()}
    problem = il.Problem(lambda meta: {name: meta[name] for name in learner.adapted}, loss, loss)
    with second_order_kernels():
        for index in range(2):
            task = il.Task(*(tuple(value[index] for value in part) for part in batch))
            end = learner.adapt(*task.support)
            params = {name: end.get_parameter(name).detach() for name in learner.adapted}
            outer, direct = torch.func.grad(loss, argnums=(0, 1))(params, meta, task.query)
            matrix = (decay + proximal) * torch.eye(len(dense(params)), dtype=torch.float64)
            matrix += hessian(problem, params, meta, task)
            v = torch.linalg.solve(matrix, dense(outer))

            def pairing(given: Tree, params: Tree = params, task: il.Task = task, v: Tensor = v) -> Tensor:
                return dense(torch.func.grad(loss)(params, given, task.support)) @ v

            mixed, through_start = torch.func.grad(pairing)(meta), like(params, proximal * v)
            for name in meta:
                expected[name] += (direct[name] - mixed[name] + through_start.get(name, 0)) / 2
    assert relative_error(found, expected) < 1e-9


def test_the_curvature_is_that_of_the_support_loss_alone():
    problem, meta, task = network()
    loop = bind(problem, meta, task.support, il.SGD(lr=0.1, steps=1, proximal=3.0, weight_decay=2.0), {})
    matrix = hessian(problem, loop.start, meta, task)
    u, w = ({name: draw(*value.shape, seed=seed) for name, value in loop.start.items()} for seed in (11, 12))
    hessian_product = loop.hessian(0, loop.start)
    product, other = hessian_product(w), hessian_product(u)
    torch.testing.assert_close(dense(product), matrix @ dense(w))
    torch.testing.assert_close(dense(u) @ dense(product), dense(w) @ dense(other))
    both = hessian_product({name: 2 * u[name] - 3 * w[name] for name in u})
    torch.testing.assert_close(dense(both), 2 * dense(other) - 3 * dense(product))
    torch.testing.assert_close((product, loop.products(0, loop.start)(w)[1]), loop.curvature(0, loop.start, w))


# --- what the solution does not depend on ---------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        il.SGD(lr=0.15, steps=300, proximal=1.5),
        il.Momentum(lr=0.1, steps=200, momentum=0.7, proximal=1.5),
        il.Adam(lr=0.05, steps=400, eps=0.1, proximal=1.5),
        il.AdamW(lr=0.05, steps=400, eps=0.1, proximal=1.5),  # without weight decay, which would be no term of a loss
        NewtonCG(steps=20, iterations=5, proximal=1.5),
    ],
)
def test_every_inner_solver_run_to_the_end_gives_the_same(solver):
    problem, meta, task = network()
    newton = NewtonCG(steps=12, iterations=30, proximal=1.5)
    expected = estimate(problem, meta, task, newton, Implicit(CG(60))).grad
    assert relative_error(estimate(problem, meta, task, solver, Implicit(CG(60))).grad, expected) < 1e-8


@pytest.mark.parametrize("linear", [Neumann(150), Neumann(150, step=0.6), Nystrom(100)])
def test_every_linear_solver_gives_the_same(linear):
    problem, meta, task = softmax()
    solver = NewtonCG(steps=6, iterations=15, weight_decay=0.1, proximal=0.5)
    expected = estimate(problem, meta, task, solver, Implicit(CG(60))).grad
    assert relative_error(estimate(problem, meta, task, solver, Implicit(linear)).grad, expected) < 1e-8


def test_neumann_with_the_inverse_proximal_weight_is_the_series_in_powers_of_the_curvature_over_that_weight():
    problem, meta, task = softmax()
    solver = il.SGD(lr=0.1, steps=5, proximal=2.0)
    result = estimate(problem, meta, task, solver, Implicit(Neumann(3, step=1 / 2.0)))
    matrix = hessian(problem, result.params, meta, task) / 2.0
    outer = dense(torch.func.grad(problem.outer_loss)(result.params, meta, task.query))
    v = outer - matrix @ outer + matrix @ matrix @ outer
    torch.testing.assert_close(dense({"head": result.grad["head"]}), v)


def test_every_linear_solver_gives_the_same_in_a_learner():
    model, batch = model_and_batch("conv4")
    grads = []
    for linear in (CG(30), Neumann(60), Nystrom(30)):  # on all rows, of a head whose loss is convex
        learner = il.MetaLearner(model, il.Head(), il.SGD(lr=0.02, steps=2, proximal=2.0), Implicit(linear))
        learner.meta_step(batch)
        grads.append({name: p.grad for name, p in learner.named_parameters()})
    assert relative_error(grads[1], grads[0]) < 1e-9
    assert relative_error(grads[2], grads[0]) < 1e-9


# --- how the error behaves ------------------------------------------------------------------------


def test_the_error_is_proportional_to_what_the_inner_loop_leaves_unsolved():
    problem, meta, task = network()
    exact = estimate(problem, meta, task, NewtonCG(steps=12, iterations=30, proximal=1.5), Implicit(CG(60)))
    ratios, distances = [], []
    for steps in (30, 60, 120, 240):
        result = estimate(problem, meta, task, il.SGD(lr=0.1, steps=steps, proximal=1.5), Implicit(CG(60)))
        distances.append(relative_error(result.params, exact.params))
        ratios.append(relative_error(result.grad, exact.grad) / distances[-1])
    assert distances[0] > 1000 * distances[-1]
    assert max(ratios) < 3 * min(ratios)


def test_few_conjugate_gradients_leave_a_floor():
    quadratic = Quadratic()

    def error(steps: int, iterations: int) -> float:
        solver = il.SGD(lr=1 / 12, steps=steps, proximal=2.0)
        result = estimate(quadratic.problem, quadratic.meta, quadratic.task, solver, Implicit(CG(iterations)))
        return relative_error({"w": result.grad["w"]}, {"w": quadratic.exact(2.0)["w"]})

    assert error(200, 30) < 1e-10
    for iterations, least in ((2, 0.02), (5, 1e-3)):
        assert least < error(200, iterations) == pytest.approx(error(100, iterations), rel=1e-3)
    assert error(200, 5) < 0.3 * error(200, 2)


def test_the_limits_of_the_proximal_weight():
    quadratic = Quadratic()

    def start_gradient(proximal: float) -> Tensor:
        solver = NewtonCG(steps=3, iterations=40, proximal=proximal)
        return estimate(quadratic.problem, quadratic.meta, quadratic.task, solver, Implicit(CG(60))).grad["w"]

    at_start = torch.func.grad(quadratic.outer_loss)(quadratic.meta, quadratic.meta, None)["w"]
    torch.testing.assert_close(start_gradient(1e9), at_start, rtol=1e-6, atol=0)  # first-order MAML
    assert start_gradient(1e-8).norm() < 1e-3 * at_start.norm()  # the start is forgotten
    with pytest.warns(UserWarning, match="of w is exactly zero. Implicit differentiates the solution"):
        assert not start_gradient(0.0).any()


# --- the authors' published code ------------------------------------------------------------------


def released(estimator: ReleasedIMAML, lr: float = 0.1, steps: int = 4) -> tuple[il.Result, Tree, Tensor, Tensor]:
    """The result, plain gradient descent, the Hessian where the result is and the outer gradient there."""
    problem, meta, task = network()
    result = estimate(problem, meta, task, il.SGD(lr=lr, steps=steps), estimator)
    plain = bind(problem, meta, task.support, il.SGD(lr=lr, steps=steps), {}).run(steps).params
    outer = torch.func.grad(problem.outer_loss)(result.params, meta, task.query)
    return result, plain, hessian(problem, result.params, meta, task), dense(outer)


def test_the_released_variant_pulls_plain_gradient_descent_back_once():
    result, plain, _, _ = released(ReleasedIMAML(2.0, CG(5, damping=1.0)))
    _, meta, _ = network()
    for name, value in plain.items():
        torch.testing.assert_close(result.params[name], meta[name] + (1 - 0.1 * 2.0) * (value - meta[name]))


def test_the_released_variant_solves_the_released_system():
    result, _, matrix, outer = released(ReleasedIMAML(2.0, CG(5, damping=1.0)))
    # conjugate gradients as the released script writes them, on its operator
    x, r, p = torch.zeros_like(outer), outer.clone(), outer.clone()
    for _ in range(5):
        image = (1 + 1.0) * p + matrix @ p / (2.0 + 10.0)
        length = (r @ r) / (p @ image)
        x, new = x + length * p, r - length * image
        r, p = new, new + (new @ new) / (r @ r) * p
    found = dense({name: result.grad[name] for name in result.params})
    torch.testing.assert_close(found, x)
    # run to the end, this is half of iMAML's formula at a weight of 24
    exact, _, matrix, outer = released(ReleasedIMAML(2.0, CG(100, damping=1.0)))
    found = dense({name: exact.grad[name] for name in exact.params})
    eye = torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(found, 0.5 * torch.linalg.solve(eye + matrix / 24, outer))


def test_the_released_variant_with_one_iteration_does_not_solve():
    result, _, _, outer = released(ReleasedIMAML(2.0, CG(1, damping=1.0)))
    torch.testing.assert_close(dense({name: result.grad[name] for name in result.params}), outer)


def test_the_released_variant_evaluates_without_the_pull():
    model, batch = model_and_batch("mlp")
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=3), meta_gradient=ReleasedIMAML())
    plain = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=3))
    torch.testing.assert_close(learner.evaluate(batch).loss, plain.evaluate(batch).loss)


# --- in a learner ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sgd", "momentum", "adam"])
def test_training_evaluation_and_adaptation_minimise_the_same(solver):
    model, batch = model_and_batch("mlp")
    inner = replace(SOLVERS[solver](4), proximal=1.5)
    learner = il.MetaLearner(model, inner=inner, meta_gradient=Implicit())
    assert learner.inner == inner
    exact = il.MetaLearner(model, inner=inner)
    torch.testing.assert_close(learner.meta_step(batch).loss, exact.evaluate(batch).loss.mean())
    torch.testing.assert_close(learner.evaluate(batch).loss, exact.evaluate(batch).loss)
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
    torch.testing.assert_close(adapted(batch.query[0][0]), exact.evaluate(batch).outputs[0])


def test_the_mode_of_the_model_changes_no_statistics():
    model, batch = model_and_batch("conv4")
    grads = []
    for training in (True, False):
        inner = il.SGD(lr=0.1, steps=2, proximal=2.0)
        learner = il.MetaLearner(model, inner=inner, meta_gradient=Implicit()).train(training)
        learner.meta_step(batch)
        grads.append({name: p.grad for name, p in learner.named_parameters()})
    assert relative_error(*grads) < 1e-14


def test_tasks_are_averaged_and_nothing_else_changes():
    model, batch = model_and_batch("conv4")
    learner = il.MetaLearner(model, inner=NewtonCG(steps=2, proximal=2.0), meta_gradient=Implicit())
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    metrics = learner.meta_step(batch)
    together = {name: p.grad.clone() for name, p in learner.named_parameters()}
    assert not any(value.requires_grad for value in (metrics.loss, *metrics.diagnostics.values(), *together.values()))
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    learner.zero_grad()
    for index in range(2):  # accumulates the gradients of single tasks
        learner.meta_step(il.Task(*(tuple(value[index : index + 1] for value in part) for part in batch)))
    assert relative_error({name: p.grad / 2 for name, p in learner.named_parameters()}, together) < 1e-12


def test_diagnostics_tell_how_the_solve_went():
    model, batch = model_and_batch("mlp")
    inner = il.SGD(lr=0.1, steps=3, proximal=2.0)
    learner = il.MetaLearner(model, inner=inner, meta_gradient=Implicit(CG(4)))
    found = learner.meta_step(batch).diagnostics
    assert found["curvature_products"] == 5  # four to solve and one for the mixed derivative
    assert found["iterations"] == 4
    assert found["negative_curvature"] == 0
    assert 0 < found["residual"] < 0.1
    assert found["support_loss"].shape == (3,)
    better = il.MetaLearner(model, inner=inner, meta_gradient=Implicit(CG(8)))
    assert better.meta_step(batch).diagnostics["residual"] < 0.1 * found["residual"]


def test_negative_curvature_is_counted_and_survived():
    model, batch = model_and_batch("mlp")
    inner = il.SGD(lr=1e-3, steps=1, proximal=1e-3)
    learner = il.MetaLearner(model, inner=inner, meta_gradient=Implicit(CG(20)))
    metrics = learner.meta_step(batch)
    assert metrics.diagnostics["negative_curvature"] == 1  # of both tasks
    assert all(p.grad.isfinite().all() for p in learner.parameters())


# --- taken up where it was left -------------------------------------------------------------------


def test_the_solution_at_the_end_solves_the_system():
    problem, meta, task = network()
    solver = il.SGD(lr=0.1, steps=6, proximal=1.5, weight_decay=0.1)
    result = estimate(problem, meta, task, solver, Implicit(CG(60)))
    matrix = hessian(problem, result.params, meta, task) + 1.6 * torch.eye(40, dtype=torch.float64)
    outer = torch.func.grad(problem.outer_loss)(result.params, meta, task.query)
    torch.testing.assert_close(dense(result.end.solution), torch.linalg.solve(matrix, dense(outer)))
    assert result.end.step == 6


@pytest.mark.parametrize("linear", [CG(3), Neumann(3, step=0.1)])
def test_a_task_that_is_taken_up_begins_with_the_solution_that_it_was_left_with(linear):
    problem, meta, task = network()
    solver, estimator = il.SGD(lr=0.1, steps=6, proximal=1.5), Implicit(linear)
    first = estimate(problem, meta, task, solver, estimator)
    then = il.hypergradient(problem, meta, task, solver, estimator, begin=first.end)
    cold = il.hypergradient(problem, meta, task, solver, estimator, begin=first.end._replace(solution={}))
    once = estimate(problem, meta, task, replace(solver, steps=12), estimator)
    torch.testing.assert_close(then.params, once.params)  # the inner loop goes on
    torch.testing.assert_close(cold.grad, once.grad)
    assert then.end.step == once.end.step == 12
    # the system goes on from what the first call left, at the price of one product
    matrix = hessian(problem, then.params, meta, task)
    outer = dense(torch.func.grad(problem.outer_loss)(then.params, meta, task.query))
    expected, info = linear.solve(lambda v: matrix @ v, outer, 1.5, dense(first.end.solution))
    torch.testing.assert_close(dense(then.end.solution), expected)
    torch.testing.assert_close(then.diagnostics["residual"], info.residual)
    assert then.diagnostics["curvature_products"] == cold.diagnostics["curvature_products"] + 1
    assert then.diagnostics["residual"] < 0.7 * cold.diagnostics["residual"]


def test_many_short_calls_that_are_taken_up_reach_what_one_long_call_does():
    problem, meta, task = network()
    newton = NewtonCG(steps=12, iterations=30, proximal=1.5)
    exact = estimate(problem, meta, task, newton, Implicit(CG(60))).grad
    solver, estimator, end = il.SGD(lr=0.15, steps=5, proximal=1.5), Implicit(CG(2)), None
    errors = []
    for _ in range(60):
        result = il.hypergradient(problem, meta, task, solver, estimator, begin=end)
        end = result.end
        errors.append(relative_error(result.grad, exact))
    assert errors[0] > 0.01
    assert errors[-1] < 1e-8  # the start, which is still what the proximal term pulls to, has its gradient too


def test_a_learner_carries_the_solution():
    model, batch = model_and_batch("mlp")
    inner, linear = il.SGD(lr=0.1, steps=3, proximal=2.0), CG(2)
    learner = il.MetaLearner(model, inner=inner, meta_gradient=Implicit(linear), carry="slot")
    metrics = learner.meta_step(batch, keep_end=True)
    learner.zero_grad()
    again = learner.meta_step(batch, keep_end=True)
    for index in range(2):
        task = il.Task(*(tuple(value[index] for value in part) for part in batch))
        first = learner.estimate(task)
        then = learner.estimate(task, begin=first.end)
        torch.testing.assert_close(metrics.end[index].solution, first.end.solution)
        torch.testing.assert_close(again.end[index].solution, then.end.solution)
        assert again.end[index].step == 6
    assert again.diagnostics["curvature_products"] == metrics.diagnostics["curvature_products"] + 1
    assert again.diagnostics["residual"] < metrics.diagnostics["residual"]


@pytest.mark.parametrize("test_steps", [None, 7])
def test_the_solution_is_that_of_all_examples_where_steps_see_minibatches(test_steps):
    problem, meta, task = softmax()
    inner = il.SGD(lr=0.1, steps=4, test_steps=test_steps, proximal=1.5, minibatch=3)
    result = estimate(problem, meta, task, inner, Implicit(CG(60)))
    matrix = hessian(problem, result.params, meta, task) + 1.5 * torch.eye(12, dtype=torch.float64)
    outer = torch.func.grad(problem.outer_loss)(result.params, meta, task.query)
    torch.testing.assert_close(dense(result.end.solution), torch.linalg.solve(matrix, dense(outer)))
    released = estimate(problem, meta, task, replace(inner, proximal=0.0), ReleasedIMAML(2.0, CG(60, damping=1.0)))
    matrix = hessian(problem, released.params, meta, task) / 12 + 2 * torch.eye(12, dtype=torch.float64)
    outer = torch.func.grad(problem.outer_loss)(released.params, meta, task.query)
    torch.testing.assert_close(dense(released.end.solution), torch.linalg.solve(matrix, dense(outer)))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Implicit(cast(Any, 2.0)),
            r"Implicit\(2.0\): give a linear solver.*SGD\(lr=0.1, steps=16, proximal=2.0\)",
        ),
        (lambda: ReleasedIMAML(0.0), r"ReleasedIMAML\(proximal=0.0\): must be above 0"),
        (lambda: ReleasedIMAML(-1.0), "must be above 0"),
        (lambda: ReleasedIMAML(linear_solver=cast(Any, Neumann(5))), r"solves by CG: give linear_solver=CG\(\.\.\.\)"),
        (
            lambda: Implicit().check(il.LearnedRates(lr=0.1, steps=1), learns=True),
            r"does not depend: use SGD.*Unrolled\(\)",
        ),
        (
            lambda: Implicit().check(il.AdamW(lr=0.1, steps=1, weight_decay=0.1)),
            "AdamW's weight decay is no term: use Adam or SGD",
        ),
        *(
            (
                lambda rule=rule, kind=kind: kind().check(rule),
                r"SGD\(clip=\.\.\.\) misses: it shortens the loss's gradient but not.*Leave clip out, or use Unrolled",
            )
            for rule in (
                il.SGD(lr=0.1, steps=1, clip=1.0, proximal=1.0),
                il.SGD(lr=0.1, steps=1, clip=1.0, weight_decay=1),
            )
            for kind in (Implicit, il.MemoryReduced)
        ),
        (lambda: Implicit().check(il.SGD(lr=0.1, steps=1), whole=True), r"give SGD\(proximal=2.0\), which is iMAML"),
        (
            lambda: Implicit(Nystrom(3)).check(il.SGD(lr=0.1, steps=1)),
            r"nothing on the diagonal.*weight_decay or proximal.*Nystrom\(damping=",
        ),
        (lambda: ReleasedIMAML().check(il.Adam(lr=0.1, steps=1)), "takes plain gradient steps.*use SGD.*not Adam"),
        (lambda: ReleasedIMAML().check(il.SGD(lr=0.1, steps=1, proximal=0.5)), "the proximal term's own afterwards"),
        (lambda: ReleasedIMAML().check(il.SGD(lr={"*": 0.1}, steps=1)), "at one rate"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_head_without_a_term_is_warned_of_and_its_start_named():
    model, _ = model_and_batch("mlp")
    with pytest.warns(
        UserWarning, match=r"without weight_decay or proximal.*singular.*start.*gradient of zero"
    ) as caught:
        il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=2), Implicit())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=2, weight_decay=0.1), Implicit())
        il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=2, proximal=0.1), Implicit())


SOLVING = [Implicit(), il.MemoryReduced(), ReleasedIMAML()]


@pytest.mark.parametrize("estimator", SOLVING, ids=repr)
def test_a_multi_step_loss_is_refused(estimator):
    problem, meta, task = network()
    with pytest.raises(ValueError, match=r"differentiates the solution.*leave step_weights out"):
        il.hypergradient(problem, meta, task, il.SGD(lr=0.1, steps=2), estimator, step_weights=[0.5, 0.5])
    model, batch = model_and_batch("mlp")
    inner = il.SGD(lr=0.1, steps=2, weight_decay=0.1)
    learner = il.MetaLearner(model, il.Head(), inner, estimator)
    with pytest.raises(ValueError, match="leave step_weights out"):
        learner.meta_step(batch, step_weights=[0.5, 0.5])


@pytest.mark.parametrize("estimator", SOLVING, ids=repr)
@pytest.mark.parametrize("stream", ["rows", "function"])
def test_a_batch_for_every_step_is_refused(estimator, stream):
    problem, meta, task = network()
    rows = tuple(torch.stack([value, value]) for value in task.support)
    steps = il.Steps(rows if stream == "rows" else lambda step: tuple(value[step] for value in rows))
    inner = il.SGD(lr=0.1, steps=2)
    with pytest.raises(ValueError, match=r"one fixed support batch.*\(Steps\): use Unrolled\(\)"):
        il.hypergradient(problem, meta, il.Task(steps, task.query), inner, estimator)
    exact = il.hypergradient(problem, meta, il.Task(steps, task.query), inner)  # which an unrolled estimate takes
    torch.testing.assert_close(exact.loss, il.hypergradient(problem, meta, task, inner).loss)
