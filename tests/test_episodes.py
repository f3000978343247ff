"""Tasks are a pure function of (source, split, seed, index), and hold what they promise."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from innerloop.problem import Task
from innerloop.tasks import quadratic
from innerloop.tasks._baseline import nearest_neighbour
from innerloop.tasks._episodes import Episodes, ImageSet, TaskSource, random_bits, uniform

COUNTS = (6, 9, 5, 7, 8, 5, 6, 10, 5, 6, 7, 5)


def labelled(rotations: bool = False) -> ImageSet:
    """Images that say what they are: the pixels are the class, the number in the class, 200 and 0."""
    rows = [[index, number, 200, 0] for index, count in enumerate(COUNTS) for number in range(count)]
    return ImageSet(
        name="labelled",
        images=torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 2, 2),
        counts=COUNTS,
        classes=tuple(f"class {index}" for index in range(len(COUNTS))),
        splits={"train": (0, 2, 3, 4, 6, 7), "validation": (1, 5, 9), "test": (8, 10, 11)},
        rotations=rotations,
    )


def tensors(task: Task) -> tuple[Tensor, ...]:
    return (*task.support, *task.query)


def same(a: Task, b: Task) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def digest(source: TaskSource) -> str:
    parts = [tensor.numpy().tobytes() for task in source.train(3, 4, start=5) for tensor in tensors(task)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_shapes_types_and_labels() -> None:
    source = Episodes(labelled(), ways=3, shots=2, queries=3)
    (support, labels), (query, targets) = source.batch("train", 0, 5)
    assert (source.name, source.input_shape, source.ways, source.output_size) == ("labelled", (1, 2, 2), 3, 3)
    assert support.shape == (5, 6, 1, 2, 2)
    assert query.shape == (5, 9, 1, 2, 2)
    assert support.dtype == query.dtype == torch.float32
    assert labels.dtype == targets.dtype == torch.int64
    assert torch.equal(labels, torch.tensor([0, 0, 1, 1, 2, 2]).repeat(5, 1))
    assert torch.equal(targets, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]).repeat(5, 1))
    assert torch.equal(support[..., 1, 0], torch.full((5, 6, 1), 200 / 255))


def test_the_drawn_tasks_never_change() -> None:
    """Pairs of class and number, written down once: other machines and versions must draw the same."""
    source = Episodes(labelled(), ways=3, shots=1, queries=2, seed=7)
    task = source.batch("train", 812, 1)
    support, query = ((inputs[0] * 255).round().int() for inputs in (task.support[0], task.query[0]))
    assert support[:, 0, 0].tolist() == [[0, 3], [4, 6], [7, 7]]
    assert query[:, 0, 0].tolist() == [[0, 2], [0, 5], [4, 4], [4, 1], [7, 9], [7, 1]]


def test_the_random_stream_is_philox() -> None:
    """Block n of a stream is Philox of n + 1, since numpy raises the counter before it draws."""
    name = int.from_bytes(hashlib.sha256(b"stream").digest()[:8], "little")
    bits = random_bits("stream", 3, 10, 2, 6)
    blocks = [philox(key=(3, name), counter=count) for count in (21, 22, 23, 24)]
    assert bits.tolist() == [(blocks[0] + blocks[1])[:6], (blocks[2] + blocks[3])[:6]]


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 as Salmon et al. (2011) print it, in whole numbers of Python."""
    word = 2**64
    (k0, k1), (c0, c1, c2, c3) = key, (counter, 0, 0, 0)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, word)
        high1, low1 = divmod(0xCA5A826395121157 * c2, word)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return [c0, c1, c2, c3]


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = uniform(random_bits("stream", 0, 0, 100, 100))
    assert numbers.dtype == np.float64
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01


@pytest.mark.parametrize("rotations", [False, True])
def test_a_batch_is_its_single_tasks_stacked(rotations: bool) -> None:
    source = Episodes(labelled(rotations), ways=3, shots=1, queries=2)
    batch = source.batch("train", 4, 6)
    for place in range(6):
        single = source.batch("train", 4 + place, 1)
        assert all(torch.equal(a[place : place + 1], b) for a, b in zip(tensors(batch), tensors(single), strict=True))


def test_training_resumes_at_any_step() -> None:
    source = Episodes(labelled(), ways=2, shots=1, queries=1)
    whole = list(source.train(tasks_per_batch=3, steps=6))
    resumed = source.train(tasks_per_batch=3, steps=2, start=4)
    assert len(whole) == 6
    assert len(resumed) == 2
    assert all(same(a, b) for a, b in zip(whole[4:], resumed, strict=True))
    assert len(resumed) == 0
    assert same(whole[5], source.batch("train", 15, 3))


def test_validation_and_test_are_always_the_same_tasks() -> None:
    source = Episodes(labelled(), ways=2, shots=1, queries=1)
    for stream, split in ((source.validation, "validation"), (source.test, "test")):
        batches = list(stream(10, tasks_per_batch=4))
        assert len(stream(10, tasks_per_batch=4)) == 3
        assert [len(task.support[0]) for task in batches] == [4, 4, 2]
        together = Task(*(tuple(map(torch.cat, zip(*part, strict=True))) for part in zip(*batches, strict=True)))
        assert same(together, source.batch(split, 0, 10))


def test_every_process_draws_the_same_tasks() -> None:
    """Whatever seeds its hashes; by tasks written down once. Others would be other results of every published run."""
    found = digest(Episodes(labelled(rotations=True), 3, 1, 2, seed=11))
    assert found == "a87357461684b21d0a06de2ec4fbb6b4fb76df526416aba17b94dcdbc98fc0f8"


def test_seeds_splits_and_sources_have_streams_of_their_own() -> None:
    first = random_bits("labelled/train", 0, 0, 1, 8)
    for other in (random_bits("labelled/train", 1, 0, 1, 8), random_bits("labelled/test", 0, 0, 1, 8)):
        assert not np.intersect1d(first, other).size
    assert digest(Episodes(labelled(), 3, 1, 2, seed=0)) != digest(Episodes(labelled(), 3, 1, 2, seed=1))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_support_and_query_are_different_images_of_classes_of_the_split(split: str) -> None:
    image_set = labelled()
    source = Episodes(image_set, ways=2, shots=2, queries=3)
    (support, _), (query, _) = source.batch(split, 0, 200)
    images = torch.cat([support.view(200, 2, 2, 2, 2), query.view(200, 2, 3, 2, 2)], 2).mul(255).round().int()
    classes, numbers = images[..., 0, 0], images[..., 0, 1]
    assert (classes == classes[..., :1]).all()
    assert (classes[:, 0] != classes[:, 1]).all()
    assert set(classes.flatten().tolist()) == set(image_set.splits[split])
    assert (numbers < torch.tensor(image_set.counts)[classes]).all()
    assert all(len(set(row.tolist())) == 5 for row in numbers.flatten(0, 1))


def test_classes_images_and_labels_are_drawn_evenly() -> None:
    source = Episodes(labelled(), ways=3, shots=1, queries=1)
    (support, _), _ = source.batch("train", 0, 6000)
    images = support.view(6000, 3, 2, 2).mul(255).round().int()
    for label in range(3):
        classes, times = images[:, label, 0, 0].unique(return_counts=True)
        assert classes.tolist() == [0, 2, 3, 4, 6, 7]
        assert (times - 1000).abs().max() < 130  # 4.5 standard deviations
    of_class_seven = images[images[..., 0, 0] == 7][:, 0, 1]
    assert (of_class_seven.bincount(minlength=10) - 300).abs().max() < 80


def test_rotated_classes_are_drawn_in_training_only() -> None:
    image_set = labelled(rotations=True)
    plain = image_set.images.flatten(1).tolist()
    owner = np.repeat(np.arange(len(COUNTS)), COUNTS).tolist()
    kind_of = {  # of each image that may be seen: how it was turned, and its class
        tuple(image.rot90(quarter, (-2, -1)).flatten().tolist()): (quarter, owner[row])
        for quarter in range(4)
        for row, image in enumerate(image_set.images)
    }

    training = replace(image_set, splits={"train": image_set.splits["train"]})
    source = Episodes(training, ways=8, shots=1, queries=2)  # more ways than the six classes
    (support, _), (query, _) = source.batch("train", 0, 50)
    images = torch.cat([support.view(50, 8, 1, 4), query.view(50, 8, 2, 4)], 2).mul(255).round().int()
    seen = set()
    for task in images.tolist():
        kinds: list[tuple[int, int]] = []
        for members in task:
            kind = {kind_of[tuple(image)] for image in members}
            assert len(kind) == 1  # one class, turned one way, support and query alike
            kinds += kind
        assert len(set(kinds)) == 8
        seen |= set(kinds)
    assert seen == {(quarter, index) for quarter in range(4) for index in image_set.splits["train"]}

    source = Episodes(image_set, ways=2, shots=1, queries=2)
    for split in ("validation", "test"):
        (support, _), _ = source.batch(split, 0, 50)
        assert all(image in plain for image in support.flatten(0, 1).flatten(1).mul(255).round().int().tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 0}, "ways is 0"),
        ({"ways": 2, "shots": 0}, "shots is 0"),
        ({"ways": 2, "queries": -1}, "queries is -1"),
        ({"ways": 2, "queries": 1, "seed": -1}, r"seed is -1; it must be from 0 to 2\*\*64 - 1"),
        ({"ways": 4, "queries": 1}, "the validation split has 3 classes, fewer than the 4 ways asked"),
        (
            {"ways": 2, "shots": 2, "queries": 4},
            r"class 'class 2' has 5 images, fewer than the 2 shots \+ 4 queries = 6",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Episodes(labelled(), **arguments)


def test_no_fewer_ways_are_proposed_to_a_split_of_one_class() -> None:
    with pytest.raises(ValueError, match=r"the validation split has 1 classes.*give it more classes$"):
        Episodes(replace(labelled(), splits={"validation": (0,)}), ways=2, shots=1, queries=1)


def test_batches_that_do_not_exist_are_refused() -> None:
    source = Episodes(labelled(), ways=2, shots=1, queries=1)
    with pytest.raises(ValueError, match="labelled has no split 'exam'; it has train, validation, test"):
        source.batch("exam", 0, 1)
    with pytest.raises(ValueError, match="from task -1 on"):
        source.batch("train", -1, 2)
    with pytest.raises(ValueError, match="asked for 0 tasks"):
        source.batch("train", 0, 0)
    with pytest.raises(ValueError, match="tasks_per_batch is 0"):
        source.train(tasks_per_batch=0, steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(4, 2, 2, dtype=torch.uint8)},
            r"wrong: images must be uint8 .* not torch.uint8 \[4, 2, 2\]",
        ),
        ({"counts": (2, 3)}, "2 class names, 2 counts that add up to 5, and 4 images"),
        ({"splits": {"train": (0, 1), "test": (1,)}}, "splits must be disjoint"),
        ({"splits": {"train": (0, 2)}}, r"beyond 0\.\.1"),
        ({"images": torch.zeros(4, 1, 2, 3, dtype=torch.uint8), "rotations": True}, r"square images, not \[2, 3\]"),
    ],
)
def test_an_image_set_that_does_not_fit_together_is_refused(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "name": "wrong",
        "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "counts": (2, 2),
        "classes": ("a", "b"),
        "splits": {"train": (0, 1)},
    }
    with pytest.raises(ValueError, match=message):
        ImageSet(**(arguments | changes))  # type: ignore[arg-type]


def test_nearest_neighbour_takes_the_label_of_the_nearest_by_angle() -> None:
    support = torch.tensor([[[3.0, 0.0], [0.1, 0.1], [0.0, 1.0], [0.0, 2.0]]])
    query = torch.tensor([[[9.0, 1.0], [5.0, 4.9], [0.1, 0.9], [1.0, 0.1]]])
    task = Task((support, torch.tensor([[0, 0, 1, 1]])), (query, torch.tensor([[0, 0, 1, 1]])))
    assert torch.equal(nearest_neighbour(task), torch.tensor([0.75]))
    single = Task((support[0], torch.tensor([0, 0, 1, 1])), (query[0], torch.tensor([0, 0, 1, 1])))
    assert torch.equal(nearest_neighbour(single), torch.tensor(0.75))


@pytest.mark.parametrize("rotations", [False, True])
def test_single_images_are_of_all_training_classes(rotations):
    episodes = Episodes(labelled(rotations), ways=3, shots=2, queries=2, seed=4)
    single = episodes.single_images()
    assert single.output_size == (24 if rotations else 6)
    batch = single.batch("train", 3, 100)
    assert [tuple(part.shape) for part in (batch.support[1], batch.query[1])] == [(100, 6), (100, 6)]
    pixels = (torch.cat([batch.support[0], batch.query[0]], 1) * 255).round().long().flatten(2)
    labels = torch.cat([batch.support[1], batch.query[1]], 1)
    turn, place = labels // 6, labels % 6
    # a quarter turn to the left takes the upper left corner to the lower left one
    corner = torch.tensor([0, 2, 3, 1])[turn]
    found = pixels.gather(-1, corner.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(found, torch.tensor([0, 2, 3, 4, 6, 7])[place])
    assert set(labels.flatten().tolist()) == set(range(single.output_size))
    assert same(single.batch("train", 50, 2), Task(*((x[47:49], y[47:49]) for x, y in batch)))
    assert same(single.batch("test", 1, 2), episodes.batch("test", 1, 2))


def test_training_tasks_alone_may_have_more_shots():
    plain = Episodes(labelled(), ways=3, shots=1, queries=1)
    more = plain.with_train_shots(4)
    assert more.batch("train", 0, 2).support[0].shape[:2] == (2, 12)
    assert more.batch("train", 0, 2).query[0].shape[:2] == (2, 3)
    for split in ("validation", "test"):
        assert same(more.batch(split, 0, 2), plain.batch(split, 0, 2))
    with pytest.raises(ValueError, match="fewer than 1000 train-shots"):
        plain.with_train_shots(1000)
    with pytest.raises(ValueError, match="takes no train-shots"):
        quadratic().with_train_shots(4)
