"""Models and tasks of the user's own, by name for the command, and runs that were made in Python."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import innerloop as il
from commands import refused
from innerloop.cli import main
from innerloop.training.adaptation import load_adapted
from innerloop.training.runs import load_learner, read_run
from innerloop.training.settings import Settings

CODE = """
import torch
from torch import nn
import innerloop as il


class Net(nn.Module):
    def __init__(self, ways=5, in_channels=1, width=4):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, 2, 1)
        self.body = nn.Conv2d(width, width, 3, 2, 1)
        self.head = nn.Linear(width, ways)

    def forward(self, images):
        return self.head(self.body(self.stem(images).relu()).relu().mean((-1, -2)))


def narrow():
    return Net(ways=2)


def failing():
    raise RuntimeError("out of ideas")


def number():
    return 3


def noise(ways=3, seed=0):
    draws = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 30
    x = torch.randn(30, 1, 8, 8, generator=draws)[y] + torch.randn(300, 1, 8, 8, generator=draws)
    return il.tasks.arrays(x, y, ways=ways, shots=2, queries=3, seed=seed)


def learner(ways=3):
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return il.MetaLearner(Net(ways), "head", il.SGD(lr=0.1, steps=2), loss=loss)
"""
SHORT = ["--steps=4", "--validate-every=2", "--validation-tasks=4", "--test-tasks=4", "--tasks-per-batch=2"]
SGD = ["--inner=sgd", "--inner-lr=0.1", "--threads=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with code, and a run on it."""
    place = tmp_path_factory.mktemp("any")
    (place / "net.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INNERLOOP_CACHE", str(place / "cache"))
        patch.chdir(place)
        main(["train", "--model=net.py:Net:width=6", "--dataset=net.py:noise", "--out=run", *SHORT, *SGD])
        yield place


@pytest.fixture
def place(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INNERLOOP_CACHE", str(trained / "cache"))
    monkeypatch.chdir(trained)
    return trained


def test_the_command_trains_a_model_of_the_users_own(place: Path) -> None:
    learner, _ = load_learner(place / "run", read_run(place / "run"))
    assert type(learner.model).__name__ == "Net"
    assert learner.model.get_parameter("stem.weight").shape[0] == 6, "arguments behind the name"
    assert learner.model.get_parameter("head.weight").shape[0] == 3, "as many classes as the tasks have"


def test_all_commands_work_on_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "run", run := tmp_path / "run")
    main(["evaluate", str(run), "--tasks=4"])
    assert (run / "evaluate-net.py-noise-test.json").exists()
    main(["check", str(run), "--tasks=2", "--estimators=first-order"])
    assert json.loads((run / "check.json").read_text())["trained weights"]["rows"][0]["memory"] > 0
    main(["patterns", str(run), "--tasks=4", "--repetitions=2", "--steps=1", "--parts=stem,body,head"])
    choice = json.loads((run / "pattern.json").read_text())
    assert (choice["parts"], len(choice["pattern"])) == (["stem", "body", "head"], 3)
    for label in ("a", "b"):
        for number in range(2):
            (tmp_path / "few" / label).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "few" / label / f"{number}.png")
    few = str(tmp_path / "few")
    (run / "pattern.json").write_text(json.dumps(choice | {"pattern": "001"}))
    main(["adapt", str(run), f"--support={few}", f"--query={few}", f"--pattern={run / 'pattern.json'}"])
    assert "Blocks('001', parts=['stem', 'body', 'head'])" in capsys.readouterr().out
    model, notes = load_adapted(run / "adapted")
    assert (type(model).__name__, notes["classes"]) == ("Net", ["a", "b"])


def test_code_of_a_run_runs_only_if_the_user_has_typed_it_and_it_is_unchanged(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(CODE)
    shutil.copytree(place / "run", run := tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    settings |= {"model": f"{tmp_path}/net.py:Net:width=6", "dataset": f"{tmp_path}/net.py:noise"}
    (run / "settings.json").write_text(json.dumps(settings))
    code = ["--model", settings["model"], "--dataset", settings["dataset"]]
    evaluate = ["evaluate", str(run), "--tasks=4"]
    strange = "not typed yet, or that has changed: look at it, then add " + " ".join(code)
    assert strange in refused(capsys, *evaluate)
    main([*evaluate, *code])
    main(evaluate)
    (tmp_path / "net.py").write_text(CODE + "# changed\n")
    assert strange in refused(capsys, *evaluate)
    main([*evaluate, *code])
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "other"))
    assert strange in refused(capsys, *evaluate)


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--model=nets.py:Net"], "nets.py cannot be imported (FileNotFoundError"),
        (["--model=no.such.module:Net"], "no.such.module cannot be imported (ModuleNotFoundError"),
        (["--model=net.py:Nets"], "net.py has no function or class Nets: it has Net, narrow, failing"),
        (["--model=net.py:narrow"], "the model tells 2 classes apart"),
        (["--model=net.py:failing"], "model net.py:failing failed: RuntimeError: out of ideas"),
        (["--model=net.py:number"], "gives int: let it return an nn.Module"),
        (["--model=net.py:Net:depth=3"], "Net takes width"),
        (["--model=net.py:Net", "--filters=3"], "Net takes width"),
        (["--model=net.py"], "model 'net.py' is unknown"),
        (["--model=net.py:learner"], "gives a whole learner where a model is asked for: let it return"),
        (["--dataset=net.py:number"], "gives int, no source of tasks"),
        (["--dataset=net.py:noise", "--shots=5"], "net.py:noise takes no shots; leave it out"),
        (["--weights=nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--weights=other.safetensors"], "has no weights of name and shape for body.bias, body.weight"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], cure: str
) -> None:
    save_file({"stem.weight": torch.zeros(4, 1, 3, 3)}, place / "other.safetensors")
    given = ["--model=net.py:Net", "--dataset=net.py:noise", "--out=wrong", *SHORT, *SGD, *arguments]
    assert cure in refused(capsys, "train", *given)
    assert not (place / "wrong").exists()


def test_pretrained_weights_are_taken_and_a_head_of_another_width_begins_anew(place: Path) -> None:
    torch.manual_seed(1)
    settings = Settings(model="net.py:Net", weights="pretrained.safetensors")
    build = Settings(model="net.py:Net")
    from innerloop.training.build import build_learner

    trained = build_learner(build, (1, 8, 8), 7).model.state_dict()
    save_file({name: value + 1 for name, value in trained.items()}, place / "pretrained.safetensors")
    found = build_learner(settings, (1, 8, 8), 3).model.state_dict()
    for name in ("stem.weight", "stem.bias", "body.weight", "body.bias"):
        assert torch.equal(found[name], trained[name] + 1)
    assert found["head.weight"].shape == (3, 4)


# Runs made in Python.


def fit(learner: il.MetaLearner, tasks: il.tasks.TaskSource, folder: Path) -> None:
    il.fit(
        learner, tasks, steps=2, tasks_per_batch=2, validate_every=2, validation_tasks=4, folder=folder, progress=False
    )


def test_a_run_whose_parts_have_texts_needs_nothing_more(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in range(15):
        (tmp_path / "images" / f"c{label}").mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng((label, number)).integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"c{label}" / f"{number}.png")
    tasks = il.tasks.folder(tmp_path / "images", ways=3, shots=1, queries=2, seed=4, channels=1, size=16)
    model = il.models.Conv4(in_channels=1, ways=3, filters=4, downsample="stride", size=16)
    inner = il.Momentum(lr=0.2, steps=2, momentum=0.5, weight_decay=0.1)
    learner = il.MetaLearner(model, il.Blocks("00011"), inner, il.Truncated(1))
    fit(learner, tasks, tmp_path / "run")
    settings = read_run(tmp_path / "run")
    assert settings == Settings(
        dataset="folder", data=str(tmp_path / "images"), size=16, channels=1, ways=3, shots=1, queries=2, seed=4,
        model="conv4", filters=4,
        adapts="blocks:00011", inner="momentum:momentum=0.5", inner_lr=0.2, inner_steps=2, weight_decay=0.1,
        meta_gradient="truncated:1", steps=2, tasks_per_batch=2,
    )  # fmt: skip
    again, _ = load_learner(tmp_path / "run", settings)
    assert repr(again.extra_repr()) == repr(learner.extra_repr())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in learner.state_dict().items())
    main(["evaluate", str(tmp_path / "run"), "--tasks=4"])
    assert "go on there, with il.fit" in refused(capsys, "train", f"--resume={tmp_path / 'run'}")


class Odd(nn.Module):
    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 4), nn.Linear(4, ways)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(images.flatten(1)).relu())
        return found


def own_tasks(ways: int = 3, seed: int = 0) -> il.tasks.TaskSource:
    y = torch.arange(300) % 30
    return il.tasks.arrays(torch.randn(300, 1, 8, 8), y, ways=ways, shots=2, queries=3, seed=seed)


def test_of_a_model_or_tasks_without_a_text_the_command_says_which_option_supplies_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Path(__file__)
    fit(il.MetaLearner(Odd(), "head", il.SGD(lr=0.1, steps=2)), own_tasks(), run := tmp_path / "run")
    cure = "was made in Python, and its model has no text: add --model path/to/file.py:name"
    assert cure in refused(capsys, "evaluate", str(run))
    model = f"--model={here}:Odd"
    assert "its dataset has no text: add --dataset" in refused(capsys, "evaluate", str(run), model)
    main(["evaluate", str(run), model, f"--dataset={here}:own_tasks", "--tasks=4"])
    assert "its model has no text" in refused(capsys, "evaluate", str(run)), "what was typed is not written to the run"
    assert load_file(run / "best.safetensors").keys() == {
        "model.body.weight", "model.body.bias", "model.head.weight", "model.head.bias"
    }  # fmt: skip


class Mine(il.Prototypes):
    """A start without a text."""


def mine(ways: int = 3) -> il.MetaLearner:
    return il.MetaLearner(Odd(ways), "head", il.SGD(lr=0.1, steps=2), start=Mine())


def test_results_of_other_ways_have_names_of_their_own_and_a_start_of_the_users_own_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Path(__file__)
    fit(mine(), own_tasks(), run := tmp_path / "run")
    for more in ([], ["--ways=2"]):
        main(["evaluate", str(run), f"--model={here}:mine", f"--dataset={here}:own_tasks", "--tasks=4", *more])
        assert "the head begins at what the support set gives: start Mine" in capsys.readouterr().out
    sizes = {file.name.split("own_tasks")[1] for file in run.glob("evaluate-*.json")}
    assert sizes == {"-test.json", "-2way-test.json"}


def test_of_a_loss_without_a_text_it_asks_for_the_whole_learner(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    code: dict[str, Any] = {}
    exec(CODE, code)
    learner = il.MetaLearner(code["Net"](3), "head", il.SGD(lr=0.1, steps=2), loss=loss)
    fit(learner, own_tasks(), run := tmp_path / "run")
    assert "a function that returns the whole il.MetaLearner" in refused(capsys, "evaluate", str(run))
    data = f"--dataset={Path(__file__)}:own_tasks"
    error = refused(capsys, "evaluate", str(run), "--model=net.py:Net", data)
    assert "gives a model alone: let it return the whole il.MetaLearner" in error
    main(["evaluate", str(run), "--model=net.py:learner", data, "--tasks=4"])


def test_a_source_that_gives_batches_alone_is_asked_for_its_shape(tmp_path: Path) -> None:
    class Bare:
        def batch(self, split: str, start: int, count: int) -> il.Task:
            return own_tasks().batch(split, start, count)

    il.fit(
        il.MetaLearner(Odd(), "head", il.SGD(lr=0.1, steps=2)), Bare(), steps=1, tasks_per_batch=2, validation_tasks=2,
        folder=tmp_path, progress=False,
    )  # fmt: skip
    settings = Settings(model=f"{Path(__file__)}:Odd", inner="sgd", inner_lr=0.1, inner_steps=2)
    _, trained = load_learner(tmp_path, settings)
    assert (trained["input_shape"], trained["output_size"], trained["ways"]) == ([1, 8, 8], 3, 3)
