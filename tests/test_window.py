"""Window gradient reuse against plain autograd through the program it stands for, in float64."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

import innerloop as il
from innerloop import Binomial, Mixed, NewtonCG, Window
from innerloop.curvature import seed_of
from innerloop.inner import InnerSolver, _loop
from innerloop.meta_gradient import MetaGradient
from innerloop.meta_gradient._window import windows
from problems import SOLVERS, every_pair, model_and_batch, network, relative_error, subset
from reference import rule

MODES = ["frozen", "true_forward"]


def surrogate(
    problem: il.Problem, meta: dict[str, Tensor], task: il.Task, solver: InnerSolver, size: int, mode: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Plain autograd through windows of ``size`` steps: gradients in meta and in learned rates, parameters and loss."""
    meta = tree_map(lambda value: value.detach().clone().requires_grad_(), meta)
    start = problem.start(meta)
    rates = tree_map(lambda value: value.detach().clone().requires_grad_(), solver.learned(start))
    update = rule(solver, rates, start)

    def gradients(step: int, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if problem.seed is not None:
            torch.manual_seed(seed_of(problem.seed, step))
        loss = problem.inner_loss(params, meta, task.support)
        return dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))

    state: dict = {}
    params = start
    for first in range(0, solver.steps, size):
        span = range(first, min(first + size, solver.steps))
        reused = gradients(first, params)
        true, true_state = tree_map(lambda value: value.detach().requires_grad_(), (params, state))
        state = dict(state)
        for step in span:
            params = update(step, params, reused, state)
            true = update(step, true, gradients(step, true), true_state)
        if mode == "true_forward":  # the values of the ordinary steps, the derivative of the jump
            params, state = tree_map(
                lambda value, jump: value.detach() + (jump - jump.detach()), (true, true_state), (params, state)
            )
    loss = problem.outer_loss(params, meta, task.query)
    loss = loss[0] if isinstance(loss, tuple) else loss
    found = torch.autograd.grad(loss, [*meta.values(), *rates.values()], allow_unused=True, materialize_grads=True)
    params = tree_map(Tensor.detach, params)
    return (
        dict(zip(meta, found, strict=False)),
        dict(zip(rates, found[len(meta) :], strict=True)),
        params,
        loss.detach(),
    )


def gradient(estimator, solver: InnerSolver, seed: int | None = None) -> dict[str, Tensor]:
    return il.hypergradient(*network(seed), solver, estimator).grad


def cosine(first: Tensor, second: Tensor) -> float:
    return F.cosine_similarity(first.flatten(), second.flatten(), 0).item()


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode", "size"), every_pair(SOLVERS, MODES, (1, 2, 3, 5, 9)))
def test_windows_are_autograd_through_the_surrogate(name, mode, size):
    """And those of one step are exact."""
    solver = SOLVERS[name](5)
    found = il.hypergradient(*network(), solver, Window(size, mode))
    grad, learned_grad, params, loss = surrogate(*network(), solver, size, mode)
    assert relative_error(found.grad, grad) < 1e-12
    if learned_grad:
        assert relative_error(found.learned_grad, learned_grad) < 1e-12
    assert relative_error(found.params, params) < 1e-14
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-13)
    if size == 1:
        exact = il.hypergradient(*network(), solver)
        assert exact.grad["weights"].abs().max() > 1e-6
        for key in exact.grad:  # the start and the weights inside the inner loss, each on its own
            torch.testing.assert_close(found.grad[key], exact.grad[key], rtol=1e-12, atol=0)
        torch.testing.assert_close(found.learned_grad, exact.learned_grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("model", "chosen"), [("conv4", "everything"), ("conv4", "pattern"), ("mlp", "head")])
def test_a_learner_takes_windows_of_every_task_at_once(model, chosen, mode):
    """Through vmap, batch norm by the batch's statistics, and the features of a frozen prefix computed once."""
    batch = model_and_batch(model)[1]
    solver = il.Momentum(lr=0.05, steps=5, momentum=0.8, weight_decay=0.01)
    learner = il.MetaLearner(model_and_batch(model)[0], subset(model, chosen), solver, Window(2, mode))
    learner.meta_step(batch)

    def loss(params: dict[str, Tensor], meta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(learner.model, {**meta, **params}, (batch[0],)), batch[1])

    problem = il.Problem(lambda meta: {name: meta[name] for name in learner.adapted}, loss, loss)
    meta = {name: parameter.detach() for name, parameter in learner.model.named_parameters()}
    tasks = [tree_map(lambda value, i=i: value[i], batch) for i in range(len(batch.support[1]))]
    grads = [surrogate(problem, meta, task, solver, 2, mode)[0] for task in tasks]
    mean = {name: torch.stack([grad[name] for grad in grads]).mean(0) for name in meta}
    assert relative_error({name: p.grad for name, p in learner.model.named_parameters()}, mean) < 1e-11


@pytest.mark.parametrize(("steps", "size"), [(6, 6), (6, 3), (6, 2)])
def test_frozen_windows_are_single_steps_of_the_window_times_the_rate(steps, size):
    found = il.hypergradient(*network(), il.SGD(lr=0.02, steps=steps), Window(size))
    single = il.hypergradient(*network(), il.SGD(lr=size * 0.02, steps=steps // size))
    assert relative_error(found.grad, single.grad) < 1e-13
    assert relative_error(found.params, single.params) < 1e-14
    ordinary = il.hypergradient(*network(), il.SGD(lr=0.02, steps=steps))
    assert relative_error(found.grad, ordinary.grad) > 1e-3


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("seed", [None, 11])
def test_frozen_is_the_derivative_of_the_frozen_procedure_and_of_no_other(name, seed):
    problem, meta, task = network(seed)
    solver, estimator, step = SOLVERS[name](5), Window(2), 1e-5
    direction = {key: torch.randn_like(value) for key, value in meta.items()}

    def slope(of: MetaGradient) -> float:
        ahead, behind = (
            il.hypergradient(
                problem, {key: value + sign * step * direction[key] for key, value in meta.items()}, task, solver, of
            ).loss
            for sign in (1, -1)
        )
        return ((ahead - behind) / (2 * step)).item()

    grad = il.hypergradient(problem, meta, task, solver, estimator).grad
    along = sum((grad[key] * direction[key]).sum().item() for key in grad)
    assert along == pytest.approx(slope(estimator), rel=1e-6)
    assert along != pytest.approx(slope(il.Unrolled()), rel=1e-3)


@pytest.mark.parametrize("size", [1, 3, 5, 10])
def test_momentum_and_weight_decay_follow_the_published_recursion(size):
    """The costates a of the parameters and b of the velocity, window by window, in their closed scalar form."""
    problem, meta, task = network()
    solver = il.Momentum(lr=0.02, steps=10, momentum=0.9, weight_decay=0.05)
    starts, params = [], problem.start(meta)
    velocity = {name: torch.zeros_like(value) for name, value in params.items()}
    for span in windows(range(solver.steps), size):
        starts.append(params)
        grad = torch.func.grad(problem.inner_loss)(params, meta, task.support)
        for _ in span:
            velocity = {name: 0.9 * velocity[name] + grad[name] + 0.05 * params[name] for name in params}
            params = {name: params[name] - 0.02 * velocity[name] for name in params}
    a, _ = torch.func.grad(problem.outer_loss, argnums=(0, 1))(params, meta, task.query)
    b, in_weights = tree_map(torch.zeros_like, a), torch.zeros_like(meta["weights"])
    for span, place in zip(reversed(windows(range(solver.steps), size)), reversed(starts), strict=True):
        total = tree_map(torch.zeros_like, a)
        for _ in span:
            c = {name: b[name] - 0.02 * a[name] for name in a}
            total = {name: total[name] + c[name] for name in a}
            a, b = {name: a[name] + 0.05 * c[name] for name in a}, {name: 0.9 * c[name] for name in a}

        def product(params, meta, total=total):
            grad = torch.func.grad(problem.inner_loss)(params, meta, task.support)
            return sum((grad[name] * total[name]).sum() for name in total)

        bent, mixed = torch.func.grad(product, argnums=(0, 1))(place, meta)
        a = {name: a[name] + bent[name] for name in a}
        in_weights = in_weights + mixed["weights"]
    found = il.hypergradient(problem, meta, task, solver, Window(size))
    assert relative_error(found.grad, {**a, "weights": in_weights}) < 1e-13


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "size"), [(6, 1), (6, 2), (6, 4), (7, 3), (5, 5), (4, 9)])
def test_windows_cover_the_steps_in_order(steps, size):
    spans = windows(range(steps), size)
    assert len(spans) == math.ceil(steps / size)
    assert [step for span in spans for step in span] == list(range(steps))
    assert all(len(span) == size for span in spans[:-1])


@pytest.mark.parametrize(("name", "span", "mode"), every_pair(SOLVERS, ((6, 1), (6, 2), (7, 3), (4, 9)), MODES))
def test_one_curvature_product_a_window(monkeypatch, name, span, mode):
    steps, size = span
    calls = {"curvature": 0, "gradient": 0}
    for operator in calls:
        original = getattr(_loop, operator)

        def counted(*args, original=original, operator=operator):
            calls[operator] += 1
            return original(*args)

        monkeypatch.setattr(_loop, operator, counted)
    result = il.hypergradient(*network(), SOLVERS[name](steps), Window(size, mode))
    expected = math.ceil(steps / size)
    assert calls == {"curvature": expected, "gradient": expected if mode == "frozen" else steps}
    assert result.diagnostics["curvature_products"] == expected
    assert len(result.diagnostics["support_loss"]) == calls["gradient"]


# --- how good the estimate is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "size"), [(6, 1), (6, 2), (6, 3), (6, 6), (7, 3)])
def test_factors_on_a_quadratic(steps, size, mode):
    curvatures = torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], dtype=torch.float64)
    problem = il.Problem(
        lambda meta: meta,
        lambda params, meta, _: (curvatures * params["p"].square()).sum() / 2,
        lambda params, meta, _: (weights * params["p"]).sum(),
    )
    meta, lr = {"p": torch.ones(5, dtype=torch.float64)}, 0.15
    grad = il.hypergradient(problem, meta, il.Task(None, None), il.SGD(lr=lr, steps=steps), Window(size, mode)).grad
    factors = (1 - size * lr * curvatures) ** (steps // size) * (1 - steps % size * lr * curvatures)
    torch.testing.assert_close(grad["p"], factors * weights, rtol=1e-13, atol=1e-15)


def test_the_error_on_a_quadratic_is_of_second_order_in_the_rate():
    """The relative gap of the factors is steps (size - 1) (lr h)^2 / 2 to leading order."""
    problem = il.Problem(lambda meta: meta, lambda p, meta, _: p["p"].square() / 2, lambda p, meta, _: p["p"])
    meta, solver = {"p": torch.ones((), dtype=torch.float64)}, il.SGD(lr=1e-3, steps=12)
    exact = il.hypergradient(problem, meta, il.Task(None, None), solver).grad["p"]
    found = il.hypergradient(problem, meta, il.Task(None, None), solver, Window(4)).grad["p"]
    assert ((exact - found) / exact).item() == pytest.approx(12 * 3 * 1e-3**2 / 2, rel=0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_meta_network_gets_a_signal_where_first_order_gives_none(size, mode):
    solver = il.SGD(lr=0.01, steps=6)
    exact, found = gradient(il.Unrolled(), solver), gradient(Window(size, mode), solver)
    with pytest.warns(UserWarning, match="the meta-gradient of weights is exactly zero. FirstOrder takes no second"):
        assert torch.all(gradient(il.FirstOrder(), solver)["weights"] == 0)
    assert cosine(found["weights"], exact["weights"]) > 0.95
    for name in ("in", "out"):
        assert cosine(found[name], exact[name]) > 0.95


@pytest.mark.parametrize("mode", MODES)
def test_the_error_falls_with_the_rate(mode):
    """At a fixed distance lr * steps, halving the rate halves the error."""
    errors = []
    for halvings in range(4):
        solver = il.SGD(lr=0.04 / 2**halvings, steps=6 * 2**halvings)
        errors.append(relative_error(gradient(Window(3, mode), solver), gradient(il.Unrolled(), solver)))
    for coarse, fine in pairwise(errors[1:]):
        assert coarse / fine == pytest.approx(2, rel=0.25)


# --- random draws, buffers, state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_product_replays_the_dropout_of_the_windows_first_step(size, mode):
    solver = il.SGD(lr=0.1, steps=5)
    found = il.hypergradient(*network(seed=3), solver, Window(size, mode))
    grad, _, params, _ = surrogate(*network(seed=3), solver, size, mode)
    assert relative_error(found.grad, grad) < 1e-12
    assert relative_error(found.params, params) < 1e-14
    assert relative_error(found.grad, gradient(Window(size, mode), solver, seed=4)) > 1e-2


def test_a_learner_with_dropout_replays_it_for_every_task():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    batch = model_and_batch("mlp")[1]
    found = {}
    for estimator in (il.Unrolled(), Window(1), Window(1, "true_forward")):
        torch.manual_seed(9)
        learner = il.MetaLearner(model, inner=il.SGD(lr=0.3, steps=4), meta_gradient=estimator)
        learner.meta_step(batch)
        found[estimator] = {name: p.grad for name, p in learner.named_parameters()}
    exact = found.pop(il.Unrolled())
    for grad in found.values():
        assert relative_error(grad, exact) < 1e-13


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_norm", ["batch", "frozen", "task"])
def test_batch_norm_buffers_stay(batch_norm, mode):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = model_and_batch("mlp")[1]
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=5), meta_gradient=Window(2, mode), batch_norm=batch_norm)
    given = {name: buffer.clone() for name, buffer in model.named_buffers()}
    copied = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
    learner.meta_step(batch)
    assert {name: buffer.tolist() for name, buffer in model.named_buffers()} == tree_map(Tensor.tolist, given)
    assert {name: buffer.tolist() for name, buffer in learner.model.named_buffers()} == tree_map(Tensor.tolist, copied)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_inner_loop_remains(mode):
    """What the schedule of learning-to-transfer rolls back by hand, parameters and velocity, is never changed."""
    problem, meta, task = network()
    before = tree_map(torch.clone, (meta, task))
    first, second = (
        il.hypergradient(problem, meta, task, il.Momentum(lr=0.05, steps=5), Window(2, mode)) for _ in range(2)
    )
    torch.testing.assert_close((meta, task), before, rtol=0, atol=0)
    torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_true_forward_takes_the_very_steps_of_the_ordinary_loop(name):
    exact = il.hypergradient(*network(), SOLVERS[name](7))
    found = il.hypergradient(*network(), SOLVERS[name](7), Window(3, "true_forward"))
    assert torch.equal(found.loss, exact.loss)
    assert all(torch.equal(found.params[key], exact.params[key]) for key in exact.params)
    assert torch.equal(found.diagnostics["support_loss"], exact.diagnostics["support_loss"])


def test_evaluation_takes_ordinary_steps():
    model, batch = model_and_batch("mlp")
    solver = il.SGD(lr=0.1, steps=4)
    windowed, ordinary = (il.MetaLearner(model, inner=solver, meta_gradient=e) for e in (Window(4), il.Unrolled()))
    assert torch.equal(windowed.evaluate(batch).loss, ordinary.evaluate(batch).loss)
    assert windowed.meta_step(batch).loss != ordinary.meta_step(batch).loss


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_window_holds_at_least_one_step(size):
    with pytest.raises(ValueError, match="a whole number from 1"):
        Window(size)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="choose 'frozen' or 'true_forward'"):
        Window(2, "thawed")


def test_query_losses_between_the_steps_are_refused():
    model, batch = model_and_batch("mlp")
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2), meta_gradient=Window(2))
    with pytest.raises(ValueError, match=r"leave step_weights out, or use Unrolled\(\)"):
        learner.meta_step(batch, [0.5, 0.5])


@pytest.mark.parametrize("estimator", [Window(2), Binomial(2), Mixed((1, 2), (0.5, 0.5))], ids=str)
def test_solvers_without_a_derivative_are_refused(estimator):
    with pytest.raises(ValueError, match=r"NewtonCG's have no derivative: use Implicit\(\)"):
        il.MetaLearner(model_and_batch("mlp")[0], inner=NewtonCG(steps=2), meta_gradient=estimator)
