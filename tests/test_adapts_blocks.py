"""Tables of patterns, one row for each inner step, and batch norm in or out of a pattern."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

import innerloop as il
from innerloop.inner import bind
from innerloop.meta_gradient import MetaGradient
from innerloop.problem import Stage, Tree
from innerloop.training.settings import Settings
from problems import SOLVERS, model_and_batch, relative_error
from reference import rule

# Block 1 never moves, block 4 stands still for a step, and the last row holds for the last two steps.
TABLE, STEPS = ["00110", "01001", "00010"], 4


def masked_meta_gradient(learner: il.MetaLearner, rows: list[str], batch: il.Task, horizon: int = STEPS) -> Tree:
    """By plain autograd, named as the learner's parameters.

    All gradients are taken in every step; those of frozen blocks count as zero, so that none is part of a norm, and
    what the solver would make of that, moves and state, is thrown away.
    """
    meta = {name: p.detach().clone().requires_grad_() for name, p in learner.model.named_parameters()}
    rates = {name.replace("/", "."): r.detach().clone().requires_grad_() for name, r in learner.rates.items()}
    rows = rows + rows[-1:] * (STEPS - len(rows))
    losses = []
    for task in range(len(batch.support[1])):
        (inputs, targets), (query, wanted) = ([part[task] for part in pair] for pair in batch)
        params = start = {name: meta[name] for name in learner.adapted}
        update, state = rule(learner.inner, rates, start), {}  # type: ignore[var-annotated]
        for step, row in enumerate(rows):
            # copies, or the gradient in what stands still would go through the steps before as well
            params = {name: value.clone() for name, value in params.items()}
            loss = F.cross_entropy(functional_call(learner.model, {**meta, **params}, (inputs,)), targets)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            moving, before = il.Blocks(row).select(learner.model), dict(state)
            grads = tuple(grad if step >= STEPS - horizon else grad.detach() for grad in grads)
            shown = {name: grad if name in moving else 0 * grad for name, grad in zip(params, grads, strict=True)}
            new = update(step, params, shown, state)
            params = {name: new[name] if name in moving else value for name, value in params.items()}
            state = {**before, **{name: value for name, value in state.items() if name in moving}}
        losses.append(F.cross_entropy(functional_call(learner.model, {**meta, **params}, (query,)), wanted))
    leaves = {f"model.{name}": value for name, value in meta.items()}
    leaves |= {f"rates.{name.replace('.', '/')}": value for name, value in rates.items()}
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def learner_for(rows: Any, solver: str = "sgd", **settings: Any) -> il.MetaLearner:
    return il.MetaLearner(model_and_batch("conv4")[0], il.Blocks(rows), SOLVERS[solver](STEPS), **settings)


def gradients(learner: il.MetaLearner, batch: il.Task) -> Tree:
    learner.meta_step(batch)
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


# by how many of the last steps are differentiated
ESTIMATORS: dict[int, list[MetaGradient]] = {
    STEPS: [
        il.Unrolled(record=True),
        il.Unrolled(record=False),
        il.Unrolled(),
        il.Unrolled(copies=2),
        il.Unrolled(copies=3, offload=True),
        il.Binomial(STEPS),
        il.Mixed((STEPS,), (1.0,)),
        il.Truncated(STEPS),
    ],
    2: [il.Truncated(2)],
    0: [il.Truncated(0), il.FirstOrder()],
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_meta_gradient_goes_through_a_table(solver: str) -> None:
    """The graph and the walk with every solver, what is made of them with three that differ most."""
    batch = model_and_batch("conv4")[1]
    some = ESTIMATORS if solver in ("adamw", "layer-step", "alfa") else {STEPS: ESTIMATORS[STEPS][:2]}
    for horizon, estimators in some.items():
        expected = masked_meta_gradient(learner_for(TABLE, solver), TABLE, batch, horizon)
        for estimator in estimators:
            found = gradients(learner_for(TABLE, solver, meta_gradient=estimator), batch)
            assert relative_error(found, expected) < 1e-9, estimator


def test_rates_of_a_step_in_which_a_block_stands_still_get_no_gradient() -> None:
    learner = learner_for(TABLE, "layer-step")
    found = gradients(learner, model_and_batch("conv4")[1])
    rates = {name: found[f"rates.{name}/conv/weight"] for name in ("block2", "block3", "block4")}
    assert {name: (rate != 0).tolist() for name, rate in rates.items()} == {
        "block2": [False, True, False, False],
        "block3": [True, False, False, False],
        "block4": [True, False, True, True],
    }


@pytest.mark.parametrize("solver", SOLVERS)
def test_in_each_step_its_row_alone_moves(solver: str) -> None:
    learner, (inputs, targets) = learner_for(TABLE, solver), (part[0] for part in model_and_batch("conv4")[1].support)
    path = [learner.adapted_parameters(inputs, targets, steps) for steps in range(STEPS + 2)]
    for step, (before, after) in enumerate(itertools.pairwise(path)):
        moving = il.Blocks(TABLE[min(step, 2)]).select(learner.model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved - {f"block{n}.conv.bias" for n in range(1, 5)} == {  # which batch norm leaves without a gradient
            name for name in moving if not name.endswith("conv.bias")
        }


def test_a_step_differentiates_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, (inputs, targets) = learner_for(TABLE), (part[0] for part in model_and_batch("conv4")[1].support)
    asked: list[int] = []
    original = torch.autograd.grad

    def watched(outputs: Tensor, leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        asked.append(len(leaves))
        return original(outputs, leaves, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    learner.adapted_parameters(inputs, targets)
    assert asked == [8, 4 + 2, 4, 4]


def test_evaluation_and_adaptation_agree_on_a_table() -> None:
    learner, batch = learner_for(TABLE, "momentum"), model_and_batch("conv4")[1]
    outputs = learner.evaluate(batch).outputs
    for task, (inputs, targets) in enumerate(zip(*batch.support, strict=True)):
        torch.testing.assert_close(learner.adapt(inputs, targets)(batch.query[0][task]), outputs[task])


@pytest.mark.parametrize("rows", [["00011"], ["00011", "00011"]])
def test_equal_rows_are_one_pattern(rows: list[str]) -> None:
    batch = model_and_batch("conv4")[1]
    table, constant = learner_for(rows), learner_for("00011")
    assert il.Blocks(rows).moves(table.model) == ()
    assert relative_error(gradients(table, batch), gradients(constant, batch)) == 0


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (il.Implicit(), "Implicit differentiates the solution, not the steps to it"),
        (il.MemoryReduced(), "Implicit differentiates the solution, not the steps to it"),
        (il.ReleasedIMAML(), "ReleasedIMAML differentiates the solution, not the steps to it"),
        (il.Window(2), "Window shares one gradient between steps"),
    ],
)
def test_estimators_that_do_not_follow_single_steps_refuse_a_table(estimator: Any, reason: str) -> None:
    model, inner = model_and_batch("conv4")[0], il.SGD(lr=0.1, steps=2, weight_decay=0.1)
    with pytest.raises(ValueError, match=rf"{reason}, .* use Unrolled\(\), Truncated\(\) or FirstOrder\(\)"):
        il.MetaLearner(model, il.Blocks(TABLE), inner, estimator)
    assert il.MetaLearner(model, il.Blocks(["00011"]), inner, estimator).adapted
    problem = il.Problem(lambda meta: meta, lambda *_: torch.zeros(()), lambda *_: torch.zeros(()))
    table = replace(inner, moves=[["w"], ["v"]])
    with pytest.raises(ValueError, match=reason):
        il.hypergradient(problem, {"w": torch.zeros(1), "v": torch.zeros(1)}, il.Task((), ()), table, estimator)


def test_hypergradient_takes_moves_as_well() -> None:
    def loss(params: Tree, meta: Tree, target: Tensor) -> Tensor:
        return (params["a"] * params["b"] - target).square()

    problem, solver = il.Problem(dict, loss, loss), il.SGD(lr=0.1, steps=2, moves=[["a"], ["b"]])
    meta = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("a", 0.7), ("b", 1.3))}
    task = il.Task(torch.tensor(1.0), torch.tensor(2.0))
    a, b = (value.clone().requires_grad_() for value in meta.values())
    new_a = a - 0.2 * b * (a * b - 1)
    new_b = b - 0.2 * new_a * (new_a * b - 1)
    expected = torch.autograd.grad((new_a * new_b - 2).square(), (a, b))
    for estimator in (il.Unrolled(), il.Unrolled(record=True), il.Unrolled(copies=2), il.Truncated(2)):
        found = il.hypergradient(problem, meta, task, solver, estimator)
        torch.testing.assert_close(tuple(found.grad.values()), expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="moves names c, which is no parameter of the inner problem"):
        il.hypergradient(problem, meta, task, replace(solver, moves=["c"]))


def test_the_losses_see_the_parameters_in_their_order_whichever_move() -> None:
    def fit(params: Tree, meta: Tree, _: Any) -> Tensor:
        first, second = params.values()
        return (first * meta["t"] - second).square()

    def chain(meta: Tree, _: Any) -> list[Stage]:
        return [Stage(("w", "c", "t"), fit)]

    def start(meta: Tree) -> Tree:
        return {"w": meta["t"].new_tensor(3.0), "c": meta["t"].new_tensor(1.0)}

    problem = il.Problem(start, fit, fit, inner_chain=chain, outer_chain=chain)
    t = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    w = 3 - 0.2 * t * (3 * t - 1)
    w = w - 0.2 * t * (w * t - 1)
    (expected,) = torch.autograd.grad((w * t - 1).square(), t)
    inner = il.SGD(lr=0.1, steps=2, moves=[["w"]])
    for products in ("autograd", "blocks"):
        for memory in (0, None):
            learner = il.Bilevel(problem, {"t": t.detach()}, inner, products=products, memory=memory)
            found = learner.estimate(il.Task((), ()))
            assert found.params["c"] == 1
            assert found.grad["t"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_repr_of_a_table_is_the_same_in_every_process() -> None:
    rows = [["weight", "bias"], ["bias", "scale", "weight"]]
    shown = repr(il.SGD(lr=0.1, steps=2, moves=rows))
    assert eval(shown, vars(il)) == il.SGD(lr=0.1, steps=2, moves=rows)
    places = [shown.index(repr(name)) for name in ("bias", "weight")], [shown.rindex(repr(n)) for n in rows[1]]
    assert all(row == sorted(row) for row in places)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no row"),
        (["01", "1"], "all equally many"),
        (["01", "00"], "adapts nothing in '00'"),
        (["01", "0x"], "write one 0 or 1 a block"),
        (["01", 1], "write one 0 or 1 a block"),
        (["01", "10"], "has 2 places but Conv4 has 5 blocks: give 5 characters"),
    ],
)
def test_a_wrong_table_is_refused(rows: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner_for(rows)


def test_a_row_of_frozen_parameters_is_refused() -> None:
    model = il.models.Conv4(in_channels=1)
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match="a row of frozen parameters alone"):
        il.MetaLearner(model, il.Blocks(["11111", "00001"]))


@pytest.mark.parametrize("mode", ["batch", "task", "frozen"])
def test_batch_norm_in_or_out_of_a_pattern(mode: Any) -> None:
    model, batch = model_and_batch("conv4")
    inside, outside = (
        il.MetaLearner(model, il.Blocks("00111", batch_norm=moves), il.SGD(lr=0.1, steps=2), batch_norm=mode)
        for moves in (True, False)
    )
    affine = {f"block{n}.norm.{part}" for n in (3, 4) for part in ("weight", "bias")}
    assert set(inside.adapted) - set(outside.adapted) == affine
    assert set(outside.adapted) < set(inside.adapted)
    adapted = outside.adapt(batch.support[0][0], batch.support[1][0])
    assert all(torch.equal(adapted.get_parameter(name), outside.model.get_parameter(name)) for name in affine)
    # they are learned all the same
    assert all(gradients(outside, batch)[f"model.{name}"].any() for name in affine)


def test_a_pattern_of_batch_norm_alone_needs_it() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    assert il.MetaLearner(model, il.Blocks("010")).adapted == ("1.weight", "1.bias")
    with pytest.raises(ValueError, match=r"Blocks\('010', batch_norm=False\) leaves out all that its blocks hold"):
        il.MetaLearner(model, il.Blocks("010", batch_norm=False))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("blocks:00011", il.Blocks("00011")),
        ("blocks:11111/00011", il.Blocks(["11111", "00011"])),
        ("blocks:11111/00011,batch_norm=false", il.Blocks(("11111", "00011"), batch_norm=False)),
    ],
)
def test_patterns_as_they_are_typed(typed: str, meant: il.Blocks) -> None:
    assert Settings(adapts=typed).method()[0] == meant
    assert eval(repr(meant), {"Blocks": il.Blocks}) == meant


def noisy_problem(seed: int | None) -> il.Problem:
    def loss(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        noise = torch.randn_like(inputs) if seed is not None else 0.0
        return F.cross_entropy(((inputs + noise) @ params["first"]).tanh() @ params["second"] + meta["shift"], targets)

    return il.Problem(lambda meta: {name: meta[name] for name in ("first", "second")}, loss, loss, seed)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("solver", [*(build(STEPS) for build in SOLVERS.values()), il.NewtonCG(steps=3, proximal=1.0)])
def test_loops_by_plain_autograd_and_under_transforms_take_the_same_steps(solver: Any, seed: int | None) -> None:
    sizes = {"first": (4, 5), "second": (5, 3), "shift": (3,)}
    meta = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    batch = torch.randn(6, 4, dtype=torch.float64), torch.arange(3).repeat(2)
    problem = noisy_problem(seed)
    learned = solver.learned(problem.start(meta))

    def run(meta: Tree, batch: tuple[Tensor, Tensor]) -> Tree:
        return bind(problem, meta, batch, solver, learned).run(solver.steps).params

    with torch.no_grad():
        found = run(meta, batch)
        one = torch.func.vmap(run, randomness="different")(*tree_map(lambda value: value[None], (meta, batch)))
        expected = tree_map(lambda value: value[0], one)
    assert not any(value.requires_grad for value in found.values())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_adaptation_works_in_inference_mode_and_keeps_flags() -> None:
    model, batch = copy.deepcopy(model_and_batch("mlp")[0]), model_and_batch("mlp")[1]
    model.get_parameter("layer1.weight").requires_grad_(False)
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2))
    flags = [p.requires_grad for p in learner.parameters()]
    inputs, targets, query = batch.support[0][0], batch.support[1][0], batch.query[0][0]
    expected = learner.adapt(inputs, targets)(query)
    with torch.inference_mode():
        assert torch.equal(learner.adapt(inputs.clone(), targets.clone())(query), expected)
    assert [p.requires_grad for p in learner.parameters()] == flags
    assert all(p.grad is None for p in learner.parameters())
