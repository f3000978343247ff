"""Letters of the world's scripts, rendered from the fonts that matplotlib ships: real characters without a download.

Every letter is taken as an outline from each face that has it, distorted as an outline, and filled by the non-zero
winding rule. No font rasteriser is involved, so the images depend on the font files and on this file alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from innerloop.tasks._cache import Arrays, cached_arrays
from innerloop.tasks._episodes import Episodes, ImageSet, random_bits, recorded, uniform

RECIPE = 1
"""Version of the rendering; to be raised by any change that alters an image, since it names the cached file."""

SCRIPTS = {
    "train": ("LATIN", "GREEK", "COPTIC", "CYRILLIC", "CANADIAN SYLLABICS"),
    "validation": ("ARABIC", "OGHAM", "OLD ITALIC", "LISU"),
    "test": ("GEORGIAN", "ARMENIAN", "HEBREW", "TIFINAGH", "NKO", "LAO"),
}
"""The scripts of each split, as Unicode's character names spell them. Training comes first: see `_distinct`."""

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)

SIZE = 28  # pixels a side
VARIANTS = 20  # images of a letter, as in Omniglot
FEWEST_FACES = 2  # Tifinagh, N'Ko, Ogham and rarer Arabic letters come in a regular and a bold face only
ALIKE = 0.03  # two undistorted renders a, b are one shape where |a - b|² is at most this part of |a|² + |b|²
PIECES = 6  # straight pieces that each line or curve of an outline is cut into, so that it can bend

# The distortions of a variant, each uniform between its bounds, or between minus and plus it. Together they bring
# nearest neighbour on raw pixels down to what it scores on Omniglot (5-way 1-shot, 5-way 5-shot and 20-way 1-shot
# alike), while a reader still recognises every letter.
ROTATION = np.radians(12)
SHEAR = 0.15
STRETCH = 0.15  # logarithm of the factor on the width, and of the divisor of the height
WARP = 0.15  # displacement of a node of the elastic grid, in halves of the letter's larger side
WARP_REACH = 0.5  # standard deviation of a node's influence, in the same unit; fixed
EXTENT = (18.0, 25.0)  # larger side in pixels
STROKE = (1.6, 3.0)  # mean stroke width in pixels
THINNER, THICKER = 0.2, 0.4  # of a stroke's width, lost or gained on either side at most: hairlines stay, gaps do too
SHIFT = 0.3  # of the way from the centre to the edge of the image

_NODES = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 4)]), -1).reshape(-1, 2)

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]


class _Letter(NamedTuple):
    split: str
    name: str


class _Outline(NamedTuple):
    """Closed polygons: points ``[points, 2]``, y up, the larger side from -1 to 1, and the point that follows each."""

    points: Floats
    following: NDArray[np.int64]


@recorded
def glyphs(ways: int = 5, shots: int = 1, queries: int = 15, seed: int = 0) -> Episodes:
    """Few-shot tasks on 2,007 letters of 15 scripts, 20 images of 28 x 28 each, ink = 1; no script is in two splits.

    A class is a shape: letters that coincide in some face (Latin A, Greek Alpha, Cyrillic A) are one class, of the
    script that comes first in `SCRIPTS`. Its images are its faces in turn, each with a random rotation, shear, stretch,
    size, position, stroke width and elastic distortion. They are rendered at the first call, in half a minute, and read
    from the cache folder from then on.

    Raises:
        ValueError: ways, shots or queries below 1, shots and queries above 20 together, or more ways than classes.
    """
    arrays = cached_arrays(f"glyphs-{RECIPE}-matplotlib-{version('matplotlib')}.npz", _render)
    splits = {split: tuple(np.flatnonzero(arrays["splits"] == split).tolist()) for split in SCRIPTS}
    image_set = ImageSet(
        name="glyphs",
        images=torch.from_numpy(arrays["images"]).unsqueeze(1),
        counts=(VARIANTS,) * len(arrays["classes"]),
        classes=tuple(arrays["classes"].tolist()),
        splits=splits,
    )
    return Episodes(image_set, ways, shots, queries, seed)


def specimens(letters: str) -> dict[str, Bytes]:
    """The images of a few letters, ``[VARIANTS, SIZE, SIZE]`` each with ink = 255, by Unicode's name of the letter."""
    faces = [dict(_outlines(face, letters)) for face in FACES]
    names = {letter: unicodedata.name(letter) for letter in letters}
    return {name: _variants([face[letter] for face in faces if letter in face], name) for letter, name in names.items()}


def _render() -> Arrays:
    """All images ``[classes * VARIANTS, SIZE, SIZE]``, and the name and the split of each class."""
    letters = _letters()
    faces = [dict(_outlines(face, letters)) for face in FACES]
    drawn = {letter: [face[letter] for face in faces if letter in face] for letter in letters}
    kept = _distinct([letter for letter in letters if len(drawn[letter]) >= FEWEST_FACES], faces)
    return {
        "images": np.concatenate([_variants(drawn[letter], letters[letter].name) for letter in kept]),
        "classes": np.array([letters[letter].name for letter in kept]),
        "splits": np.array([letters[letter].split for letter in kept]),
    }


def _letters() -> dict[str, _Letter]:
    """Every letter of the scripts, in the order of `SCRIPTS`.

    Left out is what repeats other letters in another size or style: modifier letters (category Lm) and compatibility
    characters such as ligatures, superscripts and mathematical alphabets. The joined forms of Arabic are compatibility
    characters as well, but shapes of their own; they stay, as letters with accents do.
    """
    names = {}
    for letter in map(chr, range(0x20000)):
        form, *parts = unicodedata.decomposition(letter).split() or [""]
        joined = form in ("<isolated>", "<initial>", "<medial>", "<final>") and len(parts) == 1
        if unicodedata.category(letter) in ("Lu", "Ll", "Lt", "Lo") and (joined or not form.startswith("<")):
            names[letter] = unicodedata.name(letter, "")
    return {
        letter: _Letter(split, f"{script.title()}/{name.removeprefix(script).strip().lower()}")
        for split, scripts in SCRIPTS.items()
        for script in scripts
        for letter, name in names.items()
        if name.startswith(script + " ")
    }


def _outlines(face: str, letters: Collection[str]) -> Iterator[tuple[str, _Outline]]:
    """The outlines of those letters that a face truly has."""
    import matplotlib  # here, since it is slow to import and only rendering needs it
    from matplotlib.ft2font import FT2Font, LoadFlags

    font = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")))
    for code, glyph in font.get_charmap().items():
        if glyph and chr(code) in letters:
            font.load_glyph(glyph, LoadFlags.NO_SCALE | LoadFlags.IGNORE_TRANSFORM)
            vertices, codes = font.get_path()
            if len(codes):
                yield chr(code), _polygons(vertices, codes)


def _polygons(vertices: Floats, codes: NDArray[np.integer[Any]]) -> _Outline:
    """A path of lines and quadratic Bezier curves in matplotlib's codes, cut into pieces, centred and scaled."""
    move, curve, close = 1, 3, 79
    starts = codes == move
    contour = np.cumsum(starts) - 1
    vertices = np.where((codes == close)[:, None], vertices[starts][contour], vertices)
    control = (codes == curve) & (np.cumsum(codes == curve) % 2 == 1)  # a curve is a control point and an end point

    # Every line or curve from a to c, as the quadratic with control point b.
    (nodes,) = np.nonzero(~control)
    first, last = nodes[:-1], nodes[1:]
    drawn = ~starts[last] & (vertices[first] != vertices[last]).any(1)
    first, last = first[drawn], last[drawn]
    a, c = vertices[first], vertices[last]
    b = np.where(control[last - 1][:, None], vertices[last - 1], (a + c) / 2)
    t = np.arange(PIECES)[:, None] / PIECES
    points = ((1 - t) ** 2 * a[:, None] + 2 * t * (1 - t) * b[:, None] + t**2 * c[:, None]).reshape(-1, 2)

    # The last point of a contour is followed by its first.
    contour = contour[first].repeat(PIECES)
    following = np.arange(1, len(points) + 1)
    begins = np.flatnonzero(np.diff(contour, prepend=-1))
    following[np.append(begins[1:], len(points)) - 1] = begins

    return _Outline(_centred(points), following)


def _centred(points: Floats) -> Floats:
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) * (2 / (high - low).max())


def _distinct(letters: Sequence[str], faces: Sequence[dict[str, _Outline]]) -> list[str]:
    """The letters that in no face look like one before them, when drawn at the same size and with the same pen.

    So a shape that several scripts share is one class and belongs to the first of them, and no shape of a training
    script is ever seen in testing. Capital and small o are one class as well.
    """
    pen = np.array([2 * np.mean(STROKE) / np.mean(EXTENT)])
    alike = np.zeros((len(letters), len(letters)), dtype=bool)
    for face in faces:
        places = np.array([place for place, letter in enumerate(letters) if letter in face])
        outlines = [face[letters[place]] for place in places]
        points = [_centred(_with_strokes(outline, pen)[0]) * (EXTENT[1] / 2) for outline in outlines]
        renders = _fill(points, [outline.following for outline in outlines])
        # Small whole numbers, whose sums float32 holds exactly: which letters are alike must not depend on the machine.
        pixels = (renders.reshape(len(places), -1) // 16).astype(np.float32)
        products = pixels @ pixels.T
        squares = np.diag(products)
        alike[np.ix_(places, places)] |= 1 - 2 * products / (squares[:, None] + squares) <= ALIKE
    kept: list[int] = []
    for place in range(len(letters)):
        if not alike[place, kept].any():
            kept.append(place)
    return [letters[place] for place in kept]


def _variants(outlines: Sequence[_Outline], name: str) -> Bytes:
    """The images of a class, ``[VARIANTS, SIZE, SIZE]``: its faces in turn, each time distorted anew."""
    draws = 2 * uniform(random_bits(f"glyphs/{name}", RECIPE, 0, VARIANTS, 7 + _NODES.size)) - 1
    rotation, shear, stretch = draws[:, 0] * ROTATION, draws[:, 1] * SHEAR, np.exp(draws[:, 2] * STRETCH)
    extent = np.interp(draws[:, 3], (-1, 1), EXTENT)
    stroke = np.interp(draws[:, 4], (-1, 1), STROKE)
    shift = draws[:, 5:7] * SHIFT
    warp = draws[:, 7:].reshape(VARIANTS, -1, 2) * WARP
    cos, sin = np.cos(rotation), np.sin(rotation)
    # Stretch and shear, then rotate; transposed, since points are rows.
    linear = np.stack([cos * stretch, sin * stretch, cos * shear - sin / stretch, sin * shear + cos / stretch], -1)
    linear = linear.reshape(VARIANTS, 2, 2)

    images = np.empty((VARIANTS, SIZE, SIZE), dtype=np.uint8)
    for number, outline in enumerate(outlines[:VARIANTS]):
        which = slice(number, None, len(outlines))
        points = _with_strokes(outline, 2 * stroke[which] / extent[which])
        nearness = np.exp(((outline.points[:, None] - _NODES) ** 2).sum(-1) / (-2 * WARP_REACH**2))
        points = (points + nearness @ warp[which]) @ linear[which]
        low, high = points.min(1, keepdims=True), points.max(1, keepdims=True)
        scale = extent[which, None, None] / (high - low).max(2, keepdims=True)
        room = (SIZE - (high - low) * scale) / 2
        points = (points - (low + high) / 2) * scale + shift[which, None] * room
        images[which] = _fill(points, [outline.following] * len(points))
    return images


def _with_strokes(outline: _Outline, widths: Floats) -> Floats:
    """The points of an outline whose strokes are given these mean widths, ``[widths, points, 2]``."""
    points, following = outline
    edges = points[following] - points
    lengths = np.hypot(*edges.T)
    area = (points[:, 0] * edges[:, 1] - points[:, 1] * edges[:, 0]).sum() / 2
    normals = np.sign(area) * np.stack([edges[:, 1], -edges[:, 0]], -1) / lengths[:, None]
    after = normals[following]
    # The mitre: moving a corner by it moves both its edges by one. Sharp corners are cut short.
    outward = np.empty_like(points)
    outward[following] = (normals + after) / np.maximum(1 + (normals * after).sum(-1), 0.4)[:, None]
    own_width = 2 * abs(area) / lengths.sum()
    growth = ((widths - own_width) / 2).clip(-THINNER * own_width, THICKER * own_width)
    return points + growth[:, None, None] * outward


def _fill(points: Sequence[Floats], following: Sequence[NDArray[np.int64]], samples: int = 4) -> Bytes:
    """Fill outlines by the non-zero winding rule, ``[outlines, SIZE, SIZE]`` with ink = 255.

    A pixel is the mean of ``samples`` x ``samples`` samples. Points are in pixels from the centre of the image, y up.
    """
    grid = SIZE * samples
    lengths = [len(polygon) for polygon in points]
    starts = np.cumsum(lengths) - lengths
    a = np.concatenate(points) * (samples, -samples) + grid / 2
    b = a[np.concatenate([order + start for order, start in zip(following, starts, strict=True)])]
    down = a[:, 1] < b[:, 1]
    upper, lower = np.where(down[:, None], a, b), np.where(down[:, None], b, a)

    # Where each edge crosses the lines of samples, at half-integer heights.
    rows = np.clip(np.ceil(np.stack([upper[:, 1], lower[:, 1]]) - 0.5), 0, grid).astype(np.int64)
    crossings = rows[1] - rows[0]
    edge = np.repeat(np.arange(len(a)), crossings)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(crossings) - crossings - rows[0], crossings)
    slope = (lower - upper)[:, 0] / np.maximum((lower - upper)[:, 1], 1e-9)
    column = np.ceil(upper[edge, 0] + (row + 0.5 - upper[edge, 1]) * slope[edge] - 0.5)
    column = np.clip(column, 0, grid).astype(np.int64)

    # The winding number of a sample is the sum of the crossings to its left.
    image = np.repeat(np.arange(len(points)), lengths)[edge]
    place = (image * grid + row) * (grid + 1) + column
    steps = np.bincount(place, np.where(down, 1.0, -1.0)[edge], len(points) * grid * (grid + 1))
    winding = np.cumsum(steps.astype(np.int8).reshape(-1, grid, grid + 1), -1, dtype=np.int8)[:, :, :grid]
    inside = (winding != 0).view(np.uint8)
    covered = sum(inside[:, i::samples, j::samples] for i in range(samples) for j in range(samples))
    return np.rint(covered * (255 / samples**2)).astype(np.uint8)
