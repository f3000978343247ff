"""Two bilevel problems whose true gradient is known, on which Algorithm 1 should converge as its theorems say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

import innerloop as il
from innerloop.tasks import TaskSource

Tree = dict[str, Tensor]
EVERY = 10  # outer steps between the thetas that are kept


class Case(Protocol):
    """A problem in ``theta``, one tensor; its head starts at the same place for every task."""

    problem: il.Problem
    theta: Tensor
    l2: float
    newton: il.NewtonCG
    "solves the inner problem to rounding"

    def draw(self, replicas: int, batch: int, step: int) -> il.Task:
        """Random tasks, ``[replicas, batch, ...]``."""
        ...

    def expected_gradient(self, theta: Tensor) -> Tensor:
        """True gradient of the mean over all tasks that `draw` draws from, ``[replicas, ...]``."""
        ...


def exact_gradient(case: Case, theta: Tensor, task: il.Task, iterations: int = 30) -> Tensor:
    """The gradient of one task with both of its problems solved."""
    estimator = il.MemoryReduced(il.CG(iterations))
    return il.hypergradient(case.problem, {"theta": theta}, task, case.newton, estimator).grad["theta"]


def descend(case: Case, tasks: il.Task, inner: il.SGD, iterations: int, warm: bool, steps: int, rate: float) -> Tensor:
    """Theta every `EVERY` steps, while the same tasks recur in every batch."""
    learner = il.Bilevel(
        case.problem, {"theta": case.theta}, inner, il.MemoryReduced(il.CG(iterations)),
        carry="slot" if warm else "none", stacked=True, chunk_size=len(torch.utils._pytree.tree_leaves(tasks)[0]),
    )  # fmt: skip
    optimizer, passed = torch.optim.SGD(learner.parameters(), lr=rate), []
    for step in range(steps + 1):
        if step % EVERY == 0:
            passed.append(learner.meta_tree()["theta"].clone())
        optimizer.zero_grad()
        learner.meta_step(tasks)
        optimizer.step()
    return torch.stack(passed)


def plateau(case: Case, batch: int, replicas: int, steps: int, rate: float, every: int = 1) -> float:
    """Mean squared norm of the true gradient in the second half of training on random batches."""
    over_batch = vmap(lambda theta, task: exact_gradient(case, theta, task), (None, 0))
    theta, squares = case.theta.expand(replicas, *case.theta.shape), []
    for step in range(steps):
        theta = theta - rate * vmap(over_batch)(theta, case.draw(replicas, batch, step)).mean(1)
        if step >= steps // 2 and step % every == 0:
            squares.append(case.expected_gradient(theta).flatten(1).square().sum(1).mean())
    return float(torch.stack(squares).mean())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Quadratic:
    """``head'H head / 2 - (J theta + c)'head`` inside, ``|D head + E theta - e|^2 / 2`` outside; c and e are the task.

    H's eigenvalues go from 0.5 to 8. The true gradient of the mean over tasks is linear in theta.
    """

    l2 = 0.0

    def __init__(self, heads: int, thetas: int) -> None:
        basis = torch.linalg.qr(normal(heads, heads, seed=0)).Q
        self.matrix = basis @ torch.linspace(0.5, 8, heads).double().diag() @ basis.T
        self.mixed, self.direct = normal(heads, thetas, seed=1), normal(heads, thetas, seed=2) / 4
        self.outer_matrix = normal(heads, heads, seed=3) / heads**0.5
        head = normal(heads, seed=5)
        self.problem = il.Problem(lambda meta: {"head": head}, self.inner_loss, self.outer_loss)
        self.theta = normal(thetas, seed=4)
        self.newton = il.NewtonCG(steps=1, iterations=heads, trials=1)

    def tasks(self, *shape: int, seed: int = 6) -> il.Task:
        return il.Task(*normal(2, *shape, len(self.matrix), seed=seed))

    def draw(self, replicas: int, batch: int, step: int) -> il.Task:
        return self.tasks(replicas, batch, seed=step)

    def inner_loss(self, params: Tree, meta: Tree, support: Tensor) -> Tensor:
        head = params["head"]
        return head @ self.matrix @ head / 2 - (self.mixed @ meta["theta"] + support) @ head

    def outer_loss(self, params: Tree, meta: Tree, query: Tensor) -> Tensor:
        return (self.outer_matrix @ params["head"] + self.direct @ meta["theta"] - query).square().sum() / 2

    @property
    def response(self) -> Tensor:
        """How the outer residual at the inner solution moves with theta."""
        return self.outer_matrix @ torch.linalg.solve(self.matrix, self.mixed) + self.direct

    @property
    def curvature(self) -> Tensor:
        """The Hessian of the true outer objective."""
        return self.response.T @ self.response

    def gradient(self, theta: Tensor, task: il.Task) -> Tensor:
        """The true gradient, mean over the given tasks, for one theta or several, ``[..., thetas]``."""
        shift = torch.linalg.solve(self.matrix, task.support.T).T @ self.outer_matrix.T - task.query
        return theta @ self.curvature + (shift @ self.response).mean(0)

    def expected_gradient(self, theta: Tensor) -> Tensor:
        return theta @ self.curvature  # the tasks have mean zero


class Heads:
    """Softmax heads with an L2 term on ``tanh(inputs @ theta)``, and a little L2 on theta outside, for real tasks.

    Inputs are the leading principal components of the images, so that the problem is small enough to be solved to
    rounding in every step. Without the term on theta no theta need be stationary.
    """

    l2, theta_l2 = 0.05, 0.01

    def __init__(self, source: TaskSource, count: int, inputs: int, features: int) -> None:
        self.pool = components(source.batch("train", 0, count), inputs)
        head = torch.zeros(features + 1, source.output_size, dtype=torch.float64)
        self.problem = il.Problem(lambda meta: {"head": head}, self.loss, self.outer_loss)
        self.theta = normal(inputs, features, seed=0) / inputs**0.5
        self.newton = il.NewtonCG(steps=6, iterations=20, weight_decay=self.l2)

    def loss(self, params: Tree, meta: Tree, examples: tuple[Tensor, Tensor]) -> Tensor:
        features = F.pad((examples[0] @ meta["theta"]).tanh(), (0, 1), value=1.0)
        return F.cross_entropy(features @ params["head"], examples[1])

    def outer_loss(self, params: Tree, meta: Tree, examples: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(params, meta, examples) + self.theta_l2 / 2 * meta["theta"].square().sum()

    def chosen(self, places: Tensor) -> il.Task:
        return torch.utils._pytree.tree_map(lambda part: part[places], self.pool)

    def draw(self, replicas: int, batch: int, step: int) -> il.Task:
        generator = torch.Generator().manual_seed(step)
        return self.chosen(torch.randint(len(self.pool.support[0]), (replicas, batch), generator=generator))

    def gradient(self, theta: Tensor, task: il.Task) -> Tensor:
        """The true gradient, mean over the given tasks, for several thetas, ``[replicas, inputs, features]``."""
        one: Callable[[Tensor, il.Task], Tensor] = vmap(
            lambda theta, task: exact_gradient(self, theta, task), (None, 0)
        )
        return vmap(one, (0, None))(theta, task).mean(1)

    def expected_gradient(self, theta: Tensor) -> Tensor:
        return self.gradient(theta, self.pool)


def components(tasks: il.Task, count: int) -> il.Task:
    """Images as so many principal components of variance one, in float64."""
    small = [F.avg_pool2d(images.flatten(0, 1), 4).flatten(1).double() for images, _ in tasks]
    mean = small[0].mean(0)
    _, _, basis = torch.linalg.svd(small[0] - mean, full_matrices=False)
    scale = ((small[0] - mean) @ basis[:count].T).std(0)
    parts = [((part - mean) @ basis[:count].T / scale).reshape(*labels.shape, count)
             for part, (_, labels) in zip(small, tasks, strict=True)]  # fmt: skip
    return il.Task(*((part, labels) for part, (_, labels) in zip(parts, tasks, strict=True)))
