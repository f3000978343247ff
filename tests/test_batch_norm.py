"""What batch norm does in a task, in each of its three modes, and that its buffers never move."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import innerloop as il
from innerloop.batch_norm import TaskBatchNorm
from innerloop.curvature import curvature
from problems import model_and_batch, relative_error


def with_statistics() -> nn.Module:
    """The table's Conv4 after a few ordinary training passes, so that its running statistics mean something."""
    model, batch = copy.deepcopy(model_and_batch("conv4")[0]), model_and_batch("conv4")[1]
    for images in (*batch.support[0], *batch.query[0]):
        model(3 * images + 1)
    return model


@pytest.mark.parametrize("mode", ["batch", "frozen", "task"])
@pytest.mark.parametrize("adapts", [il.Everything(), il.Head()])
def test_buffers_never_move(mode, adapts):
    model, batch = with_statistics(), model_and_batch("conv4")[1]
    learner = il.MetaLearner(model, adapts, il.SGD(lr=0.1, steps=2), batch_norm=mode).train()
    given, own = ({name: b.clone() for name, b in m.named_buffers()} for m in (model, learner))
    learner.meta_step(batch)
    learner.evaluate(batch)
    learner.evaluate(batch, inductive=True)
    learner.adapt(batch.support[0][0], batch.support[1][0], inductive=True)
    assert given
    assert all(torch.equal(value, given[name]) for name, value in model.named_buffers())
    assert all(torch.equal(value, own[name]) for name, value in learner.named_buffers())


def query_loss(
    mode: str, model: nn.Module, params: dict, support: torch.Tensor, query: torch.Tensor, targets, lr: float
):
    """Two inner steps and the query loss, each mode written out with torch's own layers."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    def run(params: dict, images: torch.Tensor) -> torch.Tensor:
        return functional_call(model, params, (images,))

    for norm in norms:
        norm.train(mode != "frozen")
        if mode != "frozen":
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    for _ in range(2):
        loss = F.cross_entropy(run(params, support), targets)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: p - lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
    if mode != "task":
        return F.cross_entropy(run(params, query), targets)
    # the support set's statistics, gradients through them included, layer by layer
    hidden, reference = query, support
    for block in list(model.children())[:4]:
        prefix = next(name for name, child in model.named_children() if child is block)
        own = {name.removeprefix(prefix + "."): p for name, p in params.items() if name.startswith(prefix + ".")}
        conv = [F.conv2d(x, own["conv.weight"], own["conv.bias"], stride=2, padding=1) for x in (hidden, reference)]
        mean, var = conv[1].mean((0, 2, 3), keepdim=True), conv[1].var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = own["norm.weight"].view(1, -1, 1, 1), own["norm.bias"].view(1, -1, 1, 1)
        hidden, reference = (F.relu((x - mean) / (var + 1e-5).sqrt() * scale + shift) for x in conv)
    return F.cross_entropy(F.linear(hidden.flatten(1), params["head.weight"], params["head.bias"]), targets)


@pytest.mark.parametrize("mode", ["batch", "frozen", "task"])
@pytest.mark.parametrize("record", [None, False])
def test_each_mode_is_what_its_name_says(mode, record):
    model, batch = with_statistics(), model_and_batch("conv4")[1]
    learner = il.MetaLearner(
        model, inner=il.SGD(lr=0.1, steps=2), meta_gradient=il.Unrolled(record=record), batch_norm=mode
    )
    metrics = learner.meta_step(batch)
    meta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    plain = copy.deepcopy(model)
    losses = [
        query_loss(mode, plain, meta, batch.support[0][t], batch.query[0][t], batch.support[1][t], 0.1)
        for t in range(len(batch.support[1]))
    ]
    loss = torch.stack(losses).mean()
    expected = dict(zip(meta, torch.autograd.grad(loss, list(meta.values())), strict=True))
    found = {name: p.grad for name, p in learner.model.named_parameters()}
    assert metrics.loss.item() == pytest.approx(loss.item(), rel=1e-10)
    assert relative_error(found, expected) < 1e-8


@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("settings", [{}, {"record": False}, {"adapts": il.Head()}, {"chunk_size": 1}], ids=str)
def test_every_step_has_its_own_scale_and_shift(settings, weights):
    """MAML++ by hand: row k normalises the support set in step k and the queries after it, and no row adapts."""
    model, batch, steps = model_and_batch("conv4")[0], model_and_batch("conv4")[1], 3
    settings = dict(settings)
    estimator = il.Unrolled(record=settings.pop("record", None))
    learner = il.MetaLearner(
        model, inner=il.SGD(lr=0.1, steps=steps), meta_gradient=estimator, batch_norm="step", **settings
    )
    assert not any("norm" in name for name in learner.adapted)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in learner.model.named_parameters():
            if "norm" in name:
                assert p.shape == (steps, 3)
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    metrics = learner.meta_step(batch, weights)
    found = {name: p.grad for name, p in learner.model.named_parameters()}

    plain = copy.deepcopy(model).train()
    meta = {name: p.detach().clone().requires_grad_() for name, p in learner.model.named_parameters()}

    def loss(params: dict, step: int, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = {name: value[step] if "norm" in name else value for name, value in {**meta, **params}.items()}
        return F.cross_entropy(functional_call(plain, rows, (images,)), targets)

    total = torch.zeros((), dtype=torch.float64)
    for support, labels, query, wanted in zip(*batch.support, *batch.query, strict=True):
        params = {name: meta[name] for name in learner.adapted}
        for step in range(steps):
            grads = torch.autograd.grad(loss(params, step, support, labels), list(params.values()), create_graph=True)
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
            if weight := (weights or [0.0, 0.0, 1.0])[step]:
                total = total + weight * loss(params, step, query, wanted) / len(batch.support[1])
    expected = dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))
    assert metrics.loss.item() == pytest.approx(total.item(), rel=1e-10)
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("inductive", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_what_is_adapted_keeps_the_scales_of_its_last_step(steps, inductive):
    model, batch = model_and_batch("conv4")
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=3), batch_norm="step")
    with torch.no_grad():
        for name, p in learner.model.named_parameters():
            p += 0.2 * torch.randn_like(p) if "norm" in name else 0
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0], steps, inductive)
    expected = learner.evaluate(batch, steps, inductive).outputs[0]
    torch.testing.assert_close(adapted(batch.query[0][0]), expected)
    assert not any(isinstance(module, TaskBatchNorm) for module in adapted.modules())


@pytest.mark.parametrize("estimator", [il.Implicit(), il.Window(2)])
def test_what_shares_steps_is_refused_with_scales_of_their_own(estimator):
    with pytest.raises(ValueError, match="scale and shift of its own"):
        il.MetaLearner(
            model_and_batch("conv4")[0], il.Everything(), il.SGD(lr=0.1, steps=3, proximal=1.0), estimator,
            batch_norm="step",
        )  # fmt: skip


def test_inductive_predictions_do_not_depend_on_the_other_queries():
    model, batch = model_and_batch("conv4")
    learner = il.MetaLearner(model)
    first = torch.utils._pytree.tree_map(lambda value: value[:, :1], batch.query)
    for inductive, independent in ((True, True), (False, False)):
        together = learner.evaluate(batch, inductive=inductive).outputs[:, :1]
        alone = learner.evaluate(batch._replace(query=first), inductive=inductive).outputs
        assert torch.allclose(together, alone) == independent


class Activated(nn.BatchNorm1d):
    """Batch norm and its activation in one layer, as timm has them."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs).relu()


def patched() -> nn.Module:
    norm = nn.BatchNorm1d(5)
    vars(norm)["forward"] = lambda inputs: F.batch_norm(inputs, norm.running_mean, norm.running_var).relu()
    return norm


@pytest.mark.parametrize(
    "norm",
    [
        lambda: Activated(5),
        patched,
        lambda: parametrize.register_parametrization(nn.BatchNorm1d(5), "weight", nn.Tanh()),
    ],
)
def test_a_batch_norm_that_does_more_is_left_alone_or_refused(norm):
    model, batch = nn.Sequential(nn.Linear(6, 5), norm(), nn.Linear(5, 3)).double(), model_and_batch("mlp")[1]
    for mode in ("batch", "task", "step"):
        with pytest.raises(ValueError, match=r"1 is a batch norm with a forward pass or weights of its own"):
            il.MetaLearner(model, batch_norm=mode)
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=1), batch_norm="frozen")
    expected = model.eval()(batch.query[0][0])
    torch.testing.assert_close(learner.evaluate(batch, steps=0).outputs[0], expected)


def test_hooks_of_a_batch_norm_are_kept():
    model, batch = (
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double(),
        model_and_batch("mlp")[1],
    )
    model[1].register_forward_hook(lambda module, inputs, output: output.relu())
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=1))
    torch.testing.assert_close(learner.evaluate(batch, steps=0).outputs[0], model(batch.query[0][0]))
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
    torch.testing.assert_close(learner.evaluate(batch).outputs[0], adapted(batch.query[0][0]))


class Listed(nn.Module):
    """Its forward pass takes its layers from a plain list."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.name = name
        setattr(self, name, [self.first, self.norm, nn.Tanh(), self.head])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in getattr(self, self.name):
            inputs = layer(inputs)
        return inputs


@pytest.mark.parametrize("name", ["layers", "blocks"])
@pytest.mark.parametrize("mode", ["batch", "frozen", "step", "task"])
def test_layers_in_a_plain_list_are_those_of_the_model(name, mode):
    model, batch = Listed(name).double(), model_and_batch("mlp")[1]
    plain = nn.Sequential(*getattr(model, name))
    found = []
    for each in (model, plain):
        learner = il.MetaLearner(each, il.Head(), il.SGD(lr=0.1, steps=2), batch_norm=mode)
        loss = learner.meta_step(batch).loss
        found.append([loss, *(p.grad for p in learner.parameters())])
        adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
        torch.testing.assert_close(learner.evaluate(batch).outputs[0], adapted(batch.query[0][0]))
    torch.testing.assert_close(*found)


class Twice(nn.Module):
    """Uses one batch norm in two places, by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(6, 5),
            nn.BatchNorm1d(5),
            nn.Linear(5, 5),
            nn.Linear(5, 3),
        )
        self.again = self.norm

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.second(self.norm(self.first(inputs)))))


@pytest.mark.parametrize("mode", ["batch", "step"])
def test_a_layer_with_two_names_stays_one(mode):
    model, batch = Twice().double(), model_and_batch("mlp")[1]
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2), batch_norm=mode)
    assert learner.model.norm is learner.model.again
    assert dict(learner.model.named_parameters()).keys() == dict(model.named_parameters()).keys()
    support = batch.support[0][0], batch.support[1][0]
    torch.testing.assert_close(learner.adapt(*support)(batch.query[0][0]), learner.evaluate(batch).outputs[0])
    with pytest.raises(ValueError, match=r"norm is used 2 times in a forward pass, and can keep"):
        learner.adapt(*support, inductive=True)


def test_frozen_statistics_must_exist():
    with pytest.raises(ValueError, match="keeps none"):
        il.MetaLearner(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), batch_norm="frozen"
        )


def test_instance_norm_that_tracks_is_refused():
    with pytest.raises(ValueError, match="track_running_stats=False"):
        il.MetaLearner(nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True)))


def test_batch_norm_after_a_lone_linear_layer_and_without_affine_terms():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)).double()
    batch = model_and_batch("mlp")[1]
    learner = il.MetaLearner(model)
    assert learner.meta_step(batch).loss.isfinite()
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0], inductive=True)
    expected = learner.evaluate(batch, inductive=True).outputs[0]
    torch.testing.assert_close(adapted(batch.query[0][0]), expected)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(5, track_running_stats=False), nn.LayerNorm(5), nn.GroupNorm(1, 5), nn.InstanceNorm1d(5)],
    ids=lambda norm: type(norm).__name__,
)
def test_curvature_through_native_norms_is_right(norm):
    """Stands guard over the order of differentiation: other orders are silently wrong here (pytorch issue 196699)."""
    model = nn.Sequential(
        nn.Conv1d(2, 5, 3), *([] if isinstance(norm, nn.LayerNorm) else [norm]), nn.Tanh(), nn.Flatten()
    )
    model = nn.Sequential(
        *model,
        *(
            [nn.LazyLinear(5), norm, nn.Tanh(), nn.Linear(5, 1)]
            if isinstance(norm, nn.LayerNorm)
            else [nn.LazyLinear(1)]
        ),
    )
    inputs = torch.randn(6, 2, 7, dtype=torch.float64)
    model = model.double()
    model(inputs)
    params = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(params: dict, meta: dict, batch: torch.Tensor) -> torch.Tensor:
        return (functional_call(model, params, (batch * meta["scale"],)) ** 3).mean()

    meta = {"scale": torch.tensor(1.3, dtype=torch.float64)}
    hessian_part, mixed_part = curvature(il.Problem(lambda m: m, loss, loss), params, meta, inputs, direction)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    scale = meta["scale"].clone().requires_grad_()
    grads = torch.autograd.grad(loss(leaves, {"scale": scale}, inputs), list(leaves.values()), create_graph=True)
    dot = sum((g * direction[name]).sum() for name, g in zip(leaves, grads, strict=True))
    expected = torch.autograd.grad(dot, [*leaves.values(), scale])
    assert relative_error(hessian_part, dict(zip(leaves, expected[:-1], strict=True))) < 1e-12
    torch.testing.assert_close(mixed_part["scale"], expected[-1])
