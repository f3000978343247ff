"""The wider family: solvers and estimators beside the five papers, against formulas and draws of their own."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import innerloop as il
from innerloop.choices import META_GRADIENT, make
from innerloop.meta_gradient import MetaGradient
from problems import model_and_batch, network, relative_error, subset
from reference import meta_gradient

Tree = dict[str, Tensor]

# --- ALFA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("settings", [{}, {"attenuate": True}, {"detach": True}, {"attenuate": True, "detach": True}])
def test_a_trained_alfa_has_the_meta_gradient_of_autograd(settings, record):
    """Away from the first values, where the network gives each tensor another rate."""
    model, batch = model_and_batch("mlp")
    inner = il.ALFA(lr=0.1, steps=3, decay=0.3, **settings)
    learner = il.MetaLearner(model, subset("mlp", "pattern"), inner, il.Unrolled(record=record))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for rate in learner.rates.values():
            rate += 0.3 * rate.abs().mean() * torch.randn(rate.shape, generator=generator, dtype=torch.float64)
    learner.meta_step(batch)
    found = {name: p.grad for name, p in learner.named_parameters()}
    expected, _ = meta_gradient(learner, batch)
    for part in ("model.", "rates."):
        mine, wanted = ({n: g for n, g in each.items() if n.startswith(part)} for each in (found, expected))
        assert relative_error(mine, wanted) < 1e-10
    assert all(found[name].any() for name in found if name.startswith("rates."))


def test_alfa_starts_near_its_rate_and_goes_on_with_the_last_column():
    params = {"w": torch.ones(4), "b": torch.zeros(2)}
    inner = il.ALFA(lr=0.1, steps=2, decay=0.0)
    learned = inner.learned(params)
    assert all(torch.equal(value, learned[name]) for name, value in inner.learned(params).items())
    grad = {"w": torch.full((4,), 0.2), "b": torch.full((2,), -0.1)}
    (first, _), (second, _), (beyond, _) = (inner.update(k, params, grad, {}, learned, params) for k in (0, 1, 9))
    for name in params:
        torch.testing.assert_close(first[name], params[name] - 0.1 * grad[name], rtol=0.05, atol=1e-3)
        assert torch.equal(second[name], beyond[name])


@pytest.mark.parametrize(("settings", "message"), [({"decay": -1}, "0 or more"), ({"attenuate": True}, "steps=2")])
def test_alfa_outside_its_ranges_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        il.ALFA(lr=0.1, steps=1, **settings)


# --- CAVIA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda size: il.models.MLP((6, 8, 8, 3), torch.nn.Tanh, context=size), (6,)),
        (
            lambda size: il.models.Conv4(in_channels=1, ways=3, filters=3, downsample="stride", context=size),
            (1, 28, 28),
        ),
    ],
    ids=["mlp", "conv4"],
)
def test_a_context_begins_at_zero_where_it_changes_nothing(build, shape):
    torch.manual_seed(0)
    model, plain, inputs = build(4).double(), build(None).double(), torch.randn(5, *shape, dtype=torch.float64)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(inputs), plain(inputs))
    batch = il.Task(*2 * [(inputs.expand(2, *inputs.shape), torch.tensor([0, 1, 2, 0, 1]).expand(2, -1))])
    learner = il.MetaLearner(model, il.Named("*.context"), il.SGD(lr=1.0, steps=2), il.Unrolled(learn_start=False))
    learner.meta_step(batch)
    expected, _ = meta_gradient(learner, batch)
    found = {f"model.{name}": p.grad for name, p in learner.model.named_parameters()}
    (context,) = (name for name in found if name.endswith("context"))
    assert found.pop(context) is None
    expected.pop(context)
    assert relative_error(found, expected) < 1e-9
    adapted = learner.adapt(*(part[0] for part in batch.support))
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, learner.model.get_parameter(n))}
    assert moved == {context.removeprefix("model.")}


def test_cavia_learns_sinusoids():
    torch.manual_seed(0)
    model = il.models.MLP((1, 40, 40, 1), context=5)
    learner = il.MetaLearner(
        model, "named:*.context", il.SGD(lr=1.0, steps=2), il.Unrolled(learn_start=False), torch.nn.functional.mse_loss
    )
    tasks = il.tasks.sinusoid()
    il.fit(
        learner, tasks, steps=80, tasks_per_batch=25, validation_tasks=0, progress=False, clip=10.0,
        optimizer=torch.optim.Adam(learner.parameters(), lr=5e-3),
    )  # fmt: skip
    curve = learner.evaluate(tasks.batch("test", 0, 50), curve=True).loss_curve.mean(0)
    assert curve[-1] < 0.6 * curve[0]
    assert not learner.model.get_parameter("film.context").any()


def test_a_context_needs_a_size_and_a_hidden_layer():
    with pytest.raises(ValueError, match="1 or more"):
        il.models.Conv4(context=0)
    with pytest.raises(ValueError, match="hidden widths"):
        il.models.MLP((1, 1), context=5)


# --- placed windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_a_random_end_is_truncation_of_so_many_steps(streams):
    problem, meta, task = network()
    if streams:
        rows = torch.randn(7, 8, 3, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
        task = il.Task(il.Steps(rows), il.Steps(rows))
    ends = set()
    for seed in range(12):
        seeded = replace(problem, seed=seed)
        found = il.hypergradient(seeded, meta, task, il.SGD(lr=0.1, steps=7), il.Truncated(3, end="random"))
        ends.add(found.end.step)
        cut = (
            il.Task(*(il.Steps(tuple(part[: found.end.step] for part in rows)) for _ in range(2))) if streams else task
        )
        expected = il.hypergradient(seeded, meta, cut, il.SGD(lr=0.1, steps=found.end.step), il.Truncated(3))
        assert relative_error(found.grad, expected.grad) == 0
        assert found.diagnostics["support_loss"].shape == (3,)
    assert ends <= {3, 4, 5, 6, 7}
    assert len(ends) > 2


def test_a_random_end_under_a_learner():
    model, batch = model_and_batch("mlp")
    estimator = il.Truncated(1, end="random")
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=6), meta_gradient=estimator, chunk_size=1)
    assert learner.meta_step(batch).loss.isfinite()
    with pytest.raises(ValueError, match="leave compile out"):
        il.MetaLearner(model, meta_gradient=estimator, compile=True)
    with pytest.raises(ValueError, match="leave step_weights out"):
        learner.meta_step(batch, [0.5] * 6)
    for bad in ({"horizon": 0, "end": "random"}, {"horizon": 2, "end": "first"}):
        with pytest.raises(ValueError, match="horizon of 1 or more"):
            il.Truncated(**bad)


@pytest.mark.parametrize("form", ["lone", "stacked"])
@pytest.mark.parametrize(
    ("estimator", "taken"), [(il.Truncated(1, end="random"), {1, 2, 3, 4, 5, 6}), (il.MetaRKHS(), {0})]
)
def test_a_learner_counts_the_steps_that_were_taken(estimator, taken, form):
    problem, meta, task = network()
    asked: list[int] = []
    inner = il.SGD(lr=lambda step: asked.append(step) or 0.1, steps=6)
    learner = il.Bilevel(problem, meta, inner, estimator, carry="slot", stacked=form == "stacked")
    batch = torch.utils._pytree.tree_map(lambda value: value.expand(2, *value.shape), task)
    step = 0
    for _ in range(4):
        asked.clear()
        end = learner.meta_step(batch, keep_end=True).end[0] if form == "stacked" else learner.meta_step(task).end
        assert end.step - step in taken
        if estimator.draws:
            assert set(asked) == set(range(step, end.step))
        step = end.step


# --- random estimates: unbiased, with the variance that is said ------------------------------------------------------

RANDOM = {
    "forward": (lambda n: il.ForwardGradient(n), lambda d: d - 1),
    "evolution": (lambda n: il.EvolutionStrategies(n, sigma=1e-4), lambda d: d + 1),
}


@pytest.mark.parametrize(
    "inner", [il.LearnedRates(lr=0.1, steps=2, per="layer-step"), il.Adam(lr=0.1, steps=2, eps=1e-2)]
)
@pytest.mark.parametrize("name", RANDOM)
def test_random_estimates_are_unbiased_with_the_variance_said(name, inner):
    """A batch of many copies of one task is as many independent draws, of which the learner takes the mean."""
    make, factor = RANDOM[name]
    problem, meta, task = network()
    copies, times, width = 100, 25, 2
    batch = torch.utils._pytree.tree_map(lambda value: value.expand(copies, *value.shape), task)

    def gradient(estimator, batch: il.Task) -> Tensor:
        learner = il.Bilevel(problem, meta, inner, estimator, stacked=True, chunk_size=copies)
        learner.meta_step(batch)
        return torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None])

    torch.manual_seed(0)
    exact = gradient(il.Unrolled(), torch.utils._pytree.tree_map(lambda value: value[:1], batch))
    draws = torch.stack([gradient(make(width), batch) for _ in range(times)])
    variance = factor(len(exact)) / width * exact.square().sum() / copies
    found = (draws - exact).square().sum(1).mean()
    assert found == pytest.approx(variance.item(), rel=0.25)
    assert (draws.mean(0) - exact).square().sum() < 2 * variance / times


def test_random_estimates_alone_and_what_they_report():
    problem, meta, task = network()
    for estimator in (il.ForwardGradient(3), il.EvolutionStrategies(3)):
        found = il.hypergradient(problem, meta, task, il.SGD(lr=0.1, steps=4), estimator)
        plain = il.hypergradient(problem, meta, task, il.SGD(lr=0.1, steps=4))
        assert found.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
        assert relative_error(found.params, plain.params) < 1e-12
        torch.testing.assert_close(found.diagnostics["support_loss"], plain.diagnostics["support_loss"])
        with pytest.raises(ValueError, match=r"few meta-parameters and there are d = 24: its variance is"):
            il.hypergradient(problem, meta, task, il.SGD(lr=0.1, steps=4), replace(estimator, most=23))


@pytest.mark.parametrize(
    "estimator", [il.ForwardGradient(1), il.EvolutionStrategies(1), il.Truncated(1, end="random")], ids=str
)
def test_a_seed_of_the_problem_leaves_the_estimators_draws_to_a_learner(estimator):
    problem, meta, task = network(seed=3)
    inner = il.SGD(lr=0.1, steps=9)
    one, same = (il.hypergradient(problem, meta, task, inner, estimator).grad for _ in range(2))
    assert relative_error(one, same) == 0
    learner = il.Bilevel(problem, meta, inner, estimator)
    found = []
    for batch in ([task], [task], [task, task]):
        learner.zero_grad()
        learner.meta_step(batch)
        found.append({name: value.grad for name, value in learner.meta.items()})
    draws = {round(float(tree["weights"].norm()), 12) for tree in found}
    assert len(draws) > 1
    torch.manual_seed(0)
    first = learner.estimate(task).grad
    torch.manual_seed(0)
    assert relative_error(learner.estimate(task).grad, first) == 0


@pytest.mark.parametrize(("model", "chosen"), [("conv4", "head"), ("encoder", "everything")])
def test_forward_gradients_are_slopes_of_networks(model, chosen):
    """Along its own directions, whatever the layers: batch norm, attention."""
    net, batch = model_and_batch(model)
    task = torch.utils._pytree.tree_map(lambda value: value[0], batch)
    learner = il.MetaLearner(net, subset(model, chosen), il.SGD(lr=0.1, steps=2), reuse_prefix=False)
    torch.manual_seed(5)
    exact = learner.estimate(task).grad
    found = learner.estimate(task, il.ForwardGradient(1, most=10**6)).grad
    # s = g . v, and the estimate is s v: so it has the product s^2 with g, and the square s^2 d
    product = sum((found[name] * exact[name]).sum() for name in exact)
    square = sum(value.square().sum() for value in found.values())
    assert square.item() == pytest.approx(product.item() * sum(value.numel() for value in exact.values()), rel=1e-9)


def test_evolution_needs_no_derivative_of_the_inner_steps():
    problem, meta, task = network()
    with pytest.raises(ValueError, match="have no derivative"):
        il.hypergradient(problem, meta, task, il.NewtonCG(steps=1, proximal=1.0), il.ForwardGradient())
    assert il.hypergradient(problem, meta, task, il.NewtonCG(steps=1, proximal=1.0), il.EvolutionStrategies()).grad


@pytest.mark.parametrize("persistent", [True, False])
def test_persistent_strategies_see_the_whole_loop_through_its_windows(persistent):
    """The sum over three windows of a loop, against the exact gradient of the sum of their outer losses."""
    problem, meta, task = network()
    meta = {name: value for name, value in meta.items() if name == "weights"}
    fixed = network()[1]
    problem = replace(problem, start=lambda _: {name: fixed[name] for name in ("in", "out")})
    inner, windows, copies = il.Momentum(lr=0.2, steps=2, momentum=0.5), 3, 10000
    exact = il.hypergradient(
        problem, meta, task, replace(inner, steps=6), step_weights=[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    ).grad["weights"]

    def chained(estimator: MetaGradient, _: Tensor) -> Tensor:
        total, end = torch.zeros_like(exact), None
        for _window in range(windows):
            result = il.hypergradient(problem, meta, task, inner, estimator, begin=end)
            total, end = total + result.grad["weights"], result.end
        return total

    cut = chained(il.Unrolled(), torch.zeros(()))
    torch.manual_seed(1)
    estimator = il.EvolutionStrategies(2, 1e-3, persistent)
    draws = torch.func.vmap(partial(chained, estimator), randomness="different")(torch.zeros(copies))
    mean, error = draws.mean(0), draws.std(0).norm() / copies**0.5
    near, far = (exact, cut) if persistent else (cut, exact)
    assert (mean - near).norm() < 2 * error
    assert (mean - far).norm() > 5 * error


def test_particles_survive_a_checkpoint(tmp_path):
    problem, meta, task = network()

    class Same:
        def batch(self, split, start, count):
            return [task] * count

    def session(folder, steps: int) -> il.Bilevel:
        learner = il.Bilevel(
            problem, meta, il.SGD(lr=0.1, steps=2), il.EvolutionStrategies(2, persistent=True), carry="slot"
        )
        il.fit(
            learner,
            Same(),
            steps=steps,
            tasks_per_batch=2,
            validation_tasks=0,
            folder=folder,
            resume=True,
            progress=False,
        )
        return learner

    whole = session(tmp_path / "whole", 4)
    session(tmp_path / "cut", 2)
    again = session(tmp_path / "cut", 4)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


# --- one step, and the penalty: their order of error -----------------------------------------------------------------


def orders(estimate, settings: list[float], exact: Tree) -> list[float]:
    """By what power of the setting the error falls, between each and the next."""
    errors = [relative_error(estimate(value), exact) for value in settings]
    steps = zip(pairwise(errors), pairwise(settings), strict=True)
    return [math.log(one / other) / math.log(big / small) for (one, other), (big, small) in steps]


@pytest.mark.parametrize("inner", [il.SGD(lr=0.1, steps=3), il.Adam(lr=0.1, steps=3), il.LearnedRates(lr=0.1, steps=3)])
def test_one_step_differences_are_truncation_to_a_step_but_for_their_length_squared(inner):
    problem, meta, task = network()
    only = {"weights": meta["weights"]}
    problem = replace(problem, start=lambda _: {name: meta[name] for name in ("in", "out")})
    exact = il.hypergradient(problem, only, task, inner, il.Truncated(1)).grad

    def estimate(epsilon: float) -> Tree:
        return il.hypergradient(problem, only, task, inner, il.SAMA(epsilon, "step")).grad

    assert orders(estimate, [0.1, 0.05, 0.025], exact) == pytest.approx([2, 2], abs=0.1)
    assert relative_error(estimate(1e-4), exact) < 1e-6


def test_sama_takes_the_differences_around_the_end_and_the_start_as_first_order_does():
    problem, meta, task = network()
    inner = il.SGD(lr=0.1, steps=3)
    result = il.hypergradient(problem, meta, task, inner, il.SAMA(1e-4, learn_start=True))
    outer = torch.func.grad(problem.outer_loss)(result.params, meta, task.query)
    mixed = torch.func.grad(
        lambda weights: sum(
            (-0.1 * outer[name] * value).sum()
            for name, value in torch.func.grad(problem.inner_loss)(
                result.params, {**meta, "weights": weights}, task.support
            ).items()
        )
    )(meta["weights"])
    torch.testing.assert_close(result.grad["weights"], mixed, rtol=1e-6, atol=1e-10)
    for name in ("in", "out"):
        torch.testing.assert_close(result.grad[name], outer[name])
    with pytest.warns(UserWarning, match="does not learn the start"):
        cold = il.hypergradient(problem, meta, task, inner, il.SAMA()).grad
    assert not cold["in"].any()


def test_t1_t2_is_implicit_with_the_identity():
    problem, meta, task = network()
    inner = il.SGD(lr=0.1, steps=3)
    t1_t2 = make("estimator", META_GRADIENT, "t1-t2:0.1")
    sama = il.hypergradient(problem, meta, task, inner, il.SAMA(1e-4, learn_start=True)).grad["weights"]
    with pytest.warns(UserWarning, match="does not depend on the start"):
        found = il.hypergradient(problem, meta, task, inner, t1_t2).grad["weights"]
    torch.testing.assert_close(found, sama, rtol=1e-6, atol=0)
    assert make("estimator", META_GRADIENT, "darts") == il.SAMA(around="step")
    assert make("estimator", META_GRADIENT, "pes:4") == il.EvolutionStrategies(4, persistent=True)


@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_the_penalty_method_is_of_first_order_in_its_weight(proximal):
    """Towards the derivative of the solution, in the start as well where that has a pull."""

    def inner_loss(params: Tree, meta: Tree, batch: None) -> Tensor:
        distance = params["p"] - meta["target"]
        return (distance.square() + distance**4 / 4).sum() / 2

    def outer_loss(params: Tree, meta: Tree, batch: None) -> Tensor:
        return (params["p"].cos() + meta["target"] * params["p"]).sum()

    problem = il.Problem(lambda meta: {"p": meta["start"]}, inner_loss, outer_loss)
    meta = {"start": torch.zeros(5).double(), "target": torch.linspace(0.1, 1, 5).double()}
    inner = il.SGD(lr=0.4, steps=120, proximal=proximal)
    exact = il.hypergradient(problem, meta, il.Task(None, None), inner).grad

    def estimate(weight: float) -> Tree:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return il.hypergradient(problem, meta, il.Task(None, None), inner, il.Penalty(weight)).grad

    assert orders(estimate, [0.1, 0.05, 0.025], exact) == pytest.approx([1, 1], abs=0.1)
    assert relative_error(estimate(1e-4), exact) < 1e-3


def test_the_penalty_method_refuses_what_has_no_solution():
    model, batch = model_and_batch("mlp")
    with pytest.raises(ValueError, match=r"proximal=2\.0"):
        il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2), meta_gradient=il.Penalty())
    with pytest.raises(ValueError, match="the rates of LearnedRates"):
        il.MetaLearner(model, il.Head(), il.LearnedRates(lr=0.1, steps=2), il.Penalty())
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2, proximal=1.0), meta_gradient=il.Penalty())
    assert learner.meta_step(batch).loss.isfinite()
    with pytest.raises(ValueError, match="leave step_weights out"):
        learner.meta_step(batch, [0.5, 0.5])


def test_meta_rkhs_is_of_second_order_in_the_rates():
    problem, meta, task = network()

    def estimate(lr: float) -> Tree:
        return il.hypergradient(problem, meta, task, il.SGD(lr=lr, steps=4), il.MetaRKHS()).grad

    errors = []
    for lr in (0.004, 0.002, 0.001):
        exact = il.hypergradient(problem, meta, task, il.SGD(lr=lr, steps=4)).grad
        errors.append(relative_error({"weights": estimate(lr)["weights"] / lr}, {"weights": exact["weights"] / lr}))
    assert [one / other for one, other in pairwise(errors)] == pytest.approx(
        [2, 2], rel=0.05
    )  # over a term of order lr


def test_meta_rkhs_is_the_gradient_of_its_formula():
    problem, meta, task = network()
    inner = il.SGD(lr=lambda step: 0.1 / (1 + step), steps=3)

    def formula(meta: Tree) -> Tensor:
        start = problem.start(meta)
        inside, outside = torch.func.grad(problem.inner_loss), torch.func.grad(problem.outer_loss)
        pairs = zip(inside(start, meta, task.support).values(), outside(start, meta, task.query).values(), strict=True)
        rate = 0.1 + 0.1 / 2 + 0.1 / 3
        return problem.outer_loss(start, meta, task.query) - rate * sum((a * b).sum() for a, b in pairs)

    found = il.hypergradient(problem, meta, task, inner, il.MetaRKHS())
    assert relative_error(found.grad, torch.func.grad(formula)(meta)) < 1e-12
    assert found.diagnostics["curvature_products"] == 2


# --- the binomial estimate says where it is of no use ----------------------------------------------------------------


def test_the_binomial_estimate_reports_its_reach_and_training_warns():
    curvature = torch.diag(torch.tensor([0.5, 2.0], dtype=torch.float64))
    problem = il.Problem(
        lambda meta: meta,
        lambda params, meta, _: params["p"] @ curvature @ params["p"] / 2,
        lambda params, meta, _: params["p"][1],
    )
    task = il.Task(torch.zeros(()), torch.zeros(()))
    meta = {"p": torch.ones(2, dtype=torch.float64)}
    for lr in (0.1, 0.8):
        found = il.hypergradient(problem, meta, task, il.SGD(lr=lr, steps=4), il.Binomial(2))
        assert found.diagnostics["reach"].item() == pytest.approx(2 * lr)
    assert il.hypergradient(problem, meta, task, il.SGD(lr=0.8, steps=4), il.Binomial(0)).diagnostics["reach"] == 0

    class Same:
        def batch(self, split, start, count):
            return [task] * count

    learner = il.Bilevel(problem, meta, il.SGD(lr=0.8, steps=4), il.Binomial(2))
    with pytest.warns(UserWarning, match=r"lr \* \|H\| of the inner problem is 1\.6 or more"):
        il.fit(learner, Same(), steps=2, tasks_per_batch=1, validation_tasks=0, progress=False)


# --- B-SMALL ---------------------------------------------------------------------------------------------------------


def sparse_learner(estimator: MetaGradient, chosen: str = "everything", **options) -> tuple[il.MetaLearner, il.Task]:
    plain, batch = model_and_batch("conv4")
    model = il.models.sparse(plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_std"):
                parameter.fill_(-2.0)  # of the size of the weights
    learner = il.MetaLearner(
        model, subset("conv4", chosen), il.SGD(lr=0.1, steps=3), estimator, regulariser=il.models.Divergence(1e-3),
        reuse_prefix=False, **options,
    )  # fmt: skip
    return learner.train(), batch


@pytest.mark.parametrize("chosen", ["everything", "pattern"])
def test_sparse_layers_replay_their_noise_exactly(chosen):
    """Recomputed steps draw what recorded ones drew: one graph of the whole loop against one product a step."""
    grads = []
    for estimator in (il.Unrolled(record=True), il.Unrolled(record=False), il.Unrolled(copies=2), il.Binomial(3)):
        learner, batch = sparse_learner(estimator, chosen, chunk_size=1)
        torch.manual_seed(4)
        learner.meta_step(batch)
        grads.append({name: p.grad for name, p in learner.model.named_parameters()})
    assert all(relative_error(each, grads[0]) < 1e-9 for each in grads[1:])
    assert all(value.any() for name, value in grads[0].items() if name.endswith(("weight", "log_std")))
    torch.manual_seed(5)
    learner.zero_grad()
    learner.meta_step(batch)
    assert relative_error({name: p.grad for name, p in learner.model.named_parameters()}, grads[0]) > 1e-3


def test_a_regulariser_is_a_term_of_both_losses():
    learner, batch = sparse_learner(il.Unrolled())
    plain, _ = sparse_learner(il.Unrolled())
    plain.few_shot.regulariser = None
    task = torch.utils._pytree.tree_map(lambda value: value[0], batch)
    params = {name: p.detach() for name, p in learner.model.named_parameters()}
    for loss, examples in (("inner_loss", task.support), ("outer_loss", task.query)):
        torch.manual_seed(0)
        found = getattr(learner.problem, loss)(params, params, examples)
        torch.manual_seed(0)
        without = getattr(plain.problem, loss)(params, params, examples)
        found, without = (each[0] if isinstance(each, tuple) else each for each in (found, without))
        assert (found - without).item() == pytest.approx(il.models.Divergence(1e-3)(params).item(), rel=1e-9)


def test_sparse_layers_have_the_moments_of_their_weights_and_drop_noisy_ones():
    torch.manual_seed(0)
    layer = il.models.sparse(torch.nn.Linear(4, 2))
    with torch.no_grad():
        layer.log_std[:] = torch.tensor([[-8.0, -1.0, 0.5, 3.0]] * 2)
    inputs = torch.randn(4)
    draws = layer(inputs.expand(100_000, 4))
    mean = torch.nn.functional.linear(inputs, layer.weight, layer.bias)
    variance = (2 * layer.log_std).exp() @ inputs.square()
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.2)
    torch.testing.assert_close(draws.var(0), variance, rtol=0.03, atol=0)
    kept = 2 * layer.log_std - 2 * layer.weight.abs().log() < 3
    assert il.models.sparsity(layer) == pytest.approx(1 - kept.float().mean().item())
    expected = torch.nn.functional.linear(inputs, layer.weight * kept, layer.bias)
    torch.testing.assert_close(layer.eval()(inputs), expected)
    with pytest.raises(ValueError, match="no plain linear"):
        il.models.sparse(torch.nn.ReLU())
    with pytest.raises(ValueError, match="1e-5"):
        il.models.Divergence(-1.0)


# --- GradNCP and neural fields ---------------------------------------------------------------------------------------


def last_layer_score(errors: Tensor, features: Tensor) -> Tensor:
    return errors.norm(dim=1) * (features.square().sum(1) + 1).sqrt()


def field(keep: float | None) -> tuple[il.Problem, Tree, il.Task]:
    torch.manual_seed(0)
    model = il.models.SIREN([2, 16, 16, 1]).double()
    call = partial(torch.func.functional_call, model)

    def loss(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (call(params, batch[0]) - batch[1]).square().mean()

    def score(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        features = batch[0]
        for name, layer in list(model.named_children())[:-1]:
            own = {key.removeprefix(f"{name}."): v for key, v in params.items() if key.startswith(f"{name}.")}
            features = torch.func.functional_call(layer, own, features)
        return last_layer_score(call(params, batch[0]) - batch[1], features)

    problem = il.Problem(dict, loss, loss)
    problem = problem if keep is None else il.pruned(problem, score, keep)
    tasks = il.tasks.Fields(il.tasks.glyphs())
    task = torch.utils._pytree.tree_map(lambda value: value[0].double(), tasks.batch("train", 2, 1))
    return problem, {name: p.detach() for name, p in model.named_parameters()}, task


def test_fields_are_the_images_of_their_source():
    source = il.tasks.glyphs(ways=2)
    tasks = il.tasks.Fields(source)
    (points, values), query = tasks.batch("validation", 3, 2)
    image = source.batch("validation", 4, 1).support[0][0, 0]
    assert torch.equal(values[1].view(28, 28), image[0])
    assert points[1].view(28, 28, 2)[27, 0].tolist() == [1.0, -1.0]
    assert torch.equal(query[1], values)
    assert (tasks.ways, tasks.input_shape, tasks.output_size) == (None, (2,), 1)


def test_scores_are_lengths_of_the_last_layers_gradient():
    torch.manual_seed(1)
    head, features, targets = torch.nn.Linear(5, 3), torch.randn(7, 5), torch.randn(7, 3)
    errors = head(features) - targets
    lengths = []
    for error in errors.square().sum(1) / 2:
        slopes = torch.autograd.grad(error, list(head.parameters()), retain_graph=True)
        lengths.append(torch.cat([each.flatten() for each in slopes]).norm())
    torch.testing.assert_close(last_layer_score(errors, features), torch.stack(lengths))


def test_pruned_steps_choose_their_own_examples_and_the_meta_gradient_is_exact():
    problem, meta, task = field(0.25)
    inner = il.SGD(lr=1e-2, steps=3)
    found = [il.hypergradient(problem, meta, task, inner, il.Unrolled(record=record)) for record in (True, False)]
    assert relative_error(found[0].grad, found[1].grad) < 1e-9
    plain, _, _ = field(None)
    whole, _, _ = field(1.0)
    every = il.hypergradient(plain, meta, task, inner).grad
    assert relative_error(il.hypergradient(whole, meta, task, inner).grad, every) < 1e-9
    assert relative_error(found[0].grad, every) > 1e-2
    learner = il.Bilevel(problem, meta, inner, stacked=True, chunk_size=2)
    learner.meta_step(torch.utils._pytree.tree_map(lambda value: value.expand(2, *value.shape), task))
    assert relative_error({name: learner._parameter(name).grad for name in meta}, found[0].grad) < 1e-9


def test_what_fields_refuse():
    problem, _, _ = field(None)
    with pytest.raises(ValueError, match="share of examples"):
        il.pruned(problem, lambda *_: torch.zeros(1), 0.0)


# --- tasks without labels --------------------------------------------------------------------------------------------


def test_clusters_stand_for_classes_and_hold_mostly_one():
    source = il.tasks.glyphs(ways=5, shots=1, queries=5)
    tasks = il.tasks.clustered(source, 40)
    own, found = source.image_set, tasks.image_set
    first = torch.tensor([0, *own.counts]).cumsum(0)
    known = {
        own.images[row].numpy().tobytes(): each
        for each in own.splits["train"]
        for row in range(first[each], first[each + 1])
    }
    share, place = [], 0
    for each in found.splits["train"]:
        rows = range(place, place + found.counts[each])
        labels = torch.tensor([known[found.images[row].numpy().tobytes()] for row in rows])
        share.append(labels.bincount().max().item() / len(labels))
        assert len(labels) >= 6
        place += found.counts[each]
    assert sum(share) / len(share) > 10 / len(own.splits["train"])
    assert torch.equal(tasks.batch("test", 0, 2).support[1], source.batch("test", 0, 2).support[1])
    assert {*found.classes[-3:]} <= {*own.classes}
    for clusters in (4, 10**6):
        with pytest.raises(ValueError, match="from 5, the ways"):
            il.tasks.clustered(source, clusters)


def test_clusters_by_an_embedding_of_ones_own_are_those_of_it():
    source = il.tasks.arrays(
        torch.arange(60.0).view(60, 1), torch.arange(60) // 10, split=(0.4, 0.3, 0.3), ways=2, shots=1, queries=2
    )
    tasks, again = (
        il.tasks.clustered(source, 3, embed=lambda images: (images > 20).double() * 5 + images / 1000) for _ in range(2)
    )
    assert sum(tasks.image_set.counts) == 60
    assert again.image_set.counts == tasks.image_set.counts
    with pytest.raises(ValueError, match="fewer clusters"):
        il.tasks.clustered(source, 20)
