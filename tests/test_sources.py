"""The data sets of the papers: their published splits, the layouts they come in, and what goes wrong with them."""

import csv
import http.server
import inspect
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import innerloop as il
from innerloop.problem import Task
from innerloop.tasks import Episodes, TaskSource, _cifar, _omniglot, nearest_neighbour
from innerloop.tasks._cache import cache_folder
from innerloop.tasks._downloads import download


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_sources_take_the_same_options() -> None:
    images = {"glyphs", "omniglot", "cifar_fs", "fc100", "mini_imagenet", "tiered_imagenet", "folder"}
    stored = images - {"glyphs"} | {"stations"}
    assert images | {"sinusoid", "linear", "quadratic", "stations"} == set(il.tasks.SOURCES)
    for name, source in il.tasks.SOURCES.items():
        options = inspect.signature(source).parameters
        assert {"shots", "queries", "seed"} <= options.keys()
        assert ("ways" in options) == (name in images)
        assert ("data" in options) == (name in stored)


def test_regression_has_no_ways() -> None:
    with pytest.raises(TypeError, match="ways"):
        il.tasks.SOURCES["sinusoid"](ways=5)


# Omniglot


def accuracy(tasks: TaskSource, count: int, mean: float = 0) -> float:
    batches = [
        Task((support - mean, labels), (query - mean, targets))
        for (support, labels), (query, targets) in tasks.test(count, 100)
    ]
    return float(torch.cat([nearest_neighbour(batch) for batch in batches]).mean())


@pytest.mark.parametrize(("ways", "shots", "expected"), [(5, 1, 0.47), (5, 5, 0.72), (20, 1, 0.29)])
def test_omniglot_reads_as_its_readme_says(shared_data: Path, ways: int, shots: int, expected: float) -> None:
    tasks = il.tasks.omniglot(ways=ways, shots=shots, data=shared_data)
    assert accuracy(tasks, 400) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("split", "sizes"), [("background", (792, 172, 659)), ("1200", (1100, 100, 423)), ("vinyals", (1028, 172, 423))]
)
def test_omniglot_splits(shared_data: Path, split: str, sizes: tuple[int, ...]) -> None:
    characters = il.tasks.omniglot(data=shared_data / "omniglot28.npz", split=split).image_set
    parts = characters.splits
    assert tuple(len(parts[name]) for name in ("train", "validation", "test")) == sizes
    assert sorted(index for part in parts.values() for index in part) == list(range(1623))
    assert parts == il.tasks.omniglot(data=shared_data, split=split, seed=3).image_set.splits

    alphabets = [{characters.classes[index].partition("/")[0] for index in part} for part in parts.values()]
    assert (split == "background") == (not set.union(*alphabets[:2]) & alphabets[2])
    with np.load(shared_data / "omniglot28.npz") as stored:
        if split == "vinyals":
            for number, name in enumerate(("train", "validation", "test")):
                assert parts[name] == tuple(np.flatnonzero(stored["char_vinyals_split"] == number))
        if split == "background":
            assert parts["test"] == tuple(np.flatnonzero(~stored["char_is_background"]))


def test_omniglot_names_its_splits(shared_data: Path) -> None:
    with pytest.raises(ValueError, match="'foreground'; it has background, 1200 and vinyals"):
        il.tasks.omniglot(data=shared_data, split="foreground")


def test_omniglot_turns_training_characters(shared_data: Path) -> None:
    plain, turned = (il.tasks.omniglot(ways=20, data=shared_data, rotations=value) for value in (False, True))
    assert torch.equal(turned.batch("test", 0, 2).support[0], plain.batch("test", 0, 2).support[0])
    support = turned.batch("train", 0, 1).support[0][0]
    stored = plain.image_set.images.float() / 255
    found = [bool((stored == image).all(dim=(1, 2, 3)).any()) for image in support]
    assert 0 < sum(found) < 15  # a quarter of them, in the mean, are not turned


def test_drawings_shrink_exactly() -> None:
    drawing = np.random.default_rng(0).random((105, 105)) < 0.2
    quarters = drawing.repeat(4, 0).repeat(4, 1).reshape(28, 15, 28, 15)
    assert (_omniglot.shrink(drawing) == np.rint(255 * quarters.mean((1, 3)))).all()
    assert _omniglot.shrink(np.ones((105, 105), bool)).min() == 255


ALPHABETS = {"images_background": ("Greek", "Hebrew", "Latin"), "images_evaluation": ("Oriya", "Tengwar")}


def drawing(part: str, character: str, drawer: int) -> bytes:
    """A one-bit PNG as the authors store it: white paper is 1."""
    ink = np.random.default_rng(sum(f"{part}{character}{drawer}".encode())).random((105, 105)) < 0.2
    file = io.BytesIO()
    Image.fromarray(~ink).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an Omniglot of five alphabets of two characters, zipped as the authors do."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for part, alphabets in ALPHABETS.items():
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for alphabet in alphabets:
                for character in ("character02", "character01"):
                    for drawer in range(1, 21):
                        name = f"{part}/{alphabet}/{character}/0001_{drawer:02}.png"
                        archive.writestr(name, drawing(part, alphabet + character, drawer))
            archive.writestr(f"__MACOSX/{part}/._Greek.png", b"no image")
    monkeypatch.setattr(_omniglot, "CHARACTERS", {"images_background": 6, "images_evaluation": 4})
    return folder


def small_omniglot(data: Path | None, augment: str | None = None) -> Episodes:
    return il.tasks.omniglot(ways=2, shots=3, queries=2, data=data, augment=augment)


def augments_training_alone(plain: Episodes, changed: Episodes) -> None:
    for split, same in (("train", False), ("test", True)):
        pair = [tasks.batch(split, 0, 2).query[0] for tasks in (plain, changed)]
        assert torch.equal(*pair) is same


def test_omniglot_from_the_authors_archives_and_folders(archives: Path, tmp_path: Path) -> None:
    for archive in archives.glob("*.zip"):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(tmp_path / "unpacked" / "python")
    augments_training_alone(small_omniglot(archives), small_omniglot(archives, "crop"))
    zipped, unpacked = small_omniglot(archives).image_set, small_omniglot(tmp_path / "unpacked").image_set
    assert zipped.classes[:4] == (
        "Greek/character01",
        "Greek/character02",
        "Hebrew/character01",
        "Hebrew/character02",
    )
    assert zipped.splits == {"train": (0, 1, 4, 5), "validation": (2, 3), "test": (6, 7, 8, 9)}
    assert zipped.classes == unpacked.classes
    assert torch.equal(zipped.images, unpacked.images)
    with Image.open(io.BytesIO(drawing("images_background", "Hebrewcharacter01", 3))) as image:
        expected = _omniglot.shrink(~np.asarray(image))
    assert (zipped.images[2 * 20 + 2, 0].numpy() == expected).all()


def test_omniglot_is_decoded_once(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small_omniglot(archives).image_set.images
    monkeypatch.delattr(Image, "open")
    assert torch.equal(small_omniglot(archives).image_set.images, first)


def test_omniglot_that_lacks_a_drawing(archives: Path, tmp_path: Path, cache: Path) -> None:
    for archive in archives.glob("*.zip"):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(tmp_path / "unpacked")
    (tmp_path / "unpacked/images_evaluation/Oriya/character01/0001_07.png").unlink()
    with pytest.raises(ValueError, match=r"images_evaluation has 79 drawings of 4 characters, not 20 of each of 4"):
        small_omniglot(tmp_path / "unpacked")
    (tmp_path / "unpacked/images_evaluation/Oriya/character01/0001_07.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*0001_07\.png"):
        small_omniglot(tmp_path / "unpacked")
    assert not files_in(cache)


def test_truncated_archives(archives: Path, cache: Path) -> None:
    archive = archives / "images_background.zip"
    archive.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot read .*images_background\.zip .*fetch it again"):
        small_omniglot(archives)
    assert not files_in(cache)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_damaged_npz(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "omniglot28.npz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*omniglot28\.npz .*fetch it again"):
        il.tasks.omniglot(data=file)


def test_npz_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="has no array char_names"):
        il.tasks.omniglot(data=tmp_path / "some.npz")
    np.savez(tmp_path / "some.npz", images=np.zeros((3, 28, 28)), char_names=np.array(["a"]))
    with pytest.raises(ValueError, match=r"holds images \[3, 28, 28\] of 1 characters, not 32460"):
        il.tasks.omniglot(data=tmp_path / "some.npz")


@pytest.mark.parametrize("name", ["omniglot", "cifar_fs", "fc100", "stations"])
def test_absent_data_names_the_option_and_the_layout(name: str, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"^found no [^\n]*; data= \(--data\) takes [^\n]*$"):
            il.tasks.SOURCES[name](data=place)


# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves ``contents`` by path on this machine; a path that begins with /cut breaks off in the middle."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.contents.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write((content or b"")[: 1000 if self.path.startswith("/cut") else None])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


CONTENT = bytes(range(256)) * 1000


def test_download_once(server: Server, cache: Path) -> None:
    server.contents["/some.bin"] = CONTENT
    digest = sha256(CONTENT).hexdigest()
    file = download(f"{server.url}/some.bin", digest)
    assert file.read_bytes() == CONTENT
    assert file.is_relative_to(cache)
    file.write_bytes(b"damaged since")
    for _ in range(2):
        assert download(f"{server.url}/some.bin", digest).read_bytes() == CONTENT
    assert server.asked == ["/some.bin"] * 2
    assert files_in(cache) == [file]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/some.bin", ValueError, "is not the file that is expected"),
        ("/cut.bin", ConnectionError, "could not download"),
        ("/nothing.bin", ConnectionError, "404"),
    ],
)
def test_failed_downloads_leave_nothing(
    server: Server, cache: Path, path: str, error: type[Exception], message: str
) -> None:
    server.contents |= {"/some.bin": CONTENT, "/cut.bin": CONTENT}
    with pytest.raises(error, match=message) as raised:
        download(f"{server.url}{path}", "0" * 64)
    assert "\n" not in str(raised.value)
    assert "--data" in str(raised.value)
    assert not files_in(cache)


def test_no_network(cache: Path) -> None:
    with Server() as server:
        closed = server.url
    with pytest.raises(ConnectionError, match=r"could not download [^\n]*--data\)$"):
        download(f"{closed}/some.bin", "0" * 64)
    assert not files_in(cache)


def test_omniglot_downloads_itself_once(server: Server, archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {file.name: file.read_bytes() for file in archives.iterdir()}
    server.contents = {f"/{name}": content for name, content in contents.items()}
    hashes = {name: sha256(contents[f"{name}.zip"]).hexdigest() for name in ALPHABETS}
    monkeypatch.setattr(_omniglot, "URL", server.url)
    monkeypatch.setattr(_omniglot, "ARCHIVES", hashes)
    first = small_omniglot(None).image_set
    for file in files_in(cache_folder() / "downloads"):
        file.unlink()
    again = small_omniglot(None).image_set
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.images, small_omniglot(archives).image_set.images)
    assert sorted(server.asked) == ["/images_background.zip", "/images_evaluation.zip"]


# CIFAR-100


def test_cifar_splits_are_the_published_ones(shared_data: Path) -> None:
    fs, fc = il.tasks.cifar_fs(data=shared_data), il.tasks.fc100(data=shared_data / "cifarfs32.npz")
    assert tuple(len(fs.image_set.splits[name]) for name in ("train", "validation", "test")) == (64, 16, 20)
    assert tuple(len(fc.image_set.splits[name]) for name in ("train", "validation", "test")) == (60, 20, 20)
    names = fs.image_set.classes
    split_of = {
        source.name: {names[index]: split for split, part in source.image_set.splits.items() for index in part}
        for source in (fs, fc)
    }
    with np.load(shared_data / "cifarfs32.npz") as stored:
        for split in ("train", "val", "test"):
            for label, superclass, other in zip(
                *(stored[f"{split}_{what}"] for what in ("classes", "superclasses", "fc100_split")), strict=True
            ):
                assert split_of["cifar_fs"][label] == {"val": "validation"}.get(split, split)
                assert split_of["fc100"][label] == {"val": "validation"}.get(other, other)
                assert label in _cifar.CLASSES[superclass].split()

    mean = float(fs.image_set.images[::11].float().mean() / 255)
    assert accuracy(fs, 500, mean) == pytest.approx(0.32, abs=0.02)
    five = Episodes(fs.image_set, shots=5)
    assert accuracy(five, 500, mean) == pytest.approx(0.40, abs=0.02)


def records(count: int, seed: int) -> bytes:
    """The authors' binary format: superclass, class and 3072 bytes of an image."""
    random = np.random.default_rng(seed)
    content = random.integers(0, 256, (100 * count, 3074), np.uint8)
    content[:, 1] = random.permutation(100 * count) % 100
    return content.tobytes()


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive with four and two images of each class."""
    monkeypatch.setattr(_cifar, "PARTS", {"train.bin": 4, "test.bin": 2})
    file = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, content in {
            "train.bin": records(4, 0),
            "test.bin": records(2, 1),
            "fine_label_names.txt": b"",
        }.items():
            item = tarfile.TarInfo(f"cifar-100-binary/{name}")
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return file


def test_cifar_from_the_authors_archive(small_cifar: Path, tmp_path: Path) -> None:
    images = il.tasks.cifar_fs(data=small_cifar, queries=5).image_set.images
    train, test = (np.frombuffer(records(*part), np.uint8).reshape(-1, 3074) for part in ((4, 0), (2, 1)))
    expected = np.concatenate([train[train[:, 1] == 42, 2:], test[test[:, 1] == 42, 2:]])
    assert (images[42 * 6 : 43 * 6].numpy() == expected.reshape(6, 3, 32, 32)).all()
    with tarfile.open(small_cifar) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    for place in (tmp_path, tmp_path / "unpacked", tmp_path / "unpacked/cifar-100-binary"):
        assert torch.equal(il.tasks.fc100(data=place, queries=5).image_set.images, images)
    for source in (il.tasks.cifar_fs, il.tasks.fc100):
        augments_training_alone(
            *(source(data=small_cifar, queries=5, augment=kinds) for kinds in ("none", "flip,crop"))
        )


def test_damaged_cifar(small_cifar: Path, cache: Path) -> None:
    whole = small_cifar.read_bytes()
    small_cifar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*cifar-100-binary\.tar\.gz .*fetch it again"):
        il.tasks.cifar_fs(data=small_cifar)
    with tarfile.open(small_cifar, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-100-binary/train.bin"))
    with pytest.raises(ValueError, match=r"does not hold 4 images of each of 100 classes in train\.bin; data="):
        il.tasks.cifar_fs(data=small_cifar)
    assert not [file for file in files_in(cache) if "cifar" in file.name]


def test_cifar_downloads_itself(
    server: Server, small_cifar: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.contents["/cifar-100-binary.tar.gz"] = small_cifar.read_bytes()
    monkeypatch.setattr(_cifar, "URL", f"{server.url}/cifar-100-binary.tar.gz")
    monkeypatch.setattr(_cifar, "SHA256", sha256(small_cifar.read_bytes()).hexdigest())
    for _ in range(2):
        images = il.tasks.cifar_fs(queries=5).image_set.images
        assert torch.equal(images, il.tasks.cifar_fs(queries=5, data=small_cifar).image_set.images)
    assert len(server.asked) == 1


# miniImageNet and tieredImageNet

WORDNET = {"train": ("n01", "n02"), "val": ("n03", "n04"), "test": ("n05", "n06")}


def photograph(seed: int, width: int = 84) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (84, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def imagenet_files(listed: bool) -> dict[str, bytes]:
    files, number = {}, 0
    for split, labels in WORDNET.items():
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(["filename", "label"])
        for label in labels:
            for index in range(4):
                name = f"{label}{index:08}.png"
                files[f"images/{name}" if listed else f"{split}/{label}/{name}"] = photograph(number, 84 + number)
                rows.writerow([name, label])
                number += 1
        if listed:
            files[f"{split}.csv"] = table.getvalue().encode()
    return files


def write_files(place: Path, files: dict[str, bytes]) -> None:
    """A folder, a zip or a compressed tar, as the name of ``place`` says; archives hold one folder."""
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w") as zipped:
            for name, content in files.items():
                zipped.writestr(f"wrapped/{name}", content)
    elif place.suffix == ".tgz":
        with tarfile.open(place, "w:gz") as tar:
            for name, content in files.items():
                item = tarfile.TarInfo(f"./wrapped/{name}")
                item.size = len(content)
                tar.addfile(item, io.BytesIO(content))
    else:
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)


@pytest.mark.parametrize("name", ["mini_imagenet", "tiered_imagenet"])
def test_imagenet_layouts(tmp_path: Path, name: str) -> None:
    sets = []
    for listed in (True, False):
        for place in ("folder", "some.zip", "some.tgz"):
            target = tmp_path / f"{listed}" / place
            target.parent.mkdir(exist_ok=True)
            write_files(target, imagenet_files(listed))
            tasks = il.tasks.SOURCES[name](ways=2, queries=3, data=target)
            assert isinstance(tasks, Episodes)
            sets.append(tasks.image_set)
    for each in sets:
        assert each.classes == ("n01", "n02", "n03", "n04", "n05", "n06")
        assert each.splits == {"train": (0, 1), "validation": (2, 3), "test": (4, 5)}
        assert torch.equal(each.images, sets[0].images)
    with Image.open(io.BytesIO(photograph(9, 93))) as image:
        squeezed = np.asarray(image.resize((84, 84), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert (sets[0].images[9].numpy() == squeezed).all()


@pytest.mark.parametrize("name", ["mini_imagenet", "tiered_imagenet"])
def test_imagenet_is_not_downloaded_and_says_why(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"licence forbids .*image-net\.org/download .*data= \(--data\) takes"):
        il.tasks.SOURCES[name]()


def test_imagenet_of_another_layout(tmp_path: Path) -> None:
    files = imagenet_files(listed=True)
    write_files(tmp_path / "half", {name: content for name, content in files.items() if name != "val.csv"})
    with pytest.raises(ValueError, match=r"half is not laid out as mini_imagenet; data="):
        il.tasks.mini_imagenet(data=tmp_path / "half")
    write_files(tmp_path / "columns", files | {"train.csv": b"file,class\na,b\n"})
    with pytest.raises(ValueError, match=r"train\.csv must have the columns filename,label"):
        il.tasks.mini_imagenet(data=tmp_path / "columns")
    del files["images/n0500000002.png"]
    write_files(tmp_path / "less", files)
    with pytest.raises(ValueError, match=r"less lacks the image n0500000002\.png of class n05 that test\.csv lists"):
        il.tasks.mini_imagenet(data=tmp_path / "less")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; data="):
        il.tasks.mini_imagenet(data=tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", [".zip", ".tgz", ".txt"])
def test_truncated_imagenet(tmp_path: Path, cache: Path, suffix: str) -> None:
    place = tmp_path / f"some{suffix}"
    if suffix == ".txt":
        place.write_text("no archive")
    else:
        write_files(place, imagenet_files(listed=False))
        place.write_bytes(place.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=rf"^cannot read [^\n]*some{suffix} [^\n]*fetch it again$"):
        il.tasks.mini_imagenet(data=place)
    assert not files_in(cache)
