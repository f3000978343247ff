"""Every named method is settings that build a learner which can take a meta-step."""

import pytest
import torch

from innerloop.problem import Task
from innerloop.training.build import build_learner, build_optimizer
from innerloop.training.methods import METHODS, method, method_settings
from innerloop.training.settings import Settings

SMALL = {"filters": 2, "ways": 3}


@pytest.mark.parametrize(("dataset", "shape"), [("omniglot", (1, 8, 8)), ("cifar_fs", (3, 8, 8))])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name, dataset, shape):
    steps = {"inner_steps": min(3, method_settings(name, dataset).get("inner_steps", 3))}
    settings = Settings(dataset=dataset, **method_settings(name, dataset) | SMALL | steps | {"downsample": "stride"})
    learner = build_learner(settings, shape, 3)
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    optimizer, _ = build_optimizer(settings, learner)
    targets = torch.arange(3).repeat(2, 1)
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.rand(2, 3, *shape, generator=generator) for _ in range(2))
    metrics = learner.meta_step(Task((support, targets), (query, targets)))
    optimizer.step()
    assert metrics.loss.isfinite()
    after = learner.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items())
    assert all(value.isfinite().all() for value in after.values())


def test_an_argument_goes_where_the_method_takes_it():
    assert method_settings("window:3", "cifar_fs")["meta_gradient"] == "window:3"
    assert method_settings("lambda:00001", "cifar_fs")["adapts"] == "blocks:00001"
    assert method_settings("window", "cifar_fs")["meta_gradient"] == "window:2"


def test_maml_has_its_papers_rates_for_characters_and_for_pictures():
    assert method_settings("maml", "omniglot")["inner_lr"] == 0.4
    assert method_settings("maml", "mini_imagenet")["inner_lr"] == 0.01
    assert Settings(**method_settings("maml", "omniglot")).inner_steps == 1


@pytest.mark.parametrize("name", ["window:3", "binomial", "truncated:4"])
def test_methods_of_several_inner_steps_have_mamls_rate_for_characters(name):
    characters, pictures = (method_settings(name, dataset) for dataset in ("glyphs", "cifar_fs"))
    assert (characters["inner_lr"], characters["inner_steps"]) == (0.1, 5)
    assert (pictures["inner_lr"], pictures["inner_steps"]) == (0.01, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mamml", "did you mean 'maml'"),
        ("maml:5", "takes nothing behind a colon"),
        ("window:", "such as window:5"),
    ],
)
def test_what_is_no_method_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        method(text)
