"""Settings: command line, configuration file and run folder say the same, and nonsense is refused in one line."""

import argparse
import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import innerloop as il
from innerloop.choices import ADAPTS, INNER, META_GRADIENT, START, choice, make, text
from innerloop.cli.arguments import add_settings, given_settings
from innerloop.cli.parser import Parser
from innerloop.training.build import build_learner, build_optimizer
from innerloop.training.choices import OPTIMIZER, SCHEDULE
from innerloop.training.settings import Settings, flag, read_config

CHANGED: dict[str, Any] = {
    "dataset": "omniglot",
    "ways": 20,
    "rotations": True,
    "downsample": "stride",
    "adapts": "blocks:00011",
    "inner": "learned-rates:layer-step",
    "inner_lr": 0.05,
    "weight_decay": 0.02,
    "proximal": 0.5,
    "meta_gradient": "truncated:2",
    "start": "prototypes",
    "carry": "slot",
    "optimizer": "sgd:momentum=0.9,nesterov=true",
    "outer_lr": 1e-4,
    "clip": 10.0,
    "patience": None,
    "minutes": 2.5,
}
YAML = """
dataset: omniglot
ways: 20
rotations: true
downsample: stride
adapts: "blocks:00011"
inner: learned-rates:layer-step
inner-lr: .05
weight-decay: .02
proximal: .5
start: prototypes
carry: slot
meta_gradient: truncated:2
optimizer: sgd:momentum=0.9,nesterov=true
outer-lr: 1e-4
clip: 10
patience: none
minutes: 2.5
"""


def from_command_line(*argv: str) -> Settings:
    parser = Parser()
    add_settings(parser)
    return Settings(**given_settings(parser.parse_args(argv)))


def test_three_faces_of_the_same_settings(tmp_path: Path) -> None:
    expected = Settings(**CHANGED)
    options = [
        f"--{flag(name)}={str(value).lower() if value in (True, None) else value}" for name, value in CHANGED.items()
    ]
    assert from_command_line(*options) == expected
    (tmp_path / "some.yaml").write_text(YAML)
    assert Settings(**read_config(tmp_path / "some.yaml")) == expected
    toml = "\n".join(f"{name} = {json.dumps(value)}" for name, value in CHANGED.items() if value is not None)
    (tmp_path / "some.toml").write_text(toml)
    assert Settings(**read_config(tmp_path / "some.toml")) == expected
    expected.save(tmp_path / "settings.json")
    assert Settings.load(tmp_path / "settings.json") == expected
    assert json.loads((tmp_path / "settings.json").read_text()) == asdict(expected)


def test_every_field_is_an_option_with_help() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    text = "".join(parser.format_help().split())
    for each in fields(Settings):
        assert f"--{flag(each.name)}" in text
        assert "".join(each.metadata["help"].split()) in text
    assert text.count("[none]") == 1  # of --carry, where it is a name
    assert "[5forimages]" in text


def test_ways_shots_and_queries_are_those_of_the_data_set() -> None:
    assert (Settings().ways, Settings().shots, Settings().queries) == (5, 1, 5)
    sinusoid = Settings(dataset="sinusoid", shots=7)
    assert (sinusoid.ways, sinusoid.shots, sinusoid.queries) == (None, 7, 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "omniglott"}, "dataset 'omniglott' is unknown: did you mean 'omniglot'? choose one of glyphs, "),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"steps": None}, "steps is None; it must be a whole number"),
        ({"inner_lr": "0"}, "inner-lr is 0.0; it must be above 0"),
        ({"inner_lr": "nan"}, "inner-lr is nan; it must be above 0"),
        ({"outer_lr": -1}, "outer-lr is -1.0; it must be above 0"),
        ({"clip": "big"}, "clip is 'big'; it must be a number or none"),
        ({"rotations": "maybe"}, "rotations is 'maybe'; it must be true or false or none"),
        ({"batch_norm": "batches"}, "batch-norm 'batches' is unknown: did you mean 'batch'? choose one of batch, "),
        ({"meta_gradient": "exact:2"}, "meta-gradient 'exact' is unknown: choose one of unrolled, "),
        (
            {"start": "prototype"},
            "start 'prototype' is unknown: did you mean 'prototypes'? choose one of auto, prototypes",
        ),
        ({"inner_lr": "automatic"}, "inner-lr is 'automatic'; it must be a number, auto or none"),
        ({"products": "block"}, "products 'block' is unknown: did you mean 'blocks'? choose one of auto, autograd, "),
        ({"carry": "slots"}, "carry 'slots' is unknown: did you mean 'slot'? choose one of none, slot"),
        ({"proximal": -0.5}, "proximal is -0.5; it must be 0 or more"),
        ({"weight_decay": "nan"}, "weight-decay is nan; it must be 0 or more"),
    ],
)
def test_nonsense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Settings(**given)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("some.yaml", "step: 3", "the setting 'step' is unknown: did you mean 'steps'?"),
        ("some.yaml", "steps: [", "cannot be read"),
        ("some.toml", "steps = ", "cannot be read"),
        ("some.yaml", "- steps", "must hold settings by name"),
    ],
)
def test_bad_configuration_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*" + re.escape(message) + r"[^\n]*$"):
        read_config(tmp_path / name)


def test_choices_become_objects() -> None:
    assert make("adapts", ADAPTS, "blocks:11111") == il.Blocks("11111")
    assert make("adapts", ADAPTS, "named:block4.*,head.*").globs == ("block4.*", "head.*")
    assert make("meta-gradient", META_GRADIENT, "unrolled") == il.Unrolled()
    assert make("meta-gradient", META_GRADIENT, "unrolled:copies=10,offload=true") == il.Unrolled(
        copies=10, offload=True
    )
    assert make("meta-gradient", META_GRADIENT, "unrolled:record=true") == il.Unrolled(record=True)
    assert make("meta-gradient", META_GRADIENT, "unrolled:learn_start=false") == il.Unrolled(learn_start=False)
    assert make("meta-gradient", META_GRADIENT, "truncated:2") == il.Truncated(2)
    assert make("meta-gradient", META_GRADIENT, "mixed:1=0.2,5=0.8") == il.Mixed((1, 5), (0.2, 0.8))
    assert make("meta-gradient", META_GRADIENT, "implicit:iterations=9") == il.Implicit(il.CG(9))
    assert make("meta-gradient", META_GRADIENT, "memory-reduced:iterations=9") == il.MemoryReduced(il.CG(9))
    assert make("meta-gradient", META_GRADIENT, "memory-reduced") == il.Implicit(il.CG(20), learn_start=False)
    assert make("meta-gradient", META_GRADIENT, "released-imaml:0.5,iterations=7") == il.ReleasedIMAML(
        0.5, il.CG(7, damping=1.0)
    )
    assert make("start", START, "prototypes") == il.Prototypes()
    options = {"lr": 0.1, "steps": 3, "test_steps": None}
    assert make("inner", INNER, "sgd", **options) == il.SGD(lr=0.1, steps=3)
    assert make("inner", INNER, "momentum:momentum=0.5", **options) == il.Momentum(lr=0.1, steps=3, momentum=0.5)
    assert make("inner", INNER, "learned-rates:layer-step", **options) == il.LearnedRates(
        lr=0.1, steps=3, per="layer-step"
    )
    assert make("inner", INNER, "adamw:beta1=0,eps=1e-3,clip=1", **options) == il.AdamW(
        lr=0.1, steps=3, betas=(0, 0.999), eps=1e-3, clip=1
    )
    assert make("inner", INNER, "sgd:minibatch=4", **options, proximal=2.0) == il.SGD(
        lr=0.1, steps=3, minibatch=4, proximal=2.0
    )
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = make("optimizer", OPTIMIZER, "sgd:momentum=0.9,nesterov=true", [weight], lr=0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("truncated", "meta-gradient 'truncated': missing a required argument: 'horizon'; truncated takes horizon"),
        ("reptile:3", "meta-gradient 'reptile:3': too many positional arguments; reptile takes no arguments"),
        (
            "truncated:m=3",
            "meta-gradient 'truncated:m=3': missing a required argument: 'horizon'; truncated takes horizon",
        ),
    ],
)
def test_choices_with_wrong_arguments(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make("meta-gradient", META_GRADIENT, text)


@pytest.mark.parametrize(
    "chosen",
    [
        *(il.Head(), il.Body(), il.Everything(), il.Blocks("00011"), il.Blocks(["11111", "00011"])),
        il.Blocks("00011", batch_norm=False),
        *(il.Unrolled(), il.Unrolled(copies=7), il.Unrolled(record=True), il.Unrolled(learn_start=False)),
        *(il.Truncated(2), il.FirstOrder(), il.Reptile(), il.Window(3), il.Window(2, "true_forward")),
        *(il.Binomial(2), il.Binomial(2, "released"), il.Mixed((1, 5), (0.25, 0.75)), il.Implicit()),
        *(il.Implicit(il.CG(9, damping=0.5)), il.MemoryReduced(), il.MemoryReduced(il.CG(9)), il.ReleasedIMAML()),
        il.ReleasedIMAML(0.5, il.CG(7, damping=2.0)),
    ],
    ids=repr,
)
def test_what_an_object_is_called_makes_it_again(chosen: Any) -> None:
    what = "adapts" if isinstance(chosen, il.adapts.Adapts) else "meta_gradient"
    assert choice(text(chosen), what) == chosen
    named = il.Named("block4.*", "head.*")
    assert choice(text(named), "adapts").globs == named.globs


@pytest.mark.parametrize(
    "chosen",
    [
        il.SGD(lr=0.1, steps=3),
        il.SGD(lr=0.1, steps=3, weight_decay=0.1, proximal=2.0, test_steps=5, clip=1.0, minibatch=4),
        il.Momentum(lr=0.1, steps=3, momentum=0.5),
        il.Adam(lr=0.1, steps=3, betas=(0.0, 0.99), eps=1e-3),
        il.AdamW(lr=0.1, steps=3, weight_decay=0.1),
        il.LearnedRates(lr=0.1, steps=3),
        il.LearnedRates(lr=0.1, steps=3, per="layer-step"),
        il.NewtonCG(steps=3, iterations=7, proximal=2.0),
    ],
    ids=repr,
)
def test_what_an_inner_solver_is_called_makes_it_again(chosen: il.inner.InnerSolver) -> None:
    options: dict[str, Any] = {"inner_lr": chosen.lr, "inner_steps": chosen.steps}
    options |= {name: getattr(chosen, name) for name in ("test_steps", "weight_decay", "proximal")}
    assert Settings(inner=text(chosen), **options).method()[1] == chosen


def test_schedules() -> None:
    cosine = make("schedule", SCHEDULE, "cosine:0.01")
    assert [cosine(share) for share in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.505, 0.01, 0.01])
    assert make("schedule", SCHEDULE, "constant")(0.3) == 1.0


def test_settings_build_a_learner() -> None:
    settings = Settings(filters=4, inner="learned-rates", adapts="body", precision="float64", device="cpu")
    learner = build_learner(settings, (1, 28, 28), 5)
    assert learner.model.get_parameter("head.weight").shape[0] == 5
    assert isinstance(learner.adapts, il.Body)
    assert all(parameter.dtype == torch.float64 for parameter in learner.parameters())
    again = build_learner(settings, (1, 28, 28), 5)
    assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), again.parameters(), strict=True))
    terms: dict[str, Any] = {"weight_decay": 0.05, "meta_gradient": "memory-reduced", "carry": "slot"}
    reduced = build_learner(Settings(filters=4, inner="sgd", **terms), (1, 28, 28), 5)
    assert (reduced.inner, reduced.carry) == (il.SGD(lr=0.1, steps=5, weight_decay=0.05), "slot")
    assert build_learner(Settings(filters=4, products="differences"), (1, 28, 28), 5).products == "differences"
    assert build_learner(Settings(filters=4, start="prototypes", inner="sgd"), (1, 28, 28), 5).few_shot.start
    optimizer, scheduler = build_optimizer(Settings(outer_lr=0.2, schedule="cosine", steps=4), learner)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "mlp", "downsample": "stride"}, "model 'mlp': got an unexpected keyword argument 'downsample'"),
        ({"adapts": "blocks:011"}, "has 3 places but Conv4 has 5 blocks"),
        ({"meta_gradient": "reptile", "adapts": "head"}, "Reptile gives no gradient to parameters"),
        ({"meta_gradient": "implicit", "adapts": "everything", "inner": "sgd"}, r"give SGD\(proximal=2.0\)"),
        (
            {"meta_gradient": "memory-reduced", "adapts": "everything", "inner": "sgd"},
            "learns only what is not adapted",
        ),
        (
            {"meta_gradient": "implicit", "inner": "learned-rates", "proximal": 2.0},
            "Implicit gives no gradient to the rates of LearnedRates",
        ),
        ({"meta_gradient": "released-imaml", "inner": "sgd", "proximal": 2.0}, "takes plain gradient steps"),
        ({"products": "blocks", "chunk_size": 2}, "products='blocks' takes tasks one by one"),
    ],
)
def test_choices_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_learner(Settings(**given), (1, 28, 28), 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip": "inf"}, "clip is too large a number"),
        ({"minutes": float("inf")}, "minutes is too large a number"),
        ({"schedule": "cosine:-1"}, "the schedule's floor is -1; it is a share of the outer rate, from 0 to 1"),
        ({"schedule": "linear:NaN"}, "schedule 'linear:NaN': floor is 'NaN'; it must be a number"),
        ({"inner": "momentum:momentum=0.5,momentum=0.9"}, "an argument is given twice; give each once"),
        ({"inner": "sgd:lr=3"}, "lr has an option of its own; leave it out here"),
        ({"inner": "adam:eps=x"}, "eps='x'): a value is of a kind that it cannot take"),
        ({"meta_gradient": "truncated:2.5"}, "horizon is '2.5'; it must be a whole number"),
        ({"batch_norm": "task:3"}, "batch-norm 'task:3' is unknown"),
    ],
)
def test_nonsense_behind_a_colon_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**given)


def test_pairs_are_typed_with_a_slash() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert make("optimizer", OPTIMIZER, "adam:betas=0.8/0.9", parameters).defaults["betas"] == (0.8, 0.9)
    with pytest.raises(ValueError, match=r"betas is '0.9'; give 2 numbers, as in 0.9/0.999"):
        make("optimizer", OPTIMIZER, "adam:betas=0.9", parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; leave it out"),
        ("# nothing\n", "is empty; leave it out"),
        ("steps: 1\nsteps: 2\n", "steps is set twice; set it once"),
        ("inner-lr: 1\ninner_lr: 2\n", "inner-lr is set twice; set it once"),
        ('{"steps": 1, "steps": 2}', "steps is set twice; set it once"),
    ],
)
def test_a_configuration_says_each_thing_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(tmp_path / "some.yaml")


def test_a_subclass_of_the_users_own_has_no_text() -> None:
    class Mine(il.SGD):
        """A rule of the user's own."""

    with pytest.raises(ValueError, match=r"Mine\(.*\) has no name that can be typed: the command takes everything"):
        text(Mine(lr=0.1, steps=1))


@pytest.mark.parametrize(
    ("name", "refused"), [("implicit", True), ("memory-reduced:iterations=5", True), ("unrolled", False)]
)
def test_a_run_of_the_first_edition_whose_estimator_brought_a_term_is_refused(
    tmp_path: Path, name: str, refused: bool
) -> None:
    Settings(meta_gradient=name).save(tmp_path / "settings.json")
    assert Settings.load(tmp_path / "settings.json").meta_gradient == name
    first = json.loads((tmp_path / "settings.json").read_text())
    del first["start"], first["carry"]
    (tmp_path / "settings.json").write_text(json.dumps(first))
    if not refused:
        assert Settings.load(tmp_path / "settings.json") == Settings(meta_gradient=name)
        return
    with pytest.raises(ValueError, match=r"is of the first edition.*--proximal 2 or --weight-decay"):
        Settings.load(tmp_path / "settings.json")
