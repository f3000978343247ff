"""Products block by block and by differences, against those of plain autograd; and what memory they take."""

import copy
import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop as il
from innerloop.batch_norm import BatchNormMode
from innerloop.blockwise import Blockwise
from innerloop.curvature import curvature, gradient, judged, second_order_kernels
from innerloop.differences import Differences
from innerloop.inner import InnerLoop
from innerloop.meta_gradient import MetaGradient
from innerloop.problem import Problem, Stage, Tree
from problems import MODELS, SOLVERS, WAYS, every_pair, model_and_batch, relative_error, subset

benchmark: Any = importlib.import_module("transformer")
CHAINS = [name for name in MODELS if name != "gru"]
SUBSETS = ("everything", "head", "body", "pattern")
MODES: tuple[BatchNormMode, ...] = ("batch", "task", "frozen")


def gradients(learner: il.MetaLearner, batch: Any, **settings: Any) -> tuple[Tree, Tensor]:
    learner.zero_grad()
    torch.manual_seed(5)
    metrics = learner.meta_step(batch, **settings)
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}, metrics.loss


def pair(model: nn.Module, *args: Any, **settings: Any) -> tuple[il.MetaLearner, il.MetaLearner]:
    """The same learner by blocks and by autograd, neither of which keeps a graph."""
    ways: tuple[Any, Any] = ("blocks", "autograd")
    blocks, plain = (il.MetaLearner(model, *args, memory=0, products=way, **settings) for way in ways)
    return blocks, plain


def lone(batch: il.Task) -> il.Task:
    return il.Task(*((inputs[0], targets[0]) for inputs, targets in batch))


def point(loop: InnerLoop) -> tuple[Tree, Tree]:
    """Somewhere off the start, and a direction."""
    generator = torch.Generator().manual_seed(3)
    params, direction = (
        {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in loop.begin.params.items()}
        for _ in range(2)
    )
    return {name: p + 0.1 * params[name] for name, p in loop.begin.params.items()}, direction


def has_parts(model: str, chosen: str, *_: Any) -> bool:
    """The linear model is all head."""
    return model != "linear" or chosen not in ("head", "body")


@pytest.mark.parametrize(
    ("model", "chosen", "mode", "reuse"), every_pair(CHAINS, SUBSETS, MODES, (True, False), allowed=has_parts)
)
def test_gradients_and_products_are_autograd(model, chosen, mode, reuse):
    built, batch = model_and_batch(model)
    settings: dict[str, Any] = {"batch_norm": mode, "reuse_prefix": reuse}
    learner = il.MetaLearner(built, subset(model, chosen), il.SGD(lr=0.1, steps=2), **settings)
    with torch.no_grad(), second_order_kernels():
        loop, query = learner.loop(lone(batch))
        params, direction = point(loop)
        blocks = replace(loop.problem, engine=Blockwise())
        found, expected = (
            (
                *gradient(problem, params, loop.meta, loop.support, 1),
                *curvature(problem, params, loop.meta, loop.support, direction, 1),
                *judged(problem, params, loop.meta, query),
            )
            for problem in (blocks, loop.problem)
        )
    assert found[2].keys() == params.keys()
    assert found[3].keys() == loop.meta.keys()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("model", "chosen", "solver"), every_pair(CHAINS, SUBSETS, SOLVERS, allowed=has_parts))
def test_meta_gradient_is_that_of_autograd(model, chosen, solver):
    built, batch = model_and_batch(model)
    blocks, plain = pair(built, subset(model, chosen), SOLVERS[solver](2))
    (found, loss), (expected, expected_loss) = gradients(blocks, batch), gradients(plain, batch)
    assert blocks.way is not None
    assert blocks.way.engine == Blockwise()
    assert relative_error(found, expected) < 1e-10
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)


ESTIMATORS: dict[str, tuple[MetaGradient, dict[str, float]]] = {
    "first order": (il.FirstOrder(), {}),
    "truncated": (il.Truncated(1), {}),
    "window": (il.Window(2), {}),
    "binomial": (il.Binomial(1), {}),
    "copies": (il.Unrolled(copies=2), {}),
    "implicit": (il.Implicit(il.CG(3)), {"proximal": 2.0}),
    "nystrom": (il.Implicit(il.Nystrom(3)), {"proximal": 2.0}),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_estimator_knows(estimator):
    built, batch = model_and_batch("encoder")
    how, terms = ESTIMATORS[estimator]
    blocks, plain = pair(built, None, il.SGD(lr=0.1, steps=3, **terms), how)
    assert relative_error(gradients(blocks, batch)[0], gradients(plain, batch)[0]) < 1e-10


def test_multi_step_loss_and_a_table_of_moves():
    built, batch = model_and_batch("mlp")
    blocks, plain = pair(built, il.Blocks(["001", "011", "111"]), il.Momentum(lr=0.1, steps=3))
    weights = {"step_weights": [0.2, 0.3, 0.5]}
    assert relative_error(gradients(blocks, batch, **weights)[0], gradients(plain, batch, **weights)[0]) < 1e-10


@pytest.mark.parametrize("chosen", ["everything", "head"])
def test_a_batch_for_every_step(chosen):
    built, _ = model_and_batch("mlp")
    generator = torch.Generator().manual_seed(1)
    inputs, query = torch.randn(2, 2, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(6).expand(2, 3, 6) % WAYS
    batch = il.Task(il.Steps((inputs, labels)), (query[:, 0], labels[:, 0]))
    blocks, plain = pair(built, subset("mlp", chosen), il.SGD(lr=0.1, steps=3))
    assert relative_error(gradients(blocks, batch)[0], gradients(plain, batch)[0]) < 1e-10


def test_a_minibatch_every_step():
    built, batch = model_and_batch("mlp")
    blocks, plain = pair(built, "head", il.SGD(lr=0.1, steps=3, minibatch=3))
    assert relative_error(gradients(blocks, [lone(batch)])[0], gradients(plain, [lone(batch)])[0]) < 1e-10


def dropping() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, WAYS))
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("chosen", ["everything", "head"])
def test_dropout_is_replayed_block_by_block(chosen):
    batch = model_and_batch("mlp")[1]
    blocks, plain = pair(dropping(), chosen, il.SGD(lr=0.1, steps=3))
    (found, loss), (expected, expected_loss) = gradients(blocks, [lone(batch)]), gradients(plain, [lone(batch)])
    assert relative_error(found, expected) < 1e-10
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    torch.manual_seed(9)
    blocks.meta_step([lone(batch)])
    after = torch.rand(())
    torch.manual_seed(9)
    plain.meta_step([lone(batch)])
    assert torch.equal(torch.rand(()), after)  # what is drawn next does not depend on it


class Counting(nn.Module):
    """A part with a buffer that every pass changes and reads."""

    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("passes", torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        return inputs * self.weight / self.passes


def test_buffers_are_those_of_the_model_in_every_pass():
    model = nn.Sequential(nn.Linear(6, 8), Counting(), nn.Tanh(), nn.Linear(8, WAYS)).double()
    blocks, plain = pair(model, None, il.SGD(lr=0.1, steps=3))
    batch = model_and_batch("mlp")[1]
    assert relative_error(gradients(blocks, batch)[0], gradients(plain, batch)[0]) < 1e-10
    assert blocks.model[1].passes == 1


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((), 1.5, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.temperature, targets)


@pytest.mark.parametrize("chosen", SUBSETS)
def test_a_loss_of_its_own_and_frozen_parameters(chosen):
    built, batch = model_and_batch("mlp")
    model = copy.deepcopy(built)
    list(model.parameters())[3].requires_grad_(False)
    blocks, plain = pair(model, subset("mlp", chosen), il.Adam(lr=0.02, steps=2, eps=1e-3), loss=Scaled())
    found, expected = gradients(blocks, batch)[0], gradients(plain, batch)[0]
    assert found["loss.temperature"] != 0
    assert relative_error(found, expected) < 1e-10


class Declared(nn.Module):
    """A model that names its blocks, whose values are dicts, as those of language models are."""

    class Part(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs, outputs)

        def forward(self, value: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"hidden": self.linear(value["hidden"] * value["mask"]).tanh(), "mask": value["mask"]}

    class Read(nn.Linear):
        def forward(self, value: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(value["hidden"])

    def __init__(self, honest: bool = True, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([self.Part(6, 8), self.Part(8, 8), self.Part(8, 8)])
        self.head = self.Read(8, WAYS)
        self.blocks = [*self.parts, self.head]
        self.honest, self.in_place = honest, in_place

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        value = {"hidden": hidden, "mask": mask}
        for part in self.parts:
            value = part(value)
        if not self.honest:
            value["hidden"] = value["hidden"] + 1
        return self.head(value)


def masked(batch: il.Task) -> il.Task:
    mask = torch.rand(2, 6, 1, dtype=torch.float64)
    return il.Task(*(({"hidden": inputs, "mask": mask}, targets) for inputs, targets in batch))


@pytest.mark.parametrize("chosen", ["everything", "head", "body"])
def test_declared_blocks_whose_values_are_trees(chosen):
    batch = masked(model_and_batch("mlp")[1])
    blocks, plain = pair(Declared().double(), subset("mlp", chosen), il.SGD(lr=0.1, steps=2))
    assert relative_error(gradients(blocks, batch)[0], gradients(plain, batch)[0]) < 1e-10


def test_blocks_that_are_not_the_forward_pass_are_refused():
    learner = il.MetaLearner(Declared(honest=False).double(), products="blocks")
    with pytest.raises(ValueError, match="one after the other are its forward pass"):
        learner.meta_step(masked(model_and_batch("mlp")[1]))


class InPlace(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.mul_(2))


def test_a_block_that_changes_its_input_is_refused():
    model = nn.Sequential(nn.Linear(6, 8), InPlace(8, 8), nn.Linear(8, WAYS)).double()
    batch = model_and_batch("mlp")[1]
    with pytest.raises(ValueError, match="change no input in place"):
        il.MetaLearner(model, products="blocks").meta_step(batch)
    il.MetaLearner(model, products="autograd").meta_step(batch)


def test_refusals_name_the_cure():
    model, _ = model_and_batch("gru")
    with pytest.raises(ValueError, match=r"use an nn.Sequential, or .* blocks, .* or use products='autograd'"):
        il.MetaLearner(model, products="blocks")
    with pytest.raises(ValueError, match="leave chunk_size out"):
        il.MetaLearner(model_and_batch("mlp")[0], products="blocks", chunk_size=4)
    with pytest.raises(ValueError, match="choose 'auto', 'autograd', 'blocks', 'differences'"):
        il.MetaLearner(model, products="forward")
    with pytest.raises(ValueError, match=r"give Problem\(inner_chain=...\)"):
        il.Bilevel(replace(weighing()[0], inner_chain=None), weighing()[1], products="blocks")
    with pytest.raises(ValueError, match="give a share above 0"):
        Differences(step=0.0)


def weighing() -> tuple[Problem, Tree, il.Task]:
    """A problem of its own: two layers, and meta-parameters that weigh the examples and shift the hidden units."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    meta = {"a": draw(4, 5), "b": draw(5, 1), "shift": draw(5), "weights": draw(7)}

    def first(params: Tree, meta: Tree, inputs: Tensor) -> Tensor:
        return (inputs @ params["a"] + meta["shift"]).tanh()

    def inner(params: Tree, meta: Tree, batch: Any) -> Tensor:
        errors = (first(params, meta, batch[0]) @ params["b"]).squeeze(-1) - batch[1]
        return (meta["weights"].sigmoid() * errors.square()).mean()

    def outer(params: Tree, meta: Tree, batch: Any) -> Tensor:
        return ((first(params, meta, batch[0]) @ params["b"]).squeeze(-1) - batch[1]).square().mean()

    def chain(meta: Tree, batch: Any) -> list[Stage]:
        def last(params: Tree, meta: Tree, value: Tensor) -> Tensor:
            return (meta["weights"].sigmoid() * (value.squeeze(-1) - batch[1]).square()).mean()

        return [
            Stage(["a", "shift"], lambda params, meta, value: first(params, meta, batch[0])),
            Stage(["b"], lambda params, meta, value: value @ params["b"]),
            Stage(["weights"], last),
        ]

    problem = Problem(lambda meta: {"a": meta["a"], "b": meta["b"]}, inner, outer, inner_chain=chain)
    task = il.Task(*((draw(7, 4), draw(7)) for _ in range(2)))
    return problem, meta, task


@pytest.mark.parametrize("solver", ["sgd", "adam", "clip"])
def test_a_bilevel_problem_that_gives_its_chain(solver):
    problem, meta, task = weighing()
    found, expected = (
        il.hypergradient(replace(problem, engine=engine), meta, task, SOLVERS[solver](3)).grad
        for engine in (Blockwise(), None)
    )
    assert found["weights"].any()
    assert relative_error(found, expected) < 1e-10
    found["a"].mul_(2)  # as clipping does
    learner = il.Bilevel(problem, meta, SOLVERS[solver](3), products="blocks")
    learner.meta_step(task)
    assert relative_error(gradients_of(learner), expected) < 1e-10


def gradients_of(learner: il.Bilevel) -> Tree:
    return {name.removeprefix("meta."): p.grad for name, p in learner.named_parameters() if p.grad is not None}


def test_a_chain_that_is_not_the_loss_is_refused():
    problem, meta, task = weighing()
    other = replace(problem, inner_loss=lambda *given: 2 * problem.inner_loss(*given), engine=Blockwise())
    with pytest.raises(ValueError, match="make both the same function"):
        il.hypergradient(other, meta, task, il.SGD(lr=0.1, steps=2))


class First(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, 0]


def test_a_vision_transformer_of_transformers():
    """Its parts in a row are the model, and then a chain."""
    library = pytest.importorskip("transformers")
    config = library.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    whole = library.ViTForImageClassification(config).double().eval()
    layers = whole.vit.layers if hasattr(whole.vit, "layers") else whole.vit.encoder.layer
    model = nn.Sequential(whole.vit.embeddings, *layers, whole.vit.layernorm, First(), whole.classifier)
    images, query = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(images), whole(images).logits)
    task = il.Task((images, torch.arange(4) % 2), (query, torch.arange(4) % 2))
    for chosen in ("everything", "head", il.Named("4.*", "6.*")):
        blocks, plain = pair(model, chosen, il.SGD(lr=0.1, steps=2))
        assert relative_error(gradients(blocks, [task])[0], gradients(plain, [task])[0]) < 1e-10


# Differences.


def smooth() -> tuple[InnerLoop, Tree, Tree]:
    learner = il.MetaLearner(model_and_batch("encoder")[0], subset("encoder", "pattern"), il.SGD(lr=0.1, steps=2))
    with torch.no_grad(), second_order_kernels():
        loop, _ = learner.loop(lone(model_and_batch("encoder")[1]))
    return loop, *point(loop)


def errors(step: float | None) -> tuple[float, float, float | None]:
    loop, params, direction = smooth()
    problem = replace(loop.problem, engine=Differences(step=step))
    with torch.no_grad(), second_order_kernels():
        expected = curvature(loop.problem, params, loop.meta, loop.support, direction)
        found = curvature(problem, params, loop.meta, loop.support, direction)
    (h, b) = (relative_error(*each) for each in zip(found, expected, strict=True))
    return h, b, problem.known.error


def test_halving_the_step_quarters_the_error():
    wide, narrow = errors(0.02), errors(0.01)
    for place in range(2):
        assert wide[place] / narrow[place] == pytest.approx(4, rel=0.1)


def test_the_error_is_small_and_its_estimate_is_no_less():
    h, b, estimate = errors(None)
    assert max(h, b) < 1e-8
    assert estimate is not None
    assert max(h, b) / 10 < estimate < 1e-7
    h, b, estimate = errors(0.005)
    assert estimate == pytest.approx(3 * max(h, b), rel=0.7)


def test_a_direction_of_zeros_gives_zeros():
    loop, params, direction = smooth()
    problem = replace(loop.problem, engine=Differences())
    with torch.no_grad(), second_order_kernels():
        zero = {name: torch.zeros_like(value) for name, value in direction.items()}
        found = curvature(problem, params, loop.meta, loop.support, zero)
    assert not any(value.any() for tree in found for value in tree.values())


def test_differences_at_parameters_that_are_all_zero():
    built, batch = model_and_batch("linear")
    built = copy.deepcopy(built)
    for parameter in built.parameters():
        nn.init.zeros_(parameter)
    found, expected = (
        gradients(il.MetaLearner(built, inner=il.SGD(lr=0.1, steps=2), products=products), batch)[0]
        for products in ("differences", "autograd")
    )
    assert relative_error(found, expected) < 1e-7


@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("chosen", SUBSETS)
def test_meta_gradient_by_differences(chosen, solver):
    built, batch = model_and_batch("encoder")
    learner = il.MetaLearner(built, subset("encoder", chosen), SOLVERS[solver](3), products="differences")
    plain = il.MetaLearner(built, subset("encoder", chosen), SOLVERS[solver](3))
    assert relative_error(gradients(learner, batch)[0], gradients(plain, batch)[0]) < 1e-7


def test_kinks_are_told():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(6)), nn.Linear(6, WAYS)).double()
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2), products=Differences(step=0.3))
    with pytest.warns(UserWarning, match="a network without ReLU"):
        learner.meta_step(model_and_batch("mlp")[1])


class Once(torch.autograd.Function):
    """tanh without a second derivative, as fused kernels are."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        out = inputs.tanh()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * (1 - out * out)


class OnceTanh(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return Once.apply(inputs)


class Checkpointed(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, inputs, use_reentrant=False)


@pytest.mark.parametrize("products", ["autograd", "blocks", "differences"])
@pytest.mark.parametrize("chosen", ["everything", "head"])
def test_models_that_checkpoint_themselves(chosen, products):
    """Their parts are run again in the backward pass, where the step's parameters have to be theirs."""
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, WAYS)]
    plain = nn.Sequential(*parts).double()
    batch = model_and_batch("mlp")[1]
    expected, _ = gradients(il.MetaLearner(plain, chosen, il.SGD(lr=0.1, steps=3), chunk_size=1), batch)
    again = nn.Sequential(Checkpointed(*parts[0]), Checkpointed(*parts[1]), parts[2])
    learner = il.MetaLearner(again, chosen, il.SGD(lr=0.1, steps=3), memory=0, products=products)
    assert relative_error(gradients(learner, batch)[0], expected) < (1e-7 if products == "differences" else 1e-10)


@pytest.mark.parametrize("kind", [nn.Sequential, Checkpointed])
def test_models_without_a_second_derivative(kind):
    """And with one that checkpoints itself."""

    def model(middle: type[nn.Module], kind: Any) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(kind(nn.Linear(6, 8), middle(), nn.Linear(8, 8), middle()), nn.Linear(8, WAYS)).double()

    batch = model_and_batch("mlp")[1]
    learner = il.MetaLearner(model(OnceTanh, kind), inner=il.SGD(lr=0.1, steps=3), products="differences")
    plain = il.MetaLearner(model(nn.Tanh, nn.Sequential), inner=il.SGD(lr=0.1, steps=3))
    found, expected = gradients(learner, batch)[0], gradients(plain, batch)[0]
    assert sorted(found) == sorted(expected)
    assert relative_error(found, expected) < 1e-7


# Memory, in bytes that are counted.


def transformer() -> tuple[nn.Sequential, il.Task]:
    torch.manual_seed(0)
    model = nn.Sequential(*(benchmark.Block(32) for _ in range(8)), benchmark.Pool(), nn.Linear(32, WAYS))
    labels = torch.arange(4) % WAYS
    return model, il.Task((torch.randn(4, 64, 32), labels), (torch.randn(4, 64, 32), labels))


def peak(function: Any) -> float:
    """MiB live at once, at most, of those that a second call allocates."""
    function()
    return benchmark.peak(function, "cpu")


def test_a_product_takes_no_more_than_a_plain_gradient():
    model, task = transformer()
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=1))
    with torch.no_grad(), second_order_kernels():
        loop, _ = learner.loop(task)
        params, direction = point(loop)
        blocks = replace(loop.problem, engine=Blockwise())

        def product(problem: Problem) -> tuple[Tree, Tree]:
            return curvature(problem, params, loop.meta, loop.support, direction)

        for ours, theirs in zip(product(blocks), product(loop.problem), strict=True):
            assert (
                relative_error(ours, theirs) < 1e-6
                if any(v.any() for v in theirs.values())
                else not ours["0.mlp.0.bias"].any()
            )
        plain = peak(lambda: gradient(loop.problem, params, loop.meta, loop.support))
        assert peak(lambda: product(blocks)) <= 1.0 * plain < 0.5 * peak(lambda: product(loop.problem))
        assert peak(lambda: gradient(blocks, params, loop.meta, loop.support)) < 0.4 * plain


def test_a_meta_gradient_takes_a_fraction_of_the_unrolled_graph():
    model, task = transformer()

    def taken(steps: int, **settings: Any) -> float:
        learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=steps), **settings)
        return peak(lambda: learner.meta_step([task]))

    unrolled = {steps: taken(steps, meta_gradient=il.Unrolled(record=True)) for steps in (1, 4)}
    blocks = {steps: taken(steps, products="blocks") for steps in (1, 4)}
    assert blocks[1] < unrolled[1] / 2
    assert blocks[4] < unrolled[4] / 6


def test_blocks_are_taken_where_memory_is_short_and_they_save_some(monkeypatch):
    monkeypatch.setattr(il.engine, "DEEP", 2**18)
    model, task = transformer()

    def taken(model: nn.Module, task: il.Task, **settings: Any) -> Any:
        learner = il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=2), **settings)
        learner.meta_step([task])
        assert learner.way is not None
        return learner.way.engine

    assert taken(model, task, memory=0) == Blockwise()
    assert taken(model, task) is None  # there is memory for the graphs
    assert taken(model, task, memory=0, products="autograd") is None
    assert taken(model, task, memory=0, adapts="head") is None
    images = (torch.randn(10, 1, 28, 28), torch.arange(10) % 5)
    assert taken(il.models.Conv4(in_channels=1), il.Task(images, images), memory=0) is None  # its first block is most
