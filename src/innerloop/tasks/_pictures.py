"""Image files decoded by Pillow, upright, cut to a square and resized."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from innerloop.tasks._files import Files

if TYPE_CHECKING:
    from PIL import Image


Pixels = NDArray[np.uint8]
LARGEST = 84  # pixels a side that images are left at most, unless a size is asked for: those of miniImageNet
MEASURED = 200  # images that are looked at to find the usual size
DECODING = 3
"""Version of `decode`; to be raised by any change that alters an image, since it names the cached file."""

# Those that Pillow reads by itself. Of the others EPS, for one, starts Ghostscript on whatever the file says.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def is_image(name: str) -> bool:
    """Whether a file's suffix is that of a format which Pillow reads by itself, `FORMATS`."""
    from PIL import Image

    return Image.registered_extensions().get(os.path.splitext(name)[1].lower(), "") in {*FORMATS} & Image.OPEN.keys()


def open_image(content: bytes) -> Image.Image:
    """An image file in one of `FORMATS`, not yet decoded.

    Raises:
        ValueError: it is in no such format.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        return Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:  # whose message is the address of the bytes
        raise ValueError("in no format that is read here") from None


def decode(content: bytes, size: int, channels: int, crop: bool = True) -> Pixels:
    """The image in a file's bytes as uint8 ``[channels, size, size]``, upright as its EXIF data says.

    Args:
        content: a file in one of `FORMATS`; of several frames the first, on white where it is transparent.
        size: height and width to resize to (Lanczos).
        channels: 1 for grey, 3 for colour.
        crop: cut the largest centred square out first; otherwise the image is squeezed.

    Raises:
        Exception: Pillow cannot read it. Its decoders raise nearly anything where an image is damaged.
    """
    return pixels_of(upright(content, size), size, channels, crop)


def upright(content: bytes, size: int) -> Image.Image:
    """The image in a file's bytes, grey or RGB, turned as its EXIF data says, on white where it is transparent.

    Args:
        content: as in `decode`.
        size: the side that will be asked for. A JPEG of many megapixels may come at a half, a quarter or an eighth of
            its own size, no less than four times what is asked.

    Raises:
        Exception: as `decode`.
    """
    from PIL import ImageOps

    with open_image(content) as file:
        file.draft(None, (4 * size, 4 * size))
        image = ImageOps.exif_transpose(file)
        if file.format == "PPM" and image.mode == "I":  # 16 bits, to Pillow of 32
            image = image.convert("I;16")
        return plain(image)


def plain(image: Image.Image) -> Image.Image:
    """A Pillow image in grey or RGB, on white where it is transparent.

    Raises:
        ValueError: it has 32 bits a channel, which convert() would clip at 255.
    """
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError("nothing says which of its 32-bit values is white; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def pixels_of(image: Image.Image, size: int, channels: int, crop: bool = True) -> Pixels:
    """A Pillow image as uint8 ``[channels, size, size]``; arguments as in `decode`."""
    from PIL import Image

    image = plain(image).convert("L" if channels == 1 else "RGB")
    if crop:  # before resizing, so that no version of Pillow reads beyond the square or chooses the order of its passes
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def usual_size(sides: Sequence[int]) -> int:
    """The side to which images are resized where none is asked for: the median of their shorter sides, at most 84."""
    size = min(LARGEST, int(np.median(sides)))
    logging.getLogger("innerloop").info("images become %d x %d pixels: set size for another side", size, size)
    return size


def size_of(files: Files, names: Sequence[str]) -> int:
    """`usual_size` of some images, judged by up to 200 of them.

    Raises:
        ValueError: none can be read.
    """
    sides = []
    for _, content in files.read(names[:: len(names) // MEASURED + 1]):
        with contextlib.suppress(Exception), open_image(content) as image:  # see `decode`
            sides.append(min(image.size))
    if not sides:
        raise ValueError(f"cannot read the images of {files.root}: repair them, or name another folder")
    return usual_size(sides)
