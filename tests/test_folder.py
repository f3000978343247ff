"""The user's own images: any format and size, three ways to split them, and clear words about what is wrong."""

import hashlib
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import innerloop as il
from innerloop.tasks import Episodes
from innerloop.tasks._pictures import decode

BIRDS = ("crane", "dodo", "egret", "finch", "grebe", "heron", "ibis", "jay", "kite", "lark")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def paint(file: Path, seed: int = 0, size: tuple[int, int] = (12, 9), mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Ten classes with four to six images in all sorts of formats, sizes and depths of folders."""
    folder = tmp_path / "birds"
    for number, label in enumerate(BIRDS):
        paint(folder / label / "one.png", 10 * number, (12, 9))
        paint(folder / label / "two.JPG", 10 * number + 1, (640, 480))
        paint(folder / label / "old" / "three.bmp", 10 * number + 2, (5, 30), "L")
        paint(folder / label / "four.gif", 10 * number + 3, (8, 8), "P")
        for index in range(number % 3):
            paint(folder / label / f"more{index}.webp", 10 * number + 4 + index, (16, 16))
        (folder / label / "notes.txt").write_text("not an image")
        (folder / label / "._one.png").write_bytes(b"what macOS leaves on other disks")
    (folder / "readme.md").write_text("not a class")
    return folder


def splits(tasks: Episodes) -> dict[str, list[str]]:
    images = tasks.image_set
    return {split: [images.classes[index] for index in part] for split, part in images.splits.items()}


def test_reads_whatever_pillow_reads(birds: Path) -> None:
    tasks = il.tasks.folder(birds, ways=2, shots=1, queries=3, size=10)
    images = tasks.image_set
    assert dict(zip(images.classes, images.counts, strict=True)) == {
        label: 4 + number % 3 for number, label in enumerate(BIRDS)
    }
    assert images.images.shape == (sum(images.counts), 3, 10, 10)
    first = sum(images.counts[: images.classes.index("dodo")])
    files = ["four.gif", "more0.webp", "old/three.bmp", "one.png", "two.JPG"]  # by path
    for row, file in enumerate(files):
        assert (images.images[first + row].numpy() == decode((birds / "dodo" / file).read_bytes(), 10, 3)).all()
    support, _ = tasks.batch("train", 0, 3).support
    assert support.shape == (3, 2, 3, 10, 10)


def test_grey(birds: Path) -> None:
    assert il.tasks.folder(birds, ways=2, queries=3, size=84, channels=1).input_shape == (1, 84, 84)


def test_an_archive_reads_as_its_folder(birds: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as archive:
        for file in birds.rglob("*"):
            archive.write(file, file.relative_to(birds.parent))
    folder, packed = (il.tasks.folder(place, ways=2, queries=3, size=8) for place in (birds, tmp_path / "birds.zip"))
    assert folder.image_set.classes == packed.image_set.classes
    assert torch.equal(folder.image_set.images, packed.image_set.images)


# Splits


def test_fractions_go_by_name_and_not_by_seed(birds: Path) -> None:
    first, other = (il.tasks.folder(birds, ways=2, queries=3, size=8, seed=seed) for seed in (0, 1))
    parts = splits(first)
    assert [len(parts[split]) for split in ("train", "validation", "test")] == [6, 2, 2]
    assert sorted(label for part in parts.values() for label in part) == sorted(BIRDS)
    assert splits(other) == parts
    order = sorted(BIRDS, key=lambda label: hashlib.sha256(label.encode()).digest())
    assert parts["test"] == sorted(order[8:])


@pytest.mark.parametrize("split", [(0.5, 0.0, 0.5), "0.5,0,0.5"])
def test_other_fractions(birds: Path, split: str | tuple[float, ...]) -> None:
    parts = splits(il.tasks.folder(birds, ways=2, queries=3, size=8, split=split))
    assert {name: len(part) for name, part in parts.items()} == {"train": 5, "test": 5}


@pytest.mark.parametrize("split", [(0.5, 0.5), "0.5,0.2,0.2", (1.2, -0.4, 0.2), "0.5"])
def test_fractions_that_do_not_add_up(birds: Path, split: str | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="it must be three fractions that add up to 1"):
        il.tasks.folder(birds, split=split)


def test_split_by_list(birds: Path, tmp_path: Path) -> None:
    table = tmp_path / "split.csv"
    table.write_text("class,split\njay,test\nkite,train\nibis,test\ncrane,train\n")
    for given in (table, str(table)):
        tasks = il.tasks.folder(birds, ways=2, queries=3, size=8, split=given)
        assert splits(tasks) == {"train": ["crane", "kite"], "test": ["ibis", "jay"]}
    table.write_text("class,split\nphoenix,test\n")
    with pytest.raises(ValueError, match=r"split\.csv: class 'phoenix' in split 'test' does not fit"):
        il.tasks.folder(birds, split=table)
    table.write_text("crane\njay\n")
    with pytest.raises(ValueError, match="it needs the columns class,split"):
        il.tasks.folder(birds, split=table)
    table.write_text("class,split\njay,train\njay,test\n")
    with pytest.raises(ValueError, match="class 'jay' is in train and in test"):
        il.tasks.folder(birds, split=table)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv', which is neither three fractions nor a file"):
        il.tasks.folder(birds, split="nowhere.csv")


def test_split_by_sub_folders(tmp_path: Path) -> None:
    for number, name in enumerate(["train/a", "train/b", "val/c", "val/d", "test/e", "test/f"]):
        for index in range(2):
            paint(tmp_path / "data" / name / f"{index}.png", 10 * number + index)
    paint(tmp_path / "data" / "cover.png")
    tasks = il.tasks.folder(tmp_path / "data", ways=2, queries=1, size=8)
    assert splits(tasks) == {"train": ["a", "b"], "validation": ["c", "d"], "test": ["e", "f"]}
    paint(tmp_path / "data" / "test" / "a" / "0.png")
    with pytest.raises(ValueError, match="class 'a' is in train and in test; few-shot splits share no class"):
        il.tasks.folder(tmp_path / "data")


# What can be wrong


def test_too_few_images_or_classes(birds: Path) -> None:
    with pytest.raises(ValueError, match=r"class '\w+' has 4 images, fewer than the 1 shots \+ 4 queries = 5"):
        il.tasks.folder(birds, ways=2, queries=4)
    with pytest.raises(ValueError, match=r"the validation split has 2 classes, fewer than the 5 ways"):
        il.tasks.folder(birds, queries=3)


@pytest.mark.parametrize("broken", ["empty", "text", "cut png", "cut jpeg"])
def test_an_unreadable_image_is_named_and_nothing_kept(birds: Path, cache: Path, broken: str) -> None:
    file = birds / "heron" / ("two.JPG" if "jpeg" in broken else "one.png")
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"no image"}.get(broken, whole[: len(whole) // 2]))
    with pytest.raises(
        ValueError, match=rf"^cannot read the image {re.escape(str(file))} \([^\n<]*\); repair or remove it$"
    ):
        il.tasks.folder(birds, ways=2, queries=3)
    assert not list(cache.rglob("*.*"))


def test_damaged_images_are_told_together(birds: Path) -> None:
    damaged = sorted([birds / "heron" / "two.JPG", birds / "heron" / "one.png"])
    for file in damaged:
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{re.escape(str(damaged[0]))}.*, and 1 more: heron/{damaged[1].name}$"):
        il.tasks.folder(birds, ways=2, queries=3)


def test_no_class_folders(tmp_path: Path) -> None:
    paint(tmp_path / "flat" / "one.png")
    with pytest.raises(ValueError, match=r"flat has no class folders with images in them; data= \(--data\) takes"):
        il.tasks.folder(tmp_path / "flat")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; data= \(--data\)"):
        il.tasks.folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"folder needs your images; data= \(--data\)"):
        il.tasks.folder()


@pytest.mark.parametrize("options", [{"size": 0}, {"channels": 2}])
def test_impossible_sizes(birds: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="size must be at least 1, and channels 1 or 3"):
        il.tasks.folder(birds, **options)  # type: ignore[arg-type]


# The cache


def test_decoded_once_and_again_when_a_file_changes(birds: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def images() -> torch.Tensor:
        return il.tasks.folder(birds, ways=2, queries=3, size=8).image_set.images

    first = images()
    with monkeypatch.context() as without:
        without.delattr(Image, "open")
        assert torch.equal(images(), first)
    assert len(list(cache.iterdir())) == 1
    paint(birds / "jay" / "one.png", seed=1000)
    assert not torch.equal(images(), first)
    il.tasks.folder(birds, ways=2, queries=3, size=9)
    assert len(list(cache.iterdir())) == 3


def test_folders_of_the_same_names_sizes_and_times_are_kept_apart(tmp_path: Path) -> None:
    def images(folder: str, seed: int) -> torch.Tensor:
        for number in range(4):
            file = tmp_path / folder / "ab"[number % 2] / f"{number}.bmp"
            paint(file, seed + number)
            os.utime(file, (0, 0))
        return il.tasks.folder(tmp_path / folder, ways=2, queries=1, size=8, split="1,0,0").image_set.images

    first = images("one", 0)
    assert not torch.equal(images("two", 10), first)
    if os.name == "posix":  # painted over; elsewhere nothing tells when a file was changed
        assert not torch.equal(images("one", 10), first)


def test_a_damaged_cache_is_made_again(birds: Path, cache: Path) -> None:
    first = il.tasks.folder(birds, ways=2, queries=3, size=8).image_set.images.clone()
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    for damaged in (content[:100], content[:100] + bytes([content[100] ^ 1]) + content[101:]):
        file.write_bytes(damaged)
        assert torch.equal(il.tasks.folder(birds, ways=2, queries=3, size=8).image_set.images, first)
        assert file.read_bytes() == content


def test_without_a_cache(birds: Path, cache: Path) -> None:
    first = il.tasks.folder(birds, ways=2, queries=3, size=8).image_set.images.clone()
    (file,) = cache.iterdir()
    file.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="set INNERLOOP_CACHE to a folder that can be written"):
        again = il.tasks.folder(birds, ways=2, queries=3, size=8).image_set.images
    assert torch.equal(again, first)


def test_images_can_be_changed_without_changing_the_cache(birds: Path, cache: Path) -> None:
    il.tasks.folder(birds, ways=2, queries=3, size=8).image_set.images.fill_(7)
    assert not (il.tasks.folder(birds, ways=2, queries=3, size=8).image_set.images == 7).all()


# One image


def halves(left: int, right: int) -> Image.Image:
    pixels = np.zeros((20, 40), np.uint8)
    pixels[:, :20], pixels[:, 20:] = left, right
    return Image.fromarray(pixels)


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60), np.uint8)
    pixels[:, 20:40] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    content = (tmp_path / "wide.png").read_bytes()
    assert decode(content, 10, 1).min() > 180
    assert decode(content, 10, 1, crop=False)[0, :, 0].max() == 0


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    halves(0, 200).save(tmp_path / "turned.png", exif=exif)
    seen = decode((tmp_path / "turned.png").read_bytes(), 8, 1)[0]
    assert seen[:3].max() < 20
    assert seen[-3:].min() > 180


def test_transparent_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((6, 6, 4), np.uint8)
    pixels[:, :3, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    seen = decode((tmp_path / "clear.png").read_bytes(), 6, 3)
    assert (seen[:, :, :2] == 0).all()
    assert (seen[:, :, 4:] == 255).all()


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 6), 0x8055, np.uint16)).save(tmp_path / "deep.png")
    assert (decode((tmp_path / "deep.png").read_bytes(), 6, 1) == 0x80).all()
    for most, value in ((0xFFFF, 0x8055), (1000, 502)):
        deep = f"P5\n6 6\n{most}\n".encode() + np.full(36, value, ">u2").tobytes()
        assert (decode(deep, 6, 1) == 0x80).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_have_no_white_and_are_refused(birds: Path, kind: type) -> None:
    file = birds / "heron" / "deep.tif"
    Image.fromarray(np.full((6, 6), 100, kind)).save(file)
    with pytest.raises(
        ValueError, match=rf"^cannot read the image {re.escape(str(file))} \([^\n]*save it with 8 or 16"
    ):
        il.tasks.folder(birds, ways=2, queries=3, size=8)


def test_large_photographs_are_not_distorted_by_the_fast_path(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(1200), np.arange(1600)) * (255 / 2800)
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "photo.jpg", quality=95)
    with Image.open(tmp_path / "photo.jpg") as image:
        whole = image.crop((200, 0, 1400, 1200)).resize((84, 84), Image.Resampling.LANCZOS)
    seen = decode((tmp_path / "photo.jpg").read_bytes(), 84, 1)[0]
    assert np.abs(seen.astype(int) - np.asarray(whole)).max() <= 2
