"""Tasks from examples in memory and from data set objects; groups that stay on one side; augmentation in training."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import innerloop as il
from innerloop.tasks._augment import augmented
from innerloop.tasks._episodes import _parted

CLASSES, EACH = 20, 6


def numbered() -> tuple[Tensor, Tensor]:
    """Examples that hold their own number, and their labels, in no order."""
    y = torch.arange(CLASSES * EACH) % CLASSES
    return torch.arange(CLASSES * EACH).float().unsqueeze(1), y


@pytest.mark.parametrize("convert", [lambda x: x, np.asarray], ids=["tensor", "numpy"])
def test_arrays_give_each_example_under_its_own_label(convert: Any) -> None:
    x, y = numbered()
    tasks = il.tasks.arrays(convert(x), convert(y), ways=3, shots=2, queries=3, seed=1)
    (inputs, targets), (asked, wanted) = tasks.batch("train", 5, 4)
    assert (inputs.shape, asked.shape, tasks.input_shape) == ((4, 6, 1), (4, 9, 1), (1,))
    assert targets.tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    names = tasks.class_names("train", 5, 4)
    for part, labels in ((inputs, targets), (asked, wanted)):
        for task, mine, own in zip(part, labels, names, strict=True):
            assert [str(int(number) % CLASSES) for number in task.flatten()] == [own[int(label)] for label in mine]
    assert all(len(set(torch.cat(each).flatten().tolist())) == 15 for each in zip(inputs, asked, strict=True))
    alone = tasks.batch("train", 7, 1)
    assert torch.equal(alone.support[0][0], inputs[2]), "a task is a pure function of its number"
    parts = {
        split: {name for each in tasks.class_names(split, 0, 50) for name in each}
        for split in ("train", "validation", "test")
    }
    assert [len(part) for part in parts.values()] == [12, 4, 4]
    assert len(set.union(*parts.values())) == CLASSES


def test_images_are_scaled_and_their_channels_come_first() -> None:
    pixels = torch.randint(0, 256, (40, 8, 9, 3), dtype=torch.uint8)
    y = torch.arange(40) % 8
    for given in (pixels, pixels.movedim(-1, 1)):
        tasks = il.tasks.arrays(given, y, ways=2, queries=2, split="0.5,0.25,0.25")
        assert tasks.input_shape == (3, 8, 9)
        assert tasks.batch("test", 0, 1).query[0].max() <= 1
    assert il.tasks.arrays(pixels[..., 0], y, ways=2, queries=2, split="0.5,0.25,0.25").input_shape == (1, 8, 9)


def test_trees_of_arrays_stay_together() -> None:
    x, y = numbered()
    words = {"ids": x.long(), "mask": x + 0.5}
    inputs = il.tasks.arrays(words, y, ways=3, queries=2).batch("train", 0, 2).query[0]
    assert inputs["ids"].dtype == torch.int64
    assert torch.equal(inputs["ids"] + 0.5, inputs["mask"])


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (dict(y=torch.zeros(120, 2, dtype=torch.long)), r"shape \[120, 2\]: give one label an example"),
        (dict(y=torch.rand(120)), "y holds float32 values: give labels"),
        (dict(y=torch.arange(119)), r"hold \[119, 120\] examples: give as many of each"),
        (dict(y=torch.zeros(120, dtype=torch.long)), "y holds 1 class, and tasks tell classes apart"),
        (dict(names=["a", "b"]), "names holds 2 names, and y labels up to 19"),
        (dict(augment="flip"), r"augment is for images, and examples have the shape \[1\]"),
        (dict(augment="rotate"), "augment 'rotate' is unknown: choose flip, crop"),
        (dict(group=torch.arange(120) % 20), "class .* has 1 groups of 6 images, which cannot be parted"),
        (dict(ways=5), "the validation split has 4 classes, fewer than the 5 ways asked"),
    ],
)
def test_arrays_that_do_not_fit(arguments: dict[str, Any], cure: str) -> None:
    x, y = numbered()
    with pytest.raises(ValueError, match=cure):
        il.tasks.arrays(x, **dict[str, Any](y=y, ways=3, queries=3) | arguments)


# Data set objects.


class Pairs:
    """As torchvision's data sets are."""

    classes = tuple(f"bird {number}" for number in range(10))

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(np.full((20 + index % 3, 30, 3), index, np.uint8)), index % 10


class Feature:
    names = tuple(f"kind {number}" for number in range(10))


class Columns(Pairs):
    """As Hugging Face's are."""

    features = {"fine": Feature(), "coarse": Feature(), "label": Feature()}  # noqa: RUF012
    columns: tuple[str, ...] = ("label",)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        image, label = super().__getitem__(index)
        return {"image": image, **dict.fromkeys(self.columns, label)}


def test_data_set_objects_are_sources(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "innerloop"):
        tasks = il.tasks.dataset(Pairs(), ways=2, shots=1, queries=2)
    assert tasks.input_shape == (3, 21, 21), "the median of the shorter sides"
    assert "images become 21 x 21 pixels" in caplog.text
    inputs, _ = tasks.batch("train", 0, 3).support
    numbers = (inputs[:, :, 0, 0, 0] * 255).round().long() % 10
    assert tasks.class_names("train", 0, 3) == [[f"bird {number}" for number in task] for task in numbers.tolist()]
    named = il.tasks.dataset(Columns(), ways=2, queries=2, size=12, channels=1)
    assert named.input_shape == (1, 12, 12)
    assert named.image_set.classes == Feature.names
    arrays = [(torch.full((3, 4, 4), index / 60), f"k{index % 10}") for index in range(60)]
    assert il.tasks.dataset(arrays, ways=2, queries=2).input_shape == (3, 4, 4)


def test_one_image_and_one_label_an_example() -> None:
    several = Columns()
    several.columns = ("fine", "coarse")
    with pytest.raises(ValueError, match=r"several that may be its label, 'fine', 'coarse', .* name one, label='fine'"):
        il.tasks.dataset(several, ways=2, queries=2)
    assert il.tasks.dataset(several, ways=2, queries=2, label="coarse").ways == 2
    with pytest.raises(ValueError, match=r"several that may be its label, 1, 2, .* name one, label=1"):
        il.tasks.dataset([(torch.zeros(3), 1, 2)], ways=2)
    with pytest.raises(ValueError, match="label='kind' is no label of an example, which has image, fine, coarse"):
        il.tasks.dataset(several, label="kind")
    with pytest.raises(ValueError, match="an example has no label, among 0, 1"):
        il.tasks.dataset([(torch.zeros(3), 0.5)])
    with pytest.raises(ValueError, match="several that may be its image, 0, 1, among"):
        il.tasks.dataset([(torch.zeros(3), torch.zeros(2), 1)])
    with pytest.raises(ValueError, match="no data set with examples by number"):
        il.tasks.dataset(iter([]))
    with pytest.raises(ValueError, match=r"arrays of shapes \[\(3,\), \(4,\)\]: make them of one shape"):
        il.tasks.dataset([(torch.zeros(3), 0), (torch.zeros(4), 1)])


# Groups.


def test_a_group_is_never_on_both_sides() -> None:
    x, y = numbered()
    group = torch.arange(len(y)) // CLASSES // 2  # of each class three groups of two
    tasks = il.tasks.arrays(x, y, ways=4, shots=2, queries=2, group=group)
    (support, _), (query, _) = tasks.batch("train", 0, 200)
    sides = [(part.squeeze(-1).long() // CLASSES // 2).view(200, 4, 2) for part in (support, query)]
    assert not (sides[0].unsqueeze(-1) == sides[1].unsqueeze(-2)).any()
    seen = [len(set(side.flatten().tolist())) for side in sides]
    assert seen == [3, 3], "each group has its turn on each side"
    assert all(len(set(row.tolist())) == 2 for row in query.view(800, 2)), "all different"
    alone = tasks.batch("train", 150, 1)
    assert torch.equal(alone.query[0][0], query[150])
    mixed = il.tasks.arrays(x, y, ways=4, shots=2, queries=2)
    (support, _), (query, _) = mixed.batch("train", 0, 50)
    both = [(part.squeeze(-1).long() // CLASSES // 2).view(50, 4, 2) for part in (support, query)]
    assert (both[0].unsqueeze(-1) == both[1].unsqueeze(-2)).any()


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_parted_whenever_that_can_be_done(seed: int) -> None:
    draws = np.random.default_rng(seed)
    for _ in range(200):
        sizes = draws.integers(1, 6, draws.integers(1, 7)).tolist()
        shots, queries = draws.integers(1, 7, 2).tolist()
        total = sum(sizes)
        sums = {sum(size for at, size in enumerate(sizes) if mask >> at & 1) for mask in range(2 ** len(sizes))}
        possible = any(each >= shots and total - each >= queries for each in sums)
        mine = _parted(sizes, shots, queries)
        assert bool(mine) is possible, (sizes, shots, queries)
        if mine:
            held = sum(sizes[at] for at in mine)
            assert held >= shots
            assert total - held >= queries
    assert _parted([1] * 10, 1, 1) == [0, 1, 2, 3, 4], "the share of the groups that is the share of the examples"


# Augmentation.


def test_flips_and_shifts_are_exact() -> None:
    images = torch.arange(2 * 1 * 8 * 8).view(2, 1, 8, 8).to(torch.uint8)
    flipped = augmented(images, ("flip",), np.array([[0.4, 0, 0], [0.6, 0, 0]]))
    assert torch.equal(flipped[0], images[0].flip(-1))
    assert torch.equal(flipped[1], images[1])
    moved = augmented(images, ("crop",), np.array([[0, 0.01, 0.5], [0, 0.5, 0.99]]))
    assert torch.equal(moved[0, 0, 1:], images[0, 0, :-1])
    assert torch.equal(moved[0, 0, 0], images[0, 0, 1]), "mirrored at the rim"
    assert torch.equal(moved[1, 0, :, :-1], images[1, 0, :, 1:])


def test_training_images_alone_are_augmented_and_by_the_tasks_number() -> None:
    pixels = torch.randint(0, 256, (120, 3, 16, 16), dtype=torch.uint8)
    _, y = numbered()
    plain, changed = (il.tasks.arrays(pixels, y, ways=3, queries=3, augment=augment) for augment in (None, "flip,crop"))
    for split in ("validation", "test"):
        for one, other in zip(plain.batch(split, 0, 3), changed.batch(split, 0, 3), strict=True):
            assert torch.equal(one[0], other[0])
    batch = changed.batch("train", 0, 4)
    assert not torch.equal(plain.batch("train", 0, 4).support[0], batch.support[0])
    assert torch.equal(changed.batch("train", 2, 1).query[0][0], batch.query[0][2])
    assert torch.equal(plain.batch("train", 0, 4).support[1], batch.support[1])


# Groups and sizes of folders.


@pytest.fixture
def frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six classes of three videos with two frames each; a frame's grey is that of its video."""
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))
    for label in range(6):
        for video in range(3):
            for frame in range(2):
                file = tmp_path / "frames" / f"c{label}" / f"v{video}_{frame}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((10, 12 + 2 * frame), 80 * video, np.uint8)).save(file)
    return tmp_path / "frames"


def folder_of(frames: Path, **options: Any) -> il.tasks.Episodes:
    return il.tasks.folder(frames, ways=2, shots=2, queries=2, channels=1, split=(0.34, 0.33, 0.33), **options)


def test_groups_of_a_folder_by_expression_and_by_table(frames: Path) -> None:
    table = frames.parent / "table.csv"
    rows = [f"c{label}/v{video}_{frame}.png,{video}" for label in range(6) for video in range(3) for frame in range(2)]
    table.write_text("\n".join(["file,video", *rows]))
    short = frames.parent / "short.csv"
    short.write_text(
        "\n".join(["file,video", *(f"v{video}_{frame}.png,{video}" for video in range(3) for frame in (0, 1))])
    )
    found = [folder_of(frames, group=group) for group in (r"^v\d", r"^(v\d)_\d", f"{table}:video", f"{short}:video")]
    for tasks in found:
        assert tasks.input_shape == (1, 10, 10)
        (support, _), (query, _) = tasks.batch("train", 0, 50)
        greys = [part[:, :, 0, 0, 0].mul(255).round().view(50, 2, 2) for part in (support, query)]
        assert not (greys[0].unsqueeze(-1) == greys[1].unsqueeze(-2)).any()
        assert torch.equal(support, found[0].batch("train", 0, 50).support[0])
    assert found[2].made is not None
    assert found[2].made["group"] == f"{table}:video"


@pytest.mark.parametrize(
    ("group", "cure"),
    [
        (
            "video_",
            "is found in 0 of 36 image paths of .*, and not in 'c.*': give a regular expression that matches all",
        ),
        ("v0", "is found in 12 of 36 image paths"),
        ("v(", "is no regular expression"),
        ("{folder}/none.csv:video", "none.csv, which does not exist; give FILE.csv:COLUMN"),
        ("{folder}/table.csv:patient", "needs the columns file,patient; it has file,video"),
        ("{folder}/table.csv:video", "names a group for 0 of 36 images .* list each in the column file"),
        ("c?", "has 1 groups|is found in 0"),
    ],
)
def test_groups_that_name_nothing(frames: Path, group: str, cure: str) -> None:
    (frames.parent / "table.csv").write_text("file,video\nother.png,1\n")
    with pytest.raises((ValueError, FileNotFoundError), match=cure):
        folder_of(frames, group=group.format(folder=frames.parent))


def test_a_folder_with_one_class(frames: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has one class folder with images, 'frames', and tasks tell classes apart"):
        il.tasks.folder(tmp_path, ways=2)
