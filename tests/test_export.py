"""Adapted models as files: preprocessing to the bit, a process without innerloop, and nothing left where it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import innerloop as il
from innerloop.errors import Failed, UsageError
from innerloop.tasks._pictures import upright
from innerloop.training import export as module
from innerloop.training.adaptation import read_images
from innerloop.training.export import Portable, check_format, export, usage

SIZES = (40, 40), (16, 16), (57, 100), (101, 56), (13, 9), (640, 481)  # width, height


def paint(file: Path, size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Path:
    generator = np.random.default_rng((seed, *size))
    coarse = generator.integers(0, 256, (size[1] // 8 + 2, size[0] // 8 + 2, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize(size)).astype(int) + generator.integers(
        -30, 30, (*size[::-1], 3)
    )
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(file)
    return file


def decoded(file: Path, size: int) -> Tensor:
    return torch.from_numpy(np.array(upright(file.read_bytes(), size).convert("RGB")))[None]


def adapted(channels: int) -> nn.Module:
    model = il.models.Conv4(channels, 3, filters=4, size=16)
    learner = il.MetaLearner(model, il.Head(), il.SGD(lr=0.5, steps=2))
    return learner.adapt(torch.rand(6, channels, 16, 16), torch.arange(3).repeat(2), inductive=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (1, "L"), (3, "RGB"), (3, "RGBA"), (1, "P")])
def test_the_program_prepares_images_as_adapt_does_to_the_bit(
    tmp_path: Path, size: tuple[int, int], channels: int, mode: str
) -> None:
    file = paint(tmp_path / "x.png", size, mode)
    for invert in (False, True, None):
        program = Portable(nn.Identity(), (channels, 16, 16), invert)
        assert torch.equal(program.inputs(decoded(file, 16)), read_images([file], (channels, 16, 16), invert))


def test_a_photograph_of_many_pixels_is_prepared_alike(tmp_path: Path) -> None:
    file = paint(tmp_path / "x.jpg", (900, 1200))
    assert decoded(file, 16).shape < (1, 400, 400)  # the JPEG decoder has shrunk it
    program = Portable(nn.Identity(), (3, 16, 16), False)
    assert torch.equal(program.inputs(decoded(file, 16)), read_images([file], (3, 16, 16), False))


@pytest.mark.parametrize(("kind", "channels"), [("pt2", 1), ("onnx", 3)])
def test_the_file_runs_by_itself_and_says_what_it_needs(
    tmp_path: Path, kind: str, channels: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="needs innerloop[onnx]")
    model = adapted(channels)
    notes = {"classes": ["a", "b", "c"], "input_shape": [channels, 16, 16], "invert": None}
    files = [paint(tmp_path / f"{number}.png", size) for number, size in enumerate(SIZES[:3])]
    path = tmp_path / "out" / f"adapted.{kind}"
    path.parent.mkdir()
    export(path, model, notes, files)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert capfd.readouterr().err == ""

    # the page's own lines, on one of the images and on files that need more than decoding
    Image.open(files[2]).save(tmp_path / "out" / "new.jpg", quality=95)
    monkeypatch.chdir(path.parent)
    names: dict = {}
    exec(usage(path.name), names)
    assert names["notes"]["classes"] == ["a", "b", "c"]
    (tmp_path / "deep.pgm").write_bytes(b"P5\n6 4\n65535\n" + np.arange(0, 48000, 2000).astype(">u2").tobytes())
    odd = [paint(tmp_path / f"{mode}.png", (20, 10), mode) for mode in ("L", "LA", "P", "RGBA", "1")]
    for file in (*module._odd_images(tmp_path, 16), tmp_path / "deep.pgm", *odd):
        assert np.array_equal(names["read"](file), decoded(file, 16)), file
    assert {"input", "decoding", "output"} <= names["notes"].keys()
    batch = torch.cat([decoded(files[2], 16)] * 3)
    found = torch.from_numpy(names["run"](batch.numpy()))
    with torch.no_grad():
        wanted = model(read_images([files[2]] * 3, (channels, 16, 16), None))
    assert (found - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


def test_a_file_that_differs_or_cannot_be_made_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :2] * (self.weight if images.sum() > 0 else -self.weight)

    notes = {"classes": ["a", "b"], "input_shape": [1, 16, 16], "invert": False}
    file, out = paint(tmp_path / "x.png", (20, 20)), tmp_path / "out"
    out.mkdir()
    with pytest.raises(Failed, match=r"^torch cannot export this model \([^\n]*; use il.load_adapted on its folder$"):
        export(out / "a.pt2", Branches(), notes, [file])
    # as if the program had given other numbers, or had died
    monkeypatch.setattr(module, "_write", lambda path, program, metadata: path.write_bytes(b"no program"))
    monkeypatch.setattr(module, "_fresh", lambda program, files: [np.full((1, 3), 9.0)] * (len(files) + 1))
    with pytest.raises(Failed, match=r"^the exported model differs by \d"):
        export(out / "a.pt2", adapted(1), notes, [file])
    monkeypatch.undo()
    monkeypatch.setattr(module, "_write", lambda path, program, metadata: path.write_bytes(b"no program"))
    monkeypatch.setattr(module, "CHECK", "raise SystemExit('no program')")
    with pytest.raises(Failed, match=r"^the exported file does not run by itself: no program$"):
        export(out / "a.pt2", adapted(1), notes, [file])
    assert list(out.iterdir()) == []


def test_the_check_runs_where_innerloop_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK", module.CHECK.replace("import numpy as np\n", "import innerloop\n"))
    with pytest.raises(Failed, match="import of innerloop halted"):
        module._fresh(tmp_path / "a.pt2", [])


@pytest.mark.parametrize("forgotten", ["", "ImageOps.exif_transpose", " >> 8", "image.has_transparency_data"])
def test_the_check_notices_a_step_of_decoding_that_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    class Upper(nn.Module):
        """The mean of the upper half, as `run` below has it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> Tensor:
            return images[:, :, :8].mean((1, 2, 3))[:, None] * self.weight

    run = """
def run(images):
    top, left = (images.shape[1] - 16) // 2, (images.shape[2] - 16) // 2
    return images[:, top : top + 8, left : left + 16].mean((1, 2, 3))[:, None] / 255
"""
    monkeypatch.setattr(module, "RUN", {".pt2": run})
    monkeypatch.setattr(module, "_write", lambda path, program, metadata: path.write_text(""))
    monkeypatch.setattr(module, "CHECK", module.CHECK.replace(forgotten, "False" if "has" in forgotten else ""))
    notes = {"classes": ["a"], "input_shape": [3, 16, 16], "invert": False}
    asked = (tmp_path / "a.pt2", Upper(), notes, [paint(tmp_path / "x.png", (16, 16))])
    if forgotten:
        with pytest.raises(Failed, match="the exported model differs"):
            export(*asked)
    else:
        export(*asked)


def test_a_format_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="export 'onx' is unknown: did you mean 'onnx'"):
        check_format("onx")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    check_format("pt2")
    with pytest.raises(UsageError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'innerloop\[onnx\]'"):
        check_format("onnx")
