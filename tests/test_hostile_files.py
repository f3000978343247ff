"""Files and folders that were not made for us: refused or left out, in one line, and nothing is written elsewhere."""

import csv
import io
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import refused
from innerloop.cli.adapt import _write_csv
from innerloop.files import shown, write
from innerloop.reporting.figures import Line, Panel, panels, save
from innerloop.tasks import _files, folder
from innerloop.tasks._files import Files, read_bytes, read_npz
from innerloop.tasks._pictures import decode, is_image
from innerloop.training.adaptation import labelled_images
from innerloop.training.runs import save_results

posix = pytest.mark.skipif(os.name != "posix", reason="makes links, pipes and names that only POSIX has")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of five classes of three images, which fit one training split."""
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))
    for label in "abcde":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (9, 9), 40 * number).save(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


@posix
def test_what_is_no_readable_file_is_left_out_and_counted(place: Path) -> None:
    os.mkfifo(place / "a" / "pipe.png")
    (place / "a" / "zeros.png").symlink_to("/dev/zero")
    (place / "b" / "gone.png").symlink_to(place / "nowhere.png")
    (place / "c" / "up").symlink_to(place)  # and a circle
    with pytest.warns(UserWarning, match=r"3 left out that cannot be read .*, such as 'a/pipe\.png'"):
        tasks = folder(place, ways=5, shots=1, queries=2, size=8, split="1,0,0")
    assert len(tasks.image_set.images) == 15
    with pytest.warns(UserWarning, match="3 left out"):
        assert Counter(label for _, label in labelled_images(place)) == dict.fromkeys("abcde", 3)
    for odd in (place / "a" / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match="no regular file"):
            read_bytes(odd)
        with pytest.raises(ValueError, match="neither a folder nor a regular file"):
            Files(odd)


def test_declared_sizes_are_checked_before_anything_is_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "MOST_BYTES", 1000)
    (place / "a" / "0.png").write_bytes(b"0" * 1001)
    with zipfile.ZipFile(tmp_path / "some.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", b"0" * 1001)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for size in (1001, 1):
            item = tarfile.TarInfo("a/0.png")
            item.size = size
            tar.addfile(item, io.BytesIO(b"0" * size))
    for root, name in ((place, "a/0.png"), (tmp_path / "some.zip", "0.png"), (tmp_path / "some.tar", "0.png")):
        with pytest.raises(ValueError, match=r"more than (the )?0 MiB"):
            list(Files(root).read([name]))
    monkeypatch.setattr(_files, "MOST_UNPACKED", 1000)
    os.utime(tmp_path / "some.tar", (1, 1))  # whose list is kept otherwise
    for root in (place, tmp_path / "some.zip", tmp_path / "some.tar"):
        with pytest.raises(ValueError, match="declares more than 0 TiB"):
            Files(root)
    np.savez(tmp_path / "some.npz", zeros=np.zeros(1000))
    monkeypatch.setattr(_files, "MOST_ARRAYS", 1000)
    with pytest.raises(ValueError, match="declares 0 GiB of arrays"):
        read_npz(tmp_path / "some.npz", ["zeros"])


def test_an_array_that_declares_more_than_memory_is_damaged(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 60,)})
    with zipfile.ZipFile(tmp_path / "some.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"few")
    with pytest.raises(ValueError, match="it is damaged or incomplete"):
        read_npz(tmp_path / "some.npz", ["images"])


def test_formats_that_need_another_program_are_not_read() -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    assert not is_image("some.eps")
    with pytest.raises(ValueError, match="in no format that is read here"):
        decode(script, 8, 1)
    assert all(map(is_image, ("a.png", "a.JPG", "a.webp", "a.gif", "a.tif", "a.bmp", "a.ppm")))


def test_a_split_file_that_is_none_is_one_line(place: Path, tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"class,split\n" + b"a" * 200_000 + b",train\n"):
        (tmp_path / "split.csv").write_bytes(content)
        with pytest.raises(ValueError, match=r"^[^\n]*split\.csv is no CSV file in UTF-8[^\n]*$"):
            folder(place, ways=2, queries=1, size=8, split=tmp_path / "split.csv")


@posix
def test_outputs_do_not_follow_a_planted_link(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    run.mkdir()
    elsewhere.write_text("mine")
    outputs: dict[str, Callable[[Path], object]] = {
        "settings.json": lambda path: write(path, "theirs"),
        "results.json": lambda path: save_results(path, {}),
        "curve.png": lambda path: save(path, panels([Panel({"line": Line([0, 1], [0, 1])}, {})])),
    }
    for name, output in outputs.items():
        (run / name).symlink_to(elsewhere)
        output(run / name)
        assert not (run / name).is_symlink()
    assert elsewhere.read_text() == "mine"


@posix
def test_names_reach_neither_terminal_nor_spreadsheet_as_they_are(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown("Ärger\x1b[2J\n\udcff") == "Ärger\\x1b[2J\\n\\udcff"
    odd = os.fsdecode(b"\x1b]0;gotcha\x07\xff")
    (place / odd).mkdir()
    (place / odd / "broken.png").write_bytes(b"\x89PNG")
    options = ["--dataset=folder", f"--data={place}", "--ways=2", "--queries=1", "--size=8", f"--out={tmp_path / 'r'}"]
    error = refused(capsys, "train", *options)
    assert "cannot read the image" in error
    assert "\\x1b]0;gotcha\\x07\\udcff" in error
    assert error[:-1].isprintable()
    _write_csv(tmp_path / "out.csv", [(Path("=1+1.png"), odd)], ["@SUM(1)", odd], [[0.9, 0.1]])
    text = (tmp_path / "out.csv").read_text(encoding="utf-8")
    assert list(csv.reader(text.splitlines()))[1][:3] == ["'=1+1.png", "\x1b]0;gotcha\x07\\udcff", "'@SUM(1)"]
