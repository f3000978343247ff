"""The classifiers that every accuracy stands beside: right in themselves, on the run's own features, and told of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innerloop as il
from innerloop.problem import Task
from innerloop.training import baselines
from innerloop.training.evaluation import Assessment, Baseline, Estimate, Scores, assess, verdict
from innerloop.training.report import describe, summary
from innerloop.training.settings import Settings


def test_the_linear_probe_is_regularised_logistic_regression():
    support, query = torch.randn(2, 10, 7).double(), torch.randn(2, 6, 7).double()
    labels = torch.arange(5).repeat(2, 2)
    found = baselines.linear_probe(support, labels, query, 5)
    for place in range(2):
        x, z = (torch.cat([F.normalize(e[place], dim=1), torch.ones(len(e[place]), 1)], 1) for e in (support, query))
        w = torch.zeros(8, 5).double().requires_grad_()
        solver = torch.optim.LBFGS([w], lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0)

        def loss(x=x, w=w, place=place):
            w.grad = None
            value = 10 * F.cross_entropy(x @ w, labels[place], reduction="sum") + 0.5 * w.square().sum()
            value.backward()
            return value

        for _ in range(5):
            solver.step(loss)
        torch.testing.assert_close(found[place], z @ w.detach(), rtol=0, atol=5e-4)


def model(norm: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.BatchNorm1d(12) if norm else nn.Tanh(), nn.Linear(12, 3))


TASKS = il.tasks.glyphs(ways=3, shots=2, queries=2)


@pytest.mark.parametrize("mode", ["batch", "task", "frozen"])
def test_features_are_those_that_enter_the_head_in_the_run(mode):
    learner = il.MetaLearner(model(), il.Head(), il.SGD(lr=0.1, steps=1), batch_norm=mode)
    batch = TASKS.batch("test", 0, 2)
    stored = {name: value.clone() for name, value in learner.state_dict().items()}
    weight, bias = (learner.model.get_parameter(f"3.{name}") for name in ("weight", "bias"))
    for inductive in (False, True):
        _, query = baselines.features(learner, batch, inductive)
        # before any inner step the head is the model's own
        scores = learner.evaluate(batch, steps=0, inductive=inductive or mode == "task").outputs
        if not (mode == "task" and not inductive):
            torch.testing.assert_close(F.linear(query, weight, bias), scores)
    assert all(torch.equal(value, stored[name]) for name, value in learner.state_dict().items())


def test_class_means_are_a_proto_net_that_ranks_by_the_cosine():
    learner = il.MetaLearner(
        model(), il.Head(), il.SGD(lr=0.1, steps=0), start=il.Prototypes(cosine=True), batch_norm="batch"
    )
    found = assess(learner, TASKS, "validation", 20)
    for scores in found.protocols:
        same = scores.baselines[baselines.MEAN]
        assert same.difference == Estimate(0.0, 0.0)
        assert same.accuracy == scores.accuracy
        assert set(scores.baselines) == {baselines.MEAN, baselines.PROBE, baselines.PIXELS}
    assert verdict({baselines.MEAN: same}) == ""


def test_differences_are_paired_and_go_into_the_json():
    learner = il.MetaLearner(model(), il.Head(), il.SGD(lr=0.1, steps=3))
    found = assess(learner, TASKS, "validation", 33)
    assert not found.no_features
    for scores in found.protocols:
        batch = TASKS.batch("validation", 0, 33)
        each = baselines.accuracies(learner.eval(), batch, 3, scores.inductive)
        for name, mine in scores.baselines.items():
            assert mine.difference == Estimate.of(scores.accuracies - each[name])
    written = summary(found)
    assert written["inductive"]["baselines"]["linear probe"].keys() == {"accuracy", "difference"}
    text = describe(found, Settings(), "validation").splitlines()
    assert written["verdict"] == verdict(found.protocols[0].baselines) == text[0]  # an untrained run loses to pixels
    assert "points better than adaptation: train for longer" in text[0]


def test_the_verdict_names_the_best_baseline_beyond_the_interval():
    def beside(difference: float, interval: float) -> Baseline:
        return Baseline(Estimate(0.5, 0.01), Estimate(difference, interval))

    within = {baselines.MEAN: beside(-0.01, 0.02), baselines.PROBE: beside(0.1, 0.01)}
    assert verdict(within) == ""
    lost = within | {baselines.MEAN: beside(-0.055, 0.008), baselines.PIXELS: beside(-0.02, 0.01)}
    assert verdict(lost).startswith(
        "Nearest class mean on this run's own features is 5.5 ± 0.8 points better than adaptation: "
        "train --method protonet or proto-anil"
    )


def test_a_model_without_a_head_has_pixels_alone_and_says_so():
    learner = il.MetaLearner(nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), inner=il.SGD(lr=0.1, steps=1))
    found = assess(learner, TASKS, "validation", 3)
    assert set(found.inductive.baselines) == {baselines.PIXELS}
    assert "no baseline on features: the head of Sequential would be" in describe(found, Settings(), "validation")


def test_regression_has_none():
    learner = il.MetaLearner(il.models.MLP((1, 4, 1)), inner=il.SGD(lr=0.01, steps=1), loss=F.mse_loss)
    found = assess(learner, il.tasks.sinusoid(), "validation", 3)
    assert isinstance(found, Assessment)
    assert isinstance(found.inductive, Scores)
    assert found.inductive.baselines == {}
    assert "baselines" in summary(found)["inductive"]


def test_inputs_may_be_a_tree():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(first + second).tanh())

    def part(examples: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = {name: torch.randn(2, examples, 4) for name in ("first", "second")}
        return inputs, torch.arange(2).repeat(2, examples // 2)

    learner, task = il.MetaLearner(Words(), il.Head(), il.SGD(lr=0.1, steps=1)), Task(part(4), part(6))
    together, alone = (baselines.features(learner, task, inductive) for inductive in (False, True))
    assert together[0].shape == alone[0].shape == (2, 4, 6)
    torch.testing.assert_close(together[1], alone[1])
