"""The recipes under examples/: what they claim, and their meta-gradients against autograd through the unrolled loop."""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import innerloop as il

FOLDER = Path(__file__).parents[1] / "examples"
EXACT = [
    il.Unrolled(),
    il.Unrolled(record=True),
    il.Unrolled(record=False),
    il.Unrolled(copies=2),
    il.Unrolled(copies=4, offload=True),
]

Tree = dict[str, Tensor]


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rating, reading = recipe("data_rating"), recipe("test_time_training")


def stepwise(steps: il.Steps, kind: str, first: int = 0) -> il.Steps:
    """The same rows, as tensors or as a function of the task's own step."""
    if kind == "tensors":
        return steps
    rows = [steps.row(place, place) for place in range(len(torch.utils._pytree.tree_leaves(steps.rows)[0]))]
    return il.Steps(lambda step: rows[step - first])


SHORTENED: list[bool] = []  # of every gradient by hand, whether it was longer than the clipping norm


def clipped(grads: list[Tensor], clip: float) -> list[Tensor]:
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    SHORTENED.append(bool(norm > clip))
    return [grad * (clip / (norm + 1e-6)).clamp(max=1.0) for grad in grads]


def near(found: Tree, expected: Tree, relative: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, f"nothing is compared of {name}"
        assert (found[name] - value).norm() <= relative * value.norm(), name


def grads_of(module: torch.nn.Module) -> Tree:
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", ["data_rating", "test_time_training"])
def test_a_recipe_is_sixty_lines_beside_its_model(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    head, rest = text.split("# The model.")
    model, body = rest.split("# The recipe.")
    code = compile(text, name, "exec")
    assert code.co_consts[0].count("\n") > 5, "says what it shows, how to run it and what it printed"
    head = head.split('"""')[2]
    assert (
        0
        < sum(bool(line.strip()) and not line.strip().startswith(("#", '"""')) for line in (head + body).split("\n"))
        <= 60
    )
    assert "class " in model
    assert "class " not in body


def test_the_text_is_plain_and_small() -> None:
    text = (FOLDER / "text.txt").read_bytes()
    assert 20_000 < len(text) < 60_000
    text.decode("ascii")


# Data rating.


class Rated:
    """Windows of the data rater in float64, beside the same by hand: AdamW, clipping, state carried over windows."""

    def __init__(self, meta_gradient: il.meta_gradient.MetaGradient, clip: float) -> None:
        self.learner, self.clip = rating.learner(meta_gradient).double(), clip
        self.learner.inner = replace(self.learner.inner, clip=clip)
        torch.nn.init.normal_(self.learner.meta.head.weight)
        double = [{name: value.double() for name, value in rating.new().params.items()} for _ in range(rating.MODELS)]
        self.ends = [il.End(params, rating.INNER.init(params), 0) for params in double]
        self.by_hand: list[Any] = [(params, dict.fromkeys(params, (0.0, 0.0)), 0) for params in double]

    def window(self, kind: str) -> tuple[Tree, Tree, Tensor, Tensor]:
        """Meta-gradient and losses of the next window, the library's and by hand."""
        rows = [rating.stream(rating.INNER.steps, rating.EXAMPLES)[0] for _ in self.ends]
        query = [rating.draw(rating.CLEAN, rating.EXAMPLES) for _ in self.ends]
        tasks = [
            il.Task(stepwise(il.Steps(row), kind, end.step), judged)
            for row, judged, end in zip(rows, query, self.ends, strict=True)
        ]
        self.learner.zero_grad()
        metrics = self.learner.meta_step(tasks, begin=self.ends)
        meta = {name: value.detach().requires_grad_() for name, value in self.learner.meta.named_parameters()}
        losses = []
        for place, (params, moments, step) in enumerate(self.by_hand):
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
            for row in rows[place]:
                params, moments, step = self.adamw(params, moments, step, meta, row)
            losses.append(rating.losses(params, query[place]).mean())
            self.by_hand[place] = torch.utils._pytree.tree_map_only(Tensor, torch.detach, (params, moments, step))
        torch.stack(losses).mean().backward()
        self.ends = metrics.end
        return grads_of(self.learner.meta), {n: v.grad for n, v in meta.items()}, metrics.losses, torch.stack(losses)

    def adamw(self, params: Tree, moments: Any, step: int, meta: Tree, row: Tensor) -> Any:
        scores = functional_call(rating.RATER, meta, (row,))
        loss = (scores.softmax(-1) * rating.losses(params, row)).sum()
        grads = clipped(list(torch.autograd.grad(loss, list(params.values()), create_graph=True)), self.clip)
        new, kept = {}, {}
        for (name, value), grad in zip(params.items(), grads, strict=True):
            mean = 0.9 * moments[name][0] + 0.1 * grad
            square = 0.999 * moments[name][1] + 0.001 * grad**2
            kept[name] = mean, square
            zero = square == 0  # where plain autograd divides by zero; nothing moves there
            root = ((square + zero) / (1 - 0.999 ** (step + 1))).sqrt() * ~zero
            new[name] = value - rating.INNER.lr * mean / (1 - 0.9 ** (step + 1)) / (root + rating.INNER.eps)
        return new, kept, step + 1


@pytest.mark.parametrize(("kind", "clip"), [("tensors", rating.INNER.clip), ("function", 0.1)])
@pytest.mark.parametrize("meta_gradient", EXACT, ids=repr)
def test_the_rater_gets_the_gradient_of_autograd_over_windows(
    meta_gradient: il.meta_gradient.MetaGradient, kind: str, clip: float
) -> None:
    rated = Rated(meta_gradient, clip)
    SHORTENED.clear()
    for number in range(3):
        found, expected, losses, by_hand = rated.window(kind)
        near(found, expected)
        torch.testing.assert_close(losses, by_hand, rtol=1e-12, atol=0)
        assert [end.step for end in rated.ends] == [2 * (number + 1)] * rating.MODELS
        for end, (params, moments, step) in zip(rated.ends, rated.by_hand, strict=True):
            assert step == end.step
            torch.testing.assert_close(end.params, params, rtol=1e-10, atol=1e-13)
            means = {name: value[0] for name, value in moments.items()}
            torch.testing.assert_close(end.state["mean"], means, rtol=1e-9, atol=1e-14)
    assert any(SHORTENED), "otherwise nothing is said of clipping"
    if clip == 0.1:
        assert all(SHORTENED)


def test_the_rater_finds_the_bad_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=r"the meta-gradient of embed.weight.* is exactly zero. FirstOrder"):
        results = rating.main(windows=120)
    exact, first_order, none = (results[name][0] for name in ("exact", "first order", "none"))
    assert exact > 0.9
    assert first_order == none == 0.5, "a gradient of zero leaves all ratings equal"
    assert results["exact"][1] < results["none"][1], "what is trained on the better examples reads better"
    assert "exact, window 100" in capsys.readouterr().out


# Test-time training.


CLIP = 0.6  # at first all gradients are shorter than the recipe's 1


def reader(meta_gradient: il.meta_gradient.MetaGradient) -> il.MetaLearner:
    learner: il.MetaLearner = reading.learner(meta_gradient).double()
    learner.inner = replace(learner.inner, clip=CLIP)
    return learner


def ciphered(count: int) -> il.Task:
    return reading.task(reading.passages(reading.PAGES[~reading.HELD_OUT], count))


def unrolled(learner: il.MetaLearner, tasks: il.Task) -> tuple[Tree, Tensor]:
    """SGD with clipping, a chunk a step, each judged on the next chunk; by ``create_graph=True``."""
    meta = {name: value.detach().requires_grad_() for name, value in learner.model.named_parameters()}
    adapted = [name for name in meta if name.startswith(("2.mlp.", "3.mlp."))]
    losses = []
    with sdpa_kernel(SDPBackend.MATH):
        for inputs, targets, later, judged in zip(*tasks.support.rows, *tasks.query.rows, strict=True):
            params, total = dict(meta), torch.zeros((), dtype=torch.float64)
            for step in range(reading.CHUNKS):
                loss = F.cross_entropy(functional_call(learner.model, params, (inputs[step],)), targets[step])
                grads = torch.autograd.grad(loss, [params[name] for name in adapted], create_graph=True)
                for name, grad in zip(adapted, clipped(list(grads), CLIP), strict=True):
                    params[name] = params[name] - 0.5 * grad
                outputs = functional_call(learner.model, params, (later[step],))
                total = total + F.cross_entropy(outputs, judged[step]) / reading.CHUNKS
            losses.append(total)
        torch.stack(losses).mean().backward()
    return {name: value.grad for name, value in meta.items() if value.grad is not None}, torch.stack(losses).detach()


@pytest.fixture(scope="module")
def by_hand() -> tuple[Tree, il.Task, Tree, Tensor]:
    torch.manual_seed(3)
    learner, tasks = reader(il.Unrolled()), ciphered(2)
    SHORTENED.clear()
    expected, losses = unrolled(learner, tasks)
    assert 0 < sum(SHORTENED) < len(SHORTENED), "otherwise nothing is said of clipping"
    return dict(learner.model.state_dict()), tasks, expected, losses


@pytest.mark.parametrize("meta_gradient", EXACT, ids=repr)
def test_the_reader_gets_the_gradient_of_autograd(meta_gradient: il.meta_gradient.MetaGradient, by_hand: Any) -> None:
    weights, tasks, expected, losses = by_hand
    learner = reader(meta_gradient)
    learner.model.load_state_dict(weights)
    metrics = learner.meta_step(tasks, step_weights=[1 / reading.CHUNKS] * reading.CHUNKS)
    near(grads_of(learner.model), expected)
    torch.testing.assert_close(metrics.losses, losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("support", ["tensors", "function"])
@pytest.mark.parametrize("query", ["tensors", "function"])
def test_rows_of_each_kind_give_the_reader_the_same_gradient(support: str, query: str, by_hand: Any) -> None:
    weights, tasks, expected, losses = by_hand
    learner = reader(il.Unrolled(record=True))
    learner.model.load_state_dict(weights)
    single = [torch.utils._pytree.tree_map(lambda value, row=row: value[row], tasks) for row in range(2)]
    listed = [il.Task(stepwise(task.support, support), stepwise(task.query, query)) for task in single]
    metrics = learner.meta_step(listed, step_weights=[1 / reading.CHUNKS] * reading.CHUNKS)
    near(grads_of(learner.model), expected)
    torch.testing.assert_close(metrics.losses, losses, rtol=1e-12, atol=0)


def test_below_the_adapted_blocks_a_chunk_is_read_once() -> None:
    learner = reading.learner(il.Unrolled())
    assert learner.few_shot.prefix is not None
    assert learner.few_shot.prefix.names[-1].startswith("1.")
    calls: list[None] = []
    learner.model[1].register_forward_hook(lambda *_: calls.append(None))
    for _ in range(2):  # at the first batch the learner looks at the model and measures
        calls.clear()
        learner.meta_step(ciphered(1), step_weights=[1 / reading.CHUNKS] * reading.CHUNKS)
    assert len(calls) == 2 * reading.CHUNKS, "once a row of support and query, however often a step is taken"


def test_the_accuracy_after_a_step_is_that_of_its_own_chunk() -> None:
    learner, tasks = reading.learner(il.Unrolled()), ciphered(2)
    found = learner.evaluate(tasks, steps=3, curve=True)
    assert found.accuracy_curve is not None
    for task in range(2):
        inputs, targets = (part[task] for part in tasks.support.rows)
        later, judged = (part[task] for part in tasks.query.rows)
        params = {name: value.detach() for name, value in learner.model.named_parameters()}
        for step in range(3):
            loop, _ = learner.loop(il.Task(il.Steps((inputs, targets)), il.Steps((later, judged))))
            changed = loop.run(step + 1).params
            scores = functional_call(learner.model, {**params, **changed}, (later[step],))
            expected = (scores.argmax(-1) == judged[step]).float().mean()
            assert found.accuracy_curve[task, step + 1] == expected
    longer = il.Steps(tuple(torch.cat([part, part[:, :1]], dim=1) for part in tasks.support.rows))
    with pytest.raises(ValueError, match="Steps as query holds 16 rows for 17 inner steps"):
        learner.evaluate(il.Task(longer, tasks.query), steps=17)


def test_the_reader_learns_to_learn_as_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = reading.main(steps=10, held_out=8)
    assert results["exact"] < results["first order"] - 0.02
    assert results["first order"] < results["none"] - 0.1
    assert results["exact"] < math.log2(len(reading.SYMBOLS)) - 0.5
    assert "exact, step 10" in capsys.readouterr().out


# Meta-gradient reinforcement learning.


def test_mixed_horizons_cut_the_variance_and_keep_the_direction() -> None:
    chain = recipe("meta_rl")
    (exact, loud), (mixed, less), (last, least) = (chain.spread(way, 200) for way in chain.WAYS.values())

    def cosine(one: Tensor) -> float:
        return torch.cosine_similarity(one.flatten(), exact.flatten(), dim=0).item()

    assert less < loud / 3
    assert least < less / 3
    assert cosine(mixed) > 0.97 > 0.9 > cosine(last)
    relative = [(variance / mean.square().sum()).item() for mean, variance in ((exact, loud), (mixed, less))]
    assert relative[1] == pytest.approx(relative[0], rel=0.2), "the mean is shorter as well"


def test_a_learned_reward_helps_the_agent_over_its_windows() -> None:
    chain = recipe("meta_rl")
    assert chain.learned(il.Truncated(1), 12) > chain.learned(il.Truncated(1), 12, rate=1e-9) + 0.1


def test_episodes_are_walked_by_the_policy_and_their_noise_alone() -> None:
    chain = recipe("meta_rl")
    draws = torch.full((chain.LENGTH, 1, 3), 0.2)  # no slip, always paid
    places, rights, rewards = chain.walked(torch.full((chain.PLACES,), 9.0), draws)
    assert places[:, 0].tolist() == [4, 5, 6, 7] + [8] * 12
    assert rights.all()
    assert rewards[:, 0].tolist() == [0, 0, 0] + [1] * 13
