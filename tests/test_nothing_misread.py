"""At the edge between a user's model and the core: what was once computed wrong without a word."""

import copy
import json
import random
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import _WeightNorm, spectral_norm, weight_norm

import innerloop as il
from innerloop.curvature import OUTER, replayed
from innerloop.inner import bind
from innerloop.meta_gradient._forward import draw
from problems import network, relative_error
from reference import meta_gradient

WAYS = 3


def batch_of(*shape: int, tasks: int = 2, examples: int = 6) -> il.Task:
    torch.manual_seed(1)
    inputs, query = torch.randn(2, tasks, examples, *shape, dtype=torch.float64)
    labels = torch.arange(WAYS).repeat_interleave(examples // WAYS).expand(tasks, -1).contiguous()
    return il.Task((inputs, labels), (query, labels))


def grads(learner: il.MetaLearner, batch: il.Task, **arguments) -> dict[str, Tensor]:
    learner.zero_grad()
    learner.meta_step(batch, **arguments)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in learner.named_parameters()}


class StemBlocksHead(nn.Module):
    """Its attribute ``blocks`` is not all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, WAYS)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs).tanh()
        for block in self.blocks:
            hidden = block(hidden).tanh()
        return self.head(hidden)


class Reversed(nn.Sequential):
    """A subclass whose forward pass is not the chain of its children."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self[2](self[1](self[0](inputs).sin()))


class Declared(nn.Module):
    """Declares blocks that hold all parameters, but does more than to chain them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.blocks = [self.one, self.two]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.two(self.one(inputs).tanh())


def hooked() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WAYS))
    model.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))
    return model


# A chain of blocks.


@pytest.mark.parametrize(
    ("build", "adapts", "warns"),
    [
        (StemBlocksHead, il.Head(), False),
        (StemBlocksHead, il.Named("head.*"), False),
        (lambda: Reversed(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WAYS)), il.Head(), False),
        (Declared, il.Head(), True),
        (hooked, il.Named("2.*"), False),
    ],
)
def test_blocks_that_are_not_the_whole_model_are_not_taken_for_it(build, adapts, warns):
    torch.manual_seed(0)
    model, batch = build().double(), batch_of(4)
    learner = il.MetaLearner(model, adapts, il.SGD(lr=0.3, steps=3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = grads(learner, batch)
        grads(learner, batch)
    assert len([each for each in caught if "one after the other" in str(each.message)]) == warns  # said once
    assert relative_error(found, meta_gradient(learner, batch)[0]) < 1e-12
    assert all(bool(grad.any()) for grad in found.values())
    assert learner.evaluate(batch).outputs.shape[-1] == WAYS
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
    assert type(adapted) is type(model)
    torch.testing.assert_close(learner.evaluate(batch).outputs[0], adapted(batch.query[0][0]), rtol=1e-10, atol=1e-12)


# Randomness.


class Noisy(nn.Module):
    """Draws random numbers, which no attribute tells."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.rate = kind, 0.5

    def forward(self, inputs: Tensor) -> Tensor:
        if self.kind == "dropout":
            return F.dropout(inputs, self.rate, self.training)
        return inputs + torch.randn_like(inputs) if self.training else inputs


@pytest.mark.parametrize("kind", ["dropout", "noise"])
@pytest.mark.parametrize("place", ["in the head", "in the body"])
def test_randomness_replays_whatever_draws_it(kind, place):
    torch.manual_seed(0)
    parts = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, WAYS)]
    parts.insert(2 if place == "in the body" else 0, Noisy(kind))
    model, batch = nn.Sequential(*parts).double(), batch_of(4, tasks=1)
    task = il.Task(*(tuple(value[0] for value in part) for part in batch))
    steps, lr, seed = 3, 0.5, 11
    learner = il.MetaLearner(model, il.Everything(), il.SGD(lr=lr, steps=steps))
    loop, query = learner.loop(task)
    loop = type(loop)(**{**vars(loop), "problem": il.Problem(**{**_fields(loop.problem), "seed": seed})})
    found = il.Unrolled().estimate(loop, query).grad

    leaves = {n: p.detach().clone().requires_grad_() for n, p in learner.model.named_parameters()}
    params = leaves
    for step in range(steps):
        with replayed(seed, step, params):
            inner = F.cross_entropy(functional_call(learner.model, params, (task.support[0],)), task.support[1])
        grad = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        params = {n: p - lr * g for (n, p), g in zip(params.items(), grad, strict=True)}
    with replayed(seed, OUTER, params):
        outer = F.cross_entropy(functional_call(learner.model, params, (task.query[0],)), task.query[1])
    expected = dict(zip(leaves, torch.autograd.grad(outer, list(leaves.values())), strict=True))
    assert relative_error(found, expected) < 1e-12


def test_whatever_draws_has_numbers_of_its_own():
    """The CPU's generator knows a seed by its lower 32 bits."""
    seeds: dict[Any, set[int]] = {}

    def noted(what: Any, value: Any) -> Any:
        seeds.setdefault(what, set()).add(torch.initial_seed() % 2**32)
        return value

    step = iter(range(100))
    problem = il.Problem(
        lambda meta: noted("start", meta),
        lambda params, meta, support: noted(("inner", next(step)), (params["w"] ** 2).sum()),
        lambda params, meta, query: noted("outer", params["w"].sum()),
        seed=5,
    )
    meta, rule = {"w": torch.ones(2)}, il.SGD(lr=0.1, steps=4)
    il.hypergradient(problem, meta, il.Task((), ()), rule, il.FirstOrder())
    loop = bind(problem, meta, (), rule, {})
    for index in (0, 1, 4096):
        later = replace(loop, begin=loop.begin._replace(step=index))
        for number in (0, 1):
            draw(later, number, meta, lambda like, at=(index, number): noted(at, like))
    assert len(seeds) == 12
    assert len(set().union(*seeds.values())) == 12


def test_the_outer_loss_does_not_repeat_the_noise_of_a_step():
    torch.manual_seed(0)
    noise = lambda params, meta, batch: (params["w"] * torch.randn(10)).sum()  # noqa: E731
    problem, rule = il.Problem(lambda meta: {"w": meta["w"]}, noise, noise), il.SGD(lr=0.1, steps=1)
    found = [il.hypergradient(problem, {"w": torch.zeros(10)}, il.Task((), ()), rule).loss for _ in range(400)]
    mean, sigma = torch.stack(found).mean(), torch.stack(found).std() / 400**0.5
    assert abs(mean) < 4 * sigma


def _fields(problem: il.Problem) -> dict:
    return {"start": problem.start, "inner_loss": problem.inner_loss, "outer_loss": problem.outer_loss}


class Drops(nn.Module):
    """Drops a layer by a number that torch did not draw."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, WAYS)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs if self.training and self.draw() < 0.5 else self.layer(inputs).tanh())


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: np.random.rand()])  # noqa: NPY002
def test_what_is_not_drawn_by_torch_is_refused(draw):
    learner, batch = il.MetaLearner(Drops(draw).double(), inner=il.SGD(lr=0.1, steps=2)), batch_of(4)
    with pytest.raises(ValueError, match=r"draws from Python's random or numpy.*: draw with torch"):
        learner.meta_step(batch)
    assert learner.eval().meta_step(batch).loss.isfinite()


def test_a_random_prefix_is_not_reused_in_training_and_is_in_evaluation():
    model = nn.Sequential(nn.Linear(4, 8), Noisy("dropout"), nn.Linear(8, WAYS)).double()
    learner, batch = il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=2)), batch_of(4)
    meta = learner.meta_tree()
    task = il.Task(*(tuple(value[0] for value in part) for part in batch))
    for training in (True, False):
        learner.train(training)
        learner.evaluate(batch)
        stated = learner.few_shot.state(task, meta, differentiate=False)
        assert ("support features 0" in stated.meta) is not training


def test_a_layer_with_an_attribute_p_keeps_the_reuse():
    model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.LPPool1d(3, 2), nn.Flatten(), nn.Linear(8, WAYS)).double()
    model[1].p = 3.0
    learner, batch = il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=2)), batch_of(1, 4)
    learner.meta_step(batch)
    task = il.Task(*(tuple(value[0] for value in part) for part in batch))
    assert "support features 0" in learner.few_shot.state(task, learner.meta_tree(), differentiate=False).meta


def test_no_other_device_is_touched(monkeypatch):
    def initialised(*_: object, **__: object) -> None:
        raise AssertionError("a device that is not in use was asked")

    batch = batch_of(4)
    monkeypatch.setattr(torch.random, "fork_rng", initialised)
    monkeypatch.setattr(torch.cuda, "get_rng_state", initialised)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", initialised)
    learner = il.MetaLearner(nn.Sequential(nn.Linear(4, WAYS), nn.Dropout(0.1)).double(), inner=il.SGD(lr=0.1, steps=2))
    learner.meta_step(batch)


def test_replaying_leaves_the_global_generator_where_it_was():
    before = torch.default_generator.get_state()
    with replayed(3, 1, torch.zeros(1)):
        first = torch.rand(2)
    assert torch.equal(before, torch.default_generator.get_state())
    with replayed(3, 1, torch.zeros(1)):
        assert torch.equal(first, torch.rand(2))


# What is a head.


class Wrapper(nn.Module):
    """As a wrapped model of another library: one child."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inside(inputs)


class HeadFirst(nn.Module):
    """Declares its head before its body."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.fc = nn.Linear(hidden, WAYS)
        self.body = nn.Linear(4, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.body(inputs).tanh())


class Plain(nn.Module):
    """A body and a head in a module that names no blocks."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, hidden), nn.Tanh())
        self.classifier = nn.Linear(hidden, WAYS)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.body(inputs))


def test_the_head_of_a_wrapper_is_its_childs():
    learner = il.MetaLearner(Wrapper(Wrapper(Plain())), il.Head())
    assert learner.adapted == ("inside.inside.classifier.weight", "inside.inside.classifier.bias")


def test_a_head_that_is_the_whole_model_is_refused():
    for adapts in (il.Head(), il.Body()):
        for model in (Wrapper(nn.Sequential(nn.Linear(4, WAYS))), nn.Sequential(nn.Linear(4, WAYS))):
            with pytest.raises(ValueError, match=r"15 of its 15 numbers: name the head yourself, as in Named"):
                il.MetaLearner(model, adapts)
        with pytest.raises(ValueError, match=r"no sub-module with parameters to take as head: use Named"):
            il.MetaLearner(Wrapper(nn.Linear(4, WAYS)), adapts)


def test_a_head_that_is_nearly_the_whole_model_is_refused():
    model = nn.ModuleDict({"head": nn.Linear(6, 1), "encoder": nn.Linear(6, 100)})
    with pytest.raises(ValueError, match=r"encoder\.\*, which is 700 of its 707 numbers"):
        il.MetaLearner(model, il.Head())


@pytest.mark.parametrize("adapts", [il.Head(), il.Body()])
def test_a_head_declared_first_is_found_out_where_the_model_runs(adapts):
    learner = il.MetaLearner(HeadFirst().double(), adapts, il.SGD(lr=0.1, steps=1))
    with pytest.raises(
        ValueError, match=r"takes body\.\* .* ends in fc: name what shall move, as in Named\('fc\.\*'\)"
    ):
        learner.meta_step(batch_of(4))
    with pytest.raises(ValueError, match=r"ends in fc"):
        learner.adapt(torch.randn(6, 4).double(), torch.arange(3).repeat(2))


def test_the_repr_says_what_adapts():
    shown = repr(il.MetaLearner(Plain(), il.Head()))
    assert "adapts=Head(): classifier.weight, classifier.bias (21 of 51 numbers)" in shown


# Choices.


class Halves(il.adapts.Adapts):
    """A user's own choice, in which other parameters move in other steps."""

    def select(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def moves(self, model: nn.Module) -> list[frozenset[str]]:
        names = self.select(model)
        return [frozenset(names[:2]), frozenset(names[2:])]


def test_a_users_own_table_of_moves_is_followed():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WAYS)).double()
    batch = batch_of(4)
    mine = il.MetaLearner(model, Halves(), il.SGD(lr=0.2, steps=2))
    table = il.MetaLearner(model, il.Blocks(["10", "01"]), il.SGD(lr=0.2, steps=2))
    together = il.MetaLearner(model, il.Everything(), il.SGD(lr=0.2, steps=2))
    found = grads(mine, batch)
    assert relative_error(found, grads(table, batch)) < 1e-14
    assert relative_error(found, grads(together, batch)) > 1e-3
    with pytest.raises(ValueError, match=r"cannot follow a table"):
        il.MetaLearner(model, Halves(), il.SGD(lr=0.2, steps=2), il.Window(2))


@pytest.mark.parametrize("method", ["select", "moves"])
def test_a_users_choice_of_names_that_do_not_exist_is_refused(method, monkeypatch):
    names = {"select": ["0.weight", "0.biass"], "moves": [{"0.weight", "0.biass"}]}
    monkeypatch.setattr(Halves, method, lambda self, model: names[method])
    with pytest.raises(ValueError, match=r"(selects|moves) 0\.biass, which"):
        il.MetaLearner(nn.Sequential(nn.Linear(4, WAYS)), Halves(), il.SGD(lr=0.2, steps=2))


class Velocity(NamedTuple):
    value: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Heavy(il.Momentum):
    """Momentum, its state in other containers."""

    kind: str = "tuple"

    def wrapped(self, velocity: dict[str, Tensor]) -> Any:
        return {"tuple": (velocity,), "list": [{"nested": velocity}], "named": Velocity(velocity)}[self.kind]

    def init(self, params: dict[str, Tensor]) -> Any:
        return self.wrapped(super().init(params))

    def update(self, step: int, params: Any, grad: Any, state: Any, learned: Any, start: Any) -> Any:
        velocity = state[0]["nested"] if self.kind == "list" else state[0]
        params, velocity = super().update(step, params, grad, velocity, learned, start)
        return params, self.wrapped(velocity)


@pytest.mark.parametrize("kind", ["tuple", "list", "named"])
def test_the_state_of_what_stands_still_stands_still_in_any_container(kind):
    problem, meta, task = network()
    settings: dict[str, Any] = {"lr": 0.1, "steps": 3, "moves": (("in",), ("out",), ("in",))}
    expected = il.hypergradient(problem, meta, task, il.Momentum(**settings))
    found = il.hypergradient(problem, meta, task, Heavy(**settings, kind=kind))
    assert relative_error(found.grad, expected.grad) == 0
    assert type(found.end.state) is type(Heavy(**settings, kind=kind).wrapped({}))


class Bounding:
    def full_gradient(self, params: Any, grad: Any, start: Any) -> Any:
        return {name: g.tanh() for name, g in super().full_gradient(params, grad, start).items()}  # type: ignore[misc]


class Bounded(Bounding, il.SGD):
    """By a class beside it, an override that is not linear in the gradient."""


class Centred(il.SGD):
    """One that is, and says so."""

    linear = True

    def full_gradient(self, params: Any, grad: Any, start: Any) -> Any:
        return {name: g - g.mean() for name, g in super().full_gradient(params, grad, start).items()}


class Slower(il.SGD):
    def rate(self, step: int, name: str) -> float:
        return super().rate(step, name) / (1 + step)


@dataclass(frozen=True, kw_only=True)
class Lookahead(il.SGD):
    """Every second step goes half of the way from the parameters of two steps before (arXiv 1907.08610)."""

    def init(self, params: dict[str, Tensor]) -> Any:
        return {"slow": dict(params)}

    def update(self, step: int, params: Any, grad: Any, state: Any, learned: Any, start: Any) -> Any:
        fast, _ = super().update(step, params, grad, {}, learned, start)
        if step % 2 == 0:
            return fast, state
        slow = {name: (state["slow"][name] + value) / 2 for name, value in fast.items()}
        return slow, {"slow": slow}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("estimator", [il.Unrolled(record=False), il.Unrolled(record=True)], ids=str)
@pytest.mark.parametrize("kind", [Bounded, Centred, Slower, Lookahead])
def test_what_a_users_solver_overrides_is_differentiated(kind, estimator, stacked):
    problem, meta, task = network()
    solver = kind(lr=0.1, steps=4)
    assert not solver.timeless
    leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
    params = start = problem.start(leaves)
    state = solver.init(params)
    for step in range(4):
        loss = problem.inner_loss(params, leaves, task.support)
        grad = dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))
        params, state = solver.update(step, params, grad, state, {}, start)
    loss = problem.outer_loss(params, leaves, task.query)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    learner = il.Bilevel(problem, meta, solver, estimator, stacked=stacked)
    batch = torch.utils._pytree.tree_map(lambda value: value.expand(2, *value.shape), task) if stacked else task
    learner.meta_step(batch)
    assert relative_error({name: value.grad for name, value in learner.meta.items()}, expected) < 1e-12


def test_a_solver_that_learns_nothing_goes_with_implicit():
    class Plainly(il.SGD):
        def learned(self, params):
            return {}

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WAYS)).double()
    batch, settings = batch_of(4), {"lr": 0.1, "steps": 4, "weight_decay": 0.1}
    found, expected = (
        grads(il.MetaLearner(model, il.Head(), kind(**settings), il.Implicit(il.CG(8), learn_start=False)), batch)
        for kind in (Plainly, il.SGD)
    )
    assert relative_error(found, expected) == 0


class NoForwardMode(torch.autograd.Function):
    """A square, with a derivative of its own and no forward-mode rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Squares(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return NoForwardMode.apply(inputs)


def test_a_missing_forward_mode_is_not_missed():
    model = nn.Sequential(nn.Linear(4, 6), Squares(), nn.Linear(6, WAYS)).double()
    for chunk in (1, 2):
        learner, batch = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2), chunk_size=chunk), batch_of(4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = grads(learner, batch)
        assert relative_error(found, meta_gradient(learner, batch)[0]) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"inner": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)},
            r"steps parameters in place.*il\.SGD",
        ),
        ({"inner": il.SGD}, r"inner=SGD is a class: give an object, such as il\.SGD\(lr=0\.1, steps=5\)"),
        ({"adapts": il.Head}, r"adapts=Head is a class: give an object, such as il\.Head\(\)"),
        ({"meta_gradient": il.Implicit}, r"Implicit is a class"),
        ({"inner": "sgd"}, r"no rate and no steps: write il\.SGD"),
        ({"adapts": "haed"}, r"did you mean 'head'"),
        ({"meta_gradient": 3}, r"meta_gradient=3 is no MetaGradient"),
        ({"adapts": il.Window(2)}, r"is no Adapts"),
        ({"meta_gradient": object()}, r"subclass of innerloop\.meta_gradient\.MetaGradient"),
    ],
)
def test_what_is_no_choice_is_refused_with_the_cure(arguments, message):
    with pytest.raises(ValueError, match=message):
        il.MetaLearner(Plain(), **arguments)


def test_the_commands_strings_work():
    learner = il.MetaLearner(Plain(), "head", "momentum:lr=0.1,steps=2,momentum=0.5", "truncated:1", start="prototypes")
    assert learner.adapts == il.Head()
    assert learner.inner == il.Momentum(lr=0.1, steps=2, momentum=0.5)
    assert learner.meta_gradient == il.Truncated(1)
    assert il.hypergradient is not None
    with pytest.raises(ValueError, match=r"proximal term belongs to the inner solver"):
        il.Implicit(2.0)


def test_a_learner_is_not_called():
    with pytest.raises(TypeError, match=r"MetaLearner is not called: train it with meta_step"):
        il.MetaLearner(Plain())(torch.randn(2, 4))


# Buffers.


class Counts(nn.Module):
    """Changes buffers in its forward pass, one in place and one by another tensor."""

    calls: Tensor
    decay: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("decay", torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.decay = self.decay * 0.5
        return inputs * (1 + self.decay)


@pytest.mark.parametrize("kind", ["spectral norm", "counts"])
@pytest.mark.parametrize("adapts", [il.Everything(), il.Head()])
def test_buffers_never_move_and_the_chunk_changes_nothing(kind, adapts):
    torch.manual_seed(0)
    first = spectral_norm(nn.Linear(4, 6)) if kind == "spectral norm" else nn.Sequential(nn.Linear(4, 6), Counts())
    model, batch = nn.Sequential(first, nn.Tanh(), nn.Linear(6, WAYS)).double(), batch_of(4, tasks=3)
    found = []
    for chunk in (1, 3):
        learner = il.MetaLearner(model, adapts, il.SGD(lr=0.1, steps=2), chunk_size=chunk)
        before = copy.deepcopy(dict(learner.model.named_buffers()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where vmap cannot take the layer, which is said
            found.append(grads(learner, batch))
            learner.evaluate(batch)
            learner.adapt(batch.support[0][0], batch.support[1][0])
        for name, buffer in learner.model.named_buffers():
            assert torch.equal(buffer, before[name]), name
    assert relative_error(*found) < 1e-12
    if kind == "counts":  # by plain autograd with the buffers as they stand
        model[0][1].forward = lambda inputs: inputs * 1.5
        expected = meta_gradient(il.MetaLearner(model, adapts, il.SGD(lr=0.1, steps=2)), batch)[0]
        assert relative_error(found[0], expected) < 1e-12


class RunningMean(nn.Module):
    """Subtracts a running mean, which it changes in place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(0.5 * inputs.detach().mean(0))
        return (inputs - self.mean).tanh()


@pytest.mark.parametrize(("kind", "batch_norm"), [("batch", "batch"), ("batch", "task"), ("stream", "batch")])
def test_no_pass_reads_the_buffers_of_another(kind, batch_norm):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 6), RunningMean(), nn.Linear(6, WAYS)).double(), batch_of(4, tasks=1)
    if kind == "stream":
        batch = batch._replace(support=il.Steps(tuple(value.repeat_interleave(2, 0)[None] for value in batch.support)))
    found = []
    for reuse in (True, False):
        learner = il.MetaLearner(
            model, il.Head(), il.SGD(lr=0.5, steps=2), batch_norm=batch_norm, reuse_prefix=reuse, chunk_size=1
        )
        found.append(grads(learner, batch) | {"loss": learner.evaluate(batch).loss})
        assert (learner.few_shot.prefix is not None) is reuse
    assert relative_error(*found) < 1e-12


# Precision.


class Table(nn.Module):
    """Its first parameter is frozen and says which inputs it reads."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.tensor([1, 0], dtype=dtype), requires_grad=False)
        self.head = nn.Linear(2, WAYS).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs[:, self.order.long()])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_inputs_take_the_precision_of_what_learns(dtype):
    found = []
    for first in (dtype, torch.float64):
        torch.manual_seed(0)
        learner = il.MetaLearner(Table(first), inner=il.SGD(lr=0.5, steps=2))
        loss = learner.meta_step(batch_of(4)).loss
        found.append((loss, learner.model.head.weight.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_inputs_for_a_frozen_body_of_fewer_bits_are_the_models_to_cast():
    model = nn.Sequential(nn.Linear(4, 6).bfloat16().requires_grad_(False), nn.Linear(6, WAYS))
    with pytest.raises(ValueError, match=r"let the model cast them"):
        il.MetaLearner(model, inner=il.SGD(lr=0.5, steps=2)).meta_step(batch_of(4))


def test_a_run_has_the_precision_of_what_learns(tmp_path):
    learner = il.MetaLearner(Table(torch.int64), inner=il.SGD(lr=0.5, steps=1))
    tasks = il.tasks.arrays(torch.randn(60, 4), torch.arange(60) % 15, ways=WAYS, shots=1, queries=2)
    il.fit(learner, tasks, steps=1, tasks_per_batch=1, validation_tasks=2, folder=tmp_path, progress=False)
    assert json.loads((tmp_path / "settings.json").read_text())["precision"] == "float64"


# Weights that are computed from others.


class Normalised(nn.Module):
    """Weight norm, written by hand."""

    def __init__(self, over: tuple[int, ...]) -> None:
        super().__init__()
        self.over = over

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        return length * direction / direction.square().sum(self.over, keepdim=True).sqrt()


def slope(learner: il.MetaLearner, batch: il.Task, way: dict[str, Tensor], width: float = 1e-6) -> Tensor:
    """How the loss after adaptation changes along a direction in the meta-parameters, by central differences."""
    losses = []
    for move in (width, -2 * width):
        with torch.no_grad():
            for name, parameter in learner.named_parameters():
                parameter.add_(move * way[name])
        losses.append(learner.evaluate(batch).loss.mean())
    return (losses[0] - losses[1]) / (2 * width)


@pytest.mark.parametrize(("dim", "over"), [(0, (1,)), (1, (0,)), (None, (0, 1)), ("spectral", ())])
def test_normalised_weights_have_an_exact_meta_gradient(dim, over):
    torch.manual_seed(0)
    spectral = dim == "spectral"
    first = nn.Linear(4, 6).double()
    model = nn.Sequential(
        spectral_norm(first) if spectral else weight_norm(first, dim=dim), nn.Tanh(), nn.Linear(6, WAYS).double()
    )
    batch, inner = batch_of(4), il.SGD(lr=0.5, steps=3)
    learner = il.MetaLearner(model, inner=inner)
    learner.eval()  # torch's spectral norm is exact there alone: in training its power iteration passes no gradient
    found = grads(learner, batch)
    if not spectral:
        by_hand = copy.deepcopy(model)
        by_hand[0].parametrizations.weight[0] = Normalised(over)
        assert relative_error(found, grads(il.MetaLearner(by_hand, inner=inner), batch)) < 1e-12
        learner.model.load_state_dict(model.state_dict())
        for torchs in (model, learner.adapt(batch.support[0][0], batch.support[1][0])):
            assert type(torchs[0].parametrizations.weight[0]) is _WeightNorm
    way = {name: torch.randn_like(grad) for name, grad in found.items()}
    along = sum((found[name] * way[name]).sum() for name in way)
    torch.testing.assert_close(slope(learner, batch, way), along, rtol=1e-6, atol=1e-9)


# What gets no gradient.


def data_weights(estimator: il.meta_gradient.MetaGradient) -> il.Bilevel:
    def inner_loss(params, meta, batch):
        losses = F.cross_entropy(batch[0] @ params["w"], batch[1], reduction="none")
        return (meta["belief"].sigmoid() * losses).mean()

    def outer_loss(params, meta, batch):
        return F.cross_entropy(batch[0] @ params["w"], batch[1])

    problem = il.Problem(lambda meta: {"w": meta["start"]}, inner_loss, outer_loss)
    meta = {"belief": torch.zeros(6).double(), "start": torch.zeros(4, WAYS).double()}
    return il.Bilevel(problem, meta, il.SGD(lr=0.5, steps=2), estimator)


def test_meta_parameters_that_only_the_inner_loss_reads_are_named_once():
    task = il.Task(*(tuple(value[0] for value in part) for part in batch_of(4)))
    learner = data_weights(il.FirstOrder())
    with pytest.warns(UserWarning, match=r"of belief is exactly zero. FirstOrder takes no second derivative.*Unrolled"):
        learner.meta_step(task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.meta_step(task)
        data_weights(il.Unrolled()).meta_step(task)
    assert not learner.meta["belief"].grad.any()
    for estimator, names in ((il.Reptile(), "belief"), (il.Unrolled(learn_start=False), "start")):
        learner = data_weights(il.Unrolled())
        with pytest.warns(UserWarning, match=rf"of {names} is exactly zero"):
            il.hypergradient(learner.problem, learner.meta_tree(), task, learner.inner, estimator)


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * self.temperature, target)


def test_a_losss_own_parameters_are_meta_parameters():
    model, batch, loss = Plain().double(), batch_of(4), Scaled().double()
    learner = il.MetaLearner(model, il.Head(), il.SGD(lr=0.3, steps=2), loss=loss)
    names = [name for name, _ in learner.named_parameters()]
    assert "loss.temperature" in names
    learner.meta_step(batch)
    found = learner.loss.temperature.grad.item()

    def value(temperature: float) -> float:
        with torch.no_grad():
            learner.loss.temperature.fill_(temperature)
        return learner.evaluate(batch).loss.mean().item()

    assert found == pytest.approx((value(1.5 + 1e-6) - value(1.5 - 1e-6)) / 2e-6, rel=1e-6)
    assert loss.temperature.item() == 1.5  # the user's own never moves
    assert loss.temperature.grad is None


# What an attack found.


def test_a_head_that_begins_at_zero_does_not_hide_another_forward_pass():
    class Residual(Declared):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, WAYS)
            nn.init.zeros_(self.two.weight)
            self.blocks = [self.one, self.two]

        def forward(self, inputs: Tensor) -> Tensor:
            return self.two(inputs + self.one(inputs))

    batch = batch_of(4)
    learner = il.MetaLearner(Residual().double(), il.Head(), il.SGD(lr=0.5, steps=3))
    with pytest.warns(UserWarning, match="one after the other, are not its forward pass"):
        found = grads(learner, batch)
    assert relative_error(found, meta_gradient(learner, batch)[0]) < 1e-12


class EvalOnly(Declared):
    """A chain in training alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.two(self.one(inputs) if self.training else self.one(inputs).sin())


def test_a_chain_is_compared_in_each_mode():
    batch = batch_of(4)
    learner = il.MetaLearner(EvalOnly().double(), il.Head(), il.SGD(lr=0.5, steps=3))
    learner.meta_step(batch)
    learner.eval()
    with pytest.warns(UserWarning, match="are not its forward pass"):
        found = learner.evaluate(batch).loss
    plain = il.MetaLearner(learner.model, il.Head(), il.SGD(lr=0.5, steps=3), reuse_prefix=False).eval()
    torch.testing.assert_close(found, plain.evaluate(batch).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("record", [True, False])
def test_a_start_that_draws_at_random_draws_the_same_everywhere(record):
    problem = il.Problem(
        lambda meta: {"w": meta["scale"] * torch.randn(3, dtype=torch.float64)},
        lambda params, meta, _: (params["w"] ** 3).sum(),
        lambda params, meta, _: (params["w"] ** 2).sum(),
        seed=3,
    )

    def loss(scale: float) -> il.Result:
        meta = {"scale": torch.tensor(scale, dtype=torch.float64)}
        return il.hypergradient(problem, meta, il.Task((), ()), il.SGD(lr=0.1, steps=2), il.Unrolled(record=record))

    expected = (loss(1 + 1e-6).loss - loss(1 - 1e-6).loss) / 2e-6
    assert loss(1.0).grad["scale"].item() == pytest.approx(expected.item(), rel=1e-7)


class OwnStatistics(nn.Module):
    """Changes its buffers in a way that raises no version."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.batch_norm(inputs, self.mean, self.variance, training=self.training)


class Counting(nn.Module):
    """A loss that counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(output, target) * (1 + self.calls)


def test_no_buffer_moves_of_layers_and_losses_of_a_users_own():
    batch = batch_of(4)
    model = nn.Sequential(nn.Linear(4, 6), OwnStatistics(), nn.Linear(6, WAYS)).double()
    learner = il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=2), loss=Counting(), chunk_size=1)
    before = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    first = learner.meta_step(batch).loss
    assert learner.meta_step(batch).loss == first
    for name, buffer in learner.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_buffers_of_a_problems_own_module_are_put_back_and_named():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, WAYS)).double()

    def loss(params, meta, batch):
        return F.cross_entropy(functional_call(net, params, (batch[0],)), batch[1])

    learner = il.Bilevel(il.Problem(lambda meta: dict(meta), loss, loss), net, il.SGD(lr=0.1, steps=2))
    task = il.Task(*(tuple(value[0] for value in part) for part in batch_of(4)))
    with pytest.raises(ValueError, match=r"the losses change the buffers meta\.1\.running_mean"):
        learner.meta_step(task)
    assert not net[1].running_mean.any()
    net.eval()
    learner.meta_step(task)


def test_adapt_takes_trees_where_statistics_are_kept():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, WAYS)

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.head(self.norm(self.body(pair[0] + pair[1])))

    batch = batch_of(4)
    paired = il.Task(*(((inputs, inputs * 2), targets) for inputs, targets in batch))
    learner = il.MetaLearner(Pair().double(), il.Head(), il.SGD(lr=0.1, steps=2), batch_norm="task")
    adapted = learner.adapt(*(torch.utils._pytree.tree_map(lambda value: value[0], part) for part in paired.support))
    outputs = adapted(tuple(value[0] for value in paired.query[0]))
    torch.testing.assert_close(outputs, learner.evaluate(paired).outputs[0], rtol=1e-10, atol=1e-12)


def test_prototypes_of_tasks_in_a_list_have_their_own_ways():
    learner = il.MetaLearner(Plain().double(), il.Head(), il.SGD(lr=0.1, steps=2), start=il.Prototypes())

    def task(ways: int) -> il.Task:
        labels = torch.arange(ways).repeat(2)
        torch.manual_seed(ways)
        return il.Task((torch.randn(2 * ways, 4).double(), labels), (torch.randn(2 * ways, 4).double(), labels))

    together = learner.evaluate([task(2), task(6)])
    assert [output.shape[-1] for output in together.outputs] == [2, 6]
    assert together.loss[0] == learner.evaluate([task(2)]).loss[0]
    odd = task(2)
    for labels in (torch.tensor([3, 7, 3, 7]), torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0, 2, 0, 2])):
        with pytest.raises(ValueError, match=r"Prototypes\(\) needs"):
            learner.evaluate([odd._replace(support=(odd.support[0], labels))])
    with pytest.raises(
        ValueError, match=r"head has no bias or does not adapt|classifier has no bias or does not adapt"
    ):
        il.MetaLearner(Plain(), il.Body(), start=il.Prototypes())
    first = il.MetaLearner(HeadFirst().double(), il.Everything(), il.SGD(lr=0.1, steps=1), start=il.Prototypes())
    with pytest.raises(ValueError, match=r"takes body for the head of HeadFirst"):
        first.evaluate([task(3)])


def test_a_derivative_of_the_gradient_is_refused():
    learner = data_weights(il.Unrolled())
    task = il.Task(*(tuple(value[0] for value in part) for part in batch_of(4)))

    def loss(meta):
        return il.hypergradient(learner.problem, meta, task, learner.inner).loss

    with pytest.raises(ValueError, match=r"would give zeros: take its own gradient, result\.grad"):
        torch.func.grad(loss)(learner.meta_tree())


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (lambda params, meta, batch: (batch[0] @ params["w"]).sum(1), r"outer loss returned a tensor of shape \(6,\)"),
        (lambda params, meta, batch: 3.0, r"outer loss returned float"),
        (lambda params, meta, batch: (params["w"].sum(), 1, 2), r"outer loss returned 3 things"),
    ],
)
def test_losses_are_scalars(outer, message):
    learner = data_weights(il.Unrolled())
    task = il.Task(*(tuple(value[0] for value in part) for part in batch_of(4)))
    problem = il.Problem(learner.problem.start, learner.problem.inner_loss, outer)
    for estimator in (il.Unrolled(), il.Unrolled(record=True), il.Reptile()):
        with pytest.raises(ValueError, match=message):
            il.hypergradient(problem, learner.meta_tree(), task, learner.inner, estimator)
    vector = il.Problem(learner.problem.start, outer, learner.problem.outer_loss)
    if "6," in message:
        with pytest.raises(ValueError, match=r"inner loss returned a tensor of shape \(6,\)"):
            il.hypergradient(vector, learner.meta_tree(), task, learner.inner)


def test_names_of_meta_parameters_are_kept():
    problem = il.Problem(
        lambda meta: {"w": torch.zeros(2).double()},
        lambda params, meta, _: ((params["w"] - meta["a/b"] - 2 * meta["a.b"] - meta["c%2F"]) ** 2).sum(),
        lambda params, meta, _: params["w"].sum(),
    )
    learner = il.Bilevel(
        problem, {name: torch.ones(2).double() for name in ("a/b", "a.b", "c%2F")}, il.SGD(lr=0.1, steps=2)
    )
    learner.meta_step(il.Task((), ()))
    assert set(learner.meta_tree()) == {"a/b", "a.b", "c%2F"}
    assert learner.meta[list(learner.meta)[1]].grad.tolist() == pytest.approx([0.72, 0.72])
    with pytest.raises(ValueError, match=r"'keys' is a name that torch keeps"):
        il.Bilevel(problem, {"keys": torch.ones(2)})
    with pytest.raises(ValueError, match=r"holds no parameter that learns"):
        il.Bilevel(problem, nn.Identity())


def test_meta_parameters_keep_their_order():
    def fit(params, meta, _):
        target, scale = meta.values()
        return scale * (params["w"] - target).square()

    problem = il.Problem(lambda meta: {"w": torch.zeros(())}, fit, lambda params, *_: params["w"])
    meta, inner = {"target": torch.tensor(2.0), "scale": torch.tensor(0.5)}, il.SGD(lr=0.1, steps=3)
    found = il.Bilevel(problem, meta, inner).estimate(il.Task((), ()))
    assert found.grad == il.hypergradient(problem, meta, il.Task((), ()), inner).grad


@pytest.mark.parametrize(
    ("meta", "start", "name"),
    [
        ({"w": {"x": torch.ones(2)}}, lambda meta: {"p": torch.zeros(2)}, "meta: 'w'"),
        ({"w": torch.ones(2), "seen": torch.tensor(3)}, lambda meta: {"p": torch.zeros(2)}, "meta: 'seen'"),
        ([torch.ones(2)], lambda meta: {"p": torch.zeros(2)}, "meta"),
        ({"w": torch.ones(2)}, lambda meta: {"p": {"q": torch.zeros(2)}}, "start.*'p'"),
        ({"w": torch.ones(2)}, lambda meta: {"p": torch.zeros(2), "seen": torch.tensor(3)}, "start.*'seen'"),
        ({"w": torch.ones(2)}, lambda meta: torch.zeros(2), "start"),
    ],
)
def test_parameters_are_flat_dicts_of_floating_tensors(meta, start, name):
    def fit(params, meta, _):
        return (params["p"] - meta["w"]).square().sum()

    problem, task, inner = il.Problem(start, fit, fit), il.Task((), ()), il.SGD(lr=0.1, steps=1)
    with pytest.raises(ValueError, match=rf"{name}.*flat dict of floating tensors"):
        il.hypergradient(problem, meta, task, inner)
    with pytest.raises(ValueError, match=rf"{name}.*flat dict of floating tensors"):
        il.Bilevel(problem, meta, inner).meta_step(task)


def test_meta_parameters_made_in_inference_mode_are_taken():
    def fit(params, meta, _):
        return (params["p"] - meta["w"]).square().sum()

    problem = il.Problem(lambda meta: {"p": torch.zeros(2)}, fit, fit)
    with torch.inference_mode():
        meta = {"w": torch.ones(2)}
    found = il.hypergradient(problem, meta, il.Task((), ()), il.SGD(lr=0.25, steps=1))
    assert found.grad["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: il.SGD(lr=0.1, steps=2, clip=float("inf")), r"give the largest norm"),
        (lambda: il.SGD(lr=float("inf"), steps=2), r"inner rate must be a number above 0"),
        (
            lambda: il.SGD(**{"lr": "0.1", "steps": 2}),  # type: ignore[arg-type]
            r"inner rate must be a number above 0",
        ),
        (
            lambda: il.SGD(**{"lr": 0.1, "steps": 2, "proximal": "2"}),  # type: ignore[arg-type]
            r"proximal='2'\): must be a number",
        ),
        (lambda: il.SGD(lr=0.1, steps=2, moves=[["a"], []]), r"a row in which nothing moves"),
        (
            lambda: il.MetaLearner(Plain(), inner=il.SGD(lr={"haed.*": 0.1, "*": 0.2}, steps=2)),
            r"'haed\.\*' matches none",
        ),
        (lambda: il.MetaLearner(Plain(), inner=il.SGD(lr={"body.*": 0.1}, steps=2)), r"names no rate for 'classifier"),
        (lambda: il.MetaLearner(Plain(), inner=il.SGD(lr=0.1, steps=2, moves=[["x"]])), r"moves names x"),
        (
            lambda: il.MetaLearner(Plain(), loss=nn.CrossEntropyLoss),  # type: ignore[arg-type]
            r"is no function",
        ),
        (lambda: il.MetaLearner(Plain(), carry="slot"), r"no longer depends on the start"),
        (
            lambda: il.MetaLearner(
                nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)),
                il.Blocks(["11", "01"]),
                il.SGD(lr=0.1, steps=2, moves=[["0.weight"]]),
            ),
            r"both SGD\(moves=...\) and what adapts",
        ),
        (
            lambda: il.MetaLearner(nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)))),
            r"0 has SpectralNorm as a hook.*parametrizations\.spectral_norm",
        ),
        (
            lambda: il.MetaLearner(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))),
            r"0 has WeightNorm as a hook.*or weight_norm",
        ),
        (
            lambda: il.Bilevel(data_weights(il.Unrolled()).problem, weight_norm(nn.Linear(4, 3))),
            r"torch's weight_norm, .*il\.MetaLearner",
        ),
        (
            lambda: il.MetaLearner(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 3))),
            r"0 has max_norm=1\.0, .*leave max_norm out",
        ),
        (
            lambda: il.MetaLearner(nn.Sequential(nn.EmbeddingBag(5, 4, max_norm=2.0), nn.Linear(4, 3))),
            r"0 has max_norm=2\.0, .*leave max_norm out",
        ),
        (
            lambda: il.MetaLearner(nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))),
            r"0 has sparse gradients.*build it with sparse=False",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_nonsense_is_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_batch_is_checked():
    learner, batch = il.MetaLearner(Plain().double(), il.Head(), il.SGD(lr=0.1, steps=1)), batch_of(4)
    empty = batch._replace(support=tuple(value[:, :0] for value in batch.support))
    with pytest.raises(ValueError, match=r"the support set of a task is empty"):
        learner.meta_step(empty)
    with pytest.raises(ValueError, match=r"Steps of a function gives the batches of one task"):
        learner.meta_step(il.Task(il.Steps(lambda step: None), batch.query))
    by_task = il.MetaLearner(Plain().double(), il.Head(), il.SGD(lr=0.1, steps=1), carry="task")
    by_task.meta_step(batch, task_ids=torch.tensor([3, 4]))
    assert set(by_task.carried.state_dict()) == {3, 4}
    with pytest.raises(ValueError, match=r"names a task twice"):
        by_task.meta_step(batch, task_ids=[1, 1])


def test_inference_mode_changes_nothing():
    learner, batch = il.MetaLearner(Plain().double(), il.Head(), il.SGD(lr=0.1, steps=2)), batch_of(4)
    expected = learner.evaluate(batch).loss
    with torch.inference_mode():
        inside = batch_of(4)
        assert torch.equal(learner.evaluate(inside).loss, expected)
    assert torch.equal(learner.evaluate(inside).loss, expected)


def test_outputs_may_hold_what_is_no_tensor():
    class WithNone(Plain):
        def forward(self, inputs: Tensor):
            return super().forward(inputs), None

    learner = il.MetaLearner(
        WithNone().double(), il.Head(), il.SGD(lr=0.1, steps=2), loss=lambda o, t: F.cross_entropy(o[0], t)
    )
    batch = batch_of(4)
    learner.meta_step(batch)
    (outputs,) = learner.evaluate(batch).outputs
    assert outputs.shape == (2, 6, WAYS)
