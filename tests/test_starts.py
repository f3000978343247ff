"""Starts that make the head: the exact gradient of every method that has one, against plain autograd, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import innerloop as il
from innerloop.problem import Task
from problems import relative_error

WAYS, WIDTH = 3, 6


def model() -> nn.Sequential:
    layers = {"first": nn.Linear(4, 8), "norm": nn.BatchNorm1d(8), "act": nn.Tanh(), "body": nn.Linear(8, WIDTH)}
    net = nn.Sequential()
    for name, layer in {**layers, "last": nn.Tanh(), "head": nn.Linear(WIDTH, WAYS)}.items():
        net.add_module(name, layer)
    return net.double()


def tasks() -> Task:
    labels = torch.arange(WAYS).repeat_interleave(2)
    support, query = torch.randn(2, 2, 6, 4).double()
    return Task((support, torch.stack([labels, labels.flip(0)])), (query, labels.expand(2, -1)))


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, WAYS).double()


def distances(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    means = torch.stack([f[y == way].mean(0) for way in range(WAYS)])
    return 2 * means, -means.square().sum(1)


def cosines(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    means = torch.stack([f[y == way].mean(0) for way in range(WAYS)])
    return 7 * means / means.norm(dim=1, keepdim=True) / f.norm(dim=1).mean(), torch.zeros(
        WAYS
    ).double().requires_grad_()


def ridge(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The normal equations of the width, in place of the library's of the examples."""
    x, z = f - f.mean(0), one_hot(y) - one_hot(y).mean(0)
    penalty = 0.3 * x.square().sum() / len(x)
    weight = torch.linalg.inv(x.T @ x + penalty * torch.eye(WIDTH).double()) @ x.T @ z
    return 4 * weight.T, 4 * (one_hot(y).mean(0) - f.mean(0) @ weight)


STARTS = {
    "prototypes": (il.Prototypes(), distances),
    "cosine": (il.Prototypes(cosine=True, scale=7.0), cosines),
    "ridge": (il.Ridge(0.3, 4.0), ridge),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("steps", "estimator", "adapts", "chunk"),
    [
        (0, il.Unrolled(), il.Head(), None),
        (0, il.FirstOrder(), il.Everything(), 1),
        (0, il.Unrolled(record=True), il.Head(), 1),
        (0, il.Truncated(2), il.Everything(), 2),
        (2, il.Unrolled(), il.Head(), None),
        (2, il.Unrolled(record=False), il.Everything(), 1),
    ],
)
def test_the_gradient_through_a_start_is_plain_autograd(start, steps, estimator, adapts, chunk):
    chosen, by_hand = STARTS[start]
    batch, net = tasks(), model()
    learner = il.MetaLearner(net, adapts, il.SGD(lr=0.1, steps=steps), estimator, start=chosen, chunk_size=chunk)
    metrics = learner.meta_step(batch)
    meta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    plain = nn.Sequential(*net)  # batch norm of torch's own, in training: the batch's statistics
    names = dict(zip(dict(plain.named_parameters()), meta, strict=True))

    def run(upto: int, params: dict[str, Tensor], x: Tensor) -> Tensor:
        given = {mine: params[name] for mine, name in names.items() if int(mine[0]) < upto}
        return functional_call(plain[:upto], given, (x,))

    total = torch.zeros(()).double()
    for place in range(2):
        (x, y), (a, b) = ((u[place], v[place]) for u, v in batch)
        weight, bias = by_hand(run(5, meta, x), y)
        params = {name: meta[name] for name in learner.adapted} | {"head.weight": weight, "head.bias": bias}
        for _ in range(steps):
            params = {name: p.view_as(p) for name, p in params.items()}
            grads = torch.autograd.grad(
                F.cross_entropy(run(6, {**meta, **params}, x), y), list(params.values()), create_graph=True
            )
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        total = total + F.cross_entropy(run(6, {**meta, **params}, a), b) / 2
    found = {name: p.grad for name, p in learner.model.named_parameters() if not name.startswith("head")}
    expected = dict(zip(found, torch.autograd.grad(total, [meta[name] for name in found]), strict=True))
    assert relative_error(found, expected) < 1e-10
    torch.testing.assert_close(metrics.loss, total.detach(), rtol=1e-10, atol=0)
    assert learner.model.get_parameter("head.weight").grad is None


@pytest.mark.parametrize("start", [il.Prototypes(cosine=True), il.Ridge()])
def test_a_start_takes_any_number_of_ways_and_adapts_without_a_step(start):
    learner = il.MetaLearner(model(), il.Head(), il.SGD(lr=0.1, steps=0), start=start)
    labels, inputs = torch.arange(5).repeat(2), torch.randn(10, 4).double()
    adapted = learner.adapt(inputs, labels)
    assert adapted.head.out_features == 5
    found = learner.evaluate([Task((inputs, labels), (inputs, labels))], curve=True)
    torch.testing.assert_close(adapted(inputs), found.outputs[0])
    assert found.loss_curve.shape == (1, 1)


def test_rates_of_single_entries_need_as_many_classes_as_the_head_has():
    learner = il.MetaLearner(model(), il.Head(), il.LearnedRates(lr=0.1, steps=2), start=il.Prototypes())
    learner.meta_step(tasks())
    labels, inputs = torch.arange(4).repeat(2), torch.randn(8, 4).double()
    for call in (
        lambda: learner.adapt(inputs, labels),
        lambda: learner.evaluate([Task((inputs, labels), (inputs, labels))]),
    ):
        with pytest.raises(ValueError, match=r"\(3, 6\) rates for head.weight.* as \(4, 6\): use per='layer-step'"):
            call()


def test_cosine_means_rank_as_the_cosine_does():
    f, y, queries = torch.randn(6, WIDTH), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(9, WIDTH)
    weight, bias = il.Prototypes(cosine=True).head(f, y, 3)
    means = torch.stack([f[y == way].mean(0) for way in range(3)])
    cosine = F.cosine_similarity(queries[:, None], means, dim=-1)
    assert torch.equal((queries @ weight.T + bias).argmax(1), cosine.argmax(1))


def test_ridge_is_solved_in_float32_under_autocast():
    f, y = torch.randn(6, WIDTH), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = il.Ridge().head(f.bfloat16().float(), y, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = il.Ridge().head(f.bfloat16(), y, 3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (lambda: il.MetaLearner(model(), inner=il.SGD(lr=0.1, steps=0)), "such as start=Prototypes"),
        (lambda: il.MetaLearner(model(), il.Head(), il.SGD(lr=0.1, steps=0), il.Window(2), start="ridge"), "Unrolled"),
        (lambda: il.MetaLearner(model(), il.Head(), il.SGD(lr=0.1, steps=0), "implicit", start="ridge"), "Unrolled"),
        (lambda: il.LearnedRates(lr=0.1, steps=0), "1 step or more"),
        (lambda: il.Ridge(regularisation=0.0), "above 0"),
        (lambda: il.Prototypes(scale=-1.0), "above 0"),
        (lambda: il.MetaLearner(model(), il.Body(), start=il.Ridge()), r"Ridge\(\) sets weight and bias"),
    ],
)
def test_what_does_not_go_together_is_refused(make, cure):
    with pytest.raises(ValueError, match=cure):
        make()


# Supervised pretraining, which has no inner loop in training.


def images(classes: int = 8, each: int = 6) -> il.tasks.Episodes:
    """Classes of nearly constant grey: the first splits into training classes, the others are new."""
    level = torch.arange(classes).repeat_interleave(each) * (200 // classes) + torch.randint(9, (classes * each,))
    splits = {"train": tuple(range(classes - 3)), "validation": (classes - 3,), "test": (classes - 2, classes - 1)}
    pixels = level.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    names = tuple(map(str, range(classes)))
    return il.tasks.Episodes(il.tasks.ImageSet("greys", pixels, (each,) * classes, names, splits), 1, 2, 3)


def supervised(outputs: int) -> il.MetaLearner:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))
    return il.MetaLearner(
        net, il.Head(), il.SGD(lr=0.1, steps=0), il.Supervised(), batch_norm="frozen", start="prototypes:cosine=true"
    )


def test_a_supervised_step_is_plain_classification_of_the_whole_batch():
    source = images().single_images()
    batch, learner = source.batch("train", 0, 4), supervised(source.output_size)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    plain.load_state_dict(learner.model.state_dict())
    metrics = learner.meta_step(batch)
    x, y = (torch.cat([batch.support[part].flatten(0, 1), batch.query[part].flatten(0, 1)]) for part in (0, 1))
    loss = F.cross_entropy(plain(x), y)
    loss.backward()
    torch.testing.assert_close(metrics.loss, loss.detach())
    for one, other in zip(learner.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    norm = learner.model[2]
    torch.testing.assert_close(norm.running_mean, plain[2].running_mean)  # kept for evaluation
    assert not norm.training
    assert learner.diagnose(batch) is None


def test_fit_trains_on_single_images_and_judges_by_tasks():
    source = images()
    learner = supervised(source.single_images().output_size)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.03)
    losses = []
    il.fit(
        learner, source, steps=60, tasks_per_batch=4, optimizer=optimizer, validate_every=60, validation_tasks=2,
        progress=False, log=lambda record: losses.append((record["kind"], record["loss"])),
    )  # fmt: skip
    train = [loss for kind, loss in losses if kind == "train"]
    assert train[-1] < 0.7 * train[0]
    assert [kind for kind, _ in losses].count("validation") == 1


def test_supervised_refuses_what_it_cannot_learn_from():
    narrow = supervised(3)
    with pytest.raises(ValueError, match=r"the model gives 3 scores, and there is a training class 4"):
        narrow.meta_step(images().single_images().batch("train", 0, 4))
    with pytest.raises(ValueError, match="single images"):
        il.fit(narrow, il.tasks.sinusoid(), steps=1, progress=False)
    with pytest.raises(ValueError, match="takes no inner step"):
        il.check(narrow, images())
