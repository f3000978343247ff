"""Where tasks come from. A task is a pure function of (source, split, seed, index)."""

from collections.abc import Callable

from innerloop.tasks._arrays import arrays, dataset
from innerloop.tasks._baseline import nearest_neighbour
from innerloop.tasks._cifar import cifar_fs, fc100
from innerloop.tasks._clustered import clustered
from innerloop.tasks._episodes import Episodes, ImageSet, TaskSource, check_seed, check_split, random_bits, uniform
from innerloop.tasks._fields import Fields
from innerloop.tasks._folder import folder
from innerloop.tasks._glyphs import glyphs
from innerloop.tasks._imagenet import mini_imagenet, tiered_imagenet
from innerloop.tasks._omniglot import omniglot
from innerloop.tasks._recurring import Prioritised, Recurring
from innerloop.tasks._regression import linear, quadratic, sinusoid
from innerloop.tasks._stations import stations

SOURCES: dict[str, Callable[..., TaskSource]] = {
    "glyphs": glyphs,
    "omniglot": omniglot,
    "cifar_fs": cifar_fs,
    "fc100": fc100,
    "mini_imagenet": mini_imagenet,
    "tiered_imagenet": tiered_imagenet,
    "folder": folder,
    "sinusoid": sinusoid,
    "linear": linear,
    "quadratic": quadratic,
    "stations": stations,
}
"""By name. All take ``shots``, ``queries`` and ``seed``; those of images ``ways``; those of stored data ``data``."""

__all__ = [
    "SOURCES",
    "Episodes",
    "Fields",
    "ImageSet",
    "Prioritised",
    "Recurring",
    "TaskSource",
    "arrays",
    "check_seed",
    "check_split",
    "cifar_fs",
    "clustered",
    "dataset",
    "fc100",
    "folder",
    "glyphs",
    "linear",
    "mini_imagenet",
    "nearest_neighbour",
    "omniglot",
    "quadratic",
    "random_bits",
    "sinusoid",
    "stations",
    "tiered_imagenet",
    "uniform",
]
