"""Procedures of the papers and of their code, written out in plain torch, against the same by the library."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import innerloop as il
from innerloop.meta_gradient import MetaGradient
from innerloop.problem import Tree
from problems import WAYS, model_and_batch, relative_error

# --- iMAML (arXiv 1909.04630): batch norm by the statistics of the batch, in every pass ---------------------------


def normalised(params: Tree, inputs: Tensor) -> Tensor:
    """Linear, batch norm by the statistics of these inputs, tanh, linear, without a layer of torch's."""
    hidden = inputs @ params["0.weight"].T + params["0.bias"]
    mean, variance = hidden.mean(0), hidden.var(0, correction=0)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * params["1.weight"] + params["1.bias"]
    return hidden.tanh() @ params["3.weight"].T + params["3.bias"]


@pytest.mark.parametrize("training", [True, False])
def test_implicit_gradients_take_the_curvature_from_the_supports_statistics_and_the_loss_from_the_queries(training):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, WAYS)).double().train(training)
    model[1].running_mean.fill_(50.0)  # whoever reads the running statistics shows
    batch = model_and_batch("mlp")[1]
    inner = il.SGD(lr=0.1, steps=4, proximal=20.0)
    learner = il.MetaLearner(model, inner=inner, meta_gradient=il.Implicit(il.CG(60)))
    learner.train(training).meta_step(batch)

    start = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [value.numel() for value in start.values()]

    def tree(vector: Tensor) -> Tree:
        parts = vector.split(sizes)
        return {name: part.view(value.shape) for (name, value), part in zip(start.items(), parts, strict=True)}

    centre = torch.cat([value.flatten() for value in start.values()])
    expected = torch.zeros_like(centre)
    for support, labels, query, wanted in zip(*batch.support, *batch.query, strict=True):

        def loss(vector: Tensor, inputs: Tensor = support, targets: Tensor = labels) -> Tensor:
            return F.cross_entropy(normalised(tree(vector), inputs), targets)

        place = centre
        for _ in range(4):
            place = place - 0.1 * (torch.func.grad(loss)(place) + 20.0 * (place - centre))
        matrix = torch.eye(len(place), dtype=torch.float64) + torch.func.hessian(loss)(place) / 20.0  # as in the paper
        expected += torch.linalg.solve(matrix, torch.func.grad(loss)(place, query, wanted)) / len(batch.support[1])
    found = {name: p.grad for name, p in learner.model.named_parameters()}
    assert relative_error(found, tree(expected)) < 1e-10


# --- ANIL as learn2learn's example writes it (arXiv 1909.09157) ---------------------------------------------------


def by_learn2learn(model: nn.Module, data: Tensor, labels: Tensor, shots: int, joint: bool) -> Tensor:
    """Query loss of one task whose images of a class lie together, even ones for support and odd ones for query."""
    even = torch.zeros(len(data), dtype=torch.bool)
    even[torch.arange(shots * WAYS) * 2] = True
    *below, head = copy.deepcopy(model).train().children()
    assert isinstance(head, nn.Linear)
    backbone = nn.Sequential(*below)
    if joint:
        features = backbone(data).detach()
        support, query = features[even], features[~even]
    else:
        support, query = backbone(data[even]).detach(), backbone(data[~even]).detach()
    weight: Tensor = head.weight
    bias: Tensor = head.bias
    for _ in range(5):
        grads = torch.autograd.grad(F.cross_entropy(F.linear(support, weight, bias), labels[even]), (weight, bias))
        weight, bias = weight - 0.1 * grads[0], bias - 0.1 * grads[1]
    return F.cross_entropy(F.linear(query, weight, bias), labels[~even]).detach()


def test_an_even_odd_split_is_learn2learns_but_support_and_query_pass_batch_norm_apart():
    model, batch = model_and_batch("conv4")  # two images a class in support and query
    learner = il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=5))
    (support, labels), (query, _) = ((x[0], y[0]) for x, y in batch)
    data, both = torch.stack([support, query], 1).flatten(0, 1), labels.repeat_interleave(2)
    found = learner.evaluate(batch).loss[0]
    torch.testing.assert_close(found, by_learn2learn(model, data, both, 2, joint=False))
    # the example itself computes all features in one pass, which the library does not
    assert abs(by_learn2learn(model, data, both, 2, joint=True) - found) > 1e-3


# --- memory-reduced meta-learning (arXiv 2412.12030): one evaluation for all methods ------------------------------

METHODS: dict[str, Callable[[nn.Module], il.MetaLearner]] = {
    "MAML": lambda model: il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=3)),
    "ANIL": lambda model: il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=10)),
    "ITD-BiO": lambda model: il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=20), il.Unrolled(learn_start=False)),
    "memory-reduced": lambda model: il.MetaLearner(
        model, il.Head(), il.SGD(lr=0.1, steps=20, weight_decay=0.05), il.MemoryReduced()
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_any_method_has_trained_can_be_judged_by_adapting_the_head_alone(method):
    """The paper tests all methods by 20 steps of the head at rate 0.05; its own adaptation is another column."""
    model, batch = model_and_batch("conv4")
    learner = METHODS[method](model)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        learner.meta_step(batch)
        optimizer.step()
    found = il.MetaLearner(learner.model, il.Head(), il.SGD(lr=0.05, steps=20)).evaluate(batch)

    plain = copy.deepcopy(model).train()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(learner.model.get_parameter(name))
    *below, head = plain.children()
    backbone = nn.Sequential(*below)
    for task, (support, labels, query) in enumerate(zip(*batch.support, batch.query[0], strict=True)):
        weight, bias = head.weight, head.bias
        for _ in range(20):
            loss = F.cross_entropy(F.linear(backbone(support).detach(), weight, bias), labels)
            by_weight, by_bias = torch.autograd.grad(loss, (weight, bias))
            weight, bias = weight - 0.05 * by_weight, bias - 0.05 * by_bias
        torch.testing.assert_close(found.outputs[task], F.linear(backbone(query), weight, bias).detach())
    assert not torch.allclose(found.loss, learner.evaluate(batch).loss, rtol=1e-4)


# --- learning what and where to transfer (arXiv 1905.05901), the setting of the window estimate (2006.04298) -------


@dataclass(frozen=True, kw_only=True)
class Continued(il.Momentum):
    """Momentum that goes on from the velocity of an optimiser in use."""

    velocity: Tree = field(default_factory=dict)

    def init(self, params: Tree) -> Tree:
        return self.velocity


class Target(nn.Sequential):
    """The network that is trained; its hidden units are to match a source's features, as far as these are of use."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.double()


RATE, STEPS = 0.1, 4


def cross_entropy(target: Target, params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(functional_call(target, params, (batch[0],)), batch[1])


def matching(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    hidden = (batch[0] @ params["0.weight"].T + params["0.bias"]).tanh()
    source = torch.cat([batch[0], batch[0][:, :2].cos()], 1)
    return (meta["what"].softmax(0) * (hidden - source).square()).sum(1).mean() * F.softplus(meta["where"])


def after_a_step(target: Target, params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    grad = torch.func.grad(lambda params: cross_entropy(target, params, batch))(params)
    return cross_entropy(target, {name: params[name] - RATE * grad[name] for name in params}, batch)


def state_of(target: Target, optimizer: torch.optim.SGD) -> tuple[Tree, Tree]:
    """The target's parameters and their velocities, as they are."""
    params = {name: p.detach() for name, p in target.named_parameters()}
    return params, {name: optimizer.state[p]["momentum_buffer"] for name, p in target.named_parameters()}


def by_the_library(estimator: MetaGradient) -> Callable[..., Tree]:
    def gradient(target: Target, optimizer: torch.optim.SGD, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tree:
        params, velocity = state_of(target, optimizer)
        problem = il.Problem(
            lambda meta: params, matching, lambda params, meta, batch: after_a_step(target, params, batch)
        )
        inner = Continued(lr=RATE, steps=STEPS, momentum=0.9, weight_decay=1e-4, velocity=velocity)
        return il.hypergradient(problem, meta, il.Task(batch, batch), inner, estimator).grad

    return gradient


def by_hand(target: Target, optimizer: torch.optim.SGD, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tree:
    """Plain autograd through the steps of torch.optim.SGD from where it stands."""
    leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
    params, velocity = state_of(target, optimizer)
    params = {name: value.clone().requires_grad_() for name, value in params.items()}
    for _ in range(STEPS):
        grads = torch.autograd.grad(
            matching(params, leaves, batch), list(params.values()), create_graph=True, materialize_grads=True
        )
        for (name, value), grad in zip(params.items(), grads, strict=True):
            velocity[name] = 0.9 * velocity[name] + grad + 1e-4 * value
        params = {name: value - RATE * velocity[name] for name, value in params.items()}
    found = torch.autograd.grad(after_a_step(target, params, batch), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def transfer(gradient: Callable[..., Tree], batches: int = 4) -> tuple[Tree, Tree, Tree]:
    """The schedule: an ordinary step on both losses, then a step of the meta-network through steps not taken."""
    torch.manual_seed(3)
    stream = torch.Generator().manual_seed(4)  # of its own: a meta-gradient draws a seed from the global generator
    target = Target()
    optimizer = torch.optim.SGD(target.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
    meta = {"what": torch.zeros(8, dtype=torch.float64), "where": torch.ones((), dtype=torch.float64)}
    outer = torch.optim.Adam(meta.values(), lr=0.1)
    for _ in range(batches):
        inputs = torch.randn(16, 6, dtype=torch.float64, generator=stream)
        batch = inputs, (inputs[:, 0] > 0).long()
        optimizer.zero_grad()
        params: Tree = dict(target.named_parameters())
        (cross_entropy(target, params, batch) + matching(params, meta, batch)).backward()
        optimizer.step()
        before = copy.deepcopy((target.state_dict(), optimizer.state_dict(), meta))
        found = gradient(target, optimizer, meta, batch)
        torch.testing.assert_close((target.state_dict(), optimizer.state_dict(), meta), before, rtol=0, atol=0)
        for name, value in found.items():
            meta[name].grad = value
        outer.step()
    return *state_of(target, optimizer), meta


def test_the_schedule_of_learning_to_transfer_is_that_of_plain_autograd_with_state_rolled_back():
    for found, expected in zip(transfer(by_the_library(il.Window(1))), transfer(by_hand), strict=True):
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("estimator", [il.Window(2), il.Window(4), il.Window(4, "true_forward")])
def test_windows_roll_the_state_back_and_keep_close_to_the_schedule(estimator):
    (params, velocity, meta), exact = transfer(by_the_library(estimator)), transfer(by_hand)
    assert all(value.isfinite().all() for tree in (params, velocity, meta) for value in tree.values())
    assert 0 < relative_error(meta, exact[2]) < 0.1


# --- random draws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [il.Unrolled(), il.Window(2), il.Window(2, "true_forward"), il.Binomial(1)])
def test_replayed_draws_leave_the_callers_generator_where_it_was(estimator):
    def loss(params: Tree, meta: Tree, inputs: Tensor) -> Tensor:
        return (F.dropout(inputs, 0.5) @ params["w"] - 1).square().mean()

    meta = {"w": torch.ones(6, dtype=torch.float64)}
    problem = il.Problem(lambda meta: meta, loss, loss, seed=5)
    inputs = torch.randn(7, 6, dtype=torch.float64)

    def drawn_after(steps: int) -> Tensor:
        torch.manual_seed(1)
        il.hypergradient(problem, meta, il.Task(inputs, inputs), il.SGD(lr=0.1, steps=steps), estimator)
        return torch.rand(3)

    # the outer loss draws, once, from the caller's generator, and the inner loop does not
    assert torch.equal(drawn_after(2), drawn_after(6))
