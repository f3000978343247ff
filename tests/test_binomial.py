"""The binomial estimate against brute force over every subset of inner steps, and mixtures of horizons, in float64."""

import math
from itertools import chain, combinations, pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import innerloop as il
from innerloop import Binomial, Mixed
from innerloop.curvature import seed_of
from innerloop.inner import InnerLoop, InnerSolver, bind
from innerloop.meta_gradient import MetaGradient
from problems import SOLVERS, every_pair, model_and_batch, network, relative_error, subset
from reference import rule

Tree = dict[str, Tensor]


def quadratic(curvature: Tensor) -> tuple[il.Problem, Tree, il.Task]:
    """A quadratic inner loss with the Hessian given, and a linear outer loss whose gradient is all ones."""
    problem = il.Problem(
        lambda meta: meta,
        lambda params, meta, _: params["p"] @ curvature @ params["p"] / 2,
        lambda params, meta, _: params["p"].sum(),
    )
    return problem, {"p": torch.ones(len(curvature), dtype=torch.float64)}, il.Task(None, None)


def subsets(of: int | tuple[int, ...]) -> list[tuple[int, ...]]:
    items = range(of) if isinstance(of, int) else of
    return list(chain.from_iterable(combinations(items, count) for count in range(len(items) + 1)))


def terms(
    problem: il.Problem, meta: Tree, task: il.Task, solver: InnerSolver, weights: list[float] | None = None
) -> dict[tuple[int, ...], Tree]:
    """The meta-gradient's term in which just these steps' inner gradients are differentiated, for all subsets of steps.

    By plain autograd with the other steps' gradients detached, less the terms of smaller subsets.
    """
    weights = weights or [0.0] * (solver.steps - 1) + [1.0]

    def gradient(through: tuple[int, ...]) -> Tree:
        leaves = tree_map(lambda value: value.clone().requires_grad_(), meta)
        start = problem.start(leaves)
        rates = tree_map(lambda value: value.detach().clone().requires_grad_(), solver.learned(start))
        state: dict = {}
        update, params, total = rule(solver, rates, start), start, torch.zeros((), dtype=torch.float64)
        for step in range(solver.steps):
            if problem.seed is not None:
                torch.manual_seed(seed_of(problem.seed, step))
            loss = problem.inner_loss(params, leaves, task.support)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            if step not in through:
                grads = tuple(grad.detach() for grad in grads)
            params = update(step, params, dict(zip(params, grads, strict=True)), state)
            total = total + weights[step] * problem.outer_loss(params, leaves, task.query)
        named = {**leaves, **{f"rate of {name}": rate for name, rate in rates.items()}}
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(named, found, strict=True))

    alone: dict[tuple[int, ...], Tree] = {}
    for some in subsets(solver.steps):
        value = gradient(some)
        for fewer in subsets(some)[:-1]:
            value = {name: value[name] - alone[fewer][name] for name in value}
        alone[some] = value
    return alone


def total(alone: dict[tuple[int, ...], Tree], order: int, damping: float = 1.0) -> Tree:
    names = alone[()]
    return {
        name: torch.stack(
            [damping ** len(some) * term[name] for some, term in alone.items() if len(some) <= order]
        ).sum(0)
        for name in names
    }


def estimated(estimator, solver: InnerSolver, weights: list[float] | None = None, seed: int | None = None) -> Tree:
    """The estimate for the network, gradients of learned rates included."""
    problem, meta, task = network(seed)
    with torch.no_grad():
        loop = bind(problem, meta, task.support, solver, solver.learned(problem.start(meta)))
        result = estimator.estimate(loop, task.query, weights)
    return {**result.grad, **{f"rate of {name}": grad for name, grad in result.learned_grad.items()}}


def learner_gradients(learner: il.MetaLearner, batch: il.Task, weights: list[float] | None = None) -> Tree:
    learner.meta_step(batch, weights)
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


# --- the binomial estimate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_every_subset_of_at_most_order_steps_counts_once(name):
    """And damping weighs each product."""
    solver = SOLVERS[name](4)
    alone = terms(*network(), solver)
    for order in (*range(5), 9):
        assert relative_error(estimated(Binomial(order), solver), total(alone, order)) < 1e-12
    for damping, factor in ((0.3, 0.3), ("released", 2 / 4)):
        assert relative_error(estimated(Binomial(2, damping), solver), total(alone, 2, factor)) < 1e-12


def test_the_formula_of_the_paper_with_dense_hessians():
    """The products of I and -lr H over index subsets, the smaller index on the left."""
    problem, meta, task = network()
    steps, lr = 5, 0.05
    params, places = problem.start(meta), []
    for _ in range(steps):
        places.append(torch.cat([value.flatten() for value in params.values()]))
        grad = torch.func.grad(problem.inner_loss)(params, meta, task.support)
        params = {name: params[name] - lr * grad[name] for name in params}

    def flat_loss(flat: Tensor) -> Tensor:
        return problem.inner_loss({"in": flat[:12].view(3, 4), "out": flat[12:]}, meta, task.support)

    bent = [-lr * torch.func.hessian(flat_loss)(place) for place in places]
    outer = torch.func.grad(problem.outer_loss)(params, meta, task.query)
    g = torch.cat([value.flatten() for value in outer.values()])
    for order in range(steps + 1):
        expected = torch.zeros_like(g)
        for some in subsets(steps):
            if len(some) <= order:
                vector = g
                for step in reversed(some):
                    vector = bent[step] @ vector
                expected = expected + vector
        found = il.hypergradient(problem, meta, task, il.SGD(lr=lr, steps=steps), Binomial(order)).grad
        flat = torch.cat([found["in"].flatten(), found["out"]])
        torch.testing.assert_close(flat, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", SOLVERS)
def test_query_losses_of_all_steps(name):
    solver, weights = SOLVERS[name](4), [0.1, 0.2, 0.0, 0.7]
    alone = terms(*network(), solver, weights)
    for order in range(5):
        assert relative_error(estimated(Binomial(order), solver, weights), total(alone, order)) < 1e-12


@pytest.mark.parametrize(
    ("model", "solver", "chosen"), every_pair(("mlp", "conv4", "encoder"), SOLVERS, ("everything", "pattern"))
)
def test_order_none_is_first_order_and_order_all_is_exact(model, solver, chosen):
    batch = model_and_batch(model)[1]

    def found(estimator: MetaGradient) -> Tree:
        learner = il.MetaLearner(model_and_batch(model)[0], subset(model, chosen), SOLVERS[solver](3), estimator)
        return learner_gradients(learner, batch)

    assert relative_error(found(Binomial(0)), found(il.FirstOrder())) < 1e-14
    exact = found(il.Unrolled())
    assert relative_error(found(Binomial(3)), exact) < 1e-13
    assert relative_error(found(Binomial(2)), exact) > 1e-7


@pytest.mark.parametrize("order", range(4))
def test_the_error_is_of_the_rate_to_the_power_of_order_plus_one(order):
    errors = []
    for halvings in range(3):
        solver = il.SGD(lr=0.002 / 2**halvings, steps=5)
        exact = estimated(il.Unrolled(), solver)
        found = estimated(Binomial(order), solver)
        errors.append(math.dist(*(torch.cat([tree["in"].flatten(), tree["out"]]) for tree in (found, exact))))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** (order + 1), rel=0.03)


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("reach", [0.3, 1.0])  # lr * |H|
@pytest.mark.parametrize("convex", [True, False])
def test_the_error_keeps_within_the_bounds_of_the_paper(order, reach, convex):
    steps, lr = 6, 0.1
    basis, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    eigenvalues = torch.linspace(0 if convex else -1, 1, 7, dtype=torch.float64) * reach / lr
    problem = quadratic(basis @ torch.diag(eigenvalues) @ basis.T)
    solver = il.SGD(lr=lr, steps=steps)
    exact = il.hypergradient(*problem, solver).grad["p"]
    error = torch.linalg.norm(il.hypergradient(*problem, solver, Binomial(order)).grad["p"] - exact).item()
    above = range(order + 1, order + 2 if convex else steps + 1)
    bound = sum(math.comb(steps, count) * reach**count for count in above) * 7**0.5
    assert 0 < error <= bound


@pytest.mark.parametrize(("steps", "order"), [(5, 0), (5, 1), (5, 2), (5, 4), (5, 5), (3, 9)])
def test_the_number_of_products(monkeypatch, steps, order):
    points, products = [], []
    original = InnerLoop.products

    def counted(loop, step, params):
        points.append(step)
        product = original(loop, step, params)
        return lambda vector: products.append(step) or product(vector)

    monkeypatch.setattr(InnerLoop, "products", counted)
    found = il.hypergradient(*network(), il.SGD(lr=0.1, steps=steps), Binomial(order))
    reached = min(order, steps)
    assert len(products) == found.diagnostics["curvature_products"] == reached * (steps - reached + 1)
    assert points == list(reversed(range(steps)))  # one gradient a step, however many products


def test_every_product_of_a_step_replays_its_dropout():
    solver = il.SGD(lr=0.1, steps=4)
    alone = terms(*network(seed=3), solver)
    for order in range(5):
        assert relative_error(estimated(Binomial(order), solver, seed=3), total(alone, order)) < 1e-12


def test_dropout_of_several_tasks_and_products_at_once(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    batch = model_and_batch("mlp")[1]

    def found() -> Tree:
        torch.manual_seed(9)
        return learner_gradients(il.MetaLearner(model, inner=il.SGD(lr=0.3, steps=5), meta_gradient=Binomial(3)), batch)

    at_once = found()
    monkeypatch.setattr(
        InnerLoop, "products", lambda loop, step, params: lambda vector: loop.curvature(step, params, vector)
    )
    assert relative_error(at_once, found()) < 1e-13


@pytest.mark.parametrize("order", [-1, 1.5])
def test_an_order_is_a_whole_number_from_zero(order):
    with pytest.raises(ValueError, match="the most curvature products in a term, 0 or more"):
        Binomial(order)


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.1, "authors"])
def test_a_damping_outside_its_range_is_refused(damping):
    with pytest.raises(ValueError, match="above 0 and up to 1, or 'released'"):
        Binomial(2, damping)


# --- the mixture of horizons -----------------------------------------------------------------------------------------


MIXTURES = Mixed((0, 1, 3), (0.5, 0.2, 0.3)), Mixed((2, 9, 4), (0.6, 0.3, 0.1)), Mixed((0,), (1.0,))


@pytest.mark.parametrize(("name", "mixed", "weights"), every_pair(SOLVERS, MIXTURES, (None, (0.1, 0.2, 0.0, 0.7))))
def test_a_mixture_is_the_sum_of_its_truncations(name, mixed, weights):
    solver, horizons, shares = SOLVERS[name](4), mixed.horizons, mixed.weights
    parts = [estimated(il.Truncated(horizon), solver, weights) for horizon in horizons]
    mean = {key: sum(share * part[key] for share, part in zip(shares, parts, strict=True)) for key in parts[0]}
    assert relative_error(estimated(mixed, solver, weights), mean) < 1e-13


def test_a_mixture_walks_once():
    found = il.hypergradient(*network(), il.SGD(lr=0.1, steps=6), Mixed((1, 2, 4), (0.2, 0.3, 0.5)))
    assert found.diagnostics["curvature_products"] == 4
    whole = il.hypergradient(*network(), il.SGD(lr=0.1, steps=6), Mixed([6], [1.0]))
    assert relative_error(whole.grad, il.hypergradient(*network(), il.SGD(lr=0.1, steps=6)).grad) < 1e-14


@pytest.mark.parametrize("chosen", ["everything", "pattern"])
def test_a_learner_takes_mixtures_of_every_task_at_once(chosen):
    model, batch = model_and_batch("conv4")

    def found(estimator: MetaGradient) -> Tree:
        return learner_gradients(
            il.MetaLearner(model, subset("conv4", chosen), il.SGD(lr=0.1, steps=3), estimator), batch
        )

    short, whole = found(il.Truncated(1)), found(il.Unrolled())
    mean = {name: 0.25 * short[name] + 0.75 * whole[name] for name in short}
    assert relative_error(found(Mixed((1, 3), (0.25, 0.75))), mean) < 1e-13


@pytest.mark.parametrize(
    ("horizons", "weights", "message"),
    [
        ((), (), "one or more numbers of last steps"),
        ((1, -2), (0.5, 0.5), "each 0 or more"),
        ((1, 1), (0.5, 0.5), "a horizon occurs twice"),
        ((1, 2), (1.0,), "2 horizons and 1 weights"),
        ((1, 2), (0.5, 0.6), "their sum 1"),
        ((1, 2), (1.5, -0.5), "each must be 0 or more"),
        ((1,), (math.nan,), "each must be 0 or more"),
    ],
)
def test_a_mixture_outside_its_ranges_is_refused(horizons, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixed(horizons, weights)
