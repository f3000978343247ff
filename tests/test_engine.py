"""How a batch of tasks is computed: what is chosen, by which bytes, and that the gradient never tells."""

import logging

import pytest
import torch
from torch import Tensor, nn

import innerloop as il
from innerloop.curvature import in_transform
from innerloop.engine import BUDGET, CACHE, saved_bytes
from innerloop.inner import bind
from problems import SOLVERS, model_and_batch, relative_error, subset

STEPS = 3
LABELS = torch.arange(3).repeat_interleave(2)


def small(tasks: int = 5) -> tuple[nn.Module, il.Task]:
    """A small network, and tasks for it."""
    inputs, queries = torch.randn(2, tasks, len(LABELS), 6).unbind()
    labels = LABELS.expand(tasks, -1)
    return il.models.MLP((6, 8, 3)), il.Task((inputs, labels), (queries, labels))


def large(tasks: int = 2) -> tuple[nn.Module, il.Task]:
    """A convolutional network, and tasks of images whose activations a cache does not hold."""
    images, queries = torch.randn(2, tasks, len(LABELS), 1, 84, 84).unbind()
    labels = LABELS.expand(tasks, -1)
    return il.models.Conv4(in_channels=1, ways=3, filters=4, size=84), il.Task((images, labels), (queries, labels))


def learner_of(model: nn.Module, **settings) -> il.MetaLearner:
    return il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=STEPS), **settings)


def gradients(learner: il.Bilevel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


def chunks_of(learner: il.MetaLearner, batch: il.Task) -> list[bool]:
    """For every call of the loss in a meta-step, whether it is for several tasks at once."""
    learner.meta_step(batch)  # which measures where it has to
    seen: list[bool] = []
    loss = learner.few_shot.loss

    def watched(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(in_transform())
        return loss(outputs, targets)

    learner.few_shot.loss = watched
    learner.meta_step(batch)
    learner.few_shot.loss = loss
    return seen


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_small_tasks_are_computed_all_at_once_with_their_graphs():
    model, batch = small()
    learner = learner_of(model)
    assert learner.way is None
    metrics = learner.meta_step(batch)
    assert learner.way[:2] == (5, True)
    assert metrics.diagnostics["curvature_products"] == 0
    assert chunks_of(learner, batch) == [True] * (STEPS + 1)


def test_large_images_on_a_cpu_are_computed_one_by_one():
    model, batch = large()
    learner = learner_of(model)
    learner.meta_step(batch)
    assert learner.way[:2] == (1, True)
    assert chunks_of(learner, batch) == [False] * (STEPS + 1) * 2


def test_no_memory_keeps_no_graph():
    model, batch = small()
    learner = learner_of(model, memory=0)
    metrics = learner.meta_step(batch)
    assert learner.way[:2] == (1, False)
    assert metrics.diagnostics["curvature_products"] == STEPS
    together = learner_of(model, memory=0, chunk_size=5)
    assert together.meta_step(batch).diagnostics["curvature_products"] == STEPS
    assert together.way[:2] == (5, False)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_memory_is_what_the_graphs_of_all_steps_of_a_chunk_take(chunk):
    model, batch = small()
    loop, _ = learner_of(model).loop(il.Task(*((inputs[0], labels[0]) for inputs, labels in batch)))
    step = saved_bytes(loop, mixed=False)[1]
    assert step is not None
    for memory, kept in ((step * STEPS * chunk, True), (step * STEPS * chunk - 1, False)):
        learner = learner_of(model, memory=memory, chunk_size=chunk)
        metrics = learner.meta_step(batch)
        assert learner.way[:2] == (chunk, kept)
        assert metrics.diagnostics["curvature_products"] == (0 if kept else STEPS)


def test_memory_bounds_how_many_are_computed_at_once():
    model, batch = small()
    loop, _ = learner_of(model).loop(il.Task(*((inputs[0], labels[0]) for inputs, labels in batch)))
    activations = saved_bytes(loop, mixed=True)[0]
    for tasks in (1, 2, 3):
        learner = learner_of(model, memory=4 * activations * tasks)
        learner.meta_step(batch)
        assert learner.way.chunk == tasks


def test_a_chunk_that_is_given_is_taken_whatever_the_size():
    model, batch = large()
    learner = learner_of(model, chunk_size=2)
    learner.meta_step(batch)
    assert learner.way.chunk == 2
    assert chunks_of(learner, batch) == [True] * (STEPS + 1)


def test_the_bytes_decide_and_not_the_kind_of_model():
    learners = []
    for examples in (1, 40):
        model, inputs = il.models.MLP((6, 1000, 3)), torch.randn(2, 3 * examples, 6)
        labels = torch.arange(3).repeat_interleave(examples).expand(2, -1)
        learners.append(learner_of(model))
        learners[-1].meta_step(il.Task((inputs, labels), (inputs, labels)))
        activations = 4 * 1000 * 3 * examples  # of the hidden layer, which is kept once
        assert (activations > CACHE) == (examples == 40)
    assert [learner.way.chunk for learner in learners] == [2, 1]


def test_explicit_choices_are_not_overruled():
    model, batch = small()
    for estimator, products in (
        (il.Unrolled(record=False), STEPS),
        (il.Unrolled(copies=2), STEPS),
        (il.Unrolled(offload=True), STEPS),
        (il.Truncated(2), 2),
    ):
        learner = learner_of(model, meta_gradient=estimator)
        assert learner.meta_step(batch).diagnostics["curvature_products"] == products
        assert learner.way.keep_graphs
    learner = learner_of(model, meta_gradient=il.Unrolled(record=True), memory=0)
    assert learner.meta_step(batch).diagnostics["curvature_products"] == 0


def test_one_task_estimated_alone_keeps_no_graph():
    model, batch = small()
    learner = learner_of(model)
    learner.meta_step(batch)
    task = il.Task(*((inputs[0], labels[0]) for inputs, labels in batch))
    assert learner.estimate(task).diagnostics["curvature_products"] == STEPS


# --- when it is measured ----------------------------------------------------------------------------------------------


def test_every_shape_is_measured_once(caplog):
    caplog.set_level(logging.INFO, "innerloop")
    model, batch = small()
    learner = learner_of(model)

    def lines() -> list[str]:
        return [record.message for record in caplog.records if "chunk_size=" in record.message]

    learner.meta_step(batch)
    learner.meta_step(batch)
    (line,) = lines()
    assert line.startswith("5 tasks at once, graphs of the inner steps kept")
    assert f"of {BUDGET / 2**20:.0f} MiB" in line
    assert "memory=" in line
    learner.meta_step(small(tasks=2)[1])
    assert len(lines()) == 2
    assert learner.way.chunk == 2
    learner.meta_step(batch)
    assert len(lines()) == 2
    assert learner.way.chunk == 5
    learner_of(model, memory=0).meta_step(batch)
    assert lines()[2].startswith("1 tasks at once, graphs of the inner steps not kept")


def test_in_a_list_every_task_has_a_way_of_its_own():
    """The graph of a task of 60 examples does not fit where that of one of 6 does."""
    model, batch = small(tasks=1)
    little = il.Task(*((inputs[0], labels[0]) for inputs, labels in batch))
    much = il.Task(*((inputs.repeat(10, 1), labels.repeat(10)) for inputs, labels in little))
    steps = [saved_bytes(learner_of(model).loop(task)[0], mixed=False)[1] for task in (little, much)]
    assert None not in steps
    learner = learner_of(model, memory=2 * steps[0] * STEPS)
    assert steps[1] > 2 * steps[0]
    metrics = learner.meta_step([little, much, little])
    assert metrics.diagnostics["curvature_products"] == pytest.approx(STEPS / 3)  # the mean: one task is walked
    walked = learner_of(model, meta_gradient=il.Unrolled(record=False))
    walked.meta_step([little, much, little])
    assert relative_error(gradients(learner), gradients(walked)) < 1e-5


def test_a_lone_task_keeps_its_graphs_too():
    problem = il.Problem(
        dict,
        lambda params, meta, batch: (params["w"] - batch).pow(4).sum(),
        lambda params, meta, batch: params["w"].sum(),
    )
    task = il.Task(torch.tensor([1.0, 2.0]), None)
    for memory, products in ((None, 0), (0, STEPS)):
        learner = il.Bilevel(problem, {"w": torch.zeros(2)}, il.SGD(lr=0.01, steps=STEPS), memory=memory)
        assert learner.meta_step(task).diagnostics["curvature_products"] == products


def test_measuring_draws_nothing_and_leaves_nothing():
    model, batch = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 3)), small()[1]
    found = []
    for measured in (False, True):
        learner = learner_of(model)
        if measured:
            learner.evaluate(batch)  # of the same shape, and in the same mode
            assert learner.way is not None
            assert not gradients(learner)
        torch.manual_seed(3)
        learner.meta_step(batch)
        found.append(gradients(learner))
    assert relative_error(*found) == 0


# --- that it changes nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "conv4", "encoder", "gru"])
@pytest.mark.parametrize("chosen", ["everything", "head"])
@pytest.mark.parametrize("solver", ["sgd", "adamw", "clip", "rates"])
def test_the_same_gradient_whichever_way(model, chosen, solver):
    net, batch = model_and_batch(model)
    found = []
    for chunk in (None, 1):
        for memory in (None, 0):
            learner = il.MetaLearner(
                net, subset(model, chosen), SOLVERS[solver](STEPS), chunk_size=chunk, memory=memory
            )
            metrics = learner.meta_step(batch)
            assert metrics.diagnostics["curvature_products"] == (STEPS if memory == 0 else 0)
            found.append((gradients(learner), metrics.losses))
    for grads, losses in found[1:]:
        assert relative_error(grads, found[0][0]) < 1e-12
        torch.testing.assert_close(losses, found[0][1], rtol=1e-12, atol=0)


# --- what is measured -------------------------------------------------------------------------------------------------

ROWS, IN, HIDDEN, OUT = 7, 5, 11, 3


def two_layers() -> tuple[il.Problem, dict[str, Tensor], il.Task]:
    """``sum(T * (tanh(sin(x * scale) w1) w2))``: every tensor that is kept can be told by its size."""

    def loss(params: dict[str, Tensor], meta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = ((batch[0] * meta["scale"]).sin() @ params["w1"]).tanh()
        return (batch[1] * (hidden @ params["w2"])).sum()

    def start(meta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: meta[name] for name in ("w1", "w2")}

    sizes = {"w1": (IN, HIDDEN), "w2": (HIDDEN, OUT), "scale": (IN,)}
    meta = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    batch = torch.randn(ROWS, IN, dtype=torch.float64), torch.randn(ROWS, OUT, dtype=torch.float64)
    return il.Problem(start, loss, loss), meta, il.Task(batch, batch)


def test_saved_bytes_are_those_counted_by_hand():
    problem, meta, task = two_layers()
    loop = bind(problem, meta, task.support, il.SGD(lr=0.1, steps=1), {})
    # What enters the first layer and what leaves its tanh; weights, inputs and targets are there anyway.
    loss = ROWS * IN + ROWS * HIDDEN
    # And the gradients of what leaves the second layer and of what leaves the tanh.
    gradient = loss + ROWS * OUT + ROWS * HIDDEN
    assert saved_bytes(loop, mixed=False) == (8 * loss, 8 * gradient)
    # With meta-parameters, also what enters the sine.
    assert saved_bytes(loop, mixed=True)[0] == 8 * (loss + ROWS * IN)


def test_saved_bytes_are_those_of_a_models_own_layers():
    """Of a learner's network: what leaves its tanh, and of the cross-entropy the log-probabilities and one number."""
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3)).double()
    task = model_and_batch("mlp")[1]
    one = il.Task(*((inputs[0], labels[0]) for inputs, labels in task))
    loop, _ = learner_of(model).loop(one)
    rows = len(one.support[1])
    assert saved_bytes(loop, mixed=False)[0] == 8 * (rows * 50 + rows * 3 + 1)
