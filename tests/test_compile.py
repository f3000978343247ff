"""A compiled meta-step gives the numbers of the same step not compiled, once a shape, or says why it is not compiled.

Most tests use a backend that runs the traced graph without a compiler of kernels, which is what tracing can get wrong.
"""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop as il
from innerloop import compiled
from innerloop.cli import train
from innerloop.compiled import proposal
from innerloop.training.build import build_learner, build_tasks
from innerloop.training.settings import Settings

TRACED = "eager"  # runs the graph as it is


def sinusoids(tasks: int = 6, examples: int = 10, seed: int = 0) -> il.Task:
    generator = torch.Generator().manual_seed(seed)
    inputs = 10 * torch.rand(2, tasks, examples, 1, generator=generator) - 5
    targets = torch.sin(inputs + torch.rand(tasks, 1, 1, generator=generator))
    return il.Task((inputs[0], targets[0]), (inputs[1], targets[1]))


def images(tasks: int = 3, seed: int = 0) -> il.Task:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(2, tasks, 6, 1, 16, 16, generator=generator)
    labels = torch.arange(6).remainder(3).expand(tasks, 6)
    return il.Task((pictures[0], labels), (pictures[1], labels))


def mlp(**choices: Any) -> il.MetaLearner:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"inner": il.SGD(lr=0.01, steps=2), "loss": F.mse_loss} | choices
    return il.MetaLearner(il.models.MLP([1, 20, 1]), **settings)


def convolution(**choices: Any) -> il.MetaLearner:
    """A block of Conv4, pooled: tracing takes its time for every block."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(block, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 3))
    return il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=1), **choices)


def assert_same(one: il.MetaLearner, other: il.MetaLearner, batch: il.Task, **arguments: Any) -> tuple[Any, Any]:
    found = []
    for learner in (one, other):
        learner.zero_grad()
        found.append(learner.meta_step(batch, **arguments))
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None
        else:
            assert mine.grad is not None
            scale = float(theirs.grad.abs().max().clamp(min=1.0))
            assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * scale, name
    torch.testing.assert_close(found[0].losses, found[1].losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].loss, found[1].loss, rtol=1e-5, atol=1e-5)
    assert found[0].diagnostics.keys() == found[1].diagnostics.keys()
    assert found[0].accuracy == found[1].accuracy
    return found[0], found[1]


CHOICES: dict[str, dict[str, Any]] = {
    "exact": {},
    "products": {"memory": 0},
    "first order": {"meta_gradient": il.FirstOrder()},
    "truncated": {"meta_gradient": il.Truncated(1)},
    "window": {"meta_gradient": il.Window(2), "inner": il.SGD(lr=0.01, steps=3)},
    "implicit": {"meta_gradient": il.Implicit(il.CG(3)), "inner": il.SGD(lr=0.01, steps=2, proximal=2.0)},
    "reptile": {"meta_gradient": il.Reptile()},
    "learned rates": {"inner": il.LearnedRates(lr=0.01, steps=2, per="layer-step")},
    "Adam": {"inner": il.Adam(lr=0.01, steps=2, clip=1.0)},
    "head": {"adapts": "head"},
    "minibatches": {"inner": il.SGD(lr=0.01, steps=2, minibatch=4)},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES.keys())
def test_equal_on_the_sinusoid_mlp(choices):
    eager, compiled = mlp(**choices), mlp(**choices, compile=TRACED)
    for seed in range(2):  # the second by the compiled graph alone
        batch = sinusoids(seed=seed)
        eager.zero_grad()
        compiled.zero_grad()
        torch.manual_seed(seed)  # minibatches are drawn by it
        theirs = eager.meta_step(batch)
        torch.manual_seed(seed)
        mine = compiled.meta_step(batch)
        torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-5, atol=1e-5)
        for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 1


@pytest.mark.parametrize(
    "choices",
    [{}, {"batch_norm": "task"}, {"adapts": "head", "start": il.Prototypes()}],
    ids=["exact", "task statistics", "prototypes"],
)
def test_equal_on_a_convolution(choices):
    eager, compiled = convolution(**choices), convolution(**choices, compile=TRACED)
    for seed in range(2):
        assert_same(compiled, eager, images(seed=seed))
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 1


@pytest.mark.parametrize("start", [il.Prototypes(), il.Ridge()], ids=["prototypes", "ridge"])
def test_a_start_that_reads_the_support_set_is_compiled_task_by_task(start):
    choices = {"adapts": "head", "start": start, "batch_norm": "task"}
    batch = images()
    fewer = batch.support[1][0] % 2
    unequal = [il.Task(*((x[0], y[0]) for x, y in batch)), il.Task(*((x[1], fewer) for x, _ in batch))]
    for tasks, given in ((batch, {"chunk_size": 1}), (unequal, {})):
        eager = convolution(**choices).double()  # a bias before batch norm has the gradient 0 but for rounding
        compiled = convolution(**choices, **given, compile=TRACED).double()
        for _ in range(2):
            assert_same(compiled, eager, tasks)
        assert compiled.compiler is not None
        assert compiled.compiler.active
        torch.testing.assert_close(eager.evaluate(tasks).loss, compiled.evaluate(tasks).loss)


@pytest.mark.parametrize(
    "choices",
    [{}, {"memory": 0}, {"meta_gradient": il.Mixed((1, 3), (0.5, 0.5))}, {"meta_gradient": il.Binomial(2)}],
    ids=["recorded", "walked", "mixed", "binomial"],
)
def test_weights_of_steps_and_tasks_are_arguments(choices):
    inner = il.SGD(lr=0.01, steps=3)
    eager, compiled = mlp(inner=inner, **choices), mlp(inner=inner, compile=TRACED, **choices)
    batch = sinusoids()
    for early in (0.3, 0.2, 0.1):
        shares = torch.rand(6)
        assert_same(compiled, eager, batch, step_weights=[early, 0.0, 1 - early], task_weights=shares)
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 1
    assert_same(compiled, eager, batch)
    assert compiled.compiler.compilations == 2


def test_compiles_once_a_shape_and_mode():
    learner = mlp(compile=TRACED, inner=il.SGD(lr=0.01, steps=1))
    assert learner.compiler is not None
    for tasks, examples, expected in ((4, 5, 1), (4, 5, 1), (4, 7, 2), (2, 5, 3), (4, 5, 3)):
        learner.meta_step(sinusoids(tasks, examples))
        assert learner.compiler.compilations == expected
    learner.eval()
    learner.meta_step(sinusoids(4, 5))
    assert learner.compiler.compilations == 4
    other = copy.deepcopy(learner)
    other.meta_step(sinusoids(4, 5))
    assert other.compiler is not None
    assert other.compiler.compilations == 1


def test_choices_that_are_changed_are_compiled_anew():
    eager, compiled = mlp(), mlp(compile=TRACED)
    for estimator in (il.Unrolled(), il.FirstOrder(), il.Truncated(1)):
        eager.meta_gradient = compiled.meta_gradient = estimator
        assert_same(compiled, eager, sinusoids())
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 3


def test_mixed_precision():
    eager, compiled = mlp(), mlp(compile=TRACED)
    for seed in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(compiled, eager, sinusoids(seed=seed))
    assert compiled.compiler is not None
    assert compiled.compiler.active


def test_carried_tasks_are_taken_up():
    choices: dict[str, Any] = {"carry": "slot", "inner": il.Momentum(lr=0.01, steps=2, proximal=0.5)}
    eager, compiled = mlp(**choices), mlp(**choices, compile=TRACED)
    for seed in range(4):
        mine, theirs = assert_same(compiled, eager, sinusoids(seed=seed), keep_end=True)
        assert [end.step for end in mine.end] == [end.step for end in theirs.end] == [2 * seed + 2] * 6
        for one, other in zip(mine.end, theirs.end, strict=True):
            torch.testing.assert_close(one.params, other.params, rtol=1e-5, atol=1e-5)
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 2  # begun, and taken up


def test_parameters_and_buffers_are_read_anew():
    def build(**choices: Any) -> il.MetaLearner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        return il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=2), loss=F.mse_loss, batch_norm="frozen", **choices)

    eager, compiled = build(), build(compile=TRACED)
    assert_same(compiled, eager, sinusoids())
    state = {name: value + 0.1 if value.is_floating_point() else value for name, value in eager.state_dict().items()}
    for learner in (eager, compiled):
        learner.load_state_dict(state)
    assert_same(compiled, eager, sinusoids())
    assert_same(compiled.double(), eager.double(), sinusoids())
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 2


def test_a_stream_and_any_bilevel_problem():
    def inner_loss(params: dict[str, Tensor], meta: dict[str, Tensor], support: Tensor) -> Tensor:
        return ((params["w"] - support) ** 2).sum() * meta["scale"].exp()

    def outer_loss(params: dict[str, Tensor], meta: dict[str, Tensor], query: Tensor) -> Tensor:
        return ((params["w"] - query) ** 2).sum()

    problem = il.Problem(lambda meta: {"w": meta["w"]}, inner_loss, outer_loss)
    meta = {"w": torch.zeros(3), "scale": torch.zeros(())}
    task = il.Task(il.Steps(torch.rand(2, 3)), torch.ones(3))
    found = []
    for compile in (False, TRACED):
        learner = il.Bilevel(problem, meta, il.AdamW(lr=0.1, steps=2), compile=compile)
        found.append((learner.meta_step(task).loss, [parameter.grad for parameter in learner.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert learner.compiler is not None
    assert learner.compiler.compilations == 1
    streamed = il.Task(il.Steps(lambda step: torch.ones(3)), torch.ones(3))
    with pytest.warns(UserWarning, match="not compiled.*Steps of a function"):
        learner.meta_step(streamed)


def test_dropout_is_not_compiled_and_warns_once():
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    choices: dict[str, Any] = {"inner": il.SGD(lr=0.01, steps=2), "loss": F.mse_loss}
    eager, compiled = (il.MetaLearner(model, **choices, compile=compile) for compile in (False, TRACED))
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            torch.manual_seed(seed)
            mine = compiled.meta_step(sinusoids())
            torch.manual_seed(seed)
            theirs = eager.meta_step(sinusoids())
            assert torch.equal(mine.losses, theirs.losses)
            losses.append(mine.loss)
    assert losses[0] != losses[1]  # drawn anew
    assert_told_once(caught, "draws random numbers", compiled)


def test_a_value_looked_at_is_not_compiled_and_warns_once():
    def loss(params: dict[str, Tensor], meta: dict[str, Tensor], batch: Tensor) -> Tensor:
        value = ((params["w"] - batch) ** 2).sum()
        return 2 * value if float(value.detach()) > 0.5 else value

    problem = il.Problem(lambda meta: {"w": meta["w"]}, loss, loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner = il.Bilevel(problem, {"w": torch.ones(3)}, il.SGD(lr=0.1, steps=2), compile=TRACED)
        eager = il.Bilevel(problem, {"w": torch.ones(3)}, il.SGD(lr=0.1, steps=2))
        for scale in range(3):
            task = il.Task(torch.zeros(3), scale * torch.ones(3))
            assert learner.meta_step(task).loss == eager.meta_step(task).loss
    assert_told_once(caught, "Error", learner)


def assert_told_once(caught: list[warnings.WarningMessage], cause: str, learner: il.Bilevel) -> None:
    said = [each for each in caught if "not compiled" in str(each.message)]
    assert len(said) == 1
    assert cause in str(said[0].message)
    assert said[0].filename == __file__
    assert learner.compiler is not None
    assert not learner.compiler.active


def test_a_dropout_that_is_off_is_compiled():
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    choices: dict[str, Any] = {"inner": il.SGD(lr=0.01, steps=2), "loss": F.mse_loss}
    eager, compiled = (il.MetaLearner(model, **choices, compile=compile).eval() for compile in (False, TRACED))
    assert_same(compiled, eager, sinusoids())
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 1


def test_too_many_shapes_are_refused(monkeypatch):
    monkeypatch.setattr("innerloop.compiled.SHAPES", 2)
    learner = mlp(compile=TRACED, inner=il.SGD(lr=0.01, steps=1))
    for examples in (1, 2):
        learner.meta_step(sinusoids(2, examples))
    with pytest.warns(UserWarning, match="compiled for 2 kinds of batch"):
        learner.meta_step(sinusoids(2, 3))


def test_an_unknown_backend_and_other_products_are_told():
    with pytest.warns(UserWarning, match="not compiled, same result, slower: .*no-such"):
        mlp(compile="no-such").meta_step(sinusoids())
    with pytest.raises(ValueError, match="leave one out"):
        mlp(compile=True, products="differences")


def test_small_memory_gives_chunks_of_one_size():
    eager, compiled = mlp(), mlp(compile=TRACED, chunk_size=2)
    assert_same(compiled, eager, sinusoids(6))
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 1


def test_proposed_where_it_pays(caplog):
    assert proposal(0.02, 30, 1000) is None
    assert proposal(0.02, 30, 100_000) == "compile=True would save some 25 of 33 minutes, for 40 s"
    tasks = il.tasks.SOURCES["sinusoid"]()
    with caplog.at_level(logging.INFO, logger="innerloop"):
        il.fit(mlp(), tasks, steps=21, tasks_per_batch=2, validation_tasks=0, progress=False)
    assert "compile=True" not in caplog.text


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_equal_by_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no workers, each of which would load torch
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)  # for more kernels than are here
    inner = il.SGD(lr=0.01, steps=1)
    eager, compiled = mlp(inner=inner), mlp(inner=inner, compile=True)
    for seed in range(2):
        assert_same(compiled, eager, sinusoids(seed=seed))
    assert compiled.compiler is not None
    assert compiled.compiler.compilations == 1


def test_the_first_trial_of_a_training_does_not_compile(monkeypatch):
    settings = Settings(dataset="glyphs", filters=2, steps=1, tasks_per_batch=2, compile=True)
    tasks = build_tasks(settings)
    learner = build_learner(settings, tasks.input_shape, tasks.output_size)
    trial = train._trial(settings, learner, tasks)
    monkeypatch.setattr(compiled.Compiler, "__call__", lambda *_: pytest.fail("a lone task is compiled"))
    trial()
    with pytest.raises(pytest.fail.Exception, match="a lone task"):
        learner.meta_step(tasks.batch("train", 0, 1))
