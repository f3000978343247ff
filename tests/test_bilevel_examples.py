"""Three bilevel problems that are no few-shot learners, through ``il.hypergradient``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import innerloop as il
from innerloop import CG, Binomial, Implicit, Window
from innerloop.meta_gradient import MetaGradient

Tree = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def learn(meta: Tree, hypergradient: Callable[[Tree], Tree], rate: float, steps: int) -> Tree:
    """The outer loop: Adam on the meta-parameters."""
    meta = {name: value.clone() for name, value in meta.items()}
    optimizer = torch.optim.Adam(meta.values(), lr=rate)
    for _ in range(steps):
        for name, grad in hypergradient(meta).items():
            meta[name].grad = grad
        optimizer.step()
    return meta


def cosine(first: Tree, second: Tree) -> float:
    a, b = (torch.cat([tree[name].flatten() for name in first]) for tree in (first, second))
    return F.cosine_similarity(a, b, 0).item()


# --- which training examples to believe: a weight for each, learned from a few clean ones -----------------------------


def noisy_classification() -> tuple[il.Problem, Tree, il.Task, Tensor, Batch]:
    """A softmax regression with two in five training labels wrong; also which, and clean examples to test on."""

    def draw(count: int) -> Batch:
        inputs = normal(count, 5)
        return inputs, (inputs @ teacher).argmax(1)

    def weighted_loss(params: Tree, meta: Tree, batch: Batch) -> Tensor:
        losses = F.cross_entropy(batch[0] @ params["matrix"], batch[1], reduction="none")
        return (meta["belief"].sigmoid() * losses).mean()

    def clean_loss(params: Tree, meta: Tree, batch: Batch) -> Tensor:
        return F.cross_entropy(batch[0] @ params["matrix"], batch[1])

    teacher = normal(5, 3)
    inputs, labels = draw(60)
    wrong = torch.arange(60) % 5 < 2
    problem = il.Problem(lambda meta: {"matrix": torch.zeros_like(teacher)}, weighted_loss, clean_loss)
    task = il.Task((inputs, torch.where(wrong, (labels + 1) % 3, labels)), draw(40))
    return problem, {"belief": torch.zeros(60, dtype=torch.float64)}, task, wrong, draw(500)


@pytest.mark.parametrize("estimator", [il.Unrolled(), Window(5), Window(5, "true_forward")])
def test_learned_data_weights_find_the_wrong_labels(estimator):
    problem, meta, task, wrong, (inputs, labels) = noisy_classification()
    inner = il.SGD(lr=0.4, steps=10)

    def accuracy(meta: Tree) -> float:
        params = il.hypergradient(problem, meta, task, inner, estimator).params
        return ((inputs @ params["matrix"]).argmax(1) == labels).double().mean().item()

    learned = learn(meta, lambda meta: il.hypergradient(problem, meta, task, inner, estimator).grad, 0.3, 30)
    belief = learned["belief"].sigmoid()
    assert belief[wrong].mean() < 0.35
    assert belief[~wrong].mean() > 0.65
    assert accuracy(learned) > accuracy(meta) + 0.1


def test_estimates_for_data_weights_point_the_same_way():
    problem, meta, task, *_ = noisy_classification()
    inner = il.SGD(lr=0.4, steps=10)
    exact = il.hypergradient(problem, meta, task, inner).grad
    for estimator in (Window(2), Window(5), Window(5, "true_forward"), Binomial(2), il.Truncated(5)):
        assert cosine(il.hypergradient(problem, meta, task, inner, estimator).grad, exact) > 0.9
    with pytest.warns(UserWarning, match="the meta-gradient of belief is exactly zero") as caught:
        assert torch.all(il.hypergradient(problem, meta, task, inner, il.FirstOrder()).grad["belief"] == 0)
    assert caught[0].filename == __file__


# --- how much to shrink each parameter: weight decay of a regression --------------------------------------------------


def regression(kind: str) -> tuple[il.Problem, Tree, il.Task]:
    """A ridge or logistic regression on eight features, three of them of use, with a weight decay for each."""

    def fit(params: Tree, meta: Tree, batch: Batch) -> Tensor:
        outputs, targets = batch[0] @ params["slope"], batch[1]
        if kind == "ridge":
            return (outputs - targets).square().mean() / 2
        return F.binary_cross_entropy_with_logits(outputs, (targets > 0).double())

    def decayed_fit(params: Tree, meta: Tree, batch: Batch) -> Tensor:
        return fit(params, meta, batch) + (meta["log decay"].exp() * params["slope"].square()).sum() / 2

    def draw(count: int) -> Batch:
        inputs = normal(count, 8)
        return inputs, inputs @ torch.tensor([2.0, -1.5, 1.0, 0, 0, 0, 0, 0]).double() + normal(count)

    problem = il.Problem(lambda meta: {"slope": torch.zeros(8, dtype=torch.float64)}, decayed_fit, fit)
    return problem, {"log decay": torch.linspace(-1.5, 0, 8, dtype=torch.float64)}, il.Task(draw(20), draw(400))


def closed_form(problem: il.Problem, meta: Tree, task: il.Task, proximal: float = 0.0) -> tuple[Tensor, Tensor]:
    """The solution p, by Newton's method, and the hypergradient there, - decay * p * H^-1 d outer_loss / d p."""

    def objective(slope: Tensor) -> Tensor:
        return problem.inner_loss({"slope": slope}, meta, task.support) + proximal / 2 * slope.square().sum()

    slope = torch.zeros(8, dtype=torch.float64)
    for _ in range(8):
        slope = slope - torch.linalg.solve(torch.func.hessian(objective)(slope), torch.func.grad(objective)(slope))
    outer = torch.func.grad(lambda slope: problem.outer_loss({"slope": slope}, meta, task.query))(slope)
    pull = torch.linalg.solve(torch.func.hessian(objective)(slope), outer)
    return slope, -meta["log decay"].exp() * slope * pull


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
@pytest.mark.parametrize(
    ("estimator", "inner"),
    [
        (il.Unrolled(copies=12), il.SGD(lr=0.5, steps=150)),
        (il.Unrolled(), il.Momentum(lr=0.3, steps=100, momentum=0.6)),
        (Window(5), il.SGD(lr=0.1, steps=750)),
        (Window(2, "true_forward"), il.SGD(lr=0.2, steps=375)),
        (il.Truncated(120), il.SGD(lr=0.5, steps=150)),
        (Implicit(CG(12)), il.SGD(lr=0.5, steps=150)),
        (Implicit(CG(12)), il.SGD(lr=0.5, steps=150, proximal=0.1)),
    ],
    ids=str,
)
def test_weight_decay_has_the_closed_form(kind, estimator, inner):
    """At the solution the path no longer matters: every estimator that goes far enough back finds the closed form."""
    problem, meta, task = regression(kind)
    slope, expected = closed_form(problem, meta, task, inner.proximal)
    found = il.hypergradient(problem, meta, task, inner, estimator)
    torch.testing.assert_close(found.params["slope"], slope, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.grad["log decay"], expected, rtol=1e-7, atol=1e-8)


def test_learned_weight_decay_tells_features_of_use_from_others():
    problem, meta, task = regression("ridge")
    inner = il.SGD(lr=0.1, steps=60)
    learned = learn(meta, lambda meta: il.hypergradient(problem, meta, task, inner, Window(5)).grad, 0.4, 20)
    assert learned["log decay"][:3].mean() < learned["log decay"][3:].mean() - 2

    def outer_loss(meta: Tree) -> float:
        return problem.outer_loss({"slope": closed_form(problem, meta, task)[0]}, meta, task.query).item()

    shared = [outer_loss({"log decay": torch.full((8,), float(level)).double()}) for level in range(-8, 3)]
    assert outer_loss(learned) < min(shared)


# --- what to learn from another network: a feature-matching meta-network ----------------------------------------------


class Transfer:
    """Learning what and where to transfer (arXiv 1905.05901), in small.

    The target network first takes a few steps on a matching loss alone, whose weights a meta-network gives for each
    source channel and as a whole, then one step on its own loss; the outer loss is its own loss after that. So the
    meta-network occurs in no other place than the inner loss. Of the source's six channels the first tells the classes.
    """

    def __init__(self) -> None:
        self.signal, self.noise = normal(6, 1) / 6**0.5, 4 * normal(6, 5)
        self.meta = {
            "what": torch.zeros(6, 6, dtype=torch.float64),
            "where": torch.zeros(6, dtype=torch.float64),
            "bias": torch.ones((), dtype=torch.float64),
        }

    def source(self, inputs: Tensor) -> Tensor:
        return torch.cat([(2 * inputs @ self.signal).tanh(), (inputs @ self.noise).sin()], 1)

    def channels(self, meta: Tree, inputs: Tensor) -> Tensor:
        """The share of each source channel in the matching loss of each input."""
        return (self.source(inputs) @ meta["what"]).softmax(1)

    def hidden(self, params: Tree, inputs: Tensor) -> Tensor:
        return (inputs @ params["in"] + params["bias"]).tanh()

    def task_loss(self, params: Tree, batch: Batch) -> Tensor:
        return F.cross_entropy(self.hidden(params, batch[0]) @ params["out"], batch[1])

    def matching_loss(self, params: Tree, meta: Tree, batch: Batch) -> Tensor:
        source = self.source(batch[0])
        distance = (self.hidden(params, batch[0]) @ params["to source"] - source).square()
        where = F.softplus(source.mean(0) @ meta["where"] + meta["bias"])
        return where * (self.channels(meta, batch[0]) * distance).sum(1).mean()

    def loss_after_a_step(self, params: Tree, meta: Tree, batch: Batch) -> Tensor:
        grad = torch.func.grad(self.task_loss)(params, batch)
        return self.task_loss({name: params[name] - grad[name] for name in params}, batch)

    def draw(self) -> tuple[il.Problem, il.Task]:
        """A new target network and a batch, which both losses read."""
        params = {
            "in": normal(6, 10) / 6**0.5,
            "bias": torch.zeros(10, dtype=torch.float64),
            "out": normal(10, 2) / 10,
            "to source": normal(10, 6) / 10**0.5,
        }
        inputs = normal(64, 6)
        batch = inputs, (self.source(inputs)[:, 0] > 0).long()
        return il.Problem(lambda meta: params, self.matching_loss, self.loss_after_a_step), il.Task(batch, batch)


@pytest.mark.parametrize("estimator", [Window(2), Window(4), Window(4, "true_forward")])
def test_windows_train_what_first_order_leaves_without_a_signal(estimator):
    transfer = Transfer()
    inner = il.Momentum(lr=0.1, steps=8, momentum=0.9, weight_decay=1e-4)
    held_out = [transfer.draw() for _ in range(8)]

    def gradient(meta: Tree, estimator: MetaGradient) -> Tree:
        problem, task = transfer.draw()
        return il.hypergradient(problem, meta, task, inner, estimator).grad

    def loss(meta: Tree) -> float:
        """Of the ordinary eight steps, without windows."""
        losses = [il.hypergradient(problem, meta, task, inner, il.Truncated(1)).loss for problem, task in held_out]
        return torch.stack(losses).mean().item()

    problem, task = held_out[0]
    exact = il.hypergradient(problem, transfer.meta, task, inner).grad
    assert cosine(il.hypergradient(problem, transfer.meta, task, inner, estimator).grad, exact) > 0.9
    with pytest.warns(UserWarning, match="the meta-gradient of what, where, bias is exactly zero"):
        assert all(torch.all(grad == 0) for grad in gradient(transfer.meta, il.FirstOrder()).values())

    learned = learn(transfer.meta, lambda meta: gradient(meta, estimator), 0.1, 40)
    shares = transfer.channels(learned, normal(500, 6)).mean(0)
    assert shares[0] > 1.5 * shares[1:].max()
    assert loss(learned) < loss(transfer.meta) - 0.03
