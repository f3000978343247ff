"""ANIL and its theory (arXiv 1909.09157, 2006.09486): both parts of the meta-gradient, and both geometries."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import innerloop as il
from innerloop.problem import Tree
from innerloop.training.build import build_learner
from innerloop.training.settings import Settings
from problems import model_and_batch, relative_error

LR = 0.2
Example = tuple[il.Problem, Tree, il.Task]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadratic() -> Example:
    """A head with curvatures 0.5 to 4, whose pull the backbone sets; squares outside, which see both."""
    basis = torch.linalg.qr(draw(6, 6, seed=1)).Q
    matrix = basis @ torch.linspace(0.5, 4, 6, dtype=torch.float64).diag() @ basis.T
    mixed, outer, direct = draw(6, 4, seed=2), draw(6, 6, seed=3), draw(6, 4, seed=4)

    def inner_loss(params: Tree, meta: Tree, support: Tensor) -> Tensor:
        # cubic in the backbone, so that its mixed derivative is not constant
        return params["head"] @ matrix @ params["head"] / 2 - (mixed @ meta["body"] ** 3 + support) @ params["head"]

    def outer_loss(params: Tree, meta: Tree, query: Tensor) -> Tensor:
        return (outer @ params["head"] + direct @ meta["body"] - query).square().sum() / 2

    meta = {"head": draw(6, seed=5), "body": draw(4, seed=6)}
    return il.Problem(head, inner_loss, outer_loss), meta, il.Task(draw(6, seed=7), draw(6, seed=8))


def softmax(l2: float = 0.0, features: int = 4) -> Example:
    """A softmax head on tanh features of nine examples, with an L2 term in the inner loss."""

    def outer_loss(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(torch.tanh(batch[0] @ meta["body"].T) @ params["head"].T, batch[1])

    def inner_loss(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return outer_loss(params, meta, batch) + l2 / 2 * params["head"].square().sum()

    labels = torch.arange(3).repeat_interleave(3)
    meta = {"head": draw(3, features, seed=1), "body": draw(features, 5, seed=2) / 2}
    task = il.Task((draw(9, 5, seed=3), labels), (draw(9, 5, seed=4), labels))
    return il.Problem(head, inner_loss, outer_loss), meta, task


def head(meta: Tree) -> Tree:
    return {"head": meta["head"]}


def adapted(example: Example, lr: float, steps: int) -> list[Tree]:
    """The head before each step and at the end, by the formula of gradient descent."""
    problem, meta, task = example
    places = [head(meta)]
    for _ in range(steps):
        grad = torch.func.grad(problem.inner_loss)(places[-1], meta, task.support)
        places.append({"head": places[-1]["head"] - lr * grad["head"]})
    return places


def flat_hessian(problem: il.Problem, params: Tree, meta: Tree, task: il.Task) -> Tensor:
    shape = params["head"].shape

    def loss(vector: Tensor) -> Tensor:
        return problem.inner_loss({"head": vector.view(shape)}, meta, task.support)

    return torch.func.hessian(loss)(params["head"].flatten())


# --- both parts of the meta-gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("build", [quadratic, softmax])
def test_both_parts_are_central_differences_of_the_loss_after_adaptation(build, steps):
    problem, meta, task = build()
    found = il.hypergradient(problem, meta, task, il.SGD(lr=LR, steps=steps)).grad
    width = 1e-5
    for name, value in meta.items():
        differences = torch.zeros_like(value)
        for place in itertools.product(*map(range, value.shape)):
            ahead, behind = (value.clone() for _ in range(2))
            ahead[place] += width
            behind[place] -= width
            losses = []
            for moved in (ahead, behind):
                shifted = {**meta, name: moved}
                end = adapted((problem, shifted, task), LR, steps)[-1]
                losses.append(problem.outer_loss(end, shifted, task.query))
            differences[place] = (losses[0] - losses[1]) / (2 * width)
        assert relative_error({name: found[name]}, {name: differences}) < 1e-6


@pytest.mark.parametrize("build", [quadratic, softmax])
def test_without_adaptation_both_parts_are_those_of_the_query_loss(build):
    problem, meta, task = build()
    # no learner takes zero steps, and a step that moves nothing is the same
    found = il.hypergradient(problem, meta, task, il.SGD(lr=1e-200, steps=1))
    in_head, in_body = torch.func.grad(problem.outer_loss, argnums=(0, 1))(head(meta), meta, task.query)
    assert torch.equal(found.params["head"], meta["head"])
    assert torch.equal(found.grad["head"], in_head["head"])
    assert torch.equal(found.grad["body"], in_body["body"])


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("build", [quadratic, softmax])
def test_the_backbone_is_reached_directly_and_through_the_head(build, steps):
    """dL/dphi = grad_phi L_D - lr sum_m M_m prod_{j>m} (I - lr H_j) g, and both of its terms matter."""
    problem, meta, task = build()
    places = adapted((problem, meta, task), LR, steps)
    outer, direct = torch.func.grad(problem.outer_loss, argnums=(0, 1))(places[-1], meta, task.query)
    u, through = outer["head"].flatten(), torch.zeros_like(meta["body"])
    for place in reversed(places[:-1]):

        def pairing(body: Tensor, place: Tree = place, u: Tensor = u) -> Tensor:
            grad = torch.func.grad(problem.inner_loss)(place, {**meta, "body": body}, task.support)
            return grad["head"].flatten() @ u

        through = through - LR * torch.func.grad(pairing)(meta["body"])
        u = u - LR * flat_hessian(problem, place, meta, task) @ u
    found = il.hypergradient(problem, meta, task, il.SGD(lr=LR, steps=steps)).grad
    assert relative_error(found, {"head": u.view_as(meta["head"]), "body": direct["body"] + through}) < 1e-12
    assert min(direct["body"].norm(), through.norm()) > 0.05 * found["body"].norm()
    first_order = il.hypergradient(problem, meta, task, il.SGD(lr=LR, steps=steps), il.FirstOrder()).grad
    assert relative_error(first_order, {"head": outer["head"], "body": direct["body"]}) < 1e-12


# --- the strongly convex geometry: a last layer with an L2 term ---------------------------------------------------


def test_the_weight_decay_of_the_inner_solver_is_the_squared_l2_term():
    problem, meta, task = softmax()
    decayed = il.hypergradient(problem, meta, task, il.SGD(lr=LR, steps=6, weight_decay=0.3))
    written_out = il.hypergradient(*softmax(l2=0.3), il.SGD(lr=LR, steps=6))
    assert relative_error(decayed.grad, written_out.grad) < 1e-13
    assert relative_error(decayed.params, written_out.params) < 1e-14


def test_the_l2_term_bounds_the_curvature_from_below():
    for l2, place in itertools.product((0.0, 0.3), adapted(softmax(l2=0.3, features=16), LR, 10)):
        least = torch.linalg.eigvalsh(flat_hessian(softmax(l2, 16)[0], place, *softmax(l2, 16)[1:])).min()
        assert least == pytest.approx(l2, abs=1e-12)  # nine examples leave directions that only the term curves


def test_the_gradient_of_the_start_shrinks_by_one_minus_step_times_least_curvature():
    def norm(steps: int) -> float:
        return float(il.hypergradient(*softmax(l2=0.3, features=32), il.SGD(lr=0.5, steps=steps)).grad["head"].norm())

    norms = [norm(steps) for steps in (40, 60, 80)]
    rates = [(after / before) ** (1 / 20) for before, after in itertools.pairwise(norms)]
    assert rates == pytest.approx([1 - 0.5 * 0.3] * 2, abs=1e-3)


# --- the nonconvex geometry: a head of two layers -----------------------------------------------------------------


def two_layers(scale: float = 0.02) -> Example:
    """Two layers with a ReLU between, near the saddle where both are zero."""
    labels = torch.arange(3).repeat_interleave(3)
    meta = {"first": scale * draw(8, 4, seed=1), "second": scale * draw(3, 8, seed=2), "body": draw(4, 5, seed=3) / 2}

    def loss(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        features = torch.tanh(batch[0] @ meta["body"].T)
        return F.cross_entropy(torch.relu(features @ params["first"].T) @ params["second"].T, batch[1])

    task = il.Task((draw(9, 5, seed=4), labels), (draw(9, 5, seed=5), labels))
    return il.Problem(lambda meta: {name: meta[name] for name in ("first", "second")}, loss, loss), meta, task


def test_a_nonconvex_head_wants_a_rate_that_falls_with_the_number_of_steps():
    def norm(lr: float, steps: int) -> float:
        grad = il.hypergradient(*two_layers(), il.SGD(lr=lr, steps=steps)).grad
        return float(torch.stack([grad[name].norm() for name in ("first", "second")]).norm())

    fixed = [norm(1.0, steps) for steps in (1, 5, 10, 20, 30)]
    assert all(after > before for before, after in itertools.pairwise(fixed))
    assert fixed[-1] > 100 * fixed[0]
    assert [norm(1.0 / steps, steps) for steps in (5, 10, 20, 30)] == pytest.approx([fixed[0]] * 4, rel=0.1)


# --- both geometries, and what is learned, by settings ------------------------------------------------------------


def least_curvature(learner: il.MetaLearner, task: il.Task) -> float:
    """Of the inner problem with its L2 term, at the start; reverse over reverse, which batch norm needs."""
    start = {name: learner.model.get_parameter(name).detach() for name in learner.adapted}
    sizes = [value.numel() for value in start.values()]

    def loss(vector: Tensor) -> Tensor:
        parts = zip(start.items(), vector.split(sizes), strict=True)
        params = {name: part.view(value.shape) for (name, value), part in parts}
        return F.cross_entropy(functional_call(learner.model, params, (task.support[0],)), task.support[1])

    matrix = torch.func.jacrev(torch.func.grad(loss))(torch.cat([value.flatten() for value in start.values()]))
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).min().item() + learner.inner.weight_decay


@pytest.mark.parametrize(
    ("given", "convex"),
    [
        ({"adapts": "head", "weight_decay": "0.05"}, True),
        ({"adapts": "blocks:00011"}, False),
        ({"adapts": "named:block4.*,head.*"}, False),
    ],
)
def test_both_geometries_can_be_set(given, convex):
    settings = Settings(inner="sgd", filters=2, precision="float64", device="cpu", **given)
    learner = build_learner(settings, (1, 28, 28), 5)
    labels = torch.arange(5).repeat(2)
    inputs = draw(10, 1, 28, 28, seed=1)
    least = least_curvature(learner, il.Task((inputs, labels), (inputs, labels)))
    assert (least >= 0.05 - 1e-12) if convex else (least < -1e-3)


MODES: dict[str, tuple[dict[str, str], Callable[[str], bool], Callable[[str], bool]]] = {
    "maml": ({"adapts": "everything"}, lambda name: True, lambda name: True),
    "anil": ({"adapts": "head"}, lambda name: name.startswith("head."), lambda name: True),
    "itd-bio": (
        {"adapts": "head", "meta_gradient": "unrolled:learn_start=false"},
        lambda name: name.startswith("head."),
        lambda name: not name.startswith("head."),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_adapts_and_what_is_learned(mode):
    given, adapts, learns = MODES[mode]
    settings = Settings(inner="sgd", start="none", filters=3, precision="float64", device="cpu", **given)
    learner = build_learner(settings, (1, 28, 28), 3)
    batch = model_and_batch("conv4")[1]
    # a convolution's bias cancels in batch norm: rounding alone decides whether it moves
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters() if not n.endswith("conv.bias")}
    own = learner.adapt(batch.support[0][0], batch.support[1][0])
    for name, value in before.items():
        assert torch.equal(own.get_parameter(name), value) != adapts(name)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.01)  # its weight decay would move what is to stay
    for _ in range(2):
        optimizer.zero_grad()
        learner.meta_step(batch)
        optimizer.step()
    for name, value in before.items():
        assert torch.equal(learner.model.get_parameter(name), value) != learns(name)
