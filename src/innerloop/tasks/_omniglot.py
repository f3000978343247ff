"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 350
(2015).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from innerloop.tasks._cache import Arrays, cached_arrays
from innerloop.tasks._downloads import download
from innerloop.tasks._episodes import Episodes, ImageSet, random_bits, recorded
from innerloop.tasks._files import Files, read_npz
from innerloop.tasks._pictures import is_image, open_image

URL = "https://github.com/brendenlake/omniglot/raw/master/python"
ARCHIVES = {
    "images_background": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    "images_evaluation": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
}
CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWERS = 20

VALIDATION_ALPHABETS = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
LAYOUT = (
    "data= (--data) takes omniglot28.npz, its folder, or the folder of images_background and images_evaluation "
    "(unpacked or .zip) from github.com/brendenlake/omniglot, python/"
)


@recorded
def omniglot(
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    data: str | PathLike[str] | None = None,
    rotations: bool = False,
    split: str = "background",
    augment: str | None = None,
) -> Episodes:
    """Few-shot tasks of handwritten characters, ``[1, 28, 28]`` with ink = 1.

    The originals are averaged over area from 105 x 105 pixels, as exactly as bytes allow.

    Splits (characters to train, validate and test on):

    * ``"background"``: the authors' 30 background alphabets, of which five are kept for validation, and their 20
      evaluation alphabets (792, 172, 659). No alphabet is in two splits.
    * ``"1200"``: at random and regardless of alphabets (1,100, 100, 423), as in MAML (Finn et al. 2017). The papers'
      draws were not kept; ours is one fixed draw, the same for every seed.
    * ``"vinyals"``: of the characters in order, background alphabets first, the last 423 are for testing, and the same
      five alphabets for validation (1,028, 172, 423). Vinyals et al. (2016), in the lists of Snell et al. (2017).

    Args:
        ways: classes in a task.
        shots: support examples a class.
        queries: query examples a class.
        seed: selects the stream of tasks; the split does not depend on it.
        data: where the images are: an npz, or a folder that holds the authors' two folders or archives; by default they
            are downloaded from the authors' repository (15 MiB) and kept in the cache folder.
        rotations: training characters turned by 90, 180 and 270 degrees are further classes.
        split: see above.
        augment: ``"crop"`` shifts training images by up to an eighth; ``"flip"`` mirrors them, which makes other
            characters of many.

    Raises:
        ValueError: an unknown split or augmentation, data that is damaged or incomplete, or tasks too large for the
            images.
        FileNotFoundError: nothing readable at ``data``.
        ConnectionError: the download failed.
    """
    arrays = _load(data)
    names = tuple(map(str, arrays["names"]))
    images = torch.from_numpy(arrays["images"]).unsqueeze(1)
    return Episodes(
        ImageSet("omniglot", images, (DRAWERS,) * len(names), names, _splits(split, names), rotations),
        ways,
        shots,
        queries,
        seed,
        augment,
    )


def shrink(image: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Ink of a 105 x 105 drawing (0 or 1) averaged over area to 28 x 28, as bytes 0 to 255, rounded to the nearest.

    An output pixel covers 3.75 source pixels a side, so weights count quarters of a pixel and all arithmetic is exact.
    """
    out, source = 15.0 * np.arange(28)[:, None], 4.0 * np.arange(105)
    weights = np.clip(np.minimum(out + 15, source + 4) - np.maximum(out, source), 0, None)
    covered = (weights @ image @ weights.T).astype(np.int64)  # of 225
    return ((34 * covered + 15) // 30).astype(np.uint8)


def _splits(split: str, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    background = CHARACTERS["images_background"]
    everyone = range(len(names))
    if split == "1200":
        order = [int(place) for place in random_bits("omniglot/1200", 0, 0, 1, len(names))[0].argsort()]
        return {"train": tuple(order[:1100]), "validation": tuple(order[1100:1200]), "test": tuple(order[1200:])}
    if split not in ("background", "vinyals"):
        raise ValueError(f"omniglot has no split {split!r}; it has background, 1200 and vinyals")
    first_test = background if split == "background" else 1200
    validation = [index for index in everyone if names[index].partition("/")[0] in VALIDATION_ALPHABETS]
    train = sorted(set(range(first_test)) - set(validation))
    return {"train": tuple(train), "validation": tuple(validation), "test": tuple(everyone[first_test:])}


def _load(data: str | PathLike[str] | None) -> Arrays:
    """``images`` uint8 ``[characters * 20, 28, 28]`` and ``names`` of the characters, background first."""
    if data is None:
        return cached_arrays(
            "omniglot28.npz",
            lambda: _shrink_all([Files(download(f"{URL}/{part}.zip", sha)) for part, sha in ARCHIVES.items()]),
        )
    root = Path(data).expanduser()
    for file in (root, root / "omniglot28.npz"):
        if file.is_file() and file.suffix == ".npz":
            arrays = read_npz(file, ("images", "char_names"))
            return _checked({"images": arrays["images"], "names": arrays["char_names"]}, file)
    places = [
        folder / f"{name}{suffix}" for folder in (root, root / "python") for suffix in ("", ".zip") for name in ARCHIVES
    ]
    found = {place.stem: place for place in reversed(places) if place.exists()}
    if found.keys() != ARCHIVES.keys():
        raise FileNotFoundError(f"found no Omniglot at {root}; {LAYOUT}")
    parts = [Files(found[name]) for name in ARCHIVES]
    key = hashlib.sha256(repr([(part.place, part.stamps) for part in parts]).encode()).hexdigest()[:16]
    return cached_arrays(f"omniglot28-{key}.npz", lambda: _shrink_all(parts))


def _shrink_all(parts: list[Files]) -> Arrays:
    images: list[NDArray[np.uint8]] = []
    names: list[str] = []
    for files, expected in zip(parts, CHARACTERS.values(), strict=True):
        drawings = [name for name in files.stamps if is_image(name)]
        drawers = Counter(name.rpartition("/")[0] for name in drawings)
        if len(drawers) != expected or set(drawers.values()) != {DRAWERS}:
            raise ValueError(
                f"{files.root} has {len(drawings)} drawings of {len(drawers)} characters, not {DRAWERS} of each of "
                f"{expected}; it is incomplete, so fetch it again"
            )
        small = {}
        for name, content in files.read(drawings):
            try:
                with open_image(content) as image:
                    small[name] = shrink(~np.asarray(image.convert("1")))
            except Exception as error:  # a damaged image makes Pillow's decoders raise nearly anything
                raise ValueError(f"cannot read the image {files.root / name} ({error}); fetch it again") from error
        images += [small[name] for name in drawings]
        names += drawers
    return {"images": np.stack(images), "names": np.array(names)}


def _checked(arrays: Arrays, file: Path) -> Arrays:
    characters = sum(CHARACTERS.values())
    if arrays["images"].shape != (characters * DRAWERS, 28, 28) or arrays["names"].shape != (characters,):
        raise ValueError(
            f"{file} holds images {list(arrays['images'].shape)} of {len(arrays['names'])} characters, not "
            f"{characters * DRAWERS} x 28 x 28 of {characters}; {LAYOUT}"
        )
    return arrays
