"""Every named method is settings that build a learner which can take a meta-step."""

import pytest
import torch

import innerloop as il
from innerloop.choices import text
from innerloop.inner import InnerSolver
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
    metrics = learner.meta_step(
        Task((support, targets), (query, targets)), task_ids=[0, 1] if learner.carry == "task" else None
    )
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


@pytest.mark.parametrize("dataset", ["omniglot", "cifar_fs"])
@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_a_method_make_its_objects_again(name, dataset):
    known = METHODS[name]
    settings = method_settings(name, dataset)
    if known.adapts is None:
        assert settings == {}
        return
    inner = known.inner if isinstance(known.inner, InnerSolver) else known.inner[dataset != "omniglot"]
    assert Settings(dataset=dataset, **settings).method() == (known.adapts, inner, known.meta_gradient)
    assert all(settings[key] == value for key, value in known.outer.items())


def test_a_methods_terms_are_those_of_its_paper():
    reduced, newton = (Settings(**method_settings(name, "omniglot")) for name in ("memory-reduced", "imaml-hf"))
    assert reduced.method()[1:] == (il.SGD(lr=0.1, steps=20, weight_decay=0.05), il.MemoryReduced(il.CG(20)))
    assert newton.method()[1:] == (il.NewtonCG(lr=1.0, steps=3, proximal=2.0), il.Implicit(il.CG(5)))
    for dataset, proximal, steps in (("omniglot", 2.0, 16), ("mini_imagenet", 0.5, 10)):
        imaml = Settings(dataset=dataset, **method_settings("imaml", dataset)).method()
        assert imaml[1:] == (il.SGD(lr=0.1, steps=steps, proximal=proximal), il.Implicit(il.CG(5)))
    assert text(il.MemoryReduced()) == "memory-reduced"
    # the rest adds nothing to the inner problem
    added = {name for name in METHODS for key in ("proximal", "weight_decay") if key in method_settings(name, "glyphs")}
    assert added == {"imaml", "imaml-head", "imaml-hf", "memory-reduced"}


def test_reptile_trains_on_more_shots_in_minibatches_as_published():
    settings = Settings(**method_settings("reptile", "omniglot"))
    assert (settings.train_shots, settings.schedule, settings.method()[1].minibatch) == (10, "linear", 10)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("mamml", "did you mean 'maml'"),
        ("maml:5", "takes nothing behind a colon"),
        ("window:", "such as window:5"),
    ],
)
def test_what_is_no_method_is_refused(typed, message):
    with pytest.raises(ValueError, match=message):
        method(typed)
