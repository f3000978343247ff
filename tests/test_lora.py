"""Low-rank factors beside linear layers, and blocks by name."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

import innerloop as il
from innerloop.choices import choice, text

WAYS = 3


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(body=nn.Linear(5, 6), tanh=nn.Tanh(), head=nn.Linear(6, WAYS))
    return nn.Sequential(layers).double()


def tasks(count: int = 2) -> il.Task:
    torch.manual_seed(1)
    targets = torch.arange(6).remainder(WAYS).expand(count, 6)
    return il.Task(*((torch.randn(count, 6, 5).double(), targets) for _ in range(2)))


def starts(learner: il.MetaLearner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learner.model.named_parameters()}


def away_from_zero(learner: il.MetaLearner) -> None:
    """The factors that begin at zero say too little."""
    torch.manual_seed(2)
    for name in learner.adapted:
        with torch.no_grad():
            learner.model.get_parameter(name).add_(torch.randn_like(learner.model.get_parameter(name)) / 3)


def test_only_the_factors_move_and_the_model_begins_as_it_was() -> None:
    plain = model()
    before = copy.deepcopy(plain.state_dict())
    learner = il.MetaLearner(plain, il.LoRA(2), il.SGD(lr=0.3, steps=2))
    layers = [f"{layer}.parametrizations.weight.0.{part}" for layer in ("body", "head") for part in ("down", "up")]
    assert list(learner.adapted) == layers
    inputs = tasks().query[0][0]
    torch.testing.assert_close(learner.model(inputs), plain(inputs))
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in before.items())
    some = il.MetaLearner(plain, il.LoRA(2, "head"), il.SGD(lr=0.3, steps=2))
    assert list(some.adapted) == layers[2:]


@pytest.mark.parametrize("layers", [(), ("head",)])
def test_the_meta_gradient_is_that_of_autograd(layers: tuple[str, ...]) -> None:
    """Written out: weight + scale * up @ down in each of three steps."""
    learner = il.MetaLearner(model(), il.LoRA(2, *layers, scale=0.5), il.SGD(lr=0.3, steps=3))
    away_from_zero(learner)
    meta = {name: value.requires_grad_() for name, value in starts(learner).items()}

    def outputs(tree: dict[str, Tensor], inputs: Tensor) -> Tensor:
        plain = {}
        for layer in ("body", "head"):
            place = f"{layer}.parametrizations.weight"
            plain[f"{layer}.bias"] = tree[f"{layer}.bias"]
            if f"{place}.original" in tree:
                product = tree[f"{place}.0.up"] @ tree[f"{place}.0.down"]
                plain[f"{layer}.weight"] = tree[f"{place}.original"] + 0.5 * product
            else:
                plain[f"{layer}.weight"] = tree[f"{layer}.weight"]
        return functional_call(model(), plain, (inputs,))

    batch = tasks()
    for task in range(2):
        params = {name: meta[name] for name in learner.adapted}
        for _ in range(3):
            loss = F.cross_entropy(outputs({**meta, **params}, batch.support[0][task]), batch.support[1][task])
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - 0.3 * grad for (name, p), grad in zip(params.items(), grads, strict=True)}
        (F.cross_entropy(outputs({**meta, **params}, batch.query[0][task]), batch.query[1][task]) / 2).backward()
    for memory in (None, 0):  # graphs kept, and steps computed again
        learner.memory = memory
        learner.zero_grad()
        learner.meta_step(batch)
        for name, parameter in learner.model.named_parameters():
            torch.testing.assert_close(parameter.grad, meta[name].grad, rtol=1e-10, atol=1e-12)


def test_what_is_handed_out_is_a_plain_model() -> None:
    learner = il.MetaLearner(model(), il.LoRA(2), il.SGD(lr=0.3, steps=2))
    away_from_zero(learner)
    batch = tasks(1)
    expected = learner.evaluate(batch).outputs[0]
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
    torch.testing.assert_close(adapted(batch.query[0][0]), expected)
    again = model()
    again.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(again(batch.query[0][0]), expected)
    assert learner.adapted, "the learner keeps its factors"


def test_adapting_leaves_the_learner_its_copies_and_the_users_model_as_they_were() -> None:
    users = model()
    users[0] = orthogonal(users[0])
    parametrize.register_parametrization(users[2], "bias", nn.Identity())
    learner = il.MetaLearner(users, il.LoRA(2), il.SGD(lr=0.3, steps=2))
    batch, before = tasks(1), users(tasks().query[0][0])
    other, expected = copy.deepcopy(learner), learner.evaluate(batch).outputs
    for _ in range(2):
        other.adapt(batch.support[0][0], batch.support[1][0])
    for each in (learner, other):
        assert torch.equal(each.evaluate(batch).outputs, expected)
    assert torch.equal(users(tasks().query[0][0]), before)


class Tied(nn.Module):
    """Its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.middle(self.embedding(inputs).mean(1)).tanh())
        return found


def test_the_factors_of_a_tied_layer_are_its_own() -> None:
    torch.manual_seed(0)
    learner = il.MetaLearner(Tied().double(), il.LoRA(2), il.SGD(lr=0.5, steps=3))
    inputs, labels = torch.randint(7, (1, 8, 4)), torch.randint(7, (1, 8))
    adapted = learner.adapt(inputs[0], labels[0])
    expected = learner.evaluate(il.Task((inputs, labels), (inputs, labels))).outputs[0]
    torch.testing.assert_close(adapted(inputs[0]), expected)
    name = "embedding.weight"
    assert torch.equal(adapted.get_parameter(name), learner.model.get_parameter(name))


def test_a_model_with_factors_keeps_those_or_is_refused() -> None:
    held = il.MetaLearner(model(), il.LoRA(2), il.SGD(lr=0.3, steps=2)).model
    assert len(il.MetaLearner(held, il.LoRA(2)).adapted) == 4
    for other in (il.LoRA(3), il.LoRA(2, scale=0.5), il.LoRA(2, "head")):
        with pytest.raises(ValueError, match=r"body has factors of rank 2 and scale 1\.0 already"):
            il.MetaLearner(held, other)


def test_a_frozen_model_learns_the_starts_of_its_factors_alone() -> None:
    frozen = model().requires_grad_(False)
    learner = il.MetaLearner(frozen, il.LoRA(1), il.SGD(lr=0.3, steps=2))
    assert set(learner.meta_tree()) == set(learner.adapted)
    assert learner.meta_step(tasks()).loss.isfinite()


def test_lora_is_a_choice_of_the_command() -> None:
    for chosen in (il.LoRA(8), il.LoRA(2, "*.query", "head"), il.LoRA(2, scale=0.5)):
        assert repr(choice(text(chosen), "adapts")) == repr(chosen)
    assert repr(choice("lora:4,head", "adapts")) == "LoRA(4, 'head')"


@pytest.mark.parametrize(
    ("build", "cure"),
    [
        (lambda: il.LoRA(0), "the rank is a whole number, 1 or more"),
        (lambda: il.MetaLearner(model(), il.LoRA(2, "tail")), "'tail' matches none of the linear layers body, head"),
        (lambda: il.MetaLearner(nn.Conv2d(1, 1, 3), il.LoRA(2)), r"\(there are none\)"),
        (lambda: il.MetaLearner(model(), il.LoRA(2), start=il.Prototypes()), "does not adapt: use adapts=Head"),
    ],
)
def test_lora_that_does_not_fit(build, cure) -> None:
    with pytest.raises(ValueError, match=cure):
        build()


# Blocks by name.


class Backwards(nn.Module):
    """Declares its parts in another order than it uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.middle, self.stem = nn.Linear(6, WAYS), nn.Linear(6, 6), nn.Linear(5, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.middle(self.stem(inputs).tanh()).tanh())
        return found


def test_blocks_by_name() -> None:
    parts = ["stem", "middle", "head"]
    chosen = il.Blocks("011", parts=parts)
    learner = il.MetaLearner(Backwards().double(), chosen, il.SGD(lr=0.1, steps=2))
    assert set(learner.adapted) == {"middle.weight", "middle.bias", "head.weight", "head.bias"}
    assert learner.meta_step(tasks()).loss.isfinite()
    table = il.MetaLearner(Backwards(), il.Blocks(["111", "001"], parts=parts), il.SGD(lr=0.1, steps=2))
    assert [len(row) for row in table.inner.moves] == [6, 2]
    assert choice(text(chosen), "adapts") == chosen
    assert repr(chosen) == "Blocks('011', parts=['stem', 'middle', 'head'])"


def test_blocks_in_another_order_than_they_are_used_are_refused() -> None:
    learner = il.MetaLearner(Backwards().double(), il.Blocks("011", parts=["head", "middle", "stem"]))
    with pytest.raises(ValueError, match=r"in another order: name them so, parts=\['stem', 'middle', 'head'\]"):
        learner.meta_step(tasks())


@pytest.mark.parametrize(
    ("parts", "cure"),
    [
        (["stem", "tail"], "Backwards has no part 'tail': it has head, middle, stem"),
        (["stem", "head"], r"lack middle.weight of Backwards: name its module too"),
        (["stem", "stem", "middle", "head"], "share parameters: name each module once"),
        (["stem", "middle"], "lack head.weight"),
        (["stem", "middle", "head", "stem"], "share parameters"),
    ],
)
def test_names_that_are_not_the_blocks(parts: list[str], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        il.MetaLearner(Backwards(), il.Blocks("1" * len(parts), parts=parts))
    with pytest.raises(ValueError, match=r"give a list of names"):
        il.Blocks("11", parts="stem")
