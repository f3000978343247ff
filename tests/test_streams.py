"""Steps that read their own batch, tasks taken up where they were left, trees of tensors, weights of tasks."""

import dataclasses
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import innerloop as il
from innerloop.inner import _loop, minibatches
from innerloop.meta_gradient import _adjoint
from problems import SOLVERS, every_pair, relative_error
from reference import rule

WAYS, STEPS, TASKS, ROWS = 3, 4, 2, 5

SOLVER = {
    **{name: SOLVERS[name] for name in ("sgd", "momentum", "adam")},
    "adamw, clipped": lambda steps: il.AdamW(lr=0.02, steps=steps, eps=1e-3, weight_decay=0.1, clip=0.3),
}
ESTIMATORS = {
    "unrolled": il.Unrolled(),
    "recorded": il.Unrolled(record=True),
    "walked": il.Unrolled(record=False),
    "few copies": il.Unrolled(copies=2),
    "truncated": il.Truncated(2),
    "first order": il.FirstOrder(),
    "window": il.Window(2),
    "binomial": il.Binomial(2),
    "mixed": il.Mixed((1, 3), (0.5, 0.5)),
    "implicit": il.Implicit(il.CG(4)),
    "reptile": il.Reptile(),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(body=nn.Linear(4, 6), norm=nn.BatchNorm1d(6), tanh=nn.Tanh(), head=nn.Linear(6, WAYS))
    ).double()


def examples(*leading: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*leading, 4, dtype=torch.float64), torch.randint(WAYS, leading)


def stream(tasks: int = TASKS) -> il.Task:
    torch.manual_seed(2)
    return il.Task(il.Steps(examples(tasks, STEPS, ROWS)), il.Steps(examples(tasks, STEPS, ROWS)))


def grads(learner: il.MetaLearner) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in learner.named_parameters()}


def reference(learner: il.MetaLearner, task: il.Task, weights: list[float]) -> tuple[dict[str, Tensor], Tensor]:
    """Of a batch of streams, by plain autograd."""
    net = learner.model
    meta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    (x, y), (a, b) = task.support.rows, task.query.rows
    for place in range(len(x)):
        start = {name: meta[name] for name in learner.adapted}
        update, params = rule(learner.inner, {}, start), start
        state: dict[str, Tensor] = {}
        for step in range(learner.inner.steps):
            loss = F.cross_entropy(functional_call(net, {**meta, **params}, (x[place, step],)), y[place, step])
            found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            grad = dict(zip(params, found, strict=True))
            params = update(step, params, grad, state)
            if weights[step]:
                judged = functional_call(net, {**meta, **params}, (a[place, step],))
                total = total + weights[step] * F.cross_entropy(judged, b[place, step]) / len(x)
    return {f"model.{n}": g for n, g in zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True)}, total


# A batch for every step.


@pytest.mark.parametrize(
    ("solver", "adapts", "chunk", "weights", "estimator"),
    every_pair(
        SOLVER,
        (il.Everything(), il.Head()),
        (1, TASKS),
        (None, (0.4, 0.0, 0.1, 0.5)),
        ("unrolled", "walked", "few copies"),
    ),
)
def test_a_stream_is_plain_autograd(solver, adapts, chunk, weights, estimator):
    learner = il.MetaLearner(model(), adapts, SOLVER[solver](STEPS), ESTIMATORS[estimator], chunk_size=chunk)
    batch = stream()
    metrics = learner.meta_step(batch, weights)
    expected, loss = reference(learner, batch, weights or [0, 0, 0, 1.0])
    assert relative_error(grads(learner), expected) < 1e-9
    assert metrics.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    if adapts == il.Head():  # each row's features are computed once
        assert learner.few_shot.prefix is not None
        task = il.Task(*(il.Steps(tuple(value[0] for value in part.rows)) for part in batch))
        stated = learner.few_shot.state(task, learner.meta_tree(), differentiate=False)
        assert stated.meta["support features 0"].shape == (STEPS, ROWS, 6)


@pytest.mark.parametrize("estimator", ["unrolled", "walked", "window", "first order"])
def test_a_function_serves_the_same_stream(estimator):
    batch = stream(1)
    rows = [tuple(value[0] for value in part.rows) for part in batch]
    asked: list[int] = []

    def support(step: int) -> tuple[Tensor, Tensor]:
        asked.append(step)
        return rows[0][0][step], rows[0][1][step]

    tree = il.Task(*map(il.Steps, rows))
    lazy = il.Task(il.Steps(support), il.Steps(lambda step: (rows[1][0][step], rows[1][1][step])))
    found = []
    for task in (tree, lazy):
        learner = il.MetaLearner(model(), il.Head(), il.SGD(lr=0.3, steps=STEPS), ESTIMATORS[estimator])
        learner.meta_step([task])
        found.append(grads(learner))
    assert relative_error(*found) < 1e-12
    assert set(asked) == ({0, 2} if estimator == "window" else set(range(STEPS)))


def test_a_window_reads_the_row_of_its_first_step():
    batch = stream(1)
    repeated = il.Task(il.Steps(tuple(value[:, [0, 0, 2, 2]] for value in batch.support.rows)), batch.query)
    found = []
    for task in (batch, repeated):
        learner = il.MetaLearner(model(), inner=il.SGD(lr=0.3, steps=STEPS), meta_gradient=il.Window(2))
        learner.meta_step(task)
        found.append(grads(learner))
    assert relative_error(*found) == 0


def test_too_few_rows_are_an_error_that_names_both_numbers():
    learner = il.MetaLearner(model(), inner=il.SGD(lr=0.3, steps=STEPS + 1))
    batch = stream()
    with pytest.raises(ValueError, match=r"Steps as support holds 4 rows for 5 inner steps: give a row for every step"):
        learner.meta_step(il.Task(batch.support, tuple(value[:, 0] for value in batch.query.rows)))
    short = batch._replace(query=il.Steps(tuple(value[:, :2] for value in batch.query.rows)))
    learner = il.MetaLearner(model(), inner=il.SGD(lr=0.3, steps=STEPS))
    with pytest.raises(ValueError, match=r"Steps as query holds 2 rows for 4 inner steps"):
        learner.meta_step(short)
    with pytest.raises(ValueError, match=r"holds 4 rows for 2 inner steps: give a row for every step and no more"):
        il.MetaLearner(model(), inner=il.SGD(lr=0.3, steps=2)).meta_step(batch)
    with pytest.raises(ValueError, match=r"is a pair \(inputs, targets\)"):
        learner.meta_step(il.Task(il.Steps(batch.support.rows[0]), batch.query))
    with pytest.raises(ValueError, match=r"adapt\(\) takes one support set"):
        learner.adapt(il.Steps(batch.support.rows[0][0]), batch.support.rows[1][0])
    with pytest.raises(ValueError, match=r"needs one fixed support batch.*use Unrolled"):
        il.MetaLearner(model(), inner=il.SGD(lr=0.3, steps=STEPS, proximal=1.0), meta_gradient=il.Implicit()).meta_step(
            batch
        )
    with pytest.raises(ValueError, match=r"leave inductive out"):
        learner.evaluate(batch, inductive=True)


def test_a_stream_is_evaluated_and_its_last_row_judges():
    learner, batch = il.MetaLearner(model(), inner=il.SGD(lr=0.3, steps=STEPS)), stream()
    found = learner.evaluate(batch, curve=True)
    assert found.loss_curve.shape == (TASKS, STEPS + 1)
    assert found.loss.mean().item() == pytest.approx(learner.meta_step(batch).loss.item(), rel=1e-12)


# Tasks taken up.


@pytest.mark.parametrize("solver", SOLVER)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_halves_taken_up_end_where_the_whole_ends(solver, estimator):
    whole = SOLVER[solver](6)
    if estimator == "implicit":
        if whole.decoupled:
            pytest.skip("refused: decoupled weight decay is no term of the inner loss")
        whole = dataclasses.replace(whole, proximal=0.5)
    half = dataclasses.replace(whole, steps=2 if estimator == "window" else 3, test_steps=None)
    torch.manual_seed(3)
    task = il.Task(examples(6), examples(6))
    learner = il.MetaLearner(model(), inner=whole, meta_gradient=ESTIMATORS[estimator])
    end = learner.estimate(task).end
    parts = il.MetaLearner(model(), inner=half, meta_gradient=ESTIMATORS[estimator])
    at = None
    for _ in range(whole.steps // half.steps):
        at = parts.estimate(task, begin=at).end
    assert at.step == end.step == 6
    assert relative_error(at.params, end.params) < 1e-14
    if estimator == "implicit":
        assert at.solution.keys() == at.params.keys()


@pytest.mark.parametrize(
    ("solver", "estimator", "proximal"), every_pair(SOLVER, ("unrolled", "recorded", "few copies"), (0.0, 0.7))
)
def test_the_gradient_of_a_task_taken_up_is_plain_autograd(solver, estimator, proximal):
    """``begin`` is a constant; meta is reached through the losses, and through the centre of the proximal term."""
    inner = dataclasses.replace(SOLVER[solver](3), proximal=proximal)

    def inner_loss(params, meta, batch):
        logits = (batch[0] * meta["scale"]).tanh() @ params["w"]
        return F.cross_entropy(logits, batch[1])

    problem = il.Problem(lambda meta: {"w": meta["w"]}, inner_loss, inner_loss)
    torch.manual_seed(4)
    meta = {"w": torch.randn(4, WAYS).double(), "scale": torch.rand(4).double()}
    task = il.Task(examples(6), examples(6))
    begin = il.hypergradient(problem, meta, task, inner).end
    found = il.hypergradient(problem, meta, task, inner, ESTIMATORS[estimator], begin=begin)

    leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
    update, params = rule(inner, {}, {"w": leaves["w"]}), begin.params
    state = _reference_state(solver, begin.state)
    for step in range(3, 6):
        params = {name: p if p.requires_grad else p.clone().requires_grad_() for name, p in params.items()}
        grad = torch.autograd.grad(inner_loss(params, leaves, task.support), list(params.values()), create_graph=True)
        params = update(step, params, {"w": grad[0]}, state)
    loss = inner_loss(params, leaves, task.query)
    expected = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    expected = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(meta.items(), expected, strict=True)}
    assert relative_error(found.grad, expected) < 1e-10
    assert bool(found.grad["w"].any()) is (proximal > 0)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert found.end.step == 6


def _reference_state(solver: str, state: dict) -> dict:
    if solver.startswith("adam"):
        return {name: (state["mean"][name], state["square"][name]) for name in state["mean"]}
    return dict(state)


def test_schedules_go_on_where_a_task_is_taken_up():
    rates = [0.5, 0.4, 0.3, 0.2]
    inner = il.SGD(lr=lambda step: rates[step], steps=2)
    task = il.Task(examples(6), examples(6))
    learner = il.MetaLearner(model(), inner=inner)
    end = learner.estimate(task, begin=learner.estimate(task).end).end
    whole = il.MetaLearner(model(), inner=dataclasses.replace(inner, steps=4)).estimate(task).end
    assert relative_error(end.params, whole.params) < 1e-14


def test_a_batch_is_taken_up_through_a_learner():
    batch = il.Task(examples(3, 6), examples(3, 6))
    for chunk in (1, 2, 3):
        learner = il.MetaLearner(model(), inner=il.Adam(lr=0.02, steps=2, eps=1e-3), chunk_size=chunk)
        first = learner.meta_step(batch, keep_end=True)
        assert [end.step for end in first.end] == [2, 2, 2]
        # one of them goes on alone, so that they stand at different steps
        one = learner.meta_step([il.Task(*((x[1], y[1]) for x, y in batch))], begin=[first.end[1]])
        starts = [first.end[0], one.end[0], first.end[2]]
        found = learner.meta_step(batch, begin=starts)
        assert [end.step for end in found.end] == [4, 6, 4]
        for place, start in enumerate(starts):
            alone = learner.estimate(il.Task(*((x[place], y[place]) for x, y in batch)), begin=start)
            assert relative_error(found.end[place].params, alone.params) < 1e-12
            assert found.losses[place].item() == pytest.approx(alone.loss.item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"2 begin were given for 3 tasks"):
        learner.meta_step(batch, begin=first.end[:2])
    with pytest.raises(ValueError, match=r"left by another solver than SGD"):
        il.MetaLearner(model(), inner=il.SGD(lr=0.1, steps=2, proximal=1.0)).meta_step(batch, begin=first.end)


def test_carried_slots_and_tasks():
    batch = il.Task(examples(3, 6), examples(3, 6))
    slots = il.MetaLearner(model(), il.Head(), il.Momentum(lr=0.1, steps=2), carry="slot")
    by_task = il.MetaLearner(model(), il.Head(), il.Momentum(lr=0.1, steps=2), carry="task")
    by_hand = il.MetaLearner(model(), il.Head(), il.Momentum(lr=0.1, steps=2))
    slots.meta_step(batch)
    by_task.meta_step(batch, task_ids=["a", "b", "c"])
    first = by_hand.meta_step(batch, keep_end=True).end
    turned = il.Task(*((x[[2, 0, 1]], y[[2, 0, 1]]) for x, y in batch))
    for learner in (slots, by_task, by_hand):
        learner.zero_grad()
    slots.meta_step(batch)
    by_task.meta_step(turned, task_ids=["c", "a", "b"])
    by_hand.meta_step(batch, begin=first)
    for learner in (slots, by_task):
        assert relative_error(grads(learner), grads(by_hand)) < 1e-12
    again = il.MetaLearner(model(), il.Head(), il.Momentum(lr=0.1, steps=2), carry="slot")
    again.carried.load_state_dict(slots.carried.state_dict())
    slots.zero_grad()
    assert slots.meta_step(batch).loss == again.meta_step(batch).loss
    again.carried.forget(0, 2)
    assert [start is None for start in again.carried.gather([0, 1, 2], torch.device("cpu"))] == [True, False, True]
    again.carried.forget()
    assert not again.carried.state_dict()
    with pytest.raises(ValueError, match=r"task_ids are needed here"):
        by_task.meta_step(batch)
    with pytest.raises(ValueError, match=r"task_ids have no use here"):
        slots.meta_step(batch, task_ids=["a", "b", "c"])


# Recursive checkpoints.


@pytest.mark.parametrize("adam", [False, True])
def test_a_thousand_steps_with_twenty_copies_run_at_most_three_times_each(adam, monkeypatch):
    steps, copies = 1000, 20
    runs = [0] * steps
    plain = _loop.gradient

    def counted(problem, params, meta, batch, step, graph):
        runs[step] += 1
        return plain(problem, params, meta, batch, step, graph)

    monkeypatch.setattr(_loop, "gradient", counted)
    problem = il.Problem(
        lambda meta: {"w": meta["w"]},
        lambda params, meta, _: (params["w"].sin() * meta["scale"]).sum(),
        lambda params, meta, _: params["w"].square().sum(),
    )
    meta = {"w": torch.linspace(-1, 1, 3).double(), "scale": torch.rand(3).double()}
    inner = il.Adam(lr=1e-3, steps=steps, eps=1e-3) if adam else il.SGD(lr=1e-3, steps=steps)
    few = il.hypergradient(problem, meta, il.Task((), ()), inner, il.Unrolled(copies=copies))
    assert max(runs) <= (4 if adam else 3)
    all_held = il.hypergradient(problem, meta, il.Task((), ()), inner, il.Unrolled())
    assert relative_error(few.grad, all_held.grad) < 1e-13


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("copies", [2, 3, 5, 50])
def test_no_more_copies_than_asked_are_held(steps, copies, monkeypatch):
    """Counts the snapshots alive, by their parameters, whenever one is given out."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most = [0]
    stored, ready = _adjoint.Trail._stored, _adjoint.Trail._ready

    def keeping(self, snapshot):
        found = stored(self, snapshot)
        alive.add(found.params["w"])
        return found

    def giving(self, step, snapshot):
        most[0] = max(most[0], len({id(each) for each in (*alive, snapshot.params["w"])}))
        return ready(self, step, snapshot)

    monkeypatch.setattr(_adjoint.Trail, "_stored", keeping)
    monkeypatch.setattr(_adjoint.Trail, "_ready", giving)
    problem = il.Problem(
        lambda meta: {"w": meta["w"] * 1.0},
        lambda params, meta, _: params["w"].sin().sum(),
        lambda params, meta, _: params["w"].square().sum(),
    )
    meta = {"w": torch.ones(2).double()}
    il.hypergradient(problem, meta, il.Task((), ()), il.SGD(lr=0.1, steps=steps), il.Unrolled(copies=copies))
    assert most[0] <= copies


# Prototypes.


@pytest.mark.parametrize("adapts", [il.Head(), il.Everything()])
@pytest.mark.parametrize("chunk", [1, 2])
def test_prototypes_are_plain_autograd(adapts, chunk):
    torch.manual_seed(6)
    labels = torch.arange(WAYS).repeat_interleave(2)
    batch = il.Task(
        (torch.randn(2, 6, 4).double(), torch.stack([labels, labels.flip(0)])),
        (torch.randn(2, 6, 4).double(), labels.expand(2, -1)),
    )
    learner = il.MetaLearner(model(), adapts, il.SGD(lr=0.1, steps=3), start=il.Prototypes(), chunk_size=chunk)
    learner.meta_step(batch)
    net = learner.model
    meta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for place in range(2):
        (x, y), (a, b) = ((u[place], v[place]) for u, v in batch)
        body = {name.removeprefix(""): meta[name] for name in meta if not name.startswith("head")}
        features = functional_call(net[:3], body, (x,))
        means = torch.stack([features[y == way].mean(0) for way in range(WAYS)])
        start = {name: meta[name] for name in learner.adapted}
        start |= {"head.weight": 2 * means, "head.bias": -means.square().sum(1)}
        params = start
        for _ in range(3):
            params = {name: p.view_as(p) for name, p in params.items()}  # the head is a function of the body
            loss = F.cross_entropy(functional_call(net, {**meta, **params}, (x,)), y)
            grad = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grad, strict=True)}
        total = total + F.cross_entropy(functional_call(net, {**meta, **params}, (a,)), b) / 2
    found = {n: p.grad for n, p in net.named_parameters() if not n.startswith("head")}
    expected = torch.autograd.grad(total, [meta[name] for name in found])
    assert relative_error(found, dict(zip(found, expected, strict=True))) < 1e-10
    assert net.get_parameter("head.weight").grad is None  # replaced, so not learned


def test_prototypes_take_any_number_of_ways():
    learner = il.MetaLearner(model(), il.Head(), il.SGD(lr=0.1, steps=2), start=il.Prototypes())
    labels = torch.arange(5).repeat(2)
    inputs = torch.randn(10, 4).double()
    assert learner.evaluate([il.Task((inputs, labels), (inputs, labels))]).outputs[0].shape == (10, 5)
    adapted = learner.adapt(inputs, labels)
    assert adapted(inputs).shape == (10, 5)
    assert adapted.head.out_features == 5
    body_only = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, WAYS, bias=False))
    with pytest.raises(ValueError, match=r"Prototypes\(\) sets weight and bias"):
        il.MetaLearner(body_only, il.Head(), start=il.Prototypes())


# Trees of tensors.


class Answer(OrderedDict):
    """As the outputs of models of other libraries: a dict with attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


torch.utils._pytree.register_pytree_node(
    Answer,
    lambda answer: (list(answer.values()), list(answer)),
    lambda values, keys: Answer(zip(keys, values, strict=True)),
)


class Tokens(nn.Module):
    """Takes token ids and a mask by keywords, and gives an object."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, WAYS)
        self.by_keyword = by_keyword
        if not by_keyword:
            self.forward = self.of_a_dict  # type: ignore[method-assign, assignment]

    def forward(self, ids: Tensor, mask: Tensor) -> Answer:
        hidden = (self.embed(ids) * mask.unsqueeze(-1)).sum(-2) / mask.sum(-1, keepdim=True)
        return Answer(logits=self.head(hidden), hidden=hidden)

    def of_a_dict(self, batch: dict[str, Tensor]) -> Answer:
        return Tokens.forward(self, batch["ids"], batch["mask"])


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("adapts", [il.Head(), il.Everything()])
def test_inputs_targets_and_outputs_are_any_trees(by_keyword, adapts):
    torch.manual_seed(7)
    net = Tokens(by_keyword).double()
    mask = (torch.rand(2, 2, 6, 8) > 0.3).double()
    mask[..., 0] = 1
    ids, labels, values = torch.randint(7, (2, 2, 6, 8)), torch.randint(WAYS, (2, 2, 6)), torch.randn(2, 2, 6).double()

    def part(which: int):
        return {"ids": ids[which], "mask": mask[which]}, {"label": labels[which], "value": values[which]}

    def loss(output: Answer, target: dict[str, Tensor]) -> Tensor:
        return (
            F.cross_entropy(output.logits, target["label"]) + (output.hidden.sum(-1) - target["value"]).square().mean()
        )

    batch = il.Task(part(0), part(1))
    learner = il.MetaLearner(net, adapts, il.SGD(lr=0.2, steps=2), loss=loss)
    learner.meta_step(batch)
    meta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for task in range(2):
        params = {name: meta[name] for name in learner.adapted}
        for step in range(3):
            which = min(step // 2, 1)
            output = functional_call(
                net,
                {**meta, **params},
                (ids[which, task], mask[which, task])
                if by_keyword
                else ({"ids": ids[which, task], "mask": mask[which, task]},),
            )
            value = loss(output, {"label": labels[which, task], "value": values[which, task]})
            if step == 2:
                total = total + value / 2
                break
            grad = torch.autograd.grad(value, list(params.values()), create_graph=True)
            params = {name: p - 0.2 * g for (name, p), g in zip(params.items(), grad, strict=True)}
    expected = dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))
    assert relative_error({n: p.grad for n, p in learner.model.named_parameters()}, expected) < 1e-10
    assert learner.evaluate(batch).outputs.logits.shape == (2, 6, WAYS)
    one = {"ids": ids[0, 0], "mask": mask[0, 0]}
    adapted = learner.adapt(one, {"label": labels[0, 0], "value": values[0, 0]})
    assert (adapted(**one) if by_keyword else adapted(one)).logits.shape == (6, WAYS)


# Tasks of their own sizes and weights.


def test_tasks_of_unequal_sizes_are_computed_one_by_one():
    torch.manual_seed(8)
    tasks = [il.Task(examples(n), examples(n + 2)) for n in (3, 5, 8)]
    learner = il.MetaLearner(model(), il.Head(), il.SGD(lr=0.1, steps=2))
    metrics = learner.meta_step(tasks)
    found = grads(learner)
    each = [learner.estimate(task) for task in tasks]
    assert metrics.losses.tolist() == pytest.approx([one.loss.item() for one in each], rel=1e-14)
    expected = {f"model.{n}": sum(one.grad[n] for one in each) / 3 for n in each[0].grad}
    assert relative_error(found, expected) < 1e-13
    evaluation = learner.evaluate(tasks)
    assert [len(output) for output in evaluation.outputs] == [5, 7, 10]
    assert evaluation.loss.shape == (3,)


@pytest.mark.parametrize("chunk", [1, 3])
def test_task_weights_are_those_of_the_sum(chunk):
    batch = il.Task(examples(3, 6), examples(3, 6))
    weights = torch.tensor([0.5, 0.0, 2.0])
    learner = il.MetaLearner(model(), il.Head(), il.SGD(lr=0.1, steps=2), chunk_size=chunk)
    metrics = learner.meta_step(batch, task_weights=weights)
    each = [learner.estimate(il.Task(*((x[i], y[i]) for x, y in batch))) for i in range(3)]
    expected = {
        f"model.{n}": sum(w * one.grad[n] for w, one in zip(weights.double(), each, strict=True)) for n in each[0].grad
    }
    assert relative_error(grads(learner), expected) < 1e-12
    assert metrics.loss.item() == pytest.approx(sum(w * one.loss for w, one in zip(weights, each, strict=True)).item())
    assert metrics.losses.tolist() == pytest.approx([one.loss.item() for one in each])
    with pytest.raises(ValueError, match=r"task_weights of shape \(2,\) for 3 tasks"):
        learner.meta_step(batch, task_weights=[1, 2])


def test_weights_of_tasks_that_are_numbers_keep_their_precision():
    batch = il.Task(examples(2, 6), examples(2, 6))
    learner = il.MetaLearner(model(), inner=il.SGD(lr=0.1, steps=1))
    metrics = learner.meta_step(batch, task_weights=[0.1, 0.9])
    torch.testing.assert_close(metrics.loss, 0.1 * metrics.losses[0] + 0.9 * metrics.losses[1], rtol=1e-14, atol=0.0)


def test_what_is_carried_keeps_its_precision():
    problem = il.Problem(
        lambda meta: {"w": torch.zeros(3).double()},
        lambda params, meta, batch: meta["rate"].exp() * (params["w"] - batch).square().sum(),
        lambda params, meta, batch: (params["w"] - batch).square().sum(),
    )
    task = il.Task(torch.full((3,), 1 / 3), torch.full((3,), 1 / 3))
    slot, by_hand = (
        il.Bilevel(problem, {"rate": torch.zeros(())}, il.Momentum(lr=0.1, steps=2), carry=carry)
        for carry in ("slot", "none")
    )
    end = None
    for _ in range(3):
        end, kept = by_hand.meta_step(task, begin=end).end, slot.meta_step(task).end
    assert kept.params["w"].dtype == torch.float64
    assert torch.equal(kept.params["w"], end.params["w"])


def test_what_is_carried_follows_the_learner_to_another_precision():
    learner = il.MetaLearner(model(), il.Head(), il.Adam(lr=0.1, steps=2), carry="slot")
    for kind in (torch.float32, torch.float64):
        learner.to(kind)
        learner.meta_step(il.Task(examples(2, 6), examples(2, 6)))
        left = [leaf for leaf in tree_leaves(learner.carried.state_dict()) if isinstance(leaf, Tensor)]
        assert {leaf.dtype for leaf in left} == {kind}


# Minibatches.


def test_minibatches_show_every_example_before_any_again():
    support = (torch.zeros(10, 2), torch.zeros(10))
    drawn = minibatches(il.SGD(lr=0.1, steps=5, minibatch=4), support, [1, 2], 5)
    assert drawn.shape == (2, 5, 4)
    for task in drawn:
        assert sorted(task.flatten()[:10].tolist()) == list(range(10))
        assert sorted(task.flatten()[10:].tolist()) == list(range(10))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("chunk", [1, 2])
def test_minibatches_are_plain_autograd_and_no_matter_of_chunks(chunk):
    torch.manual_seed(9)
    batch = il.Task(examples(2, 6), examples(2, 6))
    learner = il.MetaLearner(model(), inner=il.SGD(lr=0.1, steps=3, minibatch=4), chunk_size=chunk)
    torch.manual_seed(10)
    learner.meta_step(batch)
    torch.manual_seed(10)
    rows = learner._rows(batch, [None, None], int(torch.randint(2**31, ())), 3)
    gathered = il.Steps(tuple(torch.stack([value[t][rows[t]] for t in range(2)]) for value in batch.support))
    stream = il.MetaLearner(model(), inner=il.SGD(lr=0.1, steps=3))
    stream.meta_step(il.Task(gathered, batch.query))
    assert relative_error(grads(learner), grads(stream)) < 1e-12


@pytest.mark.parametrize("seed", [None, 3])
def test_minibatches_of_a_list_are_those_of_a_batch(seed):
    def fit(params, meta, batch):
        return (params["w"] * batch[0] - meta["target"] * batch[1]).square().mean()

    problem = il.Problem(lambda meta: {"w": torch.zeros(2).double()}, fit, fit, seed=seed)
    batch = il.Task(*(tuple(torch.randn(3, 6, 2).double() for _ in range(2)) for _ in range(2)))
    apart = [il.Task(*(tuple(value[place] for value in part) for part in batch)) for place in range(3)]
    found = []
    for given in (batch, apart):
        meta = {"target": torch.ones(2).double()}
        learner = il.Bilevel(problem, meta, il.SGD(lr=0.1, steps=3, minibatch=4), carry="slot", stacked=given is batch)
        torch.manual_seed(10)
        losses = [learner.meta_step(given).losses for _ in range(2)]
        found.append([*losses, learner.meta["target"].grad, learner.evaluate(given).loss])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    learner.carried.forget()
    assert not torch.equal(learner.meta_step(given).losses, losses[0]), "every meta-step draws its own"
    assert learner.estimate(given[0]).loss != learner.estimate(given[0]).loss


def test_minibatches_go_on_beyond_the_steps_of_training():
    seen: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(len(output))
        return F.cross_entropy(output, target)

    learner = il.MetaLearner(model(), inner=il.SGD(lr=0.1, steps=2, minibatch=2), loss=loss, chunk_size=1)
    task = il.Task(examples(6), examples(6))
    learner.evaluate([task], steps=5)
    assert seen == [2] * 5 + [6]
    seen.clear()
    learner.adapt(*task.support, steps=4)
    assert seen == [2] * 4


def test_implicit_refuses_clipping_beside_the_terms():
    inner = il.SGD(lr=0.1, steps=3, clip=0.3, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"SGD\(clip=...\) misses.*Leave clip out"):
        il.MetaLearner(model(), il.Head(), inner, il.Implicit())


def test_a_support_set_smaller_than_a_minibatch_is_seen_whole():
    for size in (6, 7):  # in order: the losses may read something of each example by its place
        drawn = minibatches(il.SGD(lr=0.1, steps=3, minibatch=size), examples(6), [1, 2], 3)
        assert drawn.tolist() == [[[*range(6)]] * 3] * 2
    assert minibatches(il.SGD(lr=0.1, steps=3, minibatch=4), examples(6), [1, 2], 0).shape == (2, 0, 4)


@pytest.mark.parametrize(
    "support",
    [{"prior": torch.zeros(3), "x": torch.zeros(20)}, (torch.zeros(6), torch.tensor(1.0)), torch.tensor(1.0), ()],
)
def test_minibatches_of_what_holds_more_than_examples_are_refused(support):
    with pytest.raises(ValueError, match=r"minibatch= draws examples, .* needs them in the first dimension"):
        minibatches(il.SGD(lr=0.1, steps=3, minibatch=2), support, [1], 3)


def test_minibatches_of_streams_are_refused():
    with pytest.raises(ValueError, match=r"minibatch= draws from one support set"):
        il.MetaLearner(model(), inner=il.SGD(lr=0.1, steps=STEPS, minibatch=2)).meta_step(stream())


def test_leaves_of_steps_that_are_no_tensors_stay_whole():
    def loss(params, meta, batch):
        assert batch[1:] == ("mean", None, 3)
        return (params["w"] - meta["w"] * batch[0].mean()).square()

    problem = il.Problem(lambda meta: {"w": torch.zeros(())}, loss, lambda params, meta, _: params["w"])
    task = il.Task(il.Steps((torch.ones(2, 5), "mean", None, 3)), ())
    found = il.hypergradient(problem, {"w": torch.ones(())}, task, il.SGD(lr=0.25, steps=2))
    assert found.grad["w"].item() == pytest.approx(0.75)


def test_a_step_without_a_batch_is_named():
    def loss(params, meta, batch):
        return (params["w"] - meta["w"] * batch).square()

    problem = il.Problem(lambda meta: {"w": torch.zeros(())}, loss, lambda params, meta, _: params["w"])
    rows = iter(torch.ones(2))
    for batches in (torch.ones(2).__getitem__, lambda step: next(rows)):
        with pytest.raises(ValueError, match=r"no batch for step 2"):
            il.hypergradient(problem, {"w": torch.ones(())}, il.Task(il.Steps(batches), ()), il.SGD(lr=0.1, steps=3))


@pytest.mark.parametrize("steps", [0, 2])
def test_where_a_task_was_left_is_a_copy(steps):
    problem = il.Problem(
        dict,
        lambda params, meta, _: (params["w"] - params["still"]).square().sum(),
        lambda params, meta, _: params["w"].sum() + params["still"].sum(),
    )
    meta, task = {"w": torch.zeros(2), "still": torch.ones(2)}, il.Task((), ())
    learner = il.Bilevel(problem, meta, il.SGD(lr=0.1, steps=steps, moves=[["w"]]))
    ends = [learner.estimate(task).end]
    with torch.inference_mode():
        ends += [learner.meta_step(task).end, il.hypergradient(problem, learner.meta_tree(), task, learner.inner).end]
    with torch.no_grad():
        learner.meta["still"].zero_()
    assert [end.params["still"].tolist() for end in ends] == [[1, 1]] * 3
    assert not any(value.is_inference() for end in ends for value in end.params.values())
