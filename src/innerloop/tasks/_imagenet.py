"""miniImageNet and tieredImageNet, read from the user's own copy.

miniImageNet: Vinyals et al. (NIPS 2016), in the split of Ravi and Larochelle, "Optimization as a model for few-shot
learning" (ICLR 2017). tieredImageNet: Ren et al., "Meta-learning for semi-supervised few-shot classification" (ICLR
2018).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from innerloop.tasks._episodes import Episodes, ImageSet, recorded
from innerloop.tasks._files import Files, read_table
from innerloop.tasks._images import Layout, image_set, split_folders
from innerloop.tasks._pictures import is_image

SIZE = 84
LISTS = {"train.csv": "train", "val.csv": "validation", "test.csv": "test"}
LAYOUT = (
    "data= (--data) takes a folder, zip or tar with train.csv, val.csv and test.csv (columns filename,label) beside "
    "images/, or with class folders inside train/, val/ and test/"
)


@recorded
def mini_imagenet(
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    data: str | PathLike[str] | None = None,
    augment: str | None = None,
) -> Episodes:
    """Few-shot tasks of miniImageNet, ``[3, 84, 84]``: 64, 16 and 20 classes of 600 images.

    Images of other sizes are squeezed to 84 x 84 as the papers do, without cropping; the result is kept in the cache
    folder.

    Args:
        ways: classes in a task.
        shots: support examples a class.
        queries: query examples a class.
        seed: selects the stream of tasks.
        data: a folder, zip or tar. Either with Ravi and Larochelle's lists ``train.csv``, ``val.csv`` and ``test.csv``
            (columns ``filename,label``) beside the images in ``images/`` or in class folders, or with
            ``train/CLASS/IMAGE``, ``val/...`` and ``test/...``.
        augment: changes of training images, ``"flip"`` (left to right), ``"crop"`` (shifts by up to an eighth) or
            ``"flip,crop"``.

    Raises:
        FileNotFoundError: no ``data``, or nothing at that place. It is never downloaded.
        ValueError: another layout, a damaged archive, an unreadable image, or tasks too large for the images.
    """
    source = "the split lists are in github.com/twitter-research/meta-learning-lstm under data/miniImagenet"
    return Episodes(_image_set("mini_imagenet", source, data), ways, shots, queries, seed, augment)


@recorded
def tiered_imagenet(
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    data: str | PathLike[str] | None = None,
    augment: str | None = None,
) -> Episodes:
    """Few-shot tasks of tieredImageNet, ``[3, 84, 84]``: 351, 97 and 160 classes, split by 34 categories above them.

    Arguments and errors are those of `mini_imagenet`. All images together are 15 GiB, which lie in the cache folder and
    are mapped into memory rather than loaded. Reading them the first time takes about half an hour on two cores.
    """
    source = "its classes are listed in github.com/renmengye/few-shot-ssl-public"
    return Episodes(_image_set("tiered_imagenet", source, data), ways, shots, queries, seed, augment)


def _image_set(name: str, source: str, data: str | PathLike[str] | None) -> ImageSet:
    if data is None:
        raise FileNotFoundError(
            f"{name} cannot be downloaded, because ImageNet's licence forbids handing its images on: ask for them at "
            f"image-net.org/download ({source}); {LAYOUT}"
        )
    files = Files(Path(data).expanduser())
    images = [file for file in files.stamps if is_image(file)]
    layout = _listed(files) if LISTS.keys() <= files.stamps.keys() else split_folders(images)
    if layout is None or layout.keys() != set(LISTS.values()):
        raise ValueError(f"{files.root} is not laid out as {name}; {LAYOUT}")
    return image_set(name, files, layout, SIZE, 3, crop=False)


def _listed(files: Files) -> Layout:
    layout: Layout = {split: {} for split in LISTS.values()}
    for name, content in files.read(LISTS):
        for row in read_table(files.root / name, content):
            file, label = row.get("filename"), row.get("label")
            if not file or not label:
                raise ValueError(f"{files.root / name} must have the columns filename,label in every row")
            places = f"images/{file}", f"{label}/{file}", f"images/{label}/{file}"
            found = next((place for place in places if place in files.stamps), None)
            if found is None:
                raise ValueError(f"{files.root} lacks the image {file} of class {label} that {name} lists")
            layout[LISTS[name]].setdefault(label, []).append(found)
    return layout
