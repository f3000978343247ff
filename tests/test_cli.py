"""The command: train, resume, evaluate, adapt and data, and one line for everything that is wrong."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from commands import refused
from innerloop.cli import main
from innerloop.training.adaptation import load_adapted, predict, read_images
from innerloop.training.build import build_tasks
from innerloop.training.checkpoints import load_checkpoint
from innerloop.training.fit import Fitted
from innerloop.training.report import ending, slug
from innerloop.training.runs import load_learner, read_run
from innerloop.training.session import Session
from innerloop.training.settings import Settings
from innerloop.training.store import read_records

SGD = ["--inner=sgd", "--outer-lr=1e-3", "--clip=none"]
TINY = [*SGD, "--model=mlp", "--filters=8", "--inner-lr=0.01", "--inner-steps=2", "--tasks-per-batch=2", "--device=cpu"]
CONV = [
    *SGD,
    "--adapts=everything",
    "--model=conv4",
    "--filters=8",
    "--downsample=stride",
    "--inner-lr=0.4",
    "--inner-steps=2",
    "--device=cpu",
]
LONG = ["--tasks-per-batch=2", "--steps=60", "--validate-every=20", "--validation-tasks=8", "--test-tasks=20"]
SHORT = ["--steps=12", "--validate-every=4", "--validation-tasks=8", "--test-tasks=20", "--threads=1"]


def draw_classes(folder: Path, classes: int, images: int, seed: int) -> None:
    """Class folders of small pictures: dark strokes on light paper, one shape a class."""
    for label in range(classes):
        generator = np.random.default_rng((seed, label))
        (folder / f"class{label}").mkdir(parents=True)
        shape = np.kron(generator.random((4, 4)) > 0.5, np.ones((5, 5)))
        for number in range(images):
            grey = 235 - 190 * np.pad(shape, 2) + generator.normal(0, 12, (24, 24))
            Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / f"class{label}" / f"{number}.png")


def images_of(place: Path) -> list[str]:
    """Tasks of the images of `place`."""
    return ["--dataset=folder", f"--data={place / 'images'}", "--size=16", "--channels=1", "--ways=3", "--queries=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images, a trained run and new classes to adapt to; the cache lies in it as well."""
    place = tmp_path_factory.mktemp("cli")
    draw_classes(place / "images", 20, 8, seed=0)
    draw_classes(place / "few", 4, 3, seed=1)
    draw_classes(place / "more", 4, 5, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INNERLOOP_CACHE", str(place / "cache"))
        main(["train", f"--out={place / 'run'}", *images_of(place), *CONV, *LONG])
        yield place


def names_of_test_tasks(run: Path) -> list[list[str]]:
    names = build_tasks(read_run(run), ["test"]).class_names("test", 0, 20)
    assert names is not None
    return names


def test_train_leaves_a_run_folder(place: Path) -> None:
    run = place / "run"
    found = {file.name for file in run.iterdir() if not file.name.startswith(("evaluate", "adapted"))}
    pictures = {"learning_curve.png", "adaptation_curve.png", "tasks.png", "confusion.png"}
    files = {"settings.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "results.json", "report.md"}
    assert found == files | pictures | {"tensorboard", "test.safetensors", "last-2.safetensors", "lock", "open.json"}
    for picture in pictures:
        pixels = np.asarray(Image.open(run / picture).convert("L"))
        assert min(pixels.shape) > 300
        assert len(np.unique(pixels)) > 50
        assert f"]({picture})" in (run / "report.md").read_text()
    results = json.loads((run / "results.json").read_text())
    assert results["training"]["step"] == 60
    assert results["test"]["inductive"]["tasks"] == 20
    confusion = results["confusion"]
    assert confusion["classes"] == sorted({name for task in names_of_test_tasks(run) for name in task})
    counts = np.array(confusion["counts"])
    assert counts.sum() == 20 * 3 * 4
    assert np.trace(counts) / counts.sum() == pytest.approx(results["test"]["inductive"]["accuracy"][0])
    each = load_file(run / "test.safetensors")["inductive"]
    assert len(each) == 20
    assert each.double().mean().item() == results["test"]["inductive"]["accuracy"][0]
    assert 0 <= results["test"]["nearest_neighbour"][0] <= 1
    assert results["versions"]["torch"] == torch.__version__
    assert {"command", "machine", "commit", "time"} <= results.keys()


def test_the_report_names_the_protocol_and_the_baseline(place: Path) -> None:
    text = (place / "run" / "report.md").read_text()
    assert text.startswith("# folder, 3-way 1-shot\n")
    assert "inductive (each query predicted alone)" in text
    assert "nearest neighbour on the raw inputs" in text
    assert '"inner_lr": 0.4' in text


def test_a_run_interrupted_and_resumed_equals_one_that_was_not(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Session.step

    def interrupted(self: Session, *arguments: object) -> object:
        if self.progress.step == 30:
            os.kill(os.getpid(), 2)
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "step", interrupted)
    settings = place / "run" / "settings.json"
    error = refused(capsys, "train", f"--out={tmp_path / 'run'}", f"--config={settings}", code=130)
    assert f"continue with: innerloop train --resume {tmp_path / 'run'}" in error
    monkeypatch.undo()
    main(["train", "--resume", str(tmp_path / "run")])
    first, second = (load_file(folder / "run" / "last.safetensors") for folder in (place, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [
        record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"
    ] == [*range(1, 61)]


def test_printed_commands_can_be_pasted_and_names_hold_what_there_is() -> None:
    fitted = Fitted(step=10, stopped="minutes", best_step=10, best=0.5, seconds=60.0)
    words = ending(Path("my run"), Settings(), fitted)
    assert shlex.split(words.partition("To go on: ")[2])[:4] == ["innerloop", "train", "--resume", "my run"]
    assert slug(Settings(dataset="sinusoid", model="mlp")) == "sinusoid-10shot"
    assert slug(Settings()) == "glyphs-5way-1shot"


def test_evaluate_rebuilds_the_learner_from_the_run_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(place / "run"), "--tasks=20"])
    assert "20 test tasks, folder, 3-way 1-shot, 2 adaptation steps" in capsys.readouterr().out
    trained = json.loads((place / "run" / "results.json").read_text())
    found = json.loads((place / "run" / "evaluate-folder-3way-1shot-test.json").read_text())
    assert found["test"]["inductive"]["accuracy"] == trained["test"]["inductive"]["accuracy"]
    curve = found["test"]["inductive"]["accuracy_curve"]
    assert len(curve) == 3
    assert curve[-1] == found["test"]["inductive"]["accuracy"]


def test_evaluate_with_other_ways_and_steps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--split=train", "--ways=4", "--shots=2", "--test-steps=4", "--tasks=10"]
    main(["evaluate", str(place / "run"), *arguments])
    out = capsys.readouterr().out
    assert "trained on 3 classes; each of 4 starts from the mean of the trained head's rows" in out
    found = json.loads((place / "run" / "evaluate-folder-4way-2shot-train.json").read_text())
    assert len(found["train"]["inductive"]["accuracy_curve"]) == 5


def test_adapt_predicts_new_classes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    support, query, out = place / "few", place / "more", tmp_path / "out"
    arguments = [f"--support={support}", "--query", str(query), f"--out={out}", "--test-steps=10"]
    main(["adapt", str(place / "run"), *arguments])
    text = capsys.readouterr().out
    assert "adapted to 4 classes, 12 images, in 10 steps" in text
    assert "accuracy: " in text
    names = [f"class{label}" for label in range(4)]
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    probabilities = torch.tensor([[float(row[name]) for name in names] for row in rows])
    assert len(rows) == 20
    assert torch.allclose(probabilities.sum(1), torch.ones(20), atol=1e-5)
    assert [names[int(row.argmax())] for row in probabilities] == [row["prediction"] for row in rows]
    right = sum(row["prediction"] == row["class"] == Path(row["file"]).parent.name for row in rows)
    assert right >= 15  # the shapes are easy to tell apart

    model, notes = load_adapted(out)
    assert notes["classes"] == names
    files = [Path(row["file"]) for row in rows]
    again = predict(model, read_images(files, notes["input_shape"], notes["invert"]))
    assert torch.allclose(again, probabilities, atol=1e-5)


def test_adapt_to_single_images_without_classes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = sorted((place / "more" / "class1").iterdir())[:2]
    main(["adapt", str(place / "run"), f"--support={place / 'few'}", "--query", *map(str, images)])
    assert "accuracy" not in capsys.readouterr().out
    rows = list(csv.DictReader((place / "run" / "adapted" / "predictions.csv").read_text().splitlines()))
    assert [(row["file"], row["class"]) for row in rows] == [(str(image), "") for image in images]


def write_choice(path: Path, pattern: str) -> Path:
    """A file such as ``innerloop patterns`` writes."""
    path.write_text(json.dumps({"pattern": pattern, "steps": 5, "parts": []}))
    return path


def test_adapt_moves_the_blocks_of_a_pattern_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice, out = write_choice(tmp_path / "pattern.json", "00011"), tmp_path / "out"
    arguments = [f"--support={place / 'few'}", "--query", str(place / "more"), f"--pattern={choice}", f"--out={out}"]
    main(["adapt", str(place / "run"), *arguments])
    named = "Blocks('00011')"
    assert f"adapted to 4 classes, 12 images, in 5 steps of {named};" in capsys.readouterr().out
    trained, adapted = load_file(place / "run" / "best.safetensors"), load_adapted(out)[0]
    changed = {name for name, value in adapted.named_parameters() if not torch.equal(value, trained[f"model.{name}"])}
    moved = {f"{name}.weight" for name in ("block4.conv", "block4.norm", "head")} | {"block4.norm.bias", "head.bias"}
    assert changed - {"block4.conv.bias"} == moved  # a bias before batch norm has no gradient but rounding
    notes = json.loads((out / "adapted.json").read_text())
    assert (notes["adapts"], notes["adaptation_steps"]) == (named, 5)
    main(["adapt", str(place / "run"), *arguments, "--test-steps=2"])
    assert f"in 2 steps of {named};" in capsys.readouterr().out


def test_a_pattern_without_the_head_wants_as_many_classes_as_in_training(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = write_choice(tmp_path / "pattern.json", "11110")
    shutil.copytree(place / "few", tmp_path / "few")
    arguments = [f"--support={tmp_path / 'few'}", f"--query={place / 'more' / 'class1'}", f"--pattern={choice}"]
    arguments += [f"--out={tmp_path / 'out'}"]
    error = refused(capsys, "adapt", str(place / "run"), *arguments)
    assert "leaves the head alone, which is for 3 classes, not 4: give 3 classes, or a pattern that ends in 1" in error
    shutil.rmtree(tmp_path / "few" / "class0")
    main(["adapt", str(place / "run"), *arguments])
    assert "adapted to 3 classes, 9 images, in 5 steps of Blocks('11110')" in capsys.readouterr().out


def test_a_command_given_again_goes_on_and_another_is_refused_by_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of `place`, whose number of threads was measured."""
    run = place / "run"
    size, rest = "--size=16", [f"--data={place / 'images'}", "--channels=1", "--ways=3", "--queries=4", *CONV, *LONG]
    command = ["train", f"--out={run}", "--dataset=folder", *rest]
    threads = read_run(run).threads or 0
    main([*command, size, f"--threads={threads}"])
    main([*command, size])
    assert capsys.readouterr().out.startswith("finished before")
    monkeypatch.setattr("innerloop.cli.train._built", None)  # refused before anything is made
    for options, words in (
        ([], "whose size is 16, not None"),
        ([size, "--augment=flip"], "whose augment is None, not flip"),
        ([size, f"--threads={threads + 1}"], f"whose threads is {threads}, not {threads + 1}"),
        ([size, "--seed=1"], "whose seed is 0, not 1"),
    ):
        assert words in refused(capsys, *command, *options)
    (run / "open.json").rename(place / "open.json")  # as in a run of an earlier version
    for options in ([], [size], [size, f"--threads={threads}"]):
        main([*command, *options])
    assert "whose augment is None, not flip" in refused(capsys, *command, size, "--augment=flip")
    (place / "open.json").rename(run / "open.json")


def test_a_head_that_is_not_adapted_is_for_the_classes_of_training(place: Path, tmp_path: Path) -> None:
    main(["train", f"--out={tmp_path / 'run'}", "--adapts=body", *images_of(place), *TINY, *SHORT])
    settings = read_run(tmp_path / "run")
    for classes in (2, 4):
        with pytest.raises(ValueError, match=f"does not adapt its head: give 3 classes, not {classes}"):
            load_learner(tmp_path / "run", settings, classes)


def test_dark_ink_on_light_paper_is_turned_round(tmp_path: Path) -> None:
    ink = np.full((30, 40), 230, np.uint8)
    ink[10:20, 15:25] = 20
    Image.fromarray(ink).save(tmp_path / "paper.png")
    Image.fromarray(255 - ink).save(tmp_path / "board.jpg")
    files = [tmp_path / "paper.png", tmp_path / "board.jpg"]
    as_is, turned, looked = (read_images(files, (1, 12, 12), invert) for invert in (False, True, None))
    assert as_is.shape == (2, 1, 12, 12)
    assert torch.allclose(as_is, 1 - turned)
    assert (looked[:, 0, 0, 0] < 0.2).all()
    assert (looked[:, 0, 6, 6] > 0.8).all()


def test_several_processes_train_the_same_learner(tmp_path: Path) -> None:
    command = ["train", "--dataset=sinusoid", "--model=mlp", "--filters=8", "--precision=float64"]
    command += ["--inner-lr=0.01", "--steps=5", "--tasks-per-batch=4", "--validate-every=3", "--validation-tasks=40"]
    command += ["--test-tasks=40", "--device=cpu", "--threads=1", "--clip=5"]
    main([*command, f"--out={tmp_path / 'one'}"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "innerloop"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [*launch, *command, f"--out={tmp_path / 'two'}"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-10, atol=1e-12), name
    first, second = (read_records(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [record["step"] for record in first] == [record["step"] for record in second]
    assert [record["loss"] for record in first] == pytest.approx([record["loss"] for record in second], rel=1e-10)


def test_data_lists_and_draws(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data"])
    listed = capsys.readouterr().out
    assert "glyphs           rendered at the first use" in listed
    assert "folder           your own images with --data; in the cache:" in listed
    picture = tmp_path / "tasks.png"
    options = [f"--data={place / 'images'}", "--size=16", "--channels=1", "--ways=3", "--queries=4"]
    main(["data", "folder", f"--out={picture}", *options])
    assert "160 images of 1 x 16 x 16; classes: 12 train, 4 validation, 4 test" in capsys.readouterr().out
    assert min(Image.open(picture).size) > 300


def test_a_run_whose_report_is_interrupted_does_not_count_as_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("innerloop.training.report.plot_tasks", interrupted)
    run = tmp_path / "run"
    refused(capsys, "train", f"--out={run}", "--dataset=sinusoid", *TINY, *SHORT, code=130)
    assert (run / "last.safetensors").exists()
    assert not (run / "results.json").exists()
    monkeypatch.undo()
    main(["train", "--resume", str(run)])
    assert (run / "results.json").exists()


def test_a_head_of_prototypes_takes_any_number_of_classes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", ["--dataset=folder", f"--data={place / 'images'}", "--size=16", "--channels=1"]
    options = [*CONV, "--adapts=head", "--inner-lr=0.02", "--start=prototypes", "--ways=3", "--queries=4"]
    main(["train", f"--out={run}", *data, *options, *SHORT, "--tasks-per-batch=2"])
    assert read_run(run).start == "prototypes"
    main(["evaluate", str(run), "--ways=4", "--tasks=10"])
    found = json.loads((run / "evaluate-folder-4way-1shot-test.json").read_text())
    assert found["test"]["inductive"]["accuracy"][0] > 0.5  # a ProtoNet tells these shapes apart
    capsys.readouterr()
    main(["adapt", str(run), f"--support={place / 'few'}", "--query", str(place / "more"), f"--out={tmp_path / 'out'}"])
    assert "adapted to 4 classes, 12 images" in capsys.readouterr().out
    model, _ = load_adapted(tmp_path / "out")
    assert model.get_parameter("head.weight").shape[0] == 4
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()))
    assert sum(row["prediction"] == row["class"] for row in rows) >= 15


def test_tasks_are_carried_on_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = [*TINY, *SHORT, "--carry=slot", "--weight-decay=0.1", "--meta-gradient=memory-reduced:iterations=3"]
    main(["train", f"--out={run}", "--dataset=sinusoid", *options])
    left = load_checkpoint(run / "last.safetensors")["carried"]
    assert {place: each["step"] for place, each in left.items()} == {0: 24, 1: 24}  # 12 outer steps of 2 inner ones
    for given, cure in (("--carry=task", "carry 'task' needs tasks that come again"),):
        assert cure in refused(capsys, "train", f"--out={tmp_path / 'other'}", "--dataset=sinusoid", *options, given)
    assert not (tmp_path / "other").exists()


def test_check_refuses_to_change_what_a_run_has_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    learned = [*TINY, "--inner=learned-rates:layer-step", "--adapts=everything"]
    main(["train", f"--out={run}", "--dataset=sinusoid", *learned, *SHORT])
    assert "--inner-lr changes nothing in a run that has learned its rates" in refused(
        capsys, "check", str(run), "--inner-lr=0.1"
    )
    assert "has learned rates for its own inner steps alone" in refused(capsys, "check", str(run), "--inner-steps=4")


def test_a_regression_run_is_reported_and_cannot_adapt_to_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    run = tmp_path / "run"
    main(["train", f"--out={run}", "--dataset=sinusoid", *TINY, *SHORT])
    out = capsys.readouterr().out
    assert "sinusoid, 10-shot" in out
    assert "loss" in out.splitlines()[-2]
    assert (run / "tasks.png").exists()
    error = refused(capsys, "adapt", str(run), f"--support={place / 'few'}", "--query", str(place / "more"))
    assert "adapt needs a run on images" in error


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["trian"], "invalid choice: 'trian'"),
        ([], "arguments are required: COMMAND"),
        (["train", "--step=3"], "unrecognized arguments: --step=3"),
        (["train", "--steps=0"], "steps is 0; it must be 1 or more"),
        (["train", "--steps"], "expected one argument"),
        (["train", "--dataset=omniglott"], "did you mean 'omniglot'?"),
        (["train", "--model=conv5"], "did you mean 'conv4'?"),
        (["train", "--inner-lr=0"], "inner-lr is 0.0; it must be above 0"),
        (["train", "--outer-lr=-1"], "outer-lr is -1.0; it must be above 0"),
        (["train", "--meta-gradient=truncated"], "missing a required argument: 'horizon'; truncated takes horizon"),
        (["train", "--dataset=sinusoid", "--ways=5"], "sinusoid takes no ways; leave it out"),
        (["train", "--dataset=sinusoid"], "this model takes images, not inputs of shape [1]; choose model 'mlp'"),
        (["train", "--dataset=mini_imagenet"], "(--data)"),
        (["train", "--dataset=folder", "--data=nowhere"], "nowhere does not exist"),
        (
            ["train", "--dataset=folder", "--data={images}", "--ways=5", "--queries=2"],
            "4 classes, fewer than the 5 ways",
        ),
        (
            ["train", "--dataset=folder", "--data={images}", "--ways=2", "--queries=15"],
            "8 images, fewer than the 1 shots + 15 queries",
        ),
        (["train", "--device=cuda"], "choose --device cpu"),
        (
            [
                "train",
                "--dataset=sinusoid",
                "--adapts=everything",
                *TINY,
                "--meta-gradient=reptile",
                "--multi-step-loss=9",
            ],
            "leave step_weights out",
        ),
        (["train", "--config=nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "--resume=nowhere"], "nowhere is no run folder"),
        (["train", "--resume={run}", "--inner-lr=1"], "--inner-lr cannot change when a run is continued, only steps,"),
        (["train", "--resume={run}", "--out=other"], "leave --out, --config and --method out"),
        (
            ["train", "--out={run}", "--dataset=sinusoid", "--model=mlp"],
            "already holds a run, whose dataset is folder, not sinusoid; go on with --resume",
        ),
        (["train", "--out={images}", "--dataset=sinusoid", "--model=mlp"], "holds something that is not a run"),
        (["evaluate", "{images}"], "is no run folder (no settings.json)"),
        (["evaluate", "{run}", "--tasks=0"], "test-tasks is 0; it must be 1 or more"),
        (["evaluate", "{run}", "--split=tset"], "did you mean 'test'?"),
        (["evaluate", "{run}", "--dataset=sinusoid", "--ways=none"], "choose a data set of the same shape and kind"),
        (["adapt", "{run}", "--support={few}"], "the following arguments are required: --query"),
        (["adapt", "{run}", "--support=nowhere", "--query={more}"], "nowhere is no folder"),
        (["adapt", "{run}", "--support={few}/class0", "--query={more}"], "has 0 sub-folders with images"),
        (["adapt", "{run}", "--support={few}", "--query=nowhere"], "--query nowhere does not exist"),
        (["adapt", "{run}", "--support={few}", "--query={broken}"], "cannot read the image"),
        (["adapt", "{run}", "--support={few}", "--query={images}"], "classes that --support has not: class10, class11"),
        (
            ["adapt", "{run}", "--support={few}", "--query={more}", "--pattern=nowhere"],
            "innerloop patterns RUN writes it",
        ),
        (["adapt", "{run}", "--support={few}", "--query={more}", "--pattern={broken}"], "holds no pattern"),
        (["data", "glyph"], "did you mean 'glyphs'?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    cure: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    if any("cuda" in argument for argument in arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    names = {name: place / name for name in ("images", "run", "few", "more")} | {"broken": tmp_path / "broken.png"}
    assert cure in refused(capsys, *(argument.format(**names) for argument in arguments))
    assert [file.name for file in tmp_path.iterdir()] == ["broken.png"]


def test_a_damaged_checkpoint_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "last.safetensors").write_bytes(b"cut short")
    (tmp_path / "run" / "last-2.safetensors").unlink()
    assert "is damaged" in refused(capsys, "train", f"--resume={tmp_path / 'run'}")
    (tmp_path / "run" / "best.safetensors").unlink()
    assert "has no best.safetensors yet; go on with" in refused(capsys, "evaluate", str(tmp_path / "run"))


def test_divergence_is_said_in_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset=sinusoid", *TINY, *SHORT, "--inner-lr=1e30"]
    error = refused(capsys, "train", f"--out={tmp_path / 'run'}", *options, code=1)
    assert "outer step 1: loss" in error
    assert "lower the inner rate" in error


def test_pretraining_and_then_another_method_is_two_lines(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = images_of(place)
    size = ["--filters=8", "--downsample=stride", "--device=cpu", *SHORT, "--tasks-per-batch=2"]
    first, second = tmp_path / "first", tmp_path / "second"
    main(["train", f"--out={first}", "--method=pretrained", *data, *size])
    weights = load_file(first / "best.safetensors")
    assert len(weights["model.head.weight"]) == 12  # a row a training class
    assert weights["model.block1.norm.running_mean"].abs().sum() > 0
    found = json.loads((first / "results.json").read_text())["test"]
    assert found.keys() == {"inductive", "verdict", "no_features", "nearest_neighbour"}
    same = found["inductive"]["baselines"]["nearest class mean"]
    assert same == {"accuracy": found["inductive"]["accuracy"], "difference": [0.0, 0.0]}
    main(["evaluate", str(first), "--ways=4", "--tasks=10"])
    main(["adapt", str(first), f"--support={place / 'few'}", "--query", str(place / "more"), f"--out={tmp_path / 'a'}"])
    assert "adapted to 4 classes, 12 images" in capsys.readouterr().out
    assert len(load_adapted(tmp_path / "a")[0].get_parameter("head.weight")) == 4

    main(["train", f"--out={second}", "--method=proto-anil", f"--start-from={first}", *data, *size, "--outer-lr=1e-9"])
    assert "left fresh: model.head.weight (3 x 8), model.head.bias (3)" in capsys.readouterr().out
    assert read_run(second).start_from == str(first)
    after = load_file(second / "best.safetensors")
    torch.testing.assert_close(after["model.block1.conv.weight"], weights["model.block1.conv.weight"])
    shutil.rmtree(first)
    main(["train", "--resume", str(second), "--steps=13"])  # goes on from its own

    for given, cure in (
        (
            [f"--start-from={second}", "--filters=4"],
            "fit model.block1.conv.weight (4 x 1 x 3 x 3): start from a run of the same model",
        ),
        ([f"--start-from={first}"], "does not exist: start from a folder that innerloop train or il.fit has filled"),
        (["--start=none", "--inner-steps=0"], "give 1 inner step or more, or a start that makes the head"),
        (["--start=ridge:regularisation=0"], "above 0"),
    ):
        said = refused(capsys, "train", f"--out={tmp_path / 'other'}", *data, *size, *given)
        assert cure in said, said
    assert not (tmp_path / "other").exists()
    assert "takes no inner step" in refused(capsys, "check", str(second), "--inner-steps=0")
    refused(capsys, "compare", f"--out={tmp_path / 'other'}", "--methods=maml", f"--start-from={first}")
