"""An adapted model as one file that runs without innerloop: a program of ``torch.export``, or ONNX.

The program holds the preprocessing of `innerloop.tasks._images.decode`, bit for bit. Decoding a file stays outside.
"""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from innerloop.choices import check_name
from innerloop.errors import Failed, UsageError
from innerloop.tasks._pictures import upright
from innerloop.training.adaptation import read_images

FORMATS = "pt2", "onnx"
METADATA = "innerloop.json"  # its name inside the file, in both formats
TOLERANCE = 1e-5  # of the largest score: float32 has no more where scores are large
PRECISION = 2**22  # Pillow rounds the weights of a resize to so many parts of 1
LUMA = 19595, 38470, 7471  # of red, green and blue in 65536 parts, as Pillow has them

CONTRACT = {
    "input": "images: uint8 [images, height, width, 3], red green blue, of any size; the images of one call are of one",
    "decoding": "turn the image as its EXIF data says, keep the upper 8 of 16 bits, put it on white where it is "
    "transparent, convert it to RGB",
    "output": "scores: float [images, classes], as the adapted model gives them; their softmax are probabilities",
}

# How an exported file gives scores, [images, classes], without innerloop.
RUN = {
    ".pt2": f"""
import torch
files = {{"{METADATA}": ""}}
model = torch.export.load("FILE", extra_files=files).module()
notes = json.loads(files["{METADATA}"])
run = lambda images: model(torch.from_numpy(images)).numpy()
""",
    ".onnx": f"""
import onnxruntime
model = onnxruntime.InferenceSession("FILE", providers=["CPUExecutionProvider"])
notes = json.loads(model.get_modelmeta().custom_metadata_map["{METADATA}"])
run = lambda images: model.run(None, {{"images": images}})[0]
""",
}
# How it is used on an image file.
LOAD = """import json
import numpy as np
from PIL import Image, ImageOps
RUN
def read(file):
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))[None]

"""
USE = LOAD + 'print(notes["classes"][run(read("new.jpg"))[0].argmax()])'
# The same where innerloop is refused, as on a machine without it: each file by itself, then the first three times.
CHECK = f"""
import sys
sys.modules["innerloop"] = None  # an import of it fails
{LOAD}
images = [read(file) for file in sys.argv[1:]]
np.savez("given.npz", *map(run, [*images, images[0].repeat(3, 0)]))
"""


class Portable(nn.Module):
    """From decoded images to the scores of a model, by operations that both formats have.

    Args:
        model: what `load_adapted` gives.
        shape: channels, height and width of its inputs.
        invert: as in `read_images`.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], invert: bool | None) -> None:
        super().__init__()
        self.model, self.invert = model, invert
        self.channels, self.size, _ = shape

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[images, height, width, 3]`` to scores ``[images, classes]``."""
        scores: Tensor = self.model(self.inputs(images).to(next(self.model.parameters()).dtype))
        return scores

    def inputs(self, images: Tensor) -> Tensor:
        """What `read_images` gives for the same images, ``[images, *shape]``."""
        pixels = images.permute(0, 3, 1, 2).double()  # exact, as Pillow's whole numbers are
        if self.channels == 1:
            luma = torch.tensor(LUMA, dtype=torch.float64)[:, None, None]
            pixels = _whole((pixels * luma).sum(1, keepdim=True), 65536)
        height, width = pixels.shape[-2:]
        pixels = _whole(pixels @ self._weights(width, height).mT, PRECISION)
        pixels = _whole(self._weights(height, width) @ pixels, PRECISION)
        if self.invert is None:
            rim = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[..., 0], pixels[..., -1]], -1).flatten(1)
            rim, middle = rim.sort(-1).values, self.channels * 2 * self.size
            light = rim[:, middle - 1] + rim[:, middle] >= 2 * 128
            pixels = torch.where(light[:, None, None, None], 255 - pixels, pixels)
        elif self.invert:
            pixels = 255 - pixels
        return pixels.float() / 255

    def _weights(self, length: int, other: int) -> Tensor:
        """Weights ``[size, length]`` of Pillow's Lanczos filter over the centred square, in whole parts."""
        whole, across = (torch.scalar_tensor(each, dtype=torch.float64) for each in (length, other))
        side = torch.minimum(whole, across)
        first, step = torch.floor((whole - side) / 2), side / self.size
        places, rows = (torch.arange(each, dtype=torch.float64) + 0.5 for each in (length, self.size))
        away = (places - first - rows[:, None] * step) / step.clamp(min=1.0)
        inside = (places > first) & (places < first + side) & (away.abs() < 3)
        weights = torch.where(inside, torch.sinc(away) * torch.sinc(away / 3), 0.0)
        parts = weights / weights.sum(1, keepdim=True) * PRECISION
        return torch.sign(parts) * torch.floor(parts.abs() + 0.5)


def _whole(sums: Tensor, parts: int) -> Tensor:
    """Sums in so many parts, rounded to whole grey levels."""
    return torch.floor(sums / parts + 0.5).clamp(0, 255)


def check_format(kind: str) -> None:
    """Refuse a format that is unknown, or whose packages are missing.

    Raises:
        ValueError: an unknown format.
        UsageError: a package is missing.
    """
    check_name("export", kind, FORMATS)
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" and find_spec(name) is None]
    if missing:
        raise UsageError(f"--export onnx needs {', '.join(missing)}: pip install 'innerloop[onnx]', or --export pt2")


def export(path: Path, model: nn.Module, notes: dict[str, Any], files: Sequence[Path]) -> None:
    """Write a model as one file, once a fresh process without innerloop has got the same numbers from it.

    Args:
        path: where it goes; the suffix, ``.pt2`` or ``.onnx``, is the format.
        model: what ``MetaLearner.adapt(..., inductive=True)`` or `load_adapted` gave.
        notes: what `load_adapted` gave: ``classes``, ``input_shape`` and ``invert`` at least.
        files: image files to compare on, one or more.

    Raises:
        Failed: the model cannot be exported, or a score differs by more than 1e-5 of the largest; there is no file.
    """
    model = copy.deepcopy(model).cpu().eval()
    shape, invert = notes["input_shape"], notes["invert"]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, torch.no_grad():
        made = Path(folder, f"made{path.suffix}")
        try:
            _write(made, Portable(model, shape, invert), json.dumps({**CONTRACT, **notes}))
        except Exception as error:  # torch.export raises nearly anything at a model that it cannot trace
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise Failed(f"torch cannot export this model ({reason}); use il.load_adapted on its folder") from error
        odd = _odd_images(Path(folder), shape[-1])
        asked = [Path(folder, f"{number}.png") for number in range(len(files))]
        for file, place in zip(files, asked, strict=True):
            upright(file.read_bytes(), shape[-1]).save(place)  # which shrinks a JPEG of many megapixels
        like = next(model.parameters())
        wanted = [model(read_images([file], shape, invert).to(like.dtype)).numpy() for file in (*files, *odd)]
        wanted.append(wanted[0].repeat(3, 0))
        found = _fresh(made, [*asked, *odd])
        apart = max(np.abs(mine - theirs).max() for mine, theirs in zip(wanted, found, strict=True))
        apart /= max(1.0, *(np.abs(each).max() for each in wanted))
        if not apart <= TOLERANCE:
            raise Failed(f"the exported model differs by {apart:.1e} of the largest score: use il.load_adapted")
        made.replace(path)


def remove_exported(folder: Path) -> None:
    """Remove the files of an earlier model, in every format."""
    for kind in FORMATS:
        (folder / f"adapted.{kind}").unlink(missing_ok=True)


def _write(path: Path, program: Portable, metadata: str) -> None:
    dynamic = {"images": {axis: torch.export.Dim(name) for axis, name in enumerate(("batch", "height", "width"))}}
    example = torch.zeros(2, 40, 50, 3, dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore"):  # torch's own
        exported = torch.export.export(program, (example,), dynamic_shapes=dynamic)
        if path.suffix == ".pt2":
            torch.export.save(exported, path, extra_files={METADATA: metadata})
            return
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
        onnx = torch.onnx.export(exported, (), dynamo=True, verbose=False)
    assert onnx is not None
    onnx.model.metadata_props[METADATA] = metadata
    onnx.save(path, external_data=False)


def _odd_images(folder: Path, size: int) -> list[Path]:
    """A photograph that lies on its side, a picture that is transparent in places, and one of 16 bits."""
    from PIL import ExifTags, Image

    noise = np.random.default_rng(0).integers(0, 256, (size, 2 * size, 4), np.uint8)
    turned, clear, deep = files = [folder / name for name in ("turned.jpg", "clear.png", "deep.png")]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise[..., :3]).save(turned, exif=exif)
    Image.fromarray(noise).save(clear)
    Image.fromarray(noise.view(np.uint16)[..., 0]).save(deep)
    return files


def _fresh(program: Path, files: Sequence[Path]) -> list[Any]:
    """What the program gives for image files beside it, in a process where innerloop cannot be imported."""
    command = [sys.executable, "-W", "ignore", "-c", _filled(CHECK, program.name), *(file.name for file in files)]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"the exported file does not run by itself: {(done.stderr.splitlines() or ['it died'])[-1]}")
    with np.load(program.with_name("given.npz")) as found:
        return [found[name] for name in found]


def usage(name: str) -> str:
    """Python that runs an exported file of this name on one image."""
    return _filled(USE, name)


def _filled(code: str, name: str) -> str:
    return code.replace("RUN\n", RUN[Path(name).suffix].replace("FILE", name).lstrip())
