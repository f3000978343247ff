"""At the edge between a user's model and the core: what was once computed wrong without a word."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

import innerloop as il
from innerloop.curvature import OUTER, replayed
from problems import relative_error
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


def _fields(problem: il.Problem) -> dict:
    return {"start": problem.start, "inner_loss": problem.inner_loss, "outer_loss": problem.outer_loss}


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
