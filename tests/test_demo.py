"""A few photographs in; a page, four bars and an exported model out; and one line where they will not do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import innerloop as il
from commands import refused
from innerloop.cli import demo as command
from innerloop.cli import main
from innerloop.studies.demo import (
    ADAPTED,
    Photographs,
    Trial,
    are_drawings,
    gather,
    hold_out,
    page,
    try_out,
    verdict,
    write_specimens,
)
from innerloop.tasks._pictures import upright
from innerloop.training.adaptation import read_images
from innerloop.training.baselines import MEAN, PIXELS, PROBE
from innerloop.training.export import Portable
from innerloop.training.runs import SHIPPED, load_learner, read_run, run_folder, shipped_runs

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "<b>blue": (30, 30, 200)}


def photograph(folder: Path, images: int = 6) -> Path:
    """A sub-folder of noisy images for each colour."""
    for name, colour in COLOURS.items():
        place = folder / name
        place.mkdir(parents=True)
        for number in range(images):
            noise = np.random.default_rng((number, *colour)).integers(-30, 30, (24, 36, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")
    return folder


def test_classes_and_images_are_those_that_training_would_find(tmp_path: Path) -> None:
    things = photograph(tmp_path / "things", 2)
    for place in (".thumbnails", "__MACOSX/red", "red/.thumbnails"):
        shutil.copytree(things / "green", things / place)
    shutil.copytree(things / "green", things / "red" / "2026" / "may")
    shutil.copytree(things / "green", things / "red-dish")
    Image.new("RGB", (9, 9)).save(things / "cover.png")
    found, tasks = gather(things), il.tasks.folder(things, ways=2, queries=1, size=8, split="1,0,0").image_set
    assert found.classes == list(tasks.classes)
    assert found.labels.bincount().tolist() == list(tasks.counts) == [2, 2, 4, 2]


def test_a_third_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 2 + [1] * 3 + [2] * 7 + [3] * 20)
    for seed in range(5):
        held = hold_out(labels, seed)
        assert [int(held[labels == label].sum()) for label in range(4)] == [1, 1, 2, 6]
    assert torch.equal(hold_out(labels, 0), hold_out(labels, 0))
    assert not torch.equal(hold_out(labels, 0), hold_out(labels, 1))


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        photograph(tmp_path / split, 2)
    with pytest.raises(ValueError, match=r"holds test, train, each with classes of its own: name one of them"):
        gather(tmp_path)


def test_four_bars_on_the_same_splits(tmp_path: Path) -> None:
    photographs = gather(photograph(tmp_path / "things"))
    images = read_images(photographs.files, (3, 32, 32), invert=False)
    model = il.models.Conv4(3, 3, filters=8)
    learner = il.MetaLearner(model, il.Head(), il.SGD(lr=0.5, steps=5), start=il.Prototypes())
    trial = try_out(learner, images, photographs.labels)
    assert list(trial.accuracies) == [ADAPTED, MEAN, PROBE, PIXELS]
    assert trial.splits == 20
    assert trial.held.sum() == len(trial.guesses) == 6
    assert all(share == pytest.approx(1) for share in trial.accuracies.values())
    # labels that say nothing of the images
    nonsense = try_out(learner, images, torch.arange(18) % 3)
    assert all(share < 0.75 for share in nonsense.accuracies.values())


def test_the_page_frames_what_is_right_and_what_is_wrong(tmp_path: Path) -> None:
    photographs = gather(photograph(tmp_path / "things"))
    held = hold_out(photographs.labels, 0)
    guesses = photographs.labels[held].clone()
    guesses[0] = (guesses[0] + 1) % 3
    trial = Trial(held, guesses, {ADAPTED: 5 / 6, MEAN: 0.5, PROBE: 0.9, PIXELS: 0.25}, 20)
    text = page(photographs, trial, {"model": "adapted.pt2"}, "print('<script>')")
    assert text.count('<img class="right" src="data:image/png;base64,') == 5
    assert text.count('<img class="wrong" src="data:image/png;base64,') == 1
    assert "<b>blue" not in text
    assert "<script" not in text
    assert "6 were held out" in text
    widths = [part.partition("%")[0] for part in text.split('style="width: ')[1:]]
    assert widths == ["66.7", "40.0", "72.0", "20.0"]
    box = verdict(photographs, trial)
    assert box.first == "5 of 6 photographs recognised."
    assert "linear probe does better than adaptation: 90.0% against 83.3%" in box.rest
    better = trial._replace(accuracies=trial.accuracies | {ADAPTED: 0.95})
    assert "better" not in verdict(photographs, better).rest
    HTMLParser().feed(text)


def test_a_page_of_many_photographs_shows_some_of_each_class(tmp_path: Path) -> None:
    file = next((photograph(tmp_path / "things", 2) / "red").iterdir())
    labels = torch.arange(20).repeat_interleave(30)
    photographs = Photographs([f"thing {label}" for label in range(20)], [file] * 600, labels)
    held = hold_out(labels, 0)
    text = page(photographs, Trial(held, labels[held], {ADAPTED: 1.0}, 1), {}, "")
    assert text.count("<img") == 96
    assert "200 were held out. 96 of them are shown." in text


def test_letters_are_drawings_and_photographs_are_not(tmp_path: Path, shared_data: Path) -> None:
    write_specimens(tmp_path)
    letters = gather(tmp_path)
    assert len(letters.classes) == 5
    assert len(letters.files) == 45
    assert are_drawings(letters.files)
    files = write_cifar(tmp_path / "cifar", shared_data, 4)
    assert not are_drawings(files)
    for number, file in enumerate(files):
        grey = tmp_path / f"grey{number}.png"
        Image.open(file).convert("L").save(grey)
    assert not are_drawings(sorted(tmp_path.glob("grey*.png")))


def write_cifar(folder: Path, shared_data: Path, images: int) -> list[Path]:
    """Pictures of five classes that no shipped run has seen."""
    image_set = il.tasks.cifar_fs(data=shared_data).image_set
    for label in image_set.splits["test"][::4]:
        place = folder / image_set.classes[label]
        place.mkdir(parents=True)
        for number in range(images):
            pixels = image_set.images[label * 600 + number].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(place / f"{number}.png")
    return sorted(folder.rglob("*.png"))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is exported is a name; tests/test_export.py has the rest."""
    monkeypatch.setattr(command, "export", lambda path, model, notes, files: path.write_text(json.dumps(notes)))


@pytest.mark.usefixtures("no_export")
def test_pictures_of_new_classes_are_recognised(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path / "things", shared_data, 12)
    main(["demo", str(tmp_path / "things"), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    bars = {line[2:22].strip(): float(line[22:].rstrip("%")) for line in out.splitlines() if line.startswith("  ")}
    assert list(bars) == [ADAPTED, MEAN, PROBE, PIXELS]
    assert bars[ADAPTED] > bars[PIXELS] + 5
    assert "started from shipped:photos" in out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["adapted.pt2", "demo.html"]
    text = (tmp_path / "out" / "demo.html").read_text("utf-8")
    assert text.count('<img class="right"') + text.count('<img class="wrong"') == 20
    assert json.loads((tmp_path / "out" / "adapted.pt2").read_text())["input_shape"] == [3, 32, 32]


def test_without_photographs_letters_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--out", str(tmp_path / "out")])
    out, error = capsys.readouterr()
    assert "started from shipped:glyphs" in out
    assert error == ""
    program = torch.export.load(tmp_path / "out" / "adapted.pt2").module()
    shares = program(torch.full((2, 50, 60, 3), 255, dtype=torch.uint8))
    assert shares.shape == (2, 5)
    assert "15 were held out" in (tmp_path / "out" / "demo.html").read_text("utf-8")


@pytest.mark.usefixtures("no_export")
def test_a_run_whose_tasks_were_made_in_python_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = il.tasks.arrays(torch.rand(60, 3, 16, 16), torch.arange(60) % 12, ways=2, shots=1, queries=2)
    learner = il.MetaLearner(il.models.Conv4(ways=2, filters=4, size=16), "head", il.SGD(lr=0.1, steps=2))
    il.fit(learner, tasks, steps=1, validation_tasks=2, folder=tmp_path / "run", progress=False)
    things = str(photograph(tmp_path / "things", 2))
    main(["demo", things, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert f"started from {tmp_path / 'run'}, as told" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def fill(path: Path, content: bytes) -> None:
        path.touch()
        full()

    things = str(photograph(tmp_path / "things", 2))
    adapt = ["adapt", "shipped:photos", "--support", things, "--query", things, "--out", str(tmp_path / "out")]
    demo = ["demo", things, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        for asked in (adapt, demo):
            assert "out cannot be written (No space left on device)" in refused(capsys, *asked)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr("innerloop.cli.adapt.write", full)  # full by the time of the results
    monkeypatch.setattr(command, "export", full)
    assert "could not be written: [Errno 28] No space left" in refused(capsys, *adapt, code=1)
    assert "could not be written: [Errno 28] No space left" in refused(capsys, *demo, code=1)


@pytest.mark.usefixtures("no_export")
def test_what_will_not_do_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    things = photograph(tmp_path / "things")
    assert "is no folder" in refused(capsys, "demo", "nowhere")
    assert "has 0 sub-folders with images; give each of 2 or more" in refused(capsys, "demo", str(things / "red"))
    assert "nowhere is no run folder" in refused(capsys, "demo", "things", "--run", "nowhere")
    assert "export 'jpg' is unknown" in refused(capsys, "demo", "things", "--export", "jpg")
    (things / "red" / "0.png").write_bytes(b"no image")
    assert "cannot read the image things/red/0.png" in refused(capsys, "demo", "things")
    for number in range(5):
        (things / "red" / f"{number}.png").unlink()
    assert "things/red has 1 image; give it 2 or more" in refused(capsys, "demo", "things")
    for name in ("red", "green"):
        shutil.rmtree(things / name)
    assert "things has 1 sub-folders with images" in refused(capsys, "demo", "things")
    assert not (tmp_path / "demo").exists()


def test_shipped_runs_are_small_and_name_no_machine() -> None:
    assert shipped_runs() == ["shipped:glyphs", "shipped:photos"]
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2**20
    for name in shipped_runs():
        folder = run_folder(name)
        assert {file.name for file in folder.iterdir()} == {"best.safetensors", "settings.json", "results.json"}
        settings = read_run(folder)
        assert settings.data is None
        assert "/" not in (folder / "results.json").read_text("utf-8")
        learner, trained = load_learner(folder, settings, 7)
        shape = trained["input_shape"]
        assert learner.adapt(torch.rand(14, *shape), torch.arange(7).repeat(2))(torch.rand(3, *shape)).shape == (3, 7)
        results = json.loads((folder / "results.json").read_text("utf-8"))
        assert results["test"]["inductive"]["accuracy"][0] > results["test"]["nearest_neighbour"][0] + 0.05


@pytest.mark.parametrize("outputs", [None, 5, 7])
def test_settings_of_another_width_do_not_fit_the_weights(outputs: int | None) -> None:
    folder = run_folder("shipped:photos")
    with pytest.raises(ValueError, match=r"does not fit settings\.json: model\.\S+ is \[\d[^\n]* and \[\d"):
        load_learner(folder, replace(read_run(folder), filters=16), outputs)


def test_adapt_takes_a_shipped_run_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("innerloop.training.export._write", lambda path, program, metadata: path.write_text(metadata))
    monkeypatch.setattr("innerloop.training.export._fresh", lambda program, files: fresh(files))
    photograph(tmp_path / "things")

    def fresh(files: list[Path]) -> list[np.ndarray]:
        model, notes = il.load_adapted(tmp_path / "adapted")
        program = Portable(model, notes["input_shape"], notes["invert"])
        with torch.no_grad():
            images = [torch.tensor(np.array(upright(file.read_bytes(), 32).convert("RGB")))[None] for file in files]
            return [program(each).numpy() for each in (*images, images[0].repeat(3, 1, 1, 1))]

    asked = ["adapt", "shipped:photos", "--support", "things", "--query", "things"]
    main([*asked, "--export", "pt2"])
    assert "exported, and checked without innerloop: adapted/adapted.pt2" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapted" / "adapted.pt2").read_text())["classes"] == sorted(COLOURS)
    (tmp_path / "adapted" / "adapted.onnx").write_text("older still")
    main(asked)
    assert {file.name for file in (tmp_path / "adapted").iterdir()} == {
        "predictions.csv", "adapted.safetensors", "adapted.json"
    }  # fmt: skip
    assert "leave --transductive or --export out" in refused(capsys, *asked, "--export", "pt2", "--transductive")
    monkeypatch.setattr("innerloop.training.export.find_spec", lambda name: None)
    assert "pip install 'innerloop[onnx]'" in refused(capsys, *asked, "--export", "onnx")
    assert "shipped:nothing is no run folder" in refused(capsys, "adapt", "shipped:nothing", *asked[2:])
