"""The letters that are rendered here: which they are, how they are split, and how hard they are."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from innerloop.tasks._baseline import nearest_neighbour
from innerloop.tasks._episodes import Episodes, ImageSet
from innerloop.tasks._glyphs import FACES, SCRIPTS, VARIANTS, _fill, _letters, _outlines, _polygons, _variants, glyphs


@pytest.fixture(scope="module")
def image_set() -> ImageSet:
    """All letters; rendered where the cache does not have them."""
    return glyphs().image_set


def test_thousands_of_letters_split_by_script(image_set: ImageSet) -> None:
    sizes = {split: len(classes) for split, classes in image_set.splits.items()}
    assert sizes["train"] >= 1400
    assert sizes["validation"] >= 250
    assert sizes["test"] >= 300
    assert image_set.counts == (20,) * sum(sizes.values())
    assert len(set(image_set.classes)) == sum(sizes.values())
    for split, classes in image_set.splits.items():
        scripts = {image_set.classes[index].partition("/")[0] for index in classes}
        assert scripts == {script.title() for script in SCRIPTS[split]}


def test_every_image_has_ink_inside_its_border(image_set: ImageSet) -> None:
    images = image_set.images
    assert images.shape[1:] == (1, 28, 28)
    assert (images.flatten(1).amax(1) == 255).all()
    share = images.flatten(1).float().mean(1) / 255
    assert share.min() > 0.005
    assert share.max() < 0.6
    assert len(images.flatten(1).unique(dim=0)) == len(images)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ("A", "\N{GREEK CAPITAL LETTER ALPHA}\N{CYRILLIC CAPITAL LETTER A}\N{LISU LETTER A}"),
        ("H", "\N{GREEK CAPITAL LETTER ETA}\N{CYRILLIC CAPITAL LETTER EN}"),
        ("I", "l\N{GREEK CAPITAL LETTER IOTA}\N{CYRILLIC LETTER PALOCHKA}\N{HEBREW LETTER VAV}"),
        ("O", "o\N{GREEK SMALL LETTER OMICRON}\N{CYRILLIC SMALL LETTER O}\N{ARMENIAN SMALL LETTER OH}"),
    ],
)
def test_a_shape_is_one_class_of_its_first_script(image_set: ImageSet, first: str, others: str) -> None:
    letters = _letters()
    assert letters[first].name in image_set.classes
    assert not {letters[other].name for other in others} & set(image_set.classes)


def test_letters_that_a_reader_tells_apart_stay_apart(image_set: ImageSet) -> None:
    letters = _letters()
    assert {letters[letter].name for letter in "AaBbeéèIJjЖßλ"} <= set(image_set.classes)


def test_which_characters_are_letters() -> None:
    letters = _letters()
    assert letters["λ"] == ("train", "Greek/small letter lamda")
    assert letters["ა"] == ("test", "Georgian/letter an")
    assert {"é", "\N{ARABIC LETTER BEH}", "\N{ARABIC LETTER BEH INITIAL FORM}", "\N{OGHAM LETTER BEITH}"} <= set(
        letters
    )
    repeated = "\N{LATIN SMALL LIGATURE FI}\N{MODIFIER LETTER SMALL H}\N{MATHEMATICAL BOLD SMALL A}ª"
    assert not set(repeated + "7.\N{COMBINING ACUTE ACCENT}\N{ANGSTROM SIGN}漢") & set(letters)


def test_faces_give_only_what_they_have() -> None:
    letters = "a\N{CANADIAN SYLLABICS E}\N{TIFINAGH LETTER YA}"
    assert {letter for letter, _ in _outlines("DejaVuSans-Bold", letters)} == set(letters)
    assert {letter for letter, _ in _outlines("DejaVuSansMono", letters)} == {"a"}
    for _, outline in _outlines("STIXGeneral", "bQ"):
        assert np.abs(outline.points).max() == pytest.approx(1)
        assert sorted(outline.following) == list(range(len(outline.points)))


def test_outlines_are_filled_by_winding() -> None:
    square = np.array([[-7, -7], [-7, 7], [7, 7], [7, -7]], dtype=float)  # clockwise, as in TrueType
    order = np.array([1, 2, 3, 0])
    expected = np.zeros((28, 28))
    expected[7:21, 7:21] = 255

    ring = np.concatenate([square, square[::-1] * 3 / 7])
    overlapping = np.concatenate([square, square + np.array([4, 0])])
    twice = np.concatenate([order, order + 4])
    images = _fill([square, ring, overlapping, square + np.array([0.5, 0.25])], [order, twice, twice, order])
    assert np.array_equal(images[0], expected)

    expected[11:17, 11:17] = 0
    assert np.array_equal(images[1], expected)
    expected[7:21, 7:25] = 255
    assert np.array_equal(images[2], expected)
    assert images[3, 10, 7] == images[3, 10, 21] == 128  # half a pixel to the right
    assert images[3, 6, 10] == 64  # a quarter of a pixel up
    assert images[3, 20, 10] == 191


def test_a_path_of_lines_and_curves_becomes_polygons() -> None:
    # A box with a parabola for a lid, closed back to its start.
    vertices = np.array([[0, 0], [0, 10], [5, 20], [10, 10], [10, 0], [0, 0]], dtype=float)
    points, following = _polygons(vertices, np.array([1, 2, 3, 3, 2, 79]))
    ahead = points[following]
    area = abs((points[:, 0] * ahead[:, 1] - points[:, 1] * ahead[:, 0]).sum()) / 2
    exact = (100 + 2 / 3 * 10 * 5) / (15 / 2) ** 2
    assert abs(area / exact - 1) < 0.01
    assert points[:, 1].max() == -points[:, 1].min() == 1
    assert np.allclose([points[:, 0].min(), points[:, 0].max()], [-2 / 3, 2 / 3])


def test_rendering_is_the_same_in_another_process(image_set: ImageSet) -> None:
    """And the same as in the cache: if it is not, the recipe has changed and its number has not."""
    letters = "QЖ\N{CANADIAN SYLLABICS E}\N{ARABIC LETTER BEH}\N{GEORGIAN LETTER AN}\N{TIFINAGH LETTER YA}"
    names = [_letters()[letter].name for letter in letters]
    cached = image_set.images.view(-1, VARIANTS, 28, 28)[[image_set.classes.index(name) for name in names]]
    program = f"import sys, test_glyphs as t; sys.stdout.buffer.write(t.rendered({letters!r}).tobytes())"
    written = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, check=True
    )
    assert torch.equal(torch.frombuffer(bytearray(written.stdout), dtype=torch.uint8).view_as(cached), cached)


def rendered(letters: str) -> np.ndarray:
    faces = [dict(_outlines(face, letters)) for face in FACES]
    return np.stack(
        [_variants([face[letter] for face in faces if letter in face], _letters()[letter].name) for letter in letters]
    )


@pytest.mark.parametrize(
    ("ways", "shots", "low", "high"), [(5, 1, 0.45, 0.60), (5, 5, 0.65, 0.80), (20, 1, 0.23, 0.36)]
)
def test_raw_pixels_are_about_as_hard_as_omniglot(
    image_set: ImageSet, ways: int, shots: int, low: float, high: float
) -> None:
    """Nearest neighbour scores 48, 72 and 29 % on Omniglot's evaluation characters."""
    source = Episodes(image_set, ways, shots)
    accuracy = torch.cat([nearest_neighbour(batch) for batch in source.test(200)]).mean()
    assert low < accuracy < high


def test_glyphs_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match=r"has 20 images, fewer than the 10 shots \+ 15 queries = 25"):
        glyphs(shots=10)
